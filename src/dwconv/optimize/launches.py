"""The parts of exported files that are C++ already: how kernels are launched, and the operator that does it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources

from ..sources import kernel_source


def host_text(name: str) -> str:
    """A part that exported files are made of."""
    return (resources.files(__package__) / "host" / name).read_text(encoding="utf-8")


def has_launch(stem: str) -> bool:
    """Whether a variant has its launch in C++, and so may stand in an exported file."""
    return (resources.files(__package__) / "host" / f"{stem}.cuh").is_file()


def launch_texts(stems: Iterable[str]) -> list[str]:
    """The host's side of these variants: what all launches share, what their kernels' includes share, and their own."""
    stems = list(stems)
    included = (name for stem in stems for name, _ in kernel_source(stem).includes)
    names = dict.fromkeys(["launch.cuh", *included, *(f"{stem}.cuh" for stem in stems)])
    folder = resources.files(__package__) / "host"
    return [host_text(name) for name in names if (folder / name).is_file()]
