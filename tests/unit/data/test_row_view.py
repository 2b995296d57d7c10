"""The view of a row shows the text and the targets of the loss as the packed dataset has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.config.schema import DataSpec, ModelSpec, SourceSpec
from orchestrator.data.columns import RowNames
from orchestrator.data.corpus import build
from orchestrator.data.encode_rows import encode_block, encode_values
from orchestrator.data.readers import Block
from orchestrator.data.row_selection import Split, select_rows
from orchestrator.data.rows import learnt_of
from orchestrator.data.shown_rows import collect
from orchestrator.data.token_cache import TokenStore, write_index, write_shard
from orchestrator.errors import SpecError
from tests.unit.data.views import text_and_learnt, view

TALK = {
    "messages": [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue 🎉 é."},
        {"role": "user", "content": "And one more."},
        {"role": "assistant", "content": "Red."},
    ]
}
ALPACA = {"instruction": "Name a colour.", "output": "Blue."}


def test_text_and_learnt_pieces_of_a_conversation(tokenizer: Any) -> None:
    text, learnt = text_and_learnt(TALK, tokenizer)
    assert text == (
        "<s><|user|>Name a colour.<|assistant|>Blue 🎉 é.</s><|user|>And one more.<|assistant|>Red.</s>"
    )
    assert learnt == ["Blue 🎉 é.</s>", "Red.</s>"]


def test_loss_on_selects_the_pieces(tokenizer: Any) -> None:
    assert text_and_learnt(TALK, tokenizer, loss_on="last_turn")[1] == ["Red.</s>"]
    text, learnt = text_and_learnt(TALK, tokenizer, loss_on="all")
    assert learnt == [text.removeprefix("<s>")], "no token predicts the first one"


def test_the_template_is_named(tokenizer: Any) -> None:
    assert view(TALK, tokenizer, chat_template="alpaca").template == "chat template of the tokenizer"
    assert view(ALPACA, tokenizer).template == "chat template of the tokenizer"
    assert view(ALPACA, tokenizer, chat_template="alpaca").template == "alpaca"
    assert view({"text": "Plain."}, tokenizer).template == "none"


def test_spans_cover_the_text_in_every_kind_of_tokenizer(tokenizer: Any, metaspace_tokenizer: Any) -> None:
    row = {
        "messages": [{"role": "user", "content": "name a colour"}, {"role": "assistant", "content": "blue"}]
    }
    for each in (tokenizer, metaspace_tokenizer):
        found = view(row, each)
        assert found.spans[0, 0] == 0
        assert (found.spans[1:, 0] <= found.spans[:-1, 1]).all(), "no gaps"
        assert found.spans[-1, 1] == len(found.text)
        assert found.learnt_pieces[0].strip() == "blue</s>"


def test_truncation_cuts_text_and_learnt_pieces(tokenizer: Any) -> None:
    row = {"text": "abc " * 40}
    whole = view(row, tokenizer, max_length=4096)
    assert whole.kept.all()
    right = view(row, tokenizer, max_length=16)
    assert right.kept.tolist() == [True] * 16 + [False] * (len(whole.ids) - 16)
    assert whole.text.startswith(right.text_read)
    left = view(row, tokenizer, max_length=16, truncation="left")
    assert whole.text.endswith(left.text_read)
    assert not left.learnt[-16], "the first token of a document has no label"
    dropped = view(row, tokenizer, max_length=16, truncation="drop")
    assert dropped.left_out == (
        f"dropped: {len(whole.ids)} tokens with max_length=16, truncation=drop, loss_on=response"
    )
    assert dropped.learnt_pieces == []


def test_a_split_row_is_several_documents(tokenizer: Any) -> None:
    found = view({"text": "abc " * 40}, tokenizer, max_length=16, truncation="split")
    assert found.starts == tuple(range(0, len(found.ids), 16))
    assert not found.learnt[list(found.starts)].any()
    assert found.text_read == found.text
    assert len(found.learnt_pieces) == len(found.starts)


def test_an_answer_after_max_length_leaves_the_row_out(tokenizer: Any) -> None:
    found = view({"instruction": "Say it. " * 20, "output": "x"}, tokenizer, max_length=16)
    assert (
        found.left_out == "dropped: no trained token with max_length=16, truncation=right, loss_on=response"
    )
    assert found.as_json()["text"] == found.text


def test_rows_that_are_left_out_have_a_reason(tokenizer: Any) -> None:
    empty = view({"instruction": "Say.", "output": " "}, tokenizer)
    assert empty.left_out == "empty: field output is empty"
    assert empty.as_json()["learnt"] == []
    malformed = view({"foo": 1}, tokenizer)
    assert malformed.left_out
    assert malformed.left_out.startswith("malformed: the field foo is not")
    assert malformed.raw == '{"foo": 1}'
    assert view(b"\xff", tokenizer).raw == "\\xff"


def test_an_empty_answer_among_others_is_noted(tokenizer: Any) -> None:
    row = {"messages": [dict(each) for each in TALK["messages"]]}
    row["messages"][1]["content"] = ""
    found = view(row, tokenizer)
    assert found.left_out is None
    assert found.note == "answer 1 of 2 is empty"
    assert found.learnt_pieces == ["Red.</s>"]


def test_tokenized_rows_are_decoded_token_by_token(tokenizer: Any, metaspace_tokenizer: Any) -> None:
    for each, text in ((tokenizer, "Blue 🎉 é."), (metaspace_tokenizer, "blue is the colour")):
        ids = each(text, add_special_tokens=False)["input_ids"]
        labels = [-100, *ids[1:]]
        found = view({"input_ids": ids, "labels": labels}, each)
        assert found.text == text
        assert found.template == "none"
        assert "".join(found.learnt_pieces) == text[int(found.spans[0, 1]) :]


def test_columns_of_the_source_are_used(tokenizer: Any) -> None:
    row = {"ask": "Name a colour.", "say": "Blue."}
    columns: dict[str, str | None] = {"ask": "instruction", "say": "output"}
    text, learnt = text_and_learnt(row, tokenizer, columns=columns)
    assert (text, learnt) == ("<s><|user|>Name a colour.<|assistant|>Blue.</s>", ["Blue.</s>"])
    block = Block("rows.jsonl", "line", (1,), (json.dumps(row).encode(),), RowNames(columns))
    (encoded,) = encode_block(block, "auto", tokenizer, "chat", "answers").encoded.values()
    assert encoded.tokens.tolist() == view(row, tokenizer, columns=columns).ids.tolist()


def test_fields_without_effect_are_noted(tokenizer: Any) -> None:
    found = view({**ALPACA, "id": 3, "url": "x"}, tokenizer)
    assert found.left_out is None
    assert found.note == "fields without effect: id, url"


ROWS = [TALK, ALPACA, {"text": "Blue " * 30}, {"prompt": "Name a colour.", "completion": " Blue."}]


@pytest.mark.parametrize("loss_on", ["response", "all", "last_turn"])
@pytest.mark.parametrize("truncation", ["right", "left", "drop", "split"])
def test_what_is_shown_equals_the_documents(
    tokenizer: Any, tmp_path: Path, loss_on: Any, truncation: Any
) -> None:
    source = SourceSpec(path="rows.jsonl")
    data = DataSpec(train=(source,), max_length=24, loss_on=loss_on, truncation=truncation)
    outcome = encode_values(ROWS, "auto", tokenizer, "chat", learnt_of(data))
    write_index(tmp_path, [write_shard(tmp_path, 0, list(outcome.encoded.values()))], {})
    corpus = build([TokenStore(tmp_path)], [source], data, seed=0)
    documents = [corpus.document(number) for number in range(len(corpus))]
    views = [view(row, tokenizer, max_length=24, loss_on=loss_on, truncation=truncation) for row in ROWS]
    kept, learnt = (
        np.concatenate([(each.ids if name == "ids" else each.learnt)[each.kept] for each in views])
        for name in ("ids", "learnt")
    )
    assert kept.tolist() == np.concatenate([each.tokens for each in documents]).tolist()
    assert learnt.tolist() == np.concatenate([each.trained for each in documents]).tolist()
    assert sum(len(each.starts) for each in views) == len(documents)


def sources(tmp_path: Path) -> DataSpec:
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"foo": 1}\n{"text": "two"}\n')
    parquet.write_table(pa.table({"text": ["three", "four"]}), tmp_path / "b.parquet")
    return DataSpec(train=tuple(SourceSpec(path=str(tmp_path / name)) for name in ("a.jsonl", "b.parquet")))


def test_first_rows_are_those_of_the_sources_in_order(tmp_path: Path) -> None:
    views = collect(ModelSpec(path="builtin/tiny-llama"), sources(tmp_path), 4)
    assert [(Path(each.source).name, each.unit, each.line) for each in views] == [
        ("a.jsonl", "line", 1),
        ("a.jsonl", "line", 3),
        ("a.jsonl", "line", 4),
        ("b.parquet", "row", 1),
    ]
    assert [each.as_json()["text"] for each in views] == ["<s>one</s>", "", "<s>two</s>", "<s>three</s>"]


def test_duplicates_are_left_out_if_the_job_says_so(tmp_path: Path) -> None:
    data = sources(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "four"}\n{"text": "one"}\n')
    model = ModelSpec(path="builtin/tiny-llama")
    assert [each.left_out for each in collect(model, data, 9)] == [None] * 5
    views = collect(model, data.model_copy(update={"deduplicate": True}), 9, ["a.jsonl:3"])
    reasons = [each.left_out for each in views]
    assert reasons == [
        None,
        None,
        f"duplicate: equals data file {tmp_path / 'a.jsonl'}, line 1",
        None,
        f"duplicate: equals data file {tmp_path / 'a.jsonl'}, line 2",
        None,
    ]
    assert views[2].as_json()["learnt"] == []
    assert views[2].as_json()["text"] == "<s>one</s>"


def test_rows_that_are_held_out_have_a_note(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "store").mkdir()
    rows = [{"instruction": str(at), "output": "A long answer."} for at in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(train=(SourceSpec(path=str(tmp_path / "a.jsonl")),))
    views = collect(ModelSpec(path="builtin/tiny-llama"), data, 200, share=0.3, seed=5)
    encoded = encode_values(rows, "auto", tokenizer, "chat", "answers").encoded
    write_index(tmp_path / "store", [write_shard(tmp_path / "store", 0, list(encoded.values()))], {})
    store = TokenStore(tmp_path / "store")
    (selection,) = select_rows([store], data.train, 5, Split(0.3, held_out=True))
    noted = [at for at, view in enumerate(views) if view.note == "held out for evaluation (eval.share)"]
    assert noted == selection.rows.tolist()
    assert 0 < len(noted) < 200
    assert all(view.left_out is None and view.learnt.any() for view in views)


def test_rows_of_evaluation_data_are_found_too(tmp_path: Path) -> None:
    data = sources(tmp_path)
    (tmp_path / "e.jsonl").write_text('{"text": "five"}\n')
    evaluation = [SourceSpec(path=str(tmp_path / "e.jsonl"))]
    (found,) = collect(ModelSpec(path="builtin/tiny-llama"), data, 0, ["e.jsonl:1"], evaluation)
    assert found.learnt_pieces == ["five</s>"]


@pytest.mark.parametrize("name", ["{}/b.parquet:2", "b.parquet:2"])
def test_a_row_is_found_by_file_and_line(tmp_path: Path, name: str) -> None:
    (found,) = collect(ModelSpec(path="builtin/tiny-llama"), sources(tmp_path), 0, [name.format(tmp_path)])
    assert (found.line, found.text) == (2, "<s>four</s>")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("a.jsonl", "is not FILE:LINE"),
        ("a.jsonl:x", "is not FILE:LINE"),
        ("c.jsonl:1", "is not a file of the job's data; use one of"),
        ("a.jsonl:2", "has no row there"),
        ("a.jsonl:99", "has no row there; rows are numbered as in errors, and the nearest one is 4"),
    ],
)
def test_a_row_that_does_not_exist_is_an_error(tmp_path: Path, wanted: str, reason: str) -> None:
    with pytest.raises(SpecError) as raised:
        collect(ModelSpec(path="builtin/tiny-llama"), sources(tmp_path), 0, [wanted])
    assert reason in str(raised.value)
