"""What the tiles of taps_nhwc cost: predicted times."""

from __future__ import annotations

import math
from functools import lru_cache

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .march import Axis, axes
from .parts import gathered
from .streams import shares_lines
from .strips import divided
from .taps_nhwc_tiles import Cut, Tile, piece_bytes

# Constants of the model, fitted to 987 tiles of 62 problems, then those of boxes, rows and what runs alone to 1,045
# of 96, most of them with boxes (H200, 2026-11).
READ, COPY, BOX, TAP_ROW, SEGMENT = 1.27, 11.1, 24.2, 3.7, 570.0  # instructions of a warp
DEPTH_TAP = 0.2  # of TAP_ROW, for each further tap of the depth: they share the comparisons
LONG_CODE, FETCHED = 900, 1.5  # products of a step from which on fetching code slows them down, and how much
IDLE_WARPS = 3.95  # issue slots are used as warps / (warps + IDLE_WARPS)
LOAD_CLOCKS = 2.76  # of a multiprocessor's shared memory, for a warp's load
L2_BYTES = 36.5  # of a clock, to a multiprocessor
NARROW = 0.066  # more DRAM time for each halving of a warp's pieces of 128 bytes
LATE = 1.36  # latencies of DRAM that bytes in flight must last for
# More DRAM time of boxes for each doubling of the bytes in flight beyond so many; and where they share lines of L2.
OVERFULL, APART, FULL = 0.1, 0.13, 67e3
THRASH, LINES_KEPT = 0.26, 0.725  # more DRAM time for each doubling of the lines in flight beyond this share of L1
PAST_NARROW, PAST_START = 0.4, 4.0e-6  # of copies past L1, for each halving; and once
TILES_AGAIN, AGAIN = 4, 0.03  # more tiles of taps than these read so much that L1 costs this share of time
LAST_WAVE = 0.4  # of a block: what a multiprocessor waits for others in the end, of several waves
CROWD, FEW = 0.016, 12  # more DRAM time of lanes' copies for each warp of a multiprocessor beyond so many
FEWER_STAGES = 0.006  # more time of lanes' copies for each stage less than four: they wait for one another more
SPLIT = 0.0108  # more time where parts begin or end within lines
START = 5.34e-6  # beside the launch
ROUND = 0.527e-6  # of loads of parts


@lru_cache(maxsize=256)
def marched(axis: Axis, taps: int) -> float:
    """The share of outputs that meet an input in a tile of so many taps, on average of the tiles.

    >>> along = axes(DepthwiseProblem(1, 8, (7, 7), (13, 13), padding=((6, 6), (6, 6))), False)[0]
    >>> marched(along, 13), round(marched(along, 1), 3) == round(along.reached, 3)
    (1.0, True)
    """
    met, tiles = 0, range(0, axis.filter, taps)
    for tap in tiles:
        lowest = axis.padding - (min(tap + taps, axis.filter) - 1) * axis.apart  # inputs that its last tap needs
        highest = axis.size - 1 + axis.padding - tap * axis.apart
        met += max(0, min(axis.out - 1, highest // axis.step) - max(0, -(-lowest // axis.step)) + 1)
    return met / (len(tiles) * axis.out)


def pieces_of_lines(rows: int, line: int) -> float:
    """How many lines of so many rows a part has rows of, on average of the parts.

    >>> pieces_of_lines(14, 28), pieces_of_lines(56, 28), pieces_of_lines(21, 28)
    (1.0, 2.0, 1.5)
    """
    return 1.0 + (rows - math.gcd(rows, line)) / line


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: instructions, shared memory, L2 and DRAM beside each other, then the last blocks' additions."""
    along, across = axes(problem, tile.turned)
    read = 1 + (tile.vector if problem.element_bytes == 2 else 0)
    products = tile.columns * tile.taps[1]
    if one.width:
        columns = range(across.padding, across.padding + one.kept)
        products = sum(0 <= c - t * across.stride < tile.taps[1] for c in columns for t in range(tile.columns))
    pieces = piece_bytes(problem, tile) or (4, 4)
    word = tile.vector * problem.element_bytes
    flat = tile.flat
    g_columns, x_columns = (tile.stage_steps, tile.stage_steps * one.rows) if flat else (tile.columns, one.kept)
    copies = divided(g_columns, pieces[0] // word)
    x_rows = 1 if flat else tile.depth_taps * one.rows
    copies += divided(x_columns, max(1, pieces[1] * problem.multiplier // word)) * x_rows
    copy = COPY * copies
    if tile.boxes:
        copy = BOX * (1 + tile.depth_taps * (1 if one.neighbours else one.rows))
    fma = products * tile.depth_taps * tile.taps[0] * tile.vector * min(1.0, along.size / (along.out * along.stride))
    share = 1.0  # of rows that are marched over
    if one.march.tap_tiles > 1 or along.filter > along.out:
        share = marched(along, tile.taps[0])
        even = along.filter == tile.taps[0] or tile.waves > 1
        fma *= min(1.0, along.reached * (1.0 if even else 1.1) / share) if share else 0.0
    if products * tile.taps[0] * tile.depth_taps > LONG_CODE:
        fma *= FETCHED
    loads = tile.columns + tile.depth_taps * one.rows * one.kept
    step = fma * (2 if problem.dtype == "float64" else 1) + READ * read * loads
    step += copy / tile.stage_steps + (0 if flat else TAP_ROW * one.live * (1 + DEPTH_TAP * (tile.depth_taps - 1)))
    step += problem.bias * tile.columns * tile.vector
    segments = pieces_of_lines(one.march.part_rows, one.march.line_rows)
    steps = one.march.part_rows * share + segments * (one.live - 1) * (1.0 if flat else 0.4)
    block = steps * step + segments * SEGMENT + 8 * one.values
    blocks = one.march.blocks
    of_multiprocessor = float(divided(blocks, device.multiprocessors))
    if tile.waves > 1:  # whoever is ready takes the next block
        of_multiprocessor = max(1.0, blocks / device.multiprocessors + LAST_WAVE)
    full, rest = divmod(of_multiprocessor, one.resident)
    warps = of_multiprocessor * tile.warps
    issue = block * (warps + IDLE_WARPS * (full + bool(rest))) / 4 / device.clock
    shared = steps * loads * LOAD_CLOCKS * warps / device.clock

    elements = math.prod(problem.y_shape) * (1.0 + (loads / tile.columns - 1.0) / problem.multiplier)
    l2 = elements * problem.element_bytes * one.march.tap_tiles / (L2_BYTES * device.multiprocessors * device.clock)
    chunk = tile.lanes * word
    together = chunk if chunk < problem.out_channels * problem.element_bytes else chunk * tile.columns
    dram = problem.least_bytes / (device.dram_gbs * 1e9) * (1.0 + NARROW * math.log2(128 / min(128, together)))
    through_l1 = not tile.boxes and (tile.cached or min(pieces) < 16)
    flying = min(one.resident, of_multiprocessor) * tile.warps * (tile.stages - 1) * one.stage_bytes
    if tile.boxes:
        over = OVERFULL + (APART if shares_lines(problem) else 0.0)
        dram *= 1.0 + over * max(0.0, math.log2(max(1, flying) / FULL))
    else:
        dram *= 1.0 + CROWD * max(0.0, min(one.resident, of_multiprocessor) * tile.warps - FEW)
        if through_l1:  # which has a line of 128 bytes for each piece in flight
            lines = max(1, flying) * 128 // min(128, together)
            kept = LINES_KEPT * device.l1_beside(one.resident * (one.shared_bytes + 1024))
            dram *= 1.0 + THRASH * max(0.0, math.log2(lines / kept))
        else:
            dram *= 1.0 + PAST_NARROW * math.log2(128 / min(128, chunk))
    dram *= max(1.0, LATE * device.dram_gbs * device.latency_ns / (device.multiprocessors * max(1, flying)))
    body = float((dram**3 + issue**3 + shared**3 + l2**3) ** (1 / 3))
    body *= 1.0 + (AGAIN if (through_l1 or tile.boxes) and one.march.tap_tiles > TILES_AGAIN else 0.0)
    splits = one.march.part_rows % one.march.line_rows and one.march.line_rows % one.march.part_rows
    body *= 1.0 + (0.0 if tile.boxes else FEWER_STAGES * max(0, 4 - tile.stages)) + (SPLIT if splits else 0.0)
    vectors = one.count * problem.sum_bytes // 16
    last = 0.0
    if one.march.parts > 1:
        last = ROUND * gathered(vectors, 32 * tile.warps, one.march.parts)[1]
    return LAUNCH_SECONDS + START + (0.0 if through_l1 or tile.boxes else PAST_START) + body + last
