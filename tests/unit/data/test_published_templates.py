"""With published chat templates, what is learnt is what marks made by hand enclose, after the prompt."""

from datetime import UTC, datetime

import pytest

from orchestrator.data import traced_template
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

TEMPLATES = folder()
if TEMPLATES is None:
    pytest.skip("TRL is not installed: pip install --no-deps trl==1.16.0", allow_module_level=True)


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
    assert DOCUMENT.read_text(encoding="utf-8") == table(TEMPLATES)
