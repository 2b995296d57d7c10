"""Tokenising data sets as Ray tasks on CPUs, into stores that are shared by runs.

This happens before any worker is started, so no device waits for it and no collective can time out on it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.config.paths import resolve
from orchestrator.config.schema import DataSpec, ModelSpec, SourceSpec
from orchestrator.data.chat_template import Template, choose, encode
from orchestrator.data.encoder import Encoder
from orchestrator.data.formats import Malformed, parse
from orchestrator.data.readers import Block, DataFile, changed, locate
from orchestrator.data.rows import Learnt, Row, empty_answers, learnt_of, nothing_to_learn
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

Note = Callable[[str], None]
_VERSION = 5  # of the store; a change makes every cached store unknown
_SECONDS_BETWEEN_NOTES = 5.0
_DRAFT = re.compile(
    r"(packed-)?[0-9a-f]{24}\.(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.partial"
)  # see draft_of
_STALE_SECONDS = 24 * 3600.0


def load_tokenizer(model: ModelSpec) -> Any:
    """Return the model's tokenizer.

    Raises:
        SpecError: The path has none, or none that is fast.
    """
    return _load_tokenizer(str(resolve(model.path)), model.path, model.trust_remote_code)


@lru_cache(maxsize=2)
def _load_tokenizer(path: str, name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SpecError(
            f"model.path={name} has no tokenizer that can be loaded ({reason}); name a folder or "
            "hub model with tokenizer files"
        ) from None
    if not tokenizer.is_fast:
        raise SpecError(
            f"model.path={name} has only a tokenizer written in Python, which knows no positions; convert it "
            "to a fast one (tokenizer.json)"
        )
    return tokenizer


def tokenize_sources(
    model: ModelSpec,
    data: DataSpec,
    sources: Sequence[SourceSpec],
    cache: Path,
    note: Note = lambda _: None,
) -> list[TokenStore]:
    """Tokenise data sets, or open the stores that earlier runs left for the same input.

    Args:
        model: Gives the tokenizer.
        data: Gives the template, what is learnt, and how many malformed rows all sources together may have.
        sources: The data sets, in order.
        cache: Folder on storage that every node sees; stores lie in it by key.
        note: Told how far it is, and which rows are left out.

    Returns:
        One store for each source.

    Raises:
        SpecError: Unreadable data, more malformed rows than allowed, each named by file and place, or a
            source without a row that has anything to learn.
        ClusterError: The cache cannot be written.
    """
    tokenizer = load_tokenizer(model)
    template = choose(data.chat_template, tokenizer)
    learnt = learnt_of(data)
    _sweep(cache)
    stores: list[TokenStore] = []
    problems: list[Left] = []
    for source in sources:
        files = locate(source)
        prints = [file.fingerprint() for file in files]
        folder = cache / _key(source, prints, tokenizer, template, learnt)
        if not (folder / MANIFEST).exists():
            room = data.malformed_rows_allowed - len(problems)
            try:
                _tokenize(model, template, learnt, source, files, prints, folder, room, note)
            except _TooManyMalformedError as error:
                problems += error.found
                continue
        store = TokenStore(folder)
        problems += store.malformed + (empty_rows(store) if data.empty_answers == "error" else [])
        stores.append(store)
    if len(problems) > data.malformed_rows_allowed:
        raise too_many(problems, data.malformed_rows_allowed)
    require_rows(sources, stores)
    for sentence in left_out(sources, stores):
        note(sentence)
    return stores


class _TooManyMalformedError(Exception):
    """A source has more malformed rows than may be; carries what was found."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__(f"{len(found)} malformed rows")
        self.found = found


def _tokenize(
    model: ModelSpec,
    template: Template,
    learnt: Learnt,
    source: SourceSpec,
    files: Sequence[DataFile],
    prints: Sequence[str],
    folder: Path,
    malformed_allowed: int,
    note: Note,
) -> None:
    """Write the store of one source and put it in its place."""
    draft = draft_of(folder)
    with _cache_errors(folder.parent):
        draft.mkdir(parents=True)
    try:
        stamps = [file.stamp() for file in files]
        shards: list[Shard] = []
        progress = _Progress(source.path, note)
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
            write_index(draft, shards, {"template": template, "learnt": learnt, "source": source.path})
            _publish(draft, folder)
        progress.end()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class _Progress:
    """Says how many rows were tokenised, and how fast."""

    def __init__(self, name: str, note: Note) -> None:
        self._name, self._note = name, note
        self._started = self._told = time.monotonic()
        self._rows = 0

    def add(self, rows: int) -> None:
        self._rows += rows
        if time.monotonic() - self._told >= _SECONDS_BETWEEN_NOTES:
            self._told = time.monotonic()
            self._tell("tokenising")

    def end(self) -> None:
        self._tell("tokenised")

    def _tell(self, verb: str) -> None:
        seconds = max(1e-6, time.monotonic() - self._started)
        self._note(f"{verb} {self._name}: {self._rows:,} rows, {self._rows / seconds:,.0f} rows/s")


def _write_shards(
    model: ModelSpec,
    template: Template,
    learnt: Learnt,
    source: SourceSpec,
    files: Sequence[DataFile],
    folder: Path,
) -> Iterator[Shard]:
    """Yield the shards of a source in order; no more blocks are under way than the cluster has use for."""
    # Files are read where the driver looked for them; the rows travel to whichever node tokenises them.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    tokenizer = [ray.put(None if model.trust_remote_code else load_tokenizer(model))]
    options = {"scheduling_strategy": here, "_generator_backpressure_num_objects": at_once}
    blocks = _read_blocks.options(num_returns="streaming", **options).remote(list(files))
    under_way: list[Any] = []
    with _ours():
        for number, block in enumerate(blocks):
            under_way.append(
                _write_block.remote(model, tokenizer, template, learnt, source.format, block, folder, number)
            )
            if len(under_way) >= at_once:
                yield ray.get(under_way.pop(0))
        for task in under_way:
            yield ray.get(task)


@ray.remote(num_cpus=0, max_retries=3)
def _read_blocks(files: list[DataFile]) -> Iterator[Block]:
    for file in files:
        yield from file.blocks()


@ray.remote(num_cpus=1, max_retries=3)
def _write_block(
    model: ModelSpec,
    tokenizer: list[Any],
    template: Template,
    learnt: Learnt,
    wanted: Any,
    block: Block,
    folder: Path,
    number: int,
) -> Shard:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # a task has one core; the others have tasks of their own
    loaded = _held(tokenizer[0]) or load_tokenizer(model)
    rows, malformed, empty = _rows(block, wanted, learnt)
    partly_empty: dict[int, str] = {}
    encoded = []
    results = encode(list(rows.values()), loaded, template, _encoder(loaded), learnt != "answers")
    for (at, row), result in zip(rows.items(), results, strict=True):
        if isinstance(result, Malformed):
            malformed[at] = str(result)
        elif len(result.tokens) < 2 or not (learnt == "all" or result.turn[1:].any()):
            empty[at] = "none of its tokens is to be learnt"
        else:
            encoded.append(result)
            if learnt == "answers" and (lack := empty_answers(row)):
                partly_empty[at] = lack
    rejected = [
        [(block.place(at), reason) for at, reason in sorted(found.items())]
        for found in (malformed, empty, partly_empty)
    ]
    with _cache_errors(folder.parent):
        return write_shard(folder, number, encoded, *rejected)


def _rows(block: Block, wanted: Any, learnt: Learnt) -> tuple[dict[int, Row], dict[int, str], dict[int, str]]:
    """Return by their place in a block the rows with something to learn, and why the others have none."""
    rows: dict[int, Row] = {}
    malformed: dict[int, str] = {}
    empty: dict[int, str] = {}
    for at, value in enumerate(block.values):
        try:
            row = parse(value, wanted)
        except Malformed as problem:
            malformed[at] = str(problem)
            continue
        if lack := nothing_to_learn(row, learnt):
            empty[at] = lack
        else:
            rows[at] = row
    return rows, malformed, empty


@lru_cache(maxsize=1)
def _held(reference: Any) -> Any:
    """Return the driver's tokenizer, fetched once a process: loading one takes seconds and PyTorch."""
    return ray.get(reference)


@lru_cache(maxsize=1)
def _encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


@contextmanager
def _ours() -> Iterator[None]:
    """Raise what is ours as itself, not wrapped by Ray."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise error.cause from None
        raise


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """Say which folder could not be written, and why."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space there, or name another" if is_full else "make it writable on every node"
        raise ClusterError(
            f"tokenised data cannot be written to {cache} ({error.strerror or error}); {remedy} "
            "(checkpoint.storage), then start again"
        ) from None


def _publish(draft: Path, folder: Path) -> None:
    """Rename the draft to its place; a store that another run published first is as good."""
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / MANIFEST).exists():
            raise


def _sweep(cache: Path) -> None:
    """Remove the drafts of processes that are dead: of this machine, or untouched for a day."""
    for draft in cache.glob("*.partial"):
        match = _DRAFT.fullmatch(draft.name)
        if match is None:  # not ours
            continue
        try:
            here, pid = match["host"] == socket.gethostname(), match["pid"]
            dead = here and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists()
            if dead or time.time() - draft.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(draft, ignore_errors=True)
        except OSError:  # it went away meanwhile
            continue


def _key(
    source: SourceSpec, prints: Sequence[str], tokenizer: Any, template: Template, learnt: Learnt
) -> str:
    """Return the name of the store: a hash of all that decides its content."""
    digest = hashlib.sha256()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # set by whoever used the tokenizer last, and off here
        backend.pop(setting, None)
    settings = [_VERSION, template, learnt, source.format, list(prints), backend]
    special = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)]
    digest.update(json.dumps([settings, special]).encode())
    return digest.hexdigest()[:24]
