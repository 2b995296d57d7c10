"""config.json and tokenizer_config.json of an export, readable by transformers 4 and 5.

transformers 5 renamed some settings, and 4 ignores unknown names: with `rope_parameters` alone it silently
uses a rope_theta of 10000. So both names are written, and each version reads its own. transformers 5 reads
a configuration of 4 as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_PER_LAYER_ROPE_MODELS = ("gemma3_text", "gemma3")  # apply rope_scaling to layers of full attention only
_RESIZED = ("vocab_size", "pad_token_id")  # settings that a run may change
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # from 5's name to one that both know


def model_config(
    base: Mapping[str, object], dtype: str, architecture: str | None, trained: Mapping[str, object]
) -> dict[str, object]:
    """Return an export's config.json.

    Args:
        base: The base model's config.json.
        dtype: Dtype of the exported weights: bf16, fp16 or fp32.
        architecture: Class of the model, if the base model's config.json does not name it.
        trained: The configuration of the trained model, as a dictionary.
    """
    config = {name: value for name, value in base.items() if name != "quantization_config"}
    config |= {name: config.get(name, value) for name, value in _transformers_4_rope(base).items()}
    if not config.get("architectures") and architecture:
        config["architectures"] = [architecture]
    config |= {"torch_dtype": _DTYPES[dtype], "dtype": _DTYPES[dtype]}
    return config | _changed_settings(base, trained)


def _changed_settings(base: Mapping[str, object], trained: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that training changed, such as the vocab_size of a resized embedding."""
    return {
        name: trained[name]
        for name in _RESIZED
        if trained.get(name) is not None and trained[name] != base.get(name) and name in base
    }


def _transformers_4_rope(base: Mapping[str, object]) -> dict[str, object]:
    """Translate `rope_parameters` of transformers 5 to the settings of transformers 4.

    Args:
        base: A config.json. Its `rope_parameters` has the rotary embedding of all layers, or maps
            `full_attention` and `sliding_attention` to one each.
    """
    rope = base.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return {}
    by_layer = {name: value for name, value in rope.items() if isinstance(value, Mapping)}
    main = by_layer.get("full_attention") or next(iter(by_layer.values()), rope)
    settings = {"rope_theta": main["rope_theta"]} if "rope_theta" in main else {}
    if "partial_rotary_factor" in main:
        settings["partial_rotary_factor"] = main["partial_rotary_factor"]
    scaling = {
        name: value for name, value in main.items() if name not in ("rope_theta", "partial_rotary_factor")
    }
    is_plain = scaling.get("rope_type", "default") == "default"
    model_type = str(base.get("model_type"))
    # transformers 5 would apply rope_scaling to all layers, so it is left out if layers differ, except for
    # models that apply it to full attention only.
    if not by_layer or is_plain or model_type in _PER_LAYER_ROPE_MODELS:
        settings["rope_scaling"] = None if is_plain else scaling
    if "sliding_attention" in by_layer:
        settings["rope_local_base_freq"] = by_layer["sliding_attention"].get("rope_theta")
    if model_type.startswith("gpt_neox"):
        settings |= {"rotary_emb_base": settings.pop("rope_theta", 10000)}
        settings |= {"rotary_pct": settings.pop("partial_rotary_factor", 0.25)}
    return settings


def tokenizer_config(base: Mapping[str, object]) -> dict[str, object]:
    """Return an export's tokenizer_config.json.

    Args:
        base: The base model's tokenizer_config.json. That of transformers 5 may name a class that 4 does not
            know, and have a list where 4 requires a dictionary.
    """
    settings = dict(base)
    name = settings.get("tokenizer_class")
    if name in _TOKENIZER_CLASSES:
        settings["tokenizer_class"] = _TOKENIZER_CLASSES[name]
    if isinstance(settings.get("extra_special_tokens"), list):
        extra = settings.pop("extra_special_tokens")
        settings.setdefault("additional_special_tokens", extra)
    return settings
