"""A data file that changes while it is read, and a disk that is full at the end: nothing is cached."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orchestrator.config.schema import DataSpec, ModelSpec, SourceSpec
from orchestrator.data.token_cache import TokenStore
from orchestrator.errors import ClusterError, SpecError

pytestmark = pytest.mark.ray

_PAGE = os.sysconf("SC_PAGE_SIZE")


def _write_short_rows(path: Path, count: int = 5000) -> None:
    """Write rows of a few words: two shards, quickly tokenized."""
    rows = ({"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _tokenise(tokenising: ModuleType, path: Path, cache: Path) -> TokenStore:
    source = SourceSpec(path=str(path))
    (store,) = tokenising.tokenize_sources(
        ModelSpec(path="builtin/tiny-llama"),
        DataSpec(train=(source,), chat_template="alpaca"),
        [source],
        cache,
    )
    assert isinstance(store, TokenStore)
    return store


def _append_a_row(file: Path) -> None:
    with file.open("a", encoding="utf-8") as writer:
        writer.write('{"instruction": "One more.", "output": "Yes."}\n')


def _change_a_word_and_hide_it(file: Path) -> None:
    """Same size and modification time, other content."""
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"It is 4999", b"It is 4998"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _change_a_word_and_change_it_back(file: Path) -> None:
    """Same size and content, other modification time: what was read in between is unknown."""
    content, before = file.read_bytes(), file.stat()
    file.write_bytes(content.replace(b"It is 4999", b"It is 4998"))
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def _put_another_file_in_its_place(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes().replace(b"Say 1.", b"Say 2."))
    other.replace(file)


def _cut_it_short(file: Path) -> None:
    os.truncate(file, file.read_bytes().index(b'{"instruction": "Say 2500.'))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_append_a_row, "changed while it was read"),
        (_change_a_word_and_hide_it, "changed while it was read"),
        (_change_a_word_and_change_it_back, "changed while it was read"),
        (_put_another_file_in_its_place, "changed while it was read"),
        (_cut_it_short, "changed while it was read"),
        (Path.unlink, "cannot be read"),
    ],
)
def test_a_file_that_changes_during_the_read_is_refused(
    change: Callable[[Path], None],
    words: str,
    tokenising: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    _write_short_rows(file)
    write_shards, seen = tokenising._write_shards, []

    def change_after_the_first(*arguments: Any) -> Iterator[Any]:
        for number, shard in enumerate(write_shards(*arguments)):
            if number == 0:
                change(file)
            seen.append(shard)
            yield shard

    with monkeypatch.context() as patch:
        patch.setattr(tokenising, "_write_shards", change_after_the_first)
        with pytest.raises(SpecError) as refused:
            _tokenise(tokenising, file, cache)
    assert len(seen) == 2
    (problem,) = refused.value.problems
    assert f"data file {file} {words}" in problem
    assert list(cache.iterdir()) == [], "nothing is cached"

    if file.exists():
        store = _tokenise(tokenising, file, cache)
        fresh = _tokenise(tokenising, file, tmp_path / "fresh")
        assert store.manifest["shards"] == fresh.manifest["shards"]
        assert len(store) == len(file.read_text().splitlines())


def test_a_disk_that_is_full_at_the_index_is_an_error(
    tokenising: ModuleType, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    file = tmp_path / "rows.jsonl"
    _write_short_rows(file)
    whole = _tokenise(tokenising, file, tmp_path / "cache")
    pages = sum(-(-shard.stat().st_size // _PAGE) for shard in whole.folder.glob("shard-*"))
    cache = small_disk((pages + 4) * _PAGE)

    with pytest.raises(ClusterError, match="free some space there") as full:
        _tokenise(tokenising, file, cache)
    assert str(cache) in str(full.value)
    assert list(cache.iterdir()) == []

    small_disk(4 * pages * _PAGE)
    assert _tokenise(tokenising, file, cache).manifest["shards"] == whole.manifest["shards"]
