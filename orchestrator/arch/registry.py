"""Registry of bundled model configurations, so that planning needs neither weights nor hub access."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NotRequired, TypedDict

MODELS = Path(__file__).with_name("registry.toml")
_NO_SIZE = re.compile(r"hf|chat|base|instruct|it|meta|v0\.1|\d+k|gptq|int[48]|awq")
"""Parts of model names that do not change parameter counts: tuning, format, context length, quantization."""


class UnknownModel(ValueError):
    """The registry has no model of this name."""


class Entry(TypedDict):
    """A bundled model.

    Attributes:
        config: The fields of config.json from which sizes and attention follow.
        parameters: Parameters of the published weights; tied weights count once.
        source: URL of both.
        names: Other names of models with the same sizes.
    """

    config: Mapping[str, object]
    parameters: int
    source: str
    names: NotRequired[list[str]]


def bundled() -> Mapping[str, Entry]:
    """Return the registry entries by model name."""
    return _read()


def bundled_config(name: str) -> Mapping[str, object] | None:
    """Return the bundled configuration of a published model; None if it is not bundled.

    Args:
        name: A hub name or an alias, such as `meta-llama/Llama-2-7b-hf`, `llama2-7b` or `Qwen-7B-Chat`. Case,
            owner and parts that do not affect sizes are ignored.
    """
    found = _names().get(_normal(name))
    return None if found is None else _read()[found]["config"]


def require_bundled(name: str) -> Mapping[str, object]:
    """Return the bundled configuration of a published model.

    Args:
        name: A hub name or an alias, as for `bundled_config`.

    Raises:
        UnknownModel: The model is not bundled.
    """
    found = bundled_config(name)
    if found is None:
        raise UnknownModel(
            f"model {name!r} is not bundled, so its sizes are not known; give a folder with its config.json, "
            f"or use one of {', '.join(_read())}"
        )
    return found


def _normal(name: str) -> str:
    # "meta-llama/Llama-2-7b-hf" -> "llama27b", which "llama2-7b" gives as well.
    words = re.split(r"[-_ ]", name.rsplit("/", 1)[-1].casefold())
    return "".join(word for word in words if not _NO_SIZE.fullmatch(word))


@cache
def _read() -> Mapping[str, Entry]:
    return MappingProxyType(tomllib.loads(MODELS.read_text(encoding="utf-8")))


@cache
def _names() -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name, facts in _read().items():
        found |= {_normal(each): name for each in (name, *facts.get("names", ()))}
    return MappingProxyType(found)
