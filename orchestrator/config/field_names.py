"""Names of job fields in other trainers and in earlier versions, and the field that each corresponds to.

An error for an unknown field looks its name up here. The names are those of transformers' TrainingArguments,
TRL, peft, axolotl, LLaMA-Factory, ms-swift, XTuner, ArcticTraining, NeMo Automodel and torchtune.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Equivalent:
    """What a foreign name corresponds to.

    Attributes:
        field: Dotted field of the job; None if the job has no such field.
        remark: How the values differ, or why there is no field; empty if the value carries over.
    """

    field: str | None
    remark: str = ""


def _same(field: str, *names: str, remark: str = "") -> dict[str, Equivalent]:
    return dict.fromkeys(names, Equivalent(field, remark))


def _none(remark: str, *names: str) -> dict[str, Equivalent]:
    return dict.fromkeys(names, Equivalent(None, remark))


_EFFECTIVE_BATCH = (
    "it is global_batch_size / (micro_batch_size x data-parallel workers); set optim.global_batch_size"
)
_DTYPE = "write model.dtype: bf16, fp16 or fp32"
_WARMUP = "a share of all steps: warmup steps / steps"
_COLUMNS = "columns of its entries: {name in the file: field}, such as {question: instruction, speaker: role}"
_PRECISION_OF_BASE = "4 bits are nf4, 8 bits are int8"

EQUIVALENTS: Mapping[str, Equivalent] = {
    # earlier versions of this job file
    **_same("method.target_modules", "targets", "lora_target", "lora_target_modules", "lora_modules"),
    **_same(
        "optim.max_grad_norm", "clip_norm", "gradient_clipping", "grad_clip", "clip_grad", "clip_grad_norm"
    ),
    **_same("optim.lr_scheduler", "schedule", "lr_scheduler_type", "lr_decay_style", "scheduler"),
    **_same("data.chat_template", "template", "chat_template_name", "prompt_template", "template_type"),
    # model
    **_same(
        "model.path", "model_name_or_path", "base_model", "model_id", "model_name", "name_or_path",
        "pretrained_model_name_or_path", "model_id_or_path", "tokenizer_name_or_path"
    ),
    **_same("model.dtype", "torch_dtype", "compute_dtype", "precision", "model_dtype"),
    **_same("model.dtype", "bf16", "fp16", "tf32", remark=_DTYPE),
    **_same("model.attention", "attn_implementation", "attn_impl", "flash_attn", "attn_type"),
    **_same(
        "model.attention", "flash_attention", "use_flash_attn", "flash_attention_2", "sdp_attention",
        remark="write model.attention: flash, sdpa or auto"
    ),
    **_same(
        "model.gradient_checkpointing", "activation_checkpoint", "activation_checkpointing",
        "enable_activation_checkpointing", "disable_gradient_checkpointing", "use_gradient_checkpointing",
        "recompute_granularity"
    ),
    **_same("model.resize_embeddings", "resize_vocab", "resize_token_embeddings"),
    **_same("model.new_special_tokens", "new_special_tokens", "add_tokens", "additional_special_tokens"),
    **_same("model.trust_remote_code", "allow_remote_code"),
    # method
    **_same("method.type", "finetuning_type", "train_type", "tuner_type", "adapter_type", "peft_type"),
    **_same("method.rank", "r", "lora_r", "lora_rank", "lora_dim"),
    **_same("method.alpha", "lora_alpha"),
    **_same("method.dropout", "lora_dropout"),
    **_same("method.target_modules", "target_module", "lora_attn_modules", "lora_target_linear"),
    **_same("method.train_embeddings", "modules_to_save", "lora_modules_to_save", "additional_target"),
    **_same(
        "method.type", "adapter",
        remark="lora; QLoRA also needs method.quantization; method.adapter is a folder to start from"
    ),
    **_same("method.use_rslora", "peft_use_rslora", "rslora"),
    **_same("method.use_dora", "peft_use_dora", "dora"),
    **_same("method.adapter", "adapter_name_or_path", "lora_model_dir", "adapters", "resume_from_adapter"),
    **_same(
        "method.quantization", "load_in_4bit", "load_in_8bit", "quantization_bit", "quant_bits",
        "quant_method", "quantization_config", "bnb_4bit_quant_type", remark=_PRECISION_OF_BASE
    ),
    **_same("method.double_quantization", "double_quant", "bnb_4bit_use_double_quant"),
    # data
    **_same(
        "data.train", "dataset", "datasets", "train_dataset", "train_data", "data_path", "dataset_path",
        "train_file", "data_files", remark="a list: [{path: rows.jsonl}]"
    ),
    **_same(
        "data.max_length", "max_seq_length", "max_seq_len", "model_max_length", "cutoff_len",
        "sequence_len", "seq_length", "seq_len", "block_size", "pack_max_length", "max_len"
    ),
    **_same(
        "data.packing", "sample_packing", "packed_sequence", "pack_to_max_length", "multipack", "pack",
        remark="write data.packing: best_fit, concat or none"
    ),
    **_same(
        "data.pad_to", "pad_to_max_length", "pad_to_sequence_len", "padding",
        remark="only packing: none can pad; null pads nothing"
    ),
    **_same(
        "data.cross_document_attention", "neat_packing", "padding_free", "use_varlen_attn",
        remark="false keeps documents apart, as these options do"
    ),
    **_same(
        "data.loss_on", "train_on_inputs", "train_on_prompt", "mask_prompt", "mask_history", "loss_scale",
        "assistant_only_loss", "completion_only_loss",
        remark="write data.loss_on: response, all or last_turn"
    ),
    **_same("data.truncation", "truncation_strategy", "truncation_side", "excess_length_strategy"),
    **_same(
        "data.train", "columns", "column_map", "column_mapping", "field_instruction", "field_input",
        "field_output", "field_system", "field_messages", "field_human", "field_model", "dataset_text_field",
        "text_field", "prompt_column", "response_column", "messages_column", "message_property_mappings",
        "message_field_role", "message_field_content", "tags", "dataset_map_fn", remark=_COLUMNS
    ),
    **_same("data.malformed_rows_allowed", "max_malformed_rows", "skip_errors"),
    **_same("data.deduplicate", "dataset_exact_deduplication", "deduplication", "dedup", "dedupe"),
    **_same(
        "eval.data", "eval_dataset", "val_dataset", "test_datasets", "validation_file", "eval_data",
        "eval_datasets", "validation_dataset", "val_data",
        remark="a list: [{path: rows.jsonl}], or several sets: {code: [...], chat: [...]}"
    ),
    **_same(
        "eval.share", "val_size", "val_set_size", "split_dataset_ratio", "validation_split_percentage",
        "test_size", "eval_split_ratio", "validation_split", remark="a fraction of the rows, such as 0.02"
    ),
    # parallel
    **_same(
        "parallel.workers", "num_processes", "nproc_per_node", "num_gpus", "world_size", "num_workers",
        "n_gpus", remark="all workers together, one per GPU"
    ),
    **_same("parallel.zero_stage", "zero_optimization", remark="0, 1, 2 or 3"),
    **_same(
        "parallel.zero_stage", "stage",
        remark="of ZeRO: 0, 1, 2 or 3; supervised fine-tuning is the only training stage"
    ),
    **_same(
        "parallel.zero_stage", "deepspeed", "deepspeed_config", "ds_config",
        remark="set parallel.zero_stage and parallel.offload_*; `orchestrator render` prints the result"
    ),
    **_same(
        "parallel.zero_stage", "fsdp", "fsdp_config", "fsdp_version", remark="ZeRO-3 shards as FSDP does"
    ),
    **_same(
        "parallel.sequence_parallel_size", "sequence_parallel_degree", "context_parallel_size", "cp_size",
        "ulysses_degree", "ulysses_size", "sp_size", "sequence_parallel"
    ),
    **_same("parallel.offload_optimizer", "offload_optimizer_device", "cpu_offload_optimizer"),
    **_same("parallel.offload_param", "offload_param_device", "cpu_offload", "offload_params"),
    **_same("parallel.offload_path", "nvme_path", "offload_folder"),
    **_same("parallel.offload_activations", "activation_offloading", "cpu_checkpointing"),
    # optim
    **_same("optim.lr", "learning_rate", "max_lr", "peak_lr", "base_lr"),
    **_same(
        "optim.micro_batch_size", "per_device_train_batch_size", "train_micro_batch_size_per_gpu",
        "micro_batch", "local_batch_size", "batch_size"
    ),
    **_same("optim.global_batch_size", "train_batch_size", "gbs"),
    **_none(
        _EFFECTIVE_BATCH, "gradient_accumulation_steps", "gradient_accumulation", "accumulate_grad_batches",
        "accumulative_counts", "grad_accum"
    ),
    **_same("optim.warmup_ratio", "warmup_fraction"),
    **_same("optim.warmup_ratio", "warmup_steps", "lr_warmup_iters", "num_warmup_steps", remark=_WARMUP),
    **_same("optim.max_steps", "train_iters", "max_iters", "num_steps", "training_steps", "total_steps"),
    **_same("optim.epochs", "num_train_epochs", "num_epochs", "max_epochs", "n_epochs"),
    **_same("optim.optimizer", "optim_type", "optimizer_type"),
    **_same(
        "optim.betas", "adam_beta1", "adam_beta2", "adam_betas", "beta1", "beta2",
        remark="both in a list: [0.9, 0.999]"
    ),
    **_same("optim.eps", "adam_epsilon", "adam_eps", "epsilon"),
    **_same("optim.weight_decay", "wd"),
    **_same("optim.muon_lr", "muon_learning_rate"),
    # eval, checkpoint, run, metrics
    **_same("eval.every_steps", "eval_steps", "eval_interval", "evals_per_epoch", "val_every_steps"),
    **_same(
        "checkpoint.storage", "output_dir", "work_dir", "save_path", "checkpoint_dir", "save_dir",
        remark="the run directory is STORAGE/NAME"
    ),
    **_same(
        "checkpoint.every_steps", "save_steps", "save_interval", "saves_per_epoch", "checkpoint_interval",
        "save_every_n_steps", "ckpt_every_steps"
    ),
    **_same(
        "checkpoint.keep", "save_total_limit", "max_keep_ckpts", "max_ckpt_to_keep",
        "keep_latest_n_checkpoints"
    ),
    **_same("checkpoint.keep_best", "save_top_k"),
    **_same("checkpoint.asynchronous", "async_save", "async_mode"),
    **_same("run.seed", "data_seed", "random_seed", "manual_seed"),
    **_same("run.max_failures", "max_restarts"),
    **_same("run.collective_timeout_seconds", "ddp_timeout", "nccl_timeout", "dist_timeout"),
    **_same(
        "metrics.trackers", "report_to", "use_wandb", "wandb_mode", "logging_backends",
        remark="a list of tensorboard, wandb, mlflow"
    ),
    **_same("metrics.project", "wandb_project", "project_name", "mlflow_experiment_name"),
    **_same("name", "run_name", "experiment_name", "wandb_name", "job_name"),
    **_none("every step is recorded in steps.jsonl", "logging_steps", "log_interval", "log_every_n_steps"),
    **_none(
        "a run resumes from its latest checkpoint when it is started again", "resume_from_checkpoint",
        "auto_resume_from_checkpoint", "resume", "overwrite_output_dir"
    ),
    **_none(
        "`orchestrator export` writes the model", "save_safetensors", "export_dir", "push_to_hub",
        "hub_model_id"
    ),
    **_none(
        "tokenising uses all CPUs of the cluster", "preprocessing_num_workers", "dataset_num_proc",
        "dataset_processes", "dataloader_num_workers"
    ),
    **_none("sequences are packed, so there are no groups by length", "group_by_length"),
    **_none(
        "kernels are chosen by model.attention and model.loss_tile_tokens", "use_liger_kernel",
        "liger_kernel", "use_liger", "enable_liger_kernel"
    ),
    **_none(
        "tensor and pipeline parallelism are not available; use zero_stage: 3 and sequence_parallel_size",
        "tensor_parallel_size", "pipeline_parallel_size", "tp_size", "pp_size"
    ),
}  # fmt: skip
"""By the name in lower case with underscores."""


SECTION_VALUES: Mapping[str, str] = {"model": "model.path", "data": "data.train", "optim": "optim.optimizer"}
"""Sections that other trainers write as a single value, and the field for that value."""


def equivalent(name: str) -> Equivalent | None:
    """Return what a name of another trainer corresponds to; None for a name that is not known."""
    return EQUIVALENTS.get(name.strip().lower().replace("-", "_"))


def remedy(name: str) -> str | None:
    """Return the remedy for an unknown field of a job, such as "use optim.lr"; None if it is not known."""
    found = equivalent(name)
    if found is None:
        return None
    if found.field is None:
        return f"there is no such field: {found.remark}"
    return f"use {found.field}" + (f" ({found.remark})" if found.remark else "")
