"""Checks that data, model and adapter of a job exist on this machine, before anything is started."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from orchestrator.arch.hf_config import local_config
from orchestrator.checks.folders import run_dir_of
from orchestrator.config.eval_sets import all_sources
from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec, ModelSpec
from orchestrator.config.validation import Problem
from orchestrator.data.model_tokenizer import with_chat_template
from orchestrator.data.sources import source_problem
from orchestrator.errors import SpecError

# File names of weights that transformers looks for in a model folder, in this order.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER = ("tokenizer*", "*.model", "vocab*", "merges.txt", "*.tiktoken", "spiece*")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_Value = TypeVar("_Value")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def input_problems(job: JobSpec) -> Iterator[Problem]:
    """Yield a problem for each input of the job that is missing or invalid on this machine.

    Relative paths are relative to the working directory. URIs and hub names are not checked.

    Yields:
        The field, and a message with value, rule and remedy.
    """
    for field, source in all_sources(job):
        if message := _run_check(source_problem, source, f"data file {source.path}"):
            yield (f"{field}.path", field), message
    if message := _template_problem(job):
        yield ("data.chat_template",), message
    label = f"model.path={job.model.path}"
    if message := _run_check(_model_problem, job.model, label) or _run_check(_missing_weights, job, label):
        yield ("model.path",), message
    adapter = job.method.adapter
    if adapter and (message := _run_check(_adapter_problem, adapter, f"method.adapter={adapter}")):
        yield ("method.adapter",), message


def _template_problem(job: JobSpec) -> str | None:
    try:
        with_chat_template(job)
    except SpecError as error:
        return error.problems[0]
    return None


def require_inputs(job: JobSpec) -> None:
    """Raise an error for a job with missing inputs.

    Raises:
        SpecError: All missing or invalid inputs.
    """
    problems = [message for _, message in input_problems(job)]
    if problems:
        raise SpecError(*problems)


def is_hub_name(path: str) -> bool:
    """Return whether a model path that does not exist locally can be a hub name."""
    return not path.startswith("builtin/") and _HUB_NAME.fullmatch(path) is not None


def _run_check(check: Callable[[_Value], str | None], value: _Value, label: str) -> str | None:
    """Return the problem that a check finds, or that the files could not be read."""
    try:
        return check(value)
    except OSError as error:
        return f"{label} cannot be read ({error.strerror}); check the path and its permissions"


def _model_problem(model: ModelSpec) -> str | None:
    folder, label = resolve(model.path), f"model.path={model.path}"
    if not folder.exists():
        if is_hub_name(model.path):
            return None
        return f"{label} does not exist; use an existing folder, or a hub name"
    if not folder.is_dir():
        return f"{label} is a file; use a folder in Hugging Face format, or a hub name"
    if not (folder / "config.json").is_file():
        return f"{label} has no config.json; use a folder in Hugging Face format"
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{label} has a config.json that is not valid JSON ({error}); download the model again"
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER):
        return f"{label} has no tokenizer; add its tokenizer.json and tokenizer_config.json to the folder"
    return None


def _missing_weights(job: JobSpec) -> str | None:
    """Return which weight files are missing, unless the run resumes from a checkpoint of all weights."""
    folder, checkpoints = resolve(job.model.path), run_dir_of(job) / "checkpoints"
    resumes = job.method.type == "full" and any(checkpoints.glob("step-*/manifest.json"))
    custom_file_names = "transformers_weights" in (local_config(job.model.path) or {})
    if not folder.is_dir() or job.model.weights == "random" or resumes or custom_file_names:
        return None
    return _weights_problem(folder, f"model.path={job.model.path}")


def _weights_problem(folder: Path, label: str) -> str | None:
    name = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        return (
            f"{label} has no weights ({_WEIGHTS[0]}, {_WEIGHTS[2]} or their index.json); download them, "
            "use a folder that has them, or set model.weights: random"
        )
    if not name.endswith(".index.json"):
        return None
    try:
        shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{label} has an invalid {name}; download it again"
    if missing := sorted(shard for shard in map(str, shards) if not (folder / shard).is_file()):
        return (
            f"{label} lacks {len(missing)} of the {len(shards)} weight files in {name} "
            f"({', '.join(missing[:3])}); download them"
        )
    return None


def _adapter_problem(path: str) -> str | None:
    folder, label = resolve(path), f"method.adapter={path}"
    if not folder.is_dir():
        return f"{label} is not an existing folder; use the folder of a peft adapter"
    if missing := [name for name in _ADAPTER if not (folder / name).is_file()]:
        return f"{label} has no {' and no '.join(missing)}; use the folder of a peft adapter"
    return None
