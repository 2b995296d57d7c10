"""Which kinds of conversations are trained with the chat templates of published models.

    python -m tests.unit.data.published_templates [--others DIR] [--write]

Prints or writes docs/templates.md. The templates are those that TRL ships (`pip install trl==1.16.0`),
unchanged, and the variants that have `{% generation %}` marks made by hand. `--others` adds those in the
subfolders of a folder, each with the name of the distribution that has them.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.chat_template import render
from orchestrator.data.conversation import Rendered
from orchestrator.data.formats import Malformed
from orchestrator.data.rows import Conversation
from orchestrator.data.traced_template import TracedTemplate
from tests.conftest import ROOT
from tests.unit.data.talks import WEATHER, talk
from tests.unit.data.template_folder import tokenizer_of

DOCUMENT = ROOT / "docs" / "templates.md"
MARKED = "_training"
_CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"town": "Oslo"}}}
_THINKING: tuple[Any, ...] = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"},
)
_TOOLS: tuple[Any, ...] = (
    {"role": "user", "content": "Warm in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "12", "name": "get_weather"},
    {"role": "assistant", "content": "It has 12 degrees."},
)
ROWS = {
    "one turn": talk("Name a colour.", "Blue."),
    "two turns": talk("Name a colour.", "Blue.", "And a fruit?", "A plum."),
    "system": talk("Name a colour.", "Blue.", system="Be brief."),
    "tools": Conversation(_TOOLS, ({"type": "function", "function": WEATHER},)),
    "reasoning": Conversation(_THINKING),
}


@dataclass(frozen=True)
class Cell:
    """A row rendered with a template: what is trained, or why the row is refused."""

    template: str
    row: str
    rendered: Rendered | None
    reason: str = ""

    @property
    def learnt(self) -> list[str]:
        """Texts of the spans that are trained."""
        if self.rendered is None:
            return []
        return [self.rendered.text[start:end] for start, end in self.rendered.answers]


def folder() -> Path | None:
    """Return the folder of TRL's templates; None if TRL is not installed."""
    found = importlib.util.find_spec("trl")
    places = (
        [Path(place) / "chat_templates" for place in (found.submodule_search_locations or ())]
        if found
        else []
    )
    return next((place for place in places if place.is_dir()), None)


def names(templates: Path) -> list[str]:
    """Return the names of the unchanged templates."""
    return sorted(path.stem for path in templates.glob("*.jinja") if not path.stem.endswith(MARKED))


def cells(templates: Path, name: str) -> Iterator[Cell]:
    """Render every row with a template."""
    return cells_of(name, tokenizer_of((templates / f"{name}.jinja").read_text(encoding="utf-8")))


def cells_of(name: str, tokenizer: Any) -> Iterator[Cell]:
    """Render every row with the template of a tokenizer."""
    for row, conversation in ROWS.items():
        try:
            yield Cell(name, row, render(conversation, "chat", tokenizer))
        except Malformed as problem:
            yield Cell(name, row, None, str(problem))


def marked_by_hand(templates: Path, cell: Cell) -> list[str] | None:
    """Return what TRL's marked variant marks in the same text; None without one that writes this text."""
    file = templates / f"{cell.template}{MARKED}.jinja"
    if not file.exists() or cell.rendered is None:
        return None
    tokenizer = tokenizer_of("")
    template = TracedTemplate(file.read_text(encoding="utf-8"), tokenizer.special_tokens_map)
    conversation = ROWS[cell.row]
    try:
        traced = template.trace(conversation.messages, [dict(tool) for tool in conversation.tools] or None)
    except Exception:  # the variant refuses the row
        return None
    if traced.text != cell.rendered.text:
        return None
    spans: list[tuple[int, int]] = []
    for start, end in traced.generated:
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif end > start:
            spans.append((start, end))
    return [traced.text[start:end] for start, end in spans]


def table(templates: Path) -> str:
    """Return docs/templates.md."""
    lines = [
        "# Chat templates of published models",
        "",
        "What is trained with the chat templates of published models, as TRL 1.16 ships them. `yes`: the row",
        "is trained, with the tokens of `apply_chat_template`, and the loss covers each answer after the",
        "generation prompt, with its end of turn. Otherwise the reason for which the row is refused.",
        "Written by `python -m tests.unit.data.published_templates --write`.",
        "",
        *_rows((name, cells(templates, name)) for name in names(templates)),
    ]
    return "\n".join([*lines, ""])


def table_of_others(others: Path) -> str:
    """Return the part of docs/templates.md for the templates in the subfolders of a folder."""
    lines = [
        "",
        "## Others",
        "",
        "Templates without marks made by hand; `template_folder` checks what they learn.",
    ]
    seen: set[str] = set()
    for distribution in sorted(path for path in others.iterdir() if path.is_dir()):
        sources = {
            path.stem: path.read_text(encoding="utf-8") for path in sorted(distribution.rglob("*.jinja"))
        }
        new = {name: source for name, source in sources.items() if source not in seen}
        seen.update(new.values())
        lines += ["", f"### {distribution.name}", ""]
        lines += _rows((name, cells_of(name, tokenizer_of(source))) for name, source in new.items())
    return "\n".join([*lines, ""])


def _rows(templates: Iterable[tuple[str, Iterable[Cell]]]) -> Iterator[str]:
    yield f"| template | {' | '.join(ROWS)} |"
    yield "|---" * (len(ROWS) + 1) + "|"
    for name, found in templates:
        entries = ["yes" if cell.rendered else _short(cell.reason) for cell in found]
        yield f"| {name} | {' | '.join(entries)} |"


def _short(reason: str) -> str:
    inner = reason.partition("refuses the row (")[2].rpartition("); change")[0]
    text = inner or reason.partition(":")[0].partition(", so")[0].removeprefix("the model's chat template ")
    return " ".join(text.removeprefix("the chat template ").split()).replace("|", "\\|")[:90]


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--others", type=Path, help="folder with a subfolder for each distribution")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    templates = folder()
    if templates is None:
        parser.error("TRL is not installed: pip install trl==1.16.0")
    text = table(templates) + (table_of_others(arguments.others) if arguments.others else "")
    if arguments.write:
        DOCUMENT.write_text(text, encoding="utf-8")
    else:
        print(text)  # noqa: T201


if __name__ == "__main__":
    main()
