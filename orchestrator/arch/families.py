"""Families of decoders: which matrices, biases and norms a layer holds, and how config.json says so.

Each entry was read from the family's model code: in transformers 5.23, or for `qwen`, `baichuan`, `chatglm`,
`internlm` and `internlm2`, which are not part of it, in the modelling file beside the published weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Flag = bool | str | tuple[str, bool]
"""Whether something is there: always or never, or where a key of config.json is true, with its default."""


@dataclass(frozen=True)
class Family:
    """What the layers of one `model_type` are made of.

    Attributes:
        queries: Names of the matrices of queries, keys and values; one name where they are one matrix.
        out: Name of the matrix that ends attention.
        enter: Names of the matrices into the MLP; one name where they are one matrix.
        leave: Name of the matrix out of the MLP.
        gated: Whether two matrices of the MLP's width enter it, one a gate.
        qkv_bias: Biases of queries, keys and values.
        out_bias: Bias of the matrix that ends attention.
        mlp_bias: Biases of the MLP.
        head_bias: Bias of the LM head.
        norms: Norms of a layer as wide as the residual stream.
        norm_vectors: Vectors of a norm: weight, weight and bias, or none.
        qk_norm: Norms of queries and keys: `head` one each, as wide as a head; `width` one for every head.
        qk_norm_flag: Whether they are there.
        embedding_norm: Whether a norm follows the embedding.
        tied: Whether LM head and embedding are one weight where config.json does not say.
        windowed: `all` where `sliding_window` holds in every layer, `some` where layers are told apart.
        window_pattern: Every so many-th layer sees all, where layers are not told apart; 0 where none does.
    """

    queries: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    enter: tuple[str, ...] = ("gate_proj", "up_proj")
    leave: str = "down_proj"
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
    windowed: Literal["all", "some"] = "some"
    window_pattern: int = 0


_FUSED: dict[str, Any] = {
    "queries": ("query_key_value",),
    "out": "dense",
    "enter": ("dense_h_to_4h",),
    "leave": "dense_4h_to_h",
}
_BIASED: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_vectors": 2}
_ASKED: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_ATTENTION: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_PLAIN: dict[str, Any] = {"enter": ("up_proj",), "gated": False}

FAMILIES: Mapping[str, Family] = {
    "arcee": Family(**_PLAIN, **_ASKED),
    "baichuan": Family(queries=("W_pack",)),
    "bloom": Family(**_FUSED, **_BIASED, gated=False, embedding_norm=True, tied=True),
    "chatglm": Family(
        **_FUSED, qkv_bias="add_qkv_bias", out_bias="add_bias_linear", mlp_bias="add_bias_linear"
    ),
    "cohere": Family(**_ATTENTION, norms=1, qk_norm="width", qk_norm_flag="use_qk_norm", tied=True),
    "gemma": Family(**_ATTENTION, tied=True),
    "gemma2": Family(**_ATTENTION, norms=4, tied=True, window_pattern=2),
    "gemma3_text": Family(**_ATTENTION, norms=4, qk_norm="head", tied=True, window_pattern=6),
    "glm": Family(enter=("gate_up_proj",), qkv_bias=("attention_bias", True)),
    "glm4": Family(enter=("gate_up_proj",), qkv_bias=("attention_bias", True), norms=4),
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
        queries=("wqkv",), out="wo", enter=("w1", "w3"), leave="w2", qkv_bias="bias", out_bias="bias"
    ),
    "llama": Family(**_ASKED),
    "mistral": Family(windowed="all"),
    "nemotron": Family(**_PLAIN, **_ASKED, norm_vectors=2),
    "olmo": Family(**_ATTENTION, norm_vectors=0),
    "olmo2": Family(**_ATTENTION, qk_norm="width"),
    "phi": Family(out="dense", enter=("fc1",), leave="fc2", gated=False, **_BIASED, head_bias=True, norms=1,
        qk_norm="head", qk_norm_flag="qk_layernorm"),
    "phi3": Family(queries=("qkv_proj",), enter=("gate_up_proj",), windowed="all"),
    "qwen": Family(queries=("c_attn",), out="c_proj", enter=("w1", "w2"), leave="c_proj", qkv_bias=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(**_ATTENTION, qk_norm="head"),
    "seed_oss": Family(
        qkv_bias=("attention_bias", True), out_bias="attention_out_bias", mlp_bias="mlp_bias"
    ),
    "smollm3": Family(**_ASKED, tied=True),
    "stablelm": Family(qkv_bias="use_qkv_bias", norm_vectors=2, qk_norm="width", qk_norm_flag="qk_layernorm"),
    "starcoder2": Family(
        enter=("c_fc",),
        leave="c_proj",
        gated=False,
        qkv_bias=("use_bias", True),
        out_bias=("use_bias", True),
        mlp_bias=("use_bias", True),
        norm_vectors=2,
        tied=True,
        windowed="all",
    ),
}  # fmt: skip


def is_set(flag: Flag, config: Mapping[str, Any]) -> bool:
    """Return whether a flag holds for a configuration."""
    if isinstance(flag, bool):
        return flag
    key, default = (flag, False) if isinstance(flag, str) else flag
    found = config.get(key)
    return default if found is None else bool(found)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a model of a known family has one weight for LM head and embedding."""
    found = config.get("tie_word_embeddings")
    return FAMILIES[str(config["model_type"])].tied if found is None else bool(found)


@dataclass(frozen=True)
class Sizes:
    """What config.json calls by several names.

    Attributes:
        hidden_size: Width of the residual stream.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        intermediate_size: Width of the MLP.
        vocab_size: Rows of the embedding.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


def sizes(config: Mapping[str, Any]) -> Sizes:
    """Return the sizes that a configuration of a known family states under its own names.

    Raises:
        KeyError: One of them is not stated; carries its name.
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
    # Qwen's first generation states both halves of what enters its MLP.
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
