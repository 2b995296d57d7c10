"""Collect the error and warning texts of the product from its source, without importing it.

    python -m tests.unit.error_texts [--write]

A text is a string of two words or more, formatted strings and concatenations included, that is

- raised, given to an exception class, or given to a function that returns an exception;
- given to `Diagnostic`, `warnings.warn`, `note` or a logger's `warning`, `error` or `exception`,
  or appended to a list of problems;
- yielded or returned by a function that describes problems, by its return type (`Iterator[Problem]`,
  `list[str]`, `str | None`) or by its name (`source_problem`, `_remedy`, `_reason`);
- returned by a function that is called in one of these, given to a function that passes it on to one of
  these, or assigned to a local name or a constant of the module that one of these uses;
- of the form "what is wrong; the remedy", wherever it stands.

Placeholders of formatted strings stand as {expression}; constants that are strings are replaced by their
text. What is listed is every text that can be part of an error, so that a few are listed that rarely are.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from tests.benchmarks.code_size import imports, module_name, python_files

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "errors.txt"
COMMAND = "python -m tests.unit.error_texts --write"

_ERROR_TYPE = re.compile(r"\b\w*(Error|Exception|Malformed)\b(?! \|)")
_CALLEE = re.compile(
    r"(Error|Exception|Diagnostic|Malformed)$|^_?(note|warn|warning|error|exception|fail|exit_codes)$"
)
_LIST = re.compile(r"problem|warning|broken|missing|reason|refus|note|finding|diagnostic|wrong|lines")
_ADDING = {"append", "extend", "insert", "add"}
_RESULT = re.compile(r"\bstr \| None|list\[str\]|Iterator\[(str|Problem|Diagnostic)\]")
_NAME = re.compile(
    r"problem|reason|remed|refus|warn|note|broken|obstacle|unsupported|missing|failure|unreachable|absent|why"
    r"|changed|wrong|explain(?!ed)|unexpected|in_words|empty_|sentence|lack|suggest|diagnos|error|message|outcome|unreadable"
)
_SENTENCE = re.compile(r"\w\S*\s+\S*\w|\{.*\}\s+\S*\w|\w\S*\s+\S*\{", re.DOTALL)
_REMEDY = re.compile(r"(\S+\s+){3,}\S+; \w+ \S")
_TEXT = re.compile(r"\bstr\b|Problem|Diagnostic")
_LONGEST_PLACEHOLDER = 60
_Function = ast.FunctionDef | ast.AsyncFunctionDef


Key = tuple[str, str]
"""A function: the dotted name of its module, and its own."""


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    name: str
    file: str
    tree: ast.Module
    imported: dict[str, str]
    """Names that come from other modules of the product, and the module of each."""

    @cached_property
    def constants(self) -> dict[str, ast.expr]:
        """Names that are assigned in the module itself, and their values."""
        found: dict[str, ast.expr] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                found[node.target.id] = node.value
        return found

    @cached_property
    def strings(self) -> dict[str, str]:
        """Constants of the module that are plain strings."""
        return {
            name: value.value
            for name, value in self.constants.items()
            if isinstance(value, ast.Constant) and isinstance(value.value, str)
        }

    @cached_property
    def functions(self) -> list[tuple[str, _Function]]:
        """All functions with their qualified names, in the order of the source."""
        return list(_functions(self.tree))

    def sentences(self, node: ast.AST) -> Iterator[str]:
        """Yield the texts of two words or more in an expression."""
        text = self.render(node)
        if text is not None:
            if _SENTENCE.search(text):
                yield " ".join(text.split())
            for hole in self._holes(node):
                yield from (inner for inner in self.sentences(hole) if inner.count(" ") > 1)
            return
        if isinstance(node, ast.Compare):  # a text that is compared with is not shown
            return
        for child in ast.iter_child_nodes(node):
            yield from self.sentences(child)

    def render(self, node: ast.AST) -> str | None:
        """Return a string expression as text, or None for any other expression."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.JoinedStr):
            return "".join(self.render(value) or "" for value in node.values)
        if isinstance(node, ast.FormattedValue):
            return self._placeholder(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.render(node.left), self.render(node.right)
            if left is None and right is None:
                return None
            return (left or self._placeholder(node.left)) + (right or self._placeholder(node.right))
        return None

    def _holes(self, node: ast.AST) -> Iterator[ast.expr]:
        """Yield the parts of a text that are not strings, which may hold texts of their own."""
        if isinstance(node, ast.FormattedValue):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            for value in node.values:
                yield from self._holes(value)
        elif isinstance(node, ast.BinOp):
            for side in (node.left, node.right):
                yield from [side] if self.render(side) is None else self._holes(side)

    def _placeholder(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name) and node.id in self.strings:
            return self.strings[node.id]
        text = ast.unparse(node)
        holds_text = any(isinstance(part, ast.JoinedStr) for part in ast.walk(node))
        return "{" + ("..." if holds_text or len(text) > _LONGEST_PLACEHOLDER else text) + "}"


@dataclass
class Known:
    """What was found out about the product's functions."""

    makers: set[Key] = field(default_factory=set)
    """They return an exception, or put an argument into the text of an error."""
    describers: set[Key] = field(default_factory=set)
    """They return text and are called for a part of an error's."""


def collect(root: Path) -> list[str]:
    """Return the texts of the product in a folder, each after `file:function: `, by file and then order."""
    modules = _modules(root)
    every = [(module, function) for module in modules for _, function in module.functions]
    texts = {(module.name, function.name) for module, function in every if _returns(_TEXT, function)}
    errors = {(module.name, function.name) for module, function in every if _returns(_ERROR_TYPE, function)}
    known, before = Known(makers=errors), None
    while before != (before := (len(known.makers), len(known.describers))):
        for module, function in every:
            _learn(module, function, known, texts)
    return [line for module in modules for line in _lines(module, known)]


def _modules(root: Path) -> list[Module]:
    files = {module_name(file, root): file for file in python_files(root)}
    trees = {name: ast.parse(file.read_text("utf-8")) for name, file in files.items()}
    modules = [
        Module(
            name,
            str(file.relative_to(root)),
            trees[name],
            imports(trees[name], name, file.name == "__init__.py", trees),
        )
        for name, file in files.items()
    ]
    return sorted(modules, key=lambda module: module.file)


def _learn(module: Module, function: _Function, known: Known, texts: set[Key]) -> None:
    """Note which functions a function calls for its texts, and whether its arguments go into them."""
    roots = _roots(module, function, known)
    used = _names(roots)
    arguments = (*function.args.args, *function.args.kwonlyargs, *filter(None, [function.args.vararg]))
    if any(each.arg in used and each.annotation and _is_str(each.annotation) for each in arguments):
        known.makers.add((module.name, function.name))
    calls = (part for root in roots for part in ast.walk(root) if isinstance(part, ast.Call))
    known.describers |= {_callee(module, call) for call in calls} & texts


def _is_str(annotation: ast.expr) -> bool:
    return ast.unparse(annotation) in ("str", "str | None", "object")


def _callee(module: Module, call: ast.Call) -> Key:
    """Return the function that a call goes to, as far as the names in the source say."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else call.func
    source = module.imported.get(owner.id) if isinstance(owner, ast.Name) else None
    is_own = isinstance(call.func, ast.Name) or (isinstance(owner, ast.Name) and owner.id == "self")
    return source or (module.name if is_own else ""), _last(call.func)


def _lines(module: Module, known: Known) -> Iterator[str]:
    constants: set[str] = set()
    for name, function in module.functions:
        roots = [*_roots(module, function, known), *_stated_remedies(module, function)]
        constants |= _names(roots)
        inner = {id(part) for root in roots for part in ast.walk(root) if part is not root}
        outer = {id(root): root for root in roots if id(root) not in inner}.values()
        ordered = sorted(outer, key=lambda node: (node.lineno, node.col_offset))
        texts = dict.fromkeys(text for root in ordered for text in module.sentences(root))
        yield from (f"{module.file}:{name}: {text}" for text in texts)
    for name, value in module.constants.items():
        if name in constants and name not in module.strings:
            yield from (f"{module.file}:{name}: {text}" for text in dict.fromkeys(module.sentences(value)))


def _roots(module: Module, function: _Function, known: Known) -> list[ast.expr]:
    """Return the expressions of a function that make up the texts of errors."""
    nodes = _own_nodes(function)
    roots = list(_direct_roots(module, nodes, _describes(module, function, known), known))
    pending: Iterable[tuple[set[str], ast.expr]] = _assignments_of(function)
    names = _names(roots)
    while used := [pair for pair in pending if pair[0] & names]:
        pending = [pair for pair in pending if not pair[0] & names]
        values = [value for _, value in used]
        roots += values
        names |= _names(values)
    return roots


def _direct_roots(
    module: Module, nodes: Iterable[ast.AST], describes: bool, known: Known
) -> Iterator[ast.expr]:
    for node in nodes:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from _arguments(node.exc)
        elif isinstance(node, ast.Call) and _tells(module, node, known):
            yield from _arguments(node)
        elif isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) and describes and node.value:
            yield node.value


def _stated_remedies(module: Module, function: _Function) -> Iterator[ast.expr]:
    """Yield the texts of a function that have the form of an error, wherever they stand."""
    for node in _own_nodes(function):
        is_text = isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)
        if is_text and _REMEDY.search(module.render(node) or ""):
            yield node


def _describes(module: Module, function: _Function, known: Known) -> bool:
    by_name = bool(_NAME.search(function.name)) or (module.name, function.name) in known.describers
    return by_name or _returns(_RESULT, function)


@cache
def _returns(pattern: re.Pattern[str], function: _Function) -> bool:
    return function.returns is not None and bool(pattern.search(ast.unparse(function.returns)))


def _tells(module: Module, call: ast.Call, known: Known) -> bool:
    callee = _last(call.func)
    if callee in _ADDING and isinstance(call.func, ast.Attribute):
        return bool(_LIST.search(_last(call.func.value).lower()))
    return bool(_CALLEE.search(callee)) or _callee(module, call) in known.makers


@cache
def _assignments_of(function: _Function) -> tuple[tuple[set[str], ast.expr], ...]:
    return tuple(pair for node in _own_nodes(function) for pair in _assignments(node))


def _assignments(node: ast.AST) -> Iterator[tuple[set[str], ast.expr]]:
    """Yield the local names that a node gives a value to, or adds one to, and the value."""
    if isinstance(node, ast.Assign):
        names = {name for target in node.targets for name in _targets(target)}
        yield names, node.value
        yield from ((names, target.slice) for target in node.targets if isinstance(target, ast.Subscript))
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value:
        yield _targets(node.target), node.value
    elif isinstance(node, ast.For | ast.comprehension):
        yield _targets(node.target), node.iter
    elif isinstance(node, ast.Call) and _last(node.func) in _ADDING and isinstance(node.func, ast.Attribute):
        yield from ((_targets(node.func.value), value) for value in node.args)


def _targets(node: ast.expr) -> set[str]:
    if isinstance(node, ast.Tuple | ast.List):
        return {name for element in node.elts for name in _targets(element)}
    if isinstance(node, ast.Subscript | ast.Starred):
        return _targets(node.value)
    return {node.id} if isinstance(node, ast.Name) else set()


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, _Function]]:
    """Yield all functions with their qualified names, in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr):
            continue
        if isinstance(node, _Function):
            yield prefix + node.name, node
        inside = prefix + node.name + "." if isinstance(node, _Function | ast.ClassDef) else prefix
        yield from _functions(node, inside)


@cache
def _own_nodes(function: _Function) -> tuple[ast.AST, ...]:
    """Return the nodes of a function's body without its docstring and the functions inside it."""
    found: list[ast.AST] = []
    pending: list[ast.AST] = list(function.body[ast.get_docstring(function) is not None :])
    while pending:
        node = pending.pop()
        found.append(node)
        if not isinstance(node, _Function | ast.ClassDef):
            pending += ast.iter_child_nodes(node)
    return tuple(found)


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _names(nodes: list[ast.expr]) -> set[str]:
    return {part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name)}


def _last(node: ast.expr) -> str:
    """Return the last part of a dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def golden_text(root: Path = ROOT) -> str:
    """Return what the golden file should hold."""
    return "".join(line + "\n" for line in collect(root))


def main(arguments: list[str]) -> None:
    """Print the texts, or write them into the golden file."""
    if arguments == ["--write"]:
        GOLDEN.write_text(golden_text(), encoding="utf-8")
    else:
        sys.stdout.write(golden_text())


if __name__ == "__main__":
    main(sys.argv[1:])
