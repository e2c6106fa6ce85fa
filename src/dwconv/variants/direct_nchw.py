"""direct_nchw: everything that a tile reads waits in registers; the fast channels-first variant for small filters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, legal, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .base import GRID_X_LIMIT, Variant, tap_by_tap_seconds

MAX_REGISTERS = 190  # rows, sums and filter of a thread; ptxas needs some more, and 255 is the most there are
MAX_TAPS = 31  # filter taps that fit in registers beside them
MAX_LANES = 32  # of a strip: narrow strips are tall ones, whose halo rows meet in L1; sequences have none
NARROW = 32  # images of fewer columns get tiles of their own
WORD = 2  # elements of 16 bits in 4 bytes
WIDE = 256  # and so do images of more columns, where float32 has 3x3 filters


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A thread makes `slots` times `vector` outputs in each of `rows` rows.

    Attributes:
        whole_window: all rows are loaded before the first use; else a tap at a time from L1.
        load_vector, store_vector: elements that one instruction moves.
        threads: of a block.
        min_blocks: blocks that a multiprocessor must hold, which limits a thread's registers; 1 leaves that to ptxas.
        by_column: whether a row's products come column by column, else output row by output row, tap by tap.
        ahead: rows that are loaded before the first use, and then so far ahead of it; 0: all.
        warp_loads, warp_stores: a warp, which has strips of columns to itself, loads a row's words, or stores them, as
            they lie, and lanes trade them.
    """

    whole_window: bool
    vector: int
    slots: int
    rows: int
    load_vector: int = 1
    store_vector: int = 1
    threads: int = 128
    min_blocks: int = 1
    by_column: bool = False
    ahead: int = 0
    warp_loads: bool = False
    warp_stores: bool = False

    def __str__(self) -> str:
        how = "all rows loaded first" if self.whole_window else "tap by tap"
        if traded := [name for name in ("loads", "stores") if getattr(self, f"warp_{name}")]:
            how += f", {' and '.join(traded)} of a warp"
        least = f", {self.min_blocks} blocks or more" if self.min_blocks > 1 else ""
        return (
            f"{self.rows} rows × {self.slots}·{self.vector} columns a thread, loads of {self.load_vector} elements, "
            f"stores of {self.store_vector}, {how}, {self.threads} threads{least}"
        )


def power_of_two(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def vector_limits(problem: DepthwiseProblem) -> tuple[int, int]:
    """Elements that one load and one store may move, 16 bytes or less, as addresses of rows allow.

    Stores are kept to what the class of the loads nearly implies, which leaves fewer kernels to compile.
    """
    elements = min(problem.aligned, 16) // problem.element_bytes

    def limit(*strides: int) -> int:
        return power_of_two(math.gcd(elements, *strides))

    x_image, x_channel, *_, x_row, _ = problem.plane_strides
    load, stride = limit(problem.size[1], x_image, x_channel, x_row), problem.stride[1]
    implied = 2 * load if stride == 1 and load > 1 else load // stride if stride in (1, 2, 4) else 1
    return load, max(1, min(limit(problem.out_size[1]), implied))


def window_tile(
    problem: DepthwiseProblem, vector: int, slots: int, rows: int, threads: int = 128, min_blocks: int = 1
) -> Tile:
    """A tile that loads all rows first, with the widest loads and stores that the problem's alignment allows."""
    load_limit, store_limit = vector_limits(problem)
    load = min(load_limit, power_of_two(vector * problem.stride[1]))
    return Tile(True, vector, slots, rows, load, min(store_limit, power_of_two(vector)), threads, min_blocks)


def warp_tiles(problem: DepthwiseProblem) -> Iterator[Tile]:
    """Tiles of 16-bit elements whose rows take loads or stores of 4 bytes, for warps that have strips to themselves.

    3×3: 10 rows instead of 7 take a copy's time over 0.95 instead of 0.93, 14 rows that are loaded so, 0.95 instead of
    0.90; 3×7: 8 rows 0.67, 7 rows 0.64 (H200, 2026-11).
    """
    most = min(problem.aligned, 16) // problem.element_bytes
    load, _ = vector_limits(problem)
    store = power_of_two(math.gcd(most, problem.out_size[1]))
    loads, stores = load == WORD, store == WORD and not problem.epilogue.residual
    if problem.element_bytes != 2 or problem.stride[1] > 1 or not (loads or (load == most and stores)):
        return
    for rows in (14 if loads else 10, 7, 4) if problem.taps <= 9 else (8, 4):
        yield Tile(True, 8, 1, rows, load, store, min_blocks=4, warp_loads=loads, warp_stores=stores)


def unwarped(problem: DepthwiseProblem, tile: Tile, lanes: int) -> str | None:
    """Why lanes of a warp can't trade a strip's words."""
    if lanes != MAX_LANES:
        return f"strips of {lanes} lanes are not a warp's"
    (before, _), reach = problem.padding[1], (problem.filter[1] - 1) * problem.dilation[1]
    if max(before, reach - before) > tile.vector:
        return f"reads more than {tile.vector} columns of its neighbours"
    return None


@dataclass(frozen=True, slots=True)
class ReadColumns:
    """Twin of `ReadColumns` in the kernel: what one slot reads of a row, in cells that one instruction loads at most.

    Attributes:
        columns: that its outputs read.
        loads: instructions that load them.
        words: 32-bit registers that hold them until they are used.
    """

    columns: int
    loads: int
    words: int

    @classmethod
    def of(cls, problem: DepthwiseProblem, tile: Tile) -> ReadColumns:
        taps, stride, dilation = problem.filter[1], problem.stride[1], problem.dilation[1]
        first, cell = -problem.padding[1][0], tile.load_vector
        read = {first + o * stride + v * dilation for o in range(tile.vector) for v in range(taps)}
        loaded = {column // cell: cell for column in read}
        left, right = min(loaded), max(loaded)
        if left < right:  # of the outermost cells, a piece
            loaded[left] = 1 << ((left + 1) * cell - min(read) - 1).bit_length()
            loaded[right] = 1 << (max(read) - right * cell).bit_length()
        words = sum(-(-columns * problem.element_bytes // 4) for columns in loaded.values())
        return cls(len(read), len(loaded), words)


def read_rows(problem: DepthwiseProblem, rows: int) -> int:
    """Input rows that `rows` neighbouring output rows read."""
    taps, stride, dilation = problem.filter[0], problem.stride[0], problem.dilation[0]
    return len({i * stride + u * dilation for i in range(rows) for u in range(taps)})


def registers(problem: DepthwiseProblem, tile: Tile) -> int:
    """Estimate of a thread's registers: input rows, sums of unfinished rows, filter, converted columns, addresses."""
    columns, words = ReadColumns.of(problem, tile), max(1, problem.element_bytes // 4)
    reach = (problem.filter[0] - 1) * problem.dilation[0] + 1
    unfinished = min(tile.rows, -(-reach // problem.stride[0]))
    sums = ((unfinished - 1) * tile.slots + 1) * tile.vector + problem.taps
    sums += min(columns.columns, 24) if problem.element_bytes == 2 else 0
    return read_rows(problem, tile.rows) * tile.slots * columns.words + words * sums + 16


class DirectNchw(Variant):
    stem = "direct_nchw"
    technique = (
        "each thread loads everything that a small tile of outputs reads, with wide loads side by side over the warp, "
        "before it uses the first of it, and sums in registers"
    )

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Tiles in the order of their measured speed; the first whose registers suffice serves all sizes.

        They follow from the filter, the alignment of rows and a class of widths alone: sizes are run-time arguments,
        and were the tile to follow them, every other image size would compile a new kernel.
        """
        load, _ = vector_limits(problem)
        most, half = 16 // problem.element_bytes, problem.element_bytes == 2
        stride, width = problem.stride[1], problem.size[1]
        sequence = problem.size[0] == problem.filter[0] == 1
        # Neighbours' loads are contiguous where a thread owns what one load brings. Of wider rows that are less aligned
        # it owns more, for fewer instructions an output.
        vector = max(1, load // stride)
        if stride == 1 and width >= NARROW:
            vector = min(most, (4 if sequence else 2) * load)
        min_blocks = 5 if half and load == most and problem.taps <= 9 else 1
        if sequence:  # slots instead of rows
            if problem.taps > 16:
                yield window_tile(problem, 2 * vector, 3, 1, 128, 4) if half else window_tile(problem, 2 * vector, 2, 1)
                yield window_tile(problem, 2 * vector, 1, 1)
            yield window_tile(problem, vector, 2, 1)
            rows = [1]
        elif problem.filter[0] == 1 or problem.dilation[0] > 3:  # neighbouring rows share hardly any input
            rows = [2, 1]
        else:
            if load == 4 and problem.taps <= 9 and stride == 1 and width > WIDE and not half:
                yield window_tile(problem, vector, 2, 3, 192)
            yield from warp_tiles(problem)
            # 7 divides the heights of most networks' images: 7, 14, 28, 56, 112. Long rows of the filter make a row of
            # the image cost more, which is shared by more rows of outputs.
            rows = [8 if problem.filter[1] > 5 and not half else 7, 4, 2, 1]
        # 5x5 float32 on 28x28: 0.90 (0.87 on twice as many channels) becomes 0.92 (0.88); bfloat16 with a stride of 2,
        # of fewer registers: 0.79, 0.84 becomes 0.84, 0.88. No gain in float16, a loss at 3x7 (H200, 2026-11).
        compact = problem.dtype == "bfloat16" and stride == 2
        by_column = problem.taps > 9 and problem.filter[1] <= 5 and (compact or (not half and stride == 1))
        by_column &= problem.element_bytes < 8
        for count in rows:
            tile = window_tile(problem, vector, 1, count, 128, 4 if by_column and compact else min_blocks)
            yield replace(tile, by_column=by_column, ahead=6 if by_column and compact else 0)
        yield window_tile(problem, 1, 1, rows[-1])  # for strides and dilations that leave room for no more
        yield Tile(False, 1, 4, 2)

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles: for tests and for tuning."""
        return legal(self.plan(problem, device, tile) for tile in self.tiles(problem))

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        first: str | None = None
        for tile in self.tiles(problem):
            plan = self.plan(problem, device, tile)
            if first is None or isinstance(plan, Rejection):
                yield plan
            else:
                yield Rejection(self.stem, str(tile), f"comes behind {first}; one serves all sizes, for few kernels")
            if first is None and isinstance(plan, Plan):
                first = str(tile)

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if tile.whole_window:
            if problem.taps > MAX_TAPS:
                return rejected(
                    f"the filter's {problem.taps} taps don't fit in registers beside the rows; {MAX_TAPS} do"
                )
            needed = registers(problem, tile)
            if needed > MAX_REGISTERS:
                return rejected(f"needs about {needed} registers a thread; {MAX_REGISTERS} is the most")
        out_h, out_w = problem.out_size
        lanes, column_strips = strips_of(out_w, tile, problem.filter[0] > 1)
        if (tile.warp_loads or tile.warp_stores) and (reason := unwarped(problem, tile, lanes)):
            return rejected(reason)
        row_strips = -(-out_h // tile.rows)
        longest = max(*problem.size, *problem.out_size) + max(problem.padding[0] + problem.padding[1])
        beyond = (lanes * tile.slots * tile.vector + tile.rows) * max(problem.stride)
        if longest + beyond >= 2**31:
            return rejected(f"a padded row or column of {longest} elements is too long to be numbered in 31 bits")
        strips = problem.batch * problem.out_channels * column_strips * row_strips
        if strips * lanes > GRID_X_LIMIT - tile.threads:
            return rejected(f"{strips * lanes} threads can't be numbered in 31 bits")
        constants = problem_constants(problem) | {
            "THREADS": tile.threads,
            "MIN_BLOCKS": tile.min_blocks,
            "SLOTS": tile.slots,
            "VECTOR": tile.vector,
            "ROWS": tile.rows,
            "LOAD_VECTOR": tile.load_vector,
            "STORE_VECTOR": tile.store_vector,
            "WHOLE_WINDOW": int(tile.whole_window),
            "BY_COLUMN": int(tile.by_column),
            "AHEAD": tile.ahead,
            "WARP_LOADS": int(tile.warp_loads),
            "WARP_STORES": int(tile.warp_stores),
        }
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(max(1, -(-strips * lanes // tile.threads)), 1, 1),
            block=(tile.threads, 1, 1),
            shared_bytes=0,
            sizes=problem_sizes(problem),
            tiling=(
                *fast_divisor(lanes),
                *fast_divisor(row_strips),
                *fast_divisor(column_strips),
                *fast_divisor(problem.out_channels),
                strips,
            ),
            tile=f"{tile}, {lanes} lanes",
            predicted_seconds=(
                window_seconds(problem, device, tile, lanes, strips * lanes)
                if tile.whole_window
                else tap_by_tap_seconds(problem, device, strips * lanes * 8, instructions_before=15, per_tap=11)
            ),
        )


def strips_of(out_w: int, tile: Tile, rows_are_shared: bool) -> tuple[int, int]:
    """Threads side by side in a strip of columns, and strips side by side in a plane: as few idle threads as possible.

    >>> strips_of(512, Tile(True, 4, 2, 3), True), strips_of(56, Tile(True, 8, 1, 7), True)
    ((32, 2), (7, 1))
    """
    in_all = -(-out_w // (tile.slots * tile.vector))
    strips = -(-in_all // (MAX_LANES if rows_are_shared else 4 * MAX_LANES))
    return -(-in_all // strips), strips


def window_seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, lanes: int, threads: int) -> float:
    """Predicted time of a tile whose rows are all loaded first: a norm of memory, instruction issue, L1 and latency.

    Constants were fitted to 315 measurements on an H200 (root mean square error 6 %).
    """
    element, outputs = problem.element_bytes, tile.rows * tile.slots * tile.vector
    columns, rows = ReadColumns.of(problem, tile), read_rows(problem, tile.rows) * tile.slots
    loads, stores = rows * columns.loads, outputs / tile.store_vector
    warps = threads / 32 / device.multiprocessors

    instructions = 70 + outputs * problem.taps * (2 if element == 8 else 1) + 4.5 * loads + 3.2 * stores + 11 * rows
    if element == 2:
        instructions += 1.2 * (rows * columns.columns + problem.taps) + outputs / 2  # conversions
    each = 4 * columns.words / columns.loads  # bytes of a load, on average
    apart = each if tile.warp_loads else tile.vector * problem.stride[1] * element
    stored = tile.store_vector * element
    lines = loads * lines_of(each, apart, lanes)
    lines += stores * lines_of(stored, stored if tile.warp_stores else tile.vector * element, lanes)
    resident = min(device.threads / 32, device.registers / 32 / (-(-registers(problem, tile) // 8) * 8))

    in_bytes, out_bytes = (element * math.prod(shape) for shape in (problem.x_shape, problem.y_shape))
    cut = 1.35 if stored < 8 and tile.vector * element == 16 and not tile.warp_stores else 1
    moved = in_bytes * (1 + 0.84 * shared_ends(problem.size[1] * element))
    moved += out_bytes * (1 + 0.57 * (cut * (1 + shared_ends(problem.out_size[1] * element)) - 1))
    times = (
        1.01 * moved / (device.dram_gbs * 1e9),
        1.46 * warps * instructions / (4 * device.clock),
        0.72 * warps * lines / device.clock,  # L1
        0.6e-9 * device.latency_ns * warps / resident,
    )
    # 3 % more than the fit: beside staged_nchw's model, that chooses the faster of the two most often
    return 2 * LAUNCH_SECONDS + 1.03 * math.pow(sum(t**4 for t in times), 1 / 4)


def shared_ends(row_bytes: int) -> float:
    """Of a row, the part that sectors of 32 bytes add which it shares with its neighbours: they are moved twice."""
    return (32 - math.gcd(row_bytes, 32)) / max(1, row_bytes)


def lines_of(width: float, apart: float, lanes: int) -> float:
    """Cache lines of 128 bytes that one access of a warp touches: `width` bytes, `apart` bytes from lane to lane.

    The L1 looks up one line a clock; strips of few lanes lie in different rows.
    """
    together = 32 / max(1.0, width / 4)  # lanes that one pass serves
    side_by_side = min(lanes, together)
    stretch = side_by_side * apart
    return 32 / side_by_side * max(side_by_side / together, stretch / 128 if lanes >= together else 1 + stretch / 128)
