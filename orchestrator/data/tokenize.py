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

from orchestrator.data.encoder import Encoder
from orchestrator.data.files import Block, DataFile, changed, locate
from orchestrator.data.formats import Malformed, parse
from orchestrator.data.store import MANIFEST, Shard, TokenStore, draft_of, write_index, write_shard
from orchestrator.data.template import Encoded, Template, choose, encode
from orchestrator.errors import ClusterError, OrchestratorError, SpecError
from orchestrator.paths import resolve
from orchestrator.spec import ModelSpec, SourceSpec

Note = Callable[[str], None]
_VERSION = 4  # of the store; a change makes every cached store unknown
_SHOWN_PROBLEMS = 10
_SECONDS_BETWEEN_NOTES = 5.0
_DRAFT = re.compile(r"(plan-)?[0-9a-f]{24}\.(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.partial")  # see draft_of
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
    wanted: str,
    sources: Sequence[SourceSpec],
    cache: Path,
    malformed_allowed: int = 0,
    note: Note = lambda _: None,
) -> list[TokenStore]:
    """Tokenise data sets, or open the stores that earlier runs left for the same input.

    Args:
        model: Gives the tokenizer.
        wanted: The template that the job asks for.
        sources: The data sets, in order.
        cache: Folder on storage that every node sees; stores lie in it by key.
        malformed_allowed: How many malformed rows all sources together may have.
        note: Told how far it is.

    Returns:
        One store for each source.

    Raises:
        SpecError: Unreadable data, or more malformed rows than allowed, each named by file and place.
        ClusterError: The cache cannot be written.
    """
    tokenizer = load_tokenizer(model)
    template = choose(wanted, tokenizer)  # type: ignore[arg-type]
    _sweep(cache)
    stores: list[TokenStore] = []
    problems: list[tuple[str, str]] = []
    for source in sources:
        files = locate(source)
        prints = [file.fingerprint() for file in files]
        folder = cache / _key(source, prints, tokenizer, template)
        if not (folder / MANIFEST).exists():
            room = malformed_allowed - len(problems)
            try:
                _tokenize(model, template, source, files, prints, folder, room, note)
            except _TooManyMalformedError as error:
                problems += error.found
                continue
        store = TokenStore(folder)
        problems += store.malformed
        stores.append(store)
    if len(problems) > malformed_allowed:
        raise _malformed(problems, malformed_allowed)
    empty = [source.path for source, store in zip(sources, stores, strict=True) if len(store) == 0]
    if empty:
        raise SpecError(*(f"data file {path} has no rows; give at least one" for path in empty))
    return stores


class _TooManyMalformedError(Exception):
    """A source has more malformed rows than may be; carries what was found."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__(f"{len(found)} malformed rows")
        self.found = found


def _malformed(found: list[tuple[str, str]], allowed: int) -> SpecError:
    shown = [f"{place}: {reason}" for place, reason in found[:_SHOWN_PROBLEMS]]
    more = len(found) - len(shown)
    limit = f" (data.malformed_rows_allowed={allowed})" if allowed else ""
    rest = [f"{more} more malformed rows{limit}"] if more > 0 else []
    return SpecError(*shown, *rest)


def _tokenize(
    model: ModelSpec,
    template: Template,
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
        for shard in _write_shards(model, template, source, files, draft):
            shards.append(shard)
            malformed += len(shard.malformed)
            progress.add(len(shard.index))
        for file, stamp, was in zip(files, stamps, prints, strict=True):
            if file.stamp() != stamp or file.fingerprint() != was:
                raise changed(file.name)
        if malformed > malformed_allowed:
            raise _TooManyMalformedError([entry for shard in shards for entry in shard.malformed])
        with _cache_errors(folder.parent):
            write_index(draft, shards, {"template": template, "source": source.path})
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
    model: ModelSpec, template: Template, source: SourceSpec, files: Sequence[DataFile], folder: Path
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
                _write_block.remote(model, tokenizer, template, source.format, block, folder, number)
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
    wanted: Any,
    block: Block,
    folder: Path,
    number: int,
) -> Shard:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # a task has one core; the others have tasks of their own
    loaded = _held(tokenizer[0]) or load_tokenizer(model)
    rows, places, malformed = [], [], []
    for at, value in enumerate(block.values):
        try:
            rows.append(parse(value, wanted))
            places.append(at)
        except Malformed as problem:
            malformed.append((at, str(problem)))
    encoded = []
    for at, result in zip(places, encode(rows, loaded, template, _encoder(loaded)), strict=True):
        if isinstance(result, Encoded):
            encoded.append(result)
        else:
            malformed.append((at, str(result)))
    problems = [(block.place(at), reason) for at, reason in sorted(malformed)]
    with _cache_errors(folder.parent):
        return write_shard(folder, number, encoded, problems)


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


def _key(source: SourceSpec, prints: Sequence[str], tokenizer: Any, template: str) -> str:
    """Return the name of the store: a hash of all that decides its content."""
    digest = hashlib.sha256()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # set by whoever used the tokenizer last, and off here
        backend.pop(setting, None)
    settings = [_VERSION, template, source.format, list(prints), backend]
    special = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)]
    digest.update(json.dumps([settings, special]).encode())
    return digest.hexdigest()[:24]
