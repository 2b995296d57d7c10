"""YAML loader: YAML 1.2 core schema on PyYAML's parser, with the source line of every key (see ADR 13)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

import yaml
from yaml.constructor import ConstructorError

from orchestrator.errors import SpecError

Location = tuple[str | int, ...]
SourceLines = dict[Location, str]
"""Origin of each key and element: file and line, or an override."""

DEEPEST = 32
_MOST_VALUES = 20_000
_LONGEST_INTEGER = 400


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core schema: 2e-5 is a number, 010 is ten; yes, on, 1:30 and dates are strings."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        """Return the value of a node; a scalar that is invalid for its tag is an error with a line."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # YAML can escape half of a surrogate pair, which UTF-8 cannot encode
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
    """Quotes strings that YAML 1.1 or 1.2 would read as another type, so that all parsers agree."""


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


def dump(value: object) -> str:
    """Return a value as YAML that `read` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read(text: str, origin: str, thing: str = "job") -> tuple[dict[str, object], SourceLines, list[str]]:
    """Read a mapping.

    Args:
        text: The YAML.
        origin: Name of the text in errors.
        thing: Kind of file in errors, such as job.

    Returns:
        The mapping, the origin of each key and element, and an error for each duplicate key.

    Raises:
        SpecError: The text is not valid YAML, or not a mapping.
    """
    source_lines: SourceLines = {}
    problems: list[str] = []
    try:
        loader, root = _compose(text)
        if root is not None:
            _walk(root, (), source_lines, problems, origin)
        data = _construct(loader, root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise SpecError(
            f"{where}: not valid YAML ({reason_of(error)}); check indentation and quoting"
        ) from None
    if not isinstance(data, dict):
        kind = "empty" if data is None else f"a {type(data).__name__}"
        raise SpecError(f"{origin}: the file is {kind}, and a {thing} is a mapping that starts with `name:`")
    return data, source_lines, problems


def reason_of(error: yaml.YAMLError) -> str:
    """Return the reason of a YAML error on one line."""
    reason = getattr(error, "problem", None) or str(error)
    return " ".join(str(reason).split())


def value_of(text: str) -> object:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: The text is not valid YAML.
    """
    return _construct(*_compose(text))


def _compose(text: str) -> tuple[_Loader, yaml.Node | None]:
    """Parse a text into nodes, and return them with the loader that constructs their values.

    Raises:
        yaml.YAMLError: The text is not valid YAML or exceeds the limits, which stop aliases that expand
            exponentially or contain themselves.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    except RecursionError:
        raise yaml.YAMLError(f"nested deeper than {DEEPEST} levels") from None
    pending = [] if root is None else [(root, 1)]
    count = 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if depth > DEEPEST:
            raise ConstructorError(None, None, f"nested deeper than {DEEPEST} levels", node.start_mark)
        if count > _MOST_VALUES:
            reason = f"more than {_MOST_VALUES} values after expanding aliases"
            raise ConstructorError(None, None, reason, node.start_mark)
        if isinstance(node, yaml.MappingNode):
            pending += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(child, depth + 1) for child in node.value]
    return loader, root


def _construct(loader: _Loader, root: yaml.Node | None) -> object:
    return None if root is None else _plain(loader.construct_document(root))


def _walk(
    node: yaml.Node, location: Location, source_lines: SourceLines, problems: list[str], origin: str
) -> None:
    """Record the line of every key and element, and an error for each duplicate key of a mapping."""
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            source_lines[*location, index] = f"{origin}:{child.start_mark.line + 1}"
            _walk(child, (*location, index), source_lines, problems, origin)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, child in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            child_location = (*location, name)
            if name in first:
                forget(source_lines, child_location)
                problems.append(
                    f"{origin}:{line}: duplicate key {dotted(child_location)} (first defined on line "
                    f"{first[name]}); remove one"
                )
            first.setdefault(name, line)
            source_lines[child_location] = f"{origin}:{line}"
            _walk(child, child_location, source_lines, problems, origin)


def forget(source_lines: SourceLines, location: Location) -> None:
    """Forget the lines of a key and of all below it, whose value was replaced."""
    for known in [other for other in source_lines if other[: len(location)] == location]:
        del source_lines[known]


def _plain(value: object) -> object:
    """Convert a value to JSON types, so that validation sees the types as written in the file."""
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else json.dumps(key, default=str): _plain(value[key]) for key in value
        }
    if isinstance(value, (list, tuple, set)):
        return [_plain(child) for child in value]
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value


def location_of(name: str) -> Location:
    """Return the location of a dotted name."""
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def dotted(location: Iterable[str | int]) -> str:
    """Return a location as a dotted name."""
    return ".".join(str(part) for part in location) or "the job"


def line_of(source_lines: SourceLines, locations: Sequence[Location], origin: str) -> str:
    """Return the origin of the first location that was written; a missing field has that of its section."""
    for location in locations:
        inside = (line for known, line in source_lines.items() if known[: len(location)] == location)
        if location and (line := source_lines.get(location) or next(inside, None)):
            return line
    location = locations[0]
    while location and location not in source_lines:
        location = location[:-1]
    return source_lines.get(location, origin)
