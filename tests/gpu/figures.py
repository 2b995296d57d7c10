"""Train models of published sizes for some steps on this machine's GPU, and compare with their plans.

    python -m tests.gpu.figures [--cells NAME;...] [--storage DIR] [--steps N]

Weights are random, and rows are those of the built-in Alpaca sample, packed. Each cell runs through
`orchestrator bench`, with an empty calibration, so that predictions are those of the hardware catalogue
alone. Random weights are drawn on the CPU, in minutes for 8 * 10^9 parameters. Prints a Markdown table for
docs/gpu-runs.md. Memory is the peak of the caching allocator (`torch.cuda.max_memory_reserved`), maximized
over steps; times are medians after two warm-up steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from orchestrator.bench.results import Row
from orchestrator.bench.runner import CELLS, run_cells
from orchestrator.bench.sweep import load
from orchestrator.run.report import PLAN
from tests.benchmarks.environment import describe, say
from tests.gpu.models import write_model

GIB = 2**30
_SAMPLE_TOKENS = 27_000  # of one repetition of the built-in sample
_LORA = {"method.type": "lora", "method.rank": 16, "method.alpha": 32.0}
_LONG = {
    "model.gradient_checkpointing": "full",
    "model.loss_tile_tokens": 8192,
    "model.mlp_tile_tokens": 8192,
}
# Model, max_length, rows of a step (one micro-batch), and further fields, by name of the cell.
MEASURED: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "0.5B full, 8k": ("qwen2-0.5b", 8192, 2, {"model.gradient_checkpointing": "none"}),
    "1B full, 8k": ("llama3.2-1b", 8192, 4, {"model.gradient_checkpointing": "full"}),
    "1B full, 8k, selective checkpointing": (
        "llama3.2-1b", 8192, 2, {"model.gradient_checkpointing": "selective"}
    ),
    "1B full, 8k, ZeRO-3": ("llama3.2-1b", 8192, 4, {"parallel.zero_stage": 3}),
    "1B full, 8k, optimizer on CPU": ("llama3.2-1b", 8192, 4, {"parallel.offload_optimizer": "cpu"}),
    "1B full, 128k": ("llama3.2-1b", 131072, 1, {**_LONG}),
    "3B LoRA, 8k": ("llama3.2-3b", 8192, 2, {**_LORA}),
    "3B QLoRA, 8k": ("llama3.2-3b", 8192, 2, {**_LORA, "method.quantization": "nf4"}),
    "3B LoRA, 64k": ("llama3.2-3b", 65536, 1, {**_LORA, **_LONG}),
}  # fmt: skip


def sweep_of(name: str, home: Path, steps: int) -> dict[str, Any]:
    """Return the sweep file of one cell."""
    model, length, rows, fields = MEASURED[name]
    repeat = math.ceil(length * rows * (steps + 3) / _SAMPLE_TOKENS)
    job: dict[str, Any] = {
        "name": "cell",
        "model": {"path": str(write_model(home / "models" / model, model)), "weights": "random"},
        "data": {"train": [{"path": "builtin/alpaca_sample", "repeat": repeat}], "max_length": length},
        "parallel": {"workers": 1, "zero_stage": 2, "device": "cuda"},
        "optim": {"lr": 1e-5, "global_batch_size": rows, "micro_batch_size": rows, "max_steps": steps + 2},
    }
    for dotted, value in fields.items():
        section, _, key = dotted.partition(".")
        job.setdefault(section, {})[key] = value
    slug = re.sub(r"[^\w.]+", "-", name)
    return {"name": slug, "job": job, "warmup_steps": 2, "storage": str(home / "runs"), "timeout_minutes": 5}


def measure(name: str, home: Path, steps: int) -> tuple[Row, dict[str, Any]]:
    """Run a cell and return its row and plan.json."""
    written = sweep_of(name, home, steps)
    file = home / f"{written['name']}.yaml"
    file.write_text(yaml.safe_dump(written), encoding="utf-8")
    sweep = load(file, [])
    os.environ["ORCHESTRATOR_CALIBRATION"] = str(sweep.folder / "calibration.jsonl")
    (row,) = run_cells(sweep, None, _tell)
    plan = sweep.folder / CELLS / row.cell / PLAN
    return row, json.loads(plan.read_text(encoding="utf-8")) if plan.exists() else {}


def line_of(name: str, row: Row, plan: dict[str, Any]) -> str:
    """Return the row of the table."""
    if row.status != "ok":
        return f"| {name} | {row.status}: {row.reason} |"
    peak, seconds = row.peaks["memory_reserved_peak_bytes"], median(row.samples["step_seconds"])
    memory = f"{peak / GIB:.1f} / {plan['memory_reserved_peak_bytes'] / GIB:.1f}"
    time = f"{seconds:.3f} / {plan['step_seconds']:.3f}"
    tgs, tflops, mfu = (median(row.samples[metric]) for metric in ("tgs", "tflops_model", "mfu"))
    return f"| {name} | {memory} | {time} | {tgs:,.0f} | {tflops:.0f} | {mfu:.1%} |"


def main() -> None:
    """Measure the cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=";".join(MEASURED), help="names of cells, separated by semicolons")
    parser.add_argument("--storage", type=Path, default=Path("runs/gpu-figures"))
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    home = arguments.storage.absolute()
    home.mkdir(parents=True, exist_ok=True)
    say(f"{torch.cuda.get_device_name()}, {describe('torch', 'transformers', 'deepspeed', 'ray')}\n")
    say("| cell | reserved GiB, measured / planned | step s, measured / planned | TGS | TFLOP/s | MFU |")
    say("|---|---|---|---|---|---|")
    for name in arguments.cells.split(";"):
        say(line_of(name, *measure(name, home, arguments.steps)))


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
