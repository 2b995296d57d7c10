"""An interrupted and resumed run equals an uninterrupted one; a damaged checkpoint is rejected."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import checkpoint_dir, checkpointer
from orchestrator.checkpoint.manifest import MANIFEST
from orchestrator.checkpoint.retention import Retention
from orchestrator.errors import TrainingError
from orchestrator.export.export import fp32_weights
from tests.invariant import material
from tests.invariant.group import Outcome, assert_close, run_group
from tests.invariant.material import POLICIES, job
from tests.support.checkpoints import flip_a_bit, write_checkpoint

pytestmark = pytest.mark.distributed

TENSORS = "tensors-00000.safetensors"
BF16 = "zero0-bf16"  # DeepSpeed uses a separate optimizer class for bf16 without ZeRO
NAMES = [*(policy for policy in POLICIES if policy != "zero1-optimizer-cpu"), BF16]
DAMAGES = {
    "flipped": "is damaged: bytes",
    "truncated": "is damaged: the table of digests",
    "missing": "a file of the checkpoint, is missing",
    "manifest-flipped": "manifest.json cannot be read (it is not what was written)",
    "manifest-missing": "manifest.json cannot be read (No such file or directory)",
    "manifest-empty": "manifest.json cannot be read (it is not what was written)",
    "manifest-old": "manifest.json cannot be read (it is of format 1, DeepSpeed's files of each rank",
}
FAILURES = {
    "folder-is-a-file": "Not a directory",
    "full-on-rank-0": "rank 0: [Errno 28] No space left on device",
    "full-on-rank-1": "rank 1: [Errno 28] No space left on device",
    "short-write": "rank 1: [Errno 27] File too large",
}


@dataclass(frozen=True)
class Runs:
    """Outcomes of the process groups of this module, and their folder."""

    home: Path
    outcomes: dict[str, Outcome]

    def saved(self, policy: str) -> Path:
        return self.home / policy / "step-00000003"


def task_of(name: str, home: Path, policy: str, workers: int = 2, **more: Any) -> dict[str, Any]:
    """Return a task of six steps over 2.4 epochs of 20 packs, with dropout; step 4 is in the second epoch."""
    dtype = "bf16" if policy == BF16 else "fp32"
    document = job(
        home / "model", workers, POLICIES[policy.removesuffix("-bf16")], epochs=2.4, micro_batch_size=2,
        model={"gradient_checkpointing": policy == "zero3"}, checkpoint={"every_steps": 3},
    )  # fmt: skip
    data = str(home / "documents")
    task = {
        "name": name,
        "action": "train",
        "job": document,
        "data": data,
        "parameters": True,
        "dtype": dtype,
    }
    return {**task, **more}


def damaged(saved: Path, damage: str) -> Path:
    """Return a damaged copy of a checkpoint."""
    copy = saved.with_name(damage)
    shutil.copytree(saved, copy)
    file, manifest = copy / TENSORS, copy / MANIFEST
    if damage == "flipped":
        flip_a_bit(copy, "optimizer.model.embed_tokens.weight.exp_avg")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest-flipped":
        content = manifest.read_bytes()
        manifest.write_bytes(content.replace(b'"step":3', b'"step":1'))
    elif damage == "manifest-old":
        manifest.write_text('{"step": 3, "world_size": 2, "zero_stage": 2, "files": {}}', encoding="utf-8")
    elif damage == "manifest-missing":
        manifest.unlink()
    elif damage == "manifest-empty":
        manifest.write_text("{}", encoding="utf-8")
    return copy


def _fallbacks(saved: Path) -> list[Path]:
    """Return a whole checkpoint and two newer ones that are damaged, oldest first."""
    folder = saved.parent / "fallbacks"
    older = shutil.copytree(saved, folder / "step-00000003")
    newer = [shutil.copytree(saved, folder / f"step-{step:08d}") for step in (4, 5)]
    flip_a_bit(newer[0], "model.lm_head.weight")
    (newer[1] / MANIFEST).unlink()
    return [older, *newer]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    home = tmp_path_factory.mktemp("checkpoints")
    material.write_model(home / "model", attention_dropout=0.1)
    material.write_documents(home / "documents", 35, seed=3)
    (home / "file").write_text("not a folder", encoding="utf-8")
    cases = [
        {"name": "good", "folder": str(home / "saves")},
        {"name": "folder-is-a-file", "folder": str(home / "file" / "checkpoints")},
        {"name": "full-on-rank-0", "folder": str(home / "saves"), "full_on_rank": 0},
        {"name": "full-on-rank-1", "folder": str(home / "saves"), "full_on_rank": 1},
        {"name": "short-write", "folder": str(home / "saves"), "file_limit_bytes": 100_000},
        {"name": "forbidden", "folder": str(home / "saves"), "forbidden": True},
        {"name": "again", "folder": str(home / "saves")},
    ]
    tasks = [task_of(f"whole {policy}", home, policy) for policy in NAMES]
    tasks += [
        task_of(f"begun {policy}", home, policy, save_to=str(home / policy), end_at=3) for policy in NAMES
    ]
    tasks += [
        {**task_of(f"saves {policy}", home, policy), "action": "fail_to_save", "cases": cases}
        for policy in ("zero3",)
    ]
    outcomes = run_group(home / "before", 2, tasks)

    runs = Runs(home, outcomes)
    zero2 = runs.saved("zero2")
    refused = [damaged(zero2, damage) for damage in DAMAGES]
    tasks = [task_of(f"resumed {policy}", home, policy, resume=str(runs.saved(policy))) for policy in NAMES]
    tasks.append(task_of("fallen back", home, "zero3", fall_back=[str(path) for path in _fallbacks(zero2)]))
    refuse = {"action": "refuse_to_load", "checkpoints": [str(path) for path in refused]}
    tasks.append({**task_of("refused", home, "zero2"), **refuse})
    outcomes |= run_group(home / "after", 2, tasks)
    return runs


@pytest.mark.parametrize("policy", NAMES)
def test_a_resumed_run_is_the_undisturbed_one(policy: str, runs: Runs) -> None:
    whole, begun, resumed = (runs.outcomes[f"{part} {policy}"] for part in ("whole", "begun", "resumed"))
    assert [step["step"] for step in begun.answer["steps"]] == [1, 2, 3]
    assert resumed.answer["start"] == 3
    together = begun.answer["steps"] + resumed.answer["steps"]
    assert len(whole.answer["steps"]) == 6
    for step, other in zip(together, whole.answer["steps"], strict=True):
        for figure in ("step", "epoch", "tokens", "trained_tokens", "skipped"):
            assert step[figure] == other[figure]
        for figure in ("loss", "gradient_norm", "learning_rate"):
            assert step[figure] == pytest.approx(other[figure], rel=1e-6)
    assert_close(resumed.kind("parameter"), whole.kind("parameter"), 1e-6)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(begun.kind("parameter"), whole.kind("parameter"), 1e-6)


def test_the_interruption_lies_in_the_middle_of_an_epoch(runs: Runs) -> None:
    epochs = [step["epoch"] for step in runs.outcomes["whole zero2"].answer["steps"]]
    assert epochs == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.4])


def test_files_of_a_bf16_run_hold_its_fp32_weights(runs: Runs) -> None:
    weights = {name: weight.contiguous() for name, weight in fp32_weights(runs.saved(BF16)).items()}
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}
    found = {name: weight.numpy() for name, weight in rounded.items()}
    assert_close(found, runs.outcomes[f"begun {BF16}"].kind("parameter"), 0.0)
    assert all((weights[name] != rounded[name]).any() for name in weights)


@pytest.mark.parametrize("policy", [name for name in NAMES if name != BF16])
def test_files_hold_the_parameters_of_the_engine(policy: str, runs: Runs) -> None:
    weights = fp32_weights(runs.saved(policy))
    found = {name: weight.contiguous().detach().numpy() for name, weight in weights.items()}
    assert_close(found, runs.outcomes[f"begun {policy}"].kind("parameter"), 0.0)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_checkpoint_is_refused_on_every_rank(damage: str, runs: Runs) -> None:
    for answer in runs.outcomes["refused"].ranks:
        (problem,) = answer["problems"][damage]
        assert DAMAGES[damage] in problem
        assert str(runs.saved("zero2").with_name(damage)) in problem
        assert "; remove " in problem


def test_the_newest_whole_checkpoint_is_used_and_damaged_ones_are_set_aside(runs: Runs) -> None:
    resumed, whole = runs.outcomes["fallen back"].answer, runs.outcomes["whole zero3"].answer
    assert resumed["start"] == 3
    first, second = resumed["notes"]
    assert "step-00000005/manifest.json cannot be read" in first
    assert re.search(r"step-00000004/tensors-0000[01]\.safetensors is damaged: bytes", second)
    assert "(model.lm_head.weight)" in second
    for note, step in ((first, 5), (second, 4)):
        assert note.endswith(
            f"; resuming from step 3 instead, and it is renamed to step-0000000{step}.damaged"
        )
    folder = runs.home / "zero2" / "fallbacks"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000003", "step-00000004.damaged", "step-00000005.damaged",
    ]  # fmt: skip
    for step, other in zip(resumed["steps"], whole["steps"][3:], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_verify_names_the_file(damage: str, runs: Runs) -> None:
    assert checkpoint_dir.verify(runs.saved("zero2")) == []
    (problem,) = checkpoint_dir.verify(runs.saved("zero2").with_name(damage))
    assert TENSORS in problem
    assert ("optimizer.model.embed_tokens.weight.exp_avg" in problem) == (damage == "flipped")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_save_fails_on_every_rank(failure: str, runs: Runs) -> None:
    for answer in runs.outcomes["saves zero3"].ranks:
        said = answer["errors"][failure]
        assert said.startswith("TrainingError: training error: the checkpoint of step ")
        assert "cannot be written to" in said
        assert FAILURES[failure] in said


def test_a_save_that_is_not_permitted_publishes_nothing(runs: Runs) -> None:
    first, second = (answer["errors"]["forbidden"] for answer in runs.outcomes["saves zero3"].ranks)
    assert first == "PermissionError: a newer attempt has taken over"
    assert second.startswith(
        "RuntimeError: rank 0 was not permitted to publish step-00000006.attempt-1.partial"
    )


def test_failed_saves_leave_the_others_intact(runs: Runs) -> None:
    for answer in runs.outcomes["saves zero3"].ranks:
        assert [name for name, error in answer["errors"].items() if error is None] == ["good", "again"]
    folder = runs.home / "saves"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000007"]
    assert [checkpoint_dir.verify(saved) for saved in checkpoint_dir.published(folder)] == [[], []]


def test_a_storage_that_not_all_ranks_see_is_refused(tmp_path: Path) -> None:
    assert checkpointer._require_shared(tmp_path) is None
    assert "set checkpoint.storage to a directory" in (checkpointer._require_shared(tmp_path / "no") or "")


def publish(folder: Path, name: str) -> Path:
    return write_checkpoint(folder, 999, {"a": torch.ones(2)}).rename(folder / name)


def test_only_complete_checkpoints_are_found_oldest_first(tmp_path: Path) -> None:
    newest, oldest, middle = (publish(tmp_path, f"step-{step:08d}") for step in (100, 2, 30))
    for name in ("step-00000200.attempt-2.partial", "step-00000300.old.partial", "step-best", "other"):
        publish(tmp_path, name)
    (tmp_path / "step-00000400").mkdir()  # no manifest
    assert checkpoint_dir.published(tmp_path) == [oldest, middle, newest]
    assert [checkpoint_dir.step_of(path) for path in checkpoint_dir.published(tmp_path)] == [2, 30, 100]
    assert checkpoint_dir.published(tmp_path / "nothing") == []


def test_clean_keeps_the_newest_and_removes_drafts(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        publish(tmp_path, f"step-{step:08d}")
    publish(tmp_path, "step-00000004.attempt-1.partial")
    checkpoint_dir.clean(tmp_path, Retention(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("content", ["", "[]", "3", '{"step": 1}'])
def test_an_unreadable_manifest_names_the_remedy(content: str, tmp_path: Path) -> None:
    saved = publish(tmp_path, "step-00000001")
    (saved / MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(TrainingError, match=r"manifest\.json .*; remove .* to use the checkpoint before"):
        checkpoint_dir.verify(saved)
