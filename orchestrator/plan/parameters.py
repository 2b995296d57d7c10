"""Counting a model's parameters from its config.json alone, for whoever cannot build the model.

Matrices and norms are counted; biases are left out: they are a few in ten thousand. The driver counts
exactly, by building the model without memory (`orchestrator.model.build.require_supported`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.plan.host_memory import ParameterCount
from orchestrator.plan.shape import ModelShape
from orchestrator.spec import MethodSpec

# Families that tie LM head and embedding where their configuration does not say.
_TIED = frozenset({"gemma", "gemma2", "gemma3_text", "smollm3"})
_NORMS_PER_LAYER = {"gemma2": 4, "gemma3_text": 4}
_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"})


def parameter_count(config: Mapping[str, Any], method: MethodSpec) -> ParameterCount | None:
    """Return how many parameters a model has, with its adapters.

    Args:
        config: Its config.json.
        method: Which of them are trained.

    Returns:
        The count; None for a family whose layers are not known.
    """
    shape = ModelShape.from_config(config)
    if shape is None:
        return None
    family = str(config["model_type"])
    tied = config.get("tie_word_embeddings")
    embedding = shape.vocab_size * shape.hidden_size
    ends = embedding if (family in _TIED if tied is None else tied) else 2 * embedding
    norms = (_NORMS_PER_LAYER.get(family, 2) * shape.layers + 1) * shape.hidden_size
    base = ends + shape.layers * shape.linear_parameters_per_layer + norms
    linears = _linears(shape, fused=family == "phi3")
    largest = max(embedding, *(inputs * outputs for inputs, outputs in linears.values()))
    if method.type == "full":
        return ParameterCount(base, base, largest)
    added = shape.layers * sum(
        method.rank * (inputs + outputs) + (outputs if method.use_dora else 0)
        for inputs, outputs in _targets(linears, method).values()
    )
    copies = ends if method.train_embeddings else 0
    return ParameterCount(base + added + copies, added + copies, largest)


def _linears(shape: ModelShape, fused: bool) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of a layer's linear modules."""
    h, i = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    common = {"o_proj": (queries, h), "down_proj": (i, h)}
    if fused:
        return {"qkv_proj": (h, queries + 2 * keys), "gate_up_proj": (h, 2 * i), **common}
    apart = {"q_proj": (h, queries), "k_proj": (h, keys), "v_proj": (h, keys)}
    return {**apart, "gate_proj": (h, i), "up_proj": (h, i), **common}


def _targets(linears: Mapping[str, tuple[int, int]], method: MethodSpec) -> Mapping[str, tuple[int, int]]:
    if method.targets == "all-linear":
        return linears
    wanted = _ATTENTION if method.targets == "attention" else frozenset(method.targets)
    # A name that is not known here may stand for any of them: rather too much memory than too little.
    found = {name: size for name, size in linears.items() if name in wanted}
    return found if method.targets == "attention" or wanted <= set(linears) else linears
