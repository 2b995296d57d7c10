"""Documents of an epoch: every token is kept, truncated or dropped, and counted once."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.chat_template import CONTEXT, LAST_RESPONSE, RESPONSE
from orchestrator.data.corpus import TokenCounts, build
from orchestrator.data.token_cache import LossOn
from orchestrator.errors import SpecError
from tests.unit.data.corpora import Turns, answer, choose_rows, corpus_of, data_of, source, spans, store_of

Truncation = Literal["right", "left", "drop", "split"]
TRUNCATIONS: list[Truncation] = ["right", "left", "drop", "split"]
LEAST: dict[LossOn, int] = {"all": CONTEXT, "response": RESPONSE, "last_turn": LAST_RESPONSE}


# The vectorized implementation against a loop over rows


@dataclass
class Expected:
    """Documents and counts, computed row by row."""

    documents: list[tuple[int, int, int, list[bool]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def read(self, number: int, turns: Turns, limit: int, truncation: Truncation, loss_on: LossOn) -> None:
        length = len(turns)
        parts = {
            "right": [(0, min(length, limit))],
            "left": [(max(0, length - limit), length)],
            "drop": [(0, length)] if length <= limit else [],
            "split": [(start, min(start + limit, length)) for start in range(0, length, limit)],
        }[truncation]
        documents = []
        for start, end in parts:
            trained = [at > start and turns[at] >= LEAST[loss_on] for at in range(start, end)]
            if any(trained):
                documents.append((number, start, end - start, trained))
        kept = sum(length for _, _, length, _ in documents)
        cut_off = length - kept if documents and truncation != "split" else 0
        self.documents += documents
        self.counts.update(
            rows=1,
            documents=len(documents),
            tokens_read=length,
            tokens_kept=kept,
            tokens_truncated=cut_off,
            tokens_dropped=length - kept - cut_off,
            rows_truncated=int(cut_off > 0),
            rows_dropped=int(not documents),
            rows_split=int(len(documents) > 1),
            trained_tokens=sum(sum(trained) for _, _, _, trained in documents),
        )


@st.composite
def rows_of_turns(draw: st.DrawFn) -> list[list[int]]:
    """Draw rows as runs of equal turn labels, some of them much longer than a pack."""
    runs = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 24)), max_size=5)
    return [[turn for turn, count in row for _ in range(count)] for row in draw(st.lists(runs, max_size=7))]


@settings(max_examples=250, deadline=None)
@given(
    st.lists(rows_of_turns(), min_size=1, max_size=3),
    st.integers(16, 40),
    st.sampled_from(TRUNCATIONS),
    st.sampled_from(list(LEAST)),
    st.sampled_from([1.0, 0.5, 2.5]),
    st.integers(0, 2**32 - 1),
)
def test_documents_and_counts_are_what_they_should_be(
    tmp_path_factory: pytest.TempPathFactory,
    tables: list[list[list[int]]],
    limit: int,
    truncation: Truncation,
    loss_on: LossOn,
    weight: float,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("stores")
    stores = [store_of(folder / str(number), rows, malformed=number) for number, rows in enumerate(tables)]
    sources = [source(f"{number}.jsonl", weight=weight) for number in range(len(tables))]
    data = data_of(*sources, max_length=limit, truncation=truncation, loss_on=loss_on)
    expected = []
    for number, rows in enumerate(tables):
        expected.append(Expected())
        for at in choose_rows(len(rows), sources[number], [seed, number]).tolist():
            expected[-1].read(at, rows[at], limit, truncation, loss_on)
    if not any(each.documents for each in expected):
        with pytest.raises(SpecError, match="keeps a token to train on"):
            build(stores, sources, data, seed)
        return

    corpus = build(stores, sources, data, seed)
    documents = [(number, *each) for number, every in enumerate(expected) for each in every.documents]
    assert len(corpus) == len(documents)
    assert corpus.store.tolist() == [number for number, *_ in documents]
    assert spans(corpus) == [(row, start, length) for _, row, start, length, _ in documents]
    assert corpus.trained.tolist() == [sum(trained) for *_, trained in documents]
    assert corpus.lengths.max() <= limit
    assert corpus.trained.min() > 0
    for number, (_, row, start, length, trained) in enumerate(documents):
        document = corpus.document(number)
        assert document.tokens.dtype == np.uint32
        assert document.tokens.tolist() == list(range(1000 * row + start, 1000 * row + start + length))
        assert document.trained.tolist() == trained
        assert not document.trained[0]
    seen: set[tuple[int, tuple[int, ...]]] = set()  # the tokens of a row follow from its number and length
    for number, (counts, want) in enumerate(zip(corpus.source_counts, expected, strict=True)):
        rows_of = [(at if turns else 0, tuple(turns)) for at, turns in enumerate(tables[number])]
        before, seen = len(seen), seen | set(rows_of)
        assert counts == TokenCounts(
            **want.counts,
            rows_malformed=number,
            rows_in_files=len(tables[number]) + number,
            rows_duplicate=len(rows_of) - (len(seen) - before),
        )
    total = corpus.counts
    assert total.tokens_read == total.tokens_kept + total.tokens_truncated + total.tokens_dropped
    assert total.documents == len(corpus)
    assert total.trained_tokens == corpus.trained.sum()


# Rows longer than a pack


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("length", [15, 16])
def test_what_fits_is_not_touched(tmp_path: Path, truncation: Truncation, length: int) -> None:
    corpus = corpus_of(tmp_path, [answer(4, length - 4)], truncation=truncation)
    assert spans(corpus) == [(0, 0, length)]
    assert corpus.counts == TokenCounts(
        rows=1,
        documents=1,
        tokens_read=length,
        tokens_kept=length,
        trained_tokens=length - 4,
        rows_in_files=1,
    )


@pytest.mark.parametrize(
    ("truncation", "context", "first", "trained"),
    [
        ("right", 4, 0, [False] * 4 + [True] * 12),
        ("left", 2, 4, [False] + [True] * 15),  # the first kept token is never a target
    ],
)
def test_right_keeps_the_start_and_left_the_end(
    tmp_path: Path, truncation: Truncation, context: int, first: int, trained: list[bool]
) -> None:
    corpus = corpus_of(tmp_path, [answer(context, 20 - context)], truncation=truncation)
    assert corpus.document(0).tokens.tolist() == list(range(first, first + 16))
    assert corpus.document(0).trained.tolist() == trained
    assert corpus.counts == TokenCounts(
        rows=1,
        documents=1,
        tokens_read=20,
        tokens_kept=16,
        tokens_truncated=4,
        rows_truncated=1,
        trained_tokens=sum(trained),
        rows_in_files=1,
    )


def test_drop_leaves_a_long_row_out(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [answer(4, 13), answer(2, 3)], truncation="drop")
    assert spans(corpus) == [(1, 0, 5)]
    assert corpus.counts == TokenCounts(
        rows=2,
        documents=1,
        tokens_read=22,
        tokens_kept=5,
        tokens_dropped=17,
        rows_dropped=1,
        trained_tokens=3,
        rows_in_files=2,
    )


def test_split_goes_on_with_a_row_and_leaves_nothing_out(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [answer(4, 36)], truncation="split")
    assert spans(corpus) == [(0, 0, 16), (0, 16, 16), (0, 32, 8)]
    tokens = np.concatenate([corpus.document(number).tokens for number in range(3)])
    assert tokens.tolist() == list(range(40))
    assert corpus.counts == TokenCounts(
        rows=1,
        documents=3,
        tokens_read=40,
        tokens_kept=40,
        rows_split=1,
        trained_tokens=12 + 15 + 7,
        rows_in_files=1,
    )


def test_of_a_split_row_parts_without_an_answer_are_left_out(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [answer(20, 13)], truncation="split")
    assert spans(corpus) == [(0, 16, 16)]  # the last part is one token, never a target
    assert corpus.counts == TokenCounts(
        rows=1,
        documents=1,
        tokens_read=33,
        tokens_kept=16,
        tokens_dropped=17,
        trained_tokens=12,
        rows_in_files=1,
    )


def test_a_row_whose_answer_is_cut_away_is_left_out(tmp_path: Path) -> None:
    rows = [answer(16, 4), answer(15, 5)]
    corpus = corpus_of(tmp_path, rows, truncation="right")
    assert spans(corpus) == [(1, 0, 16)]
    assert corpus.trained.tolist() == [1]
    assert corpus.counts.rows_dropped == 1
    assert corpus.counts.tokens_dropped == 20


def test_earlier_answers_are_learnt_unless_only_the_last_is(tmp_path: Path) -> None:
    turns = [0, 0, 1, 1, 0, 2, 2, 2, 0]
    store = store_of(tmp_path, [turns])
    for loss_on, trained in (("all", 8), ("response", 5), ("last_turn", 3)):
        corpus = build([store], [source()], data_of(loss_on=loss_on), 0)
        assert corpus.trained.tolist() == [trained]
        assert corpus.document(0).trained[1:].tolist() == [turn >= LEAST[loss_on] for turn in turns[1:]]


def test_a_corpus_of_nothing_says_why(tmp_path: Path) -> None:
    stores = [store_of(tmp_path / "a", [answer(16, 4)] * 3), store_of(tmp_path / "b", [])]
    with pytest.raises(SpecError, match="no row of a, b keeps a token to train on") as problem:
        build(stores, [source("a"), source("b")], data_of(), 0)
    assert "3 of 3 were dropped with max_length=16, truncation=right and loss_on=response" in str(
        problem.value
    )
    assert "raise data.max_length" in str(problem.value)
