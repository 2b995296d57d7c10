"""Render the DeepSpeed configuration of a job from a policy file in ds_configs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from orchestrator.config.schema import JobSpec, ParallelSpec
from orchestrator.errors import SpecError
from orchestrator.package_data import resource
from orchestrator.parallel.parallel_dims import ParallelDims

DeepSpeedConfig = dict[str, Any]
"""A DeepSpeed configuration: the JSON object that `deepspeed.initialize` takes."""
# DeepSpeed silently ignores unknown keys, so policies may use only these. The values 0 are placeholders.
_ADAM = {"lr": 0, "betas": 0, "eps": 0, "weight_decay": 0, "torch_adam": 0, "fused": 0}
_MUON = {"muon_lr": 0, "momentum": 0, "ns_method": 0}
_OFFLOAD = {"device": 0, "pin_memory": 0, "buffer_count": 0, "nvme_path": 0}
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
"""Optimizers that are constructed here and passed to DeepSpeed: job file name to class of bitsandbytes."""
KNOWN_KEYS: Mapping[str, object] = {
    "train_batch_size": 0,
    "train_micro_batch_size_per_gpu": 0,
    "gradient_accumulation_steps": 0,
    "gradient_clipping": 0,
    "steps_per_print": 0,
    "zero_allow_untested_optimizer": 0,
    "wall_clock_breakdown": 0,
    "aio": dict.fromkeys(
        ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events"), 0
    ),
    "bf16": {"enabled": 0},
    "fp16": {
        "enabled": 0, "loss_scale": 0, "initial_scale_power": 0, "loss_scale_window": 0, "hysteresis": 0,
        "min_loss_scale": 0,
    },
    "optimizer": {"type": 0, "params": {**_ADAM, **_MUON}},
    "zero_optimization": {
        **dict.fromkeys(
            (
                "stage", "contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
                "allgather_partitions", "allgather_bucket_size", "round_robin_gradients", "sub_group_size",
                "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
                "stage3_max_live_parameters", "stage3_max_reuse_distance",
                "stage3_gather_16bit_weights_on_model_save",
            ),
            0,
        ),
        "offload_optimizer": {**_OFFLOAD, "ratio": 0, "fast_init": 0},
        "offload_param": {**_OFFLOAD, "buffer_size": 0, "max_in_cpu": 0},
    },
}  # fmt: skip


def policy_name(parallel: ParallelSpec) -> str:
    """Return the name of the policy file for a job's parallel section, without `.json`."""
    where = {"none": "gpu", "cpu": "cpu", "nvme": "nvme"}
    return (
        f"zero{parallel.zero_stage}_params-{where[parallel.offload_param]}"
        f"_optimizer-{where[parallel.offload_optimizer]}"
    )


def load_policy(name: str) -> DeepSpeedConfig:
    """Return a policy file of ds_configs, unrendered, with its "auto" values."""
    text = resource(f"ds_configs/{name}.json").read_text(encoding="utf-8")
    policy: DeepSpeedConfig = json.loads(text)
    return policy


def render(
    job: JobSpec, dtype: Literal["bf16", "fp16", "fp32"], device: Literal["cuda", "cpu"]
) -> DeepSpeedConfig:
    """Return the DeepSpeed configuration of a job, with every "auto" value filled in.

    Args:
        job: The job.
        dtype: Resolved dtype of the parameters.
        device: Device type of the workers; host memory is pinned for CUDA only.

    Raises:
        SpecError: The policy has an unknown key, or an "auto" value that this function does not fill.
    """
    name = policy_name(job.parallel)
    optim, layout = job.optim, ParallelDims.from_job(job)
    values = {
        # DeepSpeed treats every worker as data-parallel (see `ParallelDims.gradient_divisor`), so its batch
        # size counts each row once per worker that shares it.
        "train_batch_size": optim.global_batch_size * layout.sequence_parallel_size,
        "train_micro_batch_size_per_gpu": optim.micro_batch_size,
        "gradient_accumulation_steps": optim.global_batch_size
        // (optim.micro_batch_size * layout.data_parallel_size),
        "gradient_clipping": optim.max_grad_norm,
        "bf16.enabled": dtype == "bf16",
        "fp16.enabled": dtype == "fp16",
        "optimizer.params.lr": optim.lr,
        "optimizer.params.betas": list(optim.betas),
        "optimizer.params.eps": optim.eps,
        "optimizer.params.weight_decay": optim.weight_decay,
        "optimizer.params.muon_lr": optim.muon_lr,
        "zero_optimization.offload_optimizer.pin_memory": device == "cuda",
        "zero_optimization.offload_param.pin_memory": device == "cuda",
        # Each worker uses its own subfolder.
        "zero_optimization.offload_optimizer.nvme_path": job.parallel.offload_path,
        "zero_optimization.offload_param.nvme_path": job.parallel.offload_path,
    }
    policy = load_policy(name)
    if optim.optimizer == "muon":
        policy = _with_muon(policy)
    elif optim.optimizer in BITSANDBYTES:
        params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        section = {"type": BITSANDBYTES[optim.optimizer], "params": params}
        policy = {**policy, "optimizer": section, "zero_allow_untested_optimizer": True}
    problems = [f"ds_configs/{name}.json: {problem}" for problem in unknown_keys(policy)]
    rendered = _fill(policy, values)
    problems += [
        f"ds_configs/{name}.json: nothing fills {key}, which is auto; write a value"
        for key in _autos(rendered)
    ]
    if problems:
        raise SpecError(*problems)
    return rendered


def size_nvme_buffers(ds_config: DeepSpeedConfig, largest: int) -> None:
    """Enlarge the buffers for parameter offload to NVMe so that the largest partition fits.

    DeepSpeed fails with an assertion if a partition exceeds the buffer size.

    Args:
        ds_config: As `render` returns it; changed in place.
        largest: Elements of the largest parameter's partition.
    """
    section = ds_config["zero_optimization"].get("offload_param", {})
    if "buffer_size" in section:
        section["buffer_size"] = max(section["buffer_size"], largest)


def _with_muon(policy: DeepSpeedConfig) -> DeepSpeedConfig:
    """Return a policy with Muon (PyTorch's variant) for layer weights and PyTorch's AdamW for all others."""
    adam = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    params = {**adam, "torch_adam": True, "muon_lr": "auto", "momentum": 0.95, "ns_method": "standard"}
    zero = dict(policy["zero_optimization"])
    if zero["stage"] == 3:
        zero["reduce_scatter"] = False  # DeepSpeed rejects Muon with reduce_scatter under ZeRO-3
    return {**policy, "optimizer": {"type": "Muon", "params": params}, "zero_optimization": zero}


def unknown_keys(
    config: Mapping[str, object], known: Mapping[str, object] = KNOWN_KEYS, prefix: str = ""
) -> Iterator[str]:
    """Yield an error for each key that DeepSpeed would silently ignore."""
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if key not in known:
            yield f"{dotted} is not a key that is known here; remove it, or add it to KNOWN_KEYS"
            continue
        section = known[key]
        if isinstance(value, dict) and isinstance(section, dict):
            yield from unknown_keys(value, section, f"{dotted}.")
        elif isinstance(value, dict) or isinstance(section, dict):
            kind = "a section" if isinstance(section, dict) else "a single value"
            yield f"{dotted} must be {kind}; see DeepSpeed's configuration page"


# Keys of `values` are dotted paths, such as "zero_optimization.stage"; `prefix` ends in a dot or is empty.
def _fill(section: DeepSpeedConfig, values: Mapping[str, object], prefix: str = "") -> DeepSpeedConfig:
    filled: DeepSpeedConfig = {}
    for key, value in section.items():
        if isinstance(value, dict):
            filled[key] = _fill(value, values, f"{prefix}{key}.")
        else:
            filled[key] = values.get(f"{prefix}{key}", value) if value == "auto" else value
    return filled


def _autos(value: object, dotted: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _autos(child, f"{dotted}.{key}" if dotted else key)
    elif value == "auto" or (isinstance(value, list) and "auto" in value):
        yield dotted
