"""What workers are told before they start."""

from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator.spec import JobSpec
from orchestrator.train.brief import Brief


def brief(device: Literal["cuda", "cpu"], **parallel: Any) -> Brief:
    job = JobSpec.model_validate(
        {
            "name": "a",
            "model": {"path": "m"},
            "data": {"train": ({"path": "d"},)},
            "parallel": parallel,
        }
    )
    return Brief(job, Path("run"), Path("plan"), None, "bf16", device, {})


@pytest.mark.parametrize("wanted", [True, False])
def test_cudas_allocator_is_told_of_expandable_segments(wanted: bool) -> None:
    environment = brief("cuda", expandable_segments=wanted).worker_environment({})
    assert environment == {"PYTORCH_ALLOC_CONF": f"expandable_segments:{wanted}"}


def test_options_that_are_already_set_stay() -> None:
    assert brief("cuda").worker_environment({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}) == {}


def test_on_cpu_there_is_no_such_allocator() -> None:
    assert brief("cpu").worker_environment({}) == {}
