"""Tables of a sweep in the layouts of published benchmarks, and a plain layout with all metrics.

Every layout has the columns of its page, in its order and units. Where the page has no column for it, the
spread over steps follows the value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from orchestrator.arch.flops import flops_per_token_xtuner
from orchestrator.arch.model_dims import ModelDims
from orchestrator.bench.results import Row
from orchestrator.bench.table import Column, Table, Value, spread_of

GIB, MIB, GB = 2.0**30, 2.0**20, 1e9
_WORDS = {"out_of_memory": "OOM", "failed": "failed"}


def table(layout: str, name: str, rows: Sequence[Row]) -> Table:
    """Return the table of a sweep.

    Args:
        layout: Key of `LAYOUTS`.
        name: Name of the sweep.
        rows: Results of the sweep.
    """
    return LAYOUTS[layout](name, rows)


def plain(name: str, rows: Sequence[Row]) -> Table:
    """Return a table of the fields that vary and all metrics."""
    fields = list(dict.fromkeys(field for row in rows for field in row.fields))
    columns = [
        *(Column(_last_part(field, fields)) for field in fields),
        Column("TGS", "tokens/GPU/s", form="{:.1f}"),
        spread_of("TGS"),
        Column("Step", "s", form="{:.3f}"),
        spread_of("Step"),
        Column("TFLOPs", "model", form="{:.4g}"),
        Column("MFU", form="{:.1%}"),
        Column("Peak allocated", "MiB", form="{:,.0f}"),
        Column("Peak reserved", "MiB", form="{:,.0f}"),
        Column("Peak host memory", "MiB", form="{:,.0f}"),
    ]

    def figures(row: Row) -> list[Value]:
        peaks = (
            _peak(row, name, MIB) for name in ("memory_peak", "memory_reserved_peak", "host_memory_peak")
        )
        return [
            *_with_spread(row, "tgs"),
            *_with_spread(row, "step_seconds"),
            _median(row, "tflops_model"),
            _median(row, "mfu"),
            *peaks,
        ]

    body = [(*(_plain(row.value(field)) for field in fields), *_outcome(row, figures)) for row in rows]
    return Table(name, columns, body, _notes(rows))


def xtuner(name: str, rows: Sequence[Row]) -> Table:
    """Return a table in the layout of XTuner's speed benchmark: TGS, and TFLOPS by XTuner's formula."""
    columns = [
        Column("Model"),
        Column("GPUs"),
        Column("Sequence length"),
        Column("SP"),
        Column("Attention over"),
        Column("TGS", "tokens/GPU/s", form="{:.1f}"),
        spread_of("TGS"),
        Column("TFLOPs", "XTuner's formula", form="{:.4g}"),
    ]
    body = [
        (
            model_name(row),
            row.setting("parallel.workers"),
            row.setting("data.max_length"),
            row.setting("parallel.sequence_parallel_size"),
            "pack" if row.setting("data.cross_document_attention") else "documents",
            *_outcome(row, lambda row: [*_with_spread(row, "tgs"), tflops_xtuner(row)]),
        )
        for row in rows
    ]
    notes = (
        "TFLOPs: TGS times XTuner's formula, which counts recomputation and attention over the whole pack; "
        "left out where attention stays inside documents.",
    )
    return Table(name, columns, body, (*notes, *_notes(rows)))


def tflops_xtuner(row: Row) -> float | None:
    """Return TFLOPS by XTuner's formula; None without cross-document attention, which it assumes."""
    tgs, shape = _median(row, "tgs"), row.shape
    if tgs is None or shape is None or not row.setting("data.cross_document_attention"):
        return None
    work = flops_per_token_xtuner(
        ModelDims(**shape),
        row.setting("data.max_length"),
        checkpointing=row.setting("model.gradient_checkpointing") == "full",
    )
    return tgs * work / 1e12


def qwen(name: str, rows: Sequence[Row]) -> Table:
    """Return a table in the layout of Qwen's finetuning page: memory and seconds per step by length."""
    lead = (Column("Model"), Column("Method"), Column("Nodes"), Column("GPUs"))

    def key(row: Row) -> tuple[Value, ...]:
        return model_name(row), method_name(row), _nodes(row, rows), row.setting("parallel.workers")

    parts = (Column("", "GiB", "memory", "{:.2f}G"), Column("", "s/it", "time", "{:.2f}s"))

    def figures(row: Row) -> list[Value]:
        each = _peak(row, "memory_reserved_peak", GIB)
        total = None if each is None else each * row.setting("parallel.workers")
        return [total, _median(row, "step_seconds")]

    notes = ("Memory: peak reserved of the fullest GPU, times the GPUs, as the page adds them up.",)
    return _by_length(name, rows, lead, key, (parts, figures), notes)


def ms_swift(name: str, rows: Sequence[Row]) -> Table:
    """Return a table in the layout of ms-swift's benchmark: minutes per run and memory in MiB."""
    columns = [
        Column("Model"),
        Column("Method"),
        Column("Max length"),
        Column("Batch size"),
        Column("Gradient checkpointing"),
        Column("LoRA rank"),
        Column("LoRA targets"),
        Column("Train time", "min", form="{:.2f}"),
        Column("GPU memory", "MiB", form="{:,.0f}"),
        Column("Step", "s", form="{:.3f}"),
        spread_of("Step"),
    ]

    def figures(row: Row) -> list[Value]:
        minutes = (row.seconds["data"] + row.seconds["training"]) / 60.0
        return [minutes, _peak(row, "memory_reserved_peak", MIB), *_with_spread(row, "step_seconds")]

    body = [
        (
            model_name(row),
            method_name(row),
            row.setting("data.max_length"),
            row.setting("optim.micro_batch_size"),
            row.setting("model.gradient_checkpointing"),
            row.setting("method.rank") if _is_lora(row) else None,
            _plain(row.setting("method.target_modules")) if _is_lora(row) else None,
            *_outcome(row, figures),
        )
        for row in rows
    ]
    notes = (
        "Train time: tokenising, packing, starting the workers and all steps. Cells of a sweep share what is "
        "tokenised, so only the first one with its data pays for it.",
        "GPU memory: peak reserved of the fullest GPU.",
    )
    return Table(name, columns, body, (*notes, *_notes(rows)))


def llm_action(name: str, rows: Sequence[Row]) -> Table:
    """Return a table in the layout of llm-action's throughput page: samples/s, tokens/s, hours, MB."""
    columns = [
        Column("GPU"),
        Column("GPUs"),
        Column("Model"),
        Column("Method"),
        Column("Max length"),
        Column("Batch size"),
        Column("Throughput", "samples/s", "samples", "{:.2f}"),
        Column("Throughput", "tokens/s", "tokens", "{:.1f}"),
        spread_of("Throughput"),
        Column("Train time", "h, one epoch", form="{:.3g}"),
        Column("GPU memory", "MB", form="{:,.0f}"),
    ]

    def figures(row: Row) -> list[Value]:
        tgs, spread = _with_spread(row, "tgs")
        tokens = tgs * row.setting("parallel.workers") if tgs else None
        seconds = epoch_seconds(row)
        documents = row.packing.get("documents")
        return [
            documents / seconds if documents and seconds else None,
            tokens,
            spread,
            seconds / 3600.0 if seconds else None,
            _peak(row, "memory_reserved_peak", MIB),
        ]

    body = [
        (
            ", ".join(row.environment.get("devices", ())) or None,
            row.setting("parallel.workers"),
            model_name(row),
            method_name(row),
            row.setting("data.max_length"),
            row.setting("optim.micro_batch_size"),
            *_outcome(row, figures),
        )
        for row in rows
    ]
    notes = (
        "Throughput is that of all GPUs together; a sample is a document in the packs.",
        "Train time: one pass over the data at the median rate.",
        "GPU memory: peak reserved of the fullest GPU; MB are 2^20 bytes, as nvidia-smi prints them.",
    )
    return Table(name, columns, body, (*notes, *_notes(rows)))


def llama2_lora(name: str, rows: Sequence[Row]) -> Table:
    """Return a table in the layout of the Llama-2 LoRA page for an RTX 3090: batch size by length."""
    lead = (Column("Model"), Column("Method"), Column("Batch size"))

    def key(row: Row) -> tuple[Value, ...]:
        return model_name(row), method_name(row), row.setting("optim.micro_batch_size")

    parts = (
        Column("", "GB", "memory", "{:.2f}"),
        Column("", "s", "time", "{:.1f}"),
        Column("", "tokens/s", "rate", "{:.0f}"),
    )

    def figures(row: Row) -> list[Value]:
        return [_peak(row, "memory_reserved_peak", GB), epoch_seconds(row), _median(row, "tgs")]

    notes = (
        "Memory: peak reserved, in 10^9 bytes. Time: a pass over the data at the median rate. Rate: per GPU.",
    )
    return _by_length(name, rows, lead, key, (parts, figures), notes)


LAYOUTS: Mapping[str, Callable[[str, Sequence[Row]], Table]] = {
    "plain": plain,
    "xtuner": xtuner,
    "qwen": qwen,
    "ms-swift": ms_swift,
    "llm-action": llm_action,
    "llama2-lora": llama2_lora,
}


def model_name(row: Row) -> str:
    """Return the last part of the model's path."""
    return str(row.setting("model.path")).rstrip("/").rpartition("/")[2]


def method_name(row: Row) -> str:
    """Return the training method as published pages name it, such as `full, ZeRO-3` or `Q-LoRA nf4`."""
    if not _is_lora(row):
        offloaded = row.setting("parallel.offload_optimizer") == "cpu"
        return f"full, ZeRO-{row.setting('parallel.zero_stage')}" + (" offload" if offloaded else "")
    quantization = row.setting("method.quantization")
    name = "LoRA" if quantization in (None, "none") else f"Q-LoRA {quantization}"
    return f"{name} (emb)" if row.setting("method.train_embeddings") else name


def epoch_seconds(row: Row) -> float | None:
    """Return the seconds of one epoch at the median TGS of all workers; None if it was not measured."""
    tgs, tokens = _median(row, "tgs"), row.packing.get("tokens_kept")
    return tokens / (tgs * row.setting("parallel.workers")) if tgs and tokens else None


def _by_length(
    name: str,
    rows: Sequence[Row],
    lead: Sequence[Column],
    key: Callable[[Row], tuple[Value, ...]],
    cell: tuple[Sequence[Column], Callable[[Row], list[Value]]],
    notes: tuple[str, ...],
) -> Table:
    """Return a table with columns per length; of rows with the same key and length, the last is shown.

    Args:
        name: Title of the table.
        rows: Results of the sweep.
        lead: Columns that identify a line.
        key: Returns the values of the lead columns for a row.
        cell: Columns for each length, and a function that returns their values.
        notes: Notes below the table.
    """
    parts, figures = cell
    lengths = sorted({row.setting("data.max_length") for row in rows})
    columns = [*lead, *(Column(str(size), p.unit, p.part, p.form) for size in lengths for p in parts)]
    lines: dict[tuple[Value, ...], dict[int, list[Value]]] = {}
    doubled = False
    for row in rows:
        line = lines.setdefault(key(row), {})
        doubled |= row.setting("data.max_length") in line
        line[row.setting("data.max_length")] = _outcome(row, figures)
    nothing: list[Value] = [None] * len(parts)
    body = [
        (*head, *(value for size in lengths for value in line.get(size, nothing)))
        for head, line in lines.items()
    ]
    if doubled:
        notes += (
            "Cells differ in more than this layout shows, and the last of each is shown; see layout plain.",
        )
    return Table(name, columns, body, (*notes, *_notes(rows)))


def _outcome(row: Row, figures: Callable[[Row], list[Value]]) -> list[Value]:
    """Return the values of a row; for a failed cell its status followed by empty values."""
    if row.status == "ok":
        return figures(row)
    return [_WORDS[row.status], *([None] * (len(figures(_EMPTY)) - 1))]


_EMPTY = Row("", {}, {"parallel": {"workers": 1}}, "ok", seconds={"data": 0.0, "training": 0.0})


def _notes(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return notes common to all layouts: the statistics used, the hardware, and the failures."""
    rows = list(rows)
    notes = []
    if any(row.samples for row in rows):
        notes.append(
            "Figures are medians over the steps after warm-up; ± is half the distance of the quartiles."
        )
    machines = dict.fromkeys(_machine(row) for row in rows if row.environment.get("devices"))
    notes += [f"Measured on {machine}." for machine in machines]
    if any(row.status == "out_of_memory" for row in rows):
        notes.append("OOM: a worker needed more memory than it may have.")
    notes += [f"failed: {row.cell}: {row.reason}" for row in rows if row.status == "failed"]
    return tuple(notes)


def _machine(row: Row) -> str:
    """Return a line with the hardware, software versions and commit of a row."""
    found = row.environment
    versions = found.get("versions", {})
    parts = [
        ", ".join(found["devices"]),
        f"{found.get('cpu')} with {found.get('cores')} cores and {found.get('memory_gib')} GiB",
        *(f"{name} {versions[name]}" for name in ("torch", "deepspeed", "ray") if name in versions),
        f"commit {found['commit']}" if found.get("commit") else "",
    ]
    return "; ".join(filter(None, parts))


def _with_spread(row: Row, name: str) -> tuple[float | None, float | None]:
    reading = row.reading(name)
    return (reading.median, reading.spread) if reading else (None, None)


def _median(row: Row, name: str) -> float | None:
    return _with_spread(row, name)[0]


def _peak(row: Row, name: str, unit_bytes: float) -> float | None:
    found = row.peaks.get(f"{name}_bytes")
    return None if found is None else found / unit_bytes


def _nodes(row: Row, rows: Iterable[Row]) -> int | None:
    """Return the number of nodes of a row, or of another with equal workers if it failed too early."""
    workers = row.setting("parallel.workers")
    alike = (each for each in (row, *rows) if each.setting("parallel.workers") == workers)
    return next((n for each in alike if (n := each.environment.get("nodes"))), None)


def _is_lora(row: Row) -> bool:
    return str(row.setting("method.type")) == "lora"


def _last_part(field: str, fields: Sequence[str]) -> str:
    """Return the last part of a dotted name, or the whole name if another field has the same last part."""
    last = field.rpartition(".")[2]
    return last if [each.rpartition(".")[2] for each in fields].count(last) == 1 else field


def _plain(value: object) -> Value:
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value)
