"""Model families: the projections, biases and norms of a decoder layer, and the config.json keys for them.

Each entry follows the family's modeling code in transformers 5.23, or, for `qwen`, `baichuan`, `chatglm`,
`internlm` and `internlm2`, the modeling file published with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Flag = bool | str | tuple[str, bool]
"""Present or absent (bool), or set by a key of config.json, optionally with its default."""


@dataclass(frozen=True)
class Family:
    """Projections, biases and norms of the layers of one `model_type`.

    Attributes:
        qkv: Module names of the query, key and value projections; one name if they are fused.
        attention_out: Module name of the attention output projection.
        mlp_in: Module names of the MLP's input projections; one name if gate and up are fused.
        mlp_out: Module name of the MLP's output projection.
        gated: Whether the MLP is gated (SwiGLU and similar), with two input projections.
        qkv_bias: Biases of the query, key and value projections.
        out_bias: Bias of the attention output projection.
        mlp_bias: Biases of the MLP.
        head_bias: Bias of the LM head.
        norms: Norms per layer over the hidden size.
        norm_vectors: Parameter vectors per norm: 1 weight, 2 weight and bias, 0 none.
        qk_norm: Norms of queries and keys: `head` of size head_dim, `width` over all heads.
        qk_norm_flag: Whether the model has them.
        embedding_norm: Whether a norm follows the embedding.
        tied: Default of `tie_word_embeddings`.
        sliding_window: `all` if `sliding_window` applies to every layer, `some` if `layer_types` decides.
        sliding_window_pattern: Without `layer_types`, every n-th layer attends fully; 0 for no such pattern.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_out: str = "o_proj"
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_out: str = "down_proj"
    gated: bool = True
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    head_bias: Flag = False
    norms: int = 2
    norm_vectors: int = 1
    qk_norm: Literal["none", "head", "width"] = "none"
    qk_norm_flag: Flag = True
    embedding_norm: bool = False
    tied: bool = False
    sliding_window: Literal["all", "some"] = "some"
    sliding_window_pattern: int = 0


_Fields = dict[str, Any]  # fields of `Family` as keyword arguments
_FUSED: _Fields = {
    "qkv": ("query_key_value",),
    "attention_out": "dense",
    "mlp_in": ("dense_h_to_4h",),
    "mlp_out": "dense_4h_to_h",
}
_BIASED: _Fields = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_vectors": 2}
_ASKED: _Fields = {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_ATTENTION: _Fields = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_PLAIN: _Fields = {"mlp_in": ("up_proj",), "gated": False}

FAMILIES: Mapping[str, Family] = {
    "arcee": Family(**_PLAIN, **_ASKED),
    "baichuan": Family(qkv=("W_pack",)),
    "bloom": Family(**_FUSED, **_BIASED, gated=False, embedding_norm=True, tied=True),
    "chatglm": Family(
        **_FUSED, qkv_bias="add_qkv_bias", out_bias="add_bias_linear", mlp_bias="add_bias_linear"
    ),
    "cohere": Family(**_ATTENTION, norms=1, qk_norm="width", qk_norm_flag="use_qk_norm", tied=True),
    "gemma": Family(**_ATTENTION, tied=True),
    "gemma2": Family(**_ATTENTION, norms=4, tied=True, sliding_window_pattern=2),
    "gemma3_text": Family(**_ATTENTION, norms=4, qk_norm="head", tied=True, sliding_window_pattern=6),
    "glm": Family(mlp_in=("gate_up_proj",), qkv_bias=("attention_bias", True)),
    "glm4": Family(mlp_in=("gate_up_proj",), qkv_bias=("attention_bias", True), norms=4),
    "gpt_neox": Family(
        **_FUSED,
        gated=False,
        qkv_bias=("attention_bias", True),
        out_bias=("attention_bias", True),
        mlp_bias=True,
        norm_vectors=2,
    ),
    "granite": Family(**_ASKED),
    "internlm": Family(qkv_bias=("bias", True), out_bias=("bias", True)),
    "internlm2": Family(
        qkv=("wqkv",), attention_out="wo", mlp_in=("w1", "w3"), mlp_out="w2", qkv_bias="bias", out_bias="bias"
    ),
    "llama": Family(**_ASKED),
    "mistral": Family(sliding_window="all"),
    "nemotron": Family(**_PLAIN, **_ASKED, norm_vectors=2),
    "olmo": Family(**_ATTENTION, norm_vectors=0),
    "olmo2": Family(**_ATTENTION, qk_norm="width"),
    "phi": Family(
        attention_out="dense", mlp_in=("fc1",), mlp_out="fc2", gated=False, **_BIASED, head_bias=True,
        norms=1, qk_norm="head", qk_norm_flag="qk_layernorm",
    ),
    "phi3": Family(qkv=("qkv_proj",), mlp_in=("gate_up_proj",), sliding_window="all"),
    "qwen": Family(
        qkv=("c_attn",), attention_out="c_proj", mlp_in=("w1", "w2"), mlp_out="c_proj", qkv_bias=True
    ),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(**_ATTENTION, qk_norm="head"),
    "seed_oss": Family(
        qkv_bias=("attention_bias", True), out_bias="attention_out_bias", mlp_bias="mlp_bias"
    ),
    "smollm3": Family(**_ASKED, tied=True),
    "stablelm": Family(qkv_bias="use_qkv_bias", norm_vectors=2, qk_norm="width", qk_norm_flag="qk_layernorm"),
    "starcoder2": Family(
        mlp_in=("c_fc",),
        mlp_out="c_proj",
        gated=False,
        qkv_bias=("use_bias", True),
        out_bias=("use_bias", True),
        mlp_bias=("use_bias", True),
        norm_vectors=2,
        tied=True,
        sliding_window="all",
    ),
}  # fmt: skip


def is_set(flag: Flag, config: Mapping[str, object]) -> bool:
    """Return the value of a flag for a configuration."""
    if isinstance(flag, bool):
        return flag
    key, default = (flag, False) if isinstance(flag, str) else flag
    value = config.get(key)
    return default if value is None else bool(value)


def is_tied(config: Mapping[str, object]) -> bool:
    """Return whether LM head and embedding share a weight; the family must be known."""
    value = config.get("tie_word_embeddings")
    return FAMILIES[str(config["model_type"])].tied if value is None else bool(value)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, normalized from the key names of each family's config.json."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


def sizes(config: Mapping[str, Any]) -> Sizes:
    """Return the sizes from the config.json of a known family.

    Raises:
        KeyError: A required key is missing; carries its name.
    """
    family = config["model_type"]
    hidden, heads = (
        config.get(name) or config.get(other) or config[name]
        for name, other in (("hidden_size", "n_embed"), ("num_attention_heads", "n_head"))
    )
    if family == "chatglm":
        kv_heads = config["multi_query_group_num"] if config.get("multi_query_attention") else heads
        return Sizes(
            hidden, config["num_layers"], heads, kv_heads, config["kv_channels"], config["ffn_hidden_size"],
            config["padded_vocab_size"],
        )  # fmt: skip
    if family == "bloom":
        layers = config.get("num_hidden_layers") or config["n_layer"]
        return Sizes(hidden, layers, heads, heads, hidden // heads, 4 * hidden, config["vocab_size"])
    # intermediate_size of the first Qwen counts the gate and up projections together.
    inner = config["intermediate_size"] // (2 if family == "qwen" else 1)
    grouped = family != "gpt_neox" and config.get("num_key_value_heads")
    wide = family not in ("gpt_neox", "stablelm") and config.get("head_dim")
    return Sizes(
        hidden_size=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=grouped or heads,
        head_dim=wide or hidden // heads,
        intermediate_size=inner,
        vocab_size=config["vocab_size"],
    )
