"""What a tile of taps_nchw is, what it reads, and the stages and parts that a problem is cut into for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..problem import DepthwiseProblem
from .strips import divided, up

HEAD_BYTES = 48  # of shared memory, before the stages, for each of them: two gates and a note
MOST_STAGES = 4
AT_ONCE = 16  # sums of each thread that are added up at once, or more where stages have taken the room for them


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices.

    Attributes:
        rows, columns: outputs of a tile, which a thread has in registers.
        tap_rows, tap_columns: taps whose sums it has.
        threads: of a block that have tiles.
        parts: blocks of a group of channels; 0 for as many as keep all multiprocessors equally busy.
    """

    rows: int
    columns: int
    tap_rows: int
    tap_columns: int
    threads: int = 128
    parts: int = 0

    @property
    def taps(self) -> int:
        return self.tap_rows * self.tap_columns

    def __str__(self) -> str:
        return (
            f"{self.rows} × {self.columns} outputs and {self.tap_rows} × {self.tap_columns} taps a thread, "
            f"{self.threads} threads{f', {self.parts} parts' if self.parts else ''}"
        )


@dataclass(frozen=True, slots=True)
class Pitches:
    """Where x or g stands in a stage: steps in elements, congruent to those of memory modulo 16 bytes.

    Attributes:
        image, plane, row: steps.
        merged: whether whole planes of neighbouring channels are one stretch.
        team: threads that copy one line.
        elements: in all.
    """

    image: int
    plane: int
    row: int
    merged: bool
    team: int
    elements: int
    line_bytes: int

    @property
    def fields(self) -> tuple[int, ...]:
        return self.image, self.plane, self.row, int(self.merged)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The stages and parts of a problem.

    Attributes:
        channels, images: input channels, images of a stage.
        row_tiles, column_tiles: of a band of a plane; row_lanes: of threads that share its rows of tiles.
        row_bands, column_bands: of a plane.
        tap_tiles, tap_tile_columns: of a filter, in all and side by side.
        depth_taps: of filters of volumes, whose planes count as images for each tap; else 1.
        groups, parts: of the grid: groups of channels, as many times as depth_taps; units: stages of a group,
            part_units: of a block.
        read_x, read_g: elements that one read of shared memory brings.
        reach: rows, columns of padding below and right of x that outputs read.
        scratch: sums of a block in shared memory.
        blocks: that a multiprocessor holds.
        used: threads of a block that have a tile.
        bulk: whether a warp of its own sends stages; threads: of a block, with that warp.
        stages: that a block has room for.
        cluster: 2 where the two parts of each group are a cluster, else 1.
        align: bytes modulo which lines stand as in memory.
        read_clocks: of shared memory, for a warp's read of x, of g.
    """

    channels: int
    images: int
    row_tiles: int
    column_tiles: int
    row_lanes: int
    row_bands: int
    column_bands: int
    tap_tiles: int
    tap_tile_columns: int
    groups: int
    parts: int
    units: int
    part_units: int
    read_x: int
    read_g: int
    reach: tuple[int, int]
    cached: bool
    x: Pitches
    g: Pitches
    x_begin: int
    g_begin: int
    stage_elements: int
    scratch: int
    shared_bytes: int
    partial_bytes: int
    blocks: int = 1
    used: int = 0
    depth_taps: int = 1
    read_clocks: tuple[int, int] = (1, 1)
    bulk: bool = False
    threads: int = 0
    stages: int = 2
    cluster: int = 1
    align: int = 16

    @property
    def head_bytes(self) -> int:
        return up(HEAD_BYTES * self.stages, self.align)


def read_widths(problem: DepthwiseProblem, tile: Tile) -> tuple[int, int]:
    """Elements of x, of g, that every read of a tile's row finds aligned in shared memory."""
    most = min(16, problem.aligned) // problem.element_bytes
    x_image, x_channel = problem.plane_strides[:2]
    between = tile.columns * problem.stride[1]
    moved = (problem.out_size[1] - tile.columns) * problem.stride[1]  # the last tile is moved inside
    tapped = 0 if tile.tap_columns == problem.filter[1] else tile.tap_columns * problem.dilation[1]
    x = math.gcd(most, problem.size[1], x_image, x_channel, between, moved, tapped)
    return x, math.gcd(most, problem.out_size[1], tile.columns)


def registers(problem: DepthwiseProblem, tile: Tile) -> int:
    """Estimate of a thread's registers: the rows of g that meet one row of x, sums, columns of x and their masks."""
    met = min(tile.rows, divided((tile.tap_rows - 1) * problem.dilation[0] + 1, problem.stride[0]))
    width = window_width(problem, tile)
    if window_height(problem, tile) == 1:  # columns are read one after the other
        width = min(width, 16)
    elif whole(problem, tile, 1):
        width = min(width, problem.size[1])
    values = met * tile.columns + tile.taps + width
    masks = 0 if tile.tap_columns == problem.filter[1] else width
    return values * max(1, problem.element_bytes // 4) + masks + (40 if problem.element_bytes == 2 else 34)


def whole(problem: DepthwiseProblem, tile: Tile, axis: int) -> bool:
    """Whether a tile has all taps and all outputs of that axis, so that it lies in the padding as every other does."""
    taps, outputs = ((tile.tap_rows, tile.rows), (tile.tap_columns, tile.columns))[axis]
    return (taps, outputs) == (problem.filter[axis], problem.out_size[axis])


def window_height(problem: DepthwiseProblem, tile: Tile) -> int:
    return (tile.rows - 1) * problem.stride[0] + (tile.tap_rows - 1) * problem.dilation[0] + 1


def window_width(problem: DepthwiseProblem, tile: Tile) -> int:
    return (tile.columns - 1) * problem.stride[1] + (tile.tap_columns - 1) * problem.dilation[1] + 1


def shared_bytes(problem: DepthwiseProblem, tile: Tile, geometry: Geometry) -> int:
    """All stages; in the end the sums of all threads."""
    sums = tile.taps + problem.bias
    quantities = geometry.channels * problem.multiplier * geometry.tap_tiles
    of_block = min(sums, AT_ONCE) * _each_sum(problem, geometry)
    of_parts = quantities * sums * divided(geometry.parts, 8)
    scratch = (geometry.scratch + max(of_block, of_parts)) * problem.sum_bytes
    return geometry.head_bytes + max(geometry.stages * geometry.stage_elements * problem.element_bytes, up(scratch, 16))


def _each_sum(problem: DepthwiseProblem, geometry: Geometry) -> int:
    """Elements of shared memory in which one sum of every thread is added up."""
    quantities = geometry.channels * problem.multiplier * geometry.tap_tiles
    terms = geometry.images * geometry.row_lanes * geometry.column_tiles
    return geometry.threads + 1 + quantities * divided(terms, 8)


def at_once(problem: DepthwiseProblem, tile: Tile, geometry: Geometry) -> int:
    """Sums of each thread that are added up at once: as few times as there is room for, alike many each time."""
    sums = tile.taps + problem.bias
    room = (geometry.shared_bytes - geometry.head_bytes) // problem.sum_bytes - geometry.scratch
    return divided(sums, divided(sums, room // _each_sum(problem, geometry)))
