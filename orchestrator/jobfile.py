"""Reading a job file: YAML with line numbers, overrides, and all errors at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.errors import SpecError
from orchestrator.spec import JobSpec, broken_rules

Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where it matters to people: 2e-5 is a number; yes, on and dates are text."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job file.

    Args:
        path: The YAML file.
        overrides: Texts such as `parallel.zero_stage=2`, applied in order on top of the file.

    Returns:
        The valid job.

    Raises:
        SpecError: With every problem of the file and of the overrides.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"job file {path} cannot be read ({error.strerror}); name an existing YAML file") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"job file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return parse(text, overrides, origin=path.name)


def parse(text: str, overrides: Sequence[str] = (), origin: str = "job") -> JobSpec:
    """Read a job from YAML text; as `load`, with `origin` naming the text in errors."""
    data, lines, problems = _read_yaml(text, origin)
    for override in overrides:
        problem = _override(data, override)
        if problem:
            problems.append(problem)
    job, broken = _validate(data)
    for location, sentence in broken:
        line = _line_of(lines, location)
        problems.append(f"{origin}:{line}: {sentence}" if line else f"{origin}: {sentence}")
    if problems or job is None:
        raise SpecError(*problems)
    return job


def dump(job: JobSpec) -> str:
    """Return the job as YAML with every default written out; `parse` reads it back equal."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the job file, for editors."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "orchestrator job", **schema}


def _read_yaml(text: str, origin: str) -> tuple[dict[str, Any], dict[Location, int], list[str]]:
    try:
        root = yaml.compose(text, Loader=_Loader)
        data = _plain(yaml.load(text, Loader=_Loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise SpecError(f"{where}: not valid YAML ({_yaml_reason(error)}); check indentation and quoting") from None
    except (ValueError, RecursionError, TypeError) as error:
        raise SpecError(f"{origin}: not valid YAML ({error}); check the scalars named there") from None
    if not isinstance(data, dict) or root is None:
        kind = "empty" if data is None else f"a {type(data).__name__}"
        raise SpecError(f"{origin}: the file is {kind}, and a job is a mapping that starts with `name:`")
    lines: dict[Location, int] = {}
    problems: list[str] = []
    _walk(root, (), lines, problems, origin)
    return data, lines, problems


def _yaml_reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or str(error)
    return " ".join(str(reason).split())


def _walk(
    node: yaml.Node, location: Location, lines: dict[Location, int], problems: list[str], origin: str
) -> None:
    """Note the line of every key and element, and every key that stands twice in its mapping."""
    lines.setdefault(location, node.start_mark.line + 1)
    if len(location) > 32:
        return
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _walk(child, (*location, index), lines, problems, origin)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            place = (*location, str(key.value))
            line = key.start_mark.line + 1
            if place in lines:
                problems.append(
                    f"{origin}:{line}: key {_dotted(place)} stands twice (first on line {lines[place]}); keep one"
                )
            lines[place] = line
            _walk(child, place, lines, problems, origin)


def _plain(value: Any) -> Any:
    """Return the value as JSON could hold it, so that types are judged as they were written."""
    if isinstance(value, dict):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(child) for child in value]
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value


def _override(data: dict[str, Any], text: str) -> str | None:
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return f"--set {text}: not of the form field.name=value; write for example --set optim.lr=1e-5"
    try:
        parsed = _plain(yaml.load(value, Loader=_Loader))
    except (yaml.YAMLError, ValueError) as error:
        return f"--set {text}: the value is not valid YAML ({' '.join(str(error).split())[:100]}); quote it"
    target: Any = data
    for key in keys[:-1]:
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                return f"--set {text}: {key} is not an index of a list of {len(target)}; use 0 to {len(target) - 1}"
            target = target[int(key)]
            continue
        if not isinstance(target, dict):
            return f"--set {text}: {key} is inside a value that has no fields; check the dotted name"
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
    last = keys[-1]
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = parsed
    elif isinstance(target, dict):
        target[last] = parsed
    else:
        return f"--set {text}: {last} is not a field there; check the dotted name"
    return None


def _validate(data: dict[str, Any]) -> tuple[JobSpec | None, list[tuple[Location, str]]]:
    """Validate fields, then the rules between those fields that are valid."""
    problems: list[tuple[Location, str]] = []
    wrong: set[str] = set()
    for _ in range(8):  # each round removes what was wrong, so that defaults stand in for it
        try:
            job = JobSpec.model_validate_json(json.dumps(data, default=str))
        except ValidationError as error:
            found = error.errors(include_url=False)
        except ValueError as error:
            return None, [((), f"the values cannot be read ({error}); remove unusual characters")]
        else:
            for fields, sentence in broken_rules(job):
                if not any(field == bad or field.startswith(f"{bad}.") for field in fields for bad in wrong):
                    problems.append((tuple(_index(part) for part in fields[0].split(".")), sentence))
            return (None if problems else job), problems
        places = [tuple(detail["loc"]) for detail in found]
        for detail, place in zip(found, places, strict=True):
            consequence = any(place == other[: len(place)] and place != other for other in places)
            if not consequence and _dotted(place) not in wrong:
                problems.append((place, _sentence(detail)))
        data = json.loads(json.dumps(data, default=str))
        for detail in found:
            wrong.add(_dotted(tuple(detail["loc"])))
            _repair(data, detail)
    return None, problems


def _index(part: str) -> str | int:
    return int(part) if part.isdigit() else part


_STAND_INS: Mapping[str, Any] = {
    "name": "job",
    "model": {"path": "model"},
    "data": {"train": [{"path": "data"}]},
    "train": [{"path": "data"}],
    "path": "path",
}


def _repair(data: Any, detail: ErrorDetails) -> None:
    """Take a wrong value out, or put a stand-in where the field is required."""
    location = detail["loc"]
    target = data
    for part in location[:-1]:
        try:
            target = target[part]
        except (KeyError, IndexError, TypeError):
            return
    last = location[-1] if location else ""
    stand_in = _STAND_INS.get(str(last))
    if isinstance(target, dict) and stand_in is not None and detail["type"] != "extra_forbidden":
        target[str(last)] = stand_in
    elif isinstance(target, dict):
        target.pop(str(last), None)
    elif isinstance(target, list) and isinstance(last, int) and last < len(target):
        target[last] = {"path": "path"}


def _sentence(detail: ErrorDetails) -> str:
    """Turn pydantic's finding into value, rule and remedy."""
    location = tuple(detail["loc"])
    field, value, kind = _dotted(location), detail.get("input"), detail["type"]
    context = detail.get("ctx", {})
    shown = json.dumps(value, default=str, ensure_ascii=False)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if kind == "missing":
        return f"{field} is missing and has no default; add it"
    if kind == "extra_forbidden":
        return f"{field} is not a field of a job; {_did_you_mean(location)}"
    if kind == "literal_error":
        return f"{field}={shown} is not one of the values known; use {context['expected']}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        limit = next(iter(context.values()))
        return f"{field}={shown} is out of range; it must be {kind.replace('_', ' ')} {limit}"
    if kind == "too_short":
        return f"{field} has no elements; give at least {context['min_length']}"
    if kind == "string_too_short":
        return f"{field} is empty; write a value"
    if kind == "string_pattern_mismatch":
        return f"{field}={shown} has characters outside the rule; match {context['pattern']}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{field}={shown} is not a section; write its fields indented below the key"
    message = detail["msg"].removeprefix("Input should be ").rstrip(".")
    return f"{field}={shown} has the wrong type; it must be {message}"


def _did_you_mean(location: Location) -> str:
    known = _fields_at(location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def _fields_at(location: Iterable[str | int]) -> list[str]:
    model: Any = JobSpec
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *_arguments(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    direct = list(getattr(annotation, "__args__", ()))
    return direct + [inner for each in direct for inner in _arguments(each)]


def _dotted(location: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in location) or "the job"


def _line_of(lines: Mapping[Location, int], location: Location) -> int | None:
    while location and location not in lines:
        location = location[:-1]
    return lines.get(location) if location else None
