"""What a source's path names on this machine: which files, found without opening one or asking a network."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Literal

from orchestrator.config.paths import resolve
from orchestrator.config.schema import SourceSpec
from orchestrator.errors import SpecError

Kind = Literal["json", "parquet", "arrow"]
_KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_SPLIT_NAMES = re.compile(r"(?:^|[-_./])(train|test|valid|validation|val|dev|eval)(?=[-_./]|$)")
_NOT_ROWS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def source_problem(source: SourceSpec) -> str | None:
    """Return why a source cannot be read, as far as this machine alone can tell; None where nothing is wrong.

    URIs and names of the hub are left to whoever reads them.
    """
    path = source.path
    if "://" in path or looks_like_hub_name(path):
        return None
    if not _exists(path):
        return absent(path)
    try:
        for name, file in local_files(source, resolve(path)):
            kind_of(name, file)
            if not Path(file).is_file():
                return f"data file {name} is not there, and {path} lists it; write the data set again"
            if not os.access(file, os.R_OK):
                return f"data file {name} cannot be read (Permission denied); make it readable"
    except SpecError as error:
        return error.problems[0]
    return None


def absent(path: str) -> str:
    """Return the sentence for a path where nothing is."""
    return f"data file {path} is not there; check the path, which counts from {Path.cwd()} if relative"


def looks_like_hub_name(path: str) -> bool:
    """Tell whether a path that is not on this disk can be the name of a data set on the hub."""
    known_ending = Path(path).suffix in (_KINDS.keys() | _COMPRESSED.keys())
    is_name = _HUB_NAME.fullmatch(path) is not None and "/" in path
    return is_name and not known_ending and not path.startswith("builtin/") and not _exists(path)


def local_files(source: SourceSpec, here: Path) -> list[tuple[str, str]]:
    """Return the files of a source that is a file or a folder, in the order in which they are read.

    Args:
        source: The source.
        here: Where its path leads; it exists.

    Returns:
        For each file what messages call it, and its path.

    Raises:
        SpecError: A folder has no rows or several splits, the split is not there, or a file says nonsense.
    """
    try:
        if here.is_dir():
            return _in_folder(source, here)
    except OSError as error:
        raise unreadable(source.path, error) from None
    if not here.is_file():
        raise SpecError(f"data file {source.path} is no regular file; name a file or a folder of files")
    if source.split is not None:
        raise SpecError(f"data file {source.path} is one file and has no splits; remove split={source.split}")
    return [(source.path, str(here))]


def kind_of(name: str, path: str) -> tuple[Kind, str | None]:
    """Return how a file's rows are written, and by which codec it is compressed, if it is.

    Raises:
        SpecError: It is a compressed table.
    """
    suffixes = Path(path).suffixes
    compression = _COMPRESSED.get(suffixes[-1]) if suffixes else None
    ending = (suffixes[:-1] if compression else suffixes)[-1:]
    kind = _KINDS.get(ending[0] if ending else "", "json")
    if compression and kind != "json":
        raise SpecError(
            f"data file {name} is a compressed {kind} file; unpack it (only JSON is unpacked here)"
        )
    return kind, compression


def has_rows(path: str) -> bool:
    """Tell by its name whether a file in a folder is one of rows."""
    name = Path(path).name
    stem = name.removesuffix(".gz").removesuffix(".zst")
    is_hidden = any(part.startswith((".", "_")) for part in Path(path).parts)
    return Path(stem).suffix in _KINDS and not is_hidden and name not in _NOT_ROWS


def of_split(source: SourceSpec, names: list[str]) -> list[str]:
    """Return the files of the split that is asked for; refuse to read several splits as one.

    Raises:
        SpecError: There is none, there are several and no split is asked for, or no such split.
    """
    if source.split is not None:
        word = re.compile(rf"(^|[-_./]){re.escape(source.split)}([-_./]|$)")
        chosen = [name for name in names if word.search(name)]
        if not chosen:
            raise SpecError(
                f"data folder {source.path} has no file of split={source.split} among {names[:8]}; name "
                "another"
            )
        return chosen
    splits = {match.group(1) for name in names if (match := _SPLIT_NAMES.search(name))}
    if len(splits) > 1:
        raise SpecError(
            f"data folder {source.path} holds several splits ({', '.join(sorted(splits))}); say which is "
            "meant with split: NAME"
        )
    if not names:
        raise SpecError(
            f"data folder {source.path} has no file with rows; its files must end in {', '.join(_KINDS)}, "
            "JSON also with .gz or .zst"
        )
    return names


def unreadable(name: str, error: Exception) -> SpecError:
    """Return the error for a file that cannot be read."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return SpecError(
        f"data file {name} cannot be read ({reason}); check that it is there, whole and readable"
    )


def _exists(path: str) -> bool:
    try:
        return resolve(path).exists()
    except (OSError, ValueError):
        return False


def _in_folder(source: SourceSpec, folder: Path) -> list[tuple[str, str]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_data_set(source, folder)
    found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names = of_split(source, [name for name in found if has_rows(name)])
    return [(f"{source.path.rstrip('/')}/{name}", str(folder / name)) for name in names]


def _saved_data_set(source: SourceSpec, folder: Path) -> list[tuple[str, str]]:
    """Return the Arrow files of a data set that `Dataset.save_to_disk` wrote, from its state.json."""
    place = source.path.rstrip("/")
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = list(json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(f"{place}/dataset_dict.json", error) from None
        if source.split is None or source.split not in splits:
            raise SpecError(
                f"data set {source.path} has the splits {', '.join(splits)}, and split={source.split} is "
                "none of them; say which is meant with split: NAME"
            )
        folder, place = folder / source.split, f"{place}/{source.split}"
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(f"{place}/state.json", error) from None
    return [(f"{place}/{name}", str(folder / name)) for name in names]
