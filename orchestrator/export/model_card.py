"""README.md of an export: what it was made of, how, and what it reached, without paths of the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from orchestrator.atomic_files import read_lines
from orchestrator.config.schema import JobSpec, SourceSpec
from orchestrator.metrics.meter import last_attempt
from orchestrator.run.recorder import EVALUATIONS, STEPS

Rows = Sequence[Mapping[str, Any]]
Kind = Literal["model", "adapter", "merged"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENCE = ("license", "license_name", "license_link")
_OF_A_STEP = {"step", "attempt", "loss", "tokens", "trained_tokens"}
_TITLES = {
    "model": "full fine-tuning",
    "adapter": "a LoRA adapter",
    "merged": "a LoRA adapter merged into its base model",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        job: The run's job.
        kind: What is exported.
        step: Optimizer steps that the exported weights have had.
        dtype: Number format of the weights.
        parameters: Parameters in the files.
        base_card: Front matter of the base model's own card.
        steps: Rows of steps.jsonl up to the exported step, one a step.
        evaluations: Rows of evaluations.jsonl up to the exported step.
    """

    job: JobSpec
    kind: Kind
    step: int
    dtype: str
    parameters: int
    base_card: Mapping[str, Any]
    steps: Rows = ()
    evaluations: Rows = ()


def rows_until(run: Path, step: int) -> tuple[Rows, Rows]:
    """Return the steps and evaluations of a run up to a step; of a step that was done twice, the last."""
    rows = [row for row in read_lines(run / STEPS) if row.keys() >= _OF_A_STEP and row["step"] <= step]
    evaluated = [row for row in read_lines(run / EVALUATIONS) if row.keys() >= {"step", "evaluation_loss"}]
    return last_attempt(rows), [row for row in evaluated if row["step"] <= step]


def hub_name(path: str) -> str | None:
    """Return a model's name on the hub; None for a folder or what this package ships."""
    is_local = path.startswith(("builtin/", "/", ".", "~")) or os.path.exists(path)
    return path if _HUB_NAME.fullmatch(path) and not is_local else None


def model_card(facts: CardFacts) -> str:
    """Return a model card with front matter as the hub reads it."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    job, base = facts.job, _name(facts.job.model.path)
    origin = "random weights with the configuration of" if job.model.weights == "random" else "of"
    sections = [
        f"---\n{front}---\n",
        f"# {job.name}\n",
        f"The result of {_TITLES[facts.kind]} {origin} `{base}`, after {facts.step:,} optimizer steps: "
        f"{facts.parameters:,} parameters in {facts.dtype}.\n",
        f"## Results\n\n{_table(_results(facts))}\n",
        f"## Data\n\n{_sources(job.data.train)}\n",
        *([f"Held out for evaluation:\n\n{_sources(job.eval.data)}\n"] if job.eval else []),
        f"## Settings\n\n```yaml\n{yaml.safe_dump(_settings(job), sort_keys=False)}```\n",
    ]
    return "\n".join(sections)


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    base = hub_name(facts.job.model.path)
    licence = {name: facts.base_card[name] for name in _LICENCE if isinstance(facts.base_card.get(name), str)}
    found: dict[str, Any] = {}
    if base is not None and facts.job.model.weights == "pretrained":
        found |= {
            "base_model": base,
            "base_model_relation": "adapter" if facts.kind == "adapter" else "finetune",
        }
    method = ["lora"] if facts.job.method.type == "lora" else []
    return {
        **found,
        **licence,
        "library_name": "peft" if facts.kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orchestrator", "sft", *method],
    }


def _name(path: str) -> str:
    """Return what may be told of a path: a hub's or builtin name whole, of a file or folder its last part."""
    if path.startswith("builtin/") or ("://" not in path and hub_name(path)):
        return path
    return path.split("?")[0].rstrip("/").rpartition("/")[2]


def _results(facts: CardFacts) -> dict[str, str]:
    steps, evaluations = facts.steps, facts.evaluations
    found = {"optimizer steps": f"{facts.step:,}"}
    if steps:
        found["training loss, first step"] = f"{steps[0]['loss']:.4f}"
        found["training loss, last step"] = f"{steps[-1]['loss']:.4f}"
        found["tokens read"] = f"{int(sum(row['tokens'] for row in steps)):,}"
        found["tokens trained on"] = f"{int(sum(row['trained_tokens'] for row in steps)):,}"
    if evaluations:
        last = evaluations[-1]
        found["evaluation loss"] = f"{last['evaluation_loss']:.4f} (step {int(last['step']):,})"
        found["lowest evaluation loss"] = f"{min(row['evaluation_loss'] for row in evaluations):.4f}"
    return found


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _sources(sources: Sequence[SourceSpec]) -> str:
    lines = []
    for source in sources:
        told = {
            "format": source.format,
            "split": source.split,
            "subset": source.subset,
            "sample": source.sample,
        }
        details = [f"{name} {value}" for name, value in told.items() if value not in (None, "auto")]
        passes = source.weight * source.repeat
        details += [f"{passes:g} passes an epoch"] if passes != 1 else []
        lines.append(f"- `{_name(source.path)}`" + (f" ({', '.join(details)})" if details else ""))
    return "\n".join(lines)


def _settings(job: JobSpec) -> dict[str, Any]:
    """Return the settings that decide what was trained; nothing of machines, storage or environments."""
    whole = job.model_dump(mode="json")
    method, data = dict(whole["method"]), dict(whole["data"])
    if method["type"] == "full":
        method = {"type": "full"}
    elif method.get("adapter"):
        method["adapter"] = _name(method["adapter"])
    data.pop("train")
    names = ("workers", "sequence_parallel_size", "zero_stage", "offload_optimizer", "offload_param")
    parallel = {name: whole["parallel"][name] for name in names}
    return {
        "method": method,
        "data": data,
        "optim": whole["optim"],
        "parallel": parallel,
        "seed": whole["run"]["seed"],
    }
