"""Reading a job file: YAML with line numbers, overrides, and all errors at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config import field_names, yaml_loader
from orchestrator.config.schema import UNION_TAGS, JobSpec
from orchestrator.config.validation import Problem, broken_rules
from orchestrator.config.yaml_loader import Location, SourceLines, dotted, line_of, location_of
from orchestrator.errors import SpecError

_NO_OVERRIDE = "not of the form field.name=value; write for example --set optim.lr=1e-5"


Check = Callable[[JobSpec], Iterable[Problem]]
_Located = list[tuple[list[Location], str]]


def _nothing(_: JobSpec) -> Iterable[Problem]:
    return ()


def load(path: Path, overrides: Sequence[str] = (), check: Check = _nothing) -> JobSpec:
    """Read a job file.

    Args:
        path: The YAML file.
        overrides: Texts such as `parallel.zero_stage=2`, applied in order on top of the file.
        check: Finds problems beyond those of the fields, such as files that are missing.

    Returns:
        The valid job.

    Raises:
        SpecError: With every problem of the file and of the overrides.
    """
    return load_with_warnings(path, overrides, check)[0]


def load_with_warnings(
    path: Path, overrides: Sequence[str], check: Check = _nothing, warn: Check = _nothing
) -> tuple[JobSpec, list[str]]:
    """Read a job file as `load` does, and return the job with the warnings of `warn`, each with its line."""
    job, problems, warnings = examine(path, overrides, check, warn)
    if job is None:
        raise SpecError(*problems)
    return job, warnings


def examine(
    path: Path, overrides: Sequence[str], check: Check, warn: Check
) -> tuple[JobSpec | None, list[str], list[str]]:
    """Return the job of a file (None if it has problems), all problems and all warnings.

    Args:
        path: The YAML file.
        overrides: As `load` takes them.
        check: As `load` takes it.
        warn: Finds values that are allowed but probably a mistake.

    Raises:
        SpecError: The file cannot be read, or is not YAML.
    """
    return _read(text_of(path, "job"), overrides, path.name, check, warn)


def text_of(path: Path, thing: str) -> str:
    """Return the text of a file.

    Raises:
        SpecError: The file cannot be read, or is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"{thing} file {path} cannot be read ({error.strerror}); name an existing YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{thing} file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def parse(text: str, overrides: Sequence[str] = (), origin: str = "job") -> JobSpec:
    """Read a job from YAML text; as `load`, with `origin` naming the text in errors."""
    job, problems, _ = _read(text, overrides, origin, _nothing, _nothing)
    if job is None:
        raise SpecError(*problems)
    return job


def _read(
    text: str, overrides: Sequence[str], origin: str, check: Check, warn: Check
) -> tuple[JobSpec | None, list[str], list[str]]:
    data, source_lines, problems = yaml_loader.read(text, origin)
    for override in overrides:
        problem = apply_override(data, source_lines, override)
        if problem:
            problems.append(problem)
    job, broken, warnings = _validate(data, check, warn)
    problems += _with_lines(broken, source_lines, origin)
    return None if problems else job, problems, _with_lines(warnings, source_lines, origin)


def validate(
    data: dict[str, object], source_lines: SourceLines, origin: str
) -> tuple[JobSpec | None, list[str]]:
    """Validate a job that has been read; return it, or a message with its line for every problem."""
    job, broken, _ = _validate(data, _nothing, _nothing)
    return job, _with_lines(broken, source_lines, origin)


def _with_lines(found: _Located, source_lines: SourceLines, origin: str) -> list[str]:
    return [f"{line_of(source_lines, locations, origin)}: {sentence}" for locations, sentence in found]


def dump(job: JobSpec) -> str:
    """Return the job as YAML with all defaults; `parse` returns an equal job."""
    return yaml_loader.dump(job.model_dump(mode="json"))


def json_schema() -> dict[str, object]:
    """Return the JSON schema of the job file, for editors."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "orchestrator job"}


def apply_override(data: dict[str, object], source_lines: SourceLines, text: str) -> str | None:
    """Apply an override to the data; return an error message if it cannot be applied."""
    path, equals, value = text.partition("=")
    is_secret = path.strip() == "run" or path.strip().startswith("run.env")
    shown = f"--set {path}=..." if is_secret and equals else f"--set {text[:80]}"
    if not equals:
        return f"{shown}: {_NO_OVERRIDE}"
    try:
        parsed = yaml_loader.value_of(value)
    except yaml.YAMLError as error:
        why = "" if is_secret else f" ({yaml_loader.reason_of(error)})"  # which may quote a part of the value
        return f"{shown}: the value is not valid YAML{why}; quote it"
    reason = put(data, source_lines, path.strip(), parsed, shown)
    return f"{shown}: {reason}" if reason else None


def put(
    data: dict[str, object], source_lines: SourceLines, path: str, value: object, origin: str
) -> str | None:
    """Set a field of a job that has been read but not validated.

    Args:
        data: The job; changed in place.
        source_lines: The origin of each field; changed in place.
        path: The field's dotted name.
        value: Its value.
        origin: Where the value was written.

    Returns:
        An error message if it cannot be set, or None.
    """
    keys = path.split(".")
    if not all(keys) or not path.isprintable() or len(keys) > yaml_loader.DEEPEST:
        return _NO_OVERRIDE
    target: Any = data
    location: list[str | int] = []
    for number, key in enumerate(keys, start=1):
        at = _key_in(target, key)
        if at is None:
            valid = (
                f"use 0 to {len(target) - 1}"
                if isinstance(target, list) and target
                else "check the dotted name"
            )
            inside = f"a list of {len(target)}" if isinstance(target, list) else "a value without fields"
            return f"{key} is not in {dotted(location)}, which is {inside}; {valid}"
        location.append(at)
        if number == len(keys):
            target[at] = value
        elif isinstance(target, dict) and target.get(key) is None:
            target[at] = {}
        target = target[at]
    yaml_loader.forget(source_lines, tuple(location))
    source_lines[tuple(location)] = origin
    return None


def _key_in(target: object, key: str) -> str | int | None:
    """Return the key or index that can be set in a container, or None."""
    if isinstance(target, list):
        return next((index for index in range(len(target)) if str(index) == key), None)
    return key if isinstance(target, dict) else None


def _validate(
    data: dict[str, object], check: Check, warn: Check
) -> tuple[JobSpec | None, _Located, _Located]:
    """Validate fields, then the rules between those fields that are valid.

    Returns:
        The job, its problems including those of `check`, and the warnings of `warn`.
    """
    problems: _Located = []
    wrong: set[str] = set()
    for _ in range(8):  # each round replaces invalid values by defaults
        try:
            job = JobSpec.model_validate_json(json.dumps(data, default=str))
        except ValidationError as error:
            details = [_untagged(detail) for detail in error.errors(include_url=False)]
        else:
            problems += _of_valid_fields(wrong, (*broken_rules(job), *check(job)))
            return None if problems else job, problems, _of_valid_fields(wrong, warn(job))
        locations = [tuple(detail["loc"]) for detail in details]
        for detail, location in zip(details, locations, strict=True):
            is_consequence = any(
                location == other[: len(location)] and location != other for other in locations
            )
            if not is_consequence and dotted(location) not in wrong:
                problems.append(([location], message_of(detail, JobSpec, "job")))
        data = json.loads(json.dumps(data, default=str))
        for detail, location in zip(details, locations, strict=True):
            if dotted(location) in wrong:  # the default is invalid here: remove its parent
                location = location[:-1]
            wrong.add(dotted(location))
            _repair(data, location, unknown=detail["type"] == "extra_forbidden")
    return None, problems, []


def _untagged(detail: ErrorDetails) -> ErrorDetails:
    """Return an error with its location in the job file, without pydantic's tags of unions."""
    detail["loc"] = tuple(part for part in detail["loc"] if part not in UNION_TAGS)
    return detail


def _of_valid_fields(wrong: set[str], found: Iterable[Problem]) -> _Located:
    """Drop problems that concern a field whose value was replaced."""
    return [
        ([location_of(field) for field in fields], sentence)
        for fields, sentence in found
        if not any(field == bad or field.startswith(f"{bad}.") for field in fields for bad in wrong)
    ]


_PLACEHOLDERS: Mapping[str, object] = {
    "name": "job",
    "model": {"path": "model"},
    "data": {"train": [{"path": "data"}]},
    "train": [{"path": "data"}],
    "path": "path",
}


def _repair(data: Any, location: Location, unknown: bool) -> None:
    """Remove an invalid value, or replace it if the field is required."""
    target = data
    for part in location[:-1]:
        try:
            target = target[part]
        except (KeyError, IndexError, TypeError):
            return
    last = location[-1] if location else ""
    placeholder = _PLACEHOLDERS.get(str(last))
    if location[:-1] == ("eval", "data"):
        placeholder = [{"path": "path"}]
    if isinstance(target, dict) and placeholder is not None and not unknown:
        target[str(last)] = placeholder
    elif isinstance(target, dict):
        target.pop(str(last), None)
    elif isinstance(target, list) and isinstance(last, int) and last < len(target):
        target[last] = {"path": "path"}


_LIMITS: Mapping[str, str] = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


def message_of(detail: ErrorDetails, model: type[BaseModel], thing: str) -> str:
    """Return the message for a pydantic error: value, rule and remedy.

    Args:
        detail: The error.
        model: The model that was validated.
        thing: What the model describes, such as job.
    """
    location = tuple(detail["loc"])
    field, value, kind = dotted(location), detail.get("input"), detail["type"]
    context = detail.get("ctx", {})
    shown = json.dumps(value, default=str, ensure_ascii=False)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if location[:2] == ("run", "env") and kind != "string_pattern_mismatch":
        shown = "(not shown)"  # if the name is invalid, the input is the name and not the value
    if kind == "port":
        return f"{field}={shown} is not a port; it must be {detail['msg']}"
    if kind == "dict_type":
        return f"{field}={shown} has the wrong type; write NAME: value, one a line, indented below the key"
    if kind == "missing":
        return f"{field} is required; add it"
    if kind == "extra_forbidden":
        return f"{field} is not a field of a {thing}; {_did_you_mean(location, model)}"
    if kind == "literal_error":
        return f"{field}={shown} is not a valid value; use {context['expected']}"
    if kind in _LIMITS:
        limit = next(iter(context.values()))
        return f"{field}={shown} is out of range; it must be {_LIMITS[kind]} {limit}"
    if kind == "too_short":
        return f"{field} has {context['actual_length']} elements; give at least {context['min_length']}"
    if kind == "too_long":
        return f"{field} has {context['actual_length']} elements; give at most {context['max_length']}"
    if kind == "string_too_short":
        return f"{field} is empty; write a value"
    if kind == "string_pattern_mismatch":
        return f"{field}={shown} has invalid characters; it must match {context['pattern']}"
    if kind in ("model_type", "model_attributes_type"):
        value_field = field_names.SECTION_VALUES.get(field)
        hint = f"; for a single value use {value_field}" if value_field and model is JobSpec else ""
        return f"{field}={shown} is not a section; write its fields indented below the key{hint}"
    if kind == "tuple_type":
        return f"{field}={shown} has the wrong type; it must be a list"
    if kind == "bool_type":
        return f"{field}={shown} has the wrong type; it must be true or false, without quotes"
    if kind == "string_type":
        return f"{field}={shown} has the wrong type; it must be text; put it in quotes"
    message = detail["msg"].removeprefix("Input should be ").rstrip(".")
    return f"{field}={shown} has the wrong type; it must be {message}"


def _did_you_mean(location: Location, model: type[BaseModel]) -> str:
    name, fields = str(location[-1]), _fields_at(location[:-1], model)
    is_job = model is JobSpec
    if is_job and (answer := field_names.remedy(name)):
        return answer
    if is_job and (elsewhere := [field for field in dotted_fields() if field.split(".")[-1] == name]):
        return f"use {' or '.join(elsewhere)}"
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"fields here: {', '.join(fields)}"


@lru_cache(maxsize=1)
def dotted_fields() -> tuple[str, ...]:
    """Return the dotted names of all fields of sections, such as optim.lr."""
    sections = [name for name in JobSpec.model_fields if name != "name"]
    return tuple(f"{section}.{field}" for section in sections for field in _fields_at((section,), JobSpec))


def _fields_at(location: Iterable[str | int], root: type[BaseModel]) -> list[str]:
    model = root
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:  # an index, or a name in a mapping
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *_arguments(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _arguments(annotation: object) -> list[object]:
    direct = list(getattr(annotation, "__args__", ()))
    return direct + [inner for each in direct for inner in _arguments(each)]
