"""A store gives back what was written, shard by shard."""

import json
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.store import MANIFEST, Account, TokenStore, write_index, write_shard
from orchestrator.data.template import Document


def document(number: int, length: int) -> Document:
    tokens = np.arange(length, dtype=np.uint32) + 1000 * number
    return Document(tokens, np.arange(length) >= length // 2)


def test_documents_come_back_as_they_were_written(tmp_path: Path) -> None:
    documents = [document(number, length) for number, length in enumerate([3, 1, 7, 4, 2])]
    documents[0].tokens[0] = 2**32 - 1
    shards = [
        write_shard(tmp_path, 0, documents[:2], Account(rows=2, documents=2, tokens_read=4)),
        write_shard(tmp_path, 1, [], Account(rows=1, rows_dropped=1, tokens_read=9, tokens_dropped=9)),
        write_shard(tmp_path, 2, documents[2:], Account(rows=3, documents=3, tokens_read=13)),
        write_shard(tmp_path, 3, [], Account()),
    ]
    write_index(tmp_path, shards, {"template": "chat"})
    store = TokenStore(tmp_path)
    assert len(store) == 5
    assert store.lengths.tolist() == [3, 1, 7, 4, 2]
    assert store.trained.tolist() == [2, 0, 4, 2, 1]  # a first token follows nothing
    for number, written in enumerate(documents):
        read = store.document(number)
        assert read.tokens.tolist() == written.tokens.tolist()
        assert read.trained.tolist() == written.trained.tolist()
    assert store.account == Account(rows=6, documents=5, tokens_read=26, rows_dropped=1, tokens_dropped=9)
    assert json.loads((tmp_path / MANIFEST).read_text())["template"] == "chat"


def test_a_store_of_nothing_opens(tmp_path: Path) -> None:
    write_index(tmp_path, [write_shard(tmp_path, 0, [], Account(rows=4, rows_dropped=4))], {})
    store = TokenStore(tmp_path)
    assert len(store) == 0
    assert store.account.rows_dropped == 4


def test_documents_cannot_be_written_to(tmp_path: Path) -> None:
    write_index(tmp_path, [write_shard(tmp_path, 0, [document(0, 3)], Account())], {})
    with pytest.raises(ValueError, match="read-only"):
        TokenStore(tmp_path).document(0).tokens[0] = 1


def test_the_manifest_is_written_last(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 0, [document(0, 3)], Account())
    assert not (tmp_path / MANIFEST).exists()
    write_index(tmp_path, [shard], {})
    manifest = (tmp_path / MANIFEST).stat().st_mtime_ns
    assert all(file.stat().st_mtime_ns <= manifest for file in tmp_path.iterdir())


def test_accounts_add_up() -> None:
    first = Account(1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert first + first == Account(2, 4, 6, 8, 10, 12, 14, 16, 18)
    assert first + Account() == first
