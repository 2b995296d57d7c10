"""What an export takes over from the folder of its base model, as it lies there: all but the weights.

Tokenizer files, generation_config.json, chat templates, the licence and the model's own code are copied byte
for byte. config.json and tokenizer_config.json are edited by `orchestrator.export.config_files`.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from orchestrator.config.paths import resolve
from orchestrator.config.schema import ModelSpec
from orchestrator.errors import TrainingError

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
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
"""Names of the files of tokenizers and chat templates that transformers or the libraries below it read."""
MODEL = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "custom_generate/*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What else belongs to a model without its weights; its own code is found through auto_map."""
_CARD = "README.md"  # read for the licence, not copied


def base_folder(model: ModelSpec, commit: str | None = None) -> Path:
    """Return the folder with a base model's files, of a hub model that in the cache.

    Args:
        model: Names a folder, a builtin model or one of the hub.
        commit: Of the hub model, as its configuration was loaded from.

    Raises:
        TrainingError: The hub cannot be reached and the cache does not hold the model.
    """
    path = resolve(model.path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, *TOKENIZER, *MODEL, "*.py", _CARD]
    try:
        return Path(snapshot_download(model.path, revision=commit, allow_patterns=wanted))
    except Exception as error:  # errors of several classes of the hub's client and of those below it
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"the files of model.path={model.path} cannot be had ({reason}); make the hub or its cache "
            "(HF_HOME) reachable, then export again"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as Hugging Face formats it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def carried_files(base: Path, only_tokenizer: bool = False) -> list[str]:
    """Return the names of the files that an export copies, relative to the base model's folder.

    Args:
        base: The folder.
        only_tokenizer: For an adapter, which is loaded with its base model.
    """
    patterns = TOKENIZER if only_tokenizer else TOKENIZER + MODEL
    inside = [
        path for name in ("", "additional_chat_templates", "custom_generate") for path in _files(base / name)
    ]
    names = {path.relative_to(base).as_posix() for path in inside}
    found = {name for name in names if any(_matches(name, pattern) for pattern in patterns)}
    settings = (TOKENIZER_CONFIG,) if only_tokenizer else (CONFIG, TOKENIZER_CONFIG)
    return sorted(found.union(*(_code(base, read_json(base / name)) for name in settings)))


def copy_files(base: Path, folder: Path, only_tokenizer: bool = False) -> None:
    """Copy what an export takes over, contents without rights or owners."""
    for name in carried_files(base, only_tokenizer):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, folder / name)


def carried_bytes(base: Path) -> int:
    """Return the size of all that an export may copy."""
    return sum((base / name).stat().st_size for name in carried_files(base))


def card_metadata(base: Path) -> dict[str, Any]:
    """Return the front matter of a base model's own card, empty where it has none that can be read."""
    import yaml

    try:
        text = (base / _CARD).read_text(encoding="utf-8")
        if not text.startswith("---\n"):
            return {}
        found = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---\n"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _code(base: Path, settings: dict[str, Any]) -> set[str]:
    """Return the model's own modules that a file's auto_map names, and those that they import.

    Other Python files of the folder may be anything and stay where they are. Code that lives in another
    repository (`owner/name--module.Class`) is found there by transformers.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    found: set[str] = set()
    for named in dict(settings.get("auto_map") or {}).values():
        for reference in named if isinstance(named, list | tuple) else [named]:
            if not reference or "--" in reference:
                continue
            module = base / f"{reference.rpartition('.')[0]}.py"
            if module.is_file():
                needed = [module, *map(Path, get_relative_import_files(module))]
                found |= {path.relative_to(base).as_posix() for path in needed if path.is_file()}
    return found
