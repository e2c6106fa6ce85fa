"""Every environment variable that dwconv reads, in one table; `dwconv env` prints it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import DepthwiseError


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable.

    Attributes:
        name: as it is set in the environment.
        default: what an unset or empty variable means.
        sentence: what it does.
    """

    name: str
    default: Callable[[], str]
    sentence: str


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `dwconv env`; value is None where the variable is not set."""

    name: str
    value: str | None
    default: str
    sentence: str


def _cache_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return str((Path(base) if base.startswith("/") else Path("~/.cache").expanduser()) / "dwconv")


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        Variable(
            "DWCONV_CACHE_DIR",
            _cache_folder,
            "The folder that keeps compiled kernels; by default dwconv in XDG_CACHE_HOME or ~/.cache.",
        ),
        Variable(
            "DWCONV_CACHE_LIMIT",
            lambda: "512",
            "The most MiB that compiled kernels may take; beyond, those unused for longest go; 0 turns the disk off.",
        ),
        Variable(
            "DWCONV_NVRTC",
            lambda: "",
            "The file of the compiler, libnvrtc.so; by default the one that cuda-bindings finds.",
        ),
        Variable("DWCONV_CXX", lambda: "g++", "The C++ compiler that builds kernels for the emulator."),
        Variable(
            "DWCONV_EMULATOR_OPTIMIZE",
            lambda: "2",
            "How g++ optimizes kernels for the emulator, -O0 to -O3; dwconv's tests take 0: many small problems.",
        ),
        Variable(
            "DWCONV_EMULATOR_SANITIZE",
            lambda: "0",
            "1 builds kernels for the emulator with AddressSanitizer and UBSan, about ten times slower.",
        ),
        Variable(
            "DWCONV_EMULATOR_THREADS",
            lambda: str(os.cpu_count() or 1),
            "The CPU threads that the emulator uses; by default one for each core.",
        ),
    )
}


@cache
def read(name: str) -> str:
    """The value of a variable, or its default. Read once: later changes of the environment have no effect.

    >>> read("DWCONV_CXX") == os.environ.get("DWCONV_CXX", "g++")
    True
    """
    variable = VARIABLES[name]
    return os.environ.get(name) or variable.default()


def read_integer(name: str) -> int:
    """The value of a variable that is a number, 0 or more.

    Raises:
        DepthwiseError: it is something else.
    """
    value = read(name)
    if not (value.isascii() and value.isdigit()):
        raise DepthwiseError(f"{name}={value!r} is not a whole number, 0 or more: set another value, or unset it")
    return int(value)


def forget() -> None:
    """Makes `read` look at the environment again: for tests."""
    read.cache_clear()


def describe() -> list[Row]:
    """The table, as rows for `dwconv env`."""
    return [
        Row(variable.name, os.environ.get(variable.name) or None, variable.default(), variable.sentence)
        for variable in VARIABLES.values()
    ]
