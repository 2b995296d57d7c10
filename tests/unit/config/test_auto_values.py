"""Resolution of `auto` for device and dtype."""

import pytest

from orchestrator.config.auto_values import resolve_device, resolve_dtype
from orchestrator.errors import SpecError


def test_auto_dtype_follows_the_device_and_a_given_one_stays() -> None:
    assert resolve_dtype("auto", "cuda") == "bf16"
    assert resolve_dtype("fp16", "cuda") == "fp16"
    assert [resolve_dtype(dtype, "cpu") for dtype in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]  # type: ignore[arg-type]


def test_fp16_is_refused_on_cpu_with_the_dtypes_that_work_there() -> None:
    with pytest.raises(SpecError, match=r"model\.dtype=fp16 requires CUDA.*use dtype: fp32, or bf16"):
        resolve_dtype("fp16", "cpu")


def test_auto_device_is_cuda_where_there_are_gpus_and_a_given_one_stays() -> None:
    assert [resolve_device("auto", gpus) for gpus in (True, False)] == ["cuda", "cpu"]
    assert [resolve_device(device, True) for device in ("cuda", "cpu")] == ["cuda", "cpu"]  # type: ignore[arg-type]
