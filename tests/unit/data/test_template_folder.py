"""The check of a folder of chat templates finds templates with which the wrong text would be learnt."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.formats import Malformed
from tests.unit.data import template_folder
from tests.unit.data.test_answer_spans import PLAIN


def test_templates_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain.jinja").write_text(PLAIN)
    (tmp_path / "same.jinja").write_text(PLAIN)
    assert template_folder.main(tmp_path) == 0
    written = capsys.readouterr().out
    assert written.splitlines()[-1] == "1 templates, 5 rows trained, 3 refused, 0 faults"
    assert (
        "same, two calls: refused: the model's chat template does not write the tool get_weather" in written
    )


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = template_folder.tokenizer_of(PLAIN)
    render = template_folder.render

    def whole(conversation: Any, *rest: Any) -> Any:
        rendered = render(conversation, *rest)
        return type(rendered)(rendered.text, ((0, len(rendered.text)),))

    monkeypatch.setattr(template_folder, "render", whole)
    found = list(template_folder.faults(tokenizer, template_folder.CONVERSATIONS["three turns"]))
    assert [fault.partition(":")[0] for fault in found] == [
        "learns 'Quest' of another message", "has 1 of 3 answers",
    ]  # fmt: skip
    with pytest.raises(Malformed):
        list(template_folder.faults(tokenizer, template_folder.CONVERSATIONS["two calls"]))
