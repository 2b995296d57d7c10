"""Validation rules between the fields of a job, each with its remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from orchestrator.config.eval_sets import HELD_OUT, all_sources, eval_sets
from orchestrator.config.schema import JobSpec, MethodSpec

Problem = tuple[tuple[str, ...], str]
"""Dotted names of the fields concerned, and the error message."""
_EVAL_SET = re.compile(r"[A-Za-z0-9_-]+")


def broken_rules(job: JobSpec) -> Iterator[Problem]:
    """Yield a problem for every rule between fields that the job breaks.

    Args:
        job: A job whose fields are each valid.

    Yields:
        The fields concerned, and a message with value, rule and remedy.
    """
    yield from _broken_batch_rules(job)
    yield from _broken_sequence_rules(job)
    yield from _broken_worker_rules(job)
    yield from _broken_memory_rules(job)
    yield from _broken_device_rules(job)
    yield from _broken_recomputation_rules(job)
    yield from _broken_retention_rules(job)
    yield from _broken_attention_rules(job)
    yield from _broken_packing_rules(job)
    yield from _broken_source_rules(job)
    yield from _broken_eval_rules(job)
    yield from _broken_method_rules(job)
    yield from _broken_optimizer_rules(job)
    yield from _broken_environment_rules(job)
    yield from _not_in_this_version(job)


_READ_AT_START = ("LD_", "PYTHON", "RAY_", "CUDA_VISIBLE_DEVICES")


def _broken_environment_rules(job: JobSpec) -> Iterator[Problem]:
    for name, value in job.run.env.items():
        field = (f"run.env.{name}",)
        if name.startswith(_READ_AT_START):
            yield (
                field,
                f"run.env.{name} would have no effect: {name} is read when a process starts, and run.env "
                "is set "
                "after that; export it before `ray start` on every node, and remove it here",
            )
        if value is not None and "\0" in value.get_secret_value():
            yield field, f"run.env.{name} contains a NUL character; remove it from the value"


def _broken_batch_rules(job: JobSpec) -> Iterator[Problem]:
    parallel, optim = job.parallel, job.optim
    if parallel.workers % parallel.sequence_parallel_size:
        divisors = [n for n in range(1, parallel.workers + 1) if parallel.workers % n == 0]
        yield (
            ("parallel.workers", "parallel.sequence_parallel_size"),
            f"parallel.sequence_parallel_size={parallel.sequence_parallel_size} does not divide "
            f"parallel.workers={parallel.workers}; use one of {divisors}",
        )
        return
    micro_batches = optim.micro_batch_size * job.data_parallel_size
    if optim.global_batch_size % micro_batches:
        nearest = max(1, (optim.global_batch_size + micro_batches // 2) // micro_batches) * micro_batches
        yield (
            ("optim.global_batch_size", "optim.micro_batch_size", "parallel.workers"),
            f"optim.global_batch_size={optim.global_batch_size} is not a multiple of micro_batch_size x "
            f"data-parallel workers = {optim.micro_batch_size} x {job.data_parallel_size} = {micro_batches}; "
            f"use {nearest}, or change micro_batch_size or workers",
        )


def _broken_sequence_rules(job: JobSpec) -> Iterator[Problem]:
    size, length = job.parallel.sequence_parallel_size, job.data.max_length
    slots = length * job.optim.micro_batch_size
    if slots % size and job.data.pads_packs:  # other rows are padded to the next multiple
        yield (
            ("data.max_length", "parallel.sequence_parallel_size"),
            f"data.max_length={length} (x micro_batch_size {job.optim.micro_batch_size}) is not a multiple "
            f"of parallel.sequence_parallel_size={size}; use max_length: "
            f"{max(1, round(length / size)) * size}",
        )


def _broken_worker_rules(job: JobSpec) -> Iterator[Problem]:
    fewest, workers = job.run.min_workers, job.parallel.workers
    if fewest is not None and fewest > workers:
        yield (
            ("run.min_workers", "parallel.workers"),
            f"run.min_workers={fewest} exceeds parallel.workers={workers}; lower it",
        )


def _broken_memory_rules(job: JobSpec) -> Iterator[Problem]:
    parallel = job.parallel
    if parallel.offload_param != "none" and parallel.zero_stage != 3:
        yield (
            ("parallel.offload_param", "parallel.zero_stage"),
            f"parallel.offload_param={parallel.offload_param} requires zero_stage: 3 (got "
            f"{parallel.zero_stage}); use zero_stage: 3 or offload_param: none",
        )
    elif parallel.offload_param != "none" and parallel.offload_optimizer == "none":
        yield (
            ("parallel.offload_param", "parallel.offload_optimizer"),
            f"parallel.offload_param={parallel.offload_param} requires offload_optimizer, whose states are "
            "larger; set offload_optimizer: cpu",
        )
    yield from _broken_stage_0_rules(job)
    yield from _broken_nvme_rules(job)


def _broken_stage_0_rules(job: JobSpec) -> Iterator[Problem]:
    """Refuse what DeepSpeed does not support, or computes wrongly, with ZeRO-0."""
    parallel = job.parallel
    if parallel.zero_stage != 0:
        return
    if parallel.offload_optimizer != "none":
        yield (
            ("parallel.offload_optimizer", "parallel.zero_stage"),
            f"parallel.offload_optimizer={parallel.offload_optimizer} requires zero_stage: 1, 2 or 3 (got "
            "0); "
            "use zero_stage: 1 or offload_optimizer: none",
        )
    if job.model.dtype == "fp16":
        yield (
            ("model.dtype", "parallel.zero_stage"),
            "model.dtype=fp16 requires loss scaling, which DeepSpeed does not do with zero_stage=0; use "
            "zero_stage: 1, or dtype: bf16",
        )


def _broken_nvme_rules(job: JobSpec) -> Iterator[Problem]:
    parallel = job.parallel
    on_disk = [name for name in ("offload_optimizer", "offload_param") if getattr(parallel, name) == "nvme"]
    fields = tuple(f"parallel.{name}" for name in on_disk)
    if on_disk and parallel.offload_path is None:
        yield (
            ("parallel.offload_path", *fields),
            f"parallel.{on_disk[0]}=nvme requires parallel.offload_path, a folder on a disk of every node; "
            "set "
            f"it, or use {on_disk[0]}: cpu",
        )
    if not on_disk and parallel.offload_path is not None:
        yield (
            ("parallel.offload_path",),
            f"parallel.offload_path={parallel.offload_path} has no effect without offload to nvme; set "
            "offload_optimizer: nvme, or remove it",
        )
    if parallel.offload_optimizer == "nvme" and parallel.zero_stage in (1, 2):
        yield (
            ("parallel.offload_optimizer", "parallel.zero_stage"),
            f"parallel.offload_optimizer=nvme requires zero_stage: 3 (got {parallel.zero_stage}); use "
            "zero_stage: 3 or offload_optimizer: cpu",
        )
    if parallel.offload_param == "nvme" and job.method.type == "lora":
        # DeepSpeed 0.19 fails here: see ds_configs/README.md.
        yield (
            ("parallel.offload_param", "method.type"),
            "parallel.offload_param=nvme does not support method.type=lora: DeepSpeed fails on the adapters; "
            "use offload_param: cpu, or type: full",
        )


def _broken_device_rules(job: JobSpec) -> Iterator[Problem]:
    if job.model.dtype == "fp16" and job.parallel.device == "cpu":
        yield (
            ("model.dtype", "parallel.device"),
            "model.dtype=fp16 requires CUDA (got parallel.device=cpu); use dtype: fp32, or bf16 to try it",
        )


def _broken_recomputation_rules(job: JobSpec) -> Iterator[Problem]:
    parallel, checkpointing = job.parallel, job.model.gradient_checkpointing
    if parallel.offload_activations != "none" and checkpointing != "full":
        yield (
            ("parallel.offload_activations", "model.gradient_checkpointing"),
            f"parallel.offload_activations={parallel.offload_activations} requires gradient_checkpointing: "
            "full "
            f"(got {checkpointing}), since it offloads only layer inputs; use full, or "
            "offload_activations: none",
        )
    if job.model.mlp_tile_tokens is not None and checkpointing == "selective":
        yield (
            ("model.mlp_tile_tokens", "model.gradient_checkpointing"),
            f"model.mlp_tile_tokens={job.model.mlp_tile_tokens} has no effect with gradient_checkpointing="
            "selective, which saves the MLP's matmul outputs; use gradient_checkpointing: full, or remove "
            "mlp_tile_tokens",
        )


def _broken_retention_rules(job: JobSpec) -> Iterator[Problem]:
    checkpoint = job.checkpoint
    every, kept = checkpoint.every_steps, checkpoint.keep_every_steps
    if kept is not None and (every is None or kept % every):
        yield (
            ("checkpoint.keep_every_steps", "checkpoint.every_steps"),
            f"checkpoint.keep_every_steps={kept} must be a multiple of checkpoint.every_steps (got "
            f"{'null' if every is None else every}), since only these steps are saved; change one of them, "
            "or remove it",
        )
    evaluated = job.eval.every_steps if job.eval else None
    if checkpoint.keep_best and (every is None or evaluated is None or every % evaluated):
        yield (
            ("checkpoint.keep_best", "eval.every_steps", "checkpoint.every_steps"),
            f"checkpoint.keep_best={checkpoint.keep_best} requires that every saved step is evaluated, and "
            f"checkpoint.every_steps ({'null' if every is None else every}) is not a multiple of "
            f"eval.every_steps ({'null' if evaluated is None else evaluated}); set both, such as "
            "every_steps: 100 in checkpoint and in eval",
        )


def _broken_attention_rules(job: JobSpec) -> Iterator[Problem]:
    if job.model.attention != "flash":
        return
    if job.model.dtype == "fp32":
        yield (
            ("model.attention", "model.dtype"),
            "model.attention=flash requires bf16 or fp16 (got model.dtype=fp32); use attention: auto or sdpa",
        )
    if job.parallel.device == "cpu":
        yield (
            ("model.attention", "parallel.device"),
            "model.attention=flash requires CUDA (got parallel.device=cpu); use attention: auto or sdpa",
        )


def _broken_packing_rules(job: JobSpec) -> Iterator[Problem]:
    if job.data.cross_document_attention and job.data.packing == "none":
        yield (
            ("data.cross_document_attention", "data.packing"),
            "data.cross_document_attention=true has no effect with data.packing=none, where a pack is one "
            "document; use packing: concat (as XTuner does) or best_fit",
        )


def _broken_source_rules(job: JobSpec) -> Iterator[Problem]:
    for place, source in all_sources(job):
        fields = [field for field in source.columns.values() if field is not None]
        for field in sorted({each for each in fields if fields.count(each) > 1}):
            names = [name for name, each in source.columns.items() if each == field]
            yield (
                (f"{place}.columns",),
                f"{place}.columns maps {' and '.join(names)} to {field}; a field is one column, so keep one "
                "of them",
            )


def _broken_eval_rules(job: JobSpec) -> Iterator[Problem]:
    if job.eval is None:
        return
    if not job.eval.data and job.eval.share is None:
        yield (
            ("eval.data", "eval.share", "eval"),
            "eval has no rows to evaluate; set eval.share: 0.02 to hold out rows of data.train, or eval.data",
        )
    for name in eval_sets(job):
        if not _EVAL_SET.fullmatch(name):
            yield (
                (f"eval.data.{name}",),
                f"eval.data={name} is not a name of an evaluation set; use letters, digits, dash and "
                "underscore",
            )
    if job.eval.share is not None and HELD_OUT in eval_sets(job):
        yield (
            (f"eval.data.{HELD_OUT}", "eval.share"),
            f"eval.data={HELD_OUT} is the name of the rows that eval.share={job.eval.share:g} holds out; use "
            "another name, or remove eval.share",
        )


def _broken_method_rules(job: JobSpec) -> Iterator[Problem]:
    method = job.method
    if method.type == "full":
        for name, value in method:
            if value != MethodSpec.model_fields[name].default:
                written = json.dumps(value).strip('"')
                yield (
                    (f"method.{name}",),
                    f"method.{name}={written} has no effect with method.type=full, which trains every "
                    "parameter; use type: lora, or remove it",
                )
    if method.quantization == "int8" and job.parallel.zero_stage == 3:
        yield (
            ("method.quantization", "parallel.zero_stage"),
            "method.quantization=int8 does not support zero_stage=3, because its scales are stored outside "
            "the weights; use quantization: nf4, or zero_stage: 2",
        )
    if job.model.resize_embeddings and method.type == "lora" and not method.train_embeddings:
        yield (
            ("model.resize_embeddings", "method.train_embeddings"),
            "model.resize_embeddings=true with method.type=lora requires method.train_embeddings: true, "
            "which "
            "trains and saves the new rows",
        )
    if method.target_modules == ():
        yield (
            ("method.target_modules",),
            "method.target_modules=[] is empty; use all-linear, attention or a list such as [q_proj, v_proj]",
        )


def _broken_optimizer_rules(job: JobSpec) -> Iterator[Problem]:
    optim, parallel = job.optim, job.parallel
    if optim.optimizer != "adamw" and parallel.offload_optimizer != "none":
        yield (
            ("optim.optimizer", "parallel.offload_optimizer"),
            f"optim.optimizer={optim.optimizer} does not support parallel.offload_optimizer="
            f"{parallel.offload_optimizer}, which uses CPU Adam; use optimizer: adamw, or "
            "offload_optimizer: none",
        )
    if optim.optimizer == "muon":
        yield from _broken_muon_rules(job)
    elif optim.muon_lr is not None:
        yield (
            ("optim.muon_lr", "optim.optimizer"),
            f"optim.muon_lr={optim.muon_lr:g} has no effect with optim.optimizer={optim.optimizer}; use "
            "optimizer: muon, or remove it",
        )


def _broken_muon_rules(job: JobSpec) -> Iterator[Problem]:
    optim = job.optim
    if optim.muon_lr is None:
        yield (
            ("optim.muon_lr", "optim.optimizer"),
            "optim.optimizer=muon requires optim.muon_lr, because its update does not scale with the "
            "gradient; "
            f"set optim.muon_lr: {13 * optim.lr:.2g}, which matches the update size of AdamW with optim.lr "
            "for "
            "matrices of width 4096",
        )
    if job.method.type == "lora":
        yield (
            ("optim.optimizer", "method.type"),
            "optim.optimizer=muon does not support method.type=lora: it orthogonalizes whole weight "
            "matrices, "
            "not low-rank factors; use optimizer: adamw, or type: full",
        )


def _not_in_this_version(job: JobSpec) -> Iterator[Problem]:
    """Refuse values of the schema that this version does not implement."""
    limited: list[tuple[str, object, list[object]]] = [
        ("checkpoint.asynchronous", job.checkpoint.asynchronous, [False]),
        ("run.min_workers", job.run.min_workers, [None, job.parallel.workers]),
    ]
    for field, value, available in limited:
        if value not in available:
            written, instead = (json.dumps(item).strip('"') for item in (value, available[0]))
            yield (field,), f"{field}={written} is not available in this version; use {instead}"
    if "://" in job.checkpoint.storage:
        yield (
            ("checkpoint.storage",),
            f"checkpoint.storage={job.checkpoint.storage} is a URI, which is not available in this "
            "version; use a "
            "folder that every node mounts",
        )
