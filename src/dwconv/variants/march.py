"""How blocks of gradients of filters share a problem by marching over lines of outputs: see kernels/taps_lines.cuh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ..device import DeviceSpec
from ..plan import Plan, Rejection, TensorMap, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from .base import GRID_X_LIMIT
from .parts import gathered
from .strips import divided, reached, too_deep, too_long, up


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a problem: along the march, or across. Sizes in elements.

    Attributes:
        classes: of outputs that share no products, each with inputs of its own.
        stride: of inputs inside a class, where taps are neighbours.
    """

    size: int
    out: int
    filter: int
    padding: int
    apart: int
    classes: int
    stride: int

    @property
    def step(self) -> int:
        """Inputs from one output to the next one, of all classes."""
        return self.stride * self.apart // self.classes

    @property
    def reached(self) -> float:
        """The share of pairs of outputs and taps that meet an input."""
        return reached(self.filter, self.apart, self.size, self.step, self.padding, self.out)


@lru_cache(maxsize=64)
def axes(problem: DepthwiseProblem, turned: bool) -> tuple[Axis, Axis]:
    """The axis of the march, and the one across.

    >>> problem = DepthwiseProblem(1, 8, (9, 33), (3, 3), stride=(1, 2), dilation=(1, 6), direction="grad_weight")
    >>> axes(problem, False)[1].classes, axes(problem, False)[1].stride
    (3, 1)
    """

    def axis(k: int) -> Axis:
        stride, dilation = problem.stride[k], problem.dilation[k]
        common = math.gcd(stride, dilation)
        return Axis(
            problem.size[k],
            problem.out_size[k],
            problem.filter[k],
            problem.padding[k][0],
            dilation,
            dilation // common,
            stride // common,
        )

    return (axis(1), axis(0)) if turned else (axis(0), axis(1))


@dataclass(frozen=True, slots=True)
class March:
    """How blocks share a problem, whose images are planes.

    Attributes:
        tap_tiles: tiles of taps; groups: of channels.
        column_tiles: of one class of columns.
        lines, super_lines: of one class of rows; line_rows: positions of a super-line.
        positions: of all super-lines.
        parts, part_rows: blocks of a group and tile of taps; positions of each.
    """

    tap_tiles: int
    groups: int
    column_tiles: int
    lines: int
    super_lines: int
    line_rows: int
    positions: int
    parts: int
    part_rows: int

    @property
    def blocks(self) -> int:
        return self.tap_tiles * self.groups * self.parts


def march(
    batch: int,
    along: Axis,
    across: Axis,
    *,
    line_outputs: int,
    lines: int,
    groups: int,
    tap_tiles: int,
    least_rows: int,
    slots: int,
    whole_lines: bool = False,
) -> March:
    """Shares a problem among about `slots` blocks.

    Args:
        lines: of a super-line, of line_outputs each.
        least_rows: of a part: its first ones are read twice.
        whole_lines: parts begin and end with super-lines, if there are enough of those.
    """
    column_tiles = divided(divided(across.out, across.classes), line_outputs)
    all_lines = batch * across.classes * column_tiles
    super_lines = divided(max(1, all_lines), lines)
    line_rows = divided(along.out, along.classes)
    positions = along.classes * super_lines * line_rows
    per_group = max(1, slots // (groups * tap_tiles))
    part_rows = max(divided(positions, per_group), min(positions, line_rows, least_rows))
    if whole_lines:
        part_rows = max(line_rows, part_rows // line_rows * line_rows)
    whole = up(part_rows, line_rows)  # super-lines, where that costs little
    part_rows = whole if whole <= 1.1 * part_rows else part_rows
    return March(
        tap_tiles=tap_tiles,
        groups=groups,
        column_tiles=column_tiles,
        lines=all_lines,
        super_lines=super_lines,
        line_rows=line_rows,
        positions=positions,
        parts=divided(positions, part_rows),
        part_rows=part_rows,
    )


def unmarchable(problem: DepthwiseProblem, planes: DepthwiseProblem) -> str | None:
    """Why the kernels can't number a problem's rows and taps; `planes` is the planar one."""
    if reason := too_deep(problem) or too_long(planes):
        return reason
    if max(planes.size) + max(map(max, planes.padding)) >= 2**29 or max(planes.stride + planes.dilation) >= 2**12:
        return "rows and taps are too far apart for 32-bit numbers"
    return None


def marching_plan(
    variant: str,
    problem: DepthwiseProblem,
    device: DeviceSpec,
    shared: March,
    tile: str,
    constants: Mapping[str, int | str],
    *,
    warps: int,
    shared_bytes: int,
    count: int,
    predicted_seconds: float,
    maps: tuple[TensorMap, ...] = (),
) -> Plan | Rejection:
    """The plan of blocks of `warps` that leave `count` sums each, or why they are too many."""
    blocks = shared.blocks
    if blocks > GRID_X_LIMIT or max(shared.positions, shared.lines, blocks) + shared.part_rows >= 2**31:
        return Rejection(variant, tile, "there are too many rows to number them in 31 bits")
    depths = problem.out_size[0] if problem.dims == 3 else 1
    of_gatherer, _ = gathered(count * problem.sum_bytes // 16, 32 * warps, shared.parts)
    gatherers = divided(shared.parts, of_gatherer)
    divisors = (
        shared.tap_tiles,
        shared.groups,
        shared.line_rows,
        shared.super_lines,
        shared.column_tiles,
        depths,
    )
    several = shared.parts > 1
    return Plan(
        problem=problem,
        device=device,
        variant=variant,
        constants=tuple(sorted((problem_constants(problem) | dict(constants)).items())),
        grid=(blocks, 1, 1),
        block=(32 * warps, 1, 1),
        shared_bytes=shared_bytes,
        sizes=problem_sizes(problem),
        tiling=(
            problem.batch * depths,
            shared.lines,
            shared.parts,
            shared.part_rows,
            shared.positions,
            of_gatherer,
            *(field for divisor in divisors for field in fast_divisor(divisor)),
        ),
        tile=tile,
        predicted_seconds=predicted_seconds,
        partial_bytes=blocks * count * problem.sum_bytes if several else 0,
        arrivals=shared.tap_tiles * shared.groups * (1 if gatherers == 1 else gatherers + 1) if several else 0,
        maps=maps,
    )
