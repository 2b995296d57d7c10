"""Quantized base weights: bitsandbytes quantization at load time, and checkpoints quantized with GPTQ."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from orchestrator.config.schema import JobSpec, MethodSpec

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, GPTQConfig, PretrainedConfig, PreTrainedModel

_PACKAGE_OF = {"bitsandbytes": ("bitsandbytes", "qlora"), "gptq": ("gptqmodel", "gptq")}


def quantization_config(method: MethodSpec, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes configuration for `from_pretrained`; None without `method.quantization`.

    Packed 4-bit weights are stored in tensors of `dtype`, because ZeRO-3 can partition only floating-point
    tensors; the default storage of bitsandbytes is uint8.

    Args:
        method: nf4 is QLoRA's data type (arXiv 2305.14314), int8 is LLM.int8() (arXiv 2208.07339).
        dtype: dtype in which matmuls are computed.
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


def disable_cpu_repacking(model: nn.Module) -> None:
    """Disable the CPU weight layout that bitsandbytes uses for inference.

    On CPUs with AVX-512 BF16, bitsandbytes (0.50) repacks 4-bit weights at the first forward pass in eval
    mode. That changes their shape, which breaks ZeRO-3 and merging, and fails for some sizes.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization_method(config: PretrainedConfig) -> str | None:
    """Return `quant_method` of a quantized checkpoint, such as "gptq"; None if it is not quantized."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    kind = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(kind, "value", kind))


def stored_quantization(config: PretrainedConfig) -> GPTQConfig:
    """Return the configuration that loads a GPTQ checkpoint with a backend that supports training."""
    from transformers import GPTQConfig

    stored = config.quantization_config
    bits = stored["bits"] if isinstance(stored, dict) else stored.bits
    return GPTQConfig(bits=bits, backend="auto_trainable")


def is_quantized(module: nn.Module) -> bool:
    """Tell whether a module is a GPTQ linear layer, which does not subclass `torch.nn.Linear`."""
    return hasattr(module, "qweight")


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Return a quantized model with dequantized weights, in the model's dtype."""
    if quantization_method(model.config) != "gptq":
        whole: PreTrainedModel = model.dequantize()
        return whole
    for name, module in [each for each in model.named_modules() if is_quantized(each[1])]:
        # GPTQ stores [inputs, outputs]; torch.nn.Linear expects [outputs, inputs].
        weight = module.dequantize_weight().T.contiguous().to(model.dtype)
        outputs, inputs = weight.shape
        linear = torch.nn.Linear(inputs, outputs, bias=module.bias is not None, dtype=model.dtype)
        linear.weight.data = weight
        if module.bias is not None:
            linear.bias.data = module.bias.detach().to(model.dtype)
        model.set_submodule(name, linear)
    model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr, operator]
    return model


def patch_dora(adapted: nn.Module) -> None:
    """Make DoRA read dequantized weights without replacing the quantized parameter of its base layer.

    On CPU, peft (0.21) dequantizes the weight at every forward pass and then assigns a copy to the layer. An
    int8 copy has lost its scales at the second pass, and ZeRO-3 does not manage the copies.
    """
    from peft.tuners.lora.dora import DoraLinearLayer

    for module in adapted.modules():
        if isinstance(module, DoraLinearLayer):
            module.forward = partial(_with_whole_base, module.forward)  # type: ignore[method-assign]


def _with_whole_base(
    forward: Callable[..., Tensor], *inputs: Tensor, base_layer: nn.Module, **options: object
) -> Tensor:
    return forward(*inputs, base_layer=_whole(base_layer), **options)


def _whole(layer: nn.Module) -> nn.Module | SimpleNamespace:
    """Return an object with the attributes that DoRA reads of a base layer: dequantized weight, and bias."""
    from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type

    weight = layer.get_parameter("weight")
    # int8 layers keep the scales in `layer.state`; 4-bit weights carry theirs in the parameter itself.
    if not get_bnb_param_type(weight):
        return layer
    values = dequantize_bnb_weight(weight, state=getattr(layer, "state", None))
    return SimpleNamespace(weight=nn.Parameter(values, requires_grad=False), bias=layer.bias)


def quantization_problem(config: PretrainedConfig, job: JobSpec) -> str | None:
    """Return why a job cannot train with its quantized weights, with the remedy; None if it can.

    Args:
        config: The model's configuration; its `quantization_config` describes a quantized checkpoint.
        job: The method and parallel settings.
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
        return f"is already quantized ({kind}), and such weights cannot be trained; use method.type: lora"
    if job.method.quantization != "none":
        return (
            f"is already quantized ({kind}), so method.quantization={job.method.quantization} cannot be "
            "applied; use quantization: none, or the model that is not quantised"
        )
    if kind != "gptq":
        return (
            f"is already quantized ({kind}), on which this version does not train adapters; use a GPTQ "
            "checkpoint, or the model that is not quantised with method.quantization: nf4"
        )
    if job.model.weights == "random":
        return (
            "is already quantized (gptq), and model.weights=random draws none such; use weights: pretrained"
        )
    if job.method.use_dora:
        return "is already quantized (gptq), which peft's DoRA cannot read; use use_dora: false"
    if job.parallel.zero_stage == 3:
        return (
            "is already quantized (gptq), and parallel.zero_stage=3 does not partition such weights; use "
            "zero_stage: 2"
        )
    return None
