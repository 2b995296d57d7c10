"""Frozen weights in fewer bits: quantised while they are loaded, or already in the checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.schema import JobSpec, MethodSpec

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


def disable_cpu_repacking(model: Any) -> None:
    """Let evaluation compute with the weights that training has.

    On CPUs with AVX-512 BF16 bitsandbytes (0.50) packs 4-bit weights anew at the first call outside
    training. Their shape is another one then, which neither ZeRO-3 nor a merge expects, and not every size
    can be packed.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization_method(config: Any) -> str | None:
    """Return how a checkpoint is quantised already, in transformers' word; None where it is not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    kind = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(kind, "value", kind))


def stored_quantization(config: Any) -> Any:
    """Return how transformers is to compute with the few bits of a GPTQ checkpoint: so that it can train."""
    from transformers import GPTQConfig

    stored = config.quantization_config
    bits = stored["bits"] if isinstance(stored, dict) else stored.bits
    return GPTQConfig(bits=bits, backend="auto_trainable")


def is_quantized(module: Any) -> bool:
    """Tell whether a module is a linear layer of GPTQ, which is none of PyTorch's."""
    return hasattr(module, "qweight")


def dequantize(model: Any) -> Any:
    """Return a model of few bits with what these stand for."""
    if quantization_method(model.config) != "gptq":
        return model.dequantize()
    for name, module in [each for each in model.named_modules() if is_quantized(each[1])]:
        weight = module.dequantize_weight().T.contiguous().to(model.dtype)
        outputs, inputs = weight.shape
        linear = torch.nn.Linear(inputs, outputs, bias=module.bias is not None, dtype=model.dtype)
        linear.weight.data = weight
        if module.bias is not None:
            linear.bias.data = module.bias.detach().to(model.dtype)
        model.set_submodule(name, linear)
    model.hf_quantizer.remove_quantization_config(model)
    return model


def patch_dora(adapted: nn.Module) -> None:
    """Let DoRA read quantised weights without making new ones of them.

    On CPU peft (0.21) puts a copy in the place of the weight at every forward pass, after it has read what
    the few bits stand for. An int8 copy loses its scales at the second pass, and ZeRO-3 does not know the
    copies.
    """
    from peft.tuners.lora.dora import DoraLinearLayer

    for module in adapted.modules():
        if isinstance(module, DoraLinearLayer):
            module.forward = partial(_with_whole_base, module.forward)


def _with_whole_base(
    forward: Callable[..., Tensor], *inputs: Tensor, base_layer: Any, **options: Any
) -> Tensor:
    return forward(*inputs, base_layer=_whole(base_layer), **options)


def _whole(layer: Any) -> Any:
    """Return what DoRA reads of a layer, with the weight that its few bits stand for."""
    from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type

    weight = layer.weight
    if not get_bnb_param_type(weight):
        return layer
    values = dequantize_bnb_weight(weight, state=getattr(layer, "state", None))
    return SimpleNamespace(weight=nn.Parameter(values, requires_grad=False), bias=layer.bias)


def quantization_problem(config: Any, job: JobSpec) -> str | None:
    """Return why weights in few bits cannot be trained beside, with the remedy.

    Args:
        config: The model's configuration, which says whether its checkpoint is quantised already.
        job: How it is to be trained.
    """
    method, kind = job.method, quantization_method(config)
    if kind is not None and (problem := _problem_of_stored(kind, job)):
        return problem
    needed = kind or ("none" if method.quantization == "none" else "bitsandbytes")
    package, extra = _PACKAGE_OF.get(needed, (None, None))
    if package and importlib.util.find_spec(package) is None:
        return f"needs the package {package} for its {needed} weights; install the extra `{extra}`"
    return None


def _problem_of_stored(kind: str, job: JobSpec) -> str | None:
    if job.method.type != "lora":
        return f"is quantised already ({kind}), and such weights cannot be trained; use method.type: lora"
    if job.method.quantization != "none":
        return (
            f"is quantised already ({kind}), so method.quantization={job.method.quantization} cannot be "
            "applied; use quantization: none, or the model that is not quantised"
        )
    if kind != "gptq":
        return (
            f"is quantised already ({kind}), which this version does not train beside; use a GPTQ "
            "checkpoint, or the model that is not quantised with method.quantization: nf4"
        )
    if job.model.weights == "random":
        return (
            "is quantised already (gptq), and model.weights=random draws none such; use weights: pretrained"
        )
    if job.method.use_dora:
        return "is quantised already (gptq), which peft's DoRA cannot read; use use_dora: false"
    if job.parallel.zero_stage == 3:
        return (
            "is quantised already (gptq), and parallel.zero_stage=3 does not partition such weights; use "
            "zero_stage: 2"
        )
    return None
