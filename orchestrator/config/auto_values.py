"""What `auto` stands for: the only place that decides `parallel.device` and `model.dtype`."""

from __future__ import annotations

from typing import Literal

from orchestrator.config.field_types import Device, Dtype
from orchestrator.errors import SpecError

DeviceType = Literal["cuda", "cpu"]
TrainDtype = Literal["bf16", "fp16", "fp32"]


def resolve_device(device: Device, has_gpus: bool) -> DeviceType:
    """Return the device type that workers run on: for auto, CUDA if the cluster has a GPU."""
    if device == "auto":
        return "cuda" if has_gpus else "cpu"
    return device


def resolve_dtype(dtype: Dtype, device: DeviceType) -> TrainDtype:
    """Return the dtype of weights and activations: for auto, bf16 on CUDA and fp32 on CPU.

    Raises:
        SpecError: fp16 on CPU, which DeepSpeed does not support.
    """
    if dtype == "fp16" and device == "cpu":
        raise SpecError(
            "model.dtype=fp16 requires CUDA, and this job runs on CPU; use dtype: fp32, or bf16 to try it"
        )
    if dtype == "auto":
        return "bf16" if device == "cuda" else "fp32"
    return dtype
