"""Tables have the columns of the published pages, and values that match manual calculations."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from orchestrator.bench import layouts
from orchestrator.bench.table import Column, Table, spread_of
from tests.unit.bench.rows import row, without_figures


def as_rows(table: Table) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(table.json())["rows"]
    return found


def test_markdown_csv_and_json_are_of_the_same_values() -> None:
    columns = (
        Column("name"),
        Column("speed", "m/s", form="{:.1f}"),
        spread_of("speed"),
        Column("left", form="{:d}"),
    )
    table = Table("Cars", columns, [("a|b", 2.25, 0.031, None), ("c", "OOM", None, 3)], ["a note"])
    assert table.markdown().splitlines() == [
        "## Cars",
        "",
        "| name | speed (m/s) | left |",
        "| ---- | ----------: | ---: |",
        "| a\\|b |   2.2 ±3.1% |    - |",
        "| c    |         OOM |    3 |",
        "",
        "- a note",
    ]
    assert table.csv().splitlines() == ["name,speed (m/s),speed spread,left", "a|b,2.25,0.031,", "c,OOM,,3"]
    assert json.loads(table.json()) == {
        "title": "Cars",
        "columns": ["name", "speed (m/s)", "speed spread", "left"],
        "rows": [
            {"name": "a|b", "speed (m/s)": 2.25, "speed spread": 0.031, "left": None},
            {"name": "c", "speed (m/s)": "OOM", "speed spread": None, "left": 3},
        ],
        "notes": ["a note"],
    }


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_has_a_value_for_every_column_and_a_name_for_each(layout: str) -> None:
    rows = [
        row("a", {"data.max_length": 1024}, data__max_length=1024),
        without_figures("out_of_memory", "b", {"data.max_length": 2048}, data__max_length=2048),
        without_figures("failed", "c", {"data.max_length": 4096}, data__max_length=4096),
    ]
    table = layouts.table(layout, "sweep", rows)
    names = [column.name for column in table.columns]
    assert len(set(names)) == len(names)
    assert all(len(line) == len(names) for line in table.rows)
    text = table.markdown()
    assert "OOM" in text
    assert "failed: c: the reason" in text
    assert len(list(csv.reader(table.csv().splitlines()))) == len(table.rows) + 1


def test_plain_shows_what_varies_and_the_quartiles() -> None:
    (found,) = as_rows(layouts.table("plain", "s", [row(fields={"data.max_length": 512})]))
    assert found["max_length"] == 512
    assert found["TGS (tokens/GPU/s)"] == 100.0
    assert found["TGS spread"] == pytest.approx((110.0 - 95.0) / 2 / 100.0)
    assert found["Step (s)"] == 2.0
    assert found["Peak allocated (MiB)"] == 3072
    assert found["Peak reserved (MiB)"] == 4096
    assert found["Peak host memory (MiB)"] == 5120


def test_fields_of_the_same_last_name_are_told_apart() -> None:
    fields = {"data.train.0.path": "a", "model.path": "b"}
    assert layouts.table("plain", "s", [row(fields=fields)]).columns[0].header == "data.train.0.path"


def test_xtuner_prints_its_own_tflops() -> None:
    published = row(
        tgs=3028.3, data__max_length=8192, data__packing="concat", data__cross_document_attention=True
    )
    (found,) = as_rows(layouts.table("xtuner", "s", [published]))
    assert found["Model"] == "Llama-2-7b-hf"
    assert found["Attention over"] == "pack"
    assert found["TFLOPs (XTuner's formula)"] == pytest.approx(185.3, rel=1e-3)


def test_xtuners_formula_is_not_applied_to_attention_inside_documents() -> None:
    (found,) = as_rows(layouts.table("xtuner", "s", [row(data__max_length=8192)]))
    assert found["Attention over"] == "documents"
    assert found["TFLOPs (XTuner's formula)"] is None


def test_qwen_has_a_column_for_each_length_and_adds_memory_up() -> None:
    many = {"parallel__workers": 2, "optim__global_batch_size": 16}
    rows = [
        row("a", data__max_length=256, **many),
        row("b", data__max_length=512, method__type="lora"),
        without_figures("out_of_memory", "c", data__max_length=512, **many),
        row("d", data__max_length=512, method__type="lora", method__train_embeddings=True),
    ]
    found = as_rows(layouts.table("qwen", "s", rows))
    assert [each["Method"] for each in found] == ["full, ZeRO-3", "LoRA", "LoRA (emb)"]
    assert found[0]["256 memory (GiB)"] == 8.0, "4 GiB on each of two GPUs"
    assert found[0]["256 time (s/it)"] == 2.0
    assert found[0]["512 memory (GiB)"] == "OOM"
    assert found[0]["Nodes"] == 1, "known from the cell of the same kind that ran"
    assert found[1]["256 memory (GiB)"] is None
    assert "  8.00G / 2.00s |" in layouts.table("qwen", "s", rows).markdown()


def test_cells_that_fall_into_one_place_are_owned_up_to() -> None:
    rows = [row("a", data__max_length=256), row("b", data__max_length=256, optim__lr=0.1)]
    assert any("more than this layout shows" in note for note in layouts.table("qwen", "s", rows).notes)


def test_ms_swift_counts_tokenising_and_training_in_minutes() -> None:
    (found,) = as_rows(layouts.table("ms-swift", "s", [row(method__type="lora", method__rank=4)]))
    assert found["Train time (min)"] == 3.0
    assert found["GPU memory (MiB)"] == 4096
    assert (found["LoRA rank"], found["LoRA targets"]) == (4, "all-linear")
    (full,) = as_rows(layouts.table("ms-swift", "s", [row()]))
    assert full["LoRA rank"] is None


def test_llm_action_counts_all_gpus_and_one_epoch() -> None:
    two = row(tgs=100.0, parallel__workers=2, parallel__offload_optimizer="cpu")
    (found,) = as_rows(layouts.table("llm-action", "s", [two]))
    assert found["Method"] == "full, ZeRO-3 offload"
    assert found["Throughput tokens (tokens/s)"] == 200.0
    assert found["Throughput samples (samples/s)"] == pytest.approx(40 / 30.0), "6,000 tokens take 30 s"
    assert found["Train time (h, one epoch)"] == pytest.approx(30.0 / 3600)
    assert found["GPU memory (MB)"] == 4096


def test_llama2_lora_is_batch_size_by_length() -> None:
    rows = [
        row("a", data__max_length=64, optim__micro_batch_size=4),
        row("b", data__max_length=128, optim__micro_batch_size=4),
        without_figures("out_of_memory", "c", data__max_length=128, optim__micro_batch_size=8),
    ]
    found = as_rows(layouts.table("llama2-lora", "s", rows))
    assert [each["Batch size"] for each in found] == [4, 8]
    assert found[0]["64 memory (GB)"] == pytest.approx(4.294967296)
    assert found[0]["64 time (s)"] == 60.0
    assert (found[1]["64 memory (GB)"], found[1]["128 memory (GB)"]) == (None, "OOM")


def test_a_quantised_base_is_named() -> None:
    quantised = row(method__type="lora")
    method = {**quantised.job["method"], "quantization": "nf4"}
    from dataclasses import replace

    assert layouts.method_name(replace(quantised, job={**quantised.job, "method": method})) == "Q-LoRA nf4"


def test_plots_are_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    from orchestrator.bench.plots import draw

    one = [row("a", data__max_length=256)]
    assert [path.name for path in draw(one, tmp_path, "s")] == ["step_time_by_phase.svg"]
    lengths = [
        *one,
        without_figures("out_of_memory", "b", data__max_length=1024),
        row("c", data__max_length=512),
    ]
    lengths.append(row("d", {"parallel.workers": 2}, data__max_length=512, parallel__workers=2))
    drawn = {path.stem: path.read_text() for path in draw(lengths, tmp_path, "s")}
    assert list(drawn) == [
        "memory_over_length",
        "tgs_over_length",
        "scaling_over_workers",
        "step_time_by_phase",
    ]
    assert "out of memory" in drawn["memory_over_length"]
    again = {path.stem: path.read_text() for path in draw(lengths, tmp_path, "s")}
    assert again == drawn, "the same figures give the same file"
    assert draw([without_figures("failed", "e")], tmp_path, "s") == []


def test_the_lines_of_a_plot_are_told_apart_by_what_does_not_follow_from_the_rest() -> None:
    from orchestrator.bench.plots import _series

    rows = []
    for workers, length, size in ((1, 512, 1), (2, 512, 1), (1, 1024, 1), (2, 1024, 2)):
        fields = {
            "data.max_length": length,
            "parallel.workers": workers,
            "parallel.sequence_parallel_size": size,
            "optim.global_batch_size": 8 * workers,
        }
        changes = {name.replace(".", "__"): value for name, value in fields.items()}
        rows.append(row(f"{workers}-{length}", fields, **changes))
    lengths, workers_ = _series(rows, "data.max_length"), _series(rows, "parallel.workers")
    assert {name: len(line) for name, line in lengths.items()} == {"workers 1": 2, "workers 2": 2}
    assert {name: len(line) for name, line in workers_.items()} == {"max_length 512": 2, "max_length 1024": 2}
