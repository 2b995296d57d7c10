"""A real Prometheus with the example configuration scrapes a recorder and answers every query."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest

from orchestrator.metrics import targets
from orchestrator.metrics.endpoint import Endpoint
from orchestrator.metrics.exporter import Exporter
from orchestrator.metrics.meter import RankStep, RankSteps
from orchestrator.run.recorder import Recorder, WorkerInfo
from orchestrator.run.run_lock import RunLock
from tests.conftest import wait_until
from tests.support.prometheus import Prometheus, needs_prometheus
from tests.unit.monitoring.test_dashboards import PANELS, substituted
from tests.unit.monitoring.test_rules import RECORDED

pytestmark = [pytest.mark.process, needs_prometheus]
# Samples in the format of NVIDIA's exporter; the label gpu is the index of the device on its node.
DCGM = "".join(
    f'# TYPE {name} gauge\n{name}{{gpu="{gpu}",UUID="GPU-{gpu}",device="nvidia{gpu}",'
    f'modelName="NVIDIA H100 80GB HBM3",Hostname="node-1"}} {value}\n'
    for gpu in (0, 1, 2)
    for name, value in {
        "DCGM_FI_DEV_GPU_UTIL": 97 if gpu < 2 else 0,
        "DCGM_FI_DEV_POWER_USAGE": 612.4,
        "DCGM_FI_DEV_FB_USED": 70123,
        "DCGM_FI_DEV_SM_CLOCK": 1980,
        "DCGM_FI_DEV_GPU_TEMP": 61,
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.41,
    }.items()
)
WORKERS = [
    WorkerInfo(rank, "127.0.0.1", "node-1", 1, "NVIDIA H100 80GB HBM3", str(rank), 989e12, 1, 85_000_000_000)
    for rank in range(2)
]
INFO = {
    "zero_stage": 3,
    "sequence_parallel_size": 1,
    "dtype": "bf16",
    "device": "H100",
    "checkpoint_every_steps": 5,
}


@dataclass
class Scene:
    """A Prometheus and the recorder that it scrapes."""

    prometheus: Prometheus
    recorder: Recorder
    attempt: int
    step: int = 0

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Return the current result of a query."""
        return self.prometheus.ask(query)

    def train(self) -> None:
        """Record a step as a worker does."""
        self.step += 1
        one = RankStep(
            **{**{field.name: 1.0 for field in fields(RankStep)}, "tokens": 900.0, "slots": 1000.0}
        )
        values = {
            "step": self.step,
            "epoch": 0.1,
            "seconds": 0.2,
            "learning_rate": 1e-4,
            "gradient_norm": 1.0,
            "skipped": False,
        }
        self.recorder.record_step(self.attempt, values, RankSteps.of([one, one]))
        self.recorder.record_evaluation(self.attempt, self.step, 2.0, {"code": 1.5, "chat": 2.5})
        self.recorder.record_checkpoint(self.attempt, self.step, 0.1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    run_dir = tmp_path_factory.mktemp("run")
    recorder = Recorder(run_dir, "my-run", RunLock.acquire(run_dir), "127.0.0.1", 0)
    dcgm = Endpoint("127.0.0.1", 0, lambda: DCGM)
    run_port = recorder.status().metrics_port
    targets = {"runs.json": [f"127.0.0.1:{run_port}"], "dcgm/nodes.json": [f"127.0.0.1:{dcgm.port}"]}
    try:
        with Prometheus(tmp_path_factory.mktemp("prometheus"), targets, "example") as prometheus:
            made = Scene(prometheus, recorder, recorder.begin_attempt(WORKERS, INFO, 0, 10_000))
            deadline = time.monotonic() + 8
            while time.monotonic() < deadline:  # counters must increase between scrapes
                made.train()
                time.sleep(0.2)
            yield made
    finally:
        recorder.close()
        dcgm.close()


@pytest.mark.parametrize("panel", PANELS)
def test_every_query_of_a_panel_has_results(scene: Scene, panel: dict[str, Any]) -> None:
    scene.train()
    for target in panel["targets"]:
        found = scene.ask(substituted(target["expr"]))
        assert found, f"{target['expr']} has no result"
        shown = target.get("legendFormat", "").replace("{{", "\0").split("\0")[1:]
        labels = {part.split("}}")[0] for part in shown} - {"cluster"}
        assert all(labels <= set(series["metric"]) for series in found)


def test_every_recording_rule_has_results(scene: Scene) -> None:
    scene.train()
    assert [name for name in sorted(RECORDED) if not scene.ask(name)] == []


def test_gpus_are_joined_with_the_ranks_that_use_them(scene: Scene) -> None:
    (held,) = [panel.values[0] for panel in PANELS if panel.values[0]["title"] == "GPUs in use"]
    (idle,) = [panel.values[0] for panel in PANELS if panel.values[0]["title"] == "Idle GPUs"]
    assert [each["value"][1] for each in scene.ask(substituted(held["targets"][0]["expr"]))] == ["2"]
    assert scene.ask(substituted(idle["targets"][0]["expr"]))[0]["value"][1] == "1"


def test_no_alert_fires_for_a_healthy_run(scene: Scene) -> None:
    scene.train()
    assert scene.ask('ALERTS{alertstate="firing"}') == []


def test_runs_of_this_machine_are_discovered(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        targets.FOLDER_VARIABLE, str(scene.prometheus.local)
    )  # does not exist before the first run
    found = 'up{job="orchestrator", cluster="local"} == 1'
    first, second = Exporter("first", "127.0.0.1", "auto"), Exporter("second", "0.0.0.0", "auto")
    expected = {f"localhost:{first.port}", f"localhost:{second.port}"}
    wait_until(
        lambda: {each["metric"]["instance"] for each in scene.ask(found)} == expected, 30, "both are scraped"
    )
    first.close()
    second.close()
    wait_until(lambda: not scene.ask('up{job="orchestrator"}'), 30, "neither is a target")


def test_series_of_an_attempt_disappear_when_it_ends(scene: Scene) -> None:
    """Runs last, because it ends the attempt."""
    assert scene.ask("orchestrator_tgs")
    scene.recorder.end_attempt()
    wait_until(lambda: not scene.ask("orchestrator_tgs"), 20, "no rates")
    missing = "run:orchestrator_ranks_missing:count"
    wait_until(
        lambda: [each["value"][1] for each in scene.ask(missing)] == ["2"], 20, "both ranks are missing"
    )
    wait_until(
        lambda: scene.ask('ALERTS{alertname="OrchestratorRanksMissing", alertstate="pending"}'),
        20,
        "the alert is pending",
    )
    assert scene.ask("orchestrator_last_step_timestamp_seconds")
