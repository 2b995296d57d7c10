"""Size and shape of the product's Python code at one or more git revisions, one column per revision.

    python -m tests.benchmarks.code_size [--revision GITREV ...] [--json]

Files are read with `git archive`, so the checkout is not changed, and parsed without importing them, so that
any layout and any revision can be measured. Definitions:

- lines: physical lines of every `.py` file under `orchestrator`, `launch` and `cluster`, tests excluded.
- function length: from `def` to the last line of the body, docstring included; nested functions and methods
  count as functions of their own.
- Any: uses of `Any` in annotations and expressions; its imports are not counted.
- comments: `#` comments, except directives to a tool (`noqa`, `type:`, `fmt:`, `pragma`, `shellcheck`).
- logger calls: `<logger>.debug/info/warning/error/exception/critical/log(...)`, where `<logger>` is a name
  that ends in `logger` or `log`, or the module `logging`.
- room: a first-level package of `orchestrator` (`orchestrator.data`); `orchestrator` itself for its
  top-level modules; `launch`; `cluster`. Imports between rooms are counted as pairs of modules, including
  imports inside functions.
- driver calls: calls in functions of `orchestrator/train/driver.py` to names imported from another module of
  the product, by that module. `x.f()` and `x.y.f()` count for the module that `x` was imported from.
- driver crossings: the same calls in source order, with local functions expanded at their first call; a
  crossing is a call to a different module than the previous call.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASELINE = "f6d72b9"
PACKAGES = ("orchestrator", "launch", "cluster")
DRIVER = "orchestrator.train.driver"
ENTRY_POINTS = ("run", "train")
"""Candidate entry points of the driver; the first one that exists is followed."""
_LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
_DIRECTIVES = ("noqa", "type:", "fmt:", "pragma", "shellcheck", "mypy:", "ruff:", "!")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def measure_revision(revision: str, root: Path = ROOT) -> dict[str, Any]:
    """Return the metrics of the product at a git revision.

    Args:
        revision: Any git revision of the repository.
        root: The repository's working tree.

    Raises:
        ValueError: The revision has none of the product's packages.
    """
    listed = _git(root, "ls-tree", "--name-only", revision).decode().split()
    packages = [name for name in PACKAGES if name in listed]
    if not packages:
        raise ValueError(f"{revision} has none of {', '.join(PACKAGES)}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(_git(root, "archive", revision, *packages))) as archive:
            archive.extractall(folder, filter="data")
        return measure(Path(folder))


def measure(tree: Path) -> dict[str, Any]:
    """Return the metrics of the packages `orchestrator`, `launch` and `cluster` in a folder."""
    sources = {module_name(file, tree): file.read_text("utf-8") for file in python_files(tree)}
    packages = {module_name(file, tree) for file in python_files(tree) if file.name == "__init__.py"}
    parsed = {name: ast.parse(text) for name, text in sources.items()}
    lines = sum(text.count("\n") for text in sources.values())
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in _functions(parsed.values()))  # type: ignore[operator]
    imported = {name: imports(module, name, name in packages, parsed) for name, module in parsed.items()}
    rooms = Counter(
        f"{room(name)} -> {room(target)}"
        for name, names in imported.items()
        for target in set(names.values())
        if room(name) != room(target)
    )
    return {
        "files": len(sources),
        "lines": lines,
        "functions": len(lengths),
        "function_lines_median": median(lengths) if lengths else 0,
        "function_lines_p90": lengths[math.ceil(0.9 * len(lengths)) - 1] if lengths else 0,
        "function_lines_max": lengths[-1] if lengths else 0,
        "any_per_1000_lines": _rate(sum(_uses_of_any(module) for module in parsed.values()), lines, 1000),
        "comments_per_100_lines": _rate(sum(_comments(text) for text in sources.values()), lines, 100),
        "logger_calls_per_1000_lines": _rate(sum(map(_logger_calls, parsed.values())), lines, 1000),
        "imports_between_rooms": rooms.total(),
        "pairs_of_rooms": len(rooms),
        "rooms": dict(sorted(rooms.items())),
        **(_driver(parsed[DRIVER], imported[DRIVER]) if DRIVER in parsed else {}),
    }


def python_files(tree: Path) -> list[Path]:
    """Return the product's Python files in a folder, sorted by path."""
    return sorted(file for package in PACKAGES for file in (tree / package).rglob("*.py"))


def module_name(file: Path, tree: Path) -> str:
    """Return the dotted module name of a file below `tree`."""
    parts = file.relative_to(tree).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """Return the room of a module, as the module docstring defines it."""
    parts = module.split(".")
    if parts[0] != "orchestrator":
        return parts[0]
    return ".".join(parts[:2]) if len(parts) > 2 else "orchestrator"


def imports(module: ast.Module, name: str, is_package: bool, known: Mapping[str, Any]) -> dict[str, str]:
    """Return the names that a module imports from the product, mapped to the modules they come from.

    Args:
        module: The parsed module.
        name: Its dotted name.
        is_package: Whether it is an `__init__.py`.
        known: All modules of the product, by dotted name.
    """
    found: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    found[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            # A relative import drops `level` parts of the name; in a package, one part fewer.
            base = name.split(".")[: -node.level + is_package or None] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from package import module` imports a module, `from module import name` a name of it.
                target = f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin
                if target in known:
                    found[alias.asname or alias.name] = target
    return found


def _functions(modules: Any) -> Iterator[_Function]:
    for module in modules:
        yield from (node for node in ast.walk(module) if isinstance(node, _Function))


def _uses_of_any(module: ast.Module) -> int:
    return sum(
        (isinstance(node, ast.Name) and node.id == "Any")
        or (isinstance(node, ast.Attribute) and node.attr == "Any" and _dotted(node) == "typing.Any")
        for node in ast.walk(module)
    )


def _comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = (token.string for token in tokens if token.type == tokenize.COMMENT)
    return sum(not comment.lstrip("# ").startswith(_DIRECTIVES) for comment in comments)


def _logger_calls(module: ast.Module) -> int:
    called = (_dotted(node.func) for node in ast.walk(module) if isinstance(node, ast.Call))
    pairs = (name.rpartition(".")[::2] for name in called if name)
    return sum(
        level in _LEVELS and (owner == "logging" or owner.lower().endswith(("logger", "log")))
        for owner, level in pairs
    )


def _driver(module: ast.Module, imported: Mapping[str, str]) -> dict[str, Any]:
    functions = list(_functions([module]))
    top = {node.name: node for node in module.body if isinstance(node, _Function)}
    calls = Counter(
        target for node in top.values() for call in _calls(node) if (target := _target(call, imported))
    )
    entry = next((top[name] for name in ENTRY_POINTS if name in top), None)
    path = list(_path(entry, top, imported, set())) if entry else []
    parameters = [_parameters(node) for node in functions]
    return {
        "driver_calls": calls.total(),
        "driver_modules": len(calls),
        "driver_crossings": sum(one != other for one, other in zip([None, *path], path, strict=False)),
        "driver_functions": len(functions),
        "driver_parameters": sum(parameters),
        "driver_parameters_max": max(parameters, default=0),
        "driver_calls_by_module": dict(calls.most_common()),
    }


def _path(
    function: _Function, local: Mapping[str, _Function], imported: Mapping[str, str], seen: set[str]
) -> Iterator[str]:
    """Yield the modules that a function calls, in source order; each local function is expanded once."""
    seen.add(function.name)
    for call in _calls(function):
        target = _target(call, imported)
        name = (_dotted(call.func) or "").split(".")[0]
        if target:
            yield target
        elif name in local and name not in seen:
            yield from _path(local[name], local, imported, seen)


def _calls(function: _Function) -> list[ast.Call]:
    found = [node for part in function.body for node in ast.walk(part) if isinstance(node, ast.Call)]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def _target(call: ast.Call, imported: Mapping[str, str]) -> str | None:
    """Return the module that a call goes to: the module of the longest imported prefix of its dotted name."""
    parts = (_dotted(call.func) or "").split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((imported[prefix] for prefix in prefixes if prefix in imported), None)


def _parameters(function: _Function) -> int:
    every = function.args
    return len(every.posonlyargs) + len(every.args) + len(every.kwonlyargs)


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


def _rate(count: int, lines: int, unit: int) -> float:
    return round(count * unit / lines, 2) if lines else 0.0


def _git(root: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=root, check=False, capture_output=True)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the metrics as a text table, one column per revision; a missing value is a dash."""
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    rows: list[Sequence[str]] = [("", *columns)]
    for name in names:
        found = [figures.get(name) for figures in columns.values()]
        if any(isinstance(value, dict) for value in found):
            rows += [("",), (f"{name}:",)]
            rows += [(f"  {key}", *(_cell(value, key) for value in found)) for key in _keys(found)]
        else:
            rows.append((name, *("-" if value is None else f"{value:,}" for value in found)))
    widths = [max(len(row[0]) for row in rows), *(max(12, len(revision)) for revision in columns)]
    return "\n".join(
        "  ".join(f"{cell:{'>' if place else '<'}{widths[place]}}" for place, cell in enumerate(row)).rstrip()
        for row in rows
    )


def _keys(found: Sequence[Any]) -> list[str]:
    return sorted({key for value in found for key in value or ()})


def _cell(value: Mapping[str, int] | None, key: str) -> str:
    return str(value[key]) if value and key in value else "-"


def main() -> None:
    """Print the metrics of the requested revisions as a table, or as JSON."""
    parser = argparse.ArgumentParser(description="Size and shape of the product's code at git revisions.")
    parser.add_argument("--revision", action="append", help=f"any git revision; default {BASELINE} and HEAD")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    columns = {revision: measure_revision(revision) for revision in asked.revision or [BASELINE, "HEAD"]}
    sys.stdout.write((json.dumps(columns, indent=2) if asked.json else table(columns)) + "\n")


if __name__ == "__main__":
    main()
