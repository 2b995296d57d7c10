"""What a job reads from this machine: data, model, adapter. Found missing here before anything is started."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from orchestrator.arch.hf_config import local_config
from orchestrator.checks.folders import run_folder
from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec, ModelSpec
from orchestrator.config.validation import Problem
from orchestrator.data.sources import source_problem
from orchestrator.errors import SpecError

# The names by which transformers finds weights in a folder.
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
    """Yield what a job names and this machine does not have.

    Relative paths count from the working directory. URIs and names of the hub are not looked up.

    Yields:
        The field concerned, and one sentence with value, rule and remedy.
    """
    groups = (("data.train", job.data.train), ("eval.data", job.eval.data if job.eval else ()))
    for field, sources in groups:
        for number, source in enumerate(sources):
            if sentence := _checked(source_problem, source, f"data file {source.path}"):
                yield (f"{field}.{number}.path", f"{field}.{number}"), sentence
    where = f"model.path={job.model.path}"
    if sentence := _checked(_model_problem, job.model, where) or _checked(_lost_weights, job, where):
        yield ("model.path",), sentence
    adapter = job.method.adapter
    if adapter and (sentence := _checked(_adapter_problem, adapter, f"method.adapter={adapter}")):
        yield ("method.adapter",), sentence


def require_inputs(job: JobSpec) -> None:
    """Refuse a job that names what is not there.

    Raises:
        SpecError: With everything that is missing.
    """
    problems = [sentence for _, sentence in input_problems(job)]
    if problems:
        raise SpecError(*problems)


def is_hub_name(path: str) -> bool:
    """Tell whether a model's path that is not on this disk can be a name on the hub."""
    return not path.startswith("builtin/") and _HUB_NAME.fullmatch(path) is not None


def _checked(check: Callable[[_Value], str | None], value: _Value, what: str) -> str | None:
    """Return what a check finds, or that it could not look."""
    try:
        return check(value)
    except OSError as error:
        return f"{what} cannot be read ({error.strerror}); check the path and its permissions"


def _model_problem(model: ModelSpec) -> str | None:
    folder, where = resolve(model.path), f"model.path={model.path}"
    if not folder.exists():
        return (
            None
            if is_hub_name(model.path)
            else f"{where} is not there; name an existing folder, or a hub model"
        )
    if not folder.is_dir():
        return f"{where} is a file; name a folder in Hugging Face format, or a hub model"
    if not (folder / "config.json").is_file():
        return f"{where} has no config.json; name a folder in Hugging Face format"
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{where} has a config.json that is not valid JSON ({error}); download the model again"
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER):
        return f"{where} has no tokenizer; put its tokenizer.json and tokenizer_config.json into the folder"
    return None


def _lost_weights(job: JobSpec) -> str | None:
    """Return which files of weights are missing, unless a run goes on from a checkpoint that holds them."""
    folder, saved = resolve(job.model.path), run_folder(job) / "checkpoints"
    goes_on = job.method.type == "full" and any(saved.glob("step-*/manifest.json"))
    names_its_own = "transformers_weights" in (local_config(job.model.path) or {})
    if not folder.is_dir() or job.model.weights == "random" or goes_on or names_its_own:
        return None
    return _weights_problem(folder, f"model.path={job.model.path}")


def _weights_problem(folder: Path, where: str) -> str | None:
    found = [name for name in _WEIGHTS if (folder / name).is_file()]
    if not found:
        return (
            f"{where} has no weights ({_WEIGHTS[0]}, {_WEIGHTS[2]} or their index.json); download them, "
            "name a folder that has them, or use model.weights: random"
        )
    if not found[0].endswith(".index.json"):
        return None
    try:
        shards = set(json.loads((folder / found[0]).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{where} has a damaged {found[0]}; download it again"
    if lost := sorted(name for name in map(str, shards) if not (folder / name).is_file()):
        return (
            f"{where} lacks {len(lost)} of the {len(shards)} files of weights that {found[0]} lists "
            f"({', '.join(lost[:3])}); download them"
        )
    return None


def _adapter_problem(path: str) -> str | None:
    folder, where = resolve(path), f"method.adapter={path}"
    if not folder.is_dir():
        return f"{where} is not there, or no folder; name the folder of an adapter in peft's format"
    if lost := [name for name in _ADAPTER if not (folder / name).is_file()]:
        return f"{where} has no {' and no '.join(lost)}; name the folder of an adapter in peft's format"
    return None
