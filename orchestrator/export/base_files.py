"""Copy everything but the weights from the directory of the base model to an export.

Tokenizer files, generation_config.json, chat templates, licence files and the model's own code are copied
unchanged. config.json and tokenizer_config.json are edited by `orchestrator.export.config_files`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from orchestrator.atomic_files import JsonObject
from orchestrator.config.paths import resolve
from orchestrator.config.schema import ModelSpec
from orchestrator.errors import TrainingError

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = (
    "tokenizer*.json",
    "tokenizer*.model*",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.vocab",
    "*.bpe",
    "bpe.codes",
    "vocab*.json",
    "vocab*.txt",
    "dict.txt",
    "encoder.json",
    "merges*.txt",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Patterns of tokenizer and chat template files that transformers or its tokenizer libraries read."""
MODEL = (
    GENERATION_CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    "custom_generate/*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of other files of a model; its own Python code is found through auto_map."""
_CARD = "README.md"  # read for the licence, not copied


def base_model_dir(model: ModelSpec, commit: str | None = None) -> Path:
    """Return the directory of a base model; of a hub model its snapshot in the cache.

    Args:
        model: Names a directory, a builtin model or a hub model.
        commit: Commit of the hub model from which its configuration was loaded.

    Raises:
        TrainingError: The model is not in the cache, and the hub cannot be reached.
    """
    path = resolve(model.path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, *TOKENIZER, *MODEL, "*.py", _CARD]
    try:
        return Path(snapshot_download(model.path, revision=commit, allow_patterns=patterns))
    except Exception as error:  # the client raises its own errors, and those of httpx and the file system
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"the files of model.path={model.path} cannot be downloaded ({reason}); make the hub or its "
            "cache (HF_HOME) reachable, then export again"
        ) from None


def read_json(path: Path) -> JsonObject:
    """Return a JSON object; empty if there is no file."""
    if not path.is_file():
        return {}
    value: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    return value


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object in the format of Hugging Face.

    Not atomic: it writes into a draft, which is published by a rename of the whole directory.
    """
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copied_files(base: Path, only_tokenizer: bool = False) -> list[str]:
    """Return the names of the files that an export copies, relative to the directory of the base model.

    Args:
        base: Directory of the base model.
        only_tokenizer: Whether to leave out all but the tokenizer, as for an adapter.
    """
    patterns = TOKENIZER if only_tokenizer else TOKENIZER + MODEL
    paths = [
        path for name in ("", "additional_chat_templates", "custom_generate") for path in _files(base / name)
    ]
    names = {path.relative_to(base).as_posix() for path in paths}
    matching = {name for name in names if any(_matches(name, pattern) for pattern in patterns)}
    config_names = (TOKENIZER_CONFIG,) if only_tokenizer else (CONFIG, TOKENIZER_CONFIG)
    return sorted(matching.union(*(_own_code(base, read_json(base / name)) for name in config_names)))


def copy_files(base: Path, directory: Path, only_tokenizer: bool = False) -> None:
    """Copy the files of a base model, without their permissions and owners."""
    for name in copied_files(base, only_tokenizer):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, directory / name)


def add_end_of_generation(directory: Path, token: int) -> None:
    """Add a token to those at which generation stops, in generation_config.json."""
    settings = read_json(directory / GENERATION_CONFIG)
    present = settings.get("eos_token_id")
    ids = present if isinstance(present, list) else [] if present is None else [present]
    if token not in ids:
        settings["eos_token_id"] = [token, *ids]
        write_json(directory / GENERATION_CONFIG, settings)


def card_metadata(base: Path) -> dict[str, object]:
    """Return the front matter of the base model's card; empty if there is none, or it is invalid."""
    import yaml

    try:
        text = (base / _CARD).read_text(encoding="utf-8")
        if not text.startswith("---\n"):
            return {}
        metadata = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---\n"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_file()] if directory.is_dir() else []


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _own_code(base: Path, config: JsonObject) -> set[str]:
    """Return the modules that the auto_map of a configuration names, and those that they import.

    Other Python files of the directory are not copied. Code of another repository
    (`owner/name--module.Class`) is loaded from there by transformers.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    names: set[str] = set()
    for references in dict(config.get("auto_map") or {}).values():
        for reference in references if isinstance(references, list | tuple) else [references]:
            if not reference or "--" in reference:
                continue
            module = base / f"{reference.rpartition('.')[0]}.py"
            if module.is_file():
                modules = [module, *map(Path, get_relative_import_files(module))]
                names |= {path.relative_to(base).as_posix() for path in modules if path.is_file()}
    return names
