"""Compare attention per document with transformers' block mask, in complete training steps.

    python -m tests.benchmarks.attention [--slots 2048 8192 32768] [--seconds 25] [--json]

The framework's path is transformers with `sdpa`, position_ids that restart at each document, from which it
builds a block mask itself, and the LM head at all positions. The middle column combines its attention with
our head, which separates the gain of attention from the gain of the head. Each run asserts that all paths
give the same losses and gradients, and that the loss differs if the row is treated as one document. step.py
defines a step.
"""

from __future__ import annotations

import argparse
from typing import Any

from tests.benchmarks.step import Case, measure, memory_cell, ratio_cell, seconds_cell, tell

WAYS = ("framework", "framework's attention", "ours")
_VOCABULARY = 32_000
_TIME_LIMIT_SECONDS = 300.0


def row_of(found: dict[str, Any]) -> list[str]:
    """Return the table row of a case."""
    framework, middle, ours = WAYS
    return [
        f"{found['slots']:,}",
        f"{found['documents_per_row']:.0f}",
        *(seconds_cell(found, way) for way in WAYS),
        ratio_cell(found, framework, ours),
        ratio_cell(found, middle, ours),
        ratio_cell(found, framework, middle),
        " / ".join(memory_cell(found, way) for way in WAYS),
    ]


def main() -> None:
    """Measure every case and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[2048, 8192, 32_768])
    parser.add_argument("--seconds", type=float, default=25.0, help="how long steps of a case are repeated")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cases = [
        measure(Case(_VOCABULARY, slots, WAYS, arguments.seconds), _TIME_LIMIT_SECONDS)
        for slots in arguments.slots
    ]
    tell(
        cases,
        [
            "row",
            "documents in it",
            "s/step: framework",
            "its attention, our head",
            "ours",
            "speed-up of ours",
            "of which attention",
            "of which head",
            "peak memory above what stays, MiB: framework / its attention / ours",
        ],
        row_of,
        arguments.json,
    )


if __name__ == "__main__":
    main()
