"""Token stores and corpora of rows that are given by the labels of their tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.config.schema import DataSpec, SourceSpec
from orchestrator.data.chat_template import CONTEXT, LAST_RESPONSE, Encoded
from orchestrator.data.corpus import Corpus, build
from orchestrator.data.row_selection import repeat_rows, sample_rows
from orchestrator.data.token_cache import TokenStore, write_index, write_shard

Turns = Sequence[int]


def store_of(
    folder: Path, rows: Sequence[Turns], shards: int = 2, malformed: int = 0, empty: int = 0
) -> TokenStore:
    """Write a store of rows given by their turn labels; token k of row n has the id 1000 n + k."""
    folder.mkdir(parents=True, exist_ok=True)
    encoded = [
        Encoded(np.arange(len(turns), dtype=np.uint32) + 1000 * number, np.array(turns, dtype=np.uint8))
        for number, turns in enumerate(rows)
    ]
    bounds = np.linspace(0, len(rows), shards + 1).astype(int)
    left = [[(f"line {number}", "why") for number in range(count)] for count in (malformed, empty)]
    written = [
        write_shard(
            folder,
            number,
            encoded[bounds[number] : bounds[number + 1]],
            *(left if number == 0 else ()),
        )
        for number in range(shards)
    ]
    write_index(folder, written, {})
    return TokenStore(folder)


def source(path: str = "a.jsonl", **settings: Any) -> SourceSpec:
    return SourceSpec(path=path, **settings)


def data_of(*sources: SourceSpec, **settings: Any) -> DataSpec:
    return DataSpec(train=sources or (source(),), **{"max_length": 16, **settings})


def corpus_of(folder: Path, rows: Sequence[Turns], **settings: Any) -> Corpus:
    return build([store_of(folder, rows)], [source()], data_of(**settings), seed=0)


def spans(corpus: Corpus) -> list[tuple[int, int, int]]:
    """Return (row, first token, length) of each document."""
    return list(zip(corpus.row.tolist(), corpus.start.tolist(), corpus.lengths.tolist(), strict=True))


def answer(context: int, response: int) -> list[int]:
    return [CONTEXT] * context + [LAST_RESPONSE] * response


def choose_rows(count: int, settings_of: SourceSpec, seed: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the rows of a source that an epoch reads."""
    generator = np.random.default_rng(seed)
    return repeat_rows(sample_rows(np.arange(count), settings_of, generator), settings_of, generator)
