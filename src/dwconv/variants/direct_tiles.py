"""Tiles of direct_nhwc: what a thread makes, how images are cut into tiles, what a tile holds and costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..problem import DepthwiseProblem
from .nhwc_tiles import Cut
from .strips import widest


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A thread makes `rows` × `columns` outputs of `vector` neighbouring channels.

    Attributes:
        chunk: output channels of a block.
        copy: elements that one copy to shared memory moves.
        threads: of a block.
        stages: tiles in shared memory.
        each: neighbouring tiles that a block takes one after the other; 0: as many as there are for each of the blocks
            that the device holds at a time, far apart from each other.
        min_blocks: blocks that a multiprocessor must hold, which limits a thread's registers; 1 leaves that to ptxas.
        kept: whether the filter stays in registers.
    """

    rows: int
    columns: int
    vector: int
    chunk: int
    copy: int
    threads: int = 256
    stages: int = 1
    min_blocks: int = 1
    kept: bool = True
    each: int = 1

    def __str__(self) -> str:
        least = f", {self.min_blocks} blocks or more" if self.min_blocks > 1 else ""
        filters = "" if self.kept else ", filter in shared memory"
        return (
            f"{self.rows} rows × {self.columns} columns × {self.vector} channels a thread, {self.chunk} channels and "
            f"{self.threads} threads a block, {self.stages} stages{filters}{least}"
        )


def cut(problem: DepthwiseProblem, tile: Tile, column_groups: int, row_groups: int) -> Cut:
    """The cut with so many threads side by side and one above the other."""
    height, width = problem.out_size
    spots = tile.threads * tile.vector // tile.chunk
    column_tiles = -(-width // (column_groups * tile.columns))
    row_tiles = -(-height // (row_groups * tile.rows))
    images = spots // (column_groups * row_groups) if column_tiles * row_tiles == 1 else 1
    images = max(1, min(images, problem.batch))
    (reach_h, reach_w) = ((taps - 1) * apart for taps, apart in zip(problem.filter, problem.dilation, strict=True))
    return Cut(
        column_groups,
        row_groups,
        images,
        column_tiles,
        row_tiles,
        in_columns=(column_groups * tile.columns - 1) * problem.stride[1] + reach_w + 1,
        in_rows=(row_groups * tile.rows - 1) * problem.stride[0] + reach_h + 1,
        tiles=-(-problem.batch // images) * column_tiles * row_tiles,
    )


def best_cut(problem: DepthwiseProblem, tile: Tile, most_bytes: int) -> Cut | None:
    """The cut with the least work: inputs copied, and outputs computed by threads that may be past the edge."""
    spots = tile.threads * tile.vector // tile.chunk
    height, width = problem.out_size
    found, least = None, math.inf
    for column_groups in range(1, min(spots, -(-width // tile.columns)) + 1):
        for row_groups in range(1, min(spots // column_groups, -(-height // tile.rows)) + 1):
            one = cut(problem, tile, column_groups, row_groups)
            if stage_bytes(problem, tile, one) * tile.stages > most_bytes:
                continue
            work = one.tiles * tile_clocks(problem, tile, one)
            if work < least:
                found, least = one, work
    return found


def lines_of(problem: DepthwiseProblem, tile: Tile, one: Cut) -> int:
    """Copies that a thread starts for one tile."""
    slots = max(1, tile.threads // (tile.chunk // problem.multiplier // tile.copy))
    return -(-one.in_rows * one.images // max(1, slots // one.in_columns)) * -(-one.in_columns // slots)


def staged_bytes(problem: DepthwiseProblem, tile: Tile, one: Cut) -> int:
    """What a tile fetches."""
    return one.pixels * (tile.chunk // problem.multiplier) * problem.element_bytes


def tile_clocks(problem: DepthwiseProblem, tile: Tile, one: Cut) -> float:
    """Clocks of a multiprocessor for one tile: what its threads issue, and what comes through the L2."""
    outputs = tile.rows * tile.columns * tile.vector
    instructions = 250 / (tile.each or 8) + 9 * lines_of(problem, tile, one) + outputs * (problem.taps + 6)
    in_bytes = staged_bytes(problem, tile, one)
    if tile.chunk == problem.out_channels:  # each line starts and ends within a burst of DRAM
        in_bytes += 128 * one.in_rows * one.images
    return tile.threads * instructions / 90 + in_bytes / 30


def stage_bytes(problem: DepthwiseProblem, tile: Tile, one: Cut) -> int:
    return -(-one.pixels * (tile.chunk // problem.multiplier) // 16) * 16 * problem.element_bytes


def filter_bytes(problem: DepthwiseProblem, tile: Tile) -> int:
    pitch = -(-tile.chunk // 4) * 4 + 4
    return -(-problem.taps * pitch * problem.sum_bytes // 16) * 16


def vectors(problem: DepthwiseProblem, wanted: int) -> int:
    """Neighbouring output channels that a thread may own: `wanted`, or fewer as addresses and the multiplier ask."""
    elements = max(1, problem.aligned // problem.element_bytes)
    vector = widest(min(wanted, elements), problem.out_channels)
    return vector if problem.multiplier == 1 or vector % problem.multiplier == 0 else 1


def chunk_of(problem: DepthwiseProblem, vector: int, most_bytes: int) -> int:
    """Output channels of a block: as many as fit in `most_bytes` of a pixel, whole sectors, with few idle threads.

    >>> half = dict(batch=1, size=(9, 9), filter=(3, 3), dtype="float16", layout="channels_last")
    >>> [chunk_of(DepthwiseProblem(channels=c, **half), 4, 128) for c in (8, 12, 64, 72, 96, 144, 960)]
    [8, 12, 64, 24, 48, 48, 64]
    """
    channels, step = problem.out_channels, math.lcm(vector, problem.multiplier)
    most = max(step, most_bytes // problem.element_bytes // step * step)
    if channels <= most:
        return channels
    size = problem.element_bytes

    def cost(chunk: int) -> float:
        idle = -(-channels // chunk) * chunk / channels
        copies = 0 if chunk * size % 16 == 0 or channels * size % 16 else 1.0  # pieces of fewer than 16 bytes
        ragged = 0 if chunk * size % 32 == 0 or channels * size % 32 else 0.3  # sectors that two blocks read and write
        return idle + copies + ragged + 8 / (chunk * size)

    return min(range(step, most + 1, step), key=cost)
