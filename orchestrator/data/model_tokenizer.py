"""Loads the tokenizer of a model, with the chat template that the job chooses."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from orchestrator.config.chat_templates import NAMED
from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec, ModelSpec
from orchestrator.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_TEMPLATES = ("auto", "chat", "alpaca")
"""Values of `data.chat_template` that keep the tokenizer's own chat template."""


def load_tokenizer(model: ModelSpec, chat_template: str = "auto") -> PreTrainedTokenizerFast:
    """Return the model's tokenizer, with a chat template of its own or the given one.

    Args:
        model: The model; its `new_special_tokens` are added if the tokenizer lacks them.
        chat_template: `data.chat_template`. With the name of a template, the tokens that it needs are added
            as well, and its end of turn becomes the EOS token.

    Raises:
        SpecError: The path has no tokenizer, or only a slow one, or the chat template cannot be read.
    """
    named = NAMED.get(chat_template)
    tokens = (*model.new_special_tokens, *(named.tokens if named else ()))
    path = str(resolve(model.path))
    return _load_tokenizer(path, model.path, model.trust_remote_code, chat_template, tokens)


@lru_cache(maxsize=2)
def _load_tokenizer(
    path: str, name: str, trust_remote_code: bool, chat_template: str, tokens: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SpecError(
            f"model.path={name}: cannot load a tokenizer ({reason}); set it to a folder or hub model with "
            "tokenizer files"
        ) from None
    if not tokenizer.is_fast:
        raise SpecError(
            f"model.path={name} has only a slow (Python) tokenizer, which has no character offsets; convert "
            "it to a fast tokenizer (tokenizer.json)"
        )
    loaded = cast("PreTrainedTokenizerFast", tokenizer)
    vocabulary = loaded.get_vocab()
    loaded.add_tokens([token for token in tokens if token not in vocabulary], special_tokens=True)
    if chat_template not in TOKENIZER_TEMPLATES:
        loaded.chat_template = template_source(chat_template)
    if (named := NAMED.get(chat_template)) and named.end:
        loaded.eos_token = named.end
    return loaded


def template_source(chat_template: str) -> str:
    """Return the Jinja source of a chat template given by name, file or text.

    Raises:
        SpecError: It is none of these, or the file cannot be read.
    """
    if chat_template in NAMED:
        return NAMED[chat_template].source
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            f"data.chat_template={chat_template} is not a known template, and not a file that can be read "
            f"({reason}); use auto, chat, alpaca, one of {', '.join(NAMED)}, the file of a Jinja "
            "template, or its text"
        ) from None


def with_chat_template(job: JobSpec) -> JobSpec:
    """Return a job with the text of a chat template that it names by file, or the tokens of one by name.

    Afterwards `job.model` alone tells how many embedding rows the tokenizer needs.

    Raises:
        SpecError: The file cannot be read.
    """
    chosen = job.data.chat_template
    if chosen in TOKENIZER_TEMPLATES:
        return job
    if named := NAMED.get(chosen):
        tokens = tuple(dict.fromkeys((*job.model.new_special_tokens, *named.tokens)))
        model = job.model.model_copy(update={"new_special_tokens": tokens})
        return job.model_copy(update={"model": model})
    data = job.data.model_copy(update={"chat_template": template_source(chosen)})
    return job.model_copy(update={"data": data})


def ends_of_generation(model: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Return the tokens at which the model stops, from generation_config.json and config.json."""
    from transformers.utils.hub import cached_file

    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        try:
            file = cached_file(str(resolve(model.path)), name, _raise_exceptions_for_missing_entries=False)
            settings = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        except (OSError, ValueError):
            continue
        eos = settings.get("eos_token_id")
        ids |= {token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)}
    vocabulary = len(tokenizer)
    return tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(ids) if token < vocabulary)
