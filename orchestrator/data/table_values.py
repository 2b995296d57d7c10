"""Converts rows of Arrow tables to the Python values that the same rows have in JSON lines.

Arrow gives every struct of a column the keys of all its rows, so keys that a row lacks come back as nulls:
they are removed. Columns of the extension type arrow.json (the `Json` feature of `datasets`) hold JSON text,
which is parsed. Maps become objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

Convert = Callable[[Any], Any]
# In a message of a table, a null is a message without text rather than one that lacks the field.
_TEXTS = frozenset(("content", "value", "text"))
_JSON = b"arrow.json"


def rows(batch: pa.RecordBatch) -> tuple[object, ...]:
    """Return the rows of a batch; columns without a value stay as nulls."""
    values = batch.to_pylist()
    for field in batch.schema:
        convert = _converter(field, depth=0)
        if convert is None:
            continue
        for row in values:
            if row[field.name] is not None:
                row[field.name] = convert(row[field.name])
    return tuple(values)


def _converter(field: pa.Field, depth: int) -> Convert | None:
    """Return what converts a value of the field that is not null; None if values stay as they are.

    Args:
        field: A column, or a field nested in one.
        depth: Number of structs around the field.
    """
    kind = field.type
    if _is_json(field):
        return _from_json
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        return _of_struct(kind, depth)
    if pa.types.is_map(kind):
        return _of_map(kind, depth)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _of_list(kind, depth)
    return None


def _is_json(field: pa.Field) -> bool:
    # Without a registered extension type, only the metadata of the field tells.
    name = getattr(field.type, "extension_name", None)
    return name == _JSON.decode() or (field.metadata or {}).get(b"ARROW:extension:name") == _JSON


def _from_json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return text


def _of_struct(kind: pa.StructType, depth: int) -> Convert:
    fields = [kind.field(number) for number in range(kind.num_fields)]
    found = {field.name: _converter(field, depth + 1) for field in fields}
    converters = {name: each for name, each in found.items() if each is not None}
    kept = _TEXTS if depth == 0 else frozenset()

    def convert(value: dict[str, Any]) -> dict[str, Any]:
        return {
            name: converters[name](content) if content is not None and name in converters else content
            for name, content in value.items()
            if content is not None or name in kept
        }

    return convert


def _of_list(kind: Any, depth: int) -> Convert | None:
    of_element = _converter(kind.value_field, depth)
    if of_element is None:
        return None
    return lambda values: [None if each is None else of_element(each) for each in values]


def _of_map(kind: pa.MapType, depth: int) -> Convert:
    of_item = _converter(kind.item_field, depth + 1)

    def convert(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        return {
            key: of_item(value) if of_item is not None and value is not None else value
            for key, value in pairs
        }

    return convert
