"""Cubes of 2×2×2 outputs on sparse tensor cores: the geometry of kernels/volume_cubes.cuh, seen from the host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from ..device import DeviceSpec
from ..plan import Plan, Rejection
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .banks import with_fewest_conflicts
from .base import GRID_X_LIMIT
from .strips import divided, up, widest
from .volumes import Tile, divisors, make_plan, too_large, vector_limit, without_matrices

WIDTHS = (7, 4, 2)  # products of four columns beside one another that the kernel is compiled for
ROWS = 8  # of outputs, in a tile
MOST_PAIRS = 28  # of channels in a block, each a warp: 72 registers are left for a thread
MOST_PAIRS_EPILOGUE = 16  # where channels have values of an epilogue beside their bias: 128 registers
PRODUCTS = 0.42  # sparse products of a multiprocessor in a clock (H200, 2026-11)
BEFORE_SECONDS = 3.0e-6  # of a block, from its begin to its first products
# Measured times over what the counts predict, where rows are one stretch or are copied 4 bytes at a time: such that the
# faster one was chosen in 13 of 15 shapes (H200, 2026-11)
SLOWER = {True: 1.3, False: 1.85}


def tiles_of(problem: DepthwiseProblem) -> list[Tile]:
    """Tiles in question: those with the fewest columns in vain first, then the widest."""
    across = divided(problem.out_size[2], 4)
    widths = sorted(WIDTHS, key=lambda width: divided(across, width) * width)
    return [Tile(ROWS, width, cubes=True) for width in widths]


def by_prediction(plans: list[tuple[Tile, Plan | Rejection]]) -> list[tuple[Tile, Plan | Rejection]]:
    """The same, in the order of choice: cubes are first where they are predicted to be faster than the other tiles."""
    cubes = sorted((each for each in plans if each[0].cubes), key=lambda each: _seconds(each[1]))
    others = [each for each in plans if not each[0].cubes]
    other = next((plan for _, plan in others if isinstance(plan, Plan)), None)
    if cubes and (other is None or _seconds(cubes[0][1]) < other.predicted_seconds):
        return cubes + others
    return others + cubes


def _seconds(plan: Plan | Rejection) -> float:
    return plan.predicted_seconds if isinstance(plan, Plan) else math.inf


@dataclass(frozen=True, slots=True)
class Layout:
    """Of a tile in shared memory; sizes in elements.

    Attributes:
        linear: rows of all channels are one stretch of memory, copied as it lies.
        chunk: channels.
        vector: of a copy.
        align: columns that a whole number of vectors takes.
        pixel, pitch, plane: from pixel to pixel, row to row, plane to plane.
    """

    linear: bool
    chunk: int
    vector: int
    align: int
    pixel: int
    pitch: int
    plane: int

    @property
    def vectors(self) -> int:
        return (ROWS + 2) * self.pitch // self.vector

    @property
    def entries(self) -> int:
        """Of the table: as many for each thread."""
        threads = 16 * self.chunk
        return divided(self.vectors, threads) * threads

    def shared_bytes(self, stages: int) -> int:
        return stages * 2 * 2 * self.plane + 8 * self.entries

    @classmethod
    def of(cls, problem: DepthwiseProblem, width: int) -> Layout:
        channels, columns_apart = problem.channels, problem.plane_strides[-1]
        epilogue = problem.epilogue
        most = MOST_PAIRS_EPILOGUE if epilogue.scale or epilogue.shift or epilogue.residual else MOST_PAIRS
        linear = columns_apart == channels and channels % 4 == 2 and channels <= 2 * most
        vector, align, chunk = 2, 1, channels
        if linear:
            vector = widest(vector_limit(problem), problem.size[2] * channels, problem.out_size[2] * channels)
            align = vector // widest(vector, channels)
        elif channels > 2 * most:
            chunk = 2 * min(range(most, 7, -1), key=lambda pairs: divided(channels, 2 * pairs) * pairs)
        pixel = channels if linear else chunk // 4 * 4 + 2
        pad = problem.padding[2][0]
        lead = -pad * pixel % vector
        least = up(lead + (4 * width + max(2, pad % align)) * pixel, vector)
        pitch = with_fewest_conflicts(
            range(least, least + 65, vector), lambda pitch: _read_conflicts(pixel // 2, pitch // 2), least=1
        )
        plane = up((ROWS + 2) * pitch, 8)
        plane = with_fewest_conflicts(
            range(plane, plane + 65, 8), lambda plane: _write_conflicts(pixel // 2, pitch // 2, plane // 2), least=1
        )
        return cls(linear, chunk, vector, align, pixel, pitch, plane)


def _worst(words: set[int]) -> int:
    """The most words that are in one bank."""
    counts = [0] * 32
    for word in words:
        counts[word % 32] += 1
    return max(counts)


def _read_conflicts(pixel: int, pitch: int) -> int:
    """Of a product's pixels: two columns of four cubes."""
    return _worst({row * pitch + column * pixel for row in (0, 2, 4, 6) for column in range(6)})


def _write_conflicts(pixel: int, pitch: int, plane: int) -> int:
    """Of half of a product's results."""
    return _worst(
        {f * plane + row * pitch + column * pixel for f, row, column in product((0, 1), (0, 1, 4, 5), range(4))}
    )


def _cut(depth: int, tiles: int, at_once: int) -> int:
    """Output planes of a block: whole volumes, or parts of them where that keeps more multiprocessors busy."""
    best, least = 0, 0.0
    for parts in range(1, divided(depth, 2) + 1):
        share = 2 * divided(divided(depth, parts), 2)
        # a step more than pairs of planes, and about three before the first one
        time = divided(tiles * divided(depth, share), at_once) * (share / 2 + 4)
        if not best or time < least:
            best, least = share, time
    return best


def cubes_plan(stem: str, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
    """The plan of a tile, or why it is not legal."""

    def rejected(reason: str) -> Rejection:
        return Rejection(stem, str(tile), reason)

    if reason := too_large(problem) or without_matrices(problem, device):
        return rejected(reason)
    if max(problem.filter) > 3 or max(problem.stride) > 1 or max(problem.dilation) > 1:
        return rejected("cubes of 4×4×4 hold filters of up to 3×3×3 with neither stride nor dilation")
    if problem.multiplier > 1 or problem.channels % 2:
        return rejected("pairs of channels need a multiplier of 1 and an even number of channels")
    if vector_limit(problem) < 2 or problem.plane_strides[-1] % 2:
        return rejected("pairs of channels must be words, at multiples of 4 bytes")
    out_d, out_h, out_w = problem.out_size
    if 0 in (problem.batch, *problem.size, out_d, out_h, out_w):
        return rejected("there is nothing to sum")
    if out_h * out_w * problem.channels >= 2**31:
        return rejected("a plane of y reaches over 2³¹ elements or more, so that its places can't be numbered")
    layout = Layout.of(problem, tile.columns)
    shared, shared_limit = layout.shared_bytes(tile.stages), device.shared_bytes - 1024
    if shared > shared_limit:
        return rejected(f"a block would take {shared} bytes of shared memory; {shared_limit} is the most")
    pairs, threads = layout.chunk // 2, 16 * layout.chunk
    held = max(
        1, min(device.shared_bytes // (shared + 1024), device.threads // threads, device.registers // (72 * threads))
    )
    tiles_x, tiles_y = divided(out_w, 4 * tile.columns), divided(out_h, ROWS)
    chunks = divided(problem.channels, layout.chunk)
    tiles = tiles_x * tiles_y * chunks * problem.batch
    share = _cut(out_d, tiles, device.multiprocessors * held)
    parts = divided(out_d, share)
    blocks = tiles * parts
    if blocks > GRID_X_LIMIT:
        return rejected(f"{blocks} blocks can't be numbered in 31 bits")
    # Of a step, a multiprocessor's clocks: wavefronts of shared memory, or products.
    moved = 2 * layout.vectors * layout.vector * 2 / 128
    clocks = max(pairs * tile.columns * 10 + 3 * moved, pairs * tile.columns * 4 / PRODUCTS) + 400
    waves = divided(blocks, device.multiprocessors * held)
    work = waves * (BEFORE_SECONDS + (share // 2 + 1) * held * clocks / device.clock)
    dram = problem.least_bytes / (0.95 * device.dram_gbs * 1e9)
    return make_plan(
        stem,
        problem,
        device,
        tile,
        {
            "THREADS": threads,
            "MIN_BLOCKS": held,
            "VECTOR": 2,
            "CHUNK": layout.chunk,
            "SPOTS_X": 1,
            "PITCH": layout.pitch,
            "PLANE": layout.plane,
            "LOAD_VECTOR": layout.vector,
            "STORE_VECTOR": layout.vector,
            "MATRIX": 0,
            "CUBES": 1,
            "LINEAR": int(layout.linear),
            "COLUMN_ALIGN": layout.align,
            "BATCH": 1,
            "ONE_BATCH": 0,
        },
        share=share,
        blocks=blocks,
        threads=threads,
        shared=shared,
        tiling=(
            *divisors(tiles_x, tiles_y, parts, chunks, 1, 1),
            1,
            ROWS + 2,
            0,
            layout.vectors,
            1,
            0,
            threads,
            share,
            0,
        ),
        words=f"{tile}; {layout.chunk} channels × {ROWS} rows × {4 * tile.columns} columns, {share} planes a block",
        seconds=LAUNCH_SECONDS + SLOWER[layout.linear] * math.pow(work**3 + dram**3, 1 / 3),
    )
