"""The command line: imports, start time, help, errors and output."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import __version__
from orchestrator.config import loader
from tests.conftest import ENVIRONMENT, ROOT, orchestrator

pytestmark = pytest.mark.process

QUICKSTART = ROOT / "launch" / "jobs" / "quickstart.yaml"
SCHEMA = ROOT / "launch" / "jobs" / "job.schema.json"
LIGHT_COMMANDS = [
    ["--help"],
    ["--version"],
    ["validate", str(QUICKSTART)],
    ["render", "--target", "deepspeed", str(QUICKSTART)],
    ["render", "--target", "rayjob", str(QUICKSTART), "--set", "checkpoint.storage=/mnt/shared/runs"],
]
PROBE = """
import sys
from orchestrator.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "ray", "deepspeed", "transformers", "peft", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", LIGHT_COMMANDS, ids=lambda arguments: arguments[0])
def test_light_commands_import_no_framework_and_finish_within_a_second(arguments: list[str]) -> None:
    seconds = []
    for _ in range(2):  # CPU time, because other processes may use the machine
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", PROBE, *arguments],
            cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0


@pytest.mark.parametrize(
    "command", ["validate", "pack", "train", "bench", "submit", "export", "render", "report"]
)
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    done = orchestrator(command, "--help", cwd=tmp_path)
    assert done.code == 0
    assert f"orchestrator {command}" in done.out.split("Example:")[1]


def test_version_is_that_of_the_package(tmp_path: Path) -> None:
    done = orchestrator("--version", cwd=tmp_path)
    assert (done.code, done.out) == (0, f"orchestrator {__version__}\n")


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    script = orchestrator(
        "--show-completion", "bash", cwd=tmp_path, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    assert script.code == 0
    assert "_ORCHESTRATOR_COMPLETE=complete_bash" in script.out
    completed = orchestrator(
        cwd=tmp_path, _ORCHESTRATOR_COMPLETE="complete_bash", COMP_WORDS="orchestrator val", COMP_CWORD="1"
    )
    assert completed.out.split() == ["validate"]


def test_validate_prints_json(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: a/b\nmodel: {path: m}\ndata: {train: [{path: d}]}\n")
    good = orchestrator("validate", str(QUICKSTART), "--json", cwd=tmp_path)
    assert (good.code, json.loads(good.out)) == (0, {"valid": True, "problems": [], "warnings": []})
    bad = orchestrator("validate", str(QUICKSTART), "bad.yaml", "--json", cwd=tmp_path)
    assert bad.code == 2
    result = json.loads(bad.out)
    assert [problem.split(": ")[0] for problem in result["problems"]] == ["bad.yaml:1", "bad.yaml:3"]
    elsewhere = orchestrator("validate", "bad.yaml", "--no-files", "--json", cwd=tmp_path)
    assert [problem.split(": ")[0] for problem in json.loads(elsewhere.out)["problems"]] == ["bad.yaml:1"]


def test_validate_and_train_report_the_same_errors_and_create_no_files(tmp_path: Path) -> None:
    text = "name: j\nmodel:\n  path: ./modle\ndata:\n  train: [{path: nope.json}]\nmetrics: {port: null}\n"
    (tmp_path / "job.yaml").write_text(text)
    checked = orchestrator("validate", "job.yaml", cwd=tmp_path)
    trained = orchestrator("train", "job.yaml", cwd=tmp_path)
    assert (checked.code, trained.code) == (2, 2)
    assert checked.err == trained.err
    assert "job.yaml:3: model.path=./modle does not exist" in checked.err
    assert "job.yaml:5: data file nope.json is not there" in checked.err
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_warnings_do_not_change_result_and_exit_code(tmp_path: Path) -> None:
    unusual = ("--set", "optim.lr=50", "--set", "optim.warmup_ratio=1")
    checked = orchestrator("validate", str(QUICKSTART), *unusual, cwd=tmp_path)
    assert (checked.code, checked.out) == (0, "1 job file valid\n")
    lines = checked.err.splitlines()
    assert [line.split("=")[0] for line in lines] == [
        "warning: --set optim.lr",
        "warning: --set optim.warmup_ratio",
    ]
    as_json = orchestrator("validate", str(QUICKSTART), *unusual, "--json", cwd=tmp_path)
    result = json.loads(as_json.out)
    assert (as_json.code, as_json.err, result["valid"]) == (0, "", True)
    assert [f"warning: {warning}" for warning in result["warnings"]] == lines
    wrong = orchestrator("validate", str(QUICKSTART), *unusual, "--set", "optim.epoch=1", cwd=tmp_path)
    assert wrong.code == 2
    assert wrong.err.startswith("\n".join(lines) + "\njob file error: --set optim.epoch=1: ")
    for command in (("train",), ("submit", "--address", "http://127.0.0.1:9")):
        failed = orchestrator(
            command[0],
            str(QUICKSTART),
            *command[1:],
            *unusual,
            "--set",
            "checkpoint.storage=/proc/x",
            "--set",
            "metrics.port=null",
            cwd=tmp_path,
        )
        assert failed.code == 3
        assert failed.err.splitlines()[:2] == lines
        assert failed.err.count("warning:") == 2


def test_render_prints_the_deepspeed_configuration(tmp_path: Path) -> None:
    on_gpu = orchestrator("render", str(QUICKSTART), "--set", "parallel.zero_stage=2", cwd=tmp_path)
    assert on_gpu.code == 0
    config = json.loads(on_gpu.out)
    assert config["zero_optimization"]["stage"] == 2
    assert config["bf16"]["enabled"]
    on_cpu = orchestrator("render", str(QUICKSTART), "--device", "cpu", cwd=tmp_path)
    assert not json.loads(on_cpu.out)["bf16"]["enabled"]


@pytest.mark.parametrize("text", ["{}", "[1]", "null", '{"name": "run"}', "{", "\x00"])
def test_an_invalid_report_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    done = orchestrator("report", ".", cwd=tmp_path)
    assert done.code == 2
    assert "report.json" in done.err
    assert "name the folder STORAGE/NAME of a run" in done.err


def test_runs_without_valid_steps_are_not_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "steps.jsonl").write_text('[1]\n5\n{"step": 1}\n{"step": "x", "attempt": 1}\n{"st')
    done = orchestrator("report", "--compare", "a", "b", cwd=tmp_path)
    assert done.code == 2
    assert "a holds no sweep and no run with more than 2 steps" in done.err


def test_reports_are_printed_side_by_side(tmp_path: Path) -> None:
    common = {"evaluation_loss": None, "tgs": 1.0, "step_seconds": 2.0, "world_size": 2, "restarts": 0}
    for name, loss in (("a", 1.5), ("b", 1.25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({"name": name, "loss": loss, **common}))
    done = orchestrator("report", "a", "b", cwd=tmp_path)
    assert done.code == 0
    assert [line.split() for line in done.out.splitlines()[:2]] == [["a", "b"], ["loss", "1.5", "1.25"]]


def test_the_json_schema_matches_the_code() -> None:
    text = json.dumps(loader.json_schema(), indent=2) + "\n"
    if os.environ.get("GOLDEN_UPDATE"):
        SCHEMA.write_text(text)
    assert SCHEMA.read_text() == text, "run with GOLDEN_UPDATE=1 and commit launch/jobs/job.schema.json"
