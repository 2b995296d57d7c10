"""Find words that this project does not use in code, texts and documents.

    python -m tests.unit.words [--list] [--write]

The words are in `words.toml`, each with what to write instead. Counts may only fall: the command ends with
status 1 if a word occurs more often than `allowed`. `--list` prints every place,
`--write` lowers `allowed` to the counts.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_suffix(".toml")
COMMAND = "python -m tests.unit.words"
_SUFFIXES = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", "Makefile", ".ci/run", ".cfg", ".txt")
_SKIPPED = (
    "tests/golden/",
    "tests/unit/words.toml",
    "tests/unit/test_words.py",
    "docs/glossary.md",
    "docs/figures/",
    "constraints/",
)
"""Golden files repeat what the source says; the glossary, the list and its tests name the words to avoid."""


@dataclass(frozen=True)
class Word:
    """A word to avoid.

    Attributes:
        pattern: Regular expression, matched as a whole word, whatever its case unless it is a name.
        better: What to write instead.
        allowed: How often it may occur in the tree.
        is_name: Whether it is a name in Python code, and is looked for nowhere else.
    """

    pattern: str
    better: str
    allowed: int = 0
    is_name: bool = False

    def places(self, texts: Mapping[str, str]) -> list[str]:
        """Return where the word occurs, as `file:line: words`."""
        spaced = self.pattern.replace(" ", r"[\s#]+")
        search = re.compile(rf"\b(?:{spaced})\b", self._flags)
        return [
            f"{file}:{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())}"
            for file, text in texts.items()
            if not self.is_name or file.endswith(".py")
            for match in search.finditer(text)
        ]

    @property
    def _flags(self) -> re.RegexFlag:
        return re.NOFLAG if self.is_name else re.IGNORECASE


def words(listed: Path = LIST) -> list[Word]:
    """Return the words to avoid."""
    tables = tomllib.loads(listed.read_text("utf-8"))
    return [
        Word(**entry, is_name=kind == "name") for kind in ("phrase", "name") for entry in tables.get(kind, ())
    ]


def tracked_texts(root: Path = ROOT) -> dict[str, str]:
    """Return the text of every file under version control in which words are looked for."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True)
    names = [name for name in done.stdout.split("\0") if name.endswith(_SUFFIXES)]
    files = {name: root / name for name in names if not name.startswith(_SKIPPED)}
    return {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}


def excess(found: Mapping[Word, list[str]], shown: int = 15) -> list[str]:
    """Return a message for each word that occurs more often than it may.

    Args:
        found: The places of each word.
        shown: How many of them to list.
    """
    return [
        f"{word.pattern!r} occurs {len(places)} times, {word.allowed} are allowed; write: {word.better}\n  "
        + "\n  ".join(places[:shown] + (["..."] if len(places) > shown else []))
        for word, places in found.items()
        if len(places) > word.allowed
    ]


def with_counts(text: str, found: Mapping[Word, list[str]]) -> str:
    """Return the text of the list with `allowed` of each word lowered to its count, or left out at 0."""
    for word, places in found.items():
        count = min(len(places), word.allowed)
        entry = rf"(pattern = '{re.escape(word.pattern)}'\nbetter = \"[^\n]*\"\n)(?:allowed = \d+\n)?"
        line = f"allowed = {count}\n" if count else ""
        text = re.sub(entry, lambda match, line=line: match[1] + line, text)
    return text


def main() -> None:
    """Print what occurs too often; end with status 1 if anything does."""
    parser = argparse.ArgumentParser(description="Find words that this project does not use.")
    parser.add_argument("--list", action="store_true", help="print every place of every word")
    parser.add_argument("--write", action="store_true", help="lower what is allowed to what there is")
    asked = parser.parse_args()
    texts = tracked_texts()
    found = {word: word.places(texts) for word in words()}
    if asked.write:
        LIST.write_text(with_counts(LIST.read_text("utf-8"), found), encoding="utf-8")
    elif asked.list:
        sys.stdout.write("".join(f"{place}\n" for places in found.values() for place in places))
    else:
        messages = excess(found)
        sys.stdout.write("".join(f"{message}\n" for message in messages))
        sys.exit(bool(messages))


if __name__ == "__main__":
    main()
