"""Measure packing of ten million rows, and compare with TRL's packers on the same rows.

    python -m tests.benchmarks.packing [--rows 10000000] [--peer-rows 200000] [--no-peers] [--json]

Packing here assigns every row to a pack and reads only lengths; TRL's packers copy the tokens as well. The
first measurement of each corpus includes page faults of memory that the process touches for the first time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.packing import Packs, best_fit, best_fit_decreasing, lower_bound
from tests.benchmarks.environment import describe, run_peer, say

CAPACITIES = (2048, 8192, 32768, 262144)
CORPORA = {"alpaca-like": (5.0, 0.65, 2_000), "long-tailed": (6.3, 1.3, 262_144)}
_TIMES = 5


def lengths_of(corpus: str, rows: int) -> np.ndarray:
    """Draw log-normal row lengths in tokens, shape [rows]: Alpaca-like, or long-tailed up to 262,144."""
    mean, sigma, longest = CORPORA[corpus]
    drawn = np.random.default_rng(0).lognormal(mean, sigma, rows)
    return np.clip(drawn, 10, longest).astype(np.int64)


def plan(corpus: str, rows: int) -> list[dict[str, Any]]:
    """Pack a corpus `_TIMES` times at each capacity; rows longer than the capacity are truncated."""
    lengths = lengths_of(corpus, rows)
    results = []
    for capacity in CAPACITIES:
        cut = np.minimum(lengths, capacity)
        seconds = []
        for _ in range(_TIMES):
            started = time.perf_counter()
            packs = best_fit(cut, capacity, seed=0)
            seconds.append(time.perf_counter() - started)
        bound = lower_bound(cut, capacity)
        results.append(
            {
                "corpus": corpus,
                "capacity": capacity,
                "seconds_first": seconds[0],
                "seconds_best": min(seconds),
                "packs": len(packs),
                "above_the_bound": len(packs) / bound - 1,
                "fill": float(cut.sum() / capacity / len(packs)),
                "attention_cost_cv": cost_cv(packs, cut),
                "attention_cost_cv_decreasing": cost_cv(best_fit_decreasing(cut, capacity, 0), cut),
            }
        )
    return results


def cost_cv(packs: Packs, lengths: np.ndarray) -> float:
    """Return the coefficient of variation of attention cost, a pack's sum of squared document lengths."""
    squares = packs.sums(lengths**2).astype(float)
    return float(squares.std() / squares.mean())


def peak_memory_gib(corpus: str, rows: int) -> float:
    """Return the peak memory in GiB of a new process that draws lengths and packs them."""
    code = (
        f"import resource; from tests.benchmarks.packing import *; best_fit(lengths_of({corpus!r}, "
        f"{rows}).clip(max=8192), 8192, 0); say(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20


def beside_trl(corpus: str, rows: int) -> list[dict[str, Any]]:
    """Pack the same rows with TRL and with this project, and return fill and rows per second of both."""
    lengths = lengths_of(corpus, rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.npy"
        np.save(path, lengths)
        peer = run_peer("pack", str(path), *map(str, CAPACITIES))
    results = []
    for capacity in CAPACITIES:
        cut = np.minimum(lengths, capacity)
        started = time.perf_counter()
        packs = best_fit(cut, capacity, seed=0)
        seconds = time.perf_counter() - started
        theirs = {name: peer["results"][f"{name} {capacity}"] for name in ("bfd", "wrapped")}
        results.append(
            {
                "corpus": corpus,
                "capacity": capacity,
                "fill": float(cut.sum() / capacity / len(packs)),
                "rows_per_second": rows / seconds,
                **{f"trl_{name}_fill": each["fill"] for name, each in theirs.items()},
                **{f"trl_{name}_rows_per_second": rows / each["seconds"] for name, each in theirs.items()},
                "rows_per_second_ratio_to_bfd": theirs["bfd"]["seconds"] / seconds,
                "fill_ratio_to_bfd": float(cut.sum() / capacity / len(packs)) / theirs["bfd"]["fill"],
            }
        )
    return results


def main() -> None:
    """Measure both and print one line per corpus and capacity, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--peer-rows", type=int, default=200_000)
    parser.add_argument("--no-peers", action="store_true", help="measure only this project")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "rows": arguments.rows,
        "plan": [row for corpus in CORPORA for row in plan(corpus, arguments.rows)],
        "peak_memory_gib": {corpus: peak_memory_gib(corpus, arguments.rows) for corpus in CORPORA},
        "peers": []
        if arguments.no_peers
        else [row for corpus in CORPORA for row in beside_trl(corpus, arguments.peer_rows)],
        "environment": describe("numpy"),
    }
    if arguments.json:
        say(json.dumps(found))
        return
    for title, rows in (("planning", found["plan"]), ("compared with TRL", found["peers"])):
        for row in rows:
            cells = [f"{key} {value:,.4g}" for key, value in row.items() if key not in ("corpus", "capacity")]
            say(f"{title}: {row['corpus']} at {row['capacity']:,}: {', '.join(cells)}")
    say(json.dumps({"peak_memory_gib": found["peak_memory_gib"], "environment": found["environment"]}))


if __name__ == "__main__":
    main()
