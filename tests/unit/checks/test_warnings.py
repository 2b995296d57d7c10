"""Every unusual value gives a warning, and no bundled job gives any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bench import sweep
from orchestrator.checks.warnings import job_warnings, local_warnings
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from tests.conftest import ROOT

JOBS = ROOT / "launch" / "jobs"
HELD_OUT = {"data": [{"path": "builtin/alpaca_sample_eval"}]}


def warned(**sections: Any) -> list[str]:
    """Return the fields with a warning of a quickstart job with replaced sections."""
    values = {
        "name": "job",
        "model": {"path": "builtin/tiny-llama", "weights": "random"},
        "data": {"train": [{"path": "builtin/alpaca_sample"}]},
        **sections,
    }
    return [fields[0] for fields, _ in job_warnings(JobSpec.model_validate_json(json.dumps(values)))]


@pytest.mark.parametrize("file", [*JOBS.glob("*.yaml"), *JOBS.glob("published/xtuner/*.yaml")], ids=str)
def test_jobs_that_ship_give_no_warning(file: Path) -> None:
    assert list(job_warnings(loader.load(file))) == []


@pytest.mark.parametrize("file", JOBS.glob("published/*.yaml"), ids=str)
def test_sweeps_that_ship_give_no_warning(file: Path) -> None:
    assert [problem for cell in sweep.load(file).cells for problem in job_warnings(cell.job)] == []


LORA = {"type": "lora"}
WIDE = {"type": "lora", "rank": 4096, "alpha": 8192.0}
LLAMA = {"path": "meta-llama/Llama-2-7b-hf"}


@pytest.mark.parametrize(
    ("field", "custom", "odd"),
    [
        ("optim.lr", {"optim": {"lr": 3e-3}}, {"optim": {"lr": 50.0}}),
        ("optim.lr", {"optim": {"lr": 1e-4}, "model": LLAMA}, {"optim": {"lr": 2e-3}, "model": LLAMA}),
        ("optim.lr", {"optim": {"lr": 2e-3}, "method": LORA}, {"optim": {"lr": 0.1}, "method": LORA}),
        ("optim.lr", {"optim": {"lr": 1e-6}}, {"optim": {"lr": 2e-12}}),
        (
            "optim.muon_lr",
            {"optim": {"optimizer": "muon", "muon_lr": 0.02}},
            {"optim": {"optimizer": "muon", "muon_lr": 20.0}},
        ),
        ("optim.warmup_ratio", {"optim": {"warmup_ratio": 0.2}}, {"optim": {"warmup_ratio": 1.0}}),
        ("optim.epochs", {"optim": {"epochs": 15.0}}, {"optim": {"epochs": 300.0}}),
        ("optim.weight_decay", {"optim": {"weight_decay": 0.1}}, {"optim": {"weight_decay": 1.0}}),
        ("optim.max_grad_norm", {"optim": {"max_grad_norm": 0.0}}, {"optim": {"max_grad_norm": 1e6}}),
        ("optim.betas", {"optim": {"betas": [0.9, 0.95]}}, {"optim": {"betas": [0.999, 0.9]}}),
        ("method.rank", {"method": {**LORA, "rank": 64}}, {"method": WIDE}),
        ("method.alpha", {"method": {**LORA, "rank": 64}}, {"method": {**LORA, "alpha": 1024.0}}),
        ("method.alpha", {"method": {**LORA, "alpha": 8.0}}, {"method": {**LORA, "alpha": 0.01}}),
        ("method.dropout", {"method": {**LORA, "dropout": 0.1}}, {"method": {**LORA, "dropout": 0.9}}),
        (
            "data.max_length",
            {"data": {"train": [{"path": "builtin/alpaca_sample"}], "max_length": 128}},
            {"data": {"train": [{"path": "builtin/alpaca_sample"}], "max_length": 16}},
        ),
        (
            "optim.global_batch_size",
            {"optim": {"global_batch_size": 1024}},
            {"optim": {"global_batch_size": 4_000_000}},
        ),
        (
            "checkpoint.every_steps",
            {"optim": {"max_steps": 5000}, "checkpoint": {"every_steps": 500}},
            {"optim": {"max_steps": 5000}},
        ),
        (
            "checkpoint.every_steps",
            {"optim": {"max_steps": 50}, "checkpoint": {"every_steps": 50}},
            {"optim": {"max_steps": 50}, "checkpoint": {"every_steps": 500}},
        ),
        (
            "eval.every_steps",
            {"optim": {"max_steps": 50}, "eval": {**HELD_OUT, "every_steps": 10}},
            {"optim": {"max_steps": 50}, "eval": {**HELD_OUT, "every_steps": 100}},
        ),
    ],
)  # fmt: skip
def test_a_value_out_of_all_custom_is_warned_of(
    field: str, custom: dict[str, Any], odd: dict[str, Any]
) -> None:
    assert warned(**custom) == []
    assert warned(**odd) == [field]


def _eval(path: str, **more: Any) -> dict[str, Any]:
    return {"data": [{"path": "builtin/alpaca_sample_eval"}, {"path": path, **more}]}


def test_held_out_data_that_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    (tmp_path / "other.jsonl").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data" / "rows.jsonl")
    for training, held_out, same in (
        ("data/rows.jsonl", "data/rows.jsonl", True),
        ("data/rows.jsonl", "./data/../data/rows.jsonl", True),
        ("data/rows.jsonl", "link.jsonl", True),
        ("link.jsonl", str(tmp_path / "data" / "rows.jsonl"), True),
        ("data", "data/rows.jsonl", True),
        ("data/rows.jsonl", "data", True),
        ("data/rows.jsonl", "other.jsonl", False),
        ("org/data", "org/data", True),
        ("org/data", "org/other", False),
    ):
        data = {"train": [{"path": "builtin/alpaca_sample"}, {"path": training}]}
        found = warned(data=data, eval=_eval(held_out))
        assert found == (["eval.data.1.path"] if same else []), (training, held_out)
    sets = {"same": {"path": "data/rows.jsonl"}, "other": [{"path": "other.jsonl"}]}
    assert warned(data={"train": [{"path": "data"}]}, eval={"data": sets}) == ["eval.data.same.path"]
    splits = {"train": [{"path": "org/data", "split": "train"}]}
    assert warned(data=splits, eval=_eval("org/data", split="test")) == []
    assert warned(data=splits, eval=_eval("org/data", split="train")) == ["eval.data.1.path"]


def test_a_name_of_the_hub_that_looks_like_a_path_with_a_slip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama-7b").mkdir(parents=True)
    for path, near in (
        ("models/llama-7", "did you mean the local path models/llama-7b?"),
        ("models/qwen", "the local folder models has no qwen"),
        ("modles", "did you mean the local path models?"),
        ("meta-llama/Llama-2-7b-hf", None),
        ("gpt2", None),
    ):
        job = JobSpec.model_validate_json(
            json.dumps({"name": "j", "model": {"path": path}, "data": {"train": [{"path": "s3://b/d"}]}})
        )
        sentences = [sentence for fields, sentence in job_warnings(job) if fields == ("model.path",)]
        assert len(sentences) == (near is not None)
        assert (near or "") in "".join(sentences)
    assert warned(data={"train": [{"path": "models/rows"}]}) == ["data.train.0.path"]


def test_documents_longer_than_the_model_knows_are_warned_of_before_a_run(tmp_path: Path) -> None:
    for config, limit in (
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 1024}, "max_position_embeddings": 8}, 1024),
        ({"max_position_embeddings": "x"}, None),
        ([], None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for max_length in (limit or 4096, (limit or 4096) + 1):
            values = {"train": [{"path": "builtin/alpaca_sample"}], "max_length": max_length}
            model = {"path": str(tmp_path), "weights": "random"}
            job = JobSpec.model_validate_json(json.dumps({"name": "j", "model": model, "data": values}))
            assert list(job_warnings(job)) == []
            found = [sentence for _, sentence in local_warnings(job)]
            assert len(found) == (limit is not None and max_length > limit)
            assert all(f"is above max_position_embeddings={limit}" in sentence for sentence in found)


def test_variables_that_are_taken_from_here_and_not_set_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IS_SET", "secret")
    monkeypatch.delenv("IS_NOT_SET", raising=False)
    values = {
        "name": "job",
        "model": {"path": "builtin/tiny-llama", "weights": "random"},
        "data": {"train": [{"path": "builtin/alpaca_sample"}]},
        "run": {"env": {"IS_SET": None, "IS_NOT_SET": None, "WRITTEN": "value"}},
    }
    job = JobSpec.model_validate_json(json.dumps(values))
    assert list(job_warnings(job)) == []
    ((fields, sentence),) = local_warnings(job)
    assert fields == ("run.env.IS_NOT_SET",)
    assert "export it before" in sentence
