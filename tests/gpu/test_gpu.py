"""Tests that need a GPU: bf16 over NCCL, flash attention, and TGS and MFU of a 0.5B model.

Run with `python -m pytest tests/gpu -s`. Throughput is printed, not asserted; docs/gpu-runs.md records it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orchestrator.model.attention import VarlenMetadata, document_attention
from tests.conftest import job_text, orchestrator
from tests.gpu.models import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
LENGTHS = (1, 7, 128, 333, 64, 1024, 500, 3)


@pytest.mark.parametrize("window", [None, 1, 100, 333, 1024])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_flash_equals_dense_in_output_and_gradient(kv_heads: int, window: int | None) -> None:
    device, tokens = torch.device("cuda"), sum(LENGTHS)
    generator = torch.Generator(device).manual_seed(0)
    make = lambda heads: torch.randn(1, heads, tokens, 64, generator=generator, device=device)  # noqa: E731
    # query [1, 8, tokens, 64]; key and value [1, kv_heads, tokens, 64]. fp32 SDPA is the reference, on
    # values that bf16 can hold.
    base = [tensor.bfloat16() for tensor in (make(8), make(kv_heads), make(kv_heads))]
    results = {}
    for kernel, dtype in (("sdpa", torch.float32), ("flash", torch.bfloat16)):
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in base]
        documents = VarlenMetadata.from_lengths(LENGTHS, kernel, device)  # type: ignore[arg-type]
        output, _ = document_attention(
            torch.nn.Identity(), *inputs, None, documents=documents, sliding_window=window
        )
        output.float().square().sum().backward()
        results[kernel] = [output, *(tensor.grad for tensor in inputs)]
    # With a window of one token the gradients of queries and keys are zero, and those of the kernel are
    # rounding errors: they are compared with the gradient of the values, the last of the results.
    least = results["sdpa"][-1].norm() if window == 1 else 0.0
    for dense, flash in zip(results["sdpa"], results["flash"], strict=True):
        error = (dense - flash.float()).norm() / max(dense.norm(), least)
        assert error < 2e-2


def _train(tmp_path: Path, **changes: object) -> dict[str, object]:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path / "runs", **changes))
    done = orchestrator("train", "job.yaml", "--json", cwd=tmp_path, timeout=550)
    assert done.code == 0, done.err
    report: dict[str, object] = json.loads(done.out)
    return report


def test_bf16_over_nccl_trains(tmp_path: Path) -> None:
    report = _train(tmp_path, parallel={"workers": 1, "zero_stage": 3, "device": "cuda"})
    assert report["dtype"] == "bf16"
    assert report["loss"] < report["first_loss"]  # type: ignore[operator]


def test_throughput_of_half_a_billion_parameters(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen2-0.5b")
    report = _train(
        tmp_path,
        model={"path": str(model), "weights": "random"},
        data={"train": [{"path": "builtin/alpaca_sample", "repeat": 50}], "max_length": 8192},
        parallel={"workers": 1, "zero_stage": 2, "device": "cuda"},
        optim={"lr": 1e-4, "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 30},
    )
    print(f"\n{report['device']}: medians {json.dumps(report['medians'])}")  # noqa: T201 - figures for the record
    assert report["memory_peak_bytes"]
