"""Documents of an epoch: every token is kept, truncated or dropped, and counted once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.schema import DataSpec, SourceSpec
from orchestrator.data.chat_template import CONTEXT, LAST_RESPONSE, RESPONSE, Encoded
from orchestrator.data.corpus import Corpus, TokenCounts, build
from orchestrator.data.row_selection import repeat_rows, sample_rows
from orchestrator.data.token_cache import LossOn, TokenStore, write_index, write_shard
from orchestrator.errors import SpecError

Truncation = Literal["right", "left", "drop", "split"]
TRUNCATIONS: list[Truncation] = ["right", "left", "drop", "split"]
LEAST: dict[LossOn, int] = {"all": CONTEXT, "response": RESPONSE, "last_turn": LAST_RESPONSE}
Turns = Sequence[int]


def store_of(
    folder: Path, rows: Sequence[Turns], shards: int = 2, malformed: int = 0, empty: int = 0
) -> TokenStore:
    """Write a store of rows given by their turn labels; token k of row n has the id 1000 n + k."""
    folder.mkdir(parents=True, exist_ok=True)
    encoded = [
        Encoded(np.arange(len(turns), dtype=np.uint32) + 1000 * number, np.array(turns, dtype=np.uint8))
        for number, turns in enumerate(rows)
    ]
    bounds = np.linspace(0, len(rows), shards + 1).astype(int)
    left = [[(f"line {number}", "why") for number in range(count)] for count in (malformed, empty)]
    written = [
        write_shard(
            folder,
            number,
            encoded[bounds[number] : bounds[number + 1]],
            *(left if number == 0 else ()),
        )
        for number in range(shards)
    ]
    write_index(folder, written, {})
    return TokenStore(folder)


def source(path: str = "a.jsonl", **settings: Any) -> SourceSpec:
    return SourceSpec(path=path, **settings)


def data_of(*sources: SourceSpec, **settings: Any) -> DataSpec:
    return DataSpec(train=sources or (source(),), **{"max_length": 16, **settings})


def corpus_of(folder: Path, rows: Sequence[Turns], **settings: Any) -> Corpus:
    return build([store_of(folder, rows)], [source()], data_of(**settings), seed=0)


def choose_rows(count: int, settings_of: SourceSpec, seed: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the rows of a source that an epoch reads."""
    generator = np.random.default_rng(seed)
    return repeat_rows(sample_rows(np.arange(count), settings_of, generator), settings_of, generator)


def spans(corpus: Corpus) -> list[tuple[int, int, int]]:
    """Return (row, first token, length) of each document."""
    return list(zip(corpus.row.tolist(), corpus.start.tolist(), corpus.lengths.tolist(), strict=True))


def answer(context: int, response: int) -> list[int]:
    return [CONTEXT] * context + [LAST_RESPONSE] * response


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


# Sampling and repetition of rows


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 60),
    st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0, 1.1, 1.5, 2.0, 2.75]),
    st.integers(1, 10),
    st.one_of(st.none(), st.integers(1, 60)),
    st.integers(0, 2**32 - 1),
)
def test_every_row_is_read_as_often_as_repeat_and_weight_say(
    count: int, weight: float, repeat: int, sample: int | None, seed: int
) -> None:
    if sample is not None and sample > count:
        sample = count or None
    settings_of = source(weight=weight, repeat=repeat, sample=sample)
    rows = choose_rows(count, settings_of, [seed, 0])
    distinct = count if sample is None else sample
    assert abs(len(rows) - distinct * repeat * weight) <= 0.5 + 1e-9
    times = Counter(rows.tolist())
    assert set(times) <= set(range(count))
    # Read counts of the sampled rows differ by at most one; all other rows are never read.
    often = [times[row] for row in range(count) if times[row]] if repeat * weight >= 1 else [*times.values()]
    if repeat * weight >= 1:
        assert len(times) == distinct
    assert all(int(repeat * weight + 1e-9) <= each <= int(repeat * weight) + 1 for each in often)
    assert rows.tolist() == choose_rows(count, settings_of, [seed, 0]).tolist()


def test_whole_passes_read_every_row_in_order() -> None:
    assert choose_rows(3, source(), [0, 0]).tolist() == [0, 1, 2]
    assert choose_rows(3, source(repeat=2), [0, 0]).tolist() == [0, 1, 2, 0, 1, 2]
    assert choose_rows(2, source(repeat=2, weight=1.5), [0, 0]).tolist() == [0, 1] * 3
    assert choose_rows(4, source(repeat=10, weight=0.1), [0, 0]).tolist() == [0, 1, 2, 3]


def test_a_part_of_a_pass_reads_different_rows_for_different_seeds() -> None:
    half = source(weight=0.5)
    first = choose_rows(100, half, [1, 0]).tolist()
    assert len(first) == len(set(first)) == 50
    assert first == sorted(first)
    assert first == choose_rows(100, half, [1, 0]).tolist()
    assert first != choose_rows(100, half, [2, 0]).tolist()
    assert first != choose_rows(100, half, [1, 1]).tolist()
    more = Counter(choose_rows(100, source(weight=2.25), [1, 0]).tolist())
    assert Counter(more.values()) == {2: 75, 3: 25}


def test_a_sample_is_drawn_without_replacement() -> None:
    first = choose_rows(100, source(sample=30), [1, 0]).tolist()
    assert len(set(first)) == 30
    assert first == sorted(first)
    assert first == choose_rows(100, source(sample=30), [1, 0]).tolist()
    assert first != choose_rows(100, source(sample=30), [2, 0]).tolist()
    assert choose_rows(100, source(sample=100), [1, 0]).tolist() == list(range(100))
    twice = choose_rows(100, source(sample=30, repeat=2), [1, 0]).tolist()
    assert twice == first * 2


def test_a_sample_larger_than_its_source_is_refused_with_both_numbers(tmp_path: Path) -> None:
    stores = [store_of(tmp_path / name, [answer(1, 2)] * 3) for name in ("a", "b", "c")]
    sources = [source("a", sample=4), source("b", sample=3), source("c", sample=9)]
    with pytest.raises(SpecError) as problem:
        build(stores, sources, data_of(*sources), 0)
    assert len(problem.value.problems) == 2
    assert "data source a: sample=4 is above its 3 rows" in problem.value.problems[0]
    assert "data source c: sample=9 is above its 3 rows;" in problem.value.problems[1]


def test_a_sample_is_drawn_from_the_rows_that_have_something_to_learn(tmp_path: Path) -> None:
    few = source(sample=4)
    store = store_of(tmp_path, [answer(1, 2)] * 3, malformed=1, empty=2)
    with pytest.raises(SpecError, match=r"sample=4 is above its 3 rows \(and 2 that have nothing to learn\)"):
        build([store], [few], data_of(few), 0)


def test_sources_are_mixed_and_counted_separately(tmp_path: Path) -> None:
    stores = [
        store_of(tmp_path / "a", [answer(2, 3)] * 10, malformed=2),
        store_of(tmp_path / "b", [answer(4, 20), answer(20, 1)]),
        store_of(tmp_path / "c", [answer(1, 1)] * 8, malformed=1, empty=5),
    ]
    sources = [source("a", sample=4), source("b", repeat=3), source("c", weight=0.5)]
    corpus = build(stores, sources, data_of(*sources), seed=5)
    assert corpus.store.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert corpus.source_counts == (
        TokenCounts(4, 4, 20, 20, rows_malformed=2, trained_tokens=12, rows_in_files=12),
        TokenCounts(
            6, 3, 135, 48, 24, 63, rows_truncated=3, rows_dropped=3, trained_tokens=36, rows_in_files=2
        ),
        TokenCounts(4, 4, 8, 8, rows_malformed=1, trained_tokens=4, rows_empty=5, rows_in_files=14),
    )
    assert corpus.counts == TokenCounts(14, 11, 163, 76, 24, 63, 3, 3, 0, 3, 52, 5, 0, 28)
    again = build(stores, sources, data_of(*sources), seed=5)
    other = build(stores, sources, data_of(*sources), seed=6)
    assert spans(again) == spans(corpus)
    assert spans(other) != spans(corpus)


def test_two_sources_of_the_same_rows_draw_different_samples(tmp_path: Path) -> None:
    store = store_of(tmp_path, [answer(1, 2)] * 100)
    half = source(weight=0.5)
    corpus = build([store, store], [half, half], data_of(half, half), seed=0)
    assert corpus.row[corpus.store == 0].tolist() != corpus.row[corpus.store == 1].tolist()


def test_token_counts_add_up() -> None:
    first = TokenCounts(*range(1, 15))
    assert first + first == TokenCounts(*range(2, 30, 2))
    assert first + TokenCounts() == first
