"""Synthetic rows of sweeps for tests."""

from __future__ import annotations

from typing import Any

from orchestrator.bench.results import Row
from orchestrator.config.schema import JobSpec

# Model dimensions of Llama-2-7B.
LLAMA_7B = {
    "hidden_size": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}


def job(**changes: Any) -> dict[str, Any]:
    """Return a job as rows store it; `data__max_length=8` sets data.max_length."""
    written: dict[str, Any] = {
        "name": "cell",
        "model": {"path": "meta-llama/Llama-2-7b-hf"},
        "data": {"train": ({"path": "rows.json"},)},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        written.setdefault(section, {})[key] = value
    return JobSpec.model_validate(written).model_dump(mode="json")


def row(cell: str = "cell", fields: dict[str, Any] | None = None, tgs: float = 100.0, **changes: Any) -> Row:
    """Return a row of a successful cell with three steps, whose median TGS is `tgs`."""
    return Row(
        cell=cell,
        fields=fields or {},
        job=job(**changes),
        status="ok",
        samples={
            "tgs": [tgs * 0.9, tgs, tgs * 1.2],
            "tflops_model": [1.0, 2.0, 3.0],
            "step_seconds": [1.0, 2.0, 4.0],
            "data_seconds": [0.1] * 3,
            "forward_seconds": [0.5] * 3,
            "backward_seconds": [1.0] * 3,
            "optimizer_seconds": [0.2] * 3,
        },
        peaks={
            "memory_peak_bytes": 3.0 * 2**30,
            "memory_reserved_peak_bytes": 4.0 * 2**30,
            "host_memory_peak_bytes": 5.0 * 2**30,
        },
        packing={"documents": 40, "tokens_kept": 6000},
        seconds={"data": 30.0, "training": 150.0},
        shape=LLAMA_7B,
        environment={"nodes": 1, "devices": ["A100"]},
    )


def without_figures(status: Any, cell: str, fields: dict[str, Any] | None = None, **changes: Any) -> Row:
    """Return a row of a failed cell."""
    return Row(cell, fields or {}, job(**changes), status, reason="the reason")
