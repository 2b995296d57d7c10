"""The configuration that workers receive before they start."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator.config.schema import JobSpec
from orchestrator.run.worker_config import WorkerConfig, training_loader
from tests.invariant import material

ROOT = Path(__file__).parents[3]


def worker_config(device: Literal["cuda", "cpu"], **parallel: Any) -> WorkerConfig:
    job = JobSpec.model_validate(
        {
            "name": "a",
            "model": {"path": "m"},
            "data": {"train": ({"path": "d"},)},
            "parallel": parallel,
        }
    )
    return WorkerConfig(job, Path("run"), Path("plan"), None, "bf16", device, {})


@pytest.mark.parametrize("wanted", [True, False])
def test_cudas_allocator_is_told_of_expandable_segments(wanted: bool) -> None:
    environment = worker_config("cuda", expandable_segments=wanted).worker_environment({})
    assert environment == {"PYTORCH_ALLOC_CONF": f"expandable_segments:{wanted}"}


def test_options_that_are_already_set_stay() -> None:
    assert worker_config("cuda").worker_environment({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}) == {}


def test_on_cpu_there_is_no_such_allocator() -> None:
    assert worker_config("cpu").worker_environment({}) == {}


@pytest.mark.parametrize(("stage", "waits"), [(0, False), (1, False), (2, True), (3, True)])
def test_workers_wait_in_each_micro_step_where_zero_reduces_gradients_in_each(
    stage: int, waits: bool, tmp_path: Path
) -> None:
    material.write_documents(tmp_path / "documents", 20, seed=1)
    document = material.job(ROOT / "orchestrator" / "builtin" / "tiny-llama", 2, {"zero_stage": stage})
    job = JobSpec.model_validate_json(json.dumps(document))
    loader, _, _ = training_loader(job, *material.planned(job, tmp_path / "documents"))
    assert loader._batch_shape.sync_every_micro_step == waits
