"""Check what is trained with every chat template below a folder.

    python -m tests.unit.data.template_folder DIR

For templates without marks made by hand there is no reference, so properties are checked: the learnt text has
each answer that is to be learnt and each of its tool calls, and nothing of other messages; there are as many
answers as are to be learnt. Prints each fault, each refused row, and counts. Source distributions with such
templates: llama-cpp-python (vendor/llama.cpp/models/templates), vllm (examples).
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.config.schema import ModelSpec
from orchestrator.data.chat_template import render
from orchestrator.data.formats import Malformed
from orchestrator.data.model_tokenizer import load_tokenizer
from orchestrator.data.rows import Conversation, is_learnt
from tests.unit.data.talks import WEATHER

# Tokens that a model's tokenizer has as special tokens, by their usual forms.
_SPECIAL = re.compile(
    r"<\|[^|>\s]+\|>|<｜[^｜>]+｜>|\[/?[A-Z_]{3,}\]|<(?:start|end)_of_turn>|<turn\|>|<\|turn>"
)
_OTHERS = ("Quest", "Result", "Rule", "Unlearnt")


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _calls(*towns: str) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"town": town}}}
        for town in towns
    ]


def _conversation(*messages: dict[str, Any], tools: bool = False) -> Conversation:
    given: Any = messages
    return Conversation(given, ({"type": "function", "function": WEATHER},) if tools else ())


_RESULTS = [{"role": "tool", "content": f"Result {number}", "name": "get_weather"} for number in (41, 42)]
_FIRST, _LAST = (_user("Quest one?"), _answer("Reply alpha.")), (_user("Quest two?"), _answer("Reply beta."))
CONVERSATIONS = {
    "one turn": _conversation(*_FIRST),
    "three turns": _conversation(*_FIRST, *_LAST, _user("Quest three?"), _answer("Reply gamma.")),
    "system": _conversation({"role": "system", "content": "Rule"}, *_FIRST, *_LAST),
    "unlearnt answer": _conversation(_user("Quest one?"), _answer("Unlearnt", weight=0), *_LAST),
    "reasoning": _conversation(_user("Quest one?"), _answer("Reply alpha.", reasoning_content="Musing")),
    "two calls": _conversation(
        _FIRST[0], _answer("", tool_calls=_calls("Oslo", "Rome")), *_RESULTS, _FIRST[1], *_LAST, tools=True
    ),
    "call after text": _conversation(
        _FIRST[0], _answer("Let me look.", tool_calls=_calls("Oslo")), _RESULTS[0], _FIRST[1], tools=True
    ),
    "last message unlearnt": _conversation(*_FIRST, _LAST[0]),
}


def faults(tokenizer: Any, conversation: Conversation) -> Iterator[str]:
    """Yield what is wrong with the learnt text of a conversation.

    Raises:
        Malformed: The row is refused.
    """
    rendered = render(conversation, "chat", tokenizer)
    pieces = [rendered.text[start:end] for start, end in rendered.answers]
    learnt = "".join(pieces)
    answers = [message for message in conversation.messages if is_learnt(message, False)]
    wanted: list[Any] = [message["content"] for message in answers]
    wanted += [message.get("reasoning_content", "") for message in answers[-1:]]
    for message in answers:
        wanted += [call["function"]["arguments"]["town"] for call in message.get("tool_calls", ())]
    yield from (f"lacks {text!r}: {pieces}" for text in wanted if text not in learnt)
    yield from (f"learns {text!r} of another message: {pieces}" for text in _OTHERS if text in learnt)
    if len(pieces) < len(answers):
        yield f"has {len(pieces)} of {len(answers)} answers: {pieces}"


def tokenizer_of(source: str) -> Any:
    """Return the built-in tokenizer with a chat template and its special tokens."""
    tokenizer = copy.deepcopy(load_tokenizer(ModelSpec(path="builtin/tiny-llama")))
    tokenizer.chat_template = source
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(_SPECIAL.findall(source)))})
    return tokenizer


def main(folder: Path) -> int:
    """Check every template once, and return the number of faults."""
    sources = {path.read_text(encoding="utf-8"): path.stem for path in sorted(folder.rglob("*.jinja"))}
    trained = refused = found = 0
    for source, name in sources.items():
        tokenizer = tokenizer_of(source)
        for row, conversation in CONVERSATIONS.items():
            try:
                problems = list(faults(tokenizer, conversation))
            except Malformed as reason:
                refused += 1
                sys.stdout.write(f"{name}, {row}: refused: {' '.join(str(reason).split())[:160]}\n")
                continue
            trained += 1
            found += len(problems)
            sys.stdout.writelines(f"{name}, {row}: FAULT: {problem}\n" for problem in problems)
    sys.stdout.write(f"{len(sources)} templates, {trained} rows trained, {refused} refused, {found} faults\n")
    return found


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1]))))
