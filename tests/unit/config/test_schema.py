"""Every validation rule of a job, for single fields and between fields, has a test that violates it.

The error has to say what to change.
"""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.config.schema import (
    LARGEST,
    JobSpec,
    MetricsSpec,
    ModelSpec,
    OptimSpec,
    ParallelSpec,
    RunSpec,
)
from orchestrator.config.validation import broken_rules

MINIMAL: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": ({"path": "d"},)}}


def merged(base: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """Return a copy of `base` with one field, given as a dotted name, set."""
    first, _, rest = dotted.partition(".")
    return {**base, first: merged(base.get(first, {}), rest, value) if rest else value}


def job(**fields: Any) -> JobSpec:
    """Build a job; `optim__lr=1.0` sets optim.lr."""
    values = MINIMAL
    for field, value in fields.items():
        values = merged(values, field.replace("__", "."), value)
    return JobSpec.model_validate(values)


def broken(**fields: Any) -> list[str]:
    return [sentence for _, sentence in broken_rules(job(**fields))]


def test_defaults_make_a_job_that_breaks_no_rule() -> None:
    assert list(broken_rules(job())) == []
    assert job().data_parallel_size == 1
    assert job().gradient_accumulation_steps == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "-a"),
        ("name", "a/b"),
        ("name", "a\n"),
        ("name", "a" * 64),
        ("model.path", ""),
        ("model.path", "a\0b"),
        ("model.weights", "none"),
        ("model.dtype", "bfloat16"),
        ("model.attention", "eager"),
        ("model.gradient_checkpointing", "yes"),
        ("model.trust_remote_code", 1),
        ("method.type", "qlora"),
        ("data.train", ()),
        ("data.train", ({"path": ""},)),
        ("data.train", ({"path": "d", "format": "csv"},)),
        ("data.train", ({"path": "d", "weight": 0.0},)),
        ("data.train", ({"path": "d", "repeat": 0},)),
        ("data.train", ({"path": "d", "sample": 0},)),
        ("data.max_length", 15),
        ("data.max_length", LARGEST + 1),
        ("data.packing", "first_fit"),
        ("data.truncation", "middle"),
        ("data.loss_on", "prompt"),
        ("data.chat_template", "vicuna"),
        ("parallel.workers", 0),
        ("parallel.workers", 65_537),
        ("parallel.device", "tpu"),
        ("parallel.cpus_per_worker", 0),
        ("parallel.sequence_parallel_size", 0),
        ("parallel.zero_stage", -1),
        ("parallel.zero_stage", 4),
        ("parallel.offload_optimizer", "disk"),
        ("parallel.offload_activations", "nvme"),
        ("parallel.offload_path", ""),
        ("optim.muon_lr", 0.0),
        ("parallel.offload_param", True),
        ("optim.lr", 0.0),
        ("optim.lr", float("nan")),
        ("optim.lr", float("inf")),
        ("optim.micro_batch_size", 0),
        ("optim.global_batch_size", 10**400),
        ("optim.lr_scheduler", "step"),
        ("optim.warmup_ratio", 1.1),
        ("optim.warmup_ratio", -0.1),
        ("optim.max_steps", 0),
        ("optim.max_steps", 3.0),
        ("optim.epochs", 0.0),
        ("optim.epochs", 1e300),
        ("optim.max_grad_norm", -1.0),
        ("optim.optimizer", "sgd"),
        ("optim.betas", (0.9,)),
        ("optim.betas", (0.9, 1.0)),
        ("optim.betas", (-0.1, 0.9)),
        ("optim.eps", 0.0),
        ("optim.weight_decay", -0.1),
        ("eval", {"data": ()}),
        ("eval", {"data": ({"path": "d"},), "every_steps": 0}),
        ("checkpoint.storage", ""),
        ("checkpoint.every_steps", 0),
        ("checkpoint.keep", 0),
        ("run.max_failures", -1),
        ("run.min_workers", 0),
        ("run.seed", -1),
        ("run.seed", 2**32),
        ("run.collective_timeout_seconds", 9),
        ("run.collective_timeout_seconds", 10**12),
        ("metrics.port", -1),
        ("metrics.port", 65_536),
        ("metrics.host", ""),
    ],
)
def test_a_value_outside_its_rule_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(merged(MINIMAL, field, value))
    assert all(".".join(map(str, error["loc"])).startswith(field) for error in caught.value.errors())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "9.a_b-C" + "x" * 56),
        ("data.max_length", 16),
        ("parallel.workers", 65_536),
        ("optim.lr", 1),
        ("optim.warmup_ratio", 0.0),
        ("optim.warmup_ratio", 1.0),
        ("optim.max_grad_norm", 0.0),
        ("optim.betas", (0.0, 0.999)),
        ("run.max_failures", 0),
        ("run.seed", 2**32 - 1),
        ("metrics.port", None),
        ("metrics.port", 0),
    ],
)
def test_the_edge_of_a_rule_is_allowed(field: str, value: object) -> None:
    JobSpec.model_validate(merged(MINIMAL, field, value))


@pytest.mark.parametrize(
    "section", ["model", "method", "data", "parallel", "optim", "checkpoint", "run", "metrics"]
)
def test_unknown_fields_are_refused_in_every_section(section: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        JobSpec.model_validate(merged(MINIMAL, f"{section}.unheard_of", 1))


def test_a_job_cannot_be_changed_after_it_is_built() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        job().optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("section", [ModelSpec, OptimSpec, ParallelSpec, RunSpec, MetricsSpec])
def test_every_field_says_what_it_means(section: type) -> None:
    assert all(field.description for field in section.model_fields.values())


def test_the_batch_must_divide_and_the_nearest_that_does_is_named() -> None:
    (sentence,) = broken(optim__global_batch_size=10, optim__micro_batch_size=2, parallel__workers=2)
    assert "optim.global_batch_size=10" in sentence
    assert "2 x 2 = 4" in sentence
    assert "use 12" in sentence
    (sentence,) = broken(optim__global_batch_size=1, parallel__workers=4)
    assert "use 4" in sentence


def test_a_batch_that_divides_gives_the_accumulation_steps() -> None:
    good = job(optim__global_batch_size=12, optim__micro_batch_size=2, parallel__workers=3)
    assert list(broken_rules(good)) == []
    assert good.gradient_accumulation_steps == 2


def test_sequence_parallel_size_must_divide_workers() -> None:
    sentences = broken(parallel__workers=6, parallel__sequence_parallel_size=4, optim__global_batch_size=12)
    assert "does not divide parallel.workers=6; use one of [1, 2, 3, 6]" in sentences[0]


def test_min_workers_above_workers_is_named_beside_other_rules() -> None:
    sentences = broken(
        parallel__workers=2,
        parallel__sequence_parallel_size=4,
        run__min_workers=3,
        optim__global_batch_size=2,
    )
    assert any("run.min_workers=3 exceeds parallel.workers=2" in each for each in sentences)
    assert any("sequence_parallel_size=4 does not divide" in each for each in sentences)


def test_parameter_offload_needs_stage_3_and_optimizer_offload() -> None:
    (sentence,) = broken(parallel__offload_param="cpu", parallel__zero_stage=2)
    assert "use zero_stage: 3 or offload_param: none" in sentence
    (sentence,) = broken(parallel__offload_param="cpu")
    assert "set offload_optimizer: cpu" in sentence
    assert broken(parallel__offload_param="cpu", parallel__offload_optimizer="cpu") == []


@pytest.mark.parametrize(
    ("written", "meant"), [(True, "full"), (False, "none"), ("selective", "selective"), ("full", "full")]
)
def test_gradient_checkpointing_takes_a_word_or_a_switch(written: object, meant: str) -> None:
    assert job(model__gradient_checkpointing=written).model.gradient_checkpointing == meant


def test_a_disk_needs_stage_3_and_a_folder() -> None:
    on_disk: dict[str, Any] = {"parallel__offload_optimizer": "nvme", "parallel__offload_path": "/disk"}
    for offload_param in ("none", "cpu", "nvme"):
        assert broken(**on_disk, parallel__offload_param=offload_param) == []
    (sentence,) = broken(parallel__offload_optimizer="nvme")
    assert "set it, or use offload_optimizer: cpu" in sentence
    (sentence,) = broken(**on_disk, parallel__zero_stage=2)
    assert sentence.endswith("use zero_stage: 3 or offload_optimizer: cpu")
    assert broken(**on_disk, method__type="lora", parallel__offload_param="cpu") == []
    (sentence,) = broken(**on_disk, method__type="lora", parallel__offload_param="nvme")
    assert sentence.endswith("use offload_param: cpu, or type: full")
    (sentence,) = broken(parallel__offload_path="/disk")
    assert "has no effect without offload to nvme" in sentence


def test_muon_has_a_learning_rate_of_its_own_and_whole_matrices() -> None:
    muon: dict[str, Any] = {"optim__optimizer": "muon", "optim__muon_lr": 1e-3}
    assert broken(**muon) == []
    (sentence,) = broken(optim__optimizer="muon", optim__lr=1e-4)
    assert "set optim.muon_lr: 0.0013" in sentence
    (sentence,) = broken(optim__muon_lr=1e-3)
    assert sentence.endswith("use optimizer: muon, or remove it")
    (sentence,) = broken(**muon, method__type="lora")
    assert sentence.endswith("use optimizer: adamw, or type: full")


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"])
def test_only_adamw_is_offloaded(optimizer: str) -> None:
    muon_lr = 1e-3 if optimizer == "muon" else None
    fields: dict[str, Any] = {"optim__optimizer": optimizer, "optim__muon_lr": muon_lr}
    assert broken(**fields) == []
    (sentence,) = broken(**fields, parallel__offload_optimizer="cpu")
    assert sentence.endswith("use optimizer: adamw, or offload_optimizer: none")


def test_offloaded_activations_are_the_inputs_of_recomputed_layers() -> None:
    for keep in ("selective", "none"):
        (sentence,) = broken(parallel__offload_activations="cpu", model__gradient_checkpointing=keep)
        assert sentence.endswith("use full, or offload_activations: none")
    assert broken(parallel__offload_activations="cpu") == []


def test_selective_checkpointing_undoes_a_tiled_mlp() -> None:
    (sentence,) = broken(model__mlp_tile_tokens=512, model__gradient_checkpointing="selective")
    assert "model.mlp_tile_tokens=512 has no effect" in sentence
    assert broken(model__mlp_tile_tokens=512, model__gradient_checkpointing="none") == []


def test_only_saved_steps_can_be_kept() -> None:
    (sentence,) = broken(checkpoint__keep_every_steps=100)
    assert "must be a multiple of checkpoint.every_steps (got null)" in sentence
    (sentence,) = broken(checkpoint__keep_every_steps=100, checkpoint__every_steps=30)
    assert "(got 30), since only these steps are saved; change one of them" in sentence
    assert broken(checkpoint__keep_every_steps=90, checkpoint__every_steps=30) == []


def test_the_best_checkpoints_are_among_evaluated_ones() -> None:
    kept = {"checkpoint__keep_best": 1, "eval__data": ({"path": "d"},)}
    (sentence,) = broken(**kept, checkpoint__every_steps=30)
    assert "(30) is not a multiple of eval.every_steps (null); set both" in sentence
    (sentence,) = broken(**kept, checkpoint__every_steps=30, eval__every_steps=20)
    assert "(30) is not a multiple of eval.every_steps (20)" in sentence
    assert broken(**kept, checkpoint__every_steps=40, eval__every_steps=20) == []


def test_stage_0_keeps_its_state_on_the_device_and_does_not_scale_the_loss() -> None:
    (sentence,) = broken(parallel__zero_stage=0, parallel__offload_optimizer="cpu")
    assert "use zero_stage: 1 or offload_optimizer: none" in sentence
    (sentence,) = broken(parallel__zero_stage=0, model__dtype="fp16")
    assert "use zero_stage: 1, or dtype: bf16" in sentence
    for dtype in ("auto", "bf16", "fp32"):
        assert broken(parallel__zero_stage=0, model__dtype=dtype) == []
    assert broken(parallel__zero_stage=1, parallel__offload_optimizer="cpu", model__dtype="fp16") == []


def test_fields_of_lora_have_no_effect_on_full_training() -> None:
    sentences = broken(method__rank=4, method__target_modules=("q_proj",), method__quantization="nf4")
    assert [sentence.split("=")[0] for sentence in sentences] == [
        "method.rank", "method.target_modules", "method.quantization",
    ]  # fmt: skip
    assert all(sentence.endswith("use type: lora, or remove it") for sentence in sentences)
    assert broken(method__type="lora", method__rank=4, method__target_modules=("q_proj",)) == []


def test_int8_weights_cannot_be_partitioned() -> None:
    (sentence,) = broken(method__type="lora", method__quantization="int8", parallel__zero_stage=3)
    assert sentence.endswith("use quantization: nf4, or zero_stage: 2")
    for stage, bits in ((2, "int8"), (2, "nf4"), (3, "nf4")):
        assert broken(method__type="lora", method__quantization=bits, parallel__zero_stage=stage) == []


def test_lora_needs_a_target() -> None:
    (sentence,) = broken(method__type="lora", method__target_modules=())
    assert "method.target_modules=[] is empty" in sentence


def test_flash_attention_needs_cuda_and_half_precision() -> None:
    (sentence,) = broken(model__attention="flash", parallel__device="cpu")
    assert "requires CUDA" in sentence
    (sentence,) = broken(model__attention="flash", model__dtype="fp32")
    assert "requires bf16 or fp16" in sentence
    assert broken(model__attention="flash", model__dtype="bf16", parallel__device="cuda") == []


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("checkpoint__asynchronous", True, "false"),
        ("run__min_workers", 1, "null"),
    ],
)
def test_what_this_version_cannot_do_is_refused_and_not_ignored(
    field: str, value: object, instead: str
) -> None:
    (sentence,) = broken(parallel__workers=2, **{field: value})
    assert sentence.endswith(f"is not available in this version; use {instead}")


def test_a_row_must_be_shared_evenly() -> None:
    (sentence,) = broken(parallel__workers=3, parallel__sequence_parallel_size=3, data__max_length=2048)
    assert "data.max_length=2048" in sentence
    assert sentence.endswith("use max_length: 2049")
    assert broken(parallel__workers=3, parallel__sequence_parallel_size=3, data__max_length=2049) == []
    shared = {"parallel__workers": 3, "parallel__sequence_parallel_size": 3, "data__max_length": 2048}
    assert broken(**shared, data__packing="none") == []
    assert len(broken(**shared, data__packing="none", data__pad_to="max_length")) == 1


@pytest.mark.parametrize(
    ("packing", "pad_to", "expected"),
    [
        ("none", None, False),
        ("none", "max_length", True),
        ("best_fit", None, True),
        ("concat", "max_length", True),
    ],
)
def test_only_packing_none_can_do_without_padding(packing: str, pad_to: str | None, expected: bool) -> None:
    assert job(data__packing=packing, data__pad_to=pad_to).data.pads_packs == expected


def test_attention_across_documents_needs_several_in_a_pack() -> None:
    (sentence,) = broken(data__cross_document_attention=True, data__packing="none")
    assert "has no effect with data.packing=none" in sentence
    assert broken(data__cross_document_attention=True, data__packing="concat") == []


def test_a_storage_uri_is_refused() -> None:
    (sentence,) = broken(checkpoint__storage="s3://bucket/runs")
    assert "checkpoint.storage=s3://bucket/runs is a URI" in sentence


def test_each_broken_rule_names_fields_that_exist() -> None:
    bad = job(
        model__attention="flash",
        model__dtype="fp32",
        parallel__device="cpu",
        parallel__workers=2,
        parallel__zero_stage=2,
        parallel__offload_param="cpu",
        optim__global_batch_size=7,
        run__min_workers=3,
        data__cross_document_attention=True,
        data__packing="none",
        checkpoint__storage="s3://b",
    )
    found = list(broken_rules(bad))
    assert len(found) == 8
    for fields, _ in found:
        for dotted in fields:
            value: Any = bad.model_dump()
            for part in dotted.split("."):
                value = value[int(part)] if part.isdecimal() else value[part]


def test_two_columns_cannot_be_one_field() -> None:
    twice = {"a": "output", "b": "output", "c": None, "d": None}
    sources = ({"path": "d"}, {"path": "e", "columns": twice})
    (sentence,) = broken(data__train=sources)
    assert sentence.startswith("data.train.1.columns maps a and b to output; ")
    assert broken(data__train=({"path": "d", "columns": {"a": "instruction", "b": "output"}},)) == []
