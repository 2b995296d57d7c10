"""The search returns valid jobs that fit and are the fastest of all candidates."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.arch.hf_config import load_config_json
from orchestrator.arch.registry import require_bundled
from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.config import loader
from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import broken_rules
from orchestrator.errors import SpecError
from orchestrator.planner.estimate import CalibrationParams
from orchestrator.planner.plan import FIELDS
from orchestrator.planner.search import TIE, predict_job, search, suggest_changes


def job(model: str = "llama2-7b", length: int = 4096, packs: int = 64, **parallel: Any) -> JobSpec:
    return loader.parse(
        json.dumps(
            {
                "name": "planned",
                "model": {"path": model, "dtype": "bf16"},
                "data": {
                    "train": [{"path": "rows.json"}],
                    "max_length": length,
                    "cross_document_attention": True,
                },
                "parallel": {"workers": 8, "zero_stage": 3, **parallel},
                "optim": {"global_batch_size": packs},
            }
        )
    )


NODE = ClusterSpec.parse("8xA100-80G-SXM")
EIGHT = ClusterSpec.parse("8x8xA100-80G-SXM")


@pytest.mark.parametrize(
    ("model", "length", "packs", "cluster"),
    [
        ("llama2-7b", 4096, 64, "8xA100-80G-SXM"),
        ("llama2-7b", 4096, 64, "8xRTX4090-24G"),
        ("llama2-70b", 1_048_576, 64, "8x8xA100-80G-SXM"),
        ("qwen1.5-72b", 32_768, 16, "4x8xH100-80G-SXM"),
    ],
)
def test_what_is_proposed_is_valid_fits_and_is_not_beaten(
    model: str, length: int, packs: int, cluster: str
) -> None:
    asked, there = job(model, length, packs), ClusterSpec.parse(cluster)
    found = search(asked, require_bundled(model), there)
    assert found.best is not None
    assert found.best.prediction.verdict == "fits"
    assert found.best.job.parallel.workers <= there.gpus
    for each in (found.best, *found.others):
        assert list(broken_rules(each.job)) == []
        assert loader.parse(loader.dump(each.job)) == each.job, "it can be written into the job file"
        if each.prediction.verdict == "fits":
            assert each.seconds_per_pack * (1 + TIE) >= found.best.seconds_per_pack
    for section in ("data", "method", "checkpoint", "run"):
        assert getattr(found.best.job, section) == getattr(asked, section)
    assert found.best.job.optim.global_batch_size == packs, "what is learnt is not touched"


def test_settings_that_are_taken_give_the_same_prediction_again() -> None:
    config, asked = require_bundled("llama2-7b"), job()
    best = search(asked, config, NODE).best
    assert best is not None
    again = predict_job(best.job, config, NODE)
    assert again.prediction == best.prediction
    assert set(best.settings) == set(FIELDS)


def test_ways_that_lose_are_told_in_order() -> None:
    found = search(job("llama2-13b"), require_bundled("llama2-13b"), NODE)
    order = [("fits", "tight", "does not fit").index(each.prediction.verdict) for each in found.others]
    assert order == sorted(order)
    assert {0, 2} <= set(order)
    ways = {
        (each.job.parallel.zero_stage, each.job.parallel.offload_optimizer, each.job.parallel.offload_param,
         each.job.parallel.sequence_parallel_size)
        for each in found.others
    }  # fmt: skip
    assert len(ways) == len(found.others), "each way is told once"


def test_where_nothing_fits_there_is_no_plan() -> None:
    found = search(
        job("llama2-70b", 65_536, 8), require_bundled("llama2-70b"), ClusterSpec.parse("RTX3090-24G")
    )
    assert found.best is None
    assert {each.prediction.verdict for each in found.others} == {"does not fit"}


def test_the_cheapest_changes_fit_and_are_few() -> None:
    asked, config = (
        job("llama2-70b", 1_048_576, 64, workers=64, sequence_parallel_size=8),
        require_bundled("llama2-70b"),
    )
    before = predict_job(asked, config, EIGHT)
    assert before.prediction.verdict == "does not fit"
    found = suggest_changes(asked, config, EIGHT, CalibrationParams())
    assert len(found) == 3
    for each in found:
        assert each.candidate.prediction.verdict != "does not fit"
        assert each.changes
        inside = {name: value for name, value in each.changes.items() if name in FIELDS}
        assert inside == before.changes_to(each.candidate)
    assert len(found[0].changes) <= 2
    named = [set(each.changes) for each in found]
    assert not any(one <= other for one in named for other in named if one is not other)


def test_suggestions_include_shorter_packs_and_more_nodes() -> None:
    asked = job("llama2-70b", 65_536, 8, workers=1)
    found = suggest_changes(
        asked, require_bundled("llama2-70b"), ClusterSpec.parse("A100-80G-SXM"), CalibrationParams()
    )
    assert found
    assert all({"--gpus", "data.max_length", "method.type"} & set(each.changes) for each in found)


def test_a_search_for_ten_thousand_gpus_is_no_larger_than_it_has_to_be() -> None:
    found = search(
        job("llama2-7b", 32_768, 4096), require_bundled("llama2-7b"), ClusterSpec.parse("1250x8xH100-80G-SXM")
    )
    assert found.best is not None
    assert found.best.job.parallel.workers > 1000
    assert found.considered < 10_000


def test_unsupported_architecture_is_rejected() -> None:
    with pytest.raises(SpecError, match=r"model\.path=x .*'mamba'.*planner does not support"):
        search(job("x"), {"model_type": "mamba"}, NODE)


def test_a_model_that_is_nowhere_is_an_error_that_lists_the_bundled_ones() -> None:
    with pytest.raises(SpecError, match=r"model\.path=\./nowhere is not a folder.*llama2-7b"):
        load_config_json("./nowhere")
