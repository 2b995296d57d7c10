"""Empty answers: their trained tokens, and the rows and counts of a store by `data.empty_answers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.paths import resolve
from orchestrator.config.schema import DataSpec, ModelSpec, SourceSpec
from orchestrator.data import tokenize
from orchestrator.data.chat_template import (
    CONTEXT,
    LAST_RESPONSE,
    RESPONSE,
    Encoded,
    Template,
    TemplateName,
    encode,
)
from orchestrator.data.corpus import build
from orchestrator.data.readers import Block
from orchestrator.data.rows import Conversation, Instruction, Learnt, Text, learnt_of
from orchestrator.data.skipped_rows import left_out, require_rows, too_many
from orchestrator.data.token_cache import TokenStore, write_index, write_shard
from orchestrator.errors import SpecError
from tests.unit.data.talks import TOOL_TEMPLATE, talk, with_template, without_marks

MODEL = ModelSpec(path="builtin/tiny-llama")
# Like Qwen3's template: reasoning is kept in the last answer and removed from earlier ones.
THINKING = """{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{{- '<|user|>' + message.content -}}
    {%- else -%}{{- '<|assistant|>' + ('(no thought)' if loop.last else '') + message.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


def learnt(row: Any, tokenizer: Any, ends: bool, template: TemplateName = "chat") -> tuple[str, str, str]:
    """Return the decoded text of a row, of its trained earlier answers and of its trained last answer."""
    (result,) = encode([row], tokenizer, template, learn_ends=ends)
    assert isinstance(result, Encoded), result
    whole, turn = result.tokens, result.turn
    parts = (whole[turn >= CONTEXT], whole[turn == RESPONSE], whole[turn == LAST_RESPONSE])
    text, earlier, last = map(tokenizer.decode, parts)
    return text, earlier, last


@pytest.mark.parametrize("marks", [True, False])
def test_of_an_empty_turn_nothing_is_learnt_or_its_end(tokenizer: Any, unmarked: Any, marks: bool) -> None:
    mine = tokenizer if marks else unmarked
    first = talk("Hi.", " ", "A colour?", "Blue.")
    text = "<s><|user|>Hi.<|assistant|> </s><|user|>A colour?<|assistant|>Blue.</s>"
    assert learnt(first, mine, ends=False) == (text, "", "Blue.</s>")
    assert learnt(first, mine, ends=True) == (text, " </s>", "Blue.</s>")
    last = talk("Hi.", "Hello!", "A colour?", "")
    text = "<s><|user|>Hi.<|assistant|>Hello!</s><|user|>A colour?<|assistant|></s>"
    assert learnt(last, mine, ends=False) == (text, "", "Hello!</s>")  # the last answer with text
    assert learnt(last, mine, ends=True) == (text, "Hello!</s>", "</s>")


def test_a_template_may_mark_nothing_of_an_empty_answer(tokenizer: Any) -> None:
    marked = "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    assert marked in tokenizer.chat_template
    guarded = f"{{%- if message['content'] -%}}{marked}{{%- else -%}}{{{{- eos_token -}}}}{{%- endif -%}}"
    own = with_template(tokenizer, tokenizer.chat_template.replace(marked, guarded))
    for ends in (False, True):
        answers = learnt(talk("Hi.", "", "A colour?", "Blue.", "Why?", "The sky."), own, ends)[1:]
        assert answers == ("Blue.</s>", "The sky.</s>")


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, without_marks(TOOL_TEMPLATE)])
def test_a_call_without_text_is_an_answer(tool_tokenizer: Any, template: str) -> None:
    call = {"type": "function", "function": {"name": "locate", "arguments": {}}}
    asked = talk("Where am I?").messages
    row = Conversation((*asked, {"role": "assistant", "content": "", "tool_calls": [call]}))
    last = learnt(row, with_template(tool_tokenizer, template), ends=False)[2]
    assert last.startswith('<tool_call>\n{"name": "locate"')


def test_the_end_of_an_instruction_is_learnt(tokenizer: Any) -> None:
    for template in ("chat", "alpaca"):
        assert learnt(Instruction("Hi.", "", ""), tokenizer, True, template)[1:] == ("", "</s>")  # type: ignore[arg-type]
    assert learnt(Text("", "Hi."), tokenizer, ends=True) == ("<s>Hi.</s>", "", "</s>")
    history = Instruction("And?", "", "", history=(("A colour?", "Blue."),))
    assert learnt(history, tokenizer, ends=False)[1:] == ("", "Blue.</s>")
    assert learnt(history, tokenizer, ends=True)[1:] == ("Blue.</s>", "</s>")


def test_the_end_of_an_answer_is_found_though_the_template_writes_it_otherwise_later(tokenizer: Any) -> None:
    own = with_template(tokenizer, THINKING)
    text = "<s><|user|>Hi.<|assistant|></s><|user|>A colour?<|assistant|>(no thought)Blue.</s>"
    row = talk("Hi.", "", "A colour?", "Blue.")
    assert learnt(row, own, ends=True) == (text, "</s>", "(no thought)Blue.</s>")
    assert learnt(row, own, ends=False) == (text, "", "(no thought)Blue.</s>")


ROWS: list[Any] = [
    {"instruction": "Name a colour.", "output": "Blue."},
    {"instruction": "Say nothing.", "output": ""},
    {"instruction": "Say nothing.", "output": None},
    {"instruction": "", "input": "", "output": ""},
    {"instruction": "No output."},
    {"messages": [{"role": "user", "content": "Hi."}]},
    {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": " "}] * 2},
    {
        "conversations": [
            {"from": "human", "value": "Hi."},
            {"from": "gpt", "value": ""},
            {"from": "human", "value": "Well?"},
            {"from": "gpt", "value": "Hello!"},
        ]
    },
    {"prompt": "Two", "completion": ""},
    {"text": " "},
    {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
]


def line(number: int) -> str:
    return f"data file rows.jsonl, line {number}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> TokenStore:
    """A store of ROWS for the parametrized `Learnt`, written by the task function without Ray."""
    mode: Learnt = request.param
    monkeypatch.setattr(tokenize, "_held", lambda _: None)
    values = tuple(json.dumps(row).encode() for row in ROWS)
    block = Block("rows.jsonl", "line", tuple(range(1, len(ROWS) + 1)), values)
    shard = tokenize._write_block._function(MODEL, [None], Template("chat"), mode, "auto", block, tmp_path, 0)
    write_index(tmp_path, [shard], {})
    return TokenStore(tmp_path)


def _data(**settings: Any) -> tuple[SourceSpec, DataSpec]:
    source = SourceSpec(path="rows.jsonl", **settings.pop("source", {}))
    return source, DataSpec(train=(source,), max_length=512, **settings)


NO_LABELS = "none of its tokens is to be learnt"
EMPTY = {
    2: "field output is empty",
    3: "field output is null",
    4: "field output is empty",
    6: "no message of the assistant is to be learnt",
    7: "the answer is empty",
    9: "field completion is empty",
    10: "its text is empty",
    11: NO_LABELS,
}
KEPT_FOR_ITS_END = {2, 3, 7, 9}


@pytest.mark.parametrize(
    ("store", "settings", "empty", "partly"),
    [
        ("answers", {}, set(EMPTY), {8}),
        ("ends", {"empty_answers": "learn_end"}, set(EMPTY) - KEPT_FOR_ITS_END, set()),
        ("all", {"loss_on": "all"}, {4, 10}, set()),
    ],
    indirect=["store"],
)
def test_rows_with_nothing_to_learn_are_left_out_named_and_counted(
    store: TokenStore, settings: dict[str, Any], empty: set[int], partly: set[int]
) -> None:
    source, data = _data(**settings)
    assert store.empty == [(line(number), EMPTY[number]) for number in sorted(empty)]
    assert store.partly_empty == [(line(number), "answer 1 of 2 is empty") for number in sorted(partly)]
    assert [place for place, _ in store.malformed] == [line(5)]
    corpus = build([store], [source], data, 0)
    counts = corpus.counts
    assert counts.rows_in_files == len(ROWS) == counts.rows + counts.rows_malformed + counts.rows_empty
    assert (counts.rows_malformed, counts.rows_empty) == (1, len(empty))
    assert counts.rows_partly_empty == len(partly)
    assert counts.rows_dropped == 0
    assert counts.documents == counts.rows == len(ROWS) - 1 - len(empty)
    assert corpus.trained.min() > 0


@pytest.mark.parametrize("store", ["answers"], indirect=True)
def test_counts_of_rows_in_files_do_not_depend_on_how_often_they_are_read(store: TokenStore) -> None:
    source, data = _data(source={"repeat": 3, "sample": 2})
    counts = build([store], [source], data, 0).counts
    assert counts.rows == 6
    assert (counts.rows_in_files, counts.rows_malformed, counts.rows_empty) == (len(ROWS), 1, len(EMPTY))


@pytest.mark.parametrize("store", ["answers"], indirect=True)
def test_skipped_rows_are_listed_with_their_first_source_lines(store: TokenStore) -> None:
    lines = left_out([_data()[0]], [store])
    assert lines[0] == "1 of 12 rows of rows.jsonl are malformed and left out"
    assert lines[2] == "8 of 12 rows of rows.jsonl have nothing to learn and are left out"
    assert lines[3] == f"  {line(2)}: field output is empty"
    assert lines[-3:-1] == [
        "1 of 12 rows of rows.jsonl have an empty answer, of which nothing is learnt",
        f"  {line(8)}: answer 1 of 2 is empty",
    ]
    assert lines[-1].endswith("have fewer than 3 learnt tokens")


def test_a_source_without_an_answer_is_refused_with_its_counts(tmp_path: Path) -> None:
    write_index(tmp_path, [write_shard(tmp_path, 0, [], [], [(line(1), "field output is empty")])], {})
    with pytest.raises(SpecError, match=r"rows\.jsonl has no row to train on: 1 have nothing to learn and 0"):
        require_rows([_data()[0]], [TokenStore(tmp_path)])


def test_only_what_is_learnt_decides_the_store() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(resolve(MODEL.path)))
    source = SourceSpec(path="d")
    names = {
        mode: tokenize._key(source, ["print"], tokenizer, Template("chat"), mode)
        for mode in ("answers", "ends", "all")
    }
    assert len(set(names.values())) == 3
    for settings, mode in (({"empty_answers": "error"}, "answers"), ({"loss_on": "last_turn"}, "answers")):
        assert learnt_of(_data(**settings)[1]) == mode


# Whole datasets


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tokenization tasks in this process."""

    def write_shards(model: Any, template: Any, learnt: Any, source: Any, files: Any, folder: Path) -> Any:
        blocks = (block for file in files for block in file.blocks())
        for number, block in enumerate(blocks):
            yield tokenize._write_block._function(
                model, [None], template, learnt, source.format, block, folder, number
            )

    monkeypatch.setattr(tokenize, "_held", lambda _: None)
    monkeypatch.setattr(tokenize, "_write_shards", write_shards)


def _tokenized(file: Path, **settings: Any) -> TokenStore:
    source = SourceSpec(path=str(file))
    data = DataSpec(train=(source,), **settings)
    (store,) = tokenize.tokenize_sources(MODEL, data, [source], file.parent / "cache")
    return store


def _skipped(logged: list[str]) -> list[str]:
    """Return the logged messages about skipped rows, and remove all messages."""
    lines = [line for line in logged if "tokenized" not in line]
    logged.clear()
    return lines


@pytest.fixture
def rows(tmp_path: Path, without_ray: None) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS if row != {"instruction": "No output."}))
    return file


def test_skipped_rows_are_logged_again_for_a_cached_store(rows: Path, logged: list[str]) -> None:
    store = _tokenized(rows)
    lines = _skipped(logged)
    assert "8 of 11 rows of" in lines[0]
    assert f"data file {rows}, line 2: field output is empty" in lines[1]
    again = _tokenized(rows, loss_on="last_turn")
    assert (again.folder, _skipped(logged)) == (store.folder, lines)
    ends = _tokenized(rows, empty_answers="learn_end")
    assert (len(store), len(ends)) == (3, 7)
    assert ends.folder != store.folder


def test_empty_answers_are_refused_as_malformed_rows_are_where_the_job_says_so(rows: Path) -> None:
    for _ in range(2):  # the second time from the cached store
        with pytest.raises(SpecError) as problem:
            _tokenized(rows, empty_answers="error")
        sentences = problem.value.problems
        assert len(sentences) == 8
        assert sentences[0] == (
            f"data file {rows}, lines 2 and 4: field output is empty; fill or remove the row, or use "
            "data.empty_answers: skip"
        )
        assert "line 7: answer 1 of 2 is empty; fill or remove" in sentences[-1]
    store = _tokenized(rows, empty_answers="error", malformed_rows_allowed=9)
    assert len(store) == 3
    with pytest.raises(SpecError):
        _tokenized(rows, empty_answers="error", malformed_rows_allowed=8)


def test_rows_with_the_same_reason_are_one_problem() -> None:
    same = [(f"data file a, b.jsonl, line {number}", "no") for number in range(1, 1001)]
    other = [("data file c.csv, row 3", "no"), ("data file a, b.jsonl, line 7", "why")]
    assert too_many([*same[:3], *other], 0).problems == (
        "data file a, b.jsonl, lines 1, 2 and 3: no",
        "data file c.csv, row 3: no",
        "data file a, b.jsonl, line 7: why",
    )
    assert (
        too_many([*same, *other[1:]], 0).problems[0]
        == "data file a, b.jsonl, lines 1, 2, 3, 4, 5 and 995 more: no"
    )
    reasons = [(place, f"reason {number}") for number, (place, _) in enumerate(same)]
    problems = too_many(reasons, 2).problems
    assert len(problems) == 11
    assert problems[-1] == "990 more malformed rows (data.malformed_rows_allowed=2)"


def test_a_file_of_empty_answers_alone_is_refused(rows: Path, logged: list[str]) -> None:
    rows.write_text('{"instruction": "a", "output": ""}\n' * 3)
    with pytest.raises(SpecError, match=r"has no row to train on: 3 have nothing to learn and 0 are malf"):
        _tokenized(rows)
    logged.clear()
    store = _tokenized(rows, loss_on="all")
    assert (len(store), _skipped(logged)) == (3, [])
