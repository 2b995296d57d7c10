"""Compare tokenization in rows per second with TRL and `datasets.map`, and measure memory by corpus size.

    python -m tests.benchmarks.tokenise [--rows 200000] [--json]

Rows consist of words of the bundled sample, with Alpaca-like lengths. Times run from the rows on disk (peers:
in memory) to the last token written, including the start of processes; Ray is started before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config.paths import resolve
from tests.benchmarks.environment import describe, run_peer, say


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Write Alpaca rows with words drawn from the bundled sample and Alpaca-like lengths, as JSON lines."""
    sample = [json.loads(line) for line in resolve("builtin/alpaca_sample").read_text().splitlines()]
    words = np.array(" ".join(row["instruction"] + " " + row["output"] for row in sample).split())
    generator = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            sizes = generator.lognormal([2.3, 1.5, 4.0], [0.5, 1.0, 0.9]).astype(int) + 1
            texts = [" ".join(generator.choice(words, size)) for size in sizes]
            has_input = generator.random() < 0.4
            row = {"instruction": texts[0], "input": texts[1] * has_input, "output": texts[2]}
            file.write(json.dumps(row) + "\n")


def ours(path: Path, cache: Path) -> dict[str, Any]:
    """Tokenize with Ray tasks on all cores of a local Ray, and return rows per second, seconds and tokens."""
    from orchestrator.config.schema import DataSpec, ModelSpec, SourceSpec
    from orchestrator.data.tokenize import tokenize_sources

    started = time.perf_counter()
    source = SourceSpec(path=str(path))
    data = DataSpec(train=(source,), chat_template="chat")
    (store,) = tokenize_sources(ModelSpec(path="builtin/tiny-llama"), data, [source], cache)
    seconds = time.perf_counter() - started
    return {
        "rows_per_second": len(store) / seconds,
        "seconds": seconds,
        "tokens": store.manifest["tokens"],
    }


class PeakMemory:
    """Samples the peak memory of this process and its descendants in MiB, as proportional set size (PSS)."""

    def __enter__(self) -> PeakMemory:
        self.mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.mib = max(self.mib, sum(_pss_kib(pid) for pid in _family(os.getpid())) / 1024)


def _family(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def measure(rows: int, with_peers: bool) -> dict[str, Any]:
    """Return throughput and peak memory of this project, and throughput of the peers if requested."""
    import ray

    from orchestrator.cluster.auth import choose_auth_mode

    choose_auth_mode()
    home = Path(tempfile.mkdtemp(prefix="tokenise-"))
    try:
        small, large = home / "small.jsonl", home / "large.jsonl"
        write_rows(small, rows // 10, seed=1)
        write_rows(large, rows)
        peers = run_peer("tokenise", str(large), str(resolve("builtin/tiny-llama"))) if with_peers else None
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=2)
        memory = {}
        with PeakMemory() as peak:
            ours(small, home / "cache")
        memory[f"{rows // 10} rows"] = peak.mib
        with PeakMemory() as peak:
            mine = ours(large, home / "cache")
        memory[f"{rows} rows"] = peak.mib
        ray.shutdown()
    finally:
        shutil.rmtree(home)
    results = {"orchestrator": mine, **(peers["results"] if peers else {})}
    best = max(
        (each["rows_per_second"] for each in (peers["results"] if peers else {}).values()), default=0.0
    )
    return {
        "rows": rows,
        "results": results,
        "ratio_to_the_best_peer": mine["rows_per_second"] / best if best else None,
        "peak_memory_mib": memory,
        "environment": describe("ray", "transformers", "tokenizers", "pyarrow"),
        "peer_versions": peers["versions"] if peers else None,
    }


def main() -> None:
    """Measure and print one line per tokenizer, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--no-peers", action="store_true", help="measure only this project")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.rows, not arguments.no_peers)
    if arguments.json:
        say(json.dumps(found))
        return
    for name, result in found["results"].items():
        say(f"{name:28s}{result['rows_per_second']:10,.0f} rows/s   {result['tokens']:,} tokens")
    if found["ratio_to_the_best_peer"]:
        say(f"{found['ratio_to_the_best_peer']:.2f} times the best peer")
    for name, mib in found["peak_memory_mib"].items():
        say(f"peak memory of all processes at {name}: {mib:,.0f} MiB")
    say(json.dumps({"environment": found["environment"], "peers": found["peer_versions"]}))


if __name__ == "__main__":
    main()
