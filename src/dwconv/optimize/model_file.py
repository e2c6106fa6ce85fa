"""Reads a model file in KernelBench's format and makes its model and inputs."""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DepthwiseError

SEED = 42
MODULE_NAME = "builtins"  # the __name__ that such files see when they are judged


@dataclass(frozen=True)
class ModelFile:
    """A loaded model file.

    Attributes:
        path: where it was read from.
        source: its text.
        tree: its syntax tree.
        namespace: its module-level names, after it was run.
    """

    path: Path
    source: str
    tree: ast.Module
    namespace: dict[str, Any]

    @property
    def model_class(self) -> ast.ClassDef:
        """The class statement of `Model`; the last one counts."""
        return [node for node in self.tree.body if isinstance(node, ast.ClassDef) and node.name == "Model"][-1]


def load(path: Path) -> ModelFile:
    """Reads and runs a model file, and checks that it holds what the format asks for.

    Raises:
        DepthwiseError: there is no such file, it doesn't parse or run, or a part is missing.
    """
    try:
        source = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except FileNotFoundError:
        raise DepthwiseError(f"{path} doesn't exist: give the path of a file that defines Model") from None
    except IsADirectoryError:
        raise DepthwiseError(f"{path} is a directory: give the path of a file that defines Model") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DepthwiseError(f"{path} can't be read as UTF-8 text ({error})") from error
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise DepthwiseError(f"{path}{line} is not valid Python: {reason}") from error
    namespace = run_source(source, str(path), {})
    file = ModelFile(path, source, tree, namespace)
    _check_parts(file)
    return file


def run_source(source: str, name: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Runs a file's text as the judges do: in a namespace that may be shared, with no `__file__`.

    Raises:
        DepthwiseError: it raises.
    """
    namespace.setdefault("__name__", MODULE_NAME)
    try:
        exec(compile(source, name, "exec"), namespace)
    except (Exception, SystemExit) as error:
        raise DepthwiseError(f"{name} can't be run: {said(error)}") from error
    return namespace


def _check_parts(file: ModelFile) -> None:
    model = file.namespace.get("Model")
    if model is None:
        raise DepthwiseError(
            f"{file.path} defines no Model: it must have `class Model(torch.nn.Module)`, `get_inputs()` and "
            "`get_init_inputs()`"
        )
    if not (isinstance(model, type) and issubclass(model, torch.nn.Module)):
        raise DepthwiseError(f"Model in {file.path} is no torch.nn.Module: derive it from torch.nn.Module")
    if not any(isinstance(node, ast.ClassDef) and node.name == "Model" for node in file.tree.body):
        raise DepthwiseError(
            f"Model in {file.path} is not defined by a class statement at the top level of the file, where it could be "
            "rewritten: put `class Model(...)` there"
        )
    for name, gives in (
        ("get_inputs", "the list of inputs for Model.forward"),
        ("get_init_inputs", "the list of arguments for Model's constructor (empty if it takes none)"),
    ):
        if not callable(file.namespace.get(name)):
            raise DepthwiseError(f"{file.path} defines no {name}(): add a function that returns {gives}")


def construct(file: ModelFile, model: Any, seed: int = SEED) -> torch.nn.Module:
    """An instance of a model class with the file's constructor arguments, drawn from a seed as the judges do it.

    Raises:
        DepthwiseError: get_init_inputs or the constructor raises.
    """
    name = f"{model.__name__}'s constructor"
    try:
        seed_everything(seed)
        arguments = file.namespace["get_init_inputs"]()
        seed_everything(seed)
        made = model(**arguments) if isinstance(arguments, dict) else model(*arguments)
    except Exception as error:
        raise DepthwiseError(f"{name} raises with the arguments of get_init_inputs(): {said(error)}") from error
    assert isinstance(made, torch.nn.Module)
    return made


def make_inputs(file: ModelFile, seed: int = SEED) -> list[Any]:
    """What get_inputs() returns after a seed.

    Raises:
        DepthwiseError: it raises, or returns no list.
    """
    seed_everything(seed)
    try:
        inputs = file.namespace["get_inputs"]()
    except Exception as error:
        raise DepthwiseError(f"get_inputs() in {file.path} raises {said(error)}") from error
    if not isinstance(inputs, (list, tuple)):
        raise DepthwiseError(
            f"get_inputs() in {file.path} returns {type(inputs).__name__}: let it return a list, one entry for each "
            "argument of Model.forward"
        )
    return list(inputs)


def seed_everything(seed: int) -> None:
    """Seeds Python's and PyTorch's generators."""
    random.seed(seed)
    torch.manual_seed(seed)


def said(error: BaseException) -> str:
    """An exception as a clause: its type, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
