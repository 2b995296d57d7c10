"""Environment variables reach driver and workers, and their values are never written or printed."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from orchestrator.config import loader
from orchestrator.config.paths import ROOT
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.run.run_dir import load_job, open_run, record_job
from orchestrator.train import environment

SECRET = "hunter-2"


def job(**env: str | None) -> JobSpec:
    return loader.parse(
        json.dumps(
            {
                "name": "run",
                "model": {"path": "m"},
                "data": {"train": [{"path": "a/b"}]},
                "run": {"env": env},
            }
        )
    )


@pytest.mark.parametrize(
    ("name", "passed"),
    [
        ("HF_TOKEN", True),
        ("HF_HUB_OFFLINE", True),
        ("HUGGING_FACE_HUB_TOKEN", True),
        ("TRANSFORMERS_OFFLINE", True),
        ("WANDB_API_KEY", True),
        ("MLFLOW_TRACKING_URI", True),
        ("NCCL_SOCKET_IFNAME", True),
        ("TORCH_NCCL_BLOCKING_WAIT", True),
        ("GLOO_SOCKET_IFNAME", True),
        ("http_proxy", True),
        ("HTTPS_PROXY", True),
        ("no_proxy", True),
        ("PATH", False),
        ("HOME", False),
        ("AWS_SECRET_ACCESS_KEY", False),
        ("RAY_AUTH_TOKEN", False),
        ("PYTHONPATH", False),
    ],
)
def test_variables_forwarded_by_default(name: str, passed: bool) -> None:
    assert (environment.forwarded_env({name: "v"}) == {name: "v"}) == passed
    assert environment.forwarded_env({name: "v"}, [name]) == {name: "v"}


def test_apply_job_env_sets_values_and_removes_them_from_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "here")
    monkeypatch.setenv("BOTH", "here")
    monkeypatch.delenv("OF_THE_JOB", raising=False)
    applied = environment.apply_job_env(job(OF_THE_JOB=SECRET, FROM_HERE=None, BOTH="job"))
    assert {name: os.environ[name] for name in applied.run.env} == {
        "OF_THE_JOB": SECRET,
        "FROM_HERE": "here",
        "BOTH": "job",
    }
    assert SECRET.encode() not in pickle.dumps(applied)
    assert environment.apply_job_env(applied) == applied, "applying twice changes nothing"
    monkeypatch.delenv("OF_THE_JOB")


def test_the_error_names_all_unset_variables() -> None:
    with pytest.raises(SpecError) as caught:
        environment.apply_job_env(job(NOT_SET_A=None, NOT_SET_B=None))
    assert [problem.split(" ")[0] for problem in caught.value.problems] == [
        "run.env.NOT_SET_A",
        "run.env.NOT_SET_B",
    ]


def test_no_representation_of_a_job_contains_a_value(tmp_path: Path) -> None:
    spec = job(TOKEN=SECRET)
    record_job(tmp_path, spec)
    written = (tmp_path / "job.yaml").read_text()
    for text in (
        written,
        repr(spec),
        str(spec),
        str(spec.model_dump(mode="json")),
        spec.model_dump_json(),
    ):
        assert "TOKEN" in text
        assert SECRET not in text
    assert load_job(tmp_path).run.env == {"TOKEN": None}


@pytest.mark.parametrize(
    "env", [{"A": 5}, {"A": {"B": SECRET}}, {"A": [SECRET]}, [SECRET], SECRET, {"A B": "x"}]
)
def test_no_error_contains_a_value(env: object) -> None:
    text = f"name: run\nmodel: {{path: m}}\ndata: {{train: [{{path: d}}]}}\nrun: {{env: {json.dumps(env)}}}\n"
    with pytest.raises(SpecError) as caught:
        loader.parse(text)
    assert SECRET not in str(caught.value)
    assert "run.env" in str(caught.value)


@pytest.mark.parametrize(
    "override", ["run.env.A=[{0}, x", "run.env.A=[{0}]", "run.env.A.b={0}", "run={{env: {0}}}"]
)
def test_no_error_of_an_override_contains_a_value(override: str) -> None:
    with pytest.raises(SpecError) as caught:
        loader.parse("name: run\nmodel: {path: m}\ndata: {train: [{path: d}]}\n", [override.format(SECRET)])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"])
def test_variables_read_before_python_starts_are_rejected(name: str) -> None:
    with pytest.raises(SpecError, match="export it before `ray start` on every node"):
        job(**{name: "value"})


def test_changed_variables_do_not_prevent_resuming(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    spec = job(A="1", B="2")
    spec = spec.model_copy(
        update={"checkpoint": spec.checkpoint.model_copy(update={"storage": str(tmp_path)})}
    )
    open_run(spec)
    record_job(run_dir, spec)
    (run_dir / "attempts.jsonl").write_text("{}\n")
    open_run(spec)
    run = spec.run.model_copy(update={"env": {}})
    open_run(spec.model_copy(update={"run": run}))


def test_a_new_working_dir_path_does_not_prevent_resuming(tmp_path: Path) -> None:
    def unpacked(session: str, digest: str, name: str) -> JobSpec:
        path = f"/tmp/ray/{session}/runtime_resources/working_dir_files/_ray_pkg_{digest}/data/{name}"
        text = {"name": "run", "model": {"path": "m"}, "data": {"train": [{"path": path}]}}
        return loader.parse(json.dumps({**text, "checkpoint": {"storage": str(tmp_path)}}))

    first = unpacked("session_1", "0a1b", "rows.jsonl")
    run_dir = open_run(first)
    record_job(run_dir, first)
    (run_dir / "attempts.jsonl").write_text("{}\n")
    open_run(unpacked("session_2", "ffff", "rows.jsonl"))
    with pytest.raises(SpecError, match=r"data\.train\.0\.path"):
        open_run(unpacked("session_2", "ffff", "other.jsonl"))


@pytest.mark.process
def test_the_worker_setup_hook_imports_our_package_before_the_working_directory(
    tmp_path: Path,
) -> None:
    """Ray runs the hook before it puts the driver's working directory on sys.path."""
    (tmp_path / "orchestrator").mkdir()
    (tmp_path / "orchestrator" / "__init__.py").write_text("raise RuntimeError('theirs')")
    (tmp_path / "setup").write_bytes(cloudpickle.dumps(environment.worker_setup_hook({"TOKEN": SECRET})))
    code = (
        "import pickle, sys, os; pickle.load(open('setup', 'rb'))(); sys.path.insert(0, os.getcwd());"
        "import orchestrator; print(orchestrator.__file__, os.environ['TOKEN'])"
    )
    command = [sys.executable, "-P", "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ROOT / "orchestrator" / "__init__.py"), SECRET]
