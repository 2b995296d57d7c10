"""Packed datasets: documents and packs of an epoch, written once by the driver and memory-mapped by workers.

A packed dataset is a folder named by a hash of everything that determines its content, so a resumed run
reuses it even if numpy would shuffle differently by then:

    documents.npy        store, row, start, length and trained tokens of each document, [documents]
    packs.npy            document numbers in the order of packs, int64, [documents]
    bounds.npy           start of each pack in packs.npy, and the end of the last, int64, [packs + 1]
    packed_dataset.json  token stores, token counts of each source, checksums of the arrays and of this file
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from orchestrator.config.schema import DataSpec, SourceSpec
from orchestrator.data.corpus import Corpus, TokenCounts, build
from orchestrator.data.packing import Packs, best_fit, concat, one_each
from orchestrator.data.row_selection import ALL_ROWS, Split
from orchestrator.data.token_cache import TokenStore, draft_of, seal, unseal
from orchestrator.errors import ClusterError

_VERSION = 6  # part of the cache key: raise it when the files change, and older packed datasets are ignored
_MANIFEST = "packed_dataset.json"
_FIELDS = ("store", "row", "start", "lengths", "trained")
# Little-endian on every machine, so that files and checksums agree; 34 bytes a document.
_TYPES = np.dtype(
    [("store", "<u2"), ("row", "<i8"), ("start", "<i8"), ("lengths", "<i8"), ("trained", "<i8")]
)


def make(
    stores: Sequence[TokenStore],
    sources: Sequence[SourceSpec],
    data: DataSpec,
    seed: int,
    split: Split = ALL_ROWS,
) -> tuple[Corpus, Packs]:
    """Sample, truncate and pack the documents of an epoch.

    Args:
        stores: Token store of each source.
        sources: Sample size, repeat and weight of each source.
        data: Packing, max_length, truncation and deduplicate.
        seed: Seed of sampling and packing.
        split: Which rows are read.

    Raises:
        SpecError: A sample is larger than its source, the rows cannot be split, or no document remains.
    """
    corpus = build(stores, sources, data, seed, split)
    if data.packing == "none":
        return corpus, one_each(corpus.lengths)
    if data.packing == "best_fit":
        return corpus, best_fit(corpus.lengths, data.max_length, seed)
    pieces, packs = concat(corpus.lengths, data.max_length, seed)
    return corpus.cut(pieces), packs


def get_or_create(
    cache: Path,
    stores: Sequence[TokenStore],
    sources: Sequence[SourceSpec],
    data: DataSpec,
    seed: int,
    split: Split = ALL_ROWS,
) -> Path:
    """Return the folder of a packed dataset in `cache`, creating it if it does not exist."""
    settings = [
        _VERSION,
        [store.folder.name for store in stores],
        [[source.repeat, source.weight, source.sample] for source in sources],
        [data.max_length, data.packing, data.truncation, data.loss_on, seed],
        [data.deduplicate, split.share, split.held_out],
    ]
    # A store is named by a hash of all that determines its content, so its name stands for its tokens.
    folder = cache / f"packed-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]}"
    if not (folder / _MANIFEST).exists():
        save(folder, *make(stores, sources, data, seed, split))
    return folder


def save(folder: Path, corpus: Corpus, packs: Packs) -> None:
    """Write a packed dataset atomically; keep an existing one, which has the same content."""
    draft = draft_of(folder)
    try:
        draft.mkdir(parents=True)
        documents = np.empty(len(corpus), _TYPES)
        for field in _FIELDS:
            documents[field] = getattr(corpus, field)
        arrays = {"documents": documents, "packs": packs.documents, "bounds": packs.bounds}
        for name, array in arrays.items():
            np.save(draft / f"{name}.npy", array)
        manifest = {
            "stores": [store.folder.name for store in corpus.stores],
            "loss_on": corpus.loss_on,
            "source_counts": [asdict(counts) for counts in corpus.source_counts],
            "checksums": {name: _checksum(draft, name) for name in arrays},
        }
        (draft / _MANIFEST).write_text(seal(manifest), encoding="utf-8")
        try:
            draft.rename(folder)
        except OSError:  # another driver was faster; its dataset has the same key and so the same content
            if not (folder / _MANIFEST).exists():
                raise
    except OSError as error:
        raise ClusterError(
            f"the packed dataset cannot be written to {folder.parent} ({error.strerror or error}); free some "
            "space there or set checkpoint.storage to another folder, then restart"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: Path) -> tuple[Corpus, Packs]:
    """Open a packed dataset and memory-map its arrays.

    Raises:
        ClusterError: The packed dataset or a token store is corrupted.
    """
    try:
        manifest = unseal((folder / _MANIFEST).read_text(encoding="utf-8"))
        for name, checksum in manifest["checksums"].items():
            if _checksum(folder, name) != checksum:
                raise ValueError(f"checksum mismatch of {name}.npy")
        documents, order, bounds = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("documents", "packs", "bounds")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"packed dataset {folder} is damaged or not readable ({error}); remove that folder and it will "
            "be packed again"
        ) from None
    # Token stores are siblings in the cache; only their names are recorded, so the cache can be moved.
    stores = tuple(TokenStore(folder.parent / name) for name in manifest["stores"])
    corpus = Corpus(
        stores,
        manifest["loss_on"],
        **{field: documents[field] for field in _FIELDS},
        source_counts=tuple(TokenCounts(**counts) for counts in manifest["source_counts"]),
    )
    return corpus, Packs(order, bounds)


def _checksum(folder: Path, name: str) -> int:
    with (folder / f"{name}.npy").open("rb") as file:
        checksum = 0
        # In chunks of 4 MiB: the arrays of a large corpus may not fit into memory.
        while chunk := file.read(2**22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
