"""Suites: real shapes, shipped as JSON beside this file, and the problems they stand for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..errors import DepthwiseError
from ..problem import DTYPE_BYTES, DepthwiseProblem, Direction, Layout

SUITES = ("kernelbench", "models")
LAYOUTS: tuple[Layout, ...] = ("channels_first", "channels_last")
FEW = 12  # problems: so many are timed with every variant, more of them with dwconv's choice only
DIRECTIONS: tuple[Direction, ...] = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True, slots=True)
class Case:
    """One layer of a suite, in every dtype, layout and direction that it is used in.

    Attributes:
        input: N, C and the spatial sizes.
        padding: zeros before and after each dimension; only before, if causal.
        source: where the layer comes from.
    """

    name: str
    input: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    multiplier: int
    bias: bool
    dtypes: tuple[str, ...]
    layouts: tuple[Layout, ...]
    directions: tuple[Direction, ...]
    causal: bool
    source: str

    def problem(self, dtype: str, layout: Layout, direction: Direction) -> DepthwiseProblem:
        """The case as one problem.

        Raises:
            DepthwiseError: the suite's numbers describe no convolution.
        """
        return DepthwiseProblem(
            batch=self.input[0],
            channels=self.input[1],
            size=self.input[2:],
            filter=self.kernel_size,
            stride=self.stride,
            padding=tuple((before, 0 if self.causal else before) for before in self.padding),
            dilation=self.dilation,
            multiplier=self.multiplier,
            bias=self.bias,
            dtype=dtype,
            layout=layout,
            direction=direction,
        )


def load_suite(name: str) -> tuple[Case, ...]:
    """The cases of a suite.

    Raises:
        DepthwiseError: there is no suite of this name.

    >>> load_suite("kernelbench")[0].name
    '82_square_square'
    """
    if name not in SUITES:
        raise DepthwiseError(f"suite={name!r} is unknown: use one of {', '.join(SUITES)}")
    text = resources.files(__package__).joinpath("suites", f"{name}.json").read_text(encoding="utf-8")
    cases: list[dict[str, Any]] = json.loads(text)["cases"]
    return tuple(Case(**{key: _frozen(value) for key, value in case.items()}) for case in cases)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def select(
    cases: Iterable[Case],
    names: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    layouts: Iterable[Layout] = (),
    directions: Iterable[Direction] = ("forward",),
) -> Iterator[tuple[str, DepthwiseProblem]]:
    """(name, problem) of the cases whose name contains one of `names`, in the dtypes, layouts and directions asked for.

    An empty choice takes all that the suite lists.

    Raises:
        DepthwiseError: nothing is left.
    """
    wanted, dtypes, layouts, directions = tuple(names), tuple(dtypes), tuple(layouts), tuple(directions)
    for dtype in dtypes:
        if dtype not in DTYPE_BYTES:
            raise DepthwiseError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPE_BYTES)}")
    found = False
    for case in cases:
        if wanted and not any(part in case.name for part in wanted):
            continue
        for dtype in dtypes or case.dtypes:
            for layout in layouts or case.layouts:
                for direction in directions or case.directions:
                    found = True
                    yield case.name, case.problem(dtype, layout, direction)
    if not found:
        raise DepthwiseError(f"no case's name contains {' or '.join(wanted)}: use --list to see the suite's cases")
