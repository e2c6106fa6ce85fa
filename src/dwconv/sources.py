"""The kernel files, as the compilers, the exporter and the emulator need them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from .errors import DepthwiseError

BORDER = "// ---- border:"
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)".*\n?', re.MULTILINE)
_PRAGMA_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once.*\n?", re.MULTILINE)


@dataclass(frozen=True)
class KernelSource:
    """One kernel file with everything it includes.

    Attributes:
        stem: the variant, "direct_nchw".
        text: the whole file.
        includes: (name, text) of every file included by name in quotes, also by other includes, each once, an
            included file before the one that includes it.
    """

    stem: str
    text: str
    includes: tuple[tuple[str, str], ...]

    @property
    def template(self) -> str:
        """What stands above the border, without its `#include "..."` and `#pragma once` lines: templates only."""
        above = self.text[: self._border_start()]
        return without_includes(above)

    @property
    def border(self) -> str:
        """From the border line on: the defaults, `Config`, `Tiling` and the entry."""
        return self.text[self._border_start() :]

    def _border_start(self) -> int:
        found = re.search(f"^{re.escape(BORDER)}", self.text, re.MULTILINE)
        if found is None:
            raise DepthwiseError(
                f"kernels/{self.stem}.cuh has no line that starts with {BORDER!r}: put it between the templates and "
                "the -D defines"
            )
        return found.start()


def without_includes(text: str) -> str:
    """The text without its lines `#include "..."` and `#pragma once`: for joining files into one.

    >>> without_includes('#pragma once\\n#include "common.cuh"\\nint a;\\n')
    'int a;\\n'
    """
    return _PRAGMA_ONCE.sub("", _INCLUDE.sub("", text))


@cache
def kernel_source(stem: str) -> KernelSource:
    """The kernel of a variant.

    Raises:
        DepthwiseError: a file is missing.

    >>> source = kernel_source("direct_nchw")
    >>> source.includes[0][0], source.border.splitlines()[0][:14]
    ('elements.cuh', '// ---- border')
    """
    text = _read(f"{stem}.cuh")
    found: dict[str, str] = {}
    _collect(text, found)
    return KernelSource(stem, text, tuple(found.items()))


def _collect(text: str, found: dict[str, str], inside: tuple[str, ...] = ()) -> None:
    for name in _INCLUDE.findall(text):
        if name not in found and name not in inside:
            included = _read(name)
            _collect(included, found, (*inside, name))
            found[name] = included


def _read(name: str) -> str:
    try:
        return (resources.files("dwconv") / "kernels" / name).read_text(encoding="utf-8")
    except OSError as error:
        raise DepthwiseError(
            f"the kernel file kernels/{name} can't be read ({error.strerror}): install dwconv again"
        ) from error
