"""Building the model, partitioned from its first tensor where ZeRO-3 is used."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import nn

from orchestrator.errors import SpecError
from orchestrator.model import attention
from orchestrator.model.memory import checkpoint_layers, tile_mlps
from orchestrator.paths import resolve
from orchestrator.spec import ModelSpec

# In these kinds of layer all that passes between tokens is attention; others carry a state across documents.
_SEPARABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    attention.register()
    # transformers reads this through a weak reference, only while the model is built.
    partitioned = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    options = {
        "dtype": dtype,
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention.IMPLEMENTATION,
    }
    try:
        if model.weights == "random" or not load_weights:
            built = _random(config, options, seed, partitioned is not None)
        else:
            path = str(resolve(model.path))
            built = AutoModelForCausalLM.from_pretrained(path, config=config, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(f"model.path={model.path} cannot be built as a causal LM ({reason})") from None
    del partitioned
    if obstacle := _obstacle(built):
        raise SpecError(
            f"model.path={model.path}: {type(built).__name__} {obstacle}; use a decoder-only transformer "
            "that is part of transformers, such as Llama, Mistral, Qwen or Phi"
        )
    checkpoint_layers(built, model.gradient_checkpointing, offload_activations)
    if model.mlp_tile_tokens:
        tile_mlps(built, model.mlp_tile_tokens)
    built.train()
    return built  # type: ignore[no-any-return]


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


def _obstacle(model: Any) -> str | None:
    """Return why documents of one pack could not be kept apart in a model, or their loss not computed."""
    if not model._supports_attention_backend:
        return "does not let its attention be replaced, so packed documents would see each other"
    mixing = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _SEPARABLE_LAYERS
    if mixing:
        kinds = ", ".join(sorted(mixing))
        return f"has layers of kind {kinds}, which carry a state from one packed document into the next"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "cannot compute logits at chosen positions"
    return None
