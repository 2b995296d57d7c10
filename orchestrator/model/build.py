"""Building the model, partitioned from its first tensor where ZeRO-3 is used."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from orchestrator.errors import SpecError
from orchestrator.model import attention
from orchestrator.model.loss import TiledHead
from orchestrator.model.memory import checkpoint_layers, tile_mlps
from orchestrator.model.support import length_problem, obstacle_in_config, obstacle_in_model
from orchestrator.paths import resolve
from orchestrator.spec import ModelSpec

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CANNOT_BUILD = (OSError, ValueError, KeyError)


def torch_dtype(dtype: Literal["bf16", "fp16", "fp32"]) -> torch.dtype:
    """Return torch's name of a number format."""
    return _DTYPES[dtype]


def load_config(model: ModelSpec) -> Any:
    """Return the model's configuration.

    Raises:
        SpecError: The path is no model that transformers can read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(resolve(model.path)), trust_remote_code=model.trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SpecError(
            f"model.path={model.path} is no model that can be loaded ({reason}); name a folder with a "
            "config.json, or a hub model"
        ) from None


def require_supported(model: ModelSpec, max_length: int) -> None:
    """Refuse a model that packed documents of up to `max_length` tokens cannot be trained with.

    The model is built without memory for its weights, so that this can be asked before anything is paid for.

    Raises:
        SpecError: What stands in the way, and the remedy.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    if problem := obstacle_in_config(config) or length_problem(config, max_length):
        raise _refusal(model, problem)
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, **_options(model, torch.bfloat16))
    except RuntimeError:
        return  # code of its own that needs real memory; the workers will tell
    except Exception as error:  # whatever a configuration that does not fit its model leads to
        raise _refusal(model, _not_built(error)) from None
    if problem := obstacle_in_model(built):
        raise _refusal(model, problem)
    _save_memory(built, model, offload_activations=False)
    if model.loss_tile_tokens:
        TiledHead(built, model.loss_tile_tokens)


def _options(model: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    attention.register()
    return {
        "dtype": dtype,
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention.IMPLEMENTATION,
    }


def _not_built(error: BaseException) -> str:
    if error.args == (attention.IMPLEMENTATION,):  # looked up among attention classes of the model's own
        return "has no attention that can be replaced, so packed documents would see each other"
    reason = " ".join(str(error).split())[:300]
    return f"cannot be built as a causal LM ({reason})"


def _refusal(model: ModelSpec, problem: str) -> SpecError:
    return SpecError(f"model.path={model.path} {problem}")


def build_model(
    model: ModelSpec,
    dtype: torch.dtype,
    seed: int,
    ds_config: dict[str, Any],
    load_weights: bool = True,
    offload_activations: bool = False,
) -> nn.Module:
    """Return the causal LM, ready for `deepspeed.initialize`.

    Under ZeRO-3 transformers builds it inside `deepspeed.zero.Init`: each parameter is partitioned as it is
    made, and only rank 0 reads weights. torch.distributed must be initialised then.

    Args:
        model: What to build.
        dtype: Number format of the parameters.
        seed: Of random weights.
        ds_config: The rendered DeepSpeed configuration; decides whether the model is partitioned.
        load_weights: False where a checkpoint will overwrite them at once.
        offload_activations: Whether the layers' inputs wait in host memory for the backward pass.

    Raises:
        SpecError: No causal LM, or an architecture whose attention cannot keep documents apart, or that
            cannot save memory as the job says.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = load_config(model)
    if obstacle := obstacle_in_config(config):
        raise _refusal(model, obstacle)
    # transformers reads this through a weak reference, only while the model is built.
    partitioned = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    options = _options(model, dtype)
    try:
        if model.weights == "random" or not load_weights:
            built = _random(config, options, seed, partitioned is not None)
        else:
            path = str(resolve(model.path))
            built = AutoModelForCausalLM.from_pretrained(path, config=config, **options)
    except _CANNOT_BUILD as error:
        raise _refusal(model, _not_built(error)) from None
    del partitioned
    if obstacle := obstacle_in_model(built):
        raise _refusal(model, obstacle)
    _save_memory(built, model, offload_activations)
    built.train()
    return built  # type: ignore[no-any-return]


def _save_memory(built: nn.Module, model: ModelSpec, offload_activations: bool) -> None:
    checkpoint_layers(built, model.gradient_checkpointing, offload_activations)
    if model.mlp_tile_tokens:
        tile_mlps(built, model.mlp_tile_tokens)


def _random(config: Any, options: dict[str, Any], seed: int, partitioned: bool) -> Any:
    """Return a model with random weights: the same on CPU for every ZeRO stage and number of workers.

    Where transformers partitions a model it draws weights only after the whole model is built. Without ZeRO-3
    it also draws while it builds, so that the same seed would lead elsewhere.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    torch.manual_seed(seed)
    if partitioned:
        return AutoModelForCausalLM.from_config(config, **options)
    with no_init_weights():
        built = AutoModelForCausalLM.from_config(config, **options)
    built.initialize_weights()
    built.tie_weights()
    return built
