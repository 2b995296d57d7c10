"""Compare step, packing and tokenization at two revisions of this repository, alternating in one run.

    python -m tests.benchmarks.revisions --before REVISION [--after HEAD] [--rounds 5] [--json]

Each round starts one process per revision and benchmark, in alternating order, so that load of the machine
affects both. The output is the ratio of the medians, after / before; below 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.environment import ROOT, describe, say

_STEP = {
    "vocabulary": 32_000,
    "slots": 1024,
    "ways": ["ours", "ours, tiled"],
    "seconds": 20.0,
    "alone": False,
}


@dataclass(frozen=True)
class Benchmark:
    """A script of tests/benchmarks that every revision has.

    Attributes:
        arguments: Module and its arguments; the last line of its output is one JSON object.
        seconds: Extracts the seconds to compare from that object.
    """

    arguments: tuple[str, ...]
    seconds: Callable[[dict[str, Any]], float]


BENCHMARKS = {
    "step": Benchmark(
        ("tests.benchmarks.step", json.dumps(_STEP), str(8 * 2**30)),
        lambda output: median(output["seconds"]["ours"]),
    ),
    "packing": Benchmark(
        ("tests.benchmarks.packing", "--rows", "1000000", "--no-peers", "--json"),
        lambda output: sum(row["seconds_best"] for row in output["plan"]),
    ),
    "tokenising": Benchmark(
        ("tests.benchmarks.tokenise", "--rows", "20000", "--no-peers", "--json"),
        lambda output: output["results"]["orchestrator"]["seconds"],
    ),
}


def checked_out(revision: str, folder: Path) -> Path:
    """Extract the files of a revision to a folder, and return the folder."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def seconds_of(benchmark: Benchmark, tree: Path) -> float:
    """Run a benchmark with the code of a tree in a new process, and return its seconds.

    Raises:
        RuntimeError: The benchmark failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", *benchmark.arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{benchmark.arguments[0]} in {tree}: exit code {done.returncode}\n{done.stderr[-3000:]}"
        )
    return benchmark.seconds(json.loads(done.stdout.strip().splitlines()[-1]))


def compare(trees: dict[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the seconds of each benchmark at each revision, and the ratio of the medians."""
    results: dict[str, dict[str, Any]] = {}
    for name, benchmark in BENCHMARKS.items():
        seconds: dict[str, list[float]] = {revision: [] for revision in trees}
        for number in range(rounds):
            order = list(trees) if number % 2 == 0 else list(reversed(trees))
            for revision in order:
                seconds[revision].append(seconds_of(benchmark, trees[revision]))
        before, after = (median(values) for values in seconds.values())
        results[name] = {"seconds": seconds, "ratio": after / before}
    return results


def main() -> None:
    """Measure both revisions and print one line per benchmark, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="revision to compare with")
    parser.add_argument("--after", default="HEAD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="revisions-") as home:
        trees = {
            revision: checked_out(revision, Path(home) / name)
            for name, revision in (("before", arguments.before), ("after", arguments.after))
        }
        results = compare(trees, arguments.rounds)
    environment = describe("torch", "transformers", "tokenizers", "ray")
    if arguments.json:
        say(json.dumps({"results": results, "environment": environment}))
        return
    for name, result in results.items():
        before, after = (median(values) for values in result["seconds"].values())
        say(f"{name:12s} before {before:8.3f} s   after {after:8.3f} s   ratio {result['ratio']:.3f}")
    say(json.dumps({"environment": environment}))


if __name__ == "__main__":
    main()
