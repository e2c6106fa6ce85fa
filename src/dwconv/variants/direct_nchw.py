"""direct_nchw: a tile's rows wait in registers; the fast channels-first variant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .base import Variant, tap_by_tap_seconds
from .strips import Columns, Strips, lanes_of, place_columns, too_long, vector_limits, window_rows

MAX_REGISTERS = 150  # rows, sums, filter and window of a thread; ptxas needs some more, and 255 is the most there are
MAX_TAPS = 25  # filter taps that fit in registers beside them
NARROW = 256  # columns of rows that one strip may own whole


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A lane makes `slots` times `vector` neighbouring outputs in each of `rows` rows.

    Attributes:
        whole_window: all rows are loaded before the first use; else a tap at a time from L1.
        load_vector, store_vector: elements that one instruction moves.
        threads: of a block.
        min_blocks: blocks that a multiprocessor must hold, which limits a thread's registers; 1 leaves that to ptxas.
    """

    whole_window: bool
    vector: int
    slots: int
    rows: int
    load_vector: int = 1
    store_vector: int = 1
    threads: int = 256
    min_blocks: int = 1

    def __str__(self) -> str:
        how = "all rows loaded first" if self.whole_window else "tap by tap"
        least = f", {self.min_blocks} blocks or more" if self.min_blocks > 1 else ""
        return (
            f"{self.rows} rows × {self.slots}·{self.vector} columns a lane, loads of {4 * self.load_vector} B, "
            f"stores of {4 * self.store_vector} B, {how}, {self.threads} threads{least}"
        )


def registers(problem: DepthwiseProblem, tile: Tile, columns: Columns, whole_rows: bool) -> int:
    """Estimate of a thread's registers: input rows, sums, filter, the window of one row, and addresses."""
    row = tile.slots * columns.own + (0 if whole_rows else columns.halo_registers)
    sums = tile.rows * tile.slots * tile.vector
    return window_rows(problem, tile.rows) * row + sums + problem.taps + columns.span + 4


def is_narrow(problem: DepthwiseProblem) -> bool:
    """Whether one strip of 32 lanes may own whole rows of 16-byte vectors, so that there is no halo to load."""
    return vector_limits(problem)[0] == 4 and problem.size[1] <= NARROW


def representative(problem: DepthwiseProblem) -> DepthwiseProblem:
    """The large problem whose best tile all problems with the same constants and alignment get.

    Sizes are run-time arguments; were the tile to follow them, every other image size would compile a new kernel.
    """
    reach_h, reach_w = ((taps - 1) * apart + 1 for taps, apart in zip(problem.filter, problem.dilation, strict=True))
    size = (max(512, reach_h), max(NARROW if is_narrow(problem) else 512, reach_w))
    return replace(problem, batch=16, channels=64, size=size, x_strides=())


def window_tile(problem: DepthwiseProblem, vector: int, slots: int, rows: int, threads: int, min_blocks: int) -> Tile:
    """A tile that loads all rows first, with the widest loads and stores that the problem's alignment allows."""
    load_limit, store_limit = vector_limits(problem)
    load = max(v for v in (1, 2, 4) if v <= load_limit and (vector * problem.stride[1]) % v == 0)
    return Tile(True, vector, slots, rows, load, min(store_limit, vector), threads, min_blocks)


class DirectNchw(Variant):
    stem = "direct_nchw"
    technique = (
        "each thread loads all input rows of a small output tile with wide, coalesced loads before it uses the first, "
        "takes its neighbours' columns by warp shuffle, and sums in registers"
    )

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Every tile that the problem's alignment allows, whether its registers suffice or not."""
        load_limit, _ = vector_limits(problem)
        # rows, threads and blocks that measured best, each on some problem (docs/measurements.md)
        shapes = [(3, 192, 1), (4, 256, 1), (2, 128, 1), (1, 128, 1)]
        if problem.taps >= 15 and is_narrow(problem):
            shapes.insert(0, (4, 96, 7))  # where arithmetic takes its time, more warps with fewer registers hide it
        for vector, slots in ((4, 2), (4, 1)) if load_limit == 4 else ((4, 2), (2, 2), (2, 4), (1, 4), (1, 8)):
            for rows, threads, blocks in shapes:
                yield window_tile(problem, vector, slots, rows, threads, blocks)
        yield Tile(False, 1, 4, 2)

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles: for tests and for tuning."""
        plans = (self.plan(problem, device, tile) for tile in self.tiles(problem))
        return [plan for plan in plans if isinstance(plan, Plan)]

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        best, seconds = None, math.inf
        large_problem = representative(problem)
        for tile in self.tiles(problem):
            large = self.plan(large_problem, device, tile)
            # tiles come in the order of their measured speed: the model must promise more than its noise to change it
            if isinstance(large, Plan) and tile.whole_window and large.predicted_seconds < 0.97 * seconds:
                best, seconds = tile, large.predicted_seconds
        for tile in self.tiles(problem):
            plan = self.plan(problem, device, tile)
            if isinstance(plan, Plan) and tile.whole_window and tile != best:
                yield Rejection(
                    self.stem,
                    str(tile),
                    "another tile is faster on large images; one serves all sizes, so that few kernels are compiled",
                )
            else:
                yield plan

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        own_only = Columns(tile.vector * problem.stride[1], 0, 0, 0)
        columns = place_columns(problem, tile.vector, tile.load_vector) if tile.whole_window else own_only
        if columns.halo_lanes > 32:
            return rejected(f"the halo needs {columns.halo_lanes} lanes to load it; a warp has 32")
        # Where one strip owns every column of a row, what lies beyond it is padding: there is no halo to load.
        owned = columns.shift + 32 * tile.slots * columns.own
        whole_rows = tile.whole_window and is_narrow(problem) and columns.shift <= 0 and owned >= problem.size[1]
        width = -(-(problem.size[1] - columns.shift) // problem.stride[1]) if whole_rows else 0
        width = max(width, problem.out_size[1])
        if whole_rows and width > 32 * tile.slots * tile.vector:
            return rejected(f"rows of {width} columns are wider than the {32 * tile.slots * tile.vector} of a strip")
        lanes = lanes_of(width, tile.slots * tile.vector, columns.halo_lanes, whole_rows)
        if tile.whole_window:
            needed = registers(problem, tile, columns, whole_rows)
            if needed > MAX_REGISTERS:
                return rejected(f"needs about {needed} registers a thread; {MAX_REGISTERS} is the most")
            most = register_limit(device, tile)
            if needed > 1.55 * most:
                return rejected(f"needs about {needed} registers a thread, too many to get by with {most}")
            if problem.taps > MAX_TAPS:
                return rejected(
                    f"the filter's {problem.taps} taps don't fit in registers beside the rows; {MAX_TAPS} do"
                )
        strips = Strips.of(problem, lanes, lanes * tile.slots * tile.vector, tile.rows)
        if reason := strips.too_many(tile.threads):
            return rejected(reason)
        blocks = strips.blocks(tile.threads)
        constants = problem_constants(problem) | {
            "THREADS": tile.threads,
            "MIN_BLOCKS": tile.min_blocks,
            "SLOTS": tile.slots,
            "VECTOR": tile.vector,
            "ROWS": tile.rows,
            "LOAD_VECTOR": tile.load_vector,
            "STORE_VECTOR": tile.store_vector,
            "COLUMN_SHIFT": columns.shift,
            "WHOLE_WINDOW": int(tile.whole_window),
            "WHOLE_ROWS": int(whole_rows),
        }
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(blocks, 1, 1),
            block=(tile.threads, 1, 1),
            shared_bytes=0,
            sizes=problem_sizes(problem),
            tiling=strips.tiling,
            tile=f"{tile}, {lanes} lanes",
            predicted_seconds=(
                window_seconds(problem, device, tile, columns, whole_rows, blocks)
                if tile.whole_window
                else tap_by_tap_seconds(problem, device, strips.threads * 8, instructions_before=15, per_tap=11)
            ),
        )


def register_limit(device: DeviceSpec, tile: Tile) -> int:
    """Registers that a thread may take if `min_blocks` are to fit.

    Each of the four parts of a multiprocessor has a quarter of its registers, for whole warps.
    """
    if tile.min_blocks == 1:
        return 248
    return device.registers // 128 // -(-tile.min_blocks * tile.threads // 128) // 8 * 8


def window_seconds(
    problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, columns: Columns, whole_rows: bool, blocks: int
) -> float:
    """Predicted time of a tile whose rows are all loaded first.

    A multiprocessor works at the cube norm of five times a block, each of which would be the whole time if the others
    were nothing: DRAM, L2 (halo rows between blocks are read again), L1 and shuffles, instruction issue, and the time
    from a block's first load to its last store divided by the blocks that share the multiprocessor. Constants were
    fitted to 1,800 measured tiles of problems 82 to 86 on an H200 (root mean square error 9 %, docs/measurements.md).
    """
    vector_bytes = problem.element_bytes * tile.slots * 32
    in_bytes = tile.rows * problem.stride[0] * columns.own * vector_bytes
    out_bytes = tile.rows * tile.vector * vector_bytes
    rows = window_rows(problem, tile.rows)
    warps = tile.threads // 32
    bandwidth = device.dram_gbs * 1e9 / device.multiprocessors

    loads = rows * tile.slots * columns.own / tile.load_vector + (0 if whole_rows else rows)
    stores = tile.rows * tile.slots * tile.vector / tile.store_vector
    shuffles = rows * tile.slots * (columns.span - columns.own)
    multiply_adds = tile.rows * tile.slots * tile.vector * problem.taps
    instructions = multiply_adds + 2 * shuffles + 3 * (loads + stores) + problem.taps + 70
    wavefronts = problem.element_bytes / 4 * (loads * columns.own + stores * tile.vector)

    dram = warps * (in_bytes / problem.multiplier + out_bytes) / bandwidth
    block_rows = warps * tile.rows * problem.stride[0]
    again = (block_rows + (problem.filter[0] - 1) * problem.dilation[0]) / block_rows
    l2 = warps * (in_bytes * again + out_bytes) / (2 * bandwidth)
    l1 = warps * (wavefronts + shuffles) / device.clock
    issue = warps * instructions / (4 * device.clock)
    alone = device.latency_ns * 1e-9 + dram / 2 + issue

    each = min(-(-registers(problem, tile, columns, whole_rows) // 8) * 8, register_limit(device, tile))
    resident = max(1, min(device.registers // 128 // each * 4 // warps, device.threads // tile.threads, 32))
    norm = math.cbrt(dram**3 + l2**3 + l1**3 + issue**3 + (alone / resident) ** 3)
    return LAUNCH_SECONDS + alone + norm * max(1.0, blocks / device.multiprocessors)
