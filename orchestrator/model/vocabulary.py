"""Check token ids against the embedding of a model, and resize embedding and LM head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from orchestrator.config.paths import resolve
from orchestrator.config.schema import ModelSpec
from orchestrator.errors import SpecError
from orchestrator.model.compatibility import is_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def with_tokenizer_rows(config: PretrainedConfig, model: ModelSpec) -> PretrainedConfig:
    """Raise `vocab_size` to the tokenizer's size if model.resize_embeddings is set; return the configuration.

    An embedding that is larger than the tokenizer is not shrunk.

    Args:
        config: As stored with the model; changed in place.
        model: Names the tokenizer.

    Raises:
        SpecError: The tokenizer cannot be loaded.
    """
    if not model.resize_embeddings:
        return config
    try:
        text = config.get_text_config()
    except ValueError:  # several text configurations: rejected by `orchestrator.model.compatibility`
        return config
    rows = getattr(text, "vocab_size", None)
    if rows is not None:
        text.vocab_size = max(rows, tokenizer_rows(model))
    return config


def tokenizer_rows(model: ModelSpec) -> int:
    """Return the number of embedding rows that the tokenizer needs, with `model.new_special_tokens`.

    Raises:
        SpecError: The tokenizer cannot be loaded.
    """
    path = str(resolve(model.path))
    return _tokenizer_rows(path, model.path, model.trust_remote_code, model.new_special_tokens)


@lru_cache(maxsize=4)
def _tokenizer_rows(path: str, name: str, trust_remote_code: bool, new_tokens: tuple[str, ...]) -> int:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise errors of many classes
        reason = " ".join(str(error).split())[:200]
        raise SpecError(
            f"model.path={name} has no tokenizer that can be loaded ({reason}), so the size of its "
            "vocabulary is not known; put its files there, or leave out model.resize_embeddings"
        ) from None
    tokenizer.add_tokens([token for token in new_tokens if token not in tokenizer.get_vocab()])
    return max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps, so len() may be less


def vocabulary_problem(model: ModelSpec, config: PretrainedConfig, largest: Mapping[str, int]) -> str | None:
    """Return which token ids of the data exceed the embedding, with the remedy; None if all fit.

    Args:
        model: The model section of the job.
        config: From `orchestrator.model.build.load_config`, which applies model.resize_embeddings.
        largest: Largest token id of each data source; -1 for a source without tokens.
    """
    rows = embedded_tokens(config)
    beyond = {path: token for path, token in largest.items() if rows is not None and token >= rows}
    if not beyond:
        return None
    path, token = max(beyond.items(), key=lambda item: item[1])
    sources = path + (f" and {len(beyond) - 1} more sources" if len(beyond) > 1 else "")
    reason = f"embeds {rows} tokens, and ids in the data reach {token} ({sources})"
    known = tokenizer_rows(model)
    if token >= known:
        return (
            f"{reason}, which its tokenizer of {known} tokens does not have either; tokenise these rows with "
            "the model's own tokenizer"
        )
    return (
        f"{reason}, as its tokenizer of {known} tokens does; set model.resize_embeddings: true, or use data "
        "without those tokens"
    )


def embedded_tokens(config: PretrainedConfig) -> int | None:
    """Return the smallest row count among the token embedding tables; None if none states its size.

    Some models have a second table for per-layer inputs (`vocab_size_per_layer_input`).
    """
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("vocab_size", "vocab_size_per_layer_input")]
    return min((size for size in sizes if isinstance(size, int)), default=None)


def vocabulary_notes(model: ModelSpec, config: PretrainedConfig, stored: PretrainedConfig) -> list[str]:
    """Return messages about the sizes of tokenizer and embedding to show at the start of a run.

    Args:
        model: The model section of the job.
        config: From `orchestrator.model.build.load_config`, which applies model.resize_embeddings.
        stored: From `orchestrator.model.build.stored_config`.
    """
    rows, stored_rows = embedded_tokens(config), embedded_tokens(stored)
    if rows is None or stored_rows is None:
        return []
    if model.resize_embeddings:
        if rows == stored_rows:
            return [f"model.resize_embeddings: nothing to add, the {rows} rows of the embedding are enough"]
        return [
            f"model.resize_embeddings: embedding and head grow from {stored_rows} to {rows} tokens; each "
            "new row starts as the mean of the others"
        ]
    known = tokenizer_rows(model)
    if known <= rows:
        return []
    return [
        f"the tokenizer of model.path={model.path} has {known} tokens and the model embeds {rows}; the "
        "data use none of the others, so it is trained as it is"
    ]


def resize_problem(built: PreTrainedModel, model: ModelSpec) -> str | None:
    """Return why a model's embedding cannot be resized, with the remedy; None if it can.

    Args:
        built: The causal LM; it may be on the meta device.
        model: The model section of the job.
    """
    if not model.resize_embeddings:
        return None
    embedding, head = _ends(built)
    tables = [
        name
        for name, module in built.named_modules()
        if isinstance(module, nn.Embedding) and module is not embedding and not is_positions(name)
    ]
    unknown = [type(module).__name__ for module in (embedding, head) if not isinstance(module, _KNOWN)]
    if tables or unknown:
        reason = f"has further tables of tokens ({', '.join(tables)})" if tables else f"ends in {unknown[0]}"
        return (
            f"{reason}, so model.resize_embeddings=true cannot grow it; leave that out, and resize "
            "and save the model beforehand"
        )
    return None


_KNOWN = (nn.Embedding, nn.Linear)


def _ends(built: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return built.get_input_embeddings(), built.get_output_embeddings()


def resize(built: PreTrainedModel, rows: int) -> None:
    """Resize embedding and LM head to `rows` tokens; every new row is the mean of the old rows.

    The mean is computed in fp32 from the gathered weights, so it is bitwise equal on all ranks and for all
    ZeRO stages. A collective call under ZeRO-3: every rank must make it.

    Args:
        built: The causal LM with its weights, which ZeRO-3 may have partitioned; changed in place.
        rows: New number of tokens; at least the current number.
    """
    text = built.config.get_text_config()
    if rows == getattr(text, "vocab_size", rows):
        return
    embedding, head = cast("tuple[nn.Embedding, nn.Linear]", _ends(built))  # `resize_problem` rejects others
    is_tied = head.weight is embedding.weight
    embedding.weight = _with_rows(embedding.weight, rows)
    embedding.num_embeddings = rows
    head.weight = embedding.weight if is_tied else _with_rows(head.weight, rows)
    if getattr(head, "bias", None) is not None:
        head.bias = _with_rows(head.bias, rows)
    head.out_features = rows
    text.vocab_size = rows
    if hasattr(built, "vocab_size"):
        built.vocab_size = rows


def _with_rows(old: Tensor, rows: int) -> nn.Parameter:
    with torch.no_grad(), _whole(old):
        added = rows - old.shape[0]
        mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
        # old: [vocab_size, hidden], or [vocab_size] for a bias; mean: [1, hidden] or [1].
        values = torch.cat([old.detach(), mean.expand(added, *old.shape[1:])])
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    if hasattr(old, "ds_id"):  # set by deepspeed.zero.Init: partition the new parameter in the same way
        old.convert_to_zero_parameters([new])  # type: ignore[attr-defined]
    return new


@contextmanager
def _whole(parameter: Tensor) -> Iterator[None]:
    """Gather a parameter on every rank inside the block, if ZeRO-3 has partitioned it."""
    from deepspeed import zero

    with zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else nullcontext():
        yield
