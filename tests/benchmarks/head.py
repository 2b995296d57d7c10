"""Compare an LM head at labelled positions with transformers' at all positions, in complete training steps.

    python -m tests.benchmarks.head [--vocabularies 32000 151936] [--slots 2048 8192] [--seconds 30] [--json]

Every case uses our attention, so that only the head and the loss differ. Each run asserts that losses and
gradients are the same. step.py defines a step.
"""

from __future__ import annotations

import argparse
from typing import Any

from tests.benchmarks.step import TILE_TOKENS, Case, measure, memory_cell, ratio_cell, seconds_cell, tell

WAYS = ("framework's head", "ours", "ours, tiled")
_TIME_LIMIT_SECONDS = 300.0


def row_of(found: dict[str, Any]) -> list[str]:
    """Return the table row of a case."""
    all_positions, labelled, tiled = WAYS
    return [
        f"{found['vocabulary']:,}",
        f"{found['slots']:,}",
        f"{found['labelled_share']:.0%}",
        *(seconds_cell(found, way) for way in WAYS),
        ratio_cell(found, all_positions, labelled),
        ratio_cell(found, all_positions, tiled),
        " / ".join(memory_cell(found, way) for way in WAYS),
    ]


def main() -> None:
    """Measure every case and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--slots", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--seconds", type=float, default=30.0, help="how long steps of a case are repeated")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cases = [
        measure(Case(vocabulary, slots, WAYS, arguments.seconds), _TIME_LIMIT_SECONDS)
        for vocabulary in arguments.vocabularies
        for slots in arguments.slots
    ]
    tell(
        cases,
        [
            "vocabulary",
            "row",
            "labelled",
            "s/step: all positions",
            "labelled only",
            f"tiles of {TILE_TOKENS:,}",
            "speed-up of labelled only",
            "by tiles",
            "peak memory above what stays, MiB: all / labelled / tiles",
        ],
        row_of,
        arguments.json,
    )


if __name__ == "__main__":
    main()
