"""Tokenize datasets in Ray tasks on CPUs, into token stores that runs share.

This runs before any training worker starts, so no GPU is idle meanwhile and no collective can time out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.config.schema import DataSpec, ModelSpec, SourceSpec
from orchestrator.data import turns
from orchestrator.data.chat_template import Template, choose
from orchestrator.data.encode_rows import encode_block
from orchestrator.data.formats import RowFormat
from orchestrator.data.model_tokenizer import load_tokenizer
from orchestrator.data.readers import Block, DataFile, changed, locate
from orchestrator.data.rows import Learnt, learnt_of
from orchestrator.data.skipped_rows import empty_rows, left_out, require_rows, too_many
from orchestrator.data.token_cache import (
    MANIFEST,
    Left,
    Shard,
    TokenStore,
    draft_of,
    write_index,
    write_shard,
)
from orchestrator.errors import ClusterError, OrchestratorError, SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_logger = logging.getLogger(__name__)
_VERSION = 13  # part of the cache key: raise it when the files change, and older stores are ignored
_SECONDS_BETWEEN_LOGS = 5.0
_DRAFT = re.compile(
    r"(packed-)?[0-9a-f]{24}\.(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.partial"
)  # see draft_of
_STALE_SECONDS = 24 * 3600.0


def tokenize_sources(
    model: ModelSpec, data: DataSpec, sources: Sequence[SourceSpec], cache: Path
) -> list[TokenStore]:
    """Tokenize datasets, or open the stores of earlier runs with the same input; log skipped rows.

    Args:
        model: Model whose tokenizer is used.
        data: Template, loss_on, empty_answers, and the malformed rows allowed over all sources.
        sources: The datasets, in order.
        cache: Folder on shared storage; each store is a subfolder named by its cache key.

    Returns:
        One store for each source.

    Raises:
        SpecError: Unreadable data, more malformed rows than allowed (listed by file and line), or a source
            without a row to train on.
        ClusterError: The cache cannot be written.
    """
    tokenizer = load_tokenizer(model, data.chat_template)
    template = choose(data, model, tokenizer)
    learnt = learnt_of(data)
    _sweep(cache)
    stores: list[TokenStore] = []
    problems: list[Left] = []
    for source in sources:
        files = locate(source)
        prints = [file.fingerprint() for file in files]
        contents = [f"{file.kind} {file.rows} {print}" for file, print in zip(files, prints, strict=True)]
        folder = cache / _key(source, contents, tokenizer, template, learnt)
        if not (folder / MANIFEST).exists():
            remaining = data.malformed_rows_allowed - len(problems)
            try:
                _tokenize(model, template, learnt, source, files, prints, folder, remaining)
            except _TooManyMalformedError as error:
                problems += error.rows
                continue
        store = TokenStore(folder)
        problems += store.malformed + (empty_rows(store) if data.empty_answers == "error" else [])
        stores.append(store)
    if len(problems) > data.malformed_rows_allowed:
        raise too_many(problems, data.malformed_rows_allowed)
    require_rows(sources, stores)
    for line in left_out(sources, stores):
        _logger.info("%s", line)
    return stores


class _TooManyMalformedError(Exception):
    """A source has more malformed rows than allowed."""

    def __init__(self, rows: list[Left]) -> None:
        super().__init__(f"{len(rows)} malformed rows")
        self.rows = rows


def _tokenize(
    model: ModelSpec,
    template: Template,
    learnt: Learnt,
    source: SourceSpec,
    files: Sequence[DataFile],
    prints: Sequence[str],
    folder: Path,
    malformed_allowed: int,
) -> None:
    """Write the store of one source to a draft folder and rename it to `folder`."""
    draft = draft_of(folder)
    with _cache_errors(folder.parent):
        draft.mkdir(parents=True)
    try:
        stamps = [file.stamp() for file in files]
        shards: list[Shard] = []
        progress = _Progress(source.path)
        malformed = 0
        for shard in _write_shards(model, template, learnt, source, files, draft):
            shards.append(shard)
            malformed += len(shard.malformed)
            progress.add(len(shard.index))
        for file, stamp, was in zip(files, stamps, prints, strict=True):
            if file.stamp() != stamp or file.fingerprint() != was:
                raise changed(file.name)
        if malformed > malformed_allowed:
            raise _TooManyMalformedError([entry for shard in shards for entry in shard.malformed])
        with _cache_errors(folder.parent):
            write_index(
                draft, shards, {"template": asdict(template), "learnt": learnt, "source": source.path}
            )
            _publish(draft, folder)
        progress.end()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class _Progress:
    """Logs the number of tokenized rows and their rate."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = self._logged = time.monotonic()
        self._rows = 0

    def add(self, rows: int) -> None:
        self._rows += rows
        if time.monotonic() - self._logged >= _SECONDS_BETWEEN_LOGS:
            self._logged = time.monotonic()
            self._log("tokenizing")

    def end(self) -> None:
        self._log("tokenized")

    def _log(self, verb: str) -> None:
        seconds = max(1e-6, time.monotonic() - self._started)
        rate = f"{self._rows / seconds:,.0f} rows/s"
        _logger.info("%s %s: %s rows, %s", verb, self._name, f"{self._rows:,}", rate)


def _write_shards(
    model: ModelSpec,
    template: Template,
    learnt: Learnt,
    source: SourceSpec,
    files: Sequence[DataFile],
    folder: Path,
) -> Iterator[Shard]:
    """Yield the shards of a source in order; at most two blocks per CPU of the cluster are in flight."""
    # Files are read on the driver's node, where they were located; any node may tokenize the rows.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    tokenizer = [ray.put(None if model.trust_remote_code else load_tokenizer(model, template.chosen))]
    options = {"scheduling_strategy": here, "_generator_backpressure_num_objects": at_once}
    streamed = _read_blocks.options(num_returns="streaming", **options).remote(list(files))
    # Annotated as a reference to one result; with num_returns="streaming" it is a generator of references.
    blocks = cast("Iterator[ray.ObjectRef[Block]]", streamed)
    in_flight: list[ray.ObjectRef[Shard]] = []
    with _unwrap_task_errors():
        for number, block in enumerate(blocks):
            in_flight.append(
                _write_block.remote(model, tokenizer, template, learnt, source.format, block, folder, number)
            )
            if len(in_flight) >= at_once:
                yield ray.get(in_flight.pop(0))
        for task in in_flight:
            yield ray.get(task)


@ray.remote(num_cpus=0, max_retries=3)
def _read_blocks(files: list[DataFile]) -> Iterator[Block]:
    yield from blocks_of(files)


def blocks_of(files: Sequence[DataFile]) -> Iterator[Block]:
    """Yield the blocks of all files of a source, in order.

    Raises:
        SpecError: As `DataFile.blocks`, or no row has a column that `columns` names.
    """
    columns = files[0].names.columns if files else {}
    unseen = {name: key for name, key in columns.items() if key is not None and key not in turns.FIELDS}
    for file in files:
        for block in file.blocks():
            if unseen:
                unseen = {name: key for name, key in unseen.items() if not _has_column(block, name)}
            yield block
    for name, key in unseen.items():
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise SpecError(
            f"no row of data file {files[0].name}{more} has the column {name}, which columns maps to {key}; "
            "correct data.train[].columns"
        )


def _has_column(block: Block, name: str) -> bool:
    """Return whether a row has a column, or, of JSON that is not parsed yet, may have it."""
    keys = [json.dumps(name, ensure_ascii=is_ascii).encode() for is_ascii in (True, False)]
    for value in block.values:
        if isinstance(value, bytes) and any(key in value for key in keys):
            return True
        if isinstance(value, Mapping) and name in value:
            return True
    return False


@ray.remote(num_cpus=1, max_retries=3)
def _write_block(
    model: ModelSpec,
    tokenizer: list[ray.ObjectRef[PreTrainedTokenizerFast | None]],
    template: Template,
    learnt: Learnt,
    row_format: RowFormat,
    block: Block,
    folder: Path,
    number: int,
) -> Shard:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # one core per task: Ray runs a task on every core
    loaded = _held(tokenizer[0]) or load_tokenizer(model, template.chosen)
    outcomes = encode_block(block, row_format, loaded, template, learnt)
    malformed, empty, partly_empty = (
        [(block.source_line(at), reason) for at, reason in sorted(reasons.items())]
        for reasons in (outcomes.malformed, outcomes.empty, outcomes.partly_empty)
    )
    with _cache_errors(folder.parent):
        return write_shard(
            folder,
            number,
            list(outcomes.encoded.values()),
            malformed,
            empty,
            partly_empty,
            outcomes.fields_without_effect,
        )


@lru_cache(maxsize=1)
def _held(reference: ray.ObjectRef[PreTrainedTokenizerFast | None]) -> PreTrainedTokenizerFast | None:
    """Return the driver's tokenizer, fetched once per process because loading one takes seconds."""
    return ray.get(reference)


@contextmanager
def _unwrap_task_errors() -> Iterator[None]:
    """Raise an OrchestratorError of a task itself instead of Ray's RayTaskError."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise error.cause from None
        raise


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """Turn an OSError into a ClusterError with the folder, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "free some space there or set another folder" if is_full else "make it writable on every node"
        )
        raise ClusterError(
            f"tokenized data cannot be written to {cache} ({error.strerror or error}); {remedy} "
            "(checkpoint.storage), then restart"
        ) from None


def _publish(draft: Path, folder: Path) -> None:
    """Rename the draft to its final name; keep an existing store, which has the same content."""
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / MANIFEST).exists():
            raise


def _sweep(cache: Path) -> None:
    """Remove drafts whose process on this machine has exited, and drafts not modified for a day."""
    for draft in cache.glob("*.partial"):
        match = _DRAFT.fullmatch(draft.name)
        if match is None:  # not a draft of this program
            continue
        try:
            here, pid = match["host"] == socket.gethostname(), match["pid"]
            dead = here and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists()
            if dead or time.time() - draft.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(draft, ignore_errors=True)
        except OSError:  # removed meanwhile by another process
            continue


def _key(
    source: SourceSpec,
    prints: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    learnt: Learnt,
) -> str:
    """Return the cache key: a hash of everything that determines the content of the store."""
    digest = hashlib.sha256()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # state of the last call, switched off for encoding
        backend.pop(setting, None)
    read_as = [source.format, source.columns, source.roles, source.field]
    settings = [_VERSION, asdict(template), learnt, *read_as, list(prints), backend]
    special = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)]
    digest.update(json.dumps([settings, special]).encode())
    return digest.hexdigest()[:24]
