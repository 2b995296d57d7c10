"""Evaluation sets of a job: one list, several by name, or a share of the training rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.checks.folders import with_absolute_paths
from orchestrator.config.eval_sets import all_sources, eval_sets, eval_sources
from orchestrator.config.loader import dump, parse
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError

JOB: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "rows.jsonl"}]}}


def job_of(evaluation: Any) -> JobSpec:
    return parse(yaml.safe_dump({**JOB, "eval": evaluation}, sort_keys=False))


def problems_of(evaluation: Any) -> list[str]:
    with pytest.raises(SpecError) as problem:
        job_of(evaluation)
    return [sentence.partition(": ")[2] for sentence in problem.value.problems]


@pytest.mark.parametrize(
    ("data", "sets", "fields"),
    [
        ([{"path": "a"}, {"path": "b"}], {"eval": ["a", "b"]}, ["eval.data.0", "eval.data.1"]),
        ({"path": "a", "sample": 3}, {"eval": ["a"]}, ["eval.data"]),
        (
            {"code": [{"path": "a"}, {"path": "b"}], "chat": {"path": "c"}},
            {"code": ["a", "b"], "chat": ["c"]},
            ["eval.data.code.0", "eval.data.code.1", "eval.data.chat"],
        ),
        ({"path": [{"path": "a"}]}, {"path": ["a"]}, ["eval.data.path.0"]),
    ],
)
def test_sets_are_written_as_a_list_or_by_name(
    data: Any, sets: dict[str, list[str]], fields: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of({"data": data})
    assert {name: [source.path for source in part] for name, part in eval_sets(job).items()} == sets
    assert [field for field, _ in eval_sources(job)] == fields
    assert [field for field, _ in all_sources(job)] == ["data.train.0", *fields]
    assert parse(dump(job)) == job
    (tmp_path / "a").write_text("")
    monkeypatch.chdir(tmp_path)
    absolute = with_absolute_paths(job)
    assert eval_sources(absolute)[0][1].path == str(tmp_path / "a")
    assert parse(dump(absolute)) == absolute


def test_a_share_needs_no_data_and_may_have_some() -> None:
    assert eval_sets(job_of({"share": 0.02})) == {}
    job = job_of({"share": 0.5, "data": [{"path": "a"}], "every_steps": 3})
    assert job.eval is not None
    assert (job.eval.share, list(eval_sets(job))) == (0.5, ["eval"])
    assert parse(dump(job)) == job
    assert eval_sources(parse(yaml.safe_dump(JOB))) == ()


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"every_steps": 3}, "eval has no rows to evaluate; set eval.share: 0.02"),
        ({"data": {}}, "eval has no rows to evaluate; set eval.share: 0.02"),
        ({"share": 0}, "eval.share=0 is out of range; it must be above 0"),
        ({"share": 200}, "eval.share=200 is out of range; it must be below 1"),
        ({"data": []}, "eval.data has 0 elements; give at least 1"),
        ({"data": "a.jsonl"}, 'eval.data="a.jsonl" has the wrong type; it must be a list'),
        ({"data": {"code": "a.jsonl"}}, 'eval.data.code="a.jsonl" has the wrong type; it must be a list'),
        ({"data": {"code": []}}, "eval.data.code has 0 elements; give at least 1"),
        (
            {"data": {"code": [{"pth": "a"}]}},
            "eval.data.code.0.pth is not a field of a job; did you mean path",
        ),
        ({"data": [{"path": "a", "weight": -1}]}, "eval.data.0.weight=-1 is out of range"),
        ({"data": {"a b": [{"path": "a"}]}}, "eval.data=a b is not a name of an evaluation set"),
        (
            {"share": 0.1, "data": {"held_out": [{"path": "a"}]}},
            "eval.data=held_out is the name of the rows that eval.share=0.1 holds out; use another name",
        ),
    ],
)
def test_each_mistake_is_one_error_of_its_field(evaluation: Any, words: str) -> None:
    problems = [problem for problem in problems_of(evaluation) if "path is required" not in problem]
    assert len(problems) == 1, problems
    assert problems[0].startswith(words)
