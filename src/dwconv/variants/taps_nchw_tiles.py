"""The tiles of taps_nchw: which come into question, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

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
MOST_SHAPES = 8  # for which geometries are made, and as many that have few outputs, rows, columns
SMALL_TILE, FEW_ROWS, FEW_COLUMNS = 42, 2, 5
LONG_CODE = 1600  # products: longer code seldom pays
# Of the loops around a product, with few and with many columns: in longer ones the compiler leaves g in local memory.
MOST_STEPS, MORE_STEPS = 24000, 29000
THREADS = (64, 128, 192)
MORE_THREADS = (96, 160, 224, 256)  # for the shapes of the BETTER best
BETTER = 6
FEW_PARTS, LEAST_BLOCKS = 2, 0.8  # of a group; of a multiprocessor


@dataclass(frozen=True, slots=True)
class Costs:
    """Constants of the model. Instructions are a warp's, clocks a multiprocessor's.

    Attributes:
        row_wait: instructions that could have been issued while the reads of a row of x are on their way.
        near_code, code_slows: instructions; longer code is fetched from farther away, so much slower for as many more.
        convert: instructions for an element of 16 bits.
        stage, lines: instructions of each warp that reads a stage; of the warp that sends it.
        read_clocks, copy_clocks, line_clocks: of shared memory, for a clock of a warp's reads; for 512 bytes that
            arrive; for a line of them.
        most_issued, warp_issues: instructions a clock, of a multiprocessor; of one warp alone.
        late: latencies of DRAM that bytes in flight must last for.
        first: of the time in which the first stages of all blocks arrive.
        uneven: power of what multiprocessors with the most blocks have beyond the mean, in DRAM's time.
        start_and_end, cluster_end, parts_end, part: clocks of a block; to add up two parts that are a cluster; to add
            up others, and for each of them.
    """

    row_wait: float
    near_code: float
    code_slows: float
    convert: float
    stage: float
    lines: float
    read_clocks: float
    copy_clocks: float
    line_clocks: float
    most_issued: float
    warp_issues: float
    late: float
    first: float
    uneven: float
    start_and_end: float
    cluster_end: float
    parts_end: float
    part: float


# As fitted (H200, 2026-11): to 1,200 tiles of 63 problems that have all taps, and 37 tiles of 5 problems of many taps.
WHOLE_FILTERS = Costs(
    row_wait=1.8,
    near_code=448,
    code_slows=0.042,
    convert=1.05,
    stage=172,
    lines=175,
    read_clocks=0.38,
    copy_clocks=9.8,
    line_clocks=5.5,
    most_issued=4.0,
    warp_issues=1.04,
    late=0.38,
    first=0.92,
    uneven=0.13,
    start_and_end=9980,
    cluster_end=1170,
    parts_end=4350,
    part=10,
)
TILES_OF_TAPS = Costs(
    row_wait=12.4,
    near_code=584,
    code_slows=0.15,
    convert=0.69,
    stage=452,
    lines=520,
    read_clocks=1.01,
    copy_clocks=14.9,
    line_clocks=1.0,
    most_issued=4.0,
    warp_issues=0.94,
    late=0.38,
    first=1.32,
    uneven=0.3,
    start_and_end=9310,
    cluster_end=5580,
    parts_end=6860,
    part=12,
)
MOST_CODE = 4000  # instructions that slow one another down
COPY_INSTRUCTIONS = 420  # of each warp, where all copy by themselves
FEW_TAPS, MORE_IN_16_BITS = 9, 1.06  # with more taps than these, issue takes that much longer in 16 bits


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

    So it was for many of the tiles with that many steps and 7 to 13 columns, and with more of 14 columns and more.
    """
    read_x, _ = read_widths(problem, tile)
    width = window_width(problem, tile) + -problem.padding[1][0] % read_x
    steps = window_height(problem, tile) * up(width, read_x) * tile.rows * tile.columns
    return steps > (MOST_STEPS if tile.columns < 14 else MORE_STEPS)


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
        for rows in dict.fromkeys(min(rows, out_h) for rows in (7, 1, 2, 3, 4, 5, 6, 8, 10, 14)):
            widest = NARROW if whole_rows or rows <= FEW_ROWS else 16 if out_h > 1 else 32
            for columns in range(min(2, out_w), min(widest, out_w) + 1):
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
    low = [tile for tile in ordered if tile.rows <= FEW_ROWS]  # rows are read by whole vectors, or with few conflicts
    slim = [tile for tile in ordered if tile.columns <= FEW_COLUMNS]
    kept = [tile for some in (ordered, small, low, slim) for tile in some[:MOST_SHAPES]]
    return list(dict.fromkeys(kept + [tile for _, tile in of_each]))


def shape_of(tile: Tile) -> tuple[int, ...]:
    """What tiles have alike of which two at most are worth timing."""
    return tile.rows, tile.columns, tile.tap_rows


def valid_share(problem: DepthwiseProblem, axis: int) -> float:
    """The share of the products along an axis that aren't with padding."""
    return axes(problem, turned=False)[axis].reached


def costs_of(geometry: Geometry) -> Costs:
    return TILES_OF_TAPS if geometry.tap_tiles > 1 else WHOLE_FILTERS


def tile_counts(problem: DepthwiseProblem, tile: Tile, geometry: Geometry) -> tuple[float, float, float]:
    """Of one thread for one tile: instructions (multiply-adds, reads, conversions, masks), clocks of shared memory, and
    how many instructions its code has."""
    costs = costs_of(geometry)
    height, width = window_height(problem, tile), window_width(problem, tile)
    tapped = geometry.tap_tiles > 1
    # Rows of x outside of the image are left out, columns if all tiles lie alike.
    all_rows, all_columns = whole(problem, tile, 0), whole(problem, tile, 1)
    share = tapped_share = valid_share(problem, 0) if tile.tap_rows < problem.filter[0] or all_rows else 1.0
    if all_columns:
        share *= valid_share(problem, 1)
        width = min(width, problem.size[1])
    outputs = tile.rows * tile.columns
    converted = costs.convert * (height * width + outputs) if problem.element_bytes == 2 else 0
    sides = problem.padding[1][0] + geometry.reach[1] if tile.tap_columns == problem.filter[1] else width
    sides = 0 if all_columns else sides
    masks = height * min(width, sides)
    if problem.out_size[1] % tile.columns:  # a mask of its own for each column, and for outputs of a neighbour
        masks += masks + outputs
    x_reads = height * divided(width + geometry.read_x - 1, geometry.read_x)
    g_reads = outputs / geometry.read_g
    products = outputs * tile.tap_rows * tile.tap_columns * (2 if problem.element_bytes == 8 else 1)
    clocks = x_reads * geometry.read_clocks[0] + g_reads * geometry.read_clocks[1]
    others = x_reads + g_reads + converted + masks
    made = products * (valid_share(problem, 1) if all_columns else 1.0)
    code = (made if tapped else share * products) + others + 3 * height
    each = share * products + tapped_share * (others + costs.row_wait * height)
    return each + 80, tapped_share * clocks, code


def slowed(code: float, costs: Costs) -> float:
    """How much longer issue takes, for instructions that have to be fetched."""
    return 1 + costs.code_slows * max(0.0, min(code, MOST_CODE) - costs.near_code) / costs.near_code


def taps_seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, geometry: Geometry) -> float:
    """Predicted time: as many rounds of stages as the blocks of one multiprocessor take, each a norm of 4 of what its
    blocks need, and what starting and adding up takes. Fitted to an H200 (2026-11)."""
    costs = costs_of(geometry)
    instructions, clocks, code = tile_counts(problem, tile, geometry)
    tiles = divided(geometry.row_tiles, geometry.row_lanes)
    warps = divided(geometry.used, 32)  # that have a tile
    in_stage = (geometry.x.elements + geometry.g.elements) * problem.element_bytes
    pieces = in_stage / 512
    copies = costs.lines if geometry.bulk else tile.threads / 32 * COPY_INSTRUCTIONS + 2 * pieces
    if problem.element_bytes == 2 and tile.taps > FEW_TAPS:
        instructions *= MORE_IN_16_BITS
    work = warps * (tiles * instructions * slowed(code, costs) + costs.stage) + copies
    lines = sum(each.elements * problem.element_bytes / each.line_bytes for each in (geometry.x, geometry.g))
    shared = warps * costs.read_clocks * tiles * clocks + costs.copy_clocks * pieces + costs.line_clocks * lines
    in_rows = geometry.row_tiles * tile.rows * problem.stride[0]
    halo = ((problem.filter[0] - 1) * problem.dilation[0]) / in_rows if geometry.row_bands > 1 else 0.0
    x_bytes = problem.batch * problem.channels * math.prod(problem.size) * problem.element_bytes
    # taps of the depth read x and g through L2, beside one another
    stage_bytes = (problem.least_bytes + 0.2 * halo * x_bytes) / (geometry.units * geometry.groups)

    def stage(blocks: int) -> float:
        """Seconds, if the card has so many blocks."""
        resident = divided(blocks, device.multiprocessors)
        ready = costs.most_issued * (1 - math.exp(-costs.warp_issues * resident * warps / costs.most_issued))
        uneven = up(resident * warps, 4) / (resident * warps)  # schedulers have a quarter of the warps each
        issue = uneven * resident * work / (ready * device.clock)
        sharing = resident * shared / device.clock
        dram = blocks * stage_bytes / (1.1e9 * device.dram_gbs)
        dram *= (resident * device.multiprocessors / blocks) ** costs.uneven
        flying = blocks * (geometry.stages - 1) * in_stage
        dram *= max(1.0, costs.late * device.dram_gbs * device.latency_ns / flying)
        return math.sqrt(math.hypot(issue**2, sharing**2, dram**2))

    blocks, wave = geometry.groups * geometry.parts, device.multiprocessors * geometry.blocks
    full, rest = divmod(blocks, wave)
    rounds = (full * stage(wave) if full else 0.0) + (stage(rest) if rest else 0.0)
    ending = float(costs.start_and_end)
    if geometry.parts > 1:
        ending += costs.cluster_end if geometry.cluster > 1 else costs.parts_end + costs.part * geometry.parts
    ending *= math.sqrt(max(1.0, blocks / wave))
    first = costs.first * min(blocks, wave) * in_stage / (1e9 * device.dram_gbs)
    start = LAUNCH_SECONDS + 2.0e-6 + ending / device.clock + first
    return start + geometry.part_units * rounds


def tiles_of(problem: DepthwiseProblem, device: DeviceSpec) -> list[tuple[Tile, Geometry]]:
    """Tiles that come into question with their geometries, best first: at most MOST_TILES, two of a shape."""
    found: list[tuple[float, Tile, Geometry]] = []
    planes = planar(problem)

    def add(shape: Tile, threads: int, parts: int = 0) -> None:
        tile = replace(shape, threads=threads, parts=parts)
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
    # Fewer parts have less to add up; that multiprocessors have unlike numbers of blocks matters little.
    found.sort(key=lambda each: each[0])
    for _, tile, geometry in found[:MOST_TILES]:
        for parts in range(1, min(geometry.parts, FEW_PARTS + 1)):
            if geometry.groups * parts >= device.multiprocessors * LEAST_BLOCKS:
                add(tile, tile.threads, parts)
    chosen: list[tuple[Tile, Geometry]] = []
    for _, tile, geometry in sorted(found, key=lambda each: each[0]):
        same = [other for other, _ in chosen if shape_of(other) == shape_of(tile)]
        alike = [other for other in same if abs(other.threads - tile.threads) < 64]
        if len(same) < 2 and not alike and len(chosen) < MOST_TILES:
            chosen.append((tile, geometry))
    return chosen
