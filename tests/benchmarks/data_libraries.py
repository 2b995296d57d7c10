"""Compare encoder.py with plain `encode_batch_fast`, and json_stream.py with ijson (ADR 13).

python -m tests.benchmarks.data_libraries [--rows 20000] [--file ALPACA.json]

Everything runs on one core. The loss mask needs the token positions of character offsets, which
`encode_batch_fast` does not return, so `encode_batch` is measured as well. ijson is measured if installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
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


def compare_encoders(rows: list[dict[str, str]], rounds: int) -> dict[str, float]:
    """Return the texts per second of each encoder, in blocks of 4096 rows as in tokenization."""
    from orchestrator.config.schema import ModelSpec
    from orchestrator.data.encoder import Encoder
    from orchestrator.data.tokenize import load_tokenizer

    texts = [f"{row['instruction']}\n{row.get('input', '')}\n{row['output']}" for row in rows]
    marks = [[len(row["instruction"]), len(text)] for row, text in zip(rows, texts, strict=True)]
    blocks = [slice(at, at + 4096) for at in range(0, len(texts), 4096)]
    tokenizer = load_tokenizer(ModelSpec(path="builtin/tiny-llama"))
    backend = tokenizer.backend_tokenizer

    def cached() -> None:
        encoder = Encoder(tokenizer)  # a new cache in each round
        for block in blocks:
            encoder.encode(texts[block], marks[block])

    def plain() -> None:
        for block in blocks:
            encodings = backend.encode_batch(texts[block], add_special_tokens=False)
            for encoding, positions in zip(encodings, marks[block], strict=True):
                _ = encoding.ids, [encoding.char_to_token(at) for at in positions]

    def fast() -> None:
        for block in blocks:
            for encoding in backend.encode_batch_fast(texts[block], add_special_tokens=False):
                _ = encoding.ids

    runs = {"encoder.py": cached, "encode_batch": plain, "encode_batch_fast": fast}
    return {name: len(texts) / median_seconds(run, rounds) for name, run in runs.items()}


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
    """Measure encoders and JSON readers, and print their rates and their ratio to the own code."""
    from tests.benchmarks.tokenise import write_rows

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file", type=Path, help="a JSON array of Alpaca rows, instead of generated ones")
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        array = arguments.file or Path(folder) / "rows.json"
        if arguments.file is None:
            lines = Path(folder) / "rows.jsonl"
            write_rows(lines, arguments.rows)
            array.write_text("[" + ",\n".join(lines.read_text().splitlines()) + "]")
        rows = json.loads(array.read_text())
        say(f"{len(rows):,} rows, {array.stat().st_size / 1e6:.1f} MB")
        for unit, rates in (
            ("texts/s", compare_encoders(rows, arguments.rounds)),
            ("MB/s", compare_json(array, arguments.rounds)),
        ):
            base = next(iter(rates.values()))
            for name, rate in rates.items():
                say(f"{name:28s}{rate:12,.1f} {unit}   {base / rate:.2f}")


if __name__ == "__main__":
    main()
