"""The metrics endpoint of a run when attempts begin, continue and end."""

import json
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.errors import TrainingError
from orchestrator.metrics.meter import RankStep, RankSteps
from orchestrator.run.failures import Failure
from orchestrator.run.recorder import Recorder, WorkerInfo
from orchestrator.run.run_lock import RunLock
from orchestrator.train.callbacks import AttemptWatch

WORKERS = [
    WorkerInfo(0, "10.0.0.1", "a", 1, "H100", "0", 1e15, memory_limit_bytes=80_000_000_000),
    WorkerInfo(1, "10.0.0.2", "b", 2, "H100", "1", None),
]
INFO = {
    "zero_stage": 3,
    "sequence_parallel_size": 1,
    "dtype": "bf16",
    "device": "H100",
    "checkpoint_every_steps": 5,
}
ONE = RankStep(**{field.name: 1.0 for field in fields(RankStep)})


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    run_lock = RunLock.acquire(tmp_path)
    made = Recorder(tmp_path, "my-run", run_lock, "127.0.0.1", 0)
    yield made
    made.close()
    run_lock.release(tmp_path)


def step(recorder: Recorder, attempt: int, number: int, **changes: float) -> None:
    values = {
        "step": number,
        "epoch": 0.1,
        "seconds": 2.0,
        "learning_rate": 1e-4,
        "gradient_norm": 1.0,
        "skipped": False,
        **changes,
    }
    tokens = [RankStep(**{**vars(ONE), "tokens": tokens, "slots": 100.0}) for tokens in (60.0, 40.0)]
    recorder.record_step(attempt, values, RankSteps.of(tokens))


def shown(recorder: Recorder) -> dict[str, list[float]]:
    """Return the values of every series of the endpoint, by name."""
    assert recorder._exporter is not None
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(recorder._exporter.text()):
        for sample in family.samples:
            assert sample.labels["run"] == "my-run"
            found.setdefault(sample.name.removeprefix("orchestrator_"), []).append(sample.value)
    return found


def test_a_step_is_written_and_shown(recorder: Recorder, tmp_path: Path) -> None:
    attempt = recorder.begin_attempt(WORKERS, INFO, 0, 10)
    step(recorder, attempt, 1)
    step(recorder, attempt, 2)
    seen = shown(recorder)
    assert seen["tgs"] == [30.0, 20.0]
    assert seen["processed_tokens_total"] == [120.0, 80.0]
    assert seen["memory_limit_bytes"] == [80e9]
    assert seen["steps_to_go"] == [8.0]
    assert seen["tokens_to_go"] == [800.0]
    assert seen["seconds_to_go"] == [16.0]
    assert seen["world_size"] == [2.0]
    assert seen["checkpoint_every_steps"] == [5.0]
    assert seen["last_step_timestamp_seconds"][0] == pytest.approx(time.time(), abs=30)
    assert len(seen["mfu"]) == 1, "of a device whose peak is not known there is none"
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [row["tgs"] for row in rows] == [25.0, 25.0]
    assert rows[0]["tokens"] == 100.0


def test_phases_of_all_ranks_evaluations_and_checkpoints_are_counted(recorder: Recorder) -> None:
    attempt = recorder.begin_attempt(WORKERS, INFO, 0, 10)
    step(recorder, attempt, 1)
    recorder.record_evaluation(attempt, 1, 2.0, {"eval": 2.0})
    recorder.record_checkpoint(attempt, 1, 4.0)
    seen = shown(recorder)
    assert seen["step_phase_seconds_count"] == [2.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    assert seen["step_phase_seconds_sum"][-1] == 4.0
    assert seen["checkpoint_seconds"] == [4.0]
    assert seen["evaluation_seconds"][0] < 30
    assert seen["last_checkpoint_timestamp_seconds"][0] == pytest.approx(time.time(), abs=30)


def test_each_of_several_evaluation_sets_has_its_loss(recorder: Recorder, tmp_path: Path) -> None:
    attempt = recorder.begin_attempt(WORKERS, INFO, 0, 10)
    step(recorder, attempt, 1)
    recorder.record_evaluation(attempt, 1, 2.0, {"eval": 2.0})
    assert shown(recorder)["evaluation_loss"] == [2.0], "the loss of a single set is the total"
    recorder.record_evaluation(attempt, 1, 2.0, {"code": 1.5, "chat": 3.0})
    assert shown(recorder)["evaluation_loss"] == [2.0, 1.5, 3.0]
    recorder.end_attempt()
    assert shown(recorder)["evaluation_loss"] == [2.0, 1.5, 3.0]
    assert "step 1: evaluation loss 2.0000 (code 1.5000, chat 3.0000)" in recorder.status().notes
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["evaluation_losses"] for row in rows] == [{"eval": 2.0}, {"code": 1.5, "chat": 3.0}]
    assert [row["evaluation_loss"] for row in rows] == [2.0, 2.0]


def test_notes_of_the_workers_reach_the_driver_once(recorder: Recorder) -> None:
    recorder.begin_attempt(WORKERS, INFO, 3, 10, ["step-00000005 is damaged; resuming from step 3 instead"])
    assert recorder.status().notes == ("step-00000005 is damaged; resuming from step 3 instead",)
    assert recorder.status().notes == ()


def test_skipped_steps_are_counted(recorder: Recorder) -> None:
    attempt = recorder.begin_attempt(WORKERS, INFO, 0, 10)
    step(recorder, attempt, 1, skipped=True)
    step(recorder, attempt, 2, skipped=True)
    step(recorder, attempt, 3)
    assert shown(recorder)["skipped_steps_total"] == [2.0]


def test_workers_that_are_gone_show_no_rates_and_what_alerts_need_stays(recorder: Recorder) -> None:
    attempt = recorder.begin_attempt(WORKERS, INFO, 0, 10)
    step(recorder, attempt, 1)
    recorder.end_attempt()
    seen = shown(recorder)
    assert {"tgs", "tokens", "memory_bytes", "loss", "step_seconds", "seconds_to_go"}.isdisjoint(seen)
    assert seen["world_size"] == [2.0]
    assert {"last_step_timestamp_seconds", "steps_to_go", "run_info"} <= set(seen)


def test_the_next_attempt_begins_anew_and_remembers_the_last_checkpoint(recorder: Recorder) -> None:
    first = recorder.begin_attempt(WORKERS, INFO, 0, 10)
    for number in range(1, 8):
        step(recorder, first, number)
        if number == 5:
            recorder.record_checkpoint(first, number, 1.0)
    saved = shown(recorder)["last_checkpoint_timestamp_seconds"]
    recorder.end_attempt()
    second = recorder.begin_attempt(WORKERS[:1], INFO, 5, 10)
    seen = shown(recorder)
    assert seen["last_checkpoint_timestamp_seconds"] == saved
    assert seen["restarts"] == [1.0]
    assert seen["steps_lost"] == [2.0]
    assert seen["steps_to_go"] == [5.0]
    assert seen["processed_tokens_total"] == [0.0]
    assert "last_step_timestamp_seconds" not in seen
    assert "tgs" not in seen
    with pytest.raises(TrainingError, match=f"attempt {first} has been superseded by attempt {second}"):
        step(recorder, first, 8)


def test_a_failure_for_good_withdraws_the_attempt(recorder: Recorder) -> None:
    attempt = recorder.begin_attempt(WORKERS, INFO, 0, 10)
    step(recorder, attempt, 1)
    recorder.report_fatal(TrainingError("of an attempt before"), attempt - 1)
    assert "tgs" in shown(recorder)
    recorder.report_fatal(TrainingError("no more"), attempt)
    assert "tgs" not in shown(recorder)


def test_a_recorder_that_is_started_anew_goes_on(recorder: Recorder, tmp_path: Path) -> None:
    attempt = recorder.begin_attempt(WORKERS, INFO, 0, 10)
    step(recorder, attempt, 1)
    again = Recorder(tmp_path, "my-run", recorder._run_lock, "127.0.0.1", 0)
    try:
        assert "tgs" not in shown(again)
        assert shown(again)["step"] == [1.0]
        step(again, attempt, 1)  # a retried message
        assert shown(again)["processed_tokens_total"] == [0.0, 0.0]
        step(again, attempt, 2)
        assert shown(again)["tgs"] == [30.0, 20.0]
        assert shown(again)["memory_limit_bytes"] == [80e9]
        assert (again.status().start, again.status().step) == (1, 2), "what it has not seen itself is past"
        again.begin_attempt(WORKERS, INFO, 1, 10)
        assert (again.status().start, again.status().step) == (1, 1)
    finally:
        again.close()


def test_ray_train_tells_the_recorder_of_workers_that_failed() -> None:
    told = []

    class Actor:
        class end_attempt:
            @staticmethod
            def remote() -> None:
                told.append("ended")

    context: Any = None
    AttemptWatch(Actor()).after_exception(run_context=context, worker_exceptions={1: RuntimeError("killed")})
    assert told == ["ended"]


def failure(group: str, rank: int = 0, step: int | None = 3) -> Failure:
    return Failure(group, rank, step, "TypeError", "bad operand", "model.py:7", ("raise",), "rank-0.log")


def test_what_fails_twice_in_the_same_way_is_not_begun_again(recorder: Recorder) -> None:
    recorder.begin_attempt(WORKERS, INFO, 0, 10)
    recorder.report_failure(failure("one"))
    recorder.report_failure(failure("one", rank=1))
    assert recorder.status().fatal is None
    recorder.end_attempt()
    recorder.begin_attempt(WORKERS, INFO, 0, 10)
    recorder.report_failure(failure("two"))
    assert isinstance(recorder.status().fatal, TrainingError)
    with pytest.raises(TrainingError, match="failed twice in the same way in step 4"):
        recorder.begin_attempt(WORKERS, INFO, 0, 10)


def test_an_attempt_that_was_stopped_is_no_failure(recorder: Recorder, tmp_path: Path) -> None:
    assert recorder.request_stop() is False, "nobody is there to be stopped"
    first = recorder.begin_attempt(WORKERS, INFO, 0, 10)
    step(recorder, first, 1)
    assert recorder.request_stop() is True
    assert recorder.stop_requested()
    recorder.finish_training(first)
    assert not recorder.status().is_running
    recorder.end_run("stopped")
    entries = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [(entry["attempt"], entry["ended"], entry["end_step"]) for entry in entries] == [(1, "stopped", 1)]
    second = recorder.begin_attempt(WORKERS, INFO, 1, 10)
    assert second == 2
    assert shown(recorder)["restarts"] == [0.0]
    recorder.end_attempt()
    recorder.begin_attempt(WORKERS, INFO, 1, 10)
    assert shown(recorder)["restarts"] == [1.0]
