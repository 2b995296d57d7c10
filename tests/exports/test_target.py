"""An export replaces an earlier export and nothing else."""

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
from orchestrator.export.destination import MARKER, draft_of, foreign_entries, free_target, target_problem
from orchestrator.export.run_exports import export_run
from tests.exports import runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    runs.write_run(folder / "runs" / "case", runs.write_base(folder / "model"))
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of nothing: the run and its model lie elsewhere."""
    monkeypatch.chdir(tmp_path)
    return home


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file below a folder, with what tells a change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def refusal(home: Path, to: str | Path) -> str:
    """Return why an export to a folder is refused, having changed nothing."""
    before = contents(home), contents(Path.cwd())
    with pytest.raises(SpecError) as caught:
        export_run(home / "runs" / "case", Path(to))
    assert (contents(home), contents(Path.cwd())) == before
    (problem,) = caught.value.problems
    assert problem.startswith(f"--to {Path(to)} ")
    return problem


def test_a_folder_that_holds_something_is_refused(place: Path) -> None:
    Path("shelf").mkdir()
    Path("shelf/notes.txt").write_text("mine")
    assert "holds what no export wrote (1 entry: notes.txt)" in refusal(place, "shelf")


def test_folders_in_use_are_refused(place: Path) -> None:
    case = place / "runs" / "case"
    assert "is the working directory" in refusal(place, ".")
    assert "holds the working directory" in refusal(place, "/")
    assert "the home directory" in refusal(place, Path.home())
    assert "is the run" in refusal(place, case)
    assert "holds the run" in refusal(place, case.parent)
    assert "is the base model" in refusal(place, place / "model")
    assert "holds " in refusal(place, place)
    assert "lies inside the run" in refusal(place, case / "checkpoints")
    assert "lies inside the run" in refusal(place, case / "checkpoints" / "new")
    assert "lies inside the run" in refusal(place, case / "new")
    assert "is a file" in refusal(place, case / "job.yaml")
    assert "which is a file" in refusal(place, case / "job.yaml" / "model")


def test_another_run_is_refused_with_all_that_it_holds(place: Path) -> None:
    other = Path("others/run")
    (other / "checkpoints").mkdir(parents=True)
    (other / "job.yaml").write_text("name: run")
    for name in ("others", "others/run"):
        assert "holds what no export wrote" in refusal(place, name)
    for name in ("others/run/export", "others/run/checkpoints/model"):
        assert "lies inside the run" in refusal(place, name)


def test_the_data_and_the_adapter_of_the_run_are_refused(home: Path, tmp_path: Path) -> None:
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


def test_an_earlier_export_is_replaced_while_nothing_was_added_or_changed(place: Path) -> None:
    run = place / "runs" / "case"
    export_run(run, Path("model"), step=2)
    Path("model/notes.txt").write_text("mine")
    assert "(1 entry: notes.txt)" in refusal(place, "model")
    Path("model/notes.txt").unlink()
    Path("model/mine").mkdir()
    assert "(1 entry: mine)" in refusal(place, "model")
    Path("model/mine").rmdir()
    card = Path("model/README.md").read_text()
    Path("model/README.md").write_text(card + "My own words.")
    assert "README.md (changed since it was exported)" in refusal(place, "model")
    Path("model/README.md").write_text(card)
    done = export_run(run, Path("model"))
    assert done.step == json.loads(Path("model", MARKER).read_text())["step"] == 4
    assert os.listdir() == ["model"]
    assert foreign_entries(Path("model")) == []


def test_a_run_s_own_export_may_be_written_again(home: Path, tmp_path: Path) -> None:
    made = runs.write_run(tmp_path / "runs" / "run", home / "model")
    for name in ("export", "export", "export-2"):
        done = export_run(made.folder, made.folder / name)
        assert done.path == made.folder / name
    with pytest.raises(SpecError, match="lies inside the run"):
        export_run(made.folder, made.folder / "exports")
    assert sorted(path.name for path in made.folder.iterdir() if path.is_dir()) == [
        "checkpoints", "export", "export-2",
    ]  # fmt: skip


def test_a_marker_alone_makes_nothing_an_export(place: Path) -> None:
    Path("model").mkdir()
    Path("model", MARKER).write_text('{"files": {}}')
    assert MARKER in refusal(place, "model")
    Path("model", MARKER).write_text("mine")
    assert MARKER in refusal(place, "model")


def test_an_empty_folder_keeps_its_rights(place: Path) -> None:
    Path("model").mkdir(mode=0o2770)
    Path("model").chmod(0o2770)
    export_run(place / "runs" / "case", Path("model"))
    assert Path("model").stat().st_mode & 0o7777 == 0o2770


def test_a_symbolic_link_stands_for_what_it_points_to(place: Path) -> None:
    Path("real").mkdir()
    Path("link").symlink_to("real")
    export_run(place / "runs" / "case", Path("link"))
    assert Path("link").is_symlink()
    assert Path("real/model.safetensors").is_file()
    Path("run").symlink_to(place / "runs" / "case")
    assert "is the run" in refusal(place, "run")


def test_a_user_s_file_that_looks_like_a_draft_survives(place: Path) -> None:
    for name in (".model.partial", ".orchestrator-export-mine", "model.partial"):
        Path(name).mkdir()
        Path(name, "notes.txt").write_text("mine")
    before = contents(Path.cwd())
    export_run(place / "runs" / "case", Path("model"))
    after = contents(Path.cwd())
    assert {name: after[name] for name in before} == before


def test_a_file_that_comes_while_the_export_is_written_survives(place: Path) -> None:
    export_run(place / "runs" / "case", Path("model"))
    with draft_of(Path.cwd() / "model") as draft:
        (draft.folder / "config.json").write_text("{}")
        Path("model/notes.txt").write_text("mine")
        with pytest.raises(SpecError, match=r"notes\.txt\), which came while this one was written"):
            draft.publish({})
    assert Path("model/notes.txt").read_text() == "mine"
    assert Path("model/model.safetensors").is_file()
    assert os.listdir() == ["model"]


def test_a_failed_export_leaves_nothing_and_the_earlier_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    run = place / "runs" / "case"
    export_run(run, Path("model"), step=2)
    before = contents(Path.cwd())

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("orchestrator.export.weight_files.save_file", full)
    for target in ("model", "a/b/c"):
        with pytest.raises(TrainingError, match=r"cannot be written \(.*No space left.*make room") as caught:
            export_run(run, Path(target))
        assert caught.value.exit_code == 4
        assert contents(Path.cwd()) == before
        assert os.listdir() == ["model"]


def test_room_is_looked_for_before_anything_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = destination.shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=200_000))
    with pytest.raises(TrainingError, match=r"needs 0\.\d MiB, and .* has 0\.2 MiB free; make room"):
        export_run(place / "runs" / "case", Path("model"))
    assert os.listdir() == []


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("kib", [100, 200, 500])
def test_a_disk_that_is_too_small_is_one_sentence(
    place: Path, kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", "small"]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        assert "is a mount point" in refusal(place, "small")
        for knows_room in (True, False):
            if not knows_room:  # as a quota, or another writer, makes it fail only on the way
                monkeypatch.setattr("orchestrator.export.weight_files.require_room", lambda *_: None)
            with pytest.raises(TrainingError) as caught:
                export_run(place / "runs" / "case", Path("small/model"))
            assert len(caught.value.problems) == 1
            assert "make room" in str(caught.value)
            assert os.listdir("small") == []
    finally:
        subprocess.run(["umount", "small"], check=True)


_HANGS = """
import sys, time
from pathlib import Path
from orchestrator.export.destination import draft_of
with draft_of(Path(sys.argv[1])) as draft:
    (draft.folder / "config.json").write_text("{}")
    if draft.target.exists():
        draft.target.rename(draft.folder.with_name("old"))
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.process
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_export_that_was_ended_leaves_no_draft_for_long(tmp_path: Path, how: signal.Signals) -> None:
    target = tmp_path / "model"
    if how == signal.SIGKILL:  # between the two renames
        target.mkdir()
        (target / "config.json").write_text("{}")
    command = [sys.executable, "-c", _HANGS, str(target)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=runs.ROOT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with draft_of(tmp_path / "other"):  # one that lives is left alone
            assert len(list(tmp_path.glob(".orchestrator-export-*"))) == 2
        process.send_signal(how)
    if how == signal.SIGKILL:
        with draft_of(tmp_path / "other"):
            assert len(list(tmp_path.glob(".orchestrator-export-*"))) == 1
        assert (target / "config.json").is_file()
    assert list(tmp_path.glob(".orchestrator-export-*")) == []


def test_a_finished_run_exports_beside_a_folder_that_holds_something(home: Path, tmp_path: Path) -> None:
    made = runs.write_run(tmp_path / "runs" / "run", home / "model", steps=(2,))
    assert free_target(made.folder, made.job) == (made.folder / "export", None)
    for taken, expected in (("export", "export-2"), ("export-2", "export-3")):
        (made.folder / taken).mkdir()
        (made.folder / taken / "notes.txt").write_text("mine")
        found, why = free_target(made.folder, made.job)
        assert found == made.folder / expected
        assert "export is not empty and holds what no export wrote (1 entry: notes.txt)" in str(why)


def test_steps_that_are_not_there_are_refused_with_those_that_are(place: Path) -> None:
    with pytest.raises(SpecError, match=r"--step 3: .* has no checkpoint of that step; there are 2, 4"):
        export_run(place / "runs" / "case", Path("model"), step=3)
    assert os.listdir() == []
