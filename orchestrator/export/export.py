"""From a run's checkpoint to a folder that transformers loads, or peft where adapters were trained."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from orchestrator.checkpoint import checkpoint_dir, checkpointer
from orchestrator.config.schema import JobSpec
from orchestrator.data.tokenize import load_tokenizer
from orchestrator.errors import TrainingError
from orchestrator.export import base_files, config_files, weight_files
from orchestrator.export.adapter import merged_model, write_adapter
from orchestrator.export.destination import MARKER, Draft, draft_of, require_target
from orchestrator.export.model_card import CardFacts, Kind, model_card, rows_until
from orchestrator.model.build import load_config, torch_dtype

MAX_SHARD_BYTES = 5 * 10**9
Dtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Request:
    """What is exported, and how.

    Attributes:
        job: The run's job.
        run: The run's folder.
        saved: A published checkpoint of it.
        dtype: Number format of the weights.
        base: Of a run that trained adapters, the identity of the model that they belong to.
        merge: Whether adapters are merged into the base model.
        max_shard_bytes: Largest size of a file of weights.
    """

    job: JobSpec
    run: Path
    saved: Path
    dtype: Dtype
    base: Mapping[str, Any] | None = None
    merge: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES

    @property
    def kind(self) -> Kind:
        """Whether it is a model, an adapter, or a model with an adapter merged in."""
        return "model" if self.base is None else "merged" if self.merge else "adapter"

    @property
    def form(self) -> weight_files.WeightFormat:
        """How weights are written."""
        return weight_files.WeightFormat(torch_dtype(self.dtype), self.max_shard_bytes)


@dataclass(frozen=True)
class Exported:
    """A written export: `files` are their sizes in bytes by name."""

    path: Path
    kind: Kind
    step: int
    dtype: Dtype
    parameters: int
    files: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return it as `export --json` prints it."""
        listed = [{"name": name, "bytes": size} for name, size in self.files.items()]
        return {
            "path": str(self.path),
            "kind": self.kind,
            "step": self.step,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "bytes": sum(self.files.values()),
            "files": listed,
        }


def export(request: Request, to: Path) -> Exported:
    """Write the model of a checkpoint as Hugging Face safetensors, and all else its base model came with.

    Of a run that trained adapters, write these in peft's format, or with `merge` the base model with them
    added to its weights.

    It is written beside the folder and renamed, so that the folder holds a whole export or what it held
    before. One file at a time is put together from the shards, so host memory holds one output file and not
    the model twice, unless adapters are merged. Needs no device and no process group.

    Args:
        request: What is exported.
        to: Folder to write; an earlier export is replaced.

    Raises:
        SpecError: The folder holds, or is, what must not be replaced.
        TrainingError: The checkpoint is damaged, or the folder cannot be written.
    """
    target = require_target(to, request.run, request.job)
    problems = checkpoint_dir.verify(request.saved)
    if problems:
        raise TrainingError(*problems)
    step = checkpoint_dir.step_of(request.saved)
    about = {"run": request.job.name, "kind": request.kind, "step": step, "dtype": request.dtype}
    try:
        with draft_of(target) as draft:
            parameters = _write(request, draft)
            files = draft.publish(about)
    except (OSError, SafetensorError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
        raise TrainingError(
            f"the export to {to} cannot be written ({reason}), and nothing was changed there; make room, or "
            "name another folder that can be written with --to"
        ) from error
    sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
    sizes[MARKER] = (target / MARKER).stat().st_size
    return Exported(target, request.kind, step, request.dtype, parameters, sizes)


def _write(request: Request, draft: Draft) -> int:
    """Write all files of an export and return the number of parameters."""
    job, folder = request.job, draft.folder
    config = load_config(job.model)
    base = base_files.base_folder(job.model, getattr(config, "_commit_hash", None))
    is_adapter = request.kind == "adapter"
    base_files.copy_files(base, folder, only_tokenizer=is_adapter)
    _write_tokenizer(job, folder)
    if is_adapter:
        weights = fp32_weights(request.saved, only_trained=True)
        weight_files.require_room(folder, weight_files.bytes_of(weights, request.form), draft.target)
        parameters = write_adapter(job, weights, folder, request.form.dtype, request.base or {})
    else:
        write = _write_merged if request.kind == "merged" else _write_model
        parameters = write(request, config, base, draft)
    step = checkpoint_dir.step_of(request.saved)
    facts = CardFacts(
        job, request.kind, step, request.dtype, parameters, base_files.card_metadata(base),
        *rows_until(request.run, step),
    )  # fmt: skip
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    return parameters


def _write_tokenizer(job: JobSpec, folder: Path) -> None:
    """Let the copied tokenizer_config.json be read by transformers 4 and 5."""
    if not any(folder.glob("*")):  # a tokenizer of files that have no usual names
        load_tokenizer(job.model).save_pretrained(folder)
    file = folder / base_files.TOKENIZER_CONFIG
    settings = base_files.read_json(file)
    if (readable := config_files.tokenizer_config(settings)) != settings:
        base_files.write_json(file, readable)


def _write_model(request: Request, config: Any, base: Path, draft: Draft) -> int:
    weights = weight_files.stored_once(fp32_weights(request.saved))
    weight_files.require_room(draft.folder, weight_files.bytes_of(weights, request.form), draft.target)
    model = _without_memory(request.job, config)
    convert = weight_files.published_names(model)
    parameters = weight_files.write_weights(weights, draft.folder, request.form, convert)
    trained = {**config.to_dict(), **_rows_of_embedding(model, weights)}
    _write_config(request, base, draft.folder, _architecture(config), trained)
    return parameters


def _write_merged(request: Request, config: Any, base: Path, draft: Draft) -> int:
    dtype = request.form.dtype
    weights = fp32_weights(request.saved, only_trained=True)
    write_adapter(request.job, weights, draft.scratch, dtype, request.base or {})
    merged = merged_model(request.job, draft.scratch, dtype)
    whole = weight_files.stored_once(merged.state_dict())
    weight_files.require_room(draft.folder, weight_files.bytes_of(whole, request.form), draft.target)
    convert = weight_files.published_names(merged)
    parameters = weight_files.write_weights(whole, draft.folder, request.form, convert)
    trained = {**config.to_dict(), **_rows_of_embedding(merged, whole)}
    _write_config(request, base, draft.folder, _architecture(config), trained)
    return parameters


def _write_config(
    request: Request, base: Path, folder: Path, architecture: str | None, trained: Mapping[str, Any]
) -> None:
    said = base_files.read_json(base / base_files.CONFIG)
    config = config_files.model_config(said, request.dtype, architecture, trained)
    base_files.write_json(folder / base_files.CONFIG, config)


def _without_memory(job: JobSpec, config: Any) -> Any | None:
    """Return the model without memory for its weights; None where its own code needs real memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=job.model.trust_remote_code)
    except RuntimeError:
        return None


def _rows_of_embedding(model: Any | None, weights: Mapping[str, Any]) -> dict[str, int]:
    """Return the vocabulary that the trained embedding has rows for, where that can be told."""
    if model is None:
        return {}
    embedding = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding]
    found = [weights[f"{name}.weight"] for name in names if f"{name}.weight" in weights]
    return {"vocab_size": int(found[0].shape[0])} if found else {}


def _architecture(config: Any) -> str | None:
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping
    return str(known[type(config)].__name__) if type(config) in known else None


def fp32_weights(saved: Path, only_trained: bool = False) -> dict[str, Any]:
    """Return the weights of a checkpoint by name, each read when its `contiguous` is called.

    Tied weights are one object under several names.

    Args:
        saved: A published checkpoint.
        only_trained: Whether frozen weights were left out of it.

    Raises:
        TrainingError: It is of an earlier version, which did not save all names.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if checkpoint_dir.read_manifest(saved)["zero_stage"] == 0:
        return _unpartitioned_weights(saved)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints how far it is
        lazy: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(saved), tag=checkpoint_dir.SHARDS, exclude_frozen_parameters=only_trained, lazy_mode=True
        )
    return lazy


def _unpartitioned_weights(saved: Path) -> dict[str, Any]:
    """Return the weights that rank 0 wrote under ZeRO-0: those of the optimizer, where it has its own."""
    (file,) = (saved / checkpoint_dir.SHARDS).glob("*model_states.pt")
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    first: dict[int, Any] = {}
    weights = {name: first.setdefault(tensor.data_ptr(), tensor) for name, tensor in state["module"].items()}
    if "fp32_groups" not in state["optimizer"]:
        return weights
    if checkpointer.FP32_NAMES not in state:
        raise TrainingError(
            f"{saved} does not say which of its fp32 weights is which, as an earlier version wrote it; "
            "export it with that version"
        )
    # By name: Muon's weights come in groups of their own, and quantised layers save more than weights.
    exact = (tensor.detach() for group in state["optimizer"]["fp32_groups"] for tensor in group)
    replaced = {
        id(weights[name]): tensor for name, tensor in zip(state[checkpointer.FP32_NAMES], exact, strict=True)
    }
    return {name: replaced.get(id(tensor), tensor) for name, tensor in weights.items()}
