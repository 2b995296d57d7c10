"""Load a model's config.json from a folder, the bundled registry, or a hub, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping

from orchestrator.arch.families import FAMILIES, sizes
from orchestrator.arch.registry import bundled, bundled_config
from orchestrator.config.paths import resolve
from orchestrator.config.schema import ModelSpec
from orchestrator.errors import SpecError

_SIZE_FIELDS = (
    "hidden_size", "n_embed", "num_attention_heads", "n_head", "num_hidden_layers", "n_layer", "num_layers",
    "intermediate_size", "ffn_hidden_size", "vocab_size", "padded_vocab_size", "num_key_value_heads",
    "head_dim",
)  # fmt: skip


def local_config(path: str) -> Mapping[str, object] | None:
    """Return the config.json of a model folder on this machine; None if there is none that can be read.

    Args:
        path: `model.path` of a job.
    """
    try:
        found = json.loads((resolve(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def load_config_json(path: str) -> Mapping[str, object]:
    """Return a model's config.json.

    Args:
        path: `model.path` of a job: a folder, a bundled name, or a hub name, tried in this order.

    Raises:
        SpecError: No config.json is found, it cannot be read, or it lacks a size of the model.
    """
    found = _in_folder(path) or bundled_config(path)
    if found is not None:
        return _with_sizes(path, found)
    asked = "is not a folder with a config.json"
    if path.count("/") == 1 and not path.startswith((".", "/", "~", "builtin/")):
        found, asked = _from_hub(path), "is not a folder with a config.json, and no hub could be asked for it"
    if found is None:
        raise SpecError(
            f"model.path={path} {asked}, so the model's sizes are not known; give a folder, or one of the "
            f"bundled names: {', '.join(bundled())}"
        )
    return _with_sizes(path, found)


def resized(config: Mapping[str, object], model: ModelSpec) -> Mapping[str, object]:
    """Return a config.json with `vocab_size` as model.resize_embeddings will make it.

    If the option is set, raises `vocab_size` to the largest token id in tokenizer.json plus one, and one for
    each of model.new_special_tokens that is not in it. Returns the configuration unchanged if tokenizer.json
    is not on this machine. `orchestrator.model.vocabulary` does the same with transformers.
    """
    if not model.resize_embeddings:
        return config
    try:
        found = json.loads((resolve(model.path) / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = found["model"]["vocab"]
        # Unigram models store a list of (piece, score), with the index as id; others map tokens to ids.
        if isinstance(vocabulary, list):
            vocabulary = {piece[0]: at for at, piece in enumerate(vocabulary)}
        tokens = {**vocabulary, **{token["content"]: token["id"] for token in found.get("added_tokens", [])}}
        rows = 1 + max(tokens.values()) + len(set(model.new_special_tokens).difference(tokens))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return config
    return {**config, "vocab_size": max(rows, config.get("vocab_size") or 0)}


def _in_folder(path: str) -> Mapping[str, object] | None:
    """Return the config.json of a model folder; None if the path has none.

    Raises:
        SpecError: The file exists but cannot be read, or is not a JSON object.
    """
    file = resolve(path) / "config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON: {error}"
        raise SpecError(
            f"model.path={path}: {file} cannot be read ({reason}); restore the config.json of the model"
        ) from None
    if not isinstance(found, dict) or not found:
        raise SpecError(
            f"model.path={path}: {file} is not a JSON object with the model's settings; restore the "
            "config.json of the model"
        )
    return found


def _with_sizes(path: str, config: Mapping[str, object]) -> Mapping[str, object]:
    """Check that the configuration of a known family states all sizes as positive integers, and return it.

    Raises:
        SpecError: A size is missing or is not a positive integer.
    """
    if str(config.get("model_type")) not in FAMILIES:
        return config
    restore = "restore the config.json of the model"
    stated = {name: config[name] for name in _SIZE_FIELDS if config.get(name) is not None}
    if wrong := {name: value for name, value in stated.items() if not _is_count(value)}:
        shown = ", ".join(f"{name}={json.dumps(value)}" for name, value in wrong.items())
        raise SpecError(f"model.path={path}: config.json has {shown}, not positive integers; {restore}")
    try:
        sizes({name: value for name, value in config.items() if value is not None})
    except KeyError as error:
        raise SpecError(
            f"model.path={path}: config.json does not state {error.args[0]}, which model_type="
            f"{config['model_type']} needs; {restore}"
        ) from None
    return config


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _from_hub(name: str) -> Mapping[str, object] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(name, "config.json", etag_timeout=5)
        with open(file, encoding="utf-8") as text:
            found = json.load(text)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError):
        return None
    return found if isinstance(found, dict) else None
