"""Reads tools and tool calls of rows into OpenAI's format, as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.data.field_use import FieldUse
from orchestrator.data.row_values import (
    Malformed,
    from_json,
    has_value,
    require_unicode,
)
from orchestrator.data.rows import JsonObject, ParsedArguments


def tools_of(value: Mapping[str, object]) -> tuple[JsonObject, ...]:
    """Return the tools of a row, from `tools` or the earlier `functions`.

    Each field is a list of objects, also as JSON text.

    Raises:
        Malformed: A field is not such a list, or both are given and differ.
    """
    tools, functions = (_tools(value.get(name), name) for name in ("tools", "functions"))
    if tools and functions and tools != functions:
        raise Malformed("fields tools and functions differ; remove functions, the earlier name of tools")
    return tools or functions


def _tools(tools: object, name: str) -> tuple[JsonObject, ...]:
    if isinstance(tools, str):
        if not tools.strip():
            return ()
        tools = from_json(tools, name)
    if tools is None:
        return ()
    if isinstance(tools, list):
        tools = [_tool_from_text(tool) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Malformed(f"field {name} must be a list of objects; correct it")
    require_unicode(tools, name)
    return tuple(
        tool if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools
    )


def _tool_from_text(tool: object) -> object:
    if not (isinstance(tool, str) and tool.lstrip().startswith("{")):
        return tool
    try:
        return json.loads(tool)
    except (ValueError, RecursionError):
        return tool


def calls_of_message(message: Mapping[str, Any], place: str, use: FieldUse) -> list[JsonObject] | None:
    """Return the tool calls of a message, from `tool_calls` or the earlier `function_call`.

    Args:
        message: Fields of the message.
        place: Path of the message in its row, such as `messages[0]`.
        use: Collects fields of calls that are not used.

    Returns:
        The calls; None if the message has neither field.

    Raises:
        Malformed: A field does not hold calls, or both are given.
    """
    calls, single = message.get("tool_calls"), message.get("function_call")
    if has_value(single):
        if has_value(calls):
            raise Malformed(f"{place} has both tool_calls and function_call; remove function_call")
        return calls_of(single, f"{place}.function_call", use)
    if isinstance(calls, str):
        calls = from_json(calls, f"{place}.tool_calls") if calls.strip() else []
    if calls and not isinstance(calls, list):
        raise Malformed(f"{place}.tool_calls is a {type(calls).__name__}, and it must be a list; correct it")
    return [_call(each, f"{place}.tool_calls", use) for each in calls] if calls else calls


def calls_of(value: object, place: str, use: FieldUse) -> list[JsonObject]:
    """Return the calls of a turn that is a call as a whole: one call or a list, also as JSON text.

    Args:
        value: The call; empty text gives no calls.
        place: Its path in the row, such as `conversations[1]`.
        use: Collects fields of calls that are not used.

    Raises:
        Malformed: The value is not a call.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"{place} is a function call and no valid JSON ({error}); correct it") from None
    return [_call(each, place, use) for each in (value if isinstance(value, list) else [value])]


def _call(value: Any, place: str, use: FieldUse) -> JsonObject:
    call = value.get("function", value) if isinstance(value, Mapping) else None
    key = "parameters" if isinstance(call, Mapping) and "arguments" not in call else "arguments"
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or key not in call:
        raise Malformed(f"{place} holds a function call without name and arguments; correct it")
    arguments = call[key]
    if isinstance(arguments, str):  # chat templates serialize objects and would quote a string a second time
        try:
            parsed = json.loads(arguments)
            arguments = ParsedArguments(parsed, arguments) if isinstance(parsed, dict) else parsed
        except (ValueError, RecursionError):
            arguments = call[key]
    unused = {name for each in (value, call) for name, content in each.items() if has_value(content)}
    unused -= {"id", "type", "function", "name", key}
    use.without_effect |= {f"{_field(place)}.tool_calls.{name}" for name in unused}
    given = value.get("id")
    named = {"id": str(given)} if isinstance(given, str | int) else {}
    return {**named, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _field(place: str) -> str:
    return place.partition("[")[0]
