"""Types of the fields of a job file: choices, ranges and patterns."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from orchestrator.config.chat_templates import NAMED

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Device = Literal["auto", "cuda", "cpu"]
Offload = Literal["none", "cpu"]
TemplateOption = bool | int | float | str
OffloadState = Literal["none", "cpu", "nvme"]
Format = Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text", "tokens"]

RowField = Literal[
    "instruction", "input", "output", "system", "history", "messages", "tools", "prompt", "completion",
    "text", "input_ids", "labels", "completion_mask"
]  # fmt: skip
TurnField = Literal["role", "content", "tool_calls", "weight"]
Role = Literal["system", "developer", "user", "assistant", "tool", "function_call"]

LARGEST = 2**31 - 1  # what a 32-bit index reaches; a larger count is a slip

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[\w.\-]+$")]
SplitName = Annotated[str, Field(pattern=r"^[\w.\-]+(\[(-?\d+%?)?:(-?\d+%?)?\])?$")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
PathStr = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]  # no file system can store a NUL


def _one_problem(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """Report one error for a value that matches no member of a union; pydantic reports one per member."""
    try:
        return validate(value)
    except ValidationError:
        raise PydanticCustomError("port", "auto, or a whole number from 0 to 65535") from None


Port = Annotated[Annotated[int, Field(ge=0, le=65535)] | Literal["auto"], WrapValidator(_one_problem)]
Checkpointing = Annotated[
    Literal["full", "selective", "none"],
    BeforeValidator(
        lambda value: {True: "full", False: "none"}[value] if isinstance(value, bool) else value,
        json_schema_input_type=bool | Literal["full", "selective", "none"],
    ),
]


def _chat_template(value: str) -> str:
    names = ("auto", "chat", "alpaca", *NAMED)
    if value not in names and not any(character in value for character in "/.{"):
        raise ValueError(f"must be one of {', '.join(names)}, the file of a Jinja template, or its text")
    return value


_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "bos_token", "eos_token"}
)


def _template_options(value: dict[str, TemplateOption]) -> dict[str, TemplateOption]:
    for name in value:
        if name in _RESERVED or not name.isidentifier() or name.startswith("_"):
            raise ValueError(
                f"{name} is not a variable that a job can set; use the name of an option that the chat "
                "template reads, such as enable_thinking"
            )
    if "date" in value:
        try:
            date.fromisoformat(str(value["date"]))
        except ValueError:
            raise ValueError(f"date={value['date']} must be a date such as 2026-01-31") from None
    return value


ChatTemplate = Annotated[str, AfterValidator(_chat_template)]
TemplateOptions = Annotated[dict[str, TemplateOption], AfterValidator(_template_options)]
