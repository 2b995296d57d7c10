"""Suggestions after an out-of-memory error omit settings that the job already has."""

from __future__ import annotations

import re

import pytest

from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.train.suggestions import memory_suggestions, node_memory_suggestions

JOB = """
name: run
model: {path: builtin/tiny-llama}
data: {train: [{path: builtin/alpaca_sample}]}
"""


def job_with(*overrides: str) -> JobSpec:
    return loader.parse(JOB, overrides)


SAVING = (
    "parallel.workers=2",
    "parallel.sequence_parallel_size=2",
    "model.loss_tile_tokens=512",
    "parallel.offload_optimizer=cpu",
    "parallel.offload_param=cpu",
    "parallel.offload_activations=cpu",
)


def test_a_job_that_saves_memory_everywhere_can_only_shorten_its_packs() -> None:
    assert memory_suggestions(job_with(*SAVING), "cuda") == "lower data.max_length"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.micro_batch_size=2", "lower optim.micro_batch_size=2"),
        ("model.loss_tile_tokens=null", "set model.loss_tile_tokens: 4096"),
        ("parallel.sequence_parallel_size=1", "raise parallel.sequence_parallel_size=1"),
        ("parallel.offload_activations=none", "use parallel.offload_activations: cpu"),
        ("parallel.offload_param=none", "use parallel.offload_param: cpu"),
    ],
)
def test_what_is_not_saved_yet_is_named(override: str, named: str) -> None:
    assert memory_suggestions(job_with(*SAVING, override), "cuda") == f"{named}, or lower data.max_length"


def test_every_field_that_is_named_can_be_set_so() -> None:
    overrides = ("parallel.workers=2", "parallel.zero_stage=2", "model.gradient_checkpointing=selective")
    said = memory_suggestions(job_with(*overrides), "cuda")
    named = re.findall(r"(?:use|set) ([\w.]+): (\w+)", said)
    assert len(named) == 3
    for field, value in named:
        job_with(*overrides, f"{field}={value}")


def test_on_a_cpu_nothing_is_offloaded_to_the_memory_that_is_short() -> None:
    assert "offload" not in memory_suggestions(job_with("parallel.zero_stage=2"), "cpu")
    assert "offload" not in node_memory_suggestions(job_with("parallel.zero_stage=2"), "cpu")


def test_a_full_node_is_told_what_is_offloaded_to_it() -> None:
    said = node_memory_suggestions(job_with("parallel.offload_optimizer=cpu"), "cuda")
    assert said == (
        "place fewer workers on a node, use nodes with more memory, or set parallel.offload_optimizer: none"
    )
