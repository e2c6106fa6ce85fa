"""Tiles of variants whose kernels march over lines of outputs as matrices, and how they divide a problem."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .march import Axis, March, axes
from .strips import divided, up


@dataclass(frozen=True, slots=True)
class Tile:
    """What is compiled in.

    Attributes:
        turned: the march goes along the rows of the image, else down its columns.
        taps: of a block, along the march and across.
        groups: of eight neighbouring outputs, of a line.
        lines: of a step.
        own: channels of a warp.
        warps: of a block.
        stages: of shared memory; all but one are being filled.
        min_blocks: blocks that a multiprocessor shall hold, which limits a thread's registers.
        cached: copies go through L1.
        boxes: lines come by one copy each, of the copy engine; else by all threads' copies.
    """

    turned: bool
    taps: tuple[int, int]
    groups: int
    lines: int
    own: int
    warps: int = 8
    stages: int = 4
    min_blocks: int = 1
    cached: bool = True
    boxes: bool = False

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.own * self.warps

    def __str__(self) -> str:
        copied = ", boxes" if self.boxes else "" if self.cached else ", past L1"
        ways = f"{', along rows' if self.turned else ''}{copied}"
        return (
            f"{self.taps[0]}×{self.taps[1]} taps, {self.lines} lines of {self.groups}·8 outputs, {self.warps} warps of "
            f"{self.own} channels, {self.stages} stages{ways}"
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tile's rows lie in shared memory; the kernels compute the same.

    Attributes:
        lead: positions before a window that make copies aligned.
        width: of the image, where it is one line wide, else 0.
        x_bytes, g_bytes: of a copy; x_pieces, g_pieces: that a thread copies of a row.
        box_columns: of a line's row that comes as a box, of x and of g.
        stage_bytes, gate_bytes: of a block, for each stage; flying_bytes: of them that are copied.
        together_bytes: that stand together in memory.
        products: of matrices, for a row of taps and all channels of a warp.
        loads: instructions of a warp for the fragments of a row of x, and of one of g; wavefronts: of shared memory.
        registers: of a thread for sums, rows of g and fragments.
    """

    lead: int
    width: int
    x_bytes: int
    g_bytes: int
    x_pieces: int
    g_pieces: int
    stage_bytes: int
    gate_bytes: int
    flying_bytes: int
    together_bytes: float
    products: int
    loads: tuple[float, float]
    wavefronts: tuple[float, float]
    registers: int
    box_columns: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Cut:
    """What a tile means for a problem.

    Attributes:
        layout: of its rows in shared memory.
        live: rows of g that a row of x may meet; rows: of x, in a step.
        shared_bytes: of a block.
        count: sums of a block, as whole vectors.
        resident: blocks that a multiprocessor holds.
        march: how blocks share the problem.
    """

    layout: Layout
    live: int
    rows: int
    shared_bytes: int
    count: int
    resident: int
    march: March


def across_axis(problem: DepthwiseProblem, turned: bool) -> Axis:
    """The axis across the march; channels first its columns stay together, and taps lie apart."""
    across = axes(problem, turned)[1]
    if problem.layout == "channels_last":
        return across
    return replace(across, apart=1, classes=1, stride=problem.stride[1])


def narrow(problem: DepthwiseProblem, tile: Tile, first: int, line_chunks: int) -> bool:
    """Whether images are one line wide, so that only positions that exist need be copied; `first` is the first one."""
    across = across_axis(problem, tile.turned)
    one_line = across.classes == 1 and across.apart == 1 and across.out <= 8 * tile.groups
    return one_line and tile.taps[1] == across.filter and first < 8 * line_chunks


def line_shapes(width: int, most: int) -> Iterator[tuple[int, int]]:
    """Groups of eight outputs of a line, and lines, that make up most of `most` groups.

    >>> list(line_shapes(56, 16)), list(line_shapes(14, 16)), list(line_shapes(300, 16))
    ([(7, 2)], [(2, 8)], [(8, 2), (5, 3), (16, 1)])
    """
    eights = divided(width, 8)
    if eights <= most:
        yield eights, most // eights
        return
    found = []
    for groups in range(5, most + 1):
        lines = most // groups
        used = eights / (groups * divided(eights, groups)) * groups * lines / most
        found.append((-used, -groups, lines))
    for _, groups, lines in sorted(found)[:3]:
        yield -groups, lines


def tap_rows(taps: int, most: int) -> list[int]:
    """Rows of taps of a tile: as many as fit, and fewer that leave no more out.

    >>> tap_rows(7, 7), tap_rows(31, 8)
    ([7], [8, 7])
    """
    tiles = divided(taps, most)
    return [divided(taps, tiles)] + ([divided(taps, tiles + 1)] if tiles > 1 else [])


def spans(problem: DepthwiseProblem, tile: Tile) -> tuple[int, int]:
    """How far the elements of a step lie apart in x, and in g, at most."""
    image, channel, *steps = problem.plane_strides
    in_x = sum(abs(step) * size for step, size in zip(steps, problem.size, strict=True))
    plane = math.prod(problem.out_size)
    in_g = plane * (problem.out_channels if problem.layout == "channels_last" else tile.channels)
    images = min(tile.lines, problem.batch)
    of_x = (images - 1) * abs(image) + in_x + abs(channel) * tile.channels
    return of_x, (images - 1) * plane * problem.out_channels + in_g


def with_residents(
    device: DeviceSpec, shape: Tile, registers: int, stage_bytes: int, most_stages: int
) -> Iterator[Tile]:
    """The tile with numbers of blocks of a multiprocessor, each with as many stages as fit beside each other."""
    # A block has registers for a multiple of four warps.
    most = min(device.registers // (32 * up(shape.warps, 4) * up(registers, 8)), device.threads // (32 * shape.warps))
    if registers > 248 or most == 0:
        return
    for blocks in sorted({most, max(1, most // 2)}):
        stages = min(most_stages, (device.shared_bytes // blocks - 1024) // stage_bytes)
        for fewer in sorted({stages, 4, 3}):
            if 3 <= fewer <= stages:  # two lost in all of some thirty problems
                yield replace(shape, stages=fewer, min_blocks=blocks)
