"""Dimensions of a decoder-only transformer that memory and FLOPs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.arch.families import FAMILIES, Family, sizes


@dataclass(frozen=True)
class ModelDims:
    """Dimensions of a decoder-only transformer.

    Attributes:
        hidden_size: Hidden size (residual stream), h.
        layers: Number of decoder layers, l.
        heads: Number of query heads.
        kv_heads: Number of key-value heads.
        head_dim: Size of a head, d.
        intermediate_size: Intermediate size of the MLP, i.
        vocab_size: Rows of the embedding and of the LM head, V.
        sliding_window_layers: Number of layers with sliding-window attention.
        window: Sliding window of these layers in tokens, including the query itself; 0 if there are none.
        mlp_matrices: Weight matrices per MLP: 3 if gated (such as SwiGLU), else 2.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    sliding_window_layers: int = 0
    window: int = 0
    mlp_matrices: int = 3

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ModelDims | None:
        """Return the dimensions described by a Hugging Face config.json; None for an unknown family."""
        family = FAMILIES.get(str(config.get("model_type")))
        if family is None:
            return None
        found = sizes(config)
        return cls(
            hidden_size=found.hidden_size,
            layers=found.layers,
            heads=found.heads,
            kv_heads=found.kv_heads,
            head_dim=found.head_dim,
            intermediate_size=found.intermediate_size,
            vocab_size=found.vocab_size,
            mlp_matrices=3 if family.gated else 2,
            **_sliding_window_fields(config, family, found.layers),
        )

    @property
    def linear_parameters_per_layer(self) -> int:
        """Elements of the linear weights of one layer: q, k, v and o projections, and the MLP."""
        # q and o: hidden_size x heads * head_dim each; k and v: hidden_size x kv_heads * head_dim each.
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        return attention + self.mlp_matrices * self.hidden_size * self.intermediate_size


def _sliding_window_fields(config: Mapping[str, Any], family: Family, layers: int) -> dict[str, int]:
    """Return the fields `sliding_window_layers` and `window` of `ModelDims`; empty without such layers."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if not window:
        return {}
    pattern = config.get("sliding_window_pattern") or family.sliding_window_pattern
    if family.sliding_window == "all":
        count = layers
    elif types:
        count = list(types).count("sliding_attention")
    else:
        count = layers - layers // pattern if pattern else 0  # every pattern-th layer has full attention
    return {"sliding_window_layers": count, "window": window} if count else {}
