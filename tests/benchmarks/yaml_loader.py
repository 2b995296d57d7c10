"""Compare the time to read job files with line numbers: `yaml_loader` on PyYAML, and ruamel.yaml.

    python -m tests.benchmarks.yaml_loader

Both loaders (of ruamel.yaml, the round-trip loader) read every file under `launch/jobs` and a sweep of 500
cells, alternating; the medians are compared. With ratios above 1, ruamel.yaml is slower. ADR 13 uses the
result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from orchestrator.config import yaml_loader
from tests.benchmarks.environment import say

JOBS = Path(__file__).parents[2] / "launch/jobs"
REPEATS = 7
SWEEP = "name: sweep\nbase: job.yaml\ncells:\n" + "".join(
    f"  - {{name: cell-{index}, optim.lr: 2e-5, data.max_length: {index + 16}}}\n" for index in range(500)
)


def _seconds(read: Callable[[str], object], texts: list[str]) -> float:
    start = time.perf_counter()
    for text in texts:
        read(text)
    return time.perf_counter() - start


def _own(text: str) -> object:
    return yaml_loader.read(text, "text")


def main() -> int:
    """Print the seconds of both loaders and their ratio; return 1 if ruamel.yaml is not installed."""
    try:
        from ruamel.yaml import YAML
    except ImportError:
        say("ruamel.yaml is not installed; it comes with pre-commit-hooks of the extra dev")
        return 1

    def ruamel(text: str) -> object:
        return YAML(typ="rt", pure=True).load(text)

    cases = {
        "job files": [file.read_text(encoding="utf-8") for file in sorted(JOBS.rglob("*.yaml"))],
        "sweep of 500 cells": [SWEEP],
    }
    for name, texts in cases.items():
        pairs = [(_seconds(_own, texts), _seconds(ruamel, texts)) for _ in range(REPEATS)]
        own, other = (median(pair[index] for pair in pairs) for index in (0, 1))
        say(f"{name}: yaml_loader {own:.3f} s, ruamel.yaml {other:.3f} s, ratio {other / own:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
