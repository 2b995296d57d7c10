"""Building the model, partitioned from its first tensor where ZeRO-3 is used."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import nn

from orchestrator.data.source import resolve
from orchestrator.errors import SpecError
from orchestrator.model import attention
from orchestrator.spec import ModelSpec

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
            f"model.path={model.path} is no model that can be loaded ({reason}); name a folder with a config.json, "
            "or a hub model"
        ) from None


def build_model(
    model: ModelSpec,
    dtype: torch.dtype,
    seed: int,
    ds_config: dict[str, Any],
    load_weights: bool = True,
) -> nn.Module:
    """Return the causal LM, ready for `deepspeed.initialize`.

    Under ZeRO-3 transformers builds it inside `deepspeed.zero.Init`: each parameter is partitioned as it is made, and
    only rank 0 reads weights. torch.distributed must be initialised then.

    Args:
        model: What to build.
        dtype: Number format of the parameters.
        seed: Of random weights.
        ds_config: The rendered DeepSpeed configuration; decides whether the model is partitioned.
        load_weights: False where a checkpoint will overwrite them at once.

    Raises:
        SpecError: No causal LM, or an architecture whose attention cannot keep documents apart.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = load_config(model)
    attention.register()
    # transformers reads this through a weak reference, only while the model is built.
    partitioned = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    options = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    torch.manual_seed(seed)
    try:
        if model.weights == "random" or not load_weights:
            built = AutoModelForCausalLM.from_config(config, attn_implementation=attention.IMPLEMENTATION, **options)
        else:
            built = AutoModelForCausalLM.from_pretrained(
                str(resolve(model.path)), config=config, attn_implementation=attention.IMPLEMENTATION, **options
            )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(f"model.path={model.path} cannot be built as a causal LM ({reason})") from None
    del partitioned
    if "logits_to_keep" not in inspect.signature(built.forward).parameters:
        raise SpecError(
            f"model.path={model.path}: {type(built).__name__} cannot compute logits at chosen positions; use an "
            "architecture that is part of transformers"
        )
    if model.gradient_checkpointing:
        built.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    built.train()
    return built  # type: ignore[no-any-return]
