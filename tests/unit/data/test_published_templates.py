"""With published chat templates, what is learnt is what marks made by hand enclose, after the prompt."""

import os
import random
from datetime import UTC, datetime

import pytest

from orchestrator.data import traced_template
from orchestrator.data.chat_template import render
from orchestrator.data.rows import Conversation
from orchestrator.data.traced_template import TracedTemplate
from tests.unit.data.published_templates import (
    DOCUMENT,
    ROWS,
    cells,
    folder,
    marked_by_hand,
    names,
    table,
    tokenizer_of,
)
from tests.unit.data.talks import talk

TEMPLATES = folder()
if TEMPLATES is None:
    pytest.skip("TRL is not installed: pip install trl==1.16.0", allow_module_level=True)


@pytest.mark.parametrize("name", names(TEMPLATES))
def test_what_is_learnt_is_what_marks_made_by_hand_enclose(name: str) -> None:
    """TRL's marks include what the generation prompt already contains, such as `<think>`; ours do not."""
    tokenizer = tokenizer_of((TEMPLATES / f"{name}.jinja").read_text())
    template = TracedTemplate(tokenizer.chat_template, tokenizer.special_tokens_map)
    prompt = template.render(ROWS["one turn"].messages[:1], None, generation_prompt=True)
    prompt += "<｜tool▁outputs▁end｜>"  # DeepSeek's template puts it before the answer
    for cell in cells(TEMPLATES, name):
        marked = marked_by_hand(TEMPLATES, cell)
        if marked is None:
            continue
        assert len(cell.learnt) == len(marked), cell.row
        for ours, theirs in zip(cell.learnt, marked, strict=True):
            assert theirs.endswith(ours), cell.row
            assert theirs.removesuffix(ours) in prompt, cell.row


@pytest.mark.parametrize("name", names(TEMPLATES))
def test_text_is_that_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_template, "DEFAULT_DATE", datetime.now(UTC).date().isoformat())
    tokenizer = tokenizer_of((TEMPLATES / f"{name}.jinja").read_text())
    for cell in cells(TEMPLATES, name):
        if cell.rendered is None or cell.row == "tools":  # calls may be given in another form
            continue
        messages = [dict(message) for message in ROWS[cell.row].messages]
        assert cell.rendered.text == tokenizer.apply_chat_template(
            messages, tokenize=False, date="2026-01-01"
        )


def test_the_page_has_the_table() -> None:
    page, _, others = DOCUMENT.read_text(encoding="utf-8").partition("\n## Others\n")
    assert page == table(TEMPLATES)
    assert others.count("| yes | yes | yes |") > 80, "written with --others"


PIECES = [
    "a",
    "I see.",
    " ",
    "\n",
    "\n\n",
    "é",
    "日本",
    "👩‍👩‍👧",
    "{x}",
    "{{ y }}",
    "<b>",
    "</think",
    "'\"",
    "12",
    "...",
    "\t",
]
ROWS_A_TEMPLATE = int(os.environ.get("ORCHESTRATOR_FUZZ_ROWS", "20"))


def fuzzed(generator: random.Random) -> Conversation:
    """Return a conversation whose message N contains the word "message-N-" between other texts."""
    texts = [
        "".join(generator.choices(PIECES, k=3))
        + f"message-{number}-"
        + "".join(generator.choices(PIECES, k=3))
        for number in range(2 * generator.randint(1, 3))
    ]
    return talk(*texts)


@pytest.mark.parametrize("name", names(TEMPLATES))
def test_fuzzed_rows_have_the_tokens_of_transformers_and_learn_their_answers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if next(cells(TEMPLATES, name)).rendered is None:
        pytest.skip("the template is for content in parts, as of images, and refuses plain text")
    monkeypatch.setattr(traced_template, "DEFAULT_DATE", datetime.now(UTC).date().isoformat())
    tokenizer = tokenizer_of((TEMPLATES / f"{name}.jinja").read_text())
    generator = random.Random(name)
    for _ in range(ROWS_A_TEMPLATE):
        row = fuzzed(generator)
        rendered = render(row, "chat", tokenizer)
        messages = [dict(message) for message in row.messages]
        assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
        assert len(rendered.answers) == len(messages) // 2
        for number, (start, end) in enumerate(rendered.answers):
            learnt = rendered.text[start:end]
            assert "".join(row.messages[2 * number + 1]["content"].split()) in "".join(learnt.split())
            assert [f"message-{at}-" in learnt for at in range(len(messages))].count(True) == 1
