"""Job files: YAML values, errors with line numbers, overrides, and the round trip to text."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.config.loader import dump, json_schema, load, parse
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from tests.unit.config.jobs import WHOLE

MINIMAL = "name: a\nmodel: {path: m}\ndata: {train: [{path: d}]}\n"


def problems_of(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        parse(text, overrides, origin="job.yaml")
    assert caught.value.problems
    return caught.value.problems


def problem_of(text: str, *overrides: str) -> str:
    (problem,) = problems_of(text, *overrides)
    return problem


def test_a_whole_file_becomes_a_job() -> None:
    job = parse(WHOLE)
    assert job.optim.lr == 2e-5
    assert [source.path for source in job.data.train] == ["builtin/alpaca_sample", "other.jsonl"]
    assert job.metrics.port is None
    assert job.optim.betas == (0.9, 0.95)


def test_the_example_job_is_valid() -> None:
    job = load(Path(__file__).parents[3] / "launch" / "jobs" / "quickstart.yaml")
    assert job.name == "quickstart"


# YAML values


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-5", 2e-5),
        ("2E-5", 2e-5),
        ("2.e-5", 2e-5),
        (".2e-4", 2e-5),
        ("+2.0e-5", 2e-5),
        ("1", 1.0),
        ("0.5", 0.5),
    ],
)
def test_floats_are_those_of_yaml_1_2(written: str, value: float) -> None:
    assert parse(MINIMAL + f"optim: {{lr: {written}}}").optim.lr == value


@pytest.mark.parametrize(
    ("written", "value"), [("10", 10), ("010", 10), ("0o10", 8), ("0x10", 16), ("+10", 10)]
)
def test_integers_are_those_of_yaml_1_2(written: str, value: int) -> None:
    assert parse(MINIMAL + f"optim: {{max_steps: {written}}}").optim.max_steps == value


@pytest.mark.parametrize("written", ["1:30", "1_000", "0b11", "'10'", "10.0", "1e2", "true", "2020-01-01"])
def test_what_only_looks_like_an_integer_is_refused(written: str) -> None:
    assert "job.yaml:4: optim.max_steps=" in problem_of(MINIMAL + f"optim: {{max_steps: {written}}}")


@pytest.mark.parametrize("written", ["yes", "no", "on", "off", "y", "'true'", "1", "null"])
def test_only_true_and_false_are_truth_values(written: str) -> None:
    text = MINIMAL.replace("path: m", f"path: m, trust_remote_code: {written}")
    assert problem_of(text).endswith("it must be true or false, without quotes")


@pytest.mark.parametrize("written", ["yes", "2020-01-01", "1:30", "=", "0b1", "1_0"])
def test_text_stays_text(written: str) -> None:
    assert parse(MINIMAL.replace("path: m", f"path: {written}")).model.path == written


@pytest.mark.parametrize("written", [".nan", ".inf", "-.inf", "1e400", "0", "-0", "-1e-5", "~", "abc", "[1]"])
def test_a_learning_rate_must_be_a_positive_number(written: str) -> None:
    assert problem_of(MINIMAL + f"optim: {{lr: {written}}}").startswith("job.yaml:4: optim.lr=")


# Errors and their line numbers


def test_six_kinds_of_errors_are_reported_at_once_with_their_lines() -> None:
    text = """\
name: bad name
model:
  path: m
  dtpye: bf16
data:
  train: []
  max_length: 512
  max_length: 1024
optim:
  lr: -1
  lr_scheduler: cosin
  global_batch_size: 7
parallel:
  workers: 2
"""
    problems = problems_of(text)
    for line, start in [
        (1, 'name="bad name" has invalid characters'),
        (4, "model.dtpye is not a field of a job; did you mean dtype?"),
        (6, "data.train has 0 elements; give at least 1"),
        (8, "duplicate key data.max_length (first defined on line 7); remove one"),
        (10, "optim.lr=-1 is out of range; it must be above 0"),
        (11, "optim.lr_scheduler=\"cosin\" is not a valid value; use 'cosine'"),
        (12, "optim.global_batch_size=7 is not a multiple of"),
    ]:
        assert any(problem.startswith(f"job.yaml:{line}: {start}") for problem in problems), (
            line,
            start,
            problems,
        )
    assert len(problems) == 7


def test_missing_fields_are_named_with_their_section() -> None:
    problems = problems_of("name: a\nmodel:\n  dtype: bf16\n")
    assert "job.yaml:2: model.path is required; add it" in problems
    assert "job.yaml: data is required; add it" in problems


def test_a_rule_is_not_reported_for_a_field_that_is_itself_wrong() -> None:
    problem = problem_of(MINIMAL + "optim: {global_batch_size: seven}\nparallel: {workers: 3}\n")
    assert "must be a valid integer" in problem


def test_rules_between_fields_are_checked_although_lists_are_wrong() -> None:
    text = (
        MINIMAL
        + "eval: {data: [3]}\noptim: {betas: [0.9, 2.0], global_batch_size: 7}\nparallel: {workers: 2}\n"
    )
    assert [problem.split(":")[1] for problem in problems_of(text)] == ["5", "4", "5"]


def test_a_rule_whose_first_field_is_a_default_points_at_the_other() -> None:
    assert problem_of(MINIMAL + "parallel:\n  workers: 3\n").startswith(
        "job.yaml:5: optim.global_batch_size=8"
    )


def test_a_duplicate_section_is_one_problem_and_the_last_one_counts() -> None:
    text = "name: a\nmodel:\n  path: m\ndata: {train: [{path: d}]}\nmodel:\n  dtype: bf16\n"
    assert problems_of(text) == (
        "job.yaml:5: duplicate key model (first defined on line 2); remove one",
        "job.yaml:5: model.path is required; add it",
    )


@pytest.mark.parametrize("key", ["null", "true", "3", "2020-01-01", "=", "'a b'"])
def test_odd_keys_are_unknown_fields(key: str) -> None:
    assert problem_of(MINIMAL + f"{key}: 1\n").startswith(
        f"job.yaml:4: {key.strip(chr(39))} is not a field of a job"
    )


def test_an_unknown_field_like_no_other_lists_what_is_known() -> None:
    assert "fields here: port, host" in problem_of(MINIMAL + "metrics: {qqq: 1}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n", "the file is a list"),
        ("name\n", "the file is a str"),
        ("name: a\n\tmodel: x\n", "job.yaml:2: not valid YAML"),
        ("a: [1\n", "not valid YAML"),
        ("a: *nowhere\n", "job.yaml:1: not valid YAML (found undefined alias"),
        ("a: 1\n---\nb: 2\n", "job.yaml:2: not valid YAML (but found another document)"),
        ("? [1]\n: 2\n", "not valid YAML (found unhashable key)"),
        ("a: &a [*a]\n", "nested deeper than 32 levels"),
        ("a: &a {b: *a}\n", "nested deeper than 32 levels"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ("a: " + "[" * 5_000, "nested deeper than 32 levels"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("a: 1\nb: !!bool maybe\n", "job.yaml:2: not valid YAML ('maybe' cannot be read as bool)"),
        ("a: !!int ''\n", "job.yaml:1: not valid YAML ('' cannot be read as int)"),
        ("a: !!timestamp x\n", "job.yaml:1: not valid YAML ('x' cannot be read as timestamp)"),
        ("a: !!timestamp 2020-99-99\n", "cannot be read as timestamp"),
        (f"a: {'1' * 5000}\n", "cannot be read as int"),
        (f"a: 0x{'f' * 5000}\n", "cannot be read as int"),
        ('a: "\\ud800"\n', "job.yaml:1: not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
    ],
)
def test_what_is_no_job_in_yaml_is_one_clear_problem(text: str, reason: str) -> None:
    assert reason in problem_of(text)


def test_aliases_that_write_out_to_billions_are_refused() -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 11)]
    assert "values after expanding aliases" in problem_of("l0: &l0 [1, 1]\n" + "\n".join(levels))
    merges = [f"l{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 9)}]}}" for n in range(1, 11)]
    assert "values after expanding aliases" in problem_of("l0: &l0 {a: 1}\n" + "\n".join(merges))


def test_aliases_and_merges_may_be_used() -> None:
    job = parse(
        "name: a\nmodel: {path: &p d}\ndata: {train: [&s {path: *p, repeat: 2}, {<<: *s, repeat: 3}]}"
    )
    assert [(source.path, source.repeat) for source in job.data.train] == [("d", 2), ("d", 3)]


# Files


def test_a_file_is_read_and_named_in_its_problems(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load(file).name == "a"
    file.write_text(MINIMAL + "optim: {lr: x}")
    with pytest.raises(SpecError, match=r"mine\.yaml:4: optim\.lr"):
        load(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml cannot be read \(No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(SpecError, match=r"is not UTF-8 text \(byte 9\)"):
        load(tmp_path / "latin.yaml")


# Overrides


def test_overrides_are_applied_in_order_and_read_as_yaml() -> None:
    job = parse(
        WHOLE,
        [
            "optim.lr=1e-3",
            "optim.lr=3e-4",
            "parallel={workers: 4}",
            "data.train.1.path=third.jsonl",
            "run.max_failures=0",
            "eval=null",
            "optim.betas.1=0.5",
        ],
    )
    assert job.optim.lr == 3e-4
    assert job.parallel.workers == 4
    assert job.parallel.offload_optimizer == "none"
    assert job.data.train[1].path == "third.jsonl"
    assert job.run.max_failures == 0
    assert job.eval is None
    assert job.optim.betas == (0.9, 0.5)


def test_an_override_repairs_what_is_wrong_in_the_file() -> None:
    assert parse(MINIMAL + "optim: {lr: x}", ["optim.lr=1"]).optim.lr == 1.0


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optim.lr", "not of the form field.name=value"),
        ("=1", "not of the form"),
        ("optim..lr=1", "not of the form"),
        ("a\udc80=1", "not of the form"),
        ("a" + ".a" * 2000 + "=1", "not of the form"),
        ("optim.lr=abc", 'optim.lr="abc" has the wrong type'),
        ("optim.lr=[1", "the value is not valid YAML"),
        ("optim.lr=!!bool maybe", "'maybe' cannot be read as bool"),
        ("optim.lr=&a [*a]", "nested deeper"),
        ("optim.lr=" + "[" * 5_000, "nested deeper"),
        ("optim.beta=1", "did you mean betas?"),
        ("data.train.1.path=x", "1 is not in data.train, which is a list of 1; use 0 to 0"),
        ("data.train.1=x", "1 is not in data.train, which is a list of 1; use 0 to 0"),
        ("data.train.-1.path=x", "-1 is not in data.train"),
        ("data.train.²=x", "² is not in data.train"),
        ("data.train.first.path=x", "first is not in data.train"),
        ("model.path.x=1", "x is not in model.path, which is a value without fields"),
        ("optim.betas.0=0.5", "optim.betas="),
        ("name=", "name=null has the wrong type"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_written(override: str, reason: str) -> None:
    problem = problem_of(MINIMAL, override)
    assert problem.startswith(f"--set {override[:80]}: ")
    assert reason in problem


def test_problems_of_overrides_stand_beside_those_of_the_file() -> None:
    problems = problems_of(MINIMAL + "optim: {lr: x}", "run.seed=-1", "nonsense")
    assert [problem.split(" ")[0] for problem in problems] == ["--set", "job.yaml:4:", "--set"]


# Round trip and schema


@pytest.mark.parametrize("text", [MINIMAL, WHOLE])
def test_dump_writes_every_field_and_parses_back_equal(text: str) -> None:
    job = parse(text)
    assert parse(dump(job)) == job
    assert set(yaml.safe_load(dump(job))) == set(JobSpec.model_fields)


@pytest.mark.parametrize(
    "odd",
    [
        "1e5",
        "2E-5",
        "010",
        "0o7",
        "1:30",
        "yes",
        "null",
        "~x",
        "2020-01-01",
        "1_0",
        "é",
        " a ",
        "=",
        "<<",
        "a: b",
    ],
)
def test_text_that_looks_like_something_else_survives_a_round_trip(odd: str) -> None:
    job = JobSpec.model_validate({"name": "a", "model": {"path": odd}, "data": {"train": ({"path": odd},)}})
    assert parse(dump(job)) == job
    assert yaml.safe_load(dump(job))["model"]["path"] == odd


def test_the_schema_accepts_jobs_and_refuses_what_is_wrong() -> None:
    schema = json_schema()
    assert schema["title"] == "orchestrator job"
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    sample: dict[str, Any] = parse(WHOLE).model_dump(mode="json")
    assert list(validator.iter_errors(sample)) == []
    assert (
        list(validator.iter_errors({"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}))
        == []
    )
    for wrong in [
        {**sample, "unknown": 1},
        {**sample, "name": "bad name"},
        {key: value for key, value in sample.items() if key != "model"},
        {**sample, "optim": {**sample["optim"], "lr": 0}},
        {**sample, "parallel": {**sample["parallel"], "zero_stage": 4}},
    ]:
        assert list(validator.iter_errors(wrong)), wrong


def test_the_schema_describes_every_field() -> None:
    sections = json_schema()["$defs"]
    undescribed = [
        f"{name}.{field}"
        for name, section in sections.items()
        for field, about in section["properties"].items()
        if "description" not in about
    ]
    assert undescribed == []
