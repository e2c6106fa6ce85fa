"""The tiles of taps_nchw: which come into question, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .march import axes
from .strips import divided, planar, up
from .taps_nchw_geometry import geometry_of
from .taps_nchw_layout import (
    Geometry,
    Tile,
    read_widths,
    registers,
    whole,
    window_height,
    window_width,
)

MOST_TAPS = 50  # whose sums a thread has in registers; half as many in float64
MOST_ROW_TAPS = 60  # of whole rows of the filter on images as narrow as a tile, where no columns are masked
NARROW = 28  # columns of such images
MOST_ROWS = 8  # of such tiles, of outputs: 14 rows of 14 spill at 1×27 taps (sm_90, NVRTC 13.0)
MOST_PRODUCTS = 3200  # of a tile: its code is that long
MOST_REGISTERS = 200
MOST_TILES = 14
MOST_SHAPES = 8  # for which geometries are made, and as many of tiles of SMALL_TILE outputs
SMALL_TILE = 42
LONG_CODE = 1600  # products: longer code seldom pays
MOST_STEPS = 24000  # of the loops around a product: in longer ones the compiler leaves g in local memory
THREADS = (64, 128, 192)
MORE_THREADS = (96, 160, 224, 256)  # for the shapes of the BETTER best
BETTER = 6

# Of the cost model, as fitted.
ROW_WAIT = 15.0  # instructions that could have been issued while the reads of a row of x are on their way
NEAR_CODE, MOST_CODE, CODE_SLOWS = 440, 4000, 0.17  # longer code is fetched from farther away
CONVERT = 0.69  # instructions for an element of 16 bits
STAGE_INSTRUCTIONS = 180  # of each warp that reads it
LINES_INSTRUCTIONS, COPY_INSTRUCTIONS = 275, 420  # of the warp that sends it; of each, where all copy by themselves
READ_CLOCKS, COPY_CLOCKS = 0.38, 13.5  # of shared memory: a warp's reads; 512 bytes that arrive
MOST_ISSUED, WARP_ISSUES = 4.0, 1.33  # instructions a clock: of a multiprocessor; of one warp alone
LATE = 0.38  # latencies of DRAM that bytes in flight must last for
FIRST = 1.4  # of the time in which the first stages of all blocks arrive
# Clocks: of a block; to add up two parts that are a cluster; to add up others, and for each of them.
START_AND_END, CLUSTER_END, PARTS_END, PART_CLOCKS = 9000, 4500, 6450, 12


def pieces(taps: int, most: int) -> Iterator[int]:
    """Sizes of tiles that cover `taps` with as few beyond them as that number of tiles allows."""
    seen = set()
    for count in range(1, taps + 1):
        size = divided(taps, count)
        if size <= most and size not in seen:
            seen.add(size)
            yield size
        if size == 1:
            return


def tap_tiles(problem: DepthwiseProblem) -> list[tuple[int, int]]:
    """Tiles of taps that come into question, best first: all taps, or those with the fewest beyond the filter."""
    taps_h, taps_w = problem.filter
    most = MOST_TAPS if problem.element_bytes < 8 else MOST_TAPS // 2
    if taps_h * taps_w <= most:
        return [(taps_h, taps_w)]
    found = []
    for rows in pieces(taps_h, most):
        for columns in pieces(taps_w, most // rows):
            covered = divided(taps_h, rows) * rows * divided(taps_w, columns) * columns / problem.taps
            # an x row of the window is read for `rows` rows of g, a column for `columns` of its columns
            reads = 1.0 / rows + 1.0 / columns + 2.0 / (rows * columns)
            found.append((covered * (1 + 0.5 * reads), rows, columns))
    # In 32 bits conflicts of banks decide as much as instructions, and few sizes have none.
    best = [(rows, columns) for _, rows, columns in sorted(found)[: 3 if problem.element_bytes == 2 else 5]]
    if problem.out_size[1] > NARROW or problem.element_bytes == 2:
        return best
    whole_rows = [(rows, taps_w) for rows in pieces(taps_h, MOST_ROW_TAPS * most // MOST_TAPS // taps_w)]
    return best + [tile for tile in whole_rows[:3] if tile not in best]


def rolled(problem: DepthwiseProblem, tile: Tile) -> bool:
    """Whether the compiler may not unroll the loops over rows and columns of x and outputs: ten to forty times slower.

    So it was for many of the tiles with that many steps and 7 to 13 columns, and with twice as many and 14 or more.
    """
    read_x, _ = read_widths(problem, tile)
    width = window_width(problem, tile) + -problem.padding[1][0] % read_x
    steps = window_height(problem, tile) * up(width, read_x) * tile.rows * tile.columns
    return steps > (MOST_STEPS if tile.columns < 14 else 2 * MOST_STEPS)


def shapes_of(problem: DepthwiseProblem) -> list[Tile]:
    """Tiles whose values fit in registers and whose code isn't too long: those that take the fewest instructions."""
    out_h, out_w = problem.out_size
    found: list[tuple[float, Tile]] = []
    of_each: list[tuple[float, Tile]] = []  # tile of taps: geometries will tell whose reads meet few banks
    for tap_rows, tap_columns in tap_tiles(problem):
        covered = (
            divided(problem.filter[0], tap_rows) * tap_rows * divided(problem.filter[1], tap_columns) * tap_columns
        )
        legal = []
        whole_rows = tap_columns == problem.filter[1] and out_w <= NARROW and problem.element_bytes > 2
        for rows in dict.fromkeys(min(rows, out_h) for rows in (7, 1, 2, 4, 5, 6, 8, 10, 14)):
            widest = NARROW if whole_rows else 16 if out_h > 1 else 32
            for columns in range(min(4, out_w), min(widest, out_w) + 1):
                tile = Tile(rows, columns, tap_rows, tap_columns)
                products = rows * columns * tap_rows * tap_columns
                if whole(problem, tile, 1):
                    products = int(products * valid_share(problem, 1))
                if whole(problem, tile, 1) and tap_rows < problem.filter[0] and rows > MOST_ROWS:
                    continue
                if products > MOST_PRODUCTS or registers(problem, tile) > MOST_REGISTERS or rolled(problem, tile):
                    continue
                # A product is an instruction, an element of x or g two or three: it is read, converted, masked.
                width = window_width(problem, tile)
                if whole(problem, tile, 1):
                    width = min(width, problem.size[1])
                elements = window_height(problem, tile) * width + rows * columns
                instructions = products + 2 * elements + 80
                tiles = divided(out_h, rows) * divided(out_w, columns) * covered / (tap_rows * tap_columns)
                legal.append((tiles * instructions * (1 if products < LONG_CODE else 1.3), tile))
        legal = sorted(legal, key=lambda each: each[0]) or [(math.inf, Tile(1, min(4, out_w), tap_rows, tap_columns))]
        found += legal
        of_each += legal[:MOST_SHAPES] if problem.element_bytes > 2 else []
    ordered = [tile for _, tile in sorted(found, key=lambda each: each[0])]
    small = [tile for tile in ordered if tile.rows * tile.columns <= SMALL_TILE]  # more blocks, for the same memory
    return list(dict.fromkeys(ordered[:MOST_SHAPES] + small[:MOST_SHAPES] + [tile for _, tile in of_each]))


def shape_of(tile: Tile) -> tuple[int, ...]:
    """What tiles have alike of which two at most are worth timing."""
    return tile.rows, tile.columns, tile.tap_rows


def valid_share(problem: DepthwiseProblem, axis: int) -> float:
    """The share of the products along an axis that aren't with padding."""
    return axes(problem, turned=False)[axis].reached


def tile_counts(problem: DepthwiseProblem, tile: Tile, geometry: Geometry) -> tuple[float, float, float]:
    """Of one thread for one tile: instructions (multiply-adds, reads, conversions, masks), clocks of shared memory, and
    how many instructions its code has."""
    height, width = window_height(problem, tile), window_width(problem, tile)
    tapped = geometry.tap_tiles > 1
    # Rows of x outside of the image are left out, columns if all tiles lie alike.
    all_rows, all_columns = whole(problem, tile, 0), whole(problem, tile, 1)
    share = tapped_share = valid_share(problem, 0) if tile.tap_rows < problem.filter[0] or all_rows else 1.0
    if all_columns:
        share *= valid_share(problem, 1)
        width = min(width, problem.size[1])
    outputs = tile.rows * tile.columns
    converted = CONVERT * (height * width + outputs) if problem.element_bytes == 2 else 0
    sides = problem.padding[1][0] + geometry.reach[1] if tile.tap_columns == problem.filter[1] else width
    sides = 0 if all_columns else sides
    masks = height * min(width, sides) + (0 if problem.out_size[1] % tile.columns == 0 else outputs)
    x_reads = height * divided(width + geometry.read_x - 1, geometry.read_x)
    g_reads = outputs / geometry.read_g
    products = outputs * tile.tap_rows * tile.tap_columns * (2 if problem.element_bytes == 8 else 1)
    clocks = x_reads * geometry.read_clocks[0] + g_reads * geometry.read_clocks[1]
    others = x_reads + g_reads + converted + masks
    made = products * (valid_share(problem, 1) if all_columns else 1.0)
    code = (made if tapped else share * products) + others + 3 * height
    each = share * products + tapped_share * (others + ROW_WAIT * height)
    return each + 80, tapped_share * clocks, code


def slowed(code: float) -> float:
    """How much longer issue takes, for instructions that have to be fetched."""
    return 1 + CODE_SLOWS * max(0.0, min(code, MOST_CODE) - NEAR_CODE) / NEAR_CODE


def taps_seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, geometry: Geometry) -> float:
    """Predicted time: as many rounds of stages as the blocks of one multiprocessor take, each a norm of 4 of what its
    blocks need, and what starting and adding up takes. Fitted to an H200 (2026-11)."""
    instructions, clocks, code = tile_counts(problem, tile, geometry)
    tiles = divided(geometry.row_tiles, geometry.row_lanes)
    warps = tile.threads / 32
    in_stage = (geometry.x.elements + geometry.g.elements) * problem.element_bytes
    copied = in_stage / 16 / tile.threads  # pieces of 16 bytes that a warp copies at once
    copies = LINES_INSTRUCTIONS if geometry.bulk else warps * (COPY_INSTRUCTIONS + 2 * copied)
    work = warps * (tiles * instructions * slowed(code) + STAGE_INSTRUCTIONS) + copies
    shared = warps * (READ_CLOCKS * tiles * clocks + COPY_CLOCKS * copied)
    in_rows = geometry.row_tiles * tile.rows * problem.stride[0]
    halo = ((problem.filter[0] - 1) * problem.dilation[0]) / in_rows if geometry.row_bands > 1 else 0.0
    x_bytes = problem.batch * problem.channels * math.prod(problem.size) * problem.element_bytes
    # taps of the depth read x and g through L2, beside one another
    stage_bytes = (problem.least_bytes + 0.2 * halo * x_bytes) / (geometry.units * geometry.groups)

    def stage(resident: int) -> float:
        """Seconds, if a multiprocessor has so many blocks."""
        ready = MOST_ISSUED * (1 - math.exp(-WARP_ISSUES * resident * warps / MOST_ISSUED))
        issue = resident * work / (ready * device.clock)
        sharing = resident * shared / device.clock
        dram = resident * stage_bytes * device.multiprocessors / (1.1e9 * device.dram_gbs)
        flying = resident * (geometry.stages - 1) * in_stage * device.multiprocessors
        dram *= max(1.0, LATE * device.dram_gbs * device.latency_ns / flying)
        return math.sqrt(math.hypot(issue**2, sharing**2, dram**2))

    blocks, wave = geometry.groups * geometry.parts, device.multiprocessors * geometry.blocks
    full, rest = divmod(blocks, wave)
    rounds = (full * stage(geometry.blocks) if full else 0.0) + (
        stage(divided(rest, device.multiprocessors)) if rest else 0.0
    )
    ending = float(START_AND_END)
    if geometry.parts > 1:
        ending += CLUSTER_END if geometry.cluster > 1 else PARTS_END + PART_CLOCKS * geometry.parts
    ending *= math.sqrt(max(1.0, blocks / wave))
    first = FIRST * min(blocks, wave) * in_stage / (1e9 * device.dram_gbs)
    start = LAUNCH_SECONDS + 2.0e-6 + ending / device.clock + first
    return start + geometry.part_units * rounds


def tiles_of(problem: DepthwiseProblem, device: DeviceSpec) -> list[tuple[Tile, Geometry]]:
    """Tiles that come into question with their geometries, best first: at most MOST_TILES, two of a shape."""
    found: list[tuple[float, Tile, Geometry]] = []
    planes = planar(problem)

    def add(shape: Tile, threads: int) -> None:
        tile = replace(shape, threads=threads)
        geometry = geometry_of(problem, device, tile)
        if isinstance(geometry, Geometry):
            found.append((taps_seconds(planes, device, tile, geometry), tile, geometry))

    for shape in shapes_of(planes):
        for threads in THREADS:
            add(shape, threads)
    found.sort(key=lambda each: each[0])
    for shape in dict.fromkeys(replace(tile, threads=0) for _, tile, _ in found[:BETTER]):
        for threads in MORE_THREADS:
            add(shape, threads)
    chosen: list[tuple[Tile, Geometry]] = []
    for _, tile, geometry in sorted(found, key=lambda each: each[0]):
        same = [other for other, _ in chosen if shape_of(other) == shape_of(tile)]
        alike = [other for other in same if abs(other.threads - tile.threads) < 64]
        if len(same) < 2 and not alike and len(chosen) < MOST_TILES:
            chosen.append((tile, geometry))
    return chosen
