"""Checks whether an architecture supports packed documents, and the reason if it does not.

Most checks need only the configuration, so they run before any worker starts. Options that layers pass only
in their forward pass are checked by `orchestrator.model.attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from orchestrator.config.schema import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Layer types that mix tokens only by attention, which the document boundaries mask. Other types (SSM, linear
# attention, convolutions) carry state from one document into the next.
_SEPARABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_ANOTHER_MODEL = (
    "use a decoder-only transformer that is part of transformers, such as Llama, Mistral, Qwen, Gemma or Phi"
)


def config_unsupported_reason(config: PretrainedConfig) -> str | None:
    """Return why a model with this configuration cannot be trained, with the remedy; None if it can."""
    if _is_composite(config):
        return (
            f"is a model of more than text (model_type={config.model_type}); use a text-only model, such as "
            "one of model_type gemma3_text instead of gemma3"
        )
    mixing = set(getattr(config, "layer_types", None) or ()) - _SEPARABLE_LAYERS
    if mixing:
        kinds = ", ".join(sorted(mixing))
        return (
            f"has layers of kind {kinds}, which carry a state from one packed document into the next; "
            f"{_ANOTHER_MODEL}"
        )
    for name, wrong in (("use_bidirectional_attention", True), ("is_causal", False)):
        if getattr(config, name, not wrong) == wrong:
            return f"lets tokens see what follows them ({name}={wrong}); {_ANOTHER_MODEL}"
    if getattr(config, "attn_temperature_tuning", False):
        return (
            "scales attention by a token's place in the pack and not in its document "
            f"(attn_temperature_tuning); {_ANOTHER_MODEL}"
        )
    return None


def _is_composite(config: PretrainedConfig) -> bool:
    """Tell whether a model has vision or audio parts, or consists of several text models."""
    if any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config")):
        return True
    try:
        return config.get_text_config() is not config
    except ValueError:  # several text configurations, as in encoder-decoder models
        return True


def model_unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return why a model cannot separate packed documents or compute their loss, with the remedy; else None.

    Args:
        model: A causal LM of transformers; it may be on the meta device.
    """
    if reason := config_unsupported_reason(model.config):
        return reason
    if not model._supports_attention_backend:
        reason = "does not let its attention be replaced, so packed documents would see each other"
    elif "logits_to_keep" not in inspect.signature(model.forward).parameters:
        reason = "cannot compute logits at chosen positions"
    elif any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        reason = "has attention sinks, which are not computed here"
    elif any(getattr(module, "is_causal", True) is False for module in model.modules()):
        reason = "has attention that is not causal, so tokens would see what follows them"
    return f"{reason}; {_ANOTHER_MODEL}" if reason else None


def muon_unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return why DeepSpeed would apply Muon to wrong weights of a model, with the remedy; else None.

    DeepSpeed applies Muon to every weight with two or more dimensions whose name contains neither `embed`
    nor `lm_head`. Muon is meant for the two-dimensional weights of layers, so embeddings or heads with other
    names and weights of three dimensions (such as fused experts) are a problem.
    """
    # Compare by identity: the names of embedding and head differ between architectures.
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
    outside = {id(weight) for module in ends for weight in module.parameters()}
    for name, weight in model.named_parameters():
        spared = any(keyword in name.lower() for keyword in ("embed", "lm_head"))
        if weight.ndim >= 2 and not spared and (id(weight) in outside or weight.ndim > 2):
            return (
                f"has the weight {name}, to which DeepSpeed would apply Muon although it is not a matrix "
                "inside "
                "a layer; use optim.optimizer: adamw"
            )
    return None


def length_problem(config: PretrainedConfig, max_length: int) -> str | None:
    """Return why documents of up to `max_length` tokens cannot be packed with this model, with the remedy.

    Two causes: chunked attention (Llama 4) is not implemented; and RoPE types `dynamic` and `longrope` scale
    frequencies by the longest sequence of a row, so a long document would change others in its pack.
    """
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < max_length:
        return (
            f"attends within chunks of {chunk} tokens (attention_chunk_size), which is not computed here; "
            f"use data.max_length of at most {chunk}"
        )
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in ("dynamic", "longrope"):
            continue
        key = "original_max_position_embeddings" if kind == "longrope" else "max_position_embeddings"
        limit = rope.get(key) or getattr(config, key, None) or config.max_position_embeddings
        if limit < max_length:
            return (
                f"has position embeddings of type {kind}: a document longer than {key}={limit} would change "
                f"those of the others in its pack; use data.max_length of at most {limit}"
            )
    return None


def _rope_parameters(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """Return the RoPE parameters of a configuration; some models have one set per layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, Mapping)]
    return nested or [parameters]


def position_problem(built: nn.Module, max_length: int) -> str | None:
    """Return which learned position embedding is shorter than `max_length`, with the remedy; else None.

    Args:
        built: The causal LM; it may be on the meta device.
        max_length: Maximum tokens of a document.
    """
    for name, module in built.named_modules():
        if isinstance(module, nn.Embedding) and is_positions(name):
            # OPT reserves the first `offset` rows of its table, so fewer positions are usable.
            limit = module.num_embeddings - int(getattr(module, "offset", 0) or 0)
            if limit < max_length:
                return (
                    f"has learnt embeddings of {limit} positions ({name}), and a document may have "
                    f"data.max_length={max_length}; use data.max_length of at most {limit}"
                )
    return None


def is_positions(name: str) -> bool:
    """Tell from a module's name whether it is a position embedding rather than a token embedding."""
    last = name.rpartition(".")[2]
    return last == "wpe" or "position" in last


def length_note(config: PretrainedConfig, max_length: int) -> str | None:
    """Return a warning if `max_length` exceeds `max_position_embeddings` of a model with RoPE, else None.

    Args:
        config: The model's configuration.
        max_length: Maximum tokens of a document.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    is_rotary = any(getattr(text, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    if not is_rotary or not isinstance(limit, int) or limit <= 0 or max_length <= limit:
        return None
    return (
        f"warning: data.max_length={max_length} is above max_position_embeddings={limit} of the model, "
        "which may not have seen such distances; longer documents are still trained"
    )


_BALANCE = ("router_aux_loss_coef", "aux_loss_coef")


def balance_note(config: PretrainedConfig, path: str) -> str | None:
    """Return a warning if the configuration enables the MoE load-balancing loss, which is not computed.

    transformers adds this loss if `output_router_logits` is true.

    Args:
        config: The model's configuration.
        path: model.path of the job.
    """
    text = config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return None
    for name in _BALANCE:
        weight = getattr(text, name, None)
        if weight:
            return (
                f"warning: model.path={path} asks for a balance loss of its experts (output_router_logits is "
                f"true and {name}={weight:g}), which is not computed here; the loss is that of tokens alone"
            )
    return None


def model_notes(model: ModelSpec, config: PretrainedConfig, max_length: int) -> Sequence[str]:
    """Return warnings about a model to show at the start of a run, one sentence each."""
    found = (length_note(config, max_length), balance_note(config, model.path))
    return [note for note in found if note is not None]
