"""An export replaces an earlier, unchanged export and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError, TrainingError
from orchestrator.export import destination
from orchestrator.export.destination import MARKER, foreign_entries, free_target, open_draft, target_problem
from orchestrator.export.run_exports import export_run
from tests.exports import runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    runs.write_run(folder / "runs" / "case", runs.write_base(folder / "model"))
    return folder


@pytest.fixture
def storage(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run and its model, which is not the working directory; that one is empty."""
    monkeypatch.chdir(tmp_path)
    return root


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modification time and content of every file below a directory."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def refusal(root: Path, to: str | Path) -> str:
    """Return the error of an export that is refused, which must not change anything."""
    before = contents(root), contents(Path.cwd())
    with pytest.raises(SpecError) as caught:
        export_run(root / "runs" / "case", Path(to))
    assert (contents(root), contents(Path.cwd())) == before
    (problem,) = caught.value.problems
    assert problem.startswith(f"--to {Path(to)} ")
    return problem


def test_a_directory_with_other_files_is_refused(storage: Path) -> None:
    Path("shelf").mkdir()
    Path("shelf/notes.txt").write_text("mine")
    assert "contains files that are not part of an export (1: notes.txt)" in refusal(storage, "shelf")


def test_directories_in_use_are_refused(storage: Path) -> None:
    case = storage / "runs" / "case"
    assert "is the working directory" in refusal(storage, ".")
    assert "contains the working directory" in refusal(storage, "/")
    assert "the home directory" in refusal(storage, Path.home())
    assert "is the run" in refusal(storage, case)
    assert "contains the run" in refusal(storage, case.parent)
    assert "is the base model" in refusal(storage, storage / "model")
    assert "contains " in refusal(storage, storage)
    assert "is inside the run" in refusal(storage, case / "checkpoints")
    assert "is inside the run" in refusal(storage, case / "checkpoints" / "new")
    assert "is inside the run" in refusal(storage, case / "new")
    assert "is a file" in refusal(storage, case / "job.yaml")
    assert "which is a file" in refusal(storage, case / "job.yaml" / "model")


def test_another_run_and_directories_in_it_are_refused(storage: Path) -> None:
    other = Path("others/run")
    (other / "checkpoints").mkdir(parents=True)
    (other / "job.yaml").write_text("name: run")
    for name in ("others", "others/run"):
        assert "contains files that are not part of an export" in refusal(storage, name)
    for name in ("others/run/export", "others/run/checkpoints/model"):
        assert "is inside the run" in refusal(storage, name)


def test_data_and_adapter_of_the_run_are_refused(root: Path, tmp_path: Path) -> None:
    for name in ("data", "adapter"):
        (tmp_path / name).mkdir()
    method = {"type": "lora", "adapter": str(tmp_path / "adapter")}
    document = {
        "name": "run",
        "model": {"path": "builtin/tiny-llama"},
        "data": {"train": [{"path": str(tmp_path / "data")}]},
        "method": method,
    }
    job = runs.JobSpec.model_validate_json(json.dumps(document))
    assert "is the data data" in str(target_problem(tmp_path / "data", tmp_path / "runs" / "run", job))
    assert "is the adapter" in str(target_problem(tmp_path / "adapter", tmp_path / "runs" / "run", job))


def test_an_earlier_export_is_replaced_unless_files_were_added_or_changed(storage: Path) -> None:
    run = storage / "runs" / "case"
    export_run(run, Path("model"), step=2)
    Path("model/notes.txt").write_text("mine")
    assert "(1: notes.txt)" in refusal(storage, "model")
    Path("model/notes.txt").unlink()
    Path("model/mine").mkdir()
    assert "(1: mine)" in refusal(storage, "model")
    Path("model/mine").rmdir()
    card = Path("model/README.md").read_text()
    Path("model/README.md").write_text(card + "My own words.")
    assert "README.md (changed since it was exported)" in refusal(storage, "model")
    Path("model/README.md").write_text(card)
    done = export_run(run, Path("model"))
    assert done.step == json.loads(Path("model", MARKER).read_text())["step"] == 4
    assert os.listdir() == ["model"]
    assert foreign_entries(Path("model")) == []


def test_the_export_of_a_run_may_be_replaced(root: Path, tmp_path: Path) -> None:
    made = runs.write_run(tmp_path / "runs" / "run", root / "model")
    for name in ("export", "export", "export-2"):
        done = export_run(made.folder, made.folder / name)
        assert done.path == made.folder / name
    with pytest.raises(SpecError, match="is inside the run"):
        export_run(made.folder, made.folder / "exports")
    assert sorted(path.name for path in made.folder.iterdir() if path.is_dir()) == [
        "checkpoints", "export", "export-2",
    ]  # fmt: skip


def test_a_marker_without_files_is_not_an_export(storage: Path) -> None:
    Path("model").mkdir()
    Path("model", MARKER).write_text('{"files": {}}')
    assert MARKER in refusal(storage, "model")
    Path("model", MARKER).write_text("mine")
    assert MARKER in refusal(storage, "model")


def test_an_empty_directory_keeps_its_permissions(storage: Path) -> None:
    Path("model").mkdir(mode=0o2770)
    Path("model").chmod(0o2770)
    export_run(storage / "runs" / "case", Path("model"))
    assert Path("model").stat().st_mode & 0o7777 == 0o2770


def test_a_symbolic_link_is_followed(storage: Path) -> None:
    Path("real").mkdir()
    Path("link").symlink_to("real")
    export_run(storage / "runs" / "case", Path("link"))
    assert Path("link").is_symlink()
    assert Path("real/model.safetensors").is_file()
    Path("run").symlink_to(storage / "runs" / "case")
    assert "is the run" in refusal(storage, "run")


def test_a_directory_of_the_user_with_a_name_like_a_draft_is_kept(storage: Path) -> None:
    for name in (".model.partial", ".orchestrator-export-mine", "model.partial"):
        Path(name).mkdir()
        Path(name, "notes.txt").write_text("mine")
    before = contents(Path.cwd())
    export_run(storage / "runs" / "case", Path("model"))
    after = contents(Path.cwd())
    assert {name: after[name] for name in before} == before


def test_a_file_that_is_added_during_the_export_is_kept(storage: Path) -> None:
    export_run(storage / "runs" / "case", Path("model"))
    with open_draft(Path.cwd() / "model") as draft:
        (draft.directory / "config.json").write_text("{}")
        Path("model/notes.txt").write_text("mine")
        with pytest.raises(SpecError, match=r"notes\.txt\), added while this one was written"):
            draft.publish({})
    assert Path("model/notes.txt").read_text() == "mine"
    assert Path("model/model.safetensors").is_file()
    assert os.listdir() == ["model"]


def test_a_failed_export_leaves_no_draft_and_keeps_the_earlier_export(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    run = storage / "runs" / "case"
    export_run(run, Path("model"), step=2)
    before = contents(Path.cwd())

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("orchestrator.export.weight_files.save_file", full)
    for target in ("model", "a/b/c"):
        with pytest.raises(TrainingError, match=r"\(.*No space left.*free some space") as caught:
            export_run(run, Path(target))
        assert caught.value.exit_code == 4
        assert contents(Path.cwd()) == before
        assert os.listdir() == ["model"]


def test_free_space_is_checked_before_writing(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = destination.shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=200_000))
    with pytest.raises(TrainingError, match=r"needs 0\.\d MiB, and .* has 0\.2 MiB free; free some space"):
        export_run(storage / "runs" / "case", Path("model"))
    assert os.listdir() == []


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("kib", [100, 200, 500])
def test_a_full_disk_is_one_error(storage: Path, kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", "small"]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted")
    try:
        assert "is a mount point" in refusal(storage, "small")

        for is_checked in (True, False):
            if not is_checked:  # a quota or another writer makes it fail in the middle
                monkeypatch.setattr("orchestrator.export.weight_files.require_free_space", lambda *_: None)
            with pytest.raises(TrainingError) as caught:
                export_run(storage / "runs" / "case", Path("small/model"))
            assert len(caught.value.problems) == 1
            assert "free some space" in str(caught.value)
            assert os.listdir("small") == []
    finally:
        subprocess.run(["umount", "small"], check=True)


_HANGS = """
import sys, time
from pathlib import Path
from orchestrator.export.destination import open_draft
with open_draft(Path(sys.argv[1])) as draft:
    (draft.directory / "config.json").write_text("{}")
    if draft.target.exists():
        draft.target.rename(draft.directory.with_name("old"))
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.process
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_the_draft_of_a_killed_export_is_removed(tmp_path: Path, signal_number: signal.Signals) -> None:
    target = tmp_path / "model"
    if signal_number == signal.SIGKILL:  # between the two renames
        target.mkdir()
        (target / "config.json").write_text("{}")
    command = [sys.executable, "-c", _HANGS, str(target)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=runs.ROOT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with open_draft(tmp_path / "other"):  # the draft of a live process stays
            assert len(list(tmp_path.glob(".orchestrator-export-*"))) == 2
        process.send_signal(signal_number)
    if signal_number == signal.SIGKILL:
        with open_draft(tmp_path / "other"):
            assert len(list(tmp_path.glob(".orchestrator-export-*"))) == 1
        assert (target / "config.json").is_file()
    assert list(tmp_path.glob(".orchestrator-export-*")) == []


def test_a_finished_run_exports_to_another_directory_if_needed(root: Path, tmp_path: Path) -> None:
    made = runs.write_run(tmp_path / "runs" / "run", root / "model", steps=(2,))
    assert free_target(made.folder, made.job) == (made.folder / "export", None)
    for taken, expected in (("export", "export-2"), ("export-2", "export-3")):
        (made.folder / taken).mkdir()
        (made.folder / taken / "notes.txt").write_text("mine")

        target, reason = free_target(made.folder, made.job)
        assert target == made.folder / expected
        assert "export is not empty and contains files that are not part of an export" in str(reason)
        assert "(1: notes.txt)" in str(reason)


def test_the_error_for_a_missing_step_names_those_that_exist(storage: Path) -> None:
    with pytest.raises(SpecError, match=r"--step 3: .* has no checkpoint of that step; use one of 2, 4"):
        export_run(storage / "runs" / "case", Path("model"), step=3)
    assert os.listdir() == []
