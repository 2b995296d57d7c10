"""Chat templates by name, file and text."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.checks.folders import with_absolute_paths
from orchestrator.checks.inputs import input_problems
from orchestrator.config.chat_templates import NAMED
from orchestrator.config.paths import resolve
from orchestrator.config.schema import DataSpec, JobSpec, ModelSpec, SourceSpec
from orchestrator.data.chat_template import choose, render
from orchestrator.data.conversation import FEW_TOKENS, NO_END, NOTES
from orchestrator.data.encode_rows import encode_values
from orchestrator.data.model_tokenizer import ends_of_generation, load_tokenizer, template_source
from orchestrator.data.skipped_rows import left_out
from orchestrator.data.token_cache import TokenStore, write_index, write_shard
from orchestrator.errors import SpecError
from tests.unit.data.talks import talk

MODEL = ModelSpec(path="builtin/tiny-llama")
TWO_TURNS = talk("Name a colour.", "Blue.", "And a fruit?", "A plum.", system="Be brief.")


def data(**settings: Any) -> DataSpec:
    return DataSpec(train=(SourceSpec(path="rows.jsonl"),), **settings)


def job(chat_template: str) -> JobSpec:
    return JobSpec(name="a", model=MODEL, data=data(chat_template=chat_template))


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        ("chatml", ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n"]),
        ("qwen", ["Blue.<|im_end|>\n", "A plum.<|im_end|>\n"]),
        ("llama3", ["Blue.<|eot_id|>", "A plum.<|eot_id|>"]),
        ("gemma", ["Blue.<end_of_turn>\n", "A plum.<end_of_turn>\n"]),
        ("mistral", [" Blue.</s>", " A plum.</s>"]),
        ("phi3", ["Blue.<|end|>\n", "A plum.<|end|>\n"]),
        ("zephyr", ["Blue.</s>\n", "A plum.</s>\n"]),
    ],
)
def test_a_named_template_has_its_tokens_and_teaches_its_end(name: str, spans: list[str]) -> None:
    tokenizer = load_tokenizer(MODEL, name)
    template = choose(data(chat_template=name), MODEL, tokenizer)
    rendered = render(TWO_TURNS, template, tokenizer)
    assert [rendered.text[start:end] for start, end in rendered.answers] == spans
    assert rendered.notes == ()
    assert "Be brief." in rendered.text
    for token in NAMED[name].tokens:
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1
    assert tokenizer.eos_token == (NAMED[name].end or "</s>")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"messages": "x"}, "messages is not a variable that a job can set"),
        ({"eos_token": "x"}, "eos_token is not a variable"),
        ({"_message_tag": "x"}, "_message_tag is not a variable"),
        ({"enable thinking": True}, "enable thinking is not a variable"),
        ({"date": "today"}, "date=today must be a date such as 2026-01-31"),
    ],
)
def test_options_that_a_template_cannot_have_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        data(template_options=options)


def test_the_tokenizer_of_the_model_is_not_changed() -> None:
    before = load_tokenizer(MODEL)
    load_tokenizer(MODEL, "chatml")
    assert load_tokenizer(MODEL).get_vocab() == before.get_vocab()
    assert "<|im_end|>" not in before.get_vocab()


def test_a_template_from_a_file_is_kept_as_text(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for message in messages %}{{ message.content + eos_token }}{% endfor %}")
    resolved = with_absolute_paths(job(str(file)))
    assert resolved.data.chat_template == file.read_text() == template_source(str(file))
    assert with_absolute_paths(resolved).data.chat_template == file.read_text()
    named = with_absolute_paths(job("chatml"))
    assert named.data.chat_template == "chatml"
    assert named.model.new_special_tokens == ("<|im_start|>", "<|im_end|>")
    assert with_absolute_paths(named) == named
    tokenizer = load_tokenizer(MODEL, resolved.data.chat_template)
    assert render(TWO_TURNS, "chat", tokenizer).text == (
        "Be brief.</s>Name a colour.</s>Blue.</s>And a fruit?</s>A plum.</s>"
    )


def test_a_file_that_is_missing_is_an_error_of_its_field(tmp_path: Path) -> None:
    problems = dict(input_problems(job(str(tmp_path / "none.jinja"))))
    message = problems[("data.chat_template",)]
    assert "is not a known template, and not a file that can be read (No such file or directory)" in message
    assert "chatml" in message


def test_a_template_that_is_no_jinja_is_one_error() -> None:
    settings = data(chat_template="{% for message in messages %}{{ message.content }}")
    with pytest.raises(SpecError, match="cannot be compiled"):
        choose(settings, MODEL, load_tokenizer(MODEL, settings.chat_template))


def test_rows_without_a_system_message_get_the_prompt_of_the_job(tokenizer: Any) -> None:
    template = choose(data(system_prompt="Be kind."), MODEL, tokenizer)
    assert render(talk("Hi.", "Hello!"), template, tokenizer).text.startswith(
        "<s><|system|>Be kind.<|user|>Hi."
    )
    assert "Be kind." not in render(TWO_TURNS, template, tokenizer).text


def test_eos_cannot_be_appended_without_an_eos_token() -> None:
    tokenizer = copy.deepcopy(load_tokenizer(MODEL))
    tokenizer.eos_token = None
    with pytest.raises(
        SpecError, match=r"data.append_eos=true, but the tokenizer has no EOS token; name one"
    ):
        choose(data(append_eos=True), MODEL, tokenizer)


def test_ends_of_a_generation_come_from_the_model(tmp_path: Path, tokenizer: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(resolve(MODEL.path), model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    assert ends_of_generation(ModelSpec(path=str(model)), tokenizer) == ("</s>", "<|user|>")
    (model / "generation_config.json").write_text("no JSON")
    assert ends_of_generation(ModelSpec(path=str(model)), tokenizer) == ("</s>",)


def test_rows_are_counted_whose_answers_teach_no_end_or_hardly_anything(
    tokenizer: Any, tmp_path: Path
) -> None:
    template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    values = [
        json.dumps({"instruction": "Hi.", "output": answer}).encode()
        for answer in ("A long answer, of many words.", "N")
    ]
    outcome = encode_values(values, "auto", load_tokenizer(MODEL, template), "chat", "answers")
    shard = write_shard(tmp_path, 0, list(outcome.encoded.values()))
    assert shard.notes == {NO_END: 2, FEW_TOKENS: 1}
    write_index(tmp_path, [shard], {})
    assert left_out([SourceSpec(path="rows.jsonl")], [TokenStore(tmp_path)]) == [
        f"2 of 2 rows of rows.jsonl {NOTES[NO_END]}",
        f"1 of 2 rows of rows.jsonl {NOTES[FEW_TOKENS]}",
    ]
    ended = encode_values(values, "auto", tokenizer, "chat", "all").encoded
    assert all(each.notes == () for each in ended.values())
