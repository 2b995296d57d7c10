"""Rows of a source that an epoch reads: sampling, weights and repetition."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.corpus import TokenCounts, build
from orchestrator.errors import SpecError
from tests.unit.data.corpora import answer, choose_rows, data_of, source, spans, store_of


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
