"""Each policy renders to its golden file in tests/golden/deepspeed.

After an intended change, rewrite the golden files and review the diff:

    GOLDEN_UPDATE=1 python -m pytest tests/unit/parallel/test_deepspeed_config.py
"""

import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator.config.loader import parse
from orchestrator.config.schema import JobSpec, ParallelSpec
from orchestrator.errors import SpecError
from orchestrator.parallel import deepspeed_config
from orchestrator.parallel.deepspeed_config import (
    BITSANDBYTES,
    KNOWN_KEYS,
    load_policy,
    policy_name,
    render,
    size_nvme_buffers,
    unknown_keys,
)

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "deepspeed"
DISK = {"offload_path": "/disk"}
POLICIES = {
    "zero0_params-gpu_optimizer-gpu": {"zero_stage": 0},
    "zero1_params-gpu_optimizer-gpu": {"zero_stage": 1},
    "zero1_params-gpu_optimizer-cpu": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "zero2_params-gpu_optimizer-gpu": {"zero_stage": 2},
    "zero2_params-gpu_optimizer-cpu": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3_params-gpu_optimizer-gpu": {"zero_stage": 3},
    "zero3_params-gpu_optimizer-cpu": {"zero_stage": 3, "offload_optimizer": "cpu"},
    "zero3_params-cpu_optimizer-cpu": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    "zero3_params-gpu_optimizer-nvme": {"zero_stage": 3, "offload_optimizer": "nvme", **DISK},
    "zero3_params-cpu_optimizer-nvme": {
        "zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "cpu", **DISK,
    },
    "zero3_params-nvme_optimizer-nvme": {
        "zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme", **DISK,
    },
    "zero3_params-nvme_optimizer-cpu": {
        "zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme", **DISK,
    },
}  # fmt: skip

each_policy = pytest.mark.parametrize("name", sorted(POLICIES))


def job(name: str, workers: int = 4) -> JobSpec:
    """Return the job from which golden files are rendered; it sets every value to a non-default."""
    parallel = {"workers": workers, **POLICIES[name]}
    return parse(
        "name: golden\n"
        "model: {path: m}\n"
        "data: {train: [{path: d}]}\n"
        f"parallel: {json.dumps(parallel)}\n"
        "optim: {lr: 3e-4, micro_batch_size: 2, global_batch_size: 24, max_grad_norm: 0.5, "
        "betas: [0.8, 0.95], eps: 1e-6, weight_decay: 0.1}\n"
    )


def leaves(value: Any, dotted: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, f"{dotted}.{key}" if dotted else key)
    else:
        yield dotted, value


@each_policy
def test_a_policy_renders_to_its_golden_file(name: str) -> None:
    rendered = render(job(name), "bf16", "cuda")
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("GOLDEN_UPDATE"):
        golden.write_text(json.dumps(rendered, indent=2) + "\n", encoding="utf-8")
    assert rendered == json.loads(golden.read_text(encoding="utf-8"))


def test_golden_files_and_policies_are_the_same() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(POLICIES)
    assert {file.stem for file in (ROOT / "ds_configs").glob("*.json")} == set(POLICIES)


@each_policy
def test_a_parallel_section_chooses_its_policy(name: str) -> None:
    assert policy_name(ParallelSpec(**POLICIES[name])) == name


@each_policy
def test_a_policy_holds_what_its_name_says(name: str) -> None:
    zero = load_policy(name)["zero_optimization"]
    assert f"zero{zero['stage']}" == name.split("_")[0]
    for part, section in (("params", "offload_param"), ("optimizer", "offload_optimizer")):
        for device in ("cpu", "nvme"):
            assert (f"{part}-{device}" in name) == (zero.get(section, {}).get("device") == device)


@each_policy
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_value_is_filled_in(
    name: str, dtype: Literal["bf16", "fp16", "fp32"], device: Literal["cuda", "cpu"]
) -> None:
    rendered = render(job(name), dtype, device)
    assert "auto" not in json.dumps(rendered)
    assert list(unknown_keys(rendered)) == []
    assert (rendered["bf16"]["enabled"], rendered["fp16"]["enabled"]) == (dtype == "bf16", dtype == "fp16")
    pinned = [value for key, value in leaves(rendered) if key.endswith("pin_memory")]
    assert pinned == [device == "cuda"] * (name.count("-cpu") + name.count("-nvme"))


def test_buffers_for_parameters_on_a_disk_hold_the_largest() -> None:
    rendered = render(job("zero3_params-nvme_optimizer-nvme"), "bf16", "cuda")
    section = rendered["zero_optimization"]["offload_param"]
    size_nvme_buffers(rendered, 100_000_000)
    assert section["buffer_size"] == 100_000_000
    size_nvme_buffers(rendered, 100_000_001)
    assert section["buffer_size"] == 100_000_001


@each_policy
@pytest.mark.parametrize("largest", [1, 10**12])
def test_only_parameters_on_a_disk_pass_through_buffers(name: str, largest: int) -> None:
    rendered = render(job(name), "bf16", "cuda")
    size_nvme_buffers(rendered, largest)
    changed = largest == 10**12 and "params-nvme" in name
    assert (rendered != render(job(name), "bf16", "cuda")) == changed


@each_policy
@pytest.mark.parametrize("workers", [1, 2, 4, 12])
def test_batch_sizes_agree_as_deepspeed_wants_them(name: str, workers: int) -> None:
    rendered = render(job(name, workers), "bf16", "cuda")
    assert rendered["train_batch_size"] == 24
    assert rendered["train_batch_size"] == (
        rendered["train_micro_batch_size_per_gpu"] * rendered["gradient_accumulation_steps"] * workers
    )


def with_optimizer(name: str, optimizer: str, **more: float) -> dict[str, Any]:
    plain = job(name)
    optim = plain.optim.model_copy(update={"optimizer": optimizer, **more})
    rendered = render(plain.model_copy(update={"optim": optim}), "bf16", "cuda")
    assert "auto" not in json.dumps(rendered)
    assert list(unknown_keys(rendered)) == []
    return rendered


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_takes_the_place_of_adamw(stage: int) -> None:
    name = f"zero{stage}_params-gpu_optimizer-gpu"
    rendered = with_optimizer(name, "muon", muon_lr=0.01)
    assert rendered["optimizer"] == {
        "type": "Muon",
        "params": {
            "lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "torch_adam": True,
            "muon_lr": 0.01, "momentum": 0.95, "ns_method": "standard",
        },
    }  # fmt: skip
    expected = render(job(name), "bf16", "cuda")["zero_optimization"]
    changed = {"reduce_scatter": False} if stage == 3 else {}
    assert rendered["zero_optimization"] == {**expected, **changed}


@pytest.mark.parametrize("optimizer", BITSANDBYTES)
def test_an_optimizer_of_bitsandbytes_takes_every_parameter(optimizer: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra qlora) is not installed")
    rendered = with_optimizer("zero2_params-gpu_optimizer-gpu", optimizer)
    made = getattr(bitsandbytes.optim, rendered["optimizer"]["type"])
    assert set(rendered["optimizer"]["params"]) <= set(inspect.signature(made).parameters)
    assert rendered["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer" not in render(
        job("zero2_params-gpu_optimizer-gpu"), "bf16", "cuda"
    )


def test_rendering_leaves_the_policy_as_it_is() -> None:
    before = load_policy("zero3_params-gpu_optimizer-gpu")
    render(job("zero3_params-gpu_optimizer-gpu"), "bf16", "cuda")
    assert load_policy("zero3_params-gpu_optimizer-gpu") == before
    assert before["train_batch_size"] == "auto"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"train_bach_size": 1}, "train_bach_size is not a key that is known here"),
        ({"zero_optimization": {"stages": 3}}, "zero_optimization.stages is not a key"),
        (
            {"zero_optimization": {"offload_param": {"ratio": 1}}},
            "zero_optimization.offload_param.ratio is not",
        ),
        ({"optimizer": {"params": {"nesterov": 0}}}, "optimizer.params.nesterov is not a key"),
        ({"bf16": True}, "bf16 must be a section"),
        ({"gradient_clipping": {"value": 1}}, "gradient_clipping must be a single value"),
    ],
)
def test_an_unknown_key_is_named(config: dict[str, Any], sentence: str) -> None:
    (found,) = unknown_keys(config)
    assert found.startswith(sentence)


def test_a_policy_with_unknown_keys_and_open_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = {"train_batch_size": "auto", "fp32": {}, "zero_optimization": {"stage": "auto"}}
    policy["optimizer"] = {"params": {"betas": ["auto", 0.9]}}
    monkeypatch.setattr(deepspeed_config, "load_policy", lambda name: policy)
    with pytest.raises(SpecError) as caught:
        render(job("zero3_params-gpu_optimizer-gpu"), "bf16", "cuda")
    prefix = "ds_configs/zero3_params-gpu_optimizer-gpu.json: "
    assert [
        problem.removeprefix(prefix).split(",")[0].split(" is ")[0] for problem in caught.value.problems
    ] == [
        "fp32",
        "nothing fills zero_optimization.stage",
        "nothing fills optimizer.params.betas",
    ]


# DeepSpeed silently ignores unknown keys, so these tests check that it reads every key that is rendered.


def known_to(model: Any) -> set[str]:
    """Return the field names and aliases that a pydantic model accepts."""
    return set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}


def test_every_known_key_is_a_field_of_deepspeeds_models() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    zero = KNOWN_KEYS["zero_optimization"]
    assert set(zero) <= known_to(DeepSpeedZeroConfig)
    assert set(zero["offload_optimizer"]) <= known_to(DeepSpeedZeroOffloadOptimizerConfig)
    assert set(zero["offload_param"]) <= known_to(DeepSpeedZeroOffloadParamConfig)
    assert set(KNOWN_KEYS["bf16"]) <= known_to(DeepSpeedBF16Config)
    assert set(KNOWN_KEYS["fp16"]) <= known_to(DeepSpeedFP16Config)
    assert "no_such_key" not in known_to(DeepSpeedZeroConfig)


@each_policy
def test_deepspeed_reads_back_every_value(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    rendered = render(job(name, workers=1), "bf16", "cpu")
    config = DeepSpeedConfig(json.loads(json.dumps(rendered)))
    read = {
        **{key: getattr(config, key) for key, value in rendered.items() if not isinstance(value, dict)},
        "bf16": config.bfloat16_config.model_dump(),
        "fp16": config.float16_config.model_dump(),
        "zero_optimization": config.zero_config.model_dump(by_alias=True, mode="json"),
        "optimizer": {"type": rendered["optimizer"]["type"], "params": config.optimizer_params},
        "aio": config.aio_config,
    }
    assert config.optimizer_name == rendered["optimizer"]["type"].lower()
    found = dict(leaves(read))
    for key, value in leaves(rendered):
        assert found[key] == value, key


@each_policy
def test_the_optimizer_takes_every_parameter(name: str) -> None:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    params = dict(render(job(name), "bf16", "cuda")["optimizer"]["params"])
    optimizer = torch.optim.AdamW if params.pop("torch_adam", False) else DeepSpeedCPUAdam
    assert (optimizer is DeepSpeedCPUAdam) == ("optimizer-gpu" not in name)
    assert set(params) <= set(inspect.signature(optimizer).parameters)
