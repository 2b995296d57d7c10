"""Whether token ids fit the embedding of a model, and growing embedding and LM head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from orchestrator.config.paths import resolve
from orchestrator.config.schema import ModelSpec
from orchestrator.errors import SpecError
from orchestrator.model.compatibility import is_positions


def with_tokenizer_rows(config: Any, model: ModelSpec) -> Any:
    """Return a configuration with a row for every token, where model.resize_embeddings asks for that.

    An embedding that is larger than the tokenizer stays as it is.

    Args:
        config: As stored with the model; changed in place.
        model: Names the tokenizer.

    Raises:
        SpecError: There is no tokenizer.
    """
    if not model.resize_embeddings:
        return config
    try:
        text = config.get_text_config()
    except ValueError:  # several parts that read text: refused by `orchestrator.model.compatibility`
        return config
    rows = getattr(text, "vocab_size", None)
    if rows is not None:
        text.vocab_size = max(rows, tokenizer_rows(model))
    return config


def tokenizer_rows(model: ModelSpec) -> int:
    """Return how many rows an embedding needs for every id of the model's tokenizer.

    Raises:
        SpecError: There is no tokenizer.
    """
    return _tokenizer_rows(str(resolve(model.path)), model.path, model.trust_remote_code)


@lru_cache(maxsize=4)
def _tokenizer_rows(path: str, name: str, trust_remote_code: bool) -> int:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # as many classes as there are tokenizers
        reason = " ".join(str(error).split())[:200]
        raise SpecError(
            f"model.path={name} has no tokenizer that can be loaded ({reason}), so the size of its "
            "vocabulary is not known; put its files there, or leave out model.resize_embeddings"
        ) from None
    return max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps, so len() may be less


def vocabulary_problem(model: ModelSpec, config: Any, largest: Mapping[str, int]) -> str | None:
    """Return which token ids of the data the model has no embedding for, with the remedy.

    Args:
        model: As the job has it.
        config: From `orchestrator.model.build.load_config`, so with_tokenizer_rows where the job asks for it.
        largest: Largest token id of each data source; -1 for one without tokens.
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


def embedded_tokens(config: Any) -> int | None:
    """Return how many token ids every table of tokens has a row for; None where none has a known size."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("vocab_size", "vocab_size_per_layer_input")]
    return min((size for size in sizes if isinstance(size, int)), default=None)


def vocabulary_notes(model: ModelSpec, config: Any, stored: Any) -> list[str]:
    """Return what a user should know of the sizes of tokenizer and embedding, in a sentence each.

    Args:
        model: As the job has it.
        config: From `orchestrator.model.build.load_config`, so with_tokenizer_rows where the job asks for it.
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


def resize_problem(built: nn.Module, model: ModelSpec) -> str | None:
    """Return why a model's embedding cannot be with_tokenizer_rows, with the remedy.

    Args:
        built: The causal LM; its weights need no memory.
        model: As the job has it.
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


def _ends(built: Any) -> tuple[Any, Any]:
    return built.get_input_embeddings(), built.get_output_embeddings()


def resize(built: Any, rows: int) -> None:
    """Grow embedding and LM head to so many tokens; each new row is the mean of the old ones.

    Computed in fp32 from weights that every rank sees whole, so that ranks and ZeRO stages agree to the bit.

    Args:
        built: The causal LM with its weights, whole or partitioned by ZeRO-3; the same call on every rank.
        rows: Tokens afterwards; no fewer than there are.
    """
    text = built.config.get_text_config()
    if rows == getattr(text, "vocab_size", rows):
        return
    embedding, head = _ends(built)
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


def _with_rows(old: nn.Parameter, rows: int) -> nn.Parameter:
    with torch.no_grad(), _whole(old):
        added = rows - old.shape[0]
        mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
        values = torch.cat([old.detach(), mean.expand(added, *old.shape[1:])])
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    if hasattr(old, "ds_id"):
        old.convert_to_zero_parameters([new])  # type: ignore[attr-defined]
    return new


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[None]:
    """Let every rank see all of a parameter that ZeRO-3 may have partitioned."""
    from deepspeed import zero

    with zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else nullcontext():
        yield
