"""Check that weight files hold exactly the tensors of the architecture, by reading only their headers.

`from_pretrained` initializes missing weights at random, ignores unexpected ones, and only logs both. Here
either is an error. The comparison uses transformers itself: it builds the model on the meta device and loads
meta tensors with the names and shapes from the file headers, so that key renaming, merging of expert weights
and tied weights are handled as in real loading.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from safetensors import safe_open
from torch import distributed as dist

from orchestrator.config.schema import ModelSpec
from orchestrator.model.stored_weights import (
    COPY_AGAIN,
    Shapes,
    UnreadableError,
    shapes_in,
    some_of,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
_LOADERS = ("transformers.modeling_utils", "transformers.core_model_loading")


class LoadingInfo(TypedDict):
    """The used part of the loading info of `from_pretrained(..., output_loading_info=True)`.

    `mismatched_keys` has the name of a tensor, its shape in the files, and its shape in the model.
    """

    missing_keys: Iterable[str]
    unexpected_keys: Iterable[str]
    mismatched_keys: Iterable[tuple[str, torch.Size, torch.Size]]


@dataclass(frozen=True)
class WeightsMismatch:
    """Differences between the tensors in a model's files and those of its architecture.

    Attributes:
        missing: Tensors of the architecture that no file holds, except tied weights.
        unexpected: Tensors of the files that the architecture does not have.
        reshaped: Tensors with different shapes: (name, shape in the files, shape in the architecture).
        unjoined: Tensors that transformers merges from several stored ones (such as experts), where one of
            these is missing or has a different shape.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    unjoined: tuple[str, ...] = ()

    @classmethod
    def of(cls, loading_info: LoadingInfo) -> WeightsMismatch:
        """Build it from the loading info of `from_pretrained(..., output_loading_info=True)`."""
        reshaped = [(name, tuple(found), tuple(own)) for name, found, own in loading_info["mismatched_keys"]]
        return cls(
            missing=tuple(sorted(loading_info["missing_keys"])),
            unexpected=tuple(sorted(loading_info["unexpected_keys"])),
            reshaped=tuple(sorted(reshaped)),
        )

    @classmethod
    def between(cls, stored: Mapping[str, torch.Size], own: Mapping[str, torch.Size]) -> WeightsMismatch:
        """Compare the shapes of stored tensors with those of a model, both by name."""
        shared = sorted(stored.keys() & own.keys())
        return cls(
            missing=tuple(sorted(own.keys() - stored.keys())),
            unexpected=tuple(sorted(stored.keys() - own.keys())),
            reshaped=tuple((n, tuple(stored[n]), tuple(own[n])) for n in shared if stored[n] != own[n]),
        )

    def explain(self, architecture: str) -> str:
        """Return a clause that describes the mismatch; its subject is the stored model or adapter."""
        parts = []
        if names := self.missing:
            parts.append(f"lacks {len(names)} of the tensors of {architecture} ({some_of(names)})")
        if names := self.unexpected:
            parts.append(f"has {_count(names)} that {architecture} has no place for ({some_of(names)})")
        if self.reshaped:
            texts = [f"{name} is {list(found)} and not {list(own)}" for name, found, own in self.reshaped]
            parts.append(f"has {_count(texts)} of another shape than {architecture} ({some_of(texts)})")
        if names := self.unjoined:
            parts.append(
                f"has {_count(names)} of {architecture} that cannot be joined from those in its files, since "
                f"one is missing or of another shape ({some_of(names)})"
            )
        return ", and ".join(parts)


def weights_problem(
    model: ModelSpec, bare: PreTrainedModel, config: PretrainedConfig, download: bool
) -> str | None:
    """Return why the files of `model.path` do not match its architecture, with the remedy; None if they do.

    Must not be called while an `HfDeepSpeedConfig` exists: transformers would then build the model with
    `deepspeed.zero.Init` instead of on the meta device.

    Args:
        model: Names the folder or hub model.
        bare: The causal LM on the meta device; only its class is used.
        config: The configuration as stored with the weights.
        download: Whether files of a hub model may be downloaded; if False, only cached files are checked.
    """
    try:
        files = weight_files(model, config, download)
        if files is None:
            return None
        stored: Shapes = {}
        for file in files:
            stored.update(shapes_in(file))
    except UnreadableError as error:
        return str(error)
    if getattr(config, "quantization_config", None) is not None:
        return None  # only the quantization package knows its tensor names; checked after loading instead
    return mismatch_problem(_compare(type(bare), config, stored), type(bare).__name__, config)


def load_with_info(
    from_pretrained: Callable[..., object], path: str | None, **options: object
) -> tuple[PreTrainedModel, LoadingInfo]:
    """Call `from_pretrained` of a model class, and return the model and its loading info."""
    # It is annotated to return the model alone, whatever `output_loading_info` says.
    loaded = from_pretrained(path, output_loading_info=True, **options)
    return cast("tuple[PreTrainedModel, LoadingInfo]", loaded)


def _compare(
    architecture: type[PreTrainedModel], config: PretrainedConfig, stored: Shapes
) -> WeightsMismatch | None:
    """Load tensors of the stored shapes into a model, all on the meta device; None if that is unsupported."""
    # The dtype is arbitrary: only names and shapes are compared.
    empty = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in stored.items()}
    with _captured() as said:
        try:
            _, info = load_with_info(
                architecture.from_pretrained,
                None,
                config=config,
                state_dict=empty,
                ignore_mismatched_sizes=True,
                device_map={"": "meta"},
                dtype=torch.bfloat16,
            )
        except Exception:  # remote code may not run on the meta device; the real loading checks it
            unjoined = sorted({name for line in said for name in _unjoined(line)})
            return WeightsMismatch(unjoined=tuple(unjoined)) if unjoined else None
    return WeightsMismatch.of(info)


def _unjoined(report: str) -> list[str]:
    """Return the tensors whose conversion failed, parsed from the table that transformers logs."""
    # Remove ANSI colors; a row is "name | CONVERSION | ...".
    plain = re.sub(r"\x1b\[[0-9;]*m", "", report)
    return re.findall(r"^(\S.*?) +\| CONVERSION", plain, flags=re.MULTILINE)


@contextmanager
def _captured() -> Iterator[list[str]]:
    """Capture the log messages of transformers' loaders inside the block, and hide progress bars."""
    from transformers.utils import logging as loud

    said: list[str] = []

    # A filter that returns False drops the record for every handler of the logger.
    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    loggers = [logging.getLogger(name) for name in _LOADERS]
    bars = loud.is_progress_bar_enabled()
    loud.disable_progress_bar()
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
        if bars:
            loud.enable_progress_bar()


def mismatch_problem(
    mismatch: WeightsMismatch | None, architecture: str, config: PretrainedConfig
) -> str | None:
    """Return a description of a mismatch with names, counts and the remedy; None if there is no mismatch."""
    if mismatch is None or mismatch == WeightsMismatch():
        return None
    return f"{mismatch.explain(architecture)}; {_remedy(mismatch, config)}"


def without_empty_biases(mismatch: WeightsMismatch, files: Sequence[Path]) -> WeightsMismatch:
    """Remove all-zero biases of quantized linear layers from the unexpected tensors of a mismatch.

    AutoGPTQ stores a bias for every linear layer, even if the architecture has none; zeros have no effect.

    Args:
        mismatch: The mismatch of a GPTQ checkpoint.
        files: Its weight files, in safetensors format.
    """
    biases = {name for name in mismatch.unexpected if name.endswith(".bias")}
    empty: set[str] = set()
    for file in files if biases else ():
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            with_weights = {name for name in biases & names if f"{name.removesuffix('bias')}qweight" in names}
            empty |= {name for name in with_weights if not opened.get_tensor(name).any()}
    return replace(mismatch, unexpected=tuple(n for n in mismatch.unexpected if n not in empty))


def _remedy(mismatch: WeightsMismatch, config: PretrainedConfig) -> str:
    prefix = _prefix(mismatch)
    if prefix:
        return (
            f"its names begin with {prefix} as those of a wrapped model do, so save the model itself (with "
            "peft: merge_and_unload() first) and name that folder"
        )
    if mismatch.missing == ("lm_head.weight",) and not mismatch.unexpected and not mismatch.reshaped:
        return (
            "tie_word_embeddings is false in its config.json, so the head has to be in a file; copy the "
            "model again, or set tie_word_embeddings: true if the head is the embedding"
        )
    if mismatch.reshaped and not mismatch.missing and not mismatch.unexpected:
        return "put the config.json of these weights in their folder, or name the model that it belongs to"
    if mismatch.unexpected and not mismatch.missing and not mismatch.reshaped:
        return (
            "put the config.json of these weights in their folder, or save the causal LM alone, without "
            "heads "
            "and towers of other tasks, and name that folder"
        )
    layers = getattr(config, "num_hidden_layers", None)
    described = f"{config.model_type}, num_hidden_layers={layers}" if layers else config.model_type
    return f"{COPY_AGAIN}, or name the model that its config.json ({described}) describes"


def _prefix(mismatch: WeightsMismatch) -> str:
    """Return the prefix of all unexpected names, if removing it gives the missing names; else "".

    Wrappers cause this, such as `base_model.model.` of peft or `module.` of DDP.
    """
    # The first unexpected name suffices: the prefix must be common to all of them.
    for name in mismatch.unexpected[:1]:
        for own in mismatch.missing:
            prefix = name.removesuffix(own)
            if prefix and prefix != name:
                bare = {each.removeprefix(prefix) for each in mismatch.unexpected}
                if all(each.startswith(prefix) for each in mismatch.unexpected) and bare >= set(
                    mismatch.missing
                ):
                    return prefix
    return ""


def _count(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def first_problem_of_ranks(problem: str | None) -> str | None:
    """Return the first problem found by any rank, on every rank.

    A collective call: if only one rank raised an error, the others would wait in their next collective.
    """
    if not dist.is_available() or not dist.is_initialized():
        return problem
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next((each for each in found if each is not None), None)
