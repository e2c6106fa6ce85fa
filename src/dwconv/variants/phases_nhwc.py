"""phases_nhwc: gradients of x with a stride or a multiplier, channels last: a thread makes all phases of its places."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..device import DeviceSpec
from ..plan import Plan, Rejection, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from .base import GRID_X_LIMIT, Variant
from .nhwc_tiles import Cut, tiling_of
from .phases import MAX_PRODUCTS, g_strides, norm, out_of_reach, reaches, rounds
from .strips import divided, too_long, up, widest

MAX_REGISTERS = 160  # of the estimate; ptxas takes more where there are
KEPT = 40  # numbers of the filter that stay in registers; twin of kKept
COMFORTABLE = 124  # of the estimate: two blocks of 256 threads fit on a multiprocessor


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A thread takes `rows` × `columns` places of g and `vector` neighbouring channels of dx.

    Attributes:
        chunk: channels of dx of a block.
        load, copy: elements of g that a thread loads, or copies to shared memory, with one instruction.
        staged: whether a block's part of g waits in shared memory, not in registers; only where the stride is 1.
        threads: of a block.
        min_blocks: blocks that a multiprocessor should hold, which limits a thread's registers.
    """

    rows: int
    columns: int
    vector: int
    chunk: int
    load: int
    copy: int
    staged: bool
    threads: int
    min_blocks: int

    def __str__(self) -> str:
        how = "staged" if self.staged else "from registers"
        return (
            f"{self.rows} × {self.columns} places × {self.vector} channels a thread, {self.chunk} channels and "
            f"{self.threads} threads a block, {how}"
        )

    @property
    def spots(self) -> int:
        """Threads of a block that work on the same channels."""
        return self.threads * self.vector // self.chunk


class PhasesNhwc(Variant):
    stem = "phases_nhwc"
    directions = ("grad_input",)
    layouts = ("channels_last",)
    technique = (
        "each thread takes a few places of g and some neighbouring channels, loads what its tile of dx reads before it "
        "uses the first of it, and makes all phases of the stride, a tap for all places at a time"
    )

    def unsupported(self, problem: DepthwiseProblem) -> str | None:
        return super().unsupported(problem) or out_of_reach(problem)

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Tiles in question: a few shapes, of narrow chunks and wide ones."""
        found: dict[Tile, None] = {}
        for rows, columns, threads, staged in self.shapes(problem):
            vector = max(2, min(4, 16 // problem.element_bytes))
            limit = MAX_REGISTERS - 20 if (rows, columns) == (7, 1) and problem.taps <= 9 else COMFORTABLE
            while vector > 1 and registers(problem, rows, columns, vector, staged) > limit:
                vector //= 2
            widths = [128, 512] if problem.multiplier == 1 else [64, 128]
            if staged:
                widths = widths[1:] if threads == 128 else widths[:1]
            elif problem.taps > 9 and max(problem.stride) > 1:  # wide chunks wait for their filters
                widths = widths[:1]
            for most_bytes in widths:
                found[self.tile(problem, rows, columns, vector, most_bytes, staged, threads)] = None
        yield from found

    def shapes(self, problem: DepthwiseProblem) -> list[tuple[int, int, int, bool]]:
        """Rows and columns of places of a thread, threads of a block, and whether a block's part of g is staged."""
        if problem.size[0] == problem.filter[0] == 1:
            return [(1, 4, 256, False), (1, 2, 256, False), (1, 1, 256, False)]
        if max(problem.stride) == 1:
            return [(4, 4, 128, True), (4, 4, 256, True), (2, 2, 256, False)]
        found = [(2, 2, 128, False)]
        if problem.taps <= 9:
            found.append((2, 2, 256, False))
        if max(problem.stride) > 2 or (problem.element_bytes > 2 and problem.taps <= 9):
            found += [(1, 2, 256, False), (1, 1, 256, False)]
        if max(problem.size) <= 14 * max(problem.stride):
            found.append((7, 1, 128, False))
            if problem.taps > 9 and problem.element_bytes == 2:
                found.append((4, 2, 192, False))
        return found

    def tile(
        self,
        problem: DepthwiseProblem,
        rows: int,
        columns: int,
        wanted: int,
        most_bytes: int,
        staged: bool,
        threads: int,
    ) -> Tile:
        """A tile, with vectors as wide as addresses allow."""
        element, multiplier = problem.element_bytes, problem.multiplier
        elements = min(problem.aligned, 16) // element
        image, _, row, column = g_strides(problem)
        vector = widest(min(wanted, elements), problem.channels)
        chunk = chunk_of(problem, vector, most_bytes)
        load = widest(elements, vector * multiplier, image, row, column)
        copy = widest(load, chunk * multiplier)
        blocks = 65536 // threads // up(registers(problem, rows, columns, vector, staged), 8)
        return Tile(rows, columns, vector, chunk, load, copy, staged, threads, max(1, min(4, blocks)))

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        found = [self.plan(problem, device, tile) for tile in self.tiles(problem)]
        yield from found
        if not any(isinstance(each, Plan) for each in found):
            yield self.plan(problem, device, self.tile(problem, 1, 1, 1, 64, False, 128))

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        products = problem.taps * problem.multiplier * tile.rows * tile.columns * tile.vector
        elements = tile.rows * tile.columns * tile.vector * math.prod(problem.stride)
        if products + elements > MAX_PRODUCTS:
            return rejected(f"{products} products for {elements} elements of dx are too many to be unrolled")
        needed = registers(problem, tile.rows, tile.columns, tile.vector, tile.staged)
        if needed > MAX_REGISTERS:
            return rejected(f"needs about {needed} registers a thread; {MAX_REGISTERS} is the most")
        if tile.spots < 1 or tile.chunk * problem.multiplier // tile.copy > tile.threads:
            return rejected(f"a pixel's {tile.chunk} channels take more than {tile.threads} threads")
        _, _, row, column = g_strides(problem)
        pixels = (tile.rows * problem.stride[0] + 1) * problem.size[1]
        if max(row, column, pixels * problem.channels) >= 2**31:
            return rejected("rows of g or dx are too long for 32-bit offsets")
        limit = device.shared_bytes // 2 - 1024
        one = best_cut(problem, tile, limit - filter_bytes(problem, tile))
        if one is None:
            return rejected(f"filters and a tile of g with its halo take more than {limit} bytes of shared memory")
        chunks = divided(problem.channels, tile.chunk)
        if max(1, one.tiles) * chunks > GRID_X_LIMIT:
            return rejected(f"{one.tiles} tiles of {chunks} chunks can't be numbered in 31 bits")
        slots = max(1, tile.threads // max(1, tile.chunk * problem.multiplier // tile.copy))
        constants = problem_constants(problem) | {
            "THREADS": tile.threads,
            "MIN_BLOCKS": tile.min_blocks,
            "CHUNK": tile.chunk,
            "VECTOR": tile.vector,
            "LOAD": tile.load,
            "COPY": tile.copy,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "STAGED": int(tile.staged),
            "MANY_IMAGES": int(one.images > 1),
        }
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(max(1, one.tiles * chunks), 1, 1),
            block=(tile.threads, 1, 1),
            shared_bytes=filter_bytes(problem, tile) + stage_bytes(problem, tile, one),
            sizes=problem_sizes(problem),
            tiling=tiling_of(one, problem.batch, chunks, slots),
            tile=f"{tile}, {one.images} × {one.row_groups} × {one.column_groups} of them",
            predicted_seconds=seconds(problem, device, tile, one),
        )


def registers(problem: DepthwiseProblem, rows: int, columns: int, vector: int, staged: bool) -> int:
    """Registers that a thread can do with: g as it lies in memory, the sums of one phase, a tap, and addresses."""
    (row, column), element = reaches(problem), problem.element_bytes
    numbers = (columns + column.span - 1) * vector * problem.multiplier
    if staged:  # one row of g, unfinished rows of sums, and the filter
        taps = problem.taps * problem.multiplier * vector
        sums = min(rows, row.span) * columns * vector
        return (numbers + sums + (taps if taps <= KEPT else vector + 16)) * max(1, element // 4) + 34
    window = (rows + row.span - 1) * numbers
    return divided(window * element, 4) + max(1, element // 4) * (rows * columns + 1) * vector + 34


def chunk_of(problem: DepthwiseProblem, vector: int, most_bytes: int) -> int:
    """Channels of a block: at most `most_bytes` of a pixel, whole sectors, with few idle threads.

    >>> half = dict(batch=1, size=(8, 8), filter=(3, 3), stride=(2, 2), dtype="float16", direction="grad_input")
    >>> [chunk_of(DepthwiseProblem(channels=c, **half), 8, 128) for c in (8, 64, 72, 96, 144, 240)]
    [8, 64, 72, 48, 48, 48]
    """
    channels, size = problem.channels, problem.element_bytes
    most = max(vector, most_bytes // size // vector * vector)
    if channels * 8 <= most * 9:
        return channels

    def cost(chunk: int) -> float:
        idle = divided(channels, chunk) * chunk / channels
        ragged = 0 if chunk * size % 32 == 0 or channels * size % 32 else 0.3  # sectors that two blocks write
        return idle + ragged + 8 / (chunk * size)

    return min(range(vector, most + 1, vector), key=cost)


def filter_bytes(problem: DepthwiseProblem, tile: Tile) -> int:
    pitch = up(tile.chunk, 4) + 4
    return up(problem.multiplier * problem.taps * pitch * problem.sum_bytes, 16)


def stage_bytes(problem: DepthwiseProblem, tile: Tile, one: Cut) -> int:
    elements = one.pixels * tile.chunk * problem.multiplier
    return up(elements * problem.element_bytes, 16) if tile.staged else 0


def cut(problem: DepthwiseProblem, tile: Tile, column_groups: int, row_groups: int) -> Cut:
    """The cut with so many threads side by side and one above the other."""
    row, column = reaches(problem)
    column_tiles = divided(column.places, column_groups * tile.columns)
    row_tiles = divided(row.places, row_groups * tile.rows)
    images = tile.spots // (column_groups * row_groups) if column_tiles * row_tiles == 1 else 1
    images = max(1, min(images, problem.batch))
    return Cut(
        column_groups,
        row_groups,
        images,
        column_tiles,
        row_tiles,
        in_columns=column_groups * tile.columns + column.span - 1,
        in_rows=row_groups * tile.rows + row.span - 1,
        tiles=divided(problem.batch, images) * column_tiles * row_tiles,
    )


def best_cut(problem: DepthwiseProblem, tile: Tile, most_bytes: int) -> Cut | None:
    """The cut with the fewest clocks of a multiprocessor: what idle threads would issue, and the halo."""
    row, column = reaches(problem)
    found, least = None, math.inf
    thread = thread_instructions(problem, tile)
    pixel = tile.chunk * problem.multiplier * problem.element_bytes
    for column_groups in range(1, min(tile.spots, divided(column.places, tile.columns)) + 1):
        for row_groups in range(1, min(tile.spots // column_groups, divided(row.places, tile.rows)) + 1):
            one = cut(problem, tile, column_groups, row_groups)
            if stage_bytes(problem, tile, one) > most_bytes:
                continue
            g_bytes = one.pixels * pixel
            clocks = max(1, one.tiles) * (tile.threads * thread / 100 + g_bytes / 20)
            if clocks < least:
                found, least = one, clocks
    return found


def thread_instructions(problem: DepthwiseProblem, tile: Tile) -> float:
    """What a thread issues."""
    (row, column), element = reaches(problem), problem.element_bytes
    places, taps = tile.rows * tile.columns, problem.taps * problem.multiplier
    window = (tile.rows + row.span - 1) * (tile.columns + column.span - 1)
    channels = tile.vector * problem.multiplier
    again = 2.0 if max(problem.stride) == 1 else 3.5  # conversions of one element
    pixels = places * math.prod(problem.stride)
    return (
        147
        + taps * tile.vector * (places * (2 if element == 8 else 1) + 0.07)
        + window * channels / tile.load * (1.5 if tile.staged else 4)
        + again * window * channels * (element == 2)
        + pixels * (5 + tile.vector / 2 * (element == 2))
        + (20 + 7 * places * channels / tile.copy) * tile.staged
    )


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time; fitted to all tiles of 20 problems on an H200 (2026-11).

    A norm of DRAM, sectors at the L2, L1, issue, and rounds of blocks that wait, after a fixed start.
    """
    (row, column), element = reaches(problem), problem.element_bytes
    blocks = max(1, one.tiles) * divided(problem.channels, tile.chunk)
    threads = blocks * up(tile.threads, 32) / device.multiprocessors
    window = (tile.rows + row.span - 1) * (tile.columns + column.span - 1) * problem.multiplier
    places = tile.rows * tile.columns
    l1_bytes = threads * tile.vector * (window + places * math.prod(problem.stride)) * element
    issue = 1.88 * threads / 32 * thread_instructions(problem, tile) / (4 * device.clock)
    piece = min(tile.chunk, problem.channels) * element
    again = 1 + 0.0865 * math.log2(places) + (32 - math.gcd(problem.channels * element, 32)) / piece
    if tile.chunk < problem.channels:
        again += (32 - math.gcd(piece, 32) + 0.2 * (128 - math.gcd(piece, 128))) / piece
    outputs = math.prod(problem.x_shape) * element
    g_bytes = one.pixels * tile.chunk * problem.multiplier * element * blocks
    dram = 0.9 * problem.least_bytes / (device.dram_gbs * 1e9)
    l2 = (0.58 * g_bytes + 0.94 * outputs * again) / (device.dram_gbs * 1e9)
    needed = registers(problem, tile.rows, tile.columns, tile.vector, tile.staged)
    shared = filter_bytes(problem, tile) + stage_bytes(problem, tile, one)
    wait = 1.26 + 0.15 * problem.taps * problem.multiplier * tile.chunk / tile.threads  # latencies; filters come first
    full = rounds(device, blocks, tile.threads, needed, shared)
    return 4.6e-6 + norm(8, dram, l2, issue, l1_bytes / (28 * device.clock), wait * 1e-9 * device.latency_ns * full)
