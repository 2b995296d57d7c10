"""Export a checkpoint to a directory that transformers loads, or peft if it is an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from safetensors import SafetensorError

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.manifest import MODEL, read_manifest
from orchestrator.checkpoint.tensor_reader import SavedTensor, TensorReader
from orchestrator.config.chat_templates import NAMED
from orchestrator.config.schema import JobSpec
from orchestrator.data.model_tokenizer import TOKENIZER_TEMPLATES, load_tokenizer
from orchestrator.errors import TrainingError
from orchestrator.export import base_files, config_files, weight_files
from orchestrator.export.adapter import merged_model, write_adapter
from orchestrator.export.destination import MARKER, Draft, open_draft, require_target
from orchestrator.export.model_card import Kind, ModelCardData, history_until, model_card
from orchestrator.export.weight_files import LazyTensor
from orchestrator.model.build import load_config, torch_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MAX_SHARD_BYTES = 5 * 10**9
Dtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and how.

    Attributes:
        job: The run's job.
        run_dir: The run directory.
        checkpoint: A published checkpoint of the run.
        dtype: Dtype of the weights.
        base: Identity of the base model if the run trained an adapter.
        merge: Whether to merge the adapter into the base model.
        max_shard_bytes: Maximum size of a file of weights.
    """

    job: JobSpec
    run_dir: Path
    checkpoint: Path
    dtype: Dtype
    base: Mapping[str, object] | None = None
    merge: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES

    @property
    def kind(self) -> Kind:
        """Whether it is a model, an adapter, or a model with an adapter merged in."""
        return "model" if self.base is None else "merged" if self.merge else "adapter"

    @property
    def weight_format(self) -> weight_files.WeightFormat:
        """Dtype and file size of the weights."""
        return weight_files.WeightFormat(torch_dtype(self.dtype), self.max_shard_bytes)


@dataclass(frozen=True)
class ExportResult:
    """A published export; `files` maps names to sizes in bytes."""

    path: Path
    kind: Kind
    step: int
    dtype: Dtype
    parameters: int
    files: Mapping[str, int]

    def as_json(self) -> dict[str, object]:
        """Return what `export --json` prints."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "step": self.step,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "bytes": sum(self.files.values()),
            "files": [{"name": name, "bytes": size} for name, size in self.files.items()],
        }


def export(request: ExportRequest, to: Path) -> ExportResult:
    """Write a checkpoint as Hugging Face safetensors, with all other files of its base model.

    An adapter is written in peft's format, or with `merge` as the base model with the adapter merged in.

    The export is written next to the target and renamed, so that the target always holds a complete export
    or what it held before. One shard is in host memory at a time, except that merging needs the whole
    model. Needs no GPU and no process group.

    Args:
        request: What to export.
        to: Directory to write; an earlier export is replaced.

    Raises:
        SpecError: The directory must not be replaced.
        TrainingError: The checkpoint is damaged, or the export cannot be written.
    """
    target = require_target(to, request.run_dir, request.job)
    step = checkpoint_dir.step_of(request.checkpoint)
    properties = {"run": request.job.name, "kind": request.kind, "step": step, "dtype": request.dtype}
    try:
        with open_draft(target) as draft:
            parameters = _write(request, draft)
            files = draft.publish(properties)
    except (OSError, SafetensorError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
        raise TrainingError(
            f"the export to {to} cannot be written ({reason}), and nothing there was changed; free some "
            "space, or name another writable directory with --to"
        ) from error
    sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
    sizes[MARKER] = (target / MARKER).stat().st_size
    return ExportResult(target, request.kind, step, request.dtype, parameters, sizes)


def _write(request: ExportRequest, draft: Draft) -> int:
    """Write all files of an export; return the number of parameters."""
    job, directory, weight_format = request.job, draft.directory, request.weight_format
    config = load_config(job.model)
    base = base_files.base_model_dir(job.model, getattr(config, "_commit_hash", None))
    is_adapter = request.kind == "adapter"
    base_files.copy_files(base, directory, only_tokenizer=is_adapter)
    _write_tokenizer(job, directory)
    if is_adapter:
        weights = fp32_weights(request.checkpoint)
        size = weight_files.total_bytes(weights, weight_format)
        weight_files.require_free_space(directory, size, draft.target)
        parameters = write_adapter(job, weights, directory, weight_format.dtype, request.base or {})
    else:
        write = _write_merged if request.kind == "merged" else _write_model
        parameters = write(request, config, base, draft)
    step = checkpoint_dir.step_of(request.checkpoint)
    card = ModelCardData(
        job, request.kind, step, request.dtype, parameters, base_files.card_metadata(base),
        *history_until(request.run_dir, step),
    )  # fmt: skip
    (directory / "README.md").write_text(model_card(card), encoding="utf-8")
    return parameters


def _write_tokenizer(job: JobSpec, directory: Path) -> None:
    """Make the copied tokenizer_config.json readable by transformers 4 and 5."""
    chosen = job.data.chat_template
    is_changed = chosen not in TOKENIZER_TEMPLATES or job.model.new_special_tokens
    if is_changed or not any(directory.glob("*")):  # the tokenizer has no file of a known name
        tokenizer = load_tokenizer(job.model, chosen)
        tokenizer.save_pretrained(directory)
        if chosen in NAMED and NAMED[chosen].end:
            base_files.add_end_of_generation(directory, cast("int", tokenizer.eos_token_id))
    file = directory / base_files.TOKENIZER_CONFIG
    settings = base_files.read_json(file)
    if (readable := config_files.tokenizer_config(settings)) != settings:
        base_files.write_json(file, readable)


def _write_model(request: ExportRequest, config: PretrainedConfig, base: Path, draft: Draft) -> int:
    weights = weight_files.without_tied_duplicates(fp32_weights(request.checkpoint))
    return _write_weights(request, config, base, draft, weights, _meta_model(request.job, config))


def _write_merged(request: ExportRequest, config: PretrainedConfig, base: Path, draft: Draft) -> int:
    dtype = request.weight_format.dtype
    adapter_weights = fp32_weights(request.checkpoint)
    write_adapter(request.job, adapter_weights, draft.scratch, dtype, request.base or {})
    model = merged_model(request.job, draft.scratch, dtype)
    weights = weight_files.without_tied_duplicates(model.state_dict())
    return _write_weights(request, config, base, draft, weights, model)


def _write_weights(
    request: ExportRequest,
    config: PretrainedConfig,
    base: Path,
    draft: Draft,
    weights: Mapping[str, LazyTensor],
    model: PreTrainedModel | None,
) -> int:
    """Write weights and config.json; return the number of parameters."""
    size = weight_files.total_bytes(weights, request.weight_format)
    weight_files.require_free_space(draft.directory, size, draft.target)
    convert = weight_files.to_published_format(model)
    parameters = weight_files.write_weights(weights, draft.directory, request.weight_format, convert)
    trained = {**config.to_dict(), **_vocab_size(model, weights)}
    base_config = base_files.read_json(base / base_files.CONFIG)
    exported = config_files.model_config(base_config, request.dtype, _architecture(config), trained)
    base_files.write_json(draft.directory / base_files.CONFIG, exported)
    return parameters


def _meta_model(job: JobSpec, config: PretrainedConfig) -> PreTrainedModel | None:
    """Return the model on the meta device; None if its own code needs real tensors."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=job.model.trust_remote_code
            )
    except RuntimeError:
        return None
    return model


def _vocab_size(model: PreTrainedModel | None, weights: Mapping[str, LazyTensor]) -> dict[str, int]:
    """Return the number of rows of the embedding [vocab_size, hidden] as a setting; empty if unknown."""
    if model is None:
        return {}
    embedding = model.get_input_embeddings()
    names = [f"{name}.weight" for name, module in model.named_modules() if module is embedding]
    rows = [int(weights[name].shape[0]) for name in names if name in weights]
    return {"vocab_size": rows[0]} if rows else {}


def _architecture(config: PretrainedConfig) -> str | None:
    """Return the class of causal language model that transformers has for a configuration."""
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    # Annotated as a pair of classes; mappings of models have one.
    return str(mapping[type(config)].__name__) if type(config) in mapping else None  # type: ignore[attr-defined]


def fp32_weights(checkpoint: Path) -> dict[str, LazyTensor]:
    """Return the fp32 weights of a checkpoint by name; each is read when its `contiguous` is called.

    Tied weights are one object under several names.

    Args:
        checkpoint: A published checkpoint.

    Raises:
        TrainingError: The manifest is missing, damaged, or of another format.
    """
    manifest = read_manifest(checkpoint)
    reader, prefix = TensorReader(checkpoint, manifest), f"{MODEL}."
    weights: dict[str, LazyTensor] = {
        name.removeprefix(prefix): SavedTensor(reader, name)
        for name in manifest["tensors"]
        if name.startswith(prefix)
    }
    return weights | {alias: weights[name] for alias, name in manifest["tied"].items()}
