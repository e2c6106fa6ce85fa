"""What the tiles of taps_nchw cost: predicted times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .march import axes
from .strips import divided, up
from .taps_nchw_layout import Geometry, Tile, whole, window_height, window_width


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
        warp_issues: instructions a clock of one warp alone.
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
    warp_issues: float
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
    warp_issues=1.04,
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
    warp_issues=0.94,
    first=1.32,
    uneven=0.3,
    start_and_end=9310,
    cluster_end=5580,
    parts_end=6860,
    part=12,
)
MOST_CODE = 4000  # instructions that slow one another down
MOST_ISSUED = 4.0  # instructions a clock, of a multiprocessor
LATE = 0.38  # latencies of DRAM that bytes in flight must last for
COPY_INSTRUCTIONS = 420  # of each warp, where all copy by themselves
FEW_TAPS, MORE_IN_16_BITS = 9, 1.06  # with more taps than these, issue takes that much longer in 16 bits


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
        masks = 2 * masks + outputs
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
        ready = MOST_ISSUED * (1 - math.exp(-costs.warp_issues * resident * warps / MOST_ISSUED))
        uneven = up(resident * warps, 4) / (resident * warps)  # schedulers have a quarter of the warps each
        issue = uneven * resident * work / (ready * device.clock)
        sharing = resident * shared / device.clock
        dram = blocks * stage_bytes / (1.1e9 * device.dram_gbs)
        dram *= (resident * device.multiprocessors / blocks) ** costs.uneven
        flying = blocks * (geometry.stages - 1) * in_stage
        dram *= max(1.0, LATE * device.dram_gbs * device.latency_ns / flying)
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
