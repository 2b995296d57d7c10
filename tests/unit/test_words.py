"""Words that this project does not use are found, and may only become fewer."""

from __future__ import annotations

import pytest

from tests.unit.words import COMMAND, ROOT, Word, excess, tracked_texts, with_counts, words

_TEXTS = {
    "a.py": '"""It is kept beside\nit."""\n# as a matter\n# of course\nTrial = 1\ntrial = 2\nbesides = 3\n',
    "b.md": "Beside\nTrial\n",
}


@pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="files are listed by git, and this is not a git checkout"
)
def test_no_word_occurs_more_often_than_allowed() -> None:
    texts = tracked_texts()
    messages = excess({word: word.places(texts) for word in words()})
    assert not messages, f"`{COMMAND} --list` prints every place\n" + "\n".join(messages)


def test_a_phrase_is_found_in_any_case_and_across_lines() -> None:
    assert Word("beside", "with").places(_TEXTS) == ["a.py:1: beside", "b.md:1: Beside"]
    assert Word("a matter of", "depends on").places(_TEXTS) == ["a.py:3: a matter # of"]


def test_a_name_is_found_in_code_only_and_as_it_is_written() -> None:
    assert Word("Trial", "BenchmarkRun", is_name=True).places(_TEXTS) == ["a.py:5: Trial"]


def test_more_than_allowed_is_an_error_that_names_places_and_the_better_word() -> None:
    word = Word("beside", "with, next to", allowed=1)
    places = word.places(_TEXTS)
    assert excess({word: places[:1]}) == []
    assert excess({word: places}) == [
        "'beside' occurs 2 times, 1 are allowed; write: with, next to\n  a.py:1: beside\n  b.md:1: Beside"
    ]


def test_what_is_allowed_is_lowered_and_never_raised() -> None:
    text = "[[phrase]]\npattern = '{}'\nbetter = \"x\"\nallowed = {}\n"
    found = {Word("few", "x", allowed=3): ["one"], Word("so many", "x", allowed=1): ["one", "two"]}
    before = text.format("few", 3) + text.format("so many", 1)
    assert with_counts(before, found) == text.format("few", 1) + text.format("so many", 1)
    none_left = with_counts(before, {Word("few", "x", allowed=3): []})
    assert none_left.startswith("[[phrase]]\npattern = 'few'\nbetter = \"x\"\n[[phrase]]")
