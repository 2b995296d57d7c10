"""Faults during tokenization and packing: no wrong tokens, a clear error, no files left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.config.schema import DataSpec, SourceSpec
from orchestrator.data.chat_template import Encoded
from orchestrator.data.packed_dataset import get_or_create, load
from orchestrator.data.token_cache import TokenStore, write_index, write_shard
from orchestrator.errors import ClusterError
from tests.benchmarks.tokenise import write_rows
from tests.conftest import (
    ENVIRONMENT,
    ROOT,
    Finished,
    finish,
    job_text,
    orchestrator,
    processes_of,
    start,
    step_rows,
    wait_until,
)

pytestmark = pytest.mark.ray

ROWS = 12_000  # three shards, some seconds of work
MARKER = uuid.uuid4().hex


@dataclass
class Packed:
    """A dataset that was tokenized and packed without a fault."""

    file: Path
    cache: Path
    figures: dict[str, Any]

    @property
    def store(self) -> Path:
        """Directory of the only token store."""
        (store,) = _stores(self.cache)
        return store

    @property
    def packed(self) -> Path:
        """Directory of the only packed dataset."""
        (packed,) = self.cache.glob("packed-*")
        return packed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packed]:
    """Tokenize and pack generated rows once, without a fault."""

    root = tmp_path_factory.mktemp("undisturbed-data")
    write_rows(root / "rows.jsonl", ROWS)
    _write_job(root, root / "rows.jsonl", root / "runs")
    done = _run("pack", "job.yaml", "--json", cwd=root)
    assert done.code == 0, done.err

    packed = Packed(root / "rows.jsonl", root / "runs" / ".cache", json.loads(done.out))
    assert len(list(packed.store.glob("shard-*"))) == 3
    yield packed
    wait_until(lambda: not processes_of(f"TEST_MARKER={MARKER}"), 90, "all processes gone")


def _write_job(directory: Path, data: Path, storage: Path, **changes: Any) -> None:
    changes = {"data__train": [{"path": str(data)}], "eval": None, "optim__max_steps": 2, **changes}
    (directory / "job.yaml").write_text(job_text(storage, **changes))


def _run(*arguments: str, cwd: Path) -> Finished:
    return orchestrator(*arguments, cwd=cwd, TEST_MARKER=MARKER)


def _assert_clear(done: Finished, *words: str) -> None:
    """Check exit code 3 and an error on stderr that has these words."""
    assert done.code == 3, f"{done.out[-2000:]}\n{done.err[-2000:]}"
    assert "cluster error:" in done.err
    for word in words:
        assert word in done.err


def _stores(cache: Path) -> list[Path]:
    return [path.parent for path in cache.glob("[0-9a-f]*/manifest.json")]


def _drafts(cache: Path) -> list[str]:
    """Return the entries of a cache that are neither complete token stores nor packed datasets."""
    complete = {
        path.parent.name
        for name in ("manifest.json", "packed_dataset.json")
        for path in cache.glob(f"*/{name}")
    }
    return [
        path.name
        for path in cache.iterdir()
        if path.name not in complete or path.name.startswith(".") or path.suffix == ".partial"
    ]


def _assert_same_tokens(cache: Path, expected: Packed) -> None:
    """Check that there is one token store, with the same tokens and turns as without a fault."""
    (folder,) = _stores(cache)
    assert folder.name == expected.store.name

    store, reference_store = TokenStore(folder), TokenStore(expected.store)
    assert len(store) == len(reference_store) == ROWS
    for number in range(ROWS):
        row, reference = store.row(number), reference_store.row(number)
        assert np.array_equal(row.tokens, reference.tokens), number
        assert np.array_equal(row.turn, reference.turn), number

    for key in ("rows", "rows_malformed", "tokens", "index_checksum", "shards"):
        assert store.manifest[key] == reference_store.manifest[key]


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x04
    file.write_bytes(content)


def test_killed_tokenization_is_repeated(undisturbed: Packed, tmp_path: Path) -> None:
    cache = tmp_path / "runs" / ".cache"
    _write_job(tmp_path, undisturbed.file, tmp_path / "runs")
    process = start("pack", "job.yaml", "--json", cwd=tmp_path, TEST_MARKER=MARKER)
    wait_until(lambda: list(cache.glob("*.partial/shard-*.arrow")), 120, "the first shard")
    process.send_signal(signal.SIGKILL)
    assert finish(process, timeout=60).code == -signal.SIGKILL
    assert _stores(cache) == [], "it was killed too late for this test"
    assert len(_drafts(cache)) == 1

    done = _run("pack", "job.yaml", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out) == undisturbed.figures
    assert _drafts(cache) == []
    _assert_same_tokens(cache, undisturbed)


def test_two_drivers_share_one_cache(undisturbed: Packed, tmp_path: Path) -> None:
    cache = tmp_path / "runs" / ".cache"
    _write_job(tmp_path, undisturbed.file, tmp_path / "runs")
    both = [start("pack", "job.yaml", "--json", cwd=tmp_path, TEST_MARKER=MARKER) for _ in range(2)]
    done = [finish(process) for process in both]

    for finished in done:
        assert finished.code == 0, finished.err
        assert json.loads(finished.out) == undisturbed.figures
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        [undisturbed.store.name, undisturbed.packed.name]
    )
    _assert_same_tokens(cache, undisturbed)


def test_a_full_disk_is_an_error_that_leaves_no_files(
    undisturbed: Packed, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    needed = sum(path.stat().st_size for path in undisturbed.store.iterdir())
    storage = small_disk(needed // 2)
    cache = storage / ".cache"
    _write_job(tmp_path, undisturbed.file, storage)

    full = _run("pack", "job.yaml", cwd=tmp_path)
    _assert_clear(full, f"cannot be written to {cache}", "free some space there", "checkpoint.storage")
    assert list(storage.iterdir()) == []  # not even the cache directory

    small_disk(3 * needed)
    done = _run("pack", "job.yaml", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out) == undisturbed.figures
    _assert_same_tokens(cache, undisturbed)


def test_a_damaged_shard_is_an_error_until_it_is_removed(undisturbed: Packed, tmp_path: Path) -> None:
    cache = tmp_path / "runs" / ".cache"
    shutil.copytree(undisturbed.cache, cache)
    _write_job(tmp_path, undisturbed.file, tmp_path / "runs")
    damaged = cache / undisturbed.store.name / "shard-00001.arrow"
    _flip_a_byte(damaged)

    # Another max_length needs the turns of every row again, which are in the shards only.
    again = ("pack", "job.yaml", "--json", "--set", "data.max_length=128")
    _assert_clear(_run(*again, cwd=tmp_path), str(damaged), "checksum", f"remove the folder {damaged.parent}")
    assert len(list(cache.glob("packed-*"))) == 1, "no dataset was packed from it"

    shutil.rmtree(damaged.parent)
    done = _run(*again, cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["tokens_read"] == undisturbed.figures["tokens_read"]
    assert _drafts(cache) == []
    _assert_same_tokens(cache, undisturbed)


def test_no_step_is_trained_on_a_damaged_shard(undisturbed: Packed, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    shutil.copytree(undisturbed.cache, storage / ".cache")
    _write_job(tmp_path, undisturbed.file, storage)
    store = storage / ".cache" / undisturbed.store.name
    for shard in store.glob("shard-*"):  # whichever the first step reads
        _flip_a_byte(shard)

    done = _run("train", "job.yaml", cwd=tmp_path)
    _assert_clear(done, str(store / "shard-0000"), "checksum", f"remove the folder {store}")
    assert step_rows(storage / "run") == []
    assert not list((storage / "run").glob("checkpoints/step-*"))
    assert not (storage / "run" / "export").exists()


_DIE_WHILE_PACKING = """
import os, signal, sys
from pathlib import Path
import numpy as np
from orchestrator.data import packed_dataset
from orchestrator.data.token_cache import TokenStore
from orchestrator.config.schema import DataSpec, SourceSpec

save = np.save
def save_and_die(file, array):
    save(file, array)
    os.kill(os.getpid(), signal.SIGKILL)
np.save = save_and_die
store = Path(sys.argv[1])
source = SourceSpec(path="rows.jsonl")
data = DataSpec(train=(source,), max_length=512)
packed_dataset.get_or_create(store.parent, [TokenStore(store)], [source], data, 123)
"""


def test_a_damaged_dataset_is_an_error_and_a_partial_one_is_removed(
    undisturbed: Packed, tmp_path: Path
) -> None:
    cache = tmp_path / "runs" / ".cache"
    shutil.copytree(undisturbed.cache, cache)
    _write_job(tmp_path, undisturbed.file, tmp_path / "runs")
    packed = cache / undisturbed.packed.name
    _flip_a_byte(packed / "documents.npy")
    _assert_clear(
        _run("pack", "job.yaml", cwd=tmp_path),
        f"packed dataset {packed} is damaged",
        "remove that folder",
    )

    shutil.rmtree(packed)
    died = subprocess.run(
        [sys.executable, "-c", _DIE_WHILE_PACKING, str(cache / undisturbed.store.name)],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert len(_drafts(cache)) == 1
    done = _run("pack", "job.yaml", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out) == undisturbed.figures
    assert _drafts(cache) == []
    for name in ("documents", "packs", "bounds"):
        repacked, expected = (np.load(folder / f"{name}.npy") for folder in (packed, undisturbed.packed))
        assert np.array_equal(repacked, expected)


def test_no_changed_byte_of_a_cache_changes_a_token(tmp_path: Path) -> None:
    """Changes each byte of each file of a small token store and its packed dataset, one at a time."""
    store, sizes = tmp_path / "store", ((3, 5), (4,), (2, 2, 6))
    store.mkdir()
    shards = []
    for number, shard in enumerate(sizes):
        rows = [
            Encoded(np.arange(size, dtype=np.uint32) + 7 * size, np.arange(size).astype(np.uint8) % 3)
            for size in shard
        ]
        shards.append(write_shard(store, number, rows, [(f"row {number}", "not valid JSON")]))
    write_index(store, shards, {"template": "alpaca", "source": "rows.jsonl"})
    source = SourceSpec(path="rows.jsonl")
    packed = get_or_create(
        tmp_path, [TokenStore(store)], [source], DataSpec(train=(source,), max_length=16), 1
    )

    def read() -> tuple[list[tuple[bytes, bytes]], object]:
        opened = TokenStore(store)
        corpus, packs = load(packed)
        rows = [opened.row(number) for number in range(len(opened))]
        documents = [corpus.document(number) for number in packs.documents.tolist()]
        tokens = [(row.tokens.tobytes(), row.turn.tobytes()) for row in rows]

        tokens += [(document.tokens.tobytes(), document.trained.tobytes()) for document in documents]
        return tokens, (corpus.counts, packs.bounds.tolist(), opened.manifest, len(opened.malformed))

    expected = read()
    for file in sorted((*store.iterdir(), *packed.iterdir())):
        remedy = f"remove the folder {store}" if file.parent == store else f"{packed} is damaged"
        content = file.read_bytes()

        for offset in range(len(content)):
            changed = bytearray(content)
            changed[offset] ^= (0x01, 0x04, 0x20)[offset % 3]
            file.write_bytes(changed)
            message = None
            try:
                actual = read()
            except ClusterError as error:
                message = str(error)

            assert remedy in message if message else actual == expected, (file, offset, message)
        file.write_bytes(content)
