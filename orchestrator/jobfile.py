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
from yaml.constructor import ConstructorError

from orchestrator.errors import SpecError
from orchestrator.rules import broken_rules
from orchestrator.spec import JobSpec

Location = tuple[str | int, ...]
Places = dict[Location, str]
"""Where each key and element was written: a line of the file, or an override."""

_DEEPEST = 32
_MOST_VALUES = 20_000
_LONGEST_INTEGER = 400


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: 2e-5 is a number, 010 is ten; yes, on, 1:30 and dates are text."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return a node's value; a scalar that its tag cannot hold is an error with a line."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair can be escaped in YAML and stored nowhere
        except (ValueError, LookupError, AttributeError, TypeError):
            reason = f"{str(node.value)[:40]!a} cannot be read as {node.tag.rpartition(':')[2]}"
            raise ConstructorError(None, None, reason, node.start_mark) from None
        return value


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(text)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else, so that every reader agrees."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
    ("merge", r"^<<$", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


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
        raise SpecError(
            f"job file {path} cannot be read ({error.strerror}); name an existing YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise SpecError(f"job file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return parse(text, overrides, origin=path.name)


def parse(text: str, overrides: Sequence[str] = (), origin: str = "job") -> JobSpec:
    """Read a job from YAML text; as `load`, with `origin` naming the text in errors."""
    data, places, problems = _read_yaml(text, origin)
    for override in overrides:
        problem = _override(data, places, override)
        if problem:
            problems.append(problem)
    job, broken = _validate(data)
    problems += [f"{_place_of(places, locations, origin)}: {sentence}" for locations, sentence in broken]
    if problems or job is None:
        raise SpecError(*problems)
    return job


def dump(job: JobSpec) -> str:
    """Return the job as YAML with every default written out; `parse` reads it back equal."""
    return yaml.dump(job.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the job file, for editors."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "orchestrator job"}


def _read_yaml(text: str, origin: str) -> tuple[dict[str, Any], Places, list[str]]:
    places: Places = {}
    problems: list[str] = []
    try:
        loader, root = _compose(text)
        if root is not None:
            _walk(root, (), places, problems, origin)
        data = _construct(loader, root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise SpecError(
            f"{where}: not valid YAML ({_yaml_reason(error)}); check indentation and quoting"
        ) from None
    if not isinstance(data, dict):
        kind = "empty" if data is None else f"a {type(data).__name__}"
        raise SpecError(f"{origin}: the file is {kind}, and a job is a mapping that starts with `name:`")
    return data, places, problems


def _yaml_reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or str(error)
    return " ".join(str(reason).split())


def _compose(text: str) -> tuple[_Loader, yaml.Node | None]:
    """Return the text's nodes, none of them built, and the loader that can build them.

    Raises:
        yaml.YAMLError: No YAML, or more than a job can be: aliases write out to any size, or hold themselves.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    except RecursionError:
        raise yaml.YAMLError(f"nested deeper than {_DEEPEST} levels") from None
    waiting = [] if root is None else [(root, 1)]
    seen = 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST:
            raise ConstructorError(None, None, f"nested deeper than {_DEEPEST} levels", node.start_mark)
        if seen > _MOST_VALUES:
            reason = f"more than {_MOST_VALUES} values with all aliases written out"
            raise ConstructorError(None, None, reason, node.start_mark)
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(child, depth + 1) for child in node.value]
    return loader, root


def _construct(loader: _Loader, root: yaml.Node | None) -> Any:
    return None if root is None else _plain(loader.construct_document(root))


def _walk(node: yaml.Node, location: Location, places: Places, problems: list[str], origin: str) -> None:
    """Note the line of every key and element, and every key that stands twice in its mapping."""
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            places[*location, index] = f"{origin}:{child.start_mark.line + 1}"
            _walk(child, (*location, index), places, problems, origin)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, child in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            place = (*location, name)
            if name in first:
                _forget(places, place)
                twice = f"key {_dotted(place)} stands twice (first on line {first[name]}); keep one"
                problems.append(f"{origin}:{line}: {twice}")
            first.setdefault(name, line)
            places[place] = f"{origin}:{line}"
            _walk(child, place, places, problems, origin)


def _forget(places: Places, location: Location) -> None:
    """Drop a key and all below it: another value has taken its place."""
    for known in [each for each in places if each[: len(location)] == location]:
        del places[known]


def _plain(value: Any) -> Any:
    """Return the value as JSON could hold it, so that types are judged as they were written."""
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else json.dumps(key, default=str): _plain(value[key]) for key in value
        }
    if isinstance(value, (list, tuple, set)):
        return [_plain(child) for child in value]
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value


def _override(data: dict[str, Any], places: Places, text: str) -> str | None:
    """Put an override's value into the data; return the sentence that says why it cannot be."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or not path.isprintable() or len(keys) > _DEEPEST:
        return f"--set {text[:80]}: not of the form field.name=value; write for example --set optim.lr=1e-5"
    try:
        parsed = _construct(*_compose(value))
    except yaml.YAMLError as error:
        return f"--set {text[:80]}: the value is not valid YAML ({_yaml_reason(error)}); quote it"
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
            return f"--set {text[:80]}: {key} is not in {_dotted(location)}, which is {inside}; {valid}"
        location.append(at)
        if number == len(keys):
            target[at] = parsed
        elif isinstance(target, dict) and target.get(key) is None:
            target[at] = {}
        target = target[at]
    _forget(places, tuple(location))
    places[tuple(location)] = f"--set {text[:80]}"
    return None


def _key_in(target: Any, key: str) -> str | int | None:
    """Return the key or index by which a container may be set, None where it may not."""
    if isinstance(target, list):
        return next((index for index in range(len(target)) if str(index) == key), None)
    return key if isinstance(target, dict) else None


def _validate(data: dict[str, Any]) -> tuple[JobSpec | None, list[tuple[list[Location], str]]]:
    """Validate fields, then the rules between those fields that are valid."""
    problems: list[tuple[list[Location], str]] = []
    wrong: set[str] = set()
    for _ in range(8):  # each round removes what was wrong, so that defaults stand in for it
        try:
            job = JobSpec.model_validate_json(json.dumps(data, default=str))
        except ValidationError as error:
            found = error.errors(include_url=False)
        else:
            for fields, sentence in broken_rules(job):
                if not any(field == bad or field.startswith(f"{bad}.") for field in fields for bad in wrong):
                    problems.append(([_location(field) for field in fields], sentence))
            return (None if problems else job), problems
        places = [tuple(detail["loc"]) for detail in found]
        for detail, place in zip(found, places, strict=True):
            consequence = any(place == other[: len(place)] and place != other for other in places)
            if not consequence and _dotted(place) not in wrong:
                problems.append(([place], _sentence(detail)))
        data = json.loads(json.dumps(data, default=str))
        for detail, place in zip(found, places, strict=True):
            if _dotted(place) in wrong:  # the stand-in does not do here, so what it is part of goes
                place = place[:-1]
            wrong.add(_dotted(place))
            _repair(data, place, unknown=detail["type"] == "extra_forbidden")
    return None, problems


def _location(dotted: str) -> Location:
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))


_STAND_INS: Mapping[str, Any] = {
    "name": "job",
    "model": {"path": "model"},
    "data": {"train": [{"path": "data"}]},
    "train": [{"path": "data"}],
    "path": "path",
}


def _repair(data: Any, location: Location, unknown: bool) -> None:
    """Take a wrong value out, or put a stand-in where the field is required."""
    target = data
    for part in location[:-1]:
        try:
            target = target[part]
        except (KeyError, IndexError, TypeError):
            return
    last = location[-1] if location else ""
    stand_in = _STAND_INS.get(str(last))
    if isinstance(target, dict) and stand_in is not None and not unknown:
        target[str(last)] = stand_in
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
        return f"{field}={shown} has characters outside the rule; match {context['pattern']}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{field}={shown} is not a section; write its fields indented below the key"
    if kind == "tuple_type":
        return f"{field}={shown} has the wrong type; it must be a list"
    if kind == "bool_type":
        return f"{field}={shown} has the wrong type; it must be true or false, without quotes"
    if kind == "string_type":
        return f"{field}={shown} has the wrong type; it must be text; put it in quotes"
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


def _place_of(places: Places, locations: Sequence[Location], origin: str) -> str:
    """Return where the first of these that was written stands; what is missing belongs to its section."""
    for location in locations:
        inside = (place for known, place in places.items() if known[: len(location)] == location)
        if location and (place := places.get(location) or next(inside, None)):
            return place
    location = locations[0]
    while location and location not in places:
        location = location[:-1]
    return places.get(location, origin)
