"""The error for an unknown field that another trainer has names the equivalent field of this project."""

import pytest

from orchestrator.config.field_names import EQUIVALENTS, Equivalent, equivalent
from orchestrator.config.loader import dotted_fields, parse
from orchestrator.errors import SpecError

JOB = "name: a\nmodel: {path: m}\ndata: {train: [{path: d}]}\n"


def refusal(overrides: list[str]) -> str:
    with pytest.raises(SpecError) as caught:
        parse(JOB, overrides)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("name", sorted(EQUIVALENTS))
def test_every_equivalent_is_a_field_or_says_why_there_is_none(name: str) -> None:
    answer = EQUIVALENTS[name]
    if answer.field is None:
        assert answer.remark
    else:
        assert answer.field in {*dotted_fields(), "name"}


@pytest.mark.parametrize("name", sorted(EQUIVALENTS))
@pytest.mark.parametrize("section", ["optim.", ""])
def test_the_error_for_every_name_says_what_to_write(name: str, section: str) -> None:
    answer = EQUIVALENTS[name]
    problem = refusal([f"{section}{name}=1"])
    assert f"{section}{name} is not a field of a job; " in problem
    assert (f"use {answer.field}" if answer.field else "there is no such field: ") in problem


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("optim.learning_rate", "use optim.lr"),
        ("data.max_seq_length", "use data.max_length"),
        ("optim.num_train_epochs", "use optim.epochs"),
        ("method.r", "use method.rank"),
        ("method.lora_r", "use method.rank"),
        ("optim.per_device_train_batch_size", "use optim.micro_batch_size"),
        ("optim.gradient_accumulation_steps", "set optim.global_batch_size"),
        ("deepspeed", "use parallel.zero_stage (set parallel.zero_stage and parallel.offload_*"),
        ("output_dir", "use checkpoint.storage (the run directory is STORAGE/NAME)"),
        ("method.targets", "use method.target_modules"),
        ("optim.clip_norm", "use optim.max_grad_norm"),
        ("optim.schedule", "use optim.lr_scheduler"),
        ("data.template", "use data.chat_template"),
        ("lr", "use optim.lr"),
        ("adapter", "use method.type (lora;"),
        ("stage", "use parallel.zero_stage (of ZeRO: 0, 1, 2 or 3"),
        ("train_batch_size", "use optim.global_batch_size"),
        ("zero_stage", "use parallel.zero_stage"),
        ("every_steps", "use eval.every_steps or checkpoint.every_steps"),
        ("optim.Learning-Rate", "use optim.lr"),
        ("optim.weightdecay", "did you mean weight_decay?"),
    ],
)
def test_a_name_of_elsewhere_gets_the_right_one(written: str, answer: str) -> None:
    assert answer in refusal([f"{written}=1"])


def test_a_name_is_looked_up_whatever_its_case_and_separators() -> None:
    assert equivalent("Learning-Rate") == Equivalent("optim.lr")
    assert equivalent("never_heard_of") is None


@pytest.mark.parametrize(
    ("written", "field"),
    [("optim=adamw_torch", "optim.optimizer"), ("model=org/name", "model.path"), ("data=rows", "data.train")],
)
def test_a_section_written_as_one_value_names_the_field_for_it(written: str, field: str) -> None:
    assert f"is not a section; write its fields indented below the key; for a single value use {field}" in (
        refusal([written])
    )


@pytest.mark.parametrize("name", ["field_messages", "column_map", "dataset_text_field", "tags"])
def test_names_of_columns_in_other_trainers_are_answered_where_they_are_written(name: str) -> None:
    problem = refusal([f"data.train.0.{name}=x"])
    assert f"data.train.0.{name} is not a field" in problem
    assert "use data.train (columns of its entries: {name in the file: field}, such as {question:" in problem
