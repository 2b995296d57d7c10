"""The data plan: documents and packs of an epoch, made once by the driver and mapped by every worker.

A plan is a folder that is named by a hash of all that decides it, so that a run that is started again finds
the plan that it had, whatever versions of numpy it meets:

    documents.npy   store, row, start, length and trained tokens of each document
    packs.npy       document numbers, pack after pack
    bounds.npy      where each pack begins in packs.npy
    plan.json       the stores, what became of every source's rows, checksums of the arrays and of itself
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
from orchestrator.data.corpus import Account, Corpus, build
from orchestrator.data.packing import Packs, best_fit, concat, one_each
from orchestrator.data.token_cache import TokenStore, draft_of, seal, unseal
from orchestrator.errors import ClusterError

_VERSION = 3
_MANIFEST = "plan.json"
_FIELDS = ("store", "row", "start", "lengths", "trained")
_TYPES = np.dtype(
    [("store", "<u2"), ("row", "<i8"), ("start", "<i8"), ("lengths", "<i8"), ("trained", "<i8")]
)


def make(
    stores: Sequence[TokenStore], sources: Sequence[SourceSpec], data: DataSpec, seed: int
) -> tuple[Corpus, Packs]:
    """Choose, cut and pack the documents of an epoch.

    Args:
        stores: The tokens of each source.
        sources: How often each is read.
        data: How rows become packs.
        seed: Decides samples and composition.

    Raises:
        SpecError: A sample is larger than its source, or no document is left.
    """
    corpus = build(stores, sources, data, seed)
    if data.packing == "none":
        return corpus, one_each(corpus.lengths)
    if data.packing == "best_fit":
        return corpus, best_fit(corpus.lengths, data.max_length, seed)
    pieces, packs = concat(corpus.lengths, data.max_length, seed)
    return corpus.cut(pieces), packs


def plan_in(
    cache: Path, stores: Sequence[TokenStore], sources: Sequence[SourceSpec], data: DataSpec, seed: int
) -> Path:
    """Return the folder of a plan, made where it is not in the cache yet."""
    settings = [
        _VERSION,
        [store.folder.name for store in stores],
        [[source.repeat, source.weight, source.sample] for source in sources],
        [data.max_length, data.packing, data.truncation, data.loss_on, seed],
    ]
    folder = cache / f"plan-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]}"
    if not (folder / _MANIFEST).exists():
        save(folder, *make(stores, sources, data, seed))
    return folder


def save(folder: Path, corpus: Corpus, packs: Packs) -> None:
    """Write a plan whole or not at all; one that another driver wrote first is as good."""
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
            "accounts": [asdict(account) for account in corpus.accounts],
            "checksums": {name: _checksum(draft, name) for name in arrays},
        }
        (draft / _MANIFEST).write_text(seal(manifest), encoding="utf-8")
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / _MANIFEST).exists():
                raise
    except OSError as error:
        raise ClusterError(
            f"the data plan cannot be written to {folder.parent} ({error.strerror or error}); free some "
            "space there, or name another folder (checkpoint.storage), then start again"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: Path) -> tuple[Corpus, Packs]:
    """Open a plan; its arrays are mapped and not read.

    Raises:
        ClusterError: The plan or a store is damaged.
    """
    try:
        manifest = unseal((folder / _MANIFEST).read_text(encoding="utf-8"))
        for name, checksum in manifest["checksums"].items():
            if _checksum(folder, name) != checksum:
                raise ValueError(f"the checksum of {name}.npy is another")
        documents, order, bounds = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("documents", "packs", "bounds")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"the data plan {folder} is damaged or not readable ({error}); remove that folder, and it will "
            "be made again"
        ) from None
    stores = tuple(TokenStore(folder.parent / name) for name in manifest["stores"])
    corpus = Corpus(
        stores,
        manifest["loss_on"],
        **{field: documents[field] for field in _FIELDS},
        accounts=tuple(Account(**account) for account in manifest["accounts"]),
    )
    return corpus, Packs(order, bounds)


def _checksum(folder: Path, name: str) -> int:
    with (folder / f"{name}.npy").open("rb") as file:
        checksum = 0
        while chunk := file.read(2**22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
