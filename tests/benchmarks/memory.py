"""Peak memory of a training step per worker: sequence parallelism, tiling, checkpointing and offloading.

    python -m tests.benchmarks.memory [--lengths 4096,...] [--no-table] [--no-limit] [--plot FILE] [--json]

Each cell runs a separate process group that trains one step of a small Llama, in float32 with ZeRO-3 over
gloo, on one packed row of Alpaca-like documents. Memory is the increase of a worker's peak resident set size
during the step, maximized over the workers. Offloaded activations are written to disk instead of host memory,
because on CPU device and host memory are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.chat_template import CONTEXT, LAST_RESPONSE, Encoded
from orchestrator.data.token_cache import write_index, write_shard
from tests.benchmarks.environment import describe, say
from tests.benchmarks.packing import lengths_of
from tests.invariant.group import run_group

LENGTHS = (4096, 8192, 16384, 32768, 65536)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
_NOTHING = {"gradient_checkpointing": "none"}
_FULL = {"gradient_checkpointing": "full"}
_TILES = {"loss_tile_tokens": 512, "mlp_tile_tokens": 1024}
_ALL = {**_FULL, **_TILES, "offload": True}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "nothing saved": (1, _NOTHING),
    "tiled loss": (1, {**_NOTHING, "loss_tile_tokens": 512}),
    "tiled MLP": (1, {**_NOTHING, "mlp_tile_tokens": 1024}),
    "selective checkpointing": (1, {"gradient_checkpointing": "selective"}),
    "full checkpointing": (1, _FULL),
    "full, tiled loss": (1, {**_FULL, "loss_tile_tokens": 512}),
    "full, tiled loss and MLP": (1, {**_FULL, **_TILES}),
    "full, tiled, offloaded": (1, _ALL),
    "sp 2, nothing saved": (2, _NOTHING),
    "sp 2, full, tiled, offloaded": (2, _ALL),
    "sp 4, nothing saved": (4, _NOTHING),
    "sp 4, full, tiled, offloaded": (4, _ALL),
}
BUDGET_BYTES = 384 * 2**20
_STEP_TOKENS = 1024
_RESOLUTION = 24  # the longest pack is found with a relative error of 1 / _RESOLUTION
_LARGEST_TOKENS = 262_144
_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "MemoryError", "Cannot allocate memory")


def write_data(folder: Path, tokens: int) -> None:
    """Write documents with Alpaca-like lengths, about 1.2 x `tokens` tokens; the second half is trained."""
    lengths = lengths_of("alpaca-like", tokens // 100)
    count = int(np.searchsorted(np.cumsum(lengths), tokens * 1.2)) + 2
    generator = np.random.default_rng(0)
    documents = []
    for length in lengths[:count].tolist():
        turn = np.where(np.arange(length) >= length // 2, np.uint8(LAST_RESPONSE), np.uint8(CONTEXT))
        drawn = generator.integers(3, CONFIG["vocab_size"], length).astype(np.uint32)
        documents.append(Encoded(drawn, turn))
    folder.mkdir(parents=True)
    write_index(folder, [write_shard(folder, 0, documents)], {})


def task_of(home: Path, name: str, length: int, size: int, setting: dict[str, Any]) -> dict[str, Any]:
    """Return the task of a cell.

    Args:
        home: Folder with `model` and `data`.
        name: Name of the task.
        length: Pack length in tokens.
        size: Number of workers, which all share one sequence.
        setting: Fields of `model`; `offload` enables offloading of activations.
    """
    model = {key: value for key, value in setting.items() if key != "offload"}
    parallel = {"offload_activations": "cpu"} if setting.get("offload") else {}
    return {
        "name": name,
        "action": "measure",
        "data": str(home / "data"),
        "job": {
            "name": "memory",
            "model": {"path": str(home / "model"), "weights": "random", **model},
            "data": {"train": [{"path": "unused"}], "max_length": length},
            "parallel": {
                "workers": size, "sequence_parallel_size": size, "device": "cpu", "zero_stage": 3, **parallel,
            },
            "optim": {"global_batch_size": 1, "max_steps": 1, "lr": 1e-4, "warmup_ratio": 0.0},
        },
    }  # fmt: skip


def cell(
    home: Path, length: int, size: int, setting: dict[str, Any], budget_bytes: int | None = None
) -> dict[str, Any] | None:
    """Run a cell and return its peak memory, or None if it ran out of memory."""
    task = task_of(home, "cell", length, size, setting) | {"budget_bytes": budget_bytes}
    try:
        outcome = run_group(
            Path(tempfile.mkdtemp(dir=home)) / "cell",
            size,
            [task],
            timeout_seconds=900,
            module="tests.benchmarks.memory_cell",
            forked=False,
        )["cell"]
    except AssertionError as error:
        if any(sign in str(error) for sign in _NO_MEMORY):
            return None
        raise
    return {
        "length": length,
        "sp": size,
        "peak_mib": max(rank["peak_bytes"] for rank in outcome.ranks) / 2**20,
        "moved_mib": max(rank["moved_bytes"] for rank in outcome.ranks) / 2**20,
        "seconds": outcome.answer["seconds"],
        "loss": outcome.answer["losses"][0],
    }


def table(home: Path, lengths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yield the cells of the table.

    Raises:
        MemoryError: A cell needs more memory than this machine has.
        AssertionError: A setting changes the loss.
    """
    losses: dict[int, float] = {}
    for name, (size, setting) in SETTINGS.items():
        for length in lengths:
            found = cell(home, length, size, setting)
            if found is None:
                raise MemoryError(f"{name} at {length} tokens needs more memory than this machine has")
            expected = losses.setdefault(length, found["loss"])
            if abs(found["loss"] - expected) > 1e-5 * abs(expected):
                raise AssertionError(f"{name} at {length}: loss {found['loss']} and not {expected}")
            yield {"setting": name, **found}


def longest(home: Path, size: int, budget_bytes: int) -> int:
    """Return the longest pack in tokens that trains within a memory budget, with all savings enabled.

    Args:
        home: Folder with `model` and `data`.
        size: Number of workers, which all share one sequence.
        budget_bytes: Memory per worker in addition to weights and optimizer states.
    """
    # Binary search over multiples of _STEP_TOKENS; the guess doubles until a pack fails.
    able, unable = 0, _LARGEST_TOKENS // _STEP_TOKENS + 1
    guess = 20 * size
    while unable - able > max(1, able // _RESOLUTION):
        if cell(home, guess * _STEP_TOKENS, size, _ALL, budget_bytes):
            able = guess
        else:
            unable = guess
        guess = min(able * 2, (able + unable) // 2) if able else unable // 2
        guess = max(guess, able + 1)
    return able * _STEP_TOKENS


def as_markdown(cells: list[dict[str, Any]]) -> str:
    """Return the table in Markdown, one row per setting and one column per length."""
    lengths = sorted({found["length"] for found in cells})
    lines = [
        "| MiB a worker | " + " | ".join(f"{length // 1024}k" for length in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for name in dict.fromkeys(found["setting"] for found in cells):
        row = {found["length"]: found["peak_mib"] for found in cells if found["setting"] == name}
        lines.append(f"| {name} | " + " | ".join(f"{row[length]:,.0f}" for length in lengths) + " |")
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Plot memory over length, one line per setting."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "memory"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 5.2), layout="constrained")
    styles = {1: "-", 2: "--", 4: ":"}
    colours: dict[str, str] = {}  # one colour per setting, for all sequence parallel sizes
    for name in dict.fromkeys(found["setting"] for found in cells):
        row = [found for found in cells if found["setting"] == name]
        axes.plot(
            [found["length"] // 1024 for found in row],
            [found["peak_mib"] for found in row],
            styles[row[0]["sp"]],
            color=colours.setdefault(name.removeprefix(f"sp {row[0]['sp']}, "), f"C{len(colours)}"),
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("tokens in a pack (thousand)")
    axes.set_ylabel("peak memory of a step, MiB a worker")
    axes.xaxis.set_major_formatter("{x:g}k")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside right", frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table and the longest packs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--no-table", action="store_true")
    parser.add_argument("--no-limit", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # Make malloc return freed memory at once, so that the resident set size is the memory in use.
    os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    lengths = tuple(int(each) for each in arguments.lengths.split(","))
    results: dict[str, Any] = {"environment": describe("torch", "deepspeed", "transformers")}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_data(home / "data", _LARGEST_TOKENS)
        (home / "model").mkdir()
        (home / "model" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        say(json.dumps(results["environment"]))
        if not arguments.no_table:
            results["table"] = []
            for found in table(home, lengths):
                results["table"].append(found)
                say(json.dumps(found))
            say(as_markdown(results["table"]))
            if arguments.plot:
                plot(results["table"], arguments.plot)
        if not arguments.no_limit:
            packs = {}
            for size in (1, 4, 2):
                packs[size] = longest(home, size, BUDGET_BYTES)
                say(f"longest pack with sp {size}: {packs[size]:,} tokens")
            results["longest"] = {"budget_mib": BUDGET_BYTES / 2**20, "tokens": packs}
            say(
                f"in {BUDGET_BYTES / 2**20:.0f} MiB a worker: sp 2 over sp 1 {packs[2] / packs[1]:.2f}, "
                f"sp 4 over sp 1 {packs[4] / packs[1]:.2f}"
            )
    if arguments.json:
        sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
