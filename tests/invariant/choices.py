"""Combinations of job settings: method, quantization, optimizer, dtype, ZeRO stage, offloading and others.

The validation rules themselves decide which combinations are allowed. Remedies are parsed from the text of an
error, as a user would read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

from allpairspy import AllPairs
from pydantic import BaseModel

from orchestrator.config import yaml_loader
from orchestrator.config.auto_values import resolve_dtype
from orchestrator.config.schema import JobSpec
from orchestrator.config.validation import broken_rules
from orchestrator.errors import SpecError
from orchestrator.model.build import require_supported
from tests.invariant import material

Document = dict[str, Any]
Choice = tuple[str, ...]
"""Names of the chosen values, one per factor, in the order of `FACTORS`."""
Pair = tuple[tuple[str, str], tuple[str, str]]

LORA = {"type": "lora", "rank": 8, "alpha": 16.0}
FACTORS: dict[str, dict[str, Document]] = {
    "method": {
        "full": {},
        "lora": {"method": LORA},
        "rslora": {"method": {**LORA, "use_rslora": True}},
        "dora": {"method": {**LORA, "use_dora": True}},
        "embeddings": {"method": {**LORA, "train_embeddings": True}},
    },
    "quantization": {
        "none": {},
        "nf4": {"method": {"quantization": "nf4", "double_quantization": False}},
        "nf4-double": {"method": {"quantization": "nf4"}},
        "int8": {"method": {"quantization": "int8"}},
    },
    "optimizer": {
        "adamw": {},
        "muon": {"optim": {"optimizer": "muon", "muon_lr": 0.01}},
        "adamw_8bit": {"optim": {"optimizer": "adamw_8bit"}},
        "paged_adamw": {"optim": {"optimizer": "paged_adamw"}},
        "paged_adamw_8bit": {"optim": {"optimizer": "paged_adamw_8bit"}},
    },
    "dtype": {name: {"model": {"dtype": name}} for name in ("fp32", "bf16", "fp16")},
    "zero": {f"zero{stage}": {"parallel": {"zero_stage": stage}} for stage in range(4)},
    "offload": {
        "on-device": {},
        "optimizer-cpu": {"parallel": {"offload_optimizer": "cpu"}},
        "all-cpu": {"parallel": {"offload_optimizer": "cpu", "offload_param": "cpu"}},
    },
    "sequence": {f"sp{size}": {"parallel": {"sequence_parallel_size": size}} for size in (1, 2)},
    "packing": {name: {"data": {"packing": name}} for name in ("best_fit", "none", "concat")},
    "memory": {
        "keep-all": {},
        "keep-inputs": {"model": {"gradient_checkpointing": "full"}},
        "keep-products": {"model": {"gradient_checkpointing": "selective"}},
        "inputs-cpu": {
            "model": {"gradient_checkpointing": "full"},
            "parallel": {"offload_activations": "cpu"},
        },
        "tiles": {"model": {"loss_tile_tokens": 16, "mlp_tile_tokens": 40}},
    },
}
"""Sections of the job that each value of each factor sets. All jobs have two workers."""
WORKERS = 2
STEPS = 2


def document_of(choice: Choice, model: Path) -> Document:
    """Return the job document of a choice."""
    document = material.job(
        model, WORKERS, {}, global_batch_size=2, max_steps=STEPS, lr=1e-2, warmup_ratio=0.0,
        eval={"every_steps": None},
    )  # fmt: skip
    for section in document:
        _write(document, section, choice)
    return document


def _write(document: Document, section: str, choice: Choice) -> None:
    for values, name in zip(FACTORS.values(), choice, strict=True):
        if section in values[name]:
            document[section] = {**document[section], **values[name][section]}


def spec_of(document: Document) -> JobSpec:
    """Return the validated job of a document."""
    return JobSpec.model_validate_json(json.dumps(document))


def refusals(document: Document, device: Literal["cuda", "cpu"] = "cuda") -> tuple[str, ...]:
    """Return the errors with which a job is rejected before workers start, in one sentence each.

    Args:
        document: The job document.
        device: Device to resolve the dtype for; fp16 is rejected on CPU.
    """
    job = spec_of(document)
    problems = tuple(sentence for _, sentence in broken_rules(job))
    if problems:
        return problems
    try:
        resolve_dtype(job.model.dtype, device)
        require_supported(job)
    except SpecError as error:
        return error.problems
    return ()


def allowed(model: Path) -> list[Choice]:
    """Return every combination that is not rejected.

    The product of all factors is large, so sections and the result of `require_supported` are cached:
    sections by the values that set them, support by the sections that it depends on.
    """
    plain = spec_of(document_of(tuple(next(iter(values)) for values in FACTORS.values()), model))
    writers = {section: _writers(section) for section in ("model", "data", "method", "parallel", "optim")}

    @cache
    def section(name: str, names: tuple[str, ...]) -> BaseModel:
        values = {factor: names[writers[name].index(factor)] for factor in writers[name]}
        choice = tuple(values.get(factor, next(iter(FACTORS[factor]))) for factor in FACTORS)
        return getattr(spec_of(document_of(choice, model)), name)  # type: ignore[no-any-return]

    @cache
    def is_supported(model: BaseModel, method: BaseModel, optim: BaseModel) -> bool:
        job = plain.model_copy(update={"model": model, "method": method, "optim": optim})
        try:
            require_supported(job)
        except SpecError:
            return False
        return True

    def is_allowed(choice: Choice) -> bool:
        chosen = dict(zip(FACTORS, choice, strict=True))
        sections = {name: section(name, tuple(chosen[each] for each in writers[name])) for name in writers}
        job = plain.model_copy(update=sections)
        if any(True for _ in broken_rules(job)):
            return False
        optim = job.optim if job.optim.optimizer == "muon" else plain.optim
        return is_supported(job.model.model_copy(update={"dtype": "auto"}), job.method, optim)

    return [choice for choice in product(*FACTORS.values()) if is_allowed(choice)]


def _writers(section: str) -> list[str]:
    """Return the factors that set fields of a section."""
    return [name for name, values in FACTORS.items() if any(section in each for each in values.values())]


def pairs_of(choice: Choice) -> Iterator[Pair]:
    """Yield all pairs of values in a choice."""
    return combinations(zip(FACTORS, choice, strict=True), 2)


def every_pair() -> set[Pair]:
    """Return all pairs of values of two different factors."""
    return {
        ((one, value), (other, another))
        for one, other in combinations(FACTORS, 2)
        for value, another in product(FACTORS[one], FACTORS[other])
    }


def cover(choices: Collection[Choice] | None = None, begun: Sequence[Choice] = ()) -> list[Choice]:
    """Return a pairwise cover: combinations that contain every pair of values that occurs in `choices`.

    Args:
        choices: Combinations to choose from; None for all.
        begun: Combinations that the cover always includes.
    """
    values = [list(each) for each in FACTORS.values()]
    if choices is None:
        return [tuple(row) for row in AllPairs(values)]
    beginnings = {choice[:length] for choice in choices for length in range(1, len(FACTORS) + 1)}
    before = [list(row) for row in begun]
    found = AllPairs(values, filter_func=lambda row: tuple(row) in beginnings, previously_tested=before)
    rows = [*begun, *(tuple(row) for row in found)]
    # AllPairs stops when its next combination adds no new pair; the loop below adds the pairs that are left.
    missing = {pair for choice in choices for pair in pairs_of(choice)}
    missing -= {pair for row in rows for pair in pairs_of(row)}
    while missing:
        rows.append(max(choices, key=lambda choice: len(missing.intersection(pairs_of(choice)))))
        missing -= set(pairs_of(rows[-1]))
    return rows


def remedies(sentence: str) -> list[tuple[str, Any]]:
    """Return the remedies in an error text as dotted fields and values; None means to remove the field.

    A remedy is written `field: value`; the value of a quoted choice (`method.type=lora: ...`) names no field.
    """
    found = [
        (_dotted(name), yaml_loader.value_of(value))
        for name, value in re.findall(r"(?<!=)\b([a-z]\w*(?:\.[a-z]\w*)?): ([\w.+-]*\w)", sentence)
    ]
    if "remove it" in sentence:
        found.append((re.match(r"[a-z_.0-9]+", sentence)[0], None))
    return found


def _dotted(name: str) -> str:
    """Return the dotted name of the only field with that name."""
    found = [field for field in _every_field() if field == name or field.endswith(f".{name}")]
    assert len(found) == 1, f"{name} could be any of {found}"
    return found[0]


@cache
def _every_field() -> tuple[str, ...]:
    return tuple(
        f"{section}.{name}"
        for section, field in JobSpec.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for name in field.annotation.model_fields
    )


def remedied(document: Document, dotted: str, value: Any) -> Document:
    """Return a copy of a document with a remedy applied to one field."""
    changed = deepcopy(document)
    section, _, name = dotted.partition(".")
    changed[section].pop(name, None)
    if value is not None:
        changed[section][name] = value
    return changed


def follow(document: Document, device: Literal["cuda", "cpu"] = "cuda") -> tuple[list[str], Document]:
    """Apply the remedies of errors until the job is accepted.

    Of several remedies, the first one for a field that was not changed before is applied.

    Returns:
        The changed fields, and the accepted document.

    Raises:
        AssertionError: An error names no remedy, or only remedies for fields that were already changed.
    """
    changed: list[str] = []
    while problems := refusals(document, device):
        for sentence in problems:
            if sentence not in refusals(document, device):
                continue  # an earlier remedy of this round already fixed it
            new = [(field, value) for field, value in remedies(sentence) if field not in changed]
            assert new, f"after {changed} nothing is left to do of: {sentence}"
            document = remedied(document, *new[0])
            changed.append(new[0][0])
    return changed, document
