"""README.md of an export: base model, data, settings and results, without local paths."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from orchestrator.atomic_files import read_lines
from orchestrator.config.eval_sets import eval_sources
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.metrics.meter import last_attempt
from orchestrator.run.recorder import EVALUATIONS, STEPS

Rows = Sequence[Mapping[str, float]]
Kind = Literal["model", "adapter", "merged"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENCE = ("license", "license_name", "license_link")
_STEP_FIELDS = {"step", "attempt", "loss", "tokens", "trained_tokens"}
_TITLES = {
    "model": "full fine-tuning",
    "adapter": "a LoRA adapter",
    "merged": "a LoRA adapter merged into its base model",
}


@dataclass(frozen=True)
class ModelCardData:
    """The data of a model card.

    Attributes:
        job: The run's job.
        kind: Kind of export.
        step: Optimizer steps of the exported checkpoint.
        dtype: Dtype of the weights.
        parameters: Number of parameters in the files.
        base_card: Front matter of the base model's card.
        steps: Rows of steps.jsonl up to the exported step, one a step.
        evaluations: Rows of evaluations.jsonl up to the exported step.
    """

    job: JobSpec
    kind: Kind
    step: int
    dtype: str
    parameters: int
    base_card: Mapping[str, object]
    steps: Rows = ()
    evaluations: Rows = ()


def history_until(run_dir: Path, step: int) -> tuple[Rows, Rows]:
    """Return the rows of steps.jsonl and evaluations.jsonl up to a step; of a repeated step the last."""
    steps = [row for row in read_lines(run_dir / STEPS) if row.keys() >= _STEP_FIELDS]
    evaluations = [
        row for row in read_lines(run_dir / EVALUATIONS) if row.keys() >= {"step", "evaluation_loss"}
    ]
    return (
        last_attempt([row for row in steps if row["step"] <= step]),
        [row for row in evaluations if row["step"] <= step],
    )


def hub_name(path: str) -> str | None:
    """Return the hub name of a model; None if it is a directory or builtin."""
    is_local = path.startswith(("builtin/", "/", ".", "~")) or os.path.exists(path)
    return path if _HUB_NAME.fullmatch(path) and not is_local else None


def model_card(data: ModelCardData) -> str:
    """Return a model card with the front matter of the hub."""
    front = yaml.safe_dump(_front_matter(data), sort_keys=False, allow_unicode=True)
    job, base = data.job, _public_name(data.job.model.path)
    origin = "random weights with the configuration of" if job.model.weights == "random" else "of"
    sections = [
        f"---\n{front}---\n",
        f"# {job.name}\n",
        f"The result of {_TITLES[data.kind]} {origin} `{base}`, after {data.step:,} optimizer steps: "
        f"{data.parameters:,} parameters in {data.dtype}.\n",
        f"## Results\n\n{_table(_results(data))}\n",
        f"## Data\n\n{_sources(job.data.train)}\n",
        *([f"Held out for evaluation:\n\n{_evaluation(job)}\n"] if job.eval else []),
        f"## Settings\n\n```yaml\n{yaml.safe_dump(_settings(job), sort_keys=False)}```\n",
    ]
    return "\n".join(sections)


def _front_matter(data: ModelCardData) -> dict[str, object]:
    base = hub_name(data.job.model.path)
    licence = {name: data.base_card[name] for name in _LICENCE if isinstance(data.base_card.get(name), str)}
    base_model: dict[str, str] = {}
    if base is not None and data.job.model.weights == "pretrained":
        base_model = {
            "base_model": base,
            "base_model_relation": "adapter" if data.kind == "adapter" else "finetune",
        }
    method = ["lora"] if data.job.method.type == "lora" else []
    return {
        **base_model,
        **licence,
        "library_name": "peft" if data.kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orchestrator", "sft", *method],
    }


def _public_name(path: str) -> str:
    """Return what is published of a path: a hub or builtin name as it is, of a local path the last part."""
    if path.startswith("builtin/") or ("://" not in path and hub_name(path)):
        return path
    return path.split("?")[0].rstrip("/").rpartition("/")[2]


def _results(data: ModelCardData) -> dict[str, str]:
    steps, evaluations = data.steps, data.evaluations
    results = {"optimizer steps": f"{data.step:,}"}
    if steps:
        results["training loss, first step"] = f"{steps[0]['loss']:.4f}"
        results["training loss, last step"] = f"{steps[-1]['loss']:.4f}"
        results["tokens read"] = f"{int(sum(row['tokens'] for row in steps)):,}"
        results["tokens trained on"] = f"{int(sum(row['trained_tokens'] for row in steps)):,}"
    if evaluations:
        last = evaluations[-1]
        results["evaluation loss"] = f"{last['evaluation_loss']:.4f} (step {int(last['step']):,})"
        sets = last.get("evaluation_losses")
        if isinstance(sets, Mapping) and len(sets) > 1:
            results |= {f"evaluation loss, {name}": f"{loss:.4f}" for name, loss in sets.items()}
        results["lowest evaluation loss"] = f"{min(row['evaluation_loss'] for row in evaluations):.4f}"
    return results


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _sources(sources: Sequence[SourceSpec]) -> str:
    lines = []
    for source in sources:
        options = {
            "format": source.format,
            "split": source.split,
            "subset": source.subset,
            "sample": source.sample,
        }
        details = [f"{name} {value}" for name, value in options.items() if value not in (None, "auto")]
        passes = source.weight * source.repeat
        details += [f"{passes:g} passes an epoch"] if passes != 1 else []
        lines.append(f"- `{_public_name(source.path)}`" + (f" ({', '.join(details)})" if details else ""))
    return "\n".join(lines)


def _evaluation(job: JobSpec) -> str:
    share, sources = job.eval and job.eval.share, [source for _, source in eval_sources(job)]
    lines = [f"- {share:g} of the rows above, chosen by a hash of their content"] if share else []
    return "\n".join([*lines, *([_sources(sources)] if sources else [])])


def _settings(job: JobSpec) -> dict[str, object]:
    """Return the settings that determine the result; not those of hardware, storage and environment."""
    document = job.model_dump(mode="json")
    method, data = dict(document["method"]), dict(document["data"])
    if method["type"] == "full":
        method = {"type": "full"}
    elif method.get("adapter"):
        method["adapter"] = _public_name(method["adapter"])
    data.pop("train")
    names = ("workers", "sequence_parallel_size", "zero_stage", "offload_optimizer", "offload_param")
    parallel = {name: document["parallel"][name] for name in names}
    return {
        "method": method,
        "data": data,
        "optim": document["optim"],
        "parallel": parallel,
        "seed": document["run"]["seed"],
    }
