"""config.json and tokenizer_config.json of an export: what the base model's say, for transformers 4 and 5.

transformers 5 names some settings differently, and 4 ignores names that it does not know: a model with
`rope_parameters` alone computes with a theta of 10000 there, without an error. So both names are written;
each version reads its own. A folder written by transformers 4 is read by 5 as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ROPE_TYPES_OF_LAYERS = ("gemma3_text", "gemma3")  # read rope_scaling for full attention where both are there
_OF_RESIZED = ("vocab_size", "pad_token_id")  # what a run may have changed in the model that it trained
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # 5's name, and the one that both know


def model_config(
    base: Mapping[str, Any], dtype: str, architecture: str | None, trained: Mapping[str, Any]
) -> dict[str, Any]:
    """Return an export's config.json.

    Args:
        base: The base model's config.json.
        dtype: Number format of the exported weights: bf16, fp16 or fp32.
        architecture: Class of the model, for a base that does not say it.
        trained: The configuration of the model that was trained, as a dictionary.
    """
    config = {name: value for name, value in base.items() if name != "quantization_config"}
    config |= {name: config.get(name, value) for name, value in _rope_of_4(base).items()}
    if not config.get("architectures") and architecture:
        config["architectures"] = [architecture]
    config |= {"torch_dtype": _DTYPES[dtype], "dtype": _DTYPES[dtype]}
    return config | _overrides(base, trained)


def _overrides(base: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the trained model has otherwise than its base, such as the rows of a resized embedding."""
    return {
        name: trained[name]
        for name in _OF_RESIZED
        if trained.get(name) is not None and trained[name] != base.get(name) and name in base
    }


def _rope_of_4(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding of a configuration of transformers 5 in the words of 4."""
    rope = base.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return {}
    by_layer = {name: value for name, value in rope.items() if isinstance(value, Mapping)}
    main = by_layer.get("full_attention") or next(iter(by_layer.values()), rope)
    found = {"rope_theta": main["rope_theta"]} if "rope_theta" in main else {}
    if "partial_rotary_factor" in main:
        found["partial_rotary_factor"] = main["partial_rotary_factor"]
    scaling = {
        name: value for name, value in main.items() if name not in ("rope_theta", "partial_rotary_factor")
    }
    is_plain = scaling.get("rope_type", "default") == "default"
    model_type = str(base.get("model_type"))
    # transformers 5 takes rope_scaling for all layers, where a model does not read it for one kind of them.
    if not by_layer or is_plain or model_type in _ROPE_TYPES_OF_LAYERS:
        found["rope_scaling"] = None if is_plain else scaling
    if "sliding_attention" in by_layer:
        found["rope_local_base_freq"] = by_layer["sliding_attention"].get("rope_theta")
    if model_type.startswith("gpt_neox"):
        found |= {"rotary_emb_base": found.pop("rope_theta", 10000)}
        found |= {"rotary_pct": found.pop("partial_rotary_factor", 0.25)}
    return found


def tokenizer_config(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return an export's tokenizer_config.json.

    Args:
        base: The base model's; of transformers 5 it has a class that 4 does not know, and a list where 4
            takes only a dictionary.
    """
    settings = dict(base)
    name = settings.get("tokenizer_class")
    if name in _TOKENIZER_CLASSES:
        settings["tokenizer_class"] = _TOKENIZER_CLASSES[name]
    if isinstance(settings.get("extra_special_tokens"), list):
        extra = settings.pop("extra_special_tokens")
        settings.setdefault("additional_special_tokens", extra)
    return settings
