"""Time of `orchestrator plan`: the search over all configurations, and the whole command, against limits.

    python -m tests.benchmarks.search [--json]

The search has a limit of 1 s for 10,000 GPUs, and the command of 2 s including the start of Python. The same
run measures `import torch`, which planning avoids, for comparison. Ratios above 1 exceed the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.arch.hf_config import load_config_json
from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.config import loader
from orchestrator.planner.calibration_store import PATH_VARIABLE
from orchestrator.planner.search import search
from tests.benchmarks.environment import describe, say

SEARCH_LIMIT_SECONDS = 1.0
COMMAND_LIMIT_SECONDS = 2.0
JOBS = Path(__file__).parents[2] / "launch/jobs/published/xtuner"
LARGE, SMALL = "llama2-70b-1m", "llama2-7b-8k"
CASES = (
    (LARGE, "8x8xA100-80G-SXM"),
    (LARGE, "1250x8xH100-80G-SXM"),
    (SMALL, "1x8xA100-80G-SXM"),
    (SMALL, "64x8xH100-80G-SXM"),
    (SMALL, "1250x8xH100-80G-SXM"),
)
"""Jobs and clusters; of a smaller model more configurations fit, so the search predicts more of them."""
PACKS = 10_000
"""Global batch size: the GPUs of the largest cluster, so that it is divisible by every number of workers."""
_TIMES = 5


def searches() -> list[dict[str, Any]]:
    """Return the seconds of a search and the number of predicted plans, for each job and cluster."""
    rows = []
    for name, text in CASES:
        job, cluster = loader.load(JOBS / f"{name}.yaml"), ClusterSpec.parse(text)
        many = job.model_copy(update={"optim": job.optim.model_copy(update={"global_batch_size": PACKS})})
        config = load_config_json(job.model.path)
        plan = search(many, config, cluster)
        seconds = _median_seconds(partial(search, many, config, cluster))
        rows.append(
            {
                "job": name,
                "machines": text,
                "gpus": cluster.gpus,
                "plans": plan.considered,
                "seconds": seconds,
                "of_limit": seconds / SEARCH_LIMIT_SECONDS,
            }
        )
    return rows


def commands() -> list[dict[str, Any]]:
    """Return the seconds of the whole command for each case, and their ratio to `import torch`."""
    torch = _median_seconds(partial(_run, "-c", "import torch"))
    rows = []
    for name, text in CASES:
        job = str(JOBS / f"{name}.yaml")
        batch = ("--set", f"optim.global_batch_size={PACKS}")
        arguments = ("-m", "orchestrator", "plan", job, "--gpus", text, "--explain", *batch)
        seconds = _median_seconds(partial(_run, *arguments))
        rows.append(
            {
                "job": name,
                "machines": text,
                "seconds": seconds,
                "of_limit": seconds / COMMAND_LIMIT_SECONDS,
                "of_importing_torch": seconds / torch,
            }
        )
    return rows


def _run(*arguments: str) -> None:
    environment = {**os.environ, PATH_VARIABLE: ""}
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)


def _median_seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken)


def main() -> None:
    """Measure searches and commands, and print one line per case, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {"searches": searches(), "commands": commands(), "environment": describe("numpy", "pydantic")}
    if arguments.json:
        say(json.dumps(found))
        return
    for row in found["searches"]:
        counted = f"{row['plans']:,} plans of {row['job']} for {row['machines']}"
        say(f"search   {row['seconds']:6.3f} s, {row['of_limit']:.2f} of its limit: {counted}")
    for row in found["commands"]:
        ratios = f"{row['of_limit']:.2f} of its limit, {row['of_importing_torch']:.2f} of importing torch"
        say(f"command  {row['seconds']:6.3f} s, {ratios}: {row['job']} on {row['machines']}")
    say(str(found["environment"]))


if __name__ == "__main__":
    main()
