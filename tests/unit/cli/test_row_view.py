"""Rows are printed with colours or marks, and written as a page."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import row_view
from orchestrator.cli.main import app
from orchestrator.config.paths import resolve
from orchestrator.errors import SpecError
from orchestrator.train import driver
from tests.unit.data.views import view

ROW = {
    "messages": [{"role": "user", "content": "Say\t⟦\n<b>."}, {"role": "assistant", "content": "Blue &\x1b."}]
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(resolve("builtin/tiny-llama")))


def test_marks_without_a_terminal(tokenizer: Any) -> None:
    text = row_view.as_text([view(ROW, tokenizer)], colour=False)
    body = text.split("learnt\n")[-1].replace("│", "")
    assert body == "  <s><|user|>Say\\t\\u27e6↵\n  <b>.<|assistant|>⟦Blue &\\x1b.</s>⟧"
    assert "\x1b" not in text
    assert "tokens: 2" in text


def test_tokens_are_separated(tokenizer: Any) -> None:
    text = row_view.as_text([view({"text": "one two"}, tokenizer)], colour=False)
    assert "<s>⟦on│e│ two│</s>⟧" in text or "│ two│</s>⟧" in text


def test_truncated_and_split_rows(tokenizer: Any) -> None:
    cut = row_view.as_text([view({"text": "ab " * 20}, tokenizer, max_length=16)], colour=False)
    assert "cut by truncation\n" in cut
    assert cut.endswith("</s>⟫")
    split = row_view.as_text(
        [view({"text": "ab " * 20}, tokenizer, max_length=16, truncation="split")], False
    )
    assert " documents" in split
    assert "⟫" not in split.split("\n\n", 1)[1]


def test_left_out_rows_show_the_reason_and_the_row(tokenizer: Any) -> None:
    text = row_view.as_text([view({"foo": "\x1b[31m"}, tokenizer)], colour=True)
    assert "left out: malformed: the field foo" in text
    assert '{"foo": "\\u001b[31m"}' in text


def test_colours_on_a_terminal(tokenizer: Any) -> None:
    text = row_view.as_text([view(ROW, tokenizer)], colour=True)
    assert "\x1b[30;42m" in text
    assert "⟦B" not in text
    assert text.count("\x1b[0m") >= 10


def test_the_environment_can_turn_colours_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert row_view.use_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not row_view.use_colour()


def test_the_page_is_escaped_and_complete(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.html"
    row_view.write_html([view(ROW, tokenizer), view({"foo": "<script>"}, tokenizer)], file, "Rows of <x>")
    page = file.read_text("utf-8")
    assert "<title>Rows of &lt;x&gt;</title>" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<section>") == page.count("</section>") == 2
    assert 'class="learnt' in page
    assert "http" not in page
    with pytest.raises(SpecError, match="cannot be written"):
        row_view.write_html([], tmp_path / "absent" / "rows.html", "x")


def job(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + '\n{"foo": 1}\n')
    (tmp_path / "job.yaml").write_text(
        "name: look\nmodel: {path: builtin/tiny-llama, weights: random}\n"
        f"data: {{train: [{{path: {tmp_path / 'rows.jsonl'}}}]}}\n"
        f"checkpoint: {{storage: {tmp_path / 'runs'}}}\n"
    )
    return str(tmp_path / "job.yaml")


def test_pack_adds_the_rows_to_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "prepare", lambda job, address: {"rows": 1, "sources": []})
    done = CliRunner().invoke(app, ["pack", job(tmp_path), "--show", "9", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["rows"] == 1
    first, second = found["rows_shown"]
    assert first == {
        "source": str(tmp_path / "rows.jsonl"),
        "line": 1,
        "text": "<s><|user|>Say\t⟦\n<b>.<|assistant|>Blue &\x1b.</s>",
        "learnt": ["Blue &\x1b.</s>"],
        "tokens": first["tokens"],
        "learnt_tokens": first["learnt_tokens"],
        "tokens_truncated": 0,
        "template": "chat template of the tokenizer",
        "left_out": None,
        "note": None,
    }
    assert first["tokens"] > first["learnt_tokens"] > 0
    assert second["line"] == 2
    assert second["left_out"].startswith("malformed: ")


def test_rows_are_shown_although_packing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: object, address: object) -> None:
        raise SpecError("a row is malformed")

    monkeypatch.setattr(driver, "prepare", fail)
    page = tmp_path / "rows.html"
    row = f"{tmp_path / 'rows.jsonl'}:2"
    done = CliRunner().invoke(app, ["pack", job(tmp_path), "--show-row", row, "--html", str(page)])
    assert done.exit_code == 2
    assert "left out: malformed" in done.stdout
    assert "left out: malformed" in page.read_text("utf-8")
    done = CliRunner().invoke(app, ["pack", job(tmp_path), "--show-row", row, "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["rows_shown"][0]["line"] == 2


def test_a_page_needs_rows(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pack", job(tmp_path), "--html", "rows.html"])
    assert done.exit_code == 2
    assert "requires rows to show" in done.stderr
