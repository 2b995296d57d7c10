"""The planner benchmark on synthetic measurements: rows read, rows skipped, and the report."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planner.calibration import MemoryParams
from orchestrator.planner.memory import GIB
from orchestrator.planner.step_time import TimeParams
from tests.benchmarks.leave_out import alike, case_of, itself
from tests.benchmarks.measurements import (
    Measurement,
    UnusableRow,
    length_variation,
    read,
    timed_workload_of_row,
    workload_of_row,
)
from tests.benchmarks.planner import calibrated, cases_of, compare, figures, predict

ROOT = Path(__file__).parents[3]
ROW = {
    "id": "a", "source": "synthetic", "model": "qwen-7b", "method": "lora", "quantization": "none",
    "dtype": "bf16", "trains_embeddings": "no", "gpu": "A100-80G-SXM", "num_nodes": "1", "gpus_per_node": "1",
    "max_length": "2048", "micro_batch_size": "1", "gradient_accumulation_steps": "8", "zero_stage": "",
    "offload": "none", "sequence_parallel_size": "1", "gradient_checkpointing": "yes",
    "flash_attention": "yes", "lora_rank": "64", "lora_targets": "c_attn,c_proj,w1,w2",
    "full_length_rows": "yes", "cross_document_attention": "", "num_samples": "", "memory_per_gpu_gib": "",
    "memory_unit_in_source": "GB", "out_of_memory": "no", "seconds_per_iteration": "", "seconds_total": "",
    "tgs": "", "tflops_as_printed": "",
}  # fmt: skip
SPECIAL = (MemoryParams(1.5 * GIB, 1.1), TimeParams(0.9, 1.2))


def row(**changes: Any) -> Measurement:
    return Measurement({**ROW, **{name: str(value) for name, value in changes.items()}})


def planted(**changes: Any) -> Measurement:
    """Return a measurement predicted for a stack with the calibration parameters `SPECIAL`."""
    plain = predict(case_of(row(**changes), False), *SPECIAL)
    return row(**changes, memory_per_gpu_gib=plain.memory_gib, tgs=plain.tgs)


ROWS = [
    planted(id=f"{model} {length}", model=model, max_length=length)
    for model in ("qwen-7b", "qwen-14b")
    for length in (256, 512, 1024, 2048, 4096, 8192)
]


def written(path: Path, rows: list[Measurement]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(ROW))
        table.writeheader()
        table.writerows(dict(each.fields) for each in rows)
    return path


def test_what_is_empty_or_unknown_is_nothing() -> None:
    found = row(lora_rank="unknown", tgs="")
    assert found.number("lora_rank") is None
    assert found.tgs is None
    assert found.text("no such column") is None
    with pytest.raises(UnusableRow, match="max_length='long' is not a number"):
        row(max_length="long").whole("max_length", 0)


def test_a_row_becomes_work() -> None:
    work = workload_of_row(row(num_nodes=2, gpus_per_node=2, zero_stage=2, quantization="gptq-int4"))
    assert (work.world_size, work.zero_stage, work.quantization) == (4, 2, "gptq-int4")
    assert {each.name for each in work.adapted_linears} == {"c_attn", "c_proj", "w1", "w2"}
    full = workload_of_row(row(method="full", offload="optimizer+param", flash_attention="no"))
    assert full.method == "full"
    assert full.offload_optimizer
    assert full.offload_param
    assert not full.flash
    assert not full.adapted_linears


def test_a_pages_software_says_what_its_rows_do_not() -> None:
    stated = {"max_length": 4096, "lora_targets": "framework default (...)"}
    assert workload_of_row(row(**stated)).length_variation == 0
    swift = workload_of_row(row(**stated, source="ms-swift-benchmark"))
    assert 0 < swift.length_variation < 1
    assert {each.name for each in swift.adapted_linears} == {"c_attn"}
    half = workload_of_row(row(source="qwen-finetune", zero_stage=2, quantization="gptq-int4"))
    assert half.logit_bytes == 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "gpt-9"}, "'gpt-9' is not bundled"),
        ({"gpu": "A9000"}, "'A9000' is not in catalogue.toml"),
        ({"gpu": "cpu"}, "no bf16 peak"),
        ({"quantization": "int2"}, "quantization='int2'"),
        ({"max_length": ""}, "max_length=0"),
        ({"micro_batch_size": "many"}, "is not a number"),
    ],
)
def test_a_row_that_cannot_be_predicted_is_reported_and_not_a_traceback(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.csv", [*ROWS, row(id="odd", **changes)])
    found = compare(path, peers=False)
    (odd,) = found["unusable"]
    assert odd["id"] == "odd"
    assert reason in odd["reason"]
    assert found["memory_rows"] == len(ROWS)


def test_constants_of_a_stack_are_learned_from_its_other_rows() -> None:
    cases, _ = cases_of(ROWS)
    learned = figures([predict(case, *calibrated(cases)(case)) for case in cases])
    plain = figures([predict(case, MemoryParams(), TimeParams()) for case in cases])
    assert learned["memory_median_error"] < 0.01 < plain["memory_median_error"]
    assert learned["tgs_median_error"] < 0.02 < plain["tgs_median_error"]


def test_the_row_that_is_predicted_is_left_out() -> None:
    rows = [*ROWS[:6], planted(id="lone", source="other page", max_length=2048)]
    cases, _ = cases_of(rows)
    lone = cases[-1]
    for same in (itself, alike("model")):
        memory, time = calibrated(cases, same)(lone)
        assert memory.offset_bytes == pytest.approx(0.0)
        assert memory.activation_factor == pytest.approx(1.0)
        assert time.efficiency == pytest.approx(1.0)


def test_out_of_memory_is_said_of_what_does_not_fit() -> None:
    large = row(id="large", max_length=65536, out_of_memory="yes")
    fits = row(id="small", max_length=512, out_of_memory="yes")
    ran = row(id="ran", max_length=65536)
    cases, _ = cases_of([large, fits, ran])
    found = figures([predict(case, MemoryParams(), TimeParams()) for case in cases])
    assert (found["oom_rows"], found["oom_missed"], found["fits_refused"]) == (2, 1, 1)


def test_rows_of_a_batch_are_padded_to_the_longest() -> None:
    page = {"source": "llm-action-throughput", "max_length": 1024, "lora_targets": "unknown"}
    one, tokens = timed_workload_of_row(row(**page, micro_batch_size=1))
    assert (one.length_tokens, tokens) == (725, 725)
    eight, tokens = timed_workload_of_row(row(**page, micro_batch_size=8))
    assert tokens == 8 * 725
    assert one.length_tokens < eight.length_tokens < 1024


def test_more_rows_are_shorter_than_a_higher_limit() -> None:
    shares = [length_variation(3200.0, limit) for limit in (512, 1024, 2048, 4096, 8192)]
    assert shares == sorted(shares)
    assert shares[0] < 0.01
    assert shares[-1] > 0.95
    assert length_variation(None, 512) == 0


@pytest.mark.process
def test_the_command_prints_one_object_with_the_keys(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", ROWS)
    command = [sys.executable, "-m", "tests.benchmarks.planner", "--measurements", str(path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    keys = {
        "memory_median_error", "memory_p90_error", "tgs_median_error", "tgs_p90_error", "oom_missed",
        "fits_refused", "by_source", "worst",
    }  # fmt: skip
    assert keys <= set(found)
    assert found["by_source"]["synthetic"]["memory_rows"] == len(ROWS)
    # 16-bit LoRA has 1/100 of the model states that DeepSpeed's estimators count.
    assert found["deepspeed_estimators"]["memory_median_error"] > 1
    assert len(read(path)) == len(ROWS)
