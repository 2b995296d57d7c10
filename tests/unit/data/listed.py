"""Documents in memory, and loaders of them.

Token k of document n is 1000 n + k + 1, so that a test can read the document and position from each token.
"""

from typing import Any

import numpy as np

from orchestrator.data.balance import BatchShape
from orchestrator.data.corpus import Document
from orchestrator.data.loader import MicroBatch, PackLoader, SamplerConfig
from orchestrator.data.packing import Packs

MAX_LENGTH = 300
SEED = 11


def document(number: int, length: int) -> Document:
    tokens = np.arange(length, dtype=np.uint32) + 1000 * number + 1
    trained = np.arange(length) >= max(1, length // 3)
    return Document(tokens, trained)


class Listed:
    """A list of documents that records which ones are read."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.lengths = np.array([len(document.tokens) for document in documents], dtype=np.int64)
        self.trained = np.array([document.trained[1:].sum() for document in documents], dtype=np.int64)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, number: int) -> Document:
        self.read.append(number)
        return self.documents[number]


def make(lengths: list[int]) -> Listed:
    return Listed([document(number, length) for number, length in enumerate(lengths)])


def loader(
    store: Listed,
    packs: Packs,
    data_parallel_size: int = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 8,
    seed: int = SEED,
    shuffle: bool = True,
    sync_every_micro_step: bool = True,
    **sampler: Any,
) -> PackLoader:
    batch_shape = BatchShape(
        MAX_LENGTH, global_batch_size, micro_batch_size, data_parallel_size, sync_every_micro_step
    )
    options = {"balance_window_steps": 4, "slot_cost": 1.0, "squared_length_cost": 0.01, **sampler}
    return PackLoader(store, packs, batch_shape, SamplerConfig(seed, shuffle, **options))


def documents_of(batch: MicroBatch) -> list[int]:
    """Return the document numbers of a batch in order, read from its tokens."""
    starts = np.concatenate([[0], np.cumsum(batch.document_lengths)[:-1]]).astype(int)
    return [int(batch.input_ids[start]) // 1000 for start in starts if batch.input_ids[start]]


def sample() -> Listed:
    """Documents of random lengths, and of the longest and shortest."""
    lengths = np.random.default_rng(5).integers(2, MAX_LENGTH + 1, 90).tolist()
    return make([*lengths, MAX_LENGTH, 1, 2])
