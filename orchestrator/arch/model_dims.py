"""The shape of a decoder-only transformer: the few integers that memory and FLOPs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.arch.families import FAMILIES, Family, sizes


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a decoder.

    Attributes:
        hidden_size: Width of the residual stream, h.
        layers: Number of decoder layers, l.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head, d.
        intermediate_size: Width of the MLP, i.
        vocab_size: Rows of the embedding and of the LM head, V.
        sliding_window_layers: Layers whose tokens see `window` tokens only.
        window: Tokens that a token of such a layer sees, itself included; 0 where there is none.
        mlp_matrices: Matrices of an MLP: three where it is gated (SwiGLU and its like), else two.
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
    def from_config(cls, config: Mapping[str, Any]) -> ModelDims | None:
        """Return the shape that a Hugging Face config.json describes; None for a family that is not known."""
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
        """Weights of one layer's matrices: q and o, k and v, and those of the MLP."""
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        return attention + self.mlp_matrices * self.hidden_size * self.intermediate_size


def _sliding_window_fields(config: Mapping[str, Any], family: Family, layers: int) -> dict[str, int]:
    """Return how many layers have a sliding window, and its size, in the form of the fields."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if not window:
        return {}
    pattern = config.get("sliding_window_pattern") or family.sliding_window_pattern
    if family.sliding_window == "all":
        count = layers
    elif types:
        count = list(types).count("sliding_attention")
    else:
        count = layers - layers // pattern if pattern else 0
    return {"sliding_window_layers": count, "window": window} if count else {}
