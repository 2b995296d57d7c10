"""Compare json_stream.py with ijson (ADR 13).

python -m tests.benchmarks.data_libraries [--rows 20000] [--file ALPACA.json]

ijson is measured if installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.environment import say


def median_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """Return the median CPU time of `rounds` calls, in seconds.

    CPU time, because wall time would include the load of other processes.
    """
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def compare_json(path: Path, rounds: int) -> dict[str, float]:
    """Return the MB per second of each reader of a JSON array of rows."""
    from orchestrator.data import json_stream

    def own() -> None:
        with path.open("rb") as file:
            _, entries = json_stream.rows(lambda: file.read(2**20))
            for _entry in entries:
                pass

    def whole() -> None:
        json.loads(path.read_bytes())

    runs: dict[str, Callable[[], None]] = {"json_stream.py": own, "json.loads (whole file)": whole}
    try:
        ijson = importlib.import_module("ijson")
    except ImportError:
        ijson = None
    for name in ("yajl2_c", "python"):
        if ijson is not None:
            backend = ijson.get_backend(name)

            def library(backend: object = backend) -> None:
                with path.open("rb") as file:
                    for _row in backend.items(file, "item", use_float=True):  # type: ignore[attr-defined]
                        pass

            runs[f"ijson {name}"] = library
    size = path.stat().st_size / 1e6
    return {name: size / median_seconds(run, rounds) for name, run in runs.items()}


def main() -> None:
    """Measure the readers, and print their rates and the ratio of json_stream.py to each."""
    from tests.benchmarks.tokenise import write_rows

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file", type=Path, help="a JSON array of Alpaca rows, instead of generated ones")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        array = arguments.file or Path(folder) / "rows.json"
        if arguments.file is None:
            lines = Path(folder) / "rows.jsonl"
            write_rows(lines, arguments.rows)
            array.write_text("[" + ",\n".join(lines.read_text().splitlines()) + "]")
        say(f"{array.stat().st_size / 1e6:.1f} MB")
        rates = compare_json(array, arguments.rounds)
        own = rates["json_stream.py"]
        for name, rate in rates.items():
            say(f"{name:28s}{rate:12,.1f} MB/s   {own / rate:.2f}")


if __name__ == "__main__":
    main()
