"""Turns the text of a model file into that of its twin: `Model` becomes `ModelNew`, all else stays as it was."""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from dataclasses import dataclass

from ..errors import DepthwiseError
from .model_file import ModelFile

OLD, NEW = "Model", "ModelNew"

# What a judge's static check rejects anywhere outside of comments.
FORBIDDEN = re.compile(r"\btry\s*:|\bexcept\b|\bpass\b")
_REWORDED = (
    (re.compile(r"\b([Ff]orward|[Bb]ackward) pass\b"), r"\1 computation"),
    (re.compile(r"\bpass\b"), "hand"),
    (re.compile(r"\bexcept\b"), "but"),
    (re.compile(r"\btry\s*:"), "try,"),
)


@dataclass(frozen=True)
class TwinSource:
    """The twin's text in two parts, between which the kernels go.

    Attributes:
        before: everything up to the model class (and the comments that belong to it).
        model: the class and what follows.
        forbidden: lines of the original that a judge's static check rejects and that can't be reworded.
    """

    before: str
    model: str
    forbidden: tuple[str, ...]


@dataclass(frozen=True, order=True)
class _Edit:
    start: int  # in characters
    end: int
    text: str


class _Positions:
    """From ast's line and UTF-8 column to a character of the text."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, byte_column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:byte_column].decode())

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.at(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.at(node.end_lineno, node.end_col_offset)

    def line_of(self, character: int) -> int:
        return next(number for number, start in enumerate(self.starts) if start > character)


def twin_source(file: ModelFile, switch: str) -> TwinSource:
    """The twin's text. `switch` is the function that the constructor calls at its end, on the new model.

    Raises:
        DepthwiseError: the file already has a ModelNew, or refers to Model where it can't be renamed.
    """
    source = file.source if file.source.endswith("\n") else file.source + "\n"
    if NEW in identifiers(source):
        raise DepthwiseError(f"{file.path} already uses the name {NEW}, which the twin needs: rename it there")
    positions = _Positions(source)
    edits = [
        *_renamings(file, source, positions),
        *_switching(file.model_class, switch, source, positions),
        *_rewordings(file.tree, source, positions),
    ]
    cut = _beginning(file.model_class, positions)
    before = _apply(source[:cut], [edit for edit in edits if edit.start < cut], 0)
    model = _apply(source[cut:], [edit for edit in edits if edit.start >= cut], cut)
    forbidden = tuple(
        f"line {number}: {match.group()}"
        for number, line in enumerate((before + model).splitlines(), 1)
        if (match := FORBIDDEN.search(line.split("#")[0].split("//")[0]))
    )
    return TwinSource(before, model, forbidden)


def identifiers(source: str) -> set[str]:
    """Every name that a Python text uses."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME and not keyword.iskeyword(token.string)}


def _apply(text: str, edits: list[_Edit], offset: int) -> str:
    for edit in sorted(edits, reverse=True):
        text = text[: edit.start - offset] + edit.text + text[edit.end - offset :]
    return text


def _renamings(file: ModelFile, source: str, positions: _Positions) -> list[_Edit]:
    """Model -> ModelNew in class statements and wherever the name is used."""
    edits = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Name) and node.id == OLD:
            start = positions.start(node)
            if source[start : start + len(OLD)] != OLD:
                raise DepthwiseError(
                    f"{file.path}, line {node.lineno} refers to {OLD} inside an f-string, where this Python can't say "
                    "at which place: use another way to write it"
                )
        elif isinstance(node, ast.ClassDef) and node.name == OLD and node in file.tree.body:
            found = re.compile(rf"class\s+({OLD})\b").match(source, positions.start(node))
            assert found is not None
            start = found.start(1)
        else:
            continue
        edits.append(_Edit(start, start + len(OLD), NEW))
    return edits


def _switching(model: ast.ClassDef, switch: str, source: str, positions: _Positions) -> list[_Edit]:
    """The line at the end of the constructor, and before every early return."""
    constructors = [node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    if not constructors:
        return [_new_constructor(model, switch, source, positions)]
    constructor = constructors[-1]
    arguments = [*constructor.args.posonlyargs, *constructor.args.args]
    call = f"{switch}({arguments[0].arg if arguments else 'self'})"
    edits = [
        _Edit(positions.start(node), positions.end(node), f"return {call}") for node in _own_returns(constructor.body)
    ]
    last = constructor.body[-1]
    if isinstance(last, ast.Return):
        return edits
    end = positions.end(last)
    body = constructor.body[0]
    if body.lineno == constructor.lineno or _before(source, positions.start(body)).strip():
        edits.append(_Edit(end, end, f"; {call}"))  # def __init__(self): super().__init__()
    else:
        assert last.end_lineno is not None
        line_end = positions.starts[last.end_lineno]
        edits.append(_Edit(line_end, line_end, _before(source, positions.start(body)) + call + "\n"))
    return edits


def _new_constructor(model: ast.ClassDef, switch: str, source: str, positions: _Positions) -> _Edit:
    """A constructor for a class that inherits its parent's: after the docstring, before all else."""
    first = model.body[0]
    indent = _before(source, positions.start(first))
    if indent.strip():  # class Model(Base): ...
        indent = "    "
    text = (
        f"{indent}def __init__(self, *args, **kwargs):\n"
        f"{indent}    super().__init__(*args, **kwargs)\n"
        f"{indent}    {switch}(self)\n"
    )
    if first.lineno == model.lineno:
        end = positions.end(model)
        return _Edit(positions.start(first), end, "\n" + text.rstrip("\n"))
    if _is_text(first):
        assert first.end_lineno is not None
        place = positions.starts[first.end_lineno]
        return _Edit(place, place, "\n" + text)
    decorators = getattr(first, "decorator_list", [])
    place = positions.starts[min([first.lineno, *(d.lineno for d in decorators)]) - 1]
    return _Edit(place, place, text + "\n")


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a string by itself: a docstring, or text in its place."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _own_returns(body: list[ast.stmt]) -> list[ast.Return]:
    """Return statements of a function, but not those of functions and classes inside it."""
    returns = []
    for node in body:
        if isinstance(node, ast.Return):
            returns.append(node)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for name in ("body", "orelse", "finalbody"):
                returns += _own_returns(getattr(node, name, []))
            for branch in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
                returns += _own_returns(branch.body)
    return returns


def _before(source: str, character: int) -> str:
    """What stands before a character on its line."""
    return source[source.rfind("\n", 0, character) + 1 : character]


def _rewordings(tree: ast.Module, source: str, positions: _Positions) -> list[_Edit]:
    """`pass` statements become `...`; docstrings say forbidden words in others."""
    edits = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Pass):
            edits.append(_Edit(positions.start(node), positions.end(node), "..."))
        elif isinstance(node, ast.Expr) and _is_text(node):
            start, end = positions.start(node), positions.end(node)
            text = source[start:end]
            for pattern, replacement in _REWORDED:
                text = pattern.sub(replacement, text)
            if text != source[start:end]:
                edits.append(_Edit(start, end, text))
    return edits


def _beginning(model: ast.ClassDef, positions: _Positions) -> int:
    """Where the model class begins, with its decorators and the comment lines directly above."""
    line = min([model.lineno, *(decorator.lineno for decorator in model.decorator_list)])
    while line > 1 and positions.lines[line - 2].startswith("#"):
        line -= 1
    return positions.starts[line - 1]
