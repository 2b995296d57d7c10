"""Tokenising data sets as Ray tasks on CPUs, into a store that is shared by runs.

This happens before any worker is started, so no device waits for it and no collective can time out on it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.data.source import Row, read_alpaca
from orchestrator.data.store import MANIFEST, Account, ShardIndex, TokenStore, write_index, write_shard
from orchestrator.data.template import choose, tokenize, truncate
from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.paths import resolve
from orchestrator.spec import DataSpec, JobSpec, SourceSpec

_ROWS_PER_SHARD = 4096
_FORMAT = 1  # of the store; a change makes every cached store unknown


def load_tokenizer(job: JobSpec) -> Any:
    """Return the model's tokenizer.

    Raises:
        SpecError: The path has none.
    """
    from transformers import AutoTokenizer

    path = str(resolve(job.model.path))
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=job.model.trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SpecError(
            f"model.path={job.model.path} has no tokenizer that can be loaded ({reason}); name a folder or "
            "hub model with tokenizer files"
        ) from None


def tokenize_sources(job: JobSpec, sources: Sequence[SourceSpec], cache: Path) -> TokenStore:
    """Tokenise and truncate data sets, or open the store that an earlier run left for the same input.

    Args:
        job: Gives the tokenizer, template, truncation and max_length.
        sources: The data sets, in order.
        cache: Folder on storage that every node sees; stores lie in it by key.

    Returns:
        The store of all documents that have a trained token.

    Raises:
        SpecError: Unreadable or malformed data, or no document left.
    """
    tokenizer = load_tokenizer(job)
    template = choose(job.data.template, tokenizer)
    key = _key(job.data, sources, tokenizer, template)
    folder = cache / key
    if not (folder / MANIFEST).exists():
        draft = cache / f"{key}.{uuid.uuid4().hex[:8]}.partial"
        draft.mkdir(parents=True)
        try:
            shards = _write_shards(job, sources, draft)
            write_index(draft, shards, {"template": template, "sources": [each.path for each in sources]})
            _publish(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    store = TokenStore(folder)
    if len(store) == 0:
        raise SpecError(
            f"no row of {', '.join(each.path for each in sources)} keeps a token to train on: "
            f"{store.account.rows_dropped} of {store.account.rows} were dropped with "
            f"max_length={job.data.max_length} and truncation={job.data.truncation}; raise data.max_length"
        )
    return store


def _write_shards(job: JobSpec, sources: Sequence[SourceSpec], folder: Path) -> list[ShardIndex]:
    # Files are read where the driver looked for them; the rows travel to whichever node tokenises them.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    tasks: list[Any] = []
    for source in sources:
        blocks = _read_blocks.options(num_returns="streaming", scheduling_strategy=here).remote(source)
        for block in blocks:
            tasks.append(_write_block.remote(job, block, str(folder), len(tasks)))
    return list(_results(tasks))


def _results(tasks: list[Any]) -> Iterator[ShardIndex]:
    """Yield task results in order; raise what is ours as itself."""
    try:
        yield from (ray.get(task) for task in tasks)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise error.cause from None
        raise


@ray.remote(num_cpus=1, max_retries=3)
def _read_blocks(source: SourceSpec) -> Iterator[list[Row]]:
    rows = read_alpaca(source.path) * source.repeat
    for start in range(0, len(rows), _ROWS_PER_SHARD):
        yield rows[start : start + _ROWS_PER_SHARD]


@ray.remote(num_cpus=1, max_retries=3)
def _write_block(job: JobSpec, rows: list[Row], folder: str, number: int) -> ShardIndex:
    tokenizer = load_tokenizer(job)
    template = choose(job.data.template, tokenizer)
    documents, account = [], Account()
    for document in tokenize(rows, tokenizer, template, job.data.loss_on):
        how = job.data.truncation
        kept = truncate(document, job.data.max_length, "right" if how == "split" else how)
        read = len(document.tokens)
        left = 0 if kept is None else len(kept.tokens)
        account += Account(
            rows=1,
            documents=int(kept is not None),
            tokens_read=read,
            tokens_kept=left,
            tokens_truncated=0 if kept is None else read - left,
            tokens_dropped=read if kept is None else 0,
            rows_truncated=int(0 < left < read),
            rows_dropped=int(kept is None),
            trained_tokens=0 if kept is None else int(kept.trained.sum()),
        )
        if kept is not None:
            documents.append(kept)
    return write_shard(Path(folder), number, documents, account)


def _publish(draft: Path, folder: Path) -> None:
    """Rename the draft to its place; a store that another run published first is as good."""
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / MANIFEST).exists():
            raise


def _key(data: DataSpec, sources: Sequence[SourceSpec], tokenizer: Any, template: str) -> str:
    """Return the name of the store: a hash of all that decides its content."""
    digest = hashlib.sha256()
    settings = [_FORMAT, template, data.max_length, data.truncation, data.loss_on]
    digest.update(json.dumps([settings, [each.model_dump() for each in sources]]).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str([tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]).encode())
    for source in sources:
        try:
            with resolve(source.path).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            read_alpaca(source.path)  # says what is wrong with the file
            raise
    return digest.hexdigest()[:24]
