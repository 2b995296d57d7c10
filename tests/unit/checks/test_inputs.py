"""Missing files, models and adapters of a job are found before workers start, each with its line number."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.checks.inputs import input_problems, require_inputs
from orchestrator.checks.job import all_problems
from orchestrator.config import loader
from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError

ROW = '{"instruction": "a", "output": "b"}\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with a file of rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW)
    return tmp_path


def job(model: Any = None, **data: Any) -> JobSpec:
    return JobSpec.model_validate_json(
        json.dumps(
            {
                "name": "job",
                "model": model or {"path": "builtin/tiny-llama", "weights": "random"},
                "data": {"train": [{"path": "rows.jsonl", **data}]},
            }
        )
    )


def found(job: JobSpec) -> list[str]:
    return [sentence for _, sentence in input_problems(job)]


# Data


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "./rows.jsonl", "s3://bucket/rows", "org/data", "builtin/alpaca_sample", "folder"]
)
def test_data_that_are_there_or_elsewhere_are_left_alone(here: Path, path: str) -> None:
    (here / "folder").mkdir()
    (here / "folder" / "a.jsonl").write_text(ROW)
    assert found(job(path=path)) == []
    (here / "rows.jsonl").rename(here / "away")
    assert bool(found(job(path=path))) is path.endswith("rows.jsonl")


def _folder(here: Path) -> None:
    (here / "folder").mkdir()


def _splits(here: Path) -> None:
    _folder(here)
    for name in ("train.jsonl", "test.jsonl"):
        (here / "folder" / name).write_text(ROW)


def _saved(here: Path) -> None:
    _folder(here)
    (here / "folder" / "state.json").write_text('{"_data_files": [{"filename": "lost.arrow"}]}')


@pytest.mark.parametrize(
    ("prepare", "data", "words"),
    [
        (None, {"path": "absent.json"}, "absent.json is not there; check the path, which counts from"),
        (None, {"path": "builtin/none"}, "builtin/none is not there"),
        (None, {"path": "no/such/rows.jsonl"}, "no/such/rows.jsonl is not there"),
        (None, {"path": "rows.jsonl", "split": "train"}, "is one file and has no splits"),
        (None, {"path": "/dev/null"}, "is not a regular file"),
        (_folder, {"path": "folder"}, "has no file with rows"),
        (_splits, {"path": "folder"}, "holds several splits (test, train)"),
        (_splits, {"path": "folder", "split": "dev"}, "has no file of split=dev"),
        (_saved, {"path": "folder"}, "lost.arrow is not there"),
    ],
)
def test_data_that_train_would_not_find(
    here: Path, prepare: Callable[[Path], None] | None, data: dict[str, Any], words: str
) -> None:
    if prepare:
        prepare(here)
    (sentence,) = found(job(**data))
    assert words in sentence


# Model and adapter


@pytest.fixture
def model(here: Path) -> Path:
    folder = here / "model"
    shutil.copytree(resolve("builtin/tiny-llama"), folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def _without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            for file in folder.glob(name):
                file.unlink()

    return remove


def _sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without("config.json"), "model.path=model has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json that is not valid JSON"),
        (_without("tokenizer*"), "model.path=model has no tokenizer"),
        (_without("model.safetensors"), "model.path=model has no weights (model.safetensors, pytorch_model."),
        (_sharded, "lacks 1 of the 2 weight files in model.safetensors.index.json (model-2.safe"),
        (shutil.rmtree, None),  # without the folder, the path may be a hub name
    ],
)
def test_a_model_folder_that_train_could_not_load(
    model: Path, damage: Callable[[Path], None], words: str | None
) -> None:
    wanted = job({"path": "model"})
    assert found(wanted) == []
    damage(model)
    sentences = found(wanted)
    assert len(sentences) == (words is not None)
    assert (words or "") in "".join(sentences)


def test_random_weights_need_no_files_of_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert found(job({"path": "model", "weights": "random"})) == []


def test_a_run_that_goes_on_from_a_checkpoint_needs_no_weights_of_its_model(here: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert len(found(job({"path": "model"}))) == 1
    checkpoint = here / "runs" / "job" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    assert len(found(job({"path": "model"}))) == 1
    (checkpoint / "manifest.json").write_text("{}")
    assert found(job({"path": "model"})) == []


@pytest.mark.parametrize(
    ("path", "there"),
    [("./modle", False), ("models/a/b", False), ("org/model", True), ("gpt2", True), ("~/none", False),
     ("/none", False), ("org/model/", False), ("builtin/none", False), ("../none", False)],
)  # fmt: skip
def test_a_model_that_is_not_here_can_be_on_the_hub_if_its_name_can(path: str, there: bool) -> None:
    sentences = found(job({"path": path}))
    assert (sentences == []) is there
    assert there or f"model.path={path} does not exist" in sentences[0]


def test_an_adapter_needs_its_two_files(here: Path) -> None:
    wanted = job().model_copy(
        update={"method": job().method.model_copy(update={"type": "lora", "adapter": "adapter"})}
    )
    assert "method.adapter=adapter is not an existing folder" in found(wanted)[0]
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    (sentence,) = found(wanted)
    assert sentence.startswith("method.adapter=adapter has no adapter_model.safetensors; use the folder of")
    (here / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert found(wanted) == []


# All errors at once


def test_files_and_fields_are_refused_together_each_with_its_line(here: Path) -> None:
    (here / "in-the-way").write_text("")
    text = """\
name: job
model:
  path: ./modle
data:
  train:
    - path: rows.jsonl
    - path: absent.jsonl
  max_length: 2
optim: {lrr: 1}
eval:
  data: [{path: gone.json}]
checkpoint:
  storage: in-the-way/runs
"""
    (here / "job.yaml").write_text(text)
    with pytest.raises(SpecError) as problem:
        loader.load(here / "job.yaml", (), all_problems)
    places = [sentence.split(": ")[0] for sentence in problem.value.problems]
    assert sorted(places) == sorted(f"job.yaml:{line}" for line in (3, 7, 8, 9, 11, 13))
    with pytest.raises(SpecError) as problem:  # an invalid section is not checked for missing inputs as well
        loader.load(here / "job.yaml", ["data.train=5"], all_problems)
    assert not any("absent.jsonl" in sentence for sentence in problem.value.problems)


def test_what_validate_finds_is_what_train_refuses(here: Path) -> None:
    wanted = yaml.safe_load(loader.dump(job(path="absent.json")))
    spec = loader.parse(yaml.safe_dump(wanted))
    with pytest.raises(SpecError) as problem:
        require_inputs(spec)
    assert list(problem.value.problems) == found(spec)


def test_heads_that_cannot_be_shared_and_packages_that_are_not_installed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = loader.parse(
        "name: job\nmodel: {path: model}\ndata: {train: [{path: rows.jsonl}], max_length: 510}\n"
        "parallel: {workers: 3, sequence_parallel_size: 3}\n"
        "optim: {optimizer: paged_adamw, global_batch_size: 3}\nmetrics: {trackers: [wandb]}\n"
    )
    problems = dict(all_problems(spec))
    assert set(problems) == {
        ("parallel.sequence_parallel_size",),
        ("optim.optimizer",),
        ("metrics.trackers",),
    }
    assert "sequence_parallel_size=3" in problems["parallel.sequence_parallel_size",]
    assert "requires bitsandbytes, which is not installed" in problems["optim.optimizer",]
    assert "wandb is not installed" in problems["metrics.trackers",]
