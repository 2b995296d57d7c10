"""The shape of a decoder-only transformer: the few integers that memory and FLOPs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Families whose layers hold q, k, v, o and three MLP matrices, and nothing else that is a matrix.
_GATED = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "granite",
        "smollm3",
    }
)


# Of these, the families that apply `sliding_window` to every layer; the others name each layer's type.
_ALL_LAYERS_WINDOWED = frozenset({"mistral", "phi3"})


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a gated (SwiGLU-type) decoder.

    Attributes:
        hidden_size: Width of the residual stream, h.
        layers: Number of decoder layers, l.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head, d.
        intermediate_size: Width of the MLP, i.
        vocab_size: Rows of the embedding and of the LM head, V.
        windowed_layers: Layers whose tokens see `window` tokens only.
        window: Tokens that a token of such a layer sees, itself included; 0 where there is none.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    windowed_layers: int = 0
    window: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape | None:
        """Return the shape that a Hugging Face config.json describes; None for a family that is not known."""
        if config.get("model_type") not in _GATED:
            return None
        heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            **_windows(config),
        )

    @property
    def linear_parameters_per_layer(self) -> int:
        """Weights of one layer's matrices: q and o, k and v, and three of the MLP."""
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size


def _windows(config: Mapping[str, Any]) -> dict[str, int]:
    """Return how many layers have a sliding window, and its size, in the form of the fields."""
    window = config.get("sliding_window")
    if not window:
        return {}
    if config["model_type"] in _ALL_LAYERS_WINDOWED:
        count = config["num_hidden_layers"]
    else:
        count = list(config.get("layer_types") or ()).count("sliding_attention")
    return {"windowed_layers": count, "window": window} if count else {}
