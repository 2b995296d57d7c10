"""Frozen weights in fewer bits: quantised while they are loaded, or already in the checkpoint."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from orchestrator.spec import MethodSpec

_PACKAGE_OF = {"bitsandbytes": ("bitsandbytes", "qlora"), "gptq": ("gptqmodel", "gptq")}


def quantization_config(method: MethodSpec, dtype: torch.dtype) -> Any:
    """Return how transformers is to quantise the weights that it loads, or None.

    4-bit weights are stored as numbers of the model's format, so that ZeRO-3 can partition them as it does
    those (bitsandbytes packs bytes otherwise, which it cannot).

    Args:
        method: nf4 is QLoRA's data type (arXiv 2305.14314), int8 is LLM.int8() (arXiv 2208.07339).
        dtype: Number format that products are computed in.
    """
    if method.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if method.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=method.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def keep_weights_in_place(model: Any) -> None:
    """Let evaluation compute with the weights that training has.

    On CPUs with AVX-512 BF16 bitsandbytes (0.50) packs 4-bit weights anew at the first call outside
    training. Their shape is another one then, which neither ZeRO-3 nor a merge expects, and not every size
    can be packed.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization_problem(config: Any, method: MethodSpec) -> str | None:
    """Return why weights in few bits cannot be trained beside, with the remedy.

    Args:
        config: The model's configuration, which says whether its checkpoint is quantised already.
        method: How it is to be trained.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        kind = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        kind = str(getattr(kind, "value", kind))
        if method.type != "lora":
            return f"is quantised already ({kind}), and such weights cannot be trained; use method.type: lora"
        if method.quantization != "none":
            return (
                f"is quantised already ({kind}), so method.quantization={method.quantization} cannot be "
                "applied; use quantization: none, or the model that is not quantised"
            )
    else:
        kind = "none" if method.quantization == "none" else "bitsandbytes"
    package, extra = _PACKAGE_OF.get(kind, (None, None))
    if package and importlib.util.find_spec(package) is None:
        return f"needs the package {package} for its {kind} weights; install the extra `{extra}`"
    return None
