"""`Corpus.cut`: pieces of documents, as `packing: concat` cuts them, are documents themselves."""

from pathlib import Path

import numpy as np

from orchestrator.data.corpus import TokenCounts, build
from orchestrator.data.packing import Pieces
from tests.unit.data.test_corpus import answer, data_of, source, spans, store_of


def pieces(*parts: tuple[int, int, int]) -> Pieces:
    return Pieces(*(np.array(column, dtype=np.int64) for column in zip(*parts, strict=True)))


def test_pieces_of_documents_are_documents(tmp_path: Path) -> None:
    stores = [store_of(tmp_path / "a", [answer(2, 6)]), store_of(tmp_path / "b", [answer(4, 26)])]
    sources = [source("a"), source("b")]
    corpus = build(stores, sources, data_of(*sources, truncation="left"), 0)
    assert spans(corpus) == [(0, 0, 8), (0, 14, 16)]
    cut = corpus.cut(pieces((1, 0, 5), (1, 5, 1), (0, 0, 8), (1, 6, 10)))
    assert cut.store.tolist() == [1, 1, 0, 1]
    assert spans(cut) == [(0, 14, 5), (0, 19, 1), (0, 0, 8), (0, 20, 10)]
    assert cut.trained.tolist() == [4, 0, 6, 9]
    for number, (row, start, length) in enumerate(spans(cut)):
        document = cut.document(number)
        assert document.tokens.tolist() == list(range(1000 * row + start, 1000 * row + start + length))
        assert not document.trained[0]
        assert document.trained.sum() == cut.trained[number]
    assert cut.source_counts == (
        TokenCounts(1, 1, 8, 8, trained_tokens=6, rows_in_files=1),
        TokenCounts(1, 3, 30, 16, 14, rows_truncated=1, rows_split=1, trained_tokens=13, rows_in_files=1),
    )
    assert corpus.counts.documents == 2  # cut does not modify the corpus


def test_a_row_that_is_split_and_cut_again_counts_as_split_once(tmp_path: Path) -> None:
    rows = [answer(4, 36), answer(2, 6)]
    double = source(repeat=2)
    corpus = build([store_of(tmp_path, rows)], [double], data_of(double, truncation="split"), 0)
    assert corpus.counts.rows_split == 2
    whole = [(number, 0, int(length)) for number, length in enumerate(corpus.lengths)]
    assert corpus.cut(pieces(*whole)).counts.rows_split == 2
    halves = [
        (number, at * 4, 4) for number, length in enumerate(corpus.lengths) for at in range(length // 4)
    ]
    cut = corpus.cut(pieces(*halves))
    assert cut.counts.documents == 24
    assert cut.counts.rows_split == cut.counts.rows == 4
