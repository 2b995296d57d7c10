"""`orchestrator plan` as users run it: figures, reasons, remedies, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli.main import app
from tests.conftest import ROOT

JOBS = ROOT / "launch" / "jobs" / "published" / "xtuner"
LONG = str(JOBS / "llama2-70b-1m.yaml")


def plan(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["plan", *arguments])
    return done.exit_code, done.stdout, done.stderr


def as_json(*arguments: str) -> dict[str, Any]:
    code, out, err = plan(*arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_million_tokens_of_70b_fit_eight_nodes_and_every_line_is_explained() -> None:
    code, out, _ = plan(LONG, "--gpus", "8x8xA100-80G-SXM", "--explain")
    assert code == 0
    heading, _, written, planned, *_ = out.splitlines()
    assert "68,976,648,192 parameters" in heading
    assert "attention over whole packs" in heading
    assert written.startswith("as written  fits: ")
    assert planned.startswith("planned     fits: ")
    assert "± 35%" in planned
    for words in ("memory of a GPU at its largest, GiB", "seconds of a step", "  attention ", "settings: "):
        assert words in out
    losing = [line for line in out.splitlines() if "does not fit: " in line]
    assert any("optimizer" in line for line in losing), "ZeRO-1 does not fit for its optimizer's state"


def test_documents_that_are_short_cost_less_attention_than_whole_packs() -> None:
    common = (str(JOBS / "llama2-7b-256k.yaml"), "--gpus", "4x8xA100-80G-SXM")
    apart = (*common, "--set", "data.cross_document_attention=false")
    whole = as_json(*common)["asked"]["step_seconds_by_part"]
    short, long = (
        as_json(*apart, "--document-tokens", tokens)["asked"]["step_seconds_by_part"]
        for tokens in ("400", "9999999")
    )
    assert short["attention"] == pytest.approx(whole["attention"] * 400 / 262144)
    assert long == whole, "a document is no longer than its pack"
    assert as_json(*common, "--document-tokens", "400")["asked"]["step_seconds_by_part"] == whole
    assert "attention over documents of 400 tokens" in plan(*apart, "--document-tokens", "400")[1]


def test_a_slow_network_keeps_sequences_inside_nodes() -> None:
    common = (str(JOBS / "llama2-7b-256k.yaml"), "--gpus", "4x8xA100-80G-SXM")
    fast, slow = as_json(*common), as_json(*common, "--network-gbits", "25")
    size = "parallel.sequence_parallel_size"
    assert fast["best"]["settings"][size] > 8
    assert slow["best"]["settings"][size] <= 8
    # Eight ports of 200 Gbit/s are what the catalogue has.
    assert as_json(*common, "--network-gbits", "1600")["best"] == fast["best"]


def test_json_holds_both_and_ranges() -> None:
    found = as_json(str(JOBS / "llama2-7b-8k.yaml"), "--gpus", "8xA100-80G-SXM")
    for part in (found["asked"], found["best"]):
        low, high = part["memory_peak_bytes_range"]
        assert low < part["memory_peak_bytes"] < high
        fast, slow = part["step_seconds_range"]
        assert fast < part["step_seconds"] < slow
        assert sum(part["step_seconds_by_part"].values()) == pytest.approx(part["step_seconds"])
        assert 0 < part["mfu"] < 0.8
    assert found["best"]["step_seconds"] <= found["asked"]["step_seconds"] * 1.03
    assert found["remedies"] == []
    written = found["asked"]["settings"]
    assert found["best"]["settings"] == {**written, **found["best"]["changes"]}


def test_changes_can_be_given_as_they_are_printed() -> None:
    machines = ("--gpus", "8xA100-80G-SXM")
    job = str(JOBS / "llama2-7b-8k.yaml")
    first = as_json(job, *machines)["best"]
    changes = [word for name, value in first["changes"].items() for word in ("--set", f"{name}={value}")]
    assert changes
    again = as_json(job, *machines, *changes)
    assert again["asked"]["settings"] == first["settings"]
    assert again["best"]["changes"] == {}


def test_where_nothing_fits_it_says_what_would_and_ends_with_3() -> None:
    code, out, err = plan(LONG, "--gpus", "2xA100-80G-SXM")
    assert code == 3
    assert "planned     nothing fits" in out
    assert "It would fit with:" in out
    assert "--gpus " in out
    assert "cluster error: no configuration of xtuner-llama2-70b-1m fits on 1x2xA100-80G-SXM (" in err


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ("8xA1000", ("--gpus 8xA1000", "A100-80G-SXM", "--catalogue")),
        ("eight", ("--gpus eight", "use one of")),
        ("0xA100-80G-SXM", ("--gpus 0xA100-80G-SXM", "NODESxGPUSxDEVICE")),
    ],
)
def test_machines_that_are_not_known_are_one_clear_error(gpus: str, words: tuple[str, ...]) -> None:
    code, _, err = plan(LONG, "--gpus", gpus)
    assert code == 2
    assert all(word in err for word in words)


def test_a_device_of_ones_own_is_taken_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[OWN-200G]\nmemory_gib = 200.0\nsource = "a data sheet"\n')
    code, out, _ = plan(LONG, "--gpus", "8x8xOWN-200G", "--catalogue", str(tmp_path / "own.toml"))
    assert code == 0
    assert "of 200.0" in out
    assert "TGS" not in out.splitlines()[2], "a device without rates has no time"


def test_a_model_in_a_folder_is_planned_by_its_own_sizes(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 1000, "tie_word_embeddings": True, **shape})
    )
    job = {
        "name": "own",
        "model": {"path": str(tmp_path / "model"), "dtype": "bf16"},
        "data": {"train": [{"path": "rows.json"}]},
        "optim": {"global_batch_size": 8},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    found = as_json(str(tmp_path / "job.yaml"), "--gpus", "8xL40S-48G")
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert found["parameters"] == 1000 * 64 + 2 * layer + 64


def test_plots_show_the_plan_over_lengths(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    job = str(JOBS / "llama2-7b-32k.yaml")
    code, _, err = plan(job, "--gpus", "8xA100-80G-SXM", "--plots", str(tmp_path / "plots"))
    assert code == 0, err
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {
        "memory_by_part.svg",
        "tgs_over_length.svg",
    }
    for file in (tmp_path / "plots").iterdir():
        assert file.read_text().count("<path") > 20


def test_parts_that_are_drawn_are_those_of_the_peak() -> None:
    from orchestrator.cli.plan_output import planned
    from orchestrator.cli.plan_plots import moments
    from orchestrator.config import loader

    found, _ = planned(loader.load(JOBS / "llama2-7b-32k.yaml"), "8xA100-80G-SXM", None)
    for each in (found.asked, *found.others):
        assert sum(moments(each).values()) == pytest.approx(each.prediction.memory.required / 2**30)


@pytest.mark.process
def test_planning_loads_no_framework() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom orchestrator.cli.main import app\ndone = "
        f"CliRunner().invoke(app, ['plan', {LONG!r}, '--gpus', '8x8xA100-80G-SXM'])\nassert done.exit_code "
        "== 0, done.output\nloaded = {'torch', 'ray', 'deepspeed', 'transformers'} & "
        "set(sys.modules)\nassert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_plots_that_cannot_be_written_are_one_clear_error(tmp_path: Path) -> None:
    taken = tmp_path / "plots"
    taken.write_text("mine")
    code, _, err = plan(LONG, "--gpus", "8xA100-80G-SXM", "--plots", str(taken))
    assert code == 2
    assert f"--plots {taken} cannot be written (File exists); name a folder that can be" in err
    assert taken.read_text() == "mine"


def test_an_error_that_nobody_foresaw_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("orchestrator.cli.plan_output.planned", lambda *_: 1 // 0)
    code, out, err = plan(LONG, "--gpus", "8xA100-80G-SXM")
    assert (code, out) == (1, "")
    assert err.startswith("unexpected error: ZeroDivisionError: ")
    assert "Traceback" not in err
    assert "1 // 0" in next(tmp_path.iterdir()).read_text()
