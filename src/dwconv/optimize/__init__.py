"""`dwconv optimize`: from a model file to a self-contained one with faster, verified depthwise layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def run(
    path: str | Path,
    out: str | Path | None = None,
    arch: str | None = None,
    bench: bool = True,
    json_path: str | Path | None = None,
    console: Console | None = None,
) -> int:
    """Writes the faster twin of a model file, verifies it, and reports. Returns 0, or 1 if verification failed.

    Args:
        path: a file in KernelBench's format: `Model`, `get_inputs`, `get_init_inputs`.
        out: what to write; default the file's name with `_dwconv` added, in the current directory. An existing file
            is replaced only by a complete, verified one.
        arch: "sm_90"; default the GPU of this machine, or "sm_90" where there is none.
        bench: whether to time the result, where there is a GPU.
        json_path: where to write all figures as JSON.
        console: where progress and the report are shown; default the terminal.

    Raises:
        DepthwiseError: the file can't be loaded or run, or holds no depthwise layer. Nothing is written.
    """
    from .flow import optimize

    out, json_path = (None if place is None else Path(place) for place in (out, json_path))
    return optimize(Path(path), out, arch, bench, json_path, console)


__all__ = ["run"]
