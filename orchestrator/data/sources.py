"""Resolves a source's path to local data files, without opening data files and without network access."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Literal

from orchestrator.config.paths import resolve
from orchestrator.config.schema import SourceSpec
from orchestrator.data.file_patterns import base_of, has_wildcards, matching
from orchestrator.data.split_slice import split_of
from orchestrator.errors import SpecError

Kind = Literal["json", "parquet", "arrow", "csv", "tsv", "text", "xlsx"]
_KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
    ".xlsx": "xlsx",
    ".txt": "text",
}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_OTHERS = {
    ".yaml": "YAML",
    ".yml": "YAML",
    ".xls": "an Excel 97-2003 workbook",
    ".xml": "XML",
    ".md": "Markdown",
}
_SPLIT_NAMES = re.compile(r"(?:^|[-_./])(train|test|valid|validation|val|dev|eval)(?=[-_./]|$)")
_NOT_ROWS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def source_problem(source: SourceSpec) -> str | None:
    """Return why a source cannot be read, or None if no problem was found.

    Only local paths are checked. URIs and hub names are checked when they are read.
    """
    path = source.path
    if "://" in path or looks_like_hub_name(path):
        return None
    if not _exists(path) and not has_wildcards(path):
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
    """Return the error message for a path that does not exist."""
    return f"data file {path} is not there; check the path, which counts from {Path.cwd()} if relative"


def looks_like_hub_name(path: str) -> bool:
    """Return whether a path can be the name of a hub dataset, `ORG/NAME`; local paths take precedence."""
    known_ending = Path(path).suffix in (_KINDS.keys() | _COMPRESSED.keys())
    is_name = _HUB_NAME.fullmatch(path) is not None and "/" in path
    return is_name and not known_ending and not path.startswith("builtin/") and not _exists(path)


def local_files(source: SourceSpec, here: Path) -> list[tuple[str, str]]:
    """Return the files of a local file or folder, in the order in which they are read.

    Args:
        source: The source.
        here: Its resolved path, which exists, or a pattern.

    Returns:
        Pairs of the name for messages and the path of each file.

    Raises:
        SpecError: The path is not a regular file or folder, the folder has no data files, the split is
            missing or ambiguous, or the JSON files of a saved dataset are not readable.
    """
    name, part = split_of(source.split)
    try:
        if not here.exists() and has_wildcards(source.path):
            return _of_pattern(source, str(here))
        if here.is_dir():
            return _in_folder(source, here)
    except OSError as error:
        raise unreadable(source.path, error) from None
    if not here.is_file():
        raise SpecError(f"data file {source.path} is not a regular file; name a file or a folder of files")
    if name is not None and (part is None or name != "train"):
        raise SpecError(
            f"data file {source.path} is one file and has no splits; remove split={source.split}, or write "
            "split: train[:1000] for a part of its rows"
        )
    return [(source.path, str(here))]


def kind_of(name: str, path: str) -> tuple[Kind, str | None]:
    """Return the format and the compression codec of a file, from its file name extension.

    Unknown extensions are read as JSON.

    Raises:
        SpecError: A table has an extension of a compressed file, or the extension is that of another format.
    """
    suffixes = Path(path).suffixes
    compression = _COMPRESSED.get(suffixes[-1]) if suffixes else None
    ending = (suffixes[:-1] if compression else suffixes)[-1:]
    extension = ending[0].lower() if ending else ""
    kind = _KINDS.get(extension, "json")
    if compression and kind in ("parquet", "arrow", "xlsx"):
        raise SpecError(
            f"data file {name} is a compressed {kind} file; unpack it (only JSON, CSV and text are unpacked)"
        )
    if other := _OTHERS.get(extension):
        raise SpecError(f"data file {name} is {other}, which is not read; convert it to JSON lines or CSV")
    return kind, compression


def has_rows(path: str) -> bool:
    """Return whether a file in a folder is a data file, judging by its name; hidden files are not."""
    name = Path(path).name
    is_hidden = any(part.startswith((".", "_")) for part in Path(path).parts)
    return _extension(name) in _KINDS and not is_hidden and name not in _NOT_ROWS


def _extension(name: str) -> str:
    """Return the file name extension without that of a compression, in lower case."""
    path = Path(name)
    return Path(path.stem if path.suffix in _COMPRESSED else name).suffix.lower()


def of_split(source: SourceSpec, names: list[str]) -> list[str]:
    """Return the files of the selected split, or all files if they belong to one split.

    Args:
        source: The source, with the split to select or None.
        names: Paths of the data files, relative to the folder.

    Raises:
        SpecError: No file belongs to the selected split, several splits were found and none is selected,
            `names` is empty, or there are CSV files and others.
    """
    # The split is a word of the file name between separators: "test" matches test-0001.jsonl and
    # data/test.jsonl, but not latest.jsonl.
    is_text = {name: _KINDS.get(_extension(name)) == "text" for name in names}
    names = [name for name in names if not is_text[name] or all(is_text.values())]  # notes next to data
    split, _ = split_of(source.split)
    if split is not None:
        word = re.compile(rf"(^|[-_./]){re.escape(split)}([-_./]|$)")
        chosen = [name for name in names if word.search(name)]
        if not chosen:
            raise SpecError(
                f"data folder {source.path} has no file of split={split} among {names[:8]}; name another"
            )
        return _of_one_kind(source, chosen)
    splits = {match.group(1) for name in names if (match := _SPLIT_NAMES.search(name))}
    if len(splits) > 1:
        raise SpecError(
            f"data folder {source.path} holds several splits ({', '.join(sorted(splits))}); say which is "
            "meant with split: NAME"
        )
    if not names:
        raise SpecError(
            f"data folder {source.path} has no file with rows; its files must end in {', '.join(_KINDS)}, "
            f"text also with {', '.join(_COMPRESSED)}"
        )
    return _of_one_kind(source, names)


def _of_one_kind(source: SourceSpec, names: list[str]) -> list[str]:
    """Return the files, if they are not both CSV and JSON or Parquet, which often hold the same rows twice.

    Raises:
        SpecError: They are.
    """
    endings = sorted({_extension(name) for name in names})
    spreadsheets = [ending for ending in endings if _KINDS.get(ending) in ("csv", "tsv", "xlsx")]
    if spreadsheets and len(spreadsheets) < len(endings):
        raise SpecError(
            f"data folder {source.path} has files of several kinds ({', '.join(endings)}); name those meant "
            f"with a pattern, such as *{endings[0]}"
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


def _of_pattern(source: SourceSpec, pattern: str) -> list[tuple[str, str]]:
    """Return the files that match a pattern; those with a known extension, if any has one."""
    base = base_of(pattern)
    found = [name.removeprefix(base) for name in matching(pattern)]
    if not found:
        raise SpecError(
            f"data path {source.path} matches no file; correct the pattern, which counts from {Path.cwd()} "
            "if relative"
        )
    names = of_split(source, [name for name in found if has_rows(name)] or found)
    return [(base_of(source.path) + name, base + name) for name in names]


def _saved_data_set(source: SourceSpec, folder: Path) -> list[tuple[str, str]]:
    """Return the Arrow files of a dataset saved by `Dataset.save_to_disk`, as listed in its state.json.

    A saved `DatasetDict` has a dataset_dict.json with the names of its splits and a folder per split.

    Raises:
        SpecError: The split is missing or not selected, or a JSON file is not readable.
    """
    place = source.path.rstrip("/")
    split, _ = split_of(source.split)
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = list(json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(f"{place}/dataset_dict.json", error) from None
        if split is None or split not in splits:
            raise SpecError(
                f"data set {source.path} has the splits {', '.join(splits)}, and split={split} is "
                "none of them; say which is meant with split: NAME"
            )
        folder, place = folder / split, f"{place}/{split}"
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(f"{place}/state.json", error) from None
    return [(f"{place}/{name}", str(folder / name)) for name in names]
