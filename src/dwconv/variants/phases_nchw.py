"""phases_nchw: gradients of x with a stride or a multiplier, channels first: a thread makes all phases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem, dense_strides
from .base import GRID_X_LIMIT, Variant
from .phases import MAX_PRODUCTS, g_size, g_strides, norm, out_of_reach, reaches, rounds
from .strips import divided, too_long, up, widest

MAX_REGISTERS = 190  # of the estimate
MAX_IN_STEPS = 150  # where planes of g come one after the other, and sums wait for all of them
MOST_STAGED = 72 << 10  # bytes of shared memory of a block


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A thread takes `rows` × `vector` places of g.

    Attributes:
        load_vector, store_vector: elements of g and of dx that one instruction moves.
        copy: elements that one copy between global and shared memory moves.
        together: planes of g whose places are loaded before the first use.
        staged: whether g and dx pass through shared memory.
        by_plane: whether neighbouring threads take neighbouring planes.
        threads: of a block.
    """

    rows: int
    vector: int
    load_vector: int
    store_vector: int
    copy: int
    together: int
    staged: bool
    by_plane: bool
    threads: int

    def __str__(self) -> str:
        how = "staged" if self.staged else "from registers"
        order = ", neighbours in planes" if self.by_plane else ""
        return (
            f"{self.rows} × {self.vector} places a thread, loads of {self.load_vector} elements, stores of "
            f"{self.store_vector}, {how}{order}, {self.threads} threads"
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """How planes are cut.

    Attributes:
        lanes: threads side by side.
        row_strips: of a column strip, or of a band.
        column_strips: of a plane.
        bands: of a plane.
        planes: of a block.
        g_bytes, dx_bytes: of a block, in shared memory.
    """

    lanes: int
    row_strips: int
    column_strips: int = 1
    bands: int = 1
    planes: int = 1
    g_bytes: int = 0
    dx_bytes: int = 0


class PhasesNchw(Variant):
    stem = "phases_nchw"
    directions = ("grad_input",)
    technique = (
        "each thread loads the places of g that a small tile of dx reads before it uses the first of them, makes all "
        "phases of the stride from them, and small planes leave through shared memory as one stretch"
    )

    def unsupported(self, problem: DepthwiseProblem) -> str | None:
        return super().unsupported(problem) or out_of_reach(problem)

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Tiles in question: from registers, of few rows and of many, and staged, of many."""
        element, multiplier = problem.element_bytes, problem.multiplier
        stride = widest(16, problem.stride[1])
        image, channel, row, _ = g_strides(problem)
        copy = min(problem.aligned, 16) // element
        load = widest(copy, g_size(problem)[1], image, channel, row)
        store = widest(copy, problem.size[1])
        most = max(1, 16 // element // stride)  # places whose elements of dx one store takes
        flat = problem.size[0] == problem.filter[0] == 1
        rows = [1] if flat else [2, 4, 7] if problem.stride[0] <= 2 else [1, 2]

        def tile(count: int, vector: int, staged: bool, by_plane: bool, threads: int) -> Tile:
            together = max(
                [n for n in (2, 1) if multiplier % n == 0],
                key=lambda n: (registers(problem, count, vector, n) <= MAX_REGISTERS, n),
            )
            load_vector, store_vector = widest(load, vector), widest(store, vector * problem.stride[1])
            return Tile(count, vector, load_vector, store_vector, copy, together, staged, by_plane, threads)

        # What a store leaves out of a sector comes with another store, from registers; in shared memory that is cheap.
        narrow, wide = min(most, max(1, store // stride)), min(most, max(1, store // stride, load))
        for count in sorted({*rows, 1}):
            yield tile(count, narrow, False, False, 128)
        if multiplier > 1 and narrow == most:
            return  # shared memory would make nothing whole
        for vector in dict.fromkeys((wide, most)):
            yield tile(rows[-1], vector, True, False, 128)
            if divided(problem.size[1], wide * problem.stride[1]) < 16:
                yield tile(rows[-1], vector, True, True, 256)
        if divided(problem.size[1], wide * problem.stride[1]) < 16:
            yield tile(rows[-2:][0], most, True, True, 256)

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        for tile in dict.fromkeys(self.tiles(problem)):
            yield self.plan(problem, device, tile)

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        products = problem.taps * tile.rows * tile.vector * tile.together
        elements = tile.rows * tile.vector * math.prod(problem.stride)
        if products + elements > MAX_PRODUCTS:
            return rejected(f"{products} products for {elements} elements of dx are too many to be unrolled")
        needed = registers(problem, tile.rows, tile.vector, tile.together)
        most = MAX_REGISTERS if tile.together == problem.multiplier else MAX_IN_STEPS
        if needed > most:
            return rejected(f"needs about {needed} registers a thread; {most} is the most")
        planes = problem.batch * problem.channels
        one = staged_cut(problem, device, tile) if tile.staged else direct_cut(problem, tile)
        if isinstance(one, str):
            return rejected(one)
        if tile.by_plane and one.planes < 8:
            return rejected(f"a block has {one.planes} planes, too few to be neighbours")
        strips = planes * one.column_strips * one.row_strips
        groups = divided(planes, one.planes)
        blocks = groups * one.bands if tile.staged else divided(strips * one.lanes, tile.threads)
        if max(blocks, strips * one.lanes if not tile.staged else planes + one.planes) > GRID_X_LIMIT - tile.threads:
            return rejected(f"{strips * one.lanes} threads can't be numbered in 31 bits")
        constants = problem_constants(problem) | {
            "THREADS": tile.threads,
            "MIN_BLOCKS": 1,
            "ROWS": tile.rows,
            "VECTOR": tile.vector,
            "LOAD_VECTOR": tile.load_vector,
            "STORE_VECTOR": tile.store_vector,
            "TOGETHER": tile.together,
            "STAGED": int(tile.staged),
            "BY_PLANE": int(tile.by_plane),
            "COPY": tile.copy,
        }
        divisors = (one.lanes, one.row_strips, one.column_strips, problem.channels, one.bands, one.planes)
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(max(1, blocks), 1, 1),
            block=(tile.threads, 1, 1),
            shared_bytes=one.g_bytes + one.dx_bytes,
            sizes=problem_sizes(problem),
            tiling=(
                *(field for divisor in divisors for field in fast_divisor(divisor)),
                0 if tile.staged else strips,
                planes,
                one.g_bytes,
            ),
            tile=f"{tile}, {one.lanes} lanes"
            + (f", {one.planes} planes" if one.bands == 1 else f", {one.bands} bands") * tile.staged,
            predicted_seconds=seconds(problem, device, tile, one, max(1, blocks)),
        )


def registers(problem: DepthwiseProblem, rows: int, vector: int, together: int) -> int:
    """Estimate of a thread's registers: places of g, sums, taps, and addresses."""
    (row, column), element = reaches(problem), problem.element_bytes
    cells = (rows + row.span - 1) * (vector + column.span - 1) * together
    sums = vector * problem.stride[1] * (2 if problem.multiplier == together else rows * problem.stride[0])
    taps = problem.taps * together
    if element == 2:
        return divided(cells * 3, 4) + min(cells // 4, 48) + sums + taps + 34
    return (cells + sums + taps) * (element // 4) + 34


def direct_cut(problem: DepthwiseProblem, tile: Tile) -> Cut:
    """Strips of up to 32 lanes, as few idle ones as possible."""
    row, column = reaches(problem)
    in_all = divided(column.places, tile.vector)
    column_strips = divided(in_all, 32 if problem.filter[0] > 1 else 128)
    return Cut(divided(in_all, column_strips), divided(row.places, tile.rows), column_strips)


def staged_cut(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Cut | str:
    """Whole planes, as many as the threads take at a time, or bands of one; or why there is none."""
    (row, column), element = reaches(problem), problem.element_bytes
    (g_rows, g_columns), (height, width) = g_size(problem), (problem.size[0], problem.size[1])
    image, channel, g_row, _ = g_strides(problem)
    dense = dense_strides(problem.source_shape, "channels_first")
    if (image, channel) != dense[:2] or (g_row not in (0, g_columns) and g_rows > 1):
        return "g must be dense where planes are staged"
    lanes, strips = divided(column.places, tile.vector), divided(row.places, tile.rows)
    limit = min(MOST_STAGED, device.shared_bytes // 2 - 1024)
    g_plane, dx_plane = g_rows * g_columns * problem.multiplier * element, height * width * element

    def cut(row_strips: int, bands: int, planes: int, g_bytes: int, dx_bytes: int) -> Cut:
        # a vector more each, as stretches begin between vectors
        return Cut(lanes, row_strips, 1, bands, planes, up(g_bytes + 16, 16), up(dx_bytes + 16, 16))

    if lanes * strips <= tile.threads or problem.multiplier > 1:
        planes = max(1, min(tile.threads // (lanes * strips), limit // (g_plane + dx_plane)))
        lines = 128 // math.gcd(dx_plane, 128)  # planes that fill lines
        planes -= planes % lines if planes > lines else 0
        planes = max(1, min(planes, problem.batch * problem.channels))
        found = cut(strips, 1, planes, g_plane * planes, dx_plane * planes)
    else:
        bands = divided(strips, max(1, tile.threads // lanes))
        each = divided(strips, bands)
        bands = divided(strips, each)
        rows = min(g_rows, each * tile.rows + row.span - 1)
        dx_rows = min(height, each * tile.rows * problem.stride[0])
        found = cut(each, bands, 1, rows * g_columns * element, dx_rows * width * element)
    if found.g_bytes + found.dx_bytes > limit:
        return f"a block's part of g and dx takes {found.g_bytes + found.dx_bytes} bytes; {limit} is the most"
    return found


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut, blocks: int) -> float:
    """Predicted time; fitted to all tiles of 20 problems on an H200 (2026-11).

    A norm of DRAM, sectors at the L2, issue, shared memory, and rounds of blocks that wait, after a fixed start.
    """
    (row, column), element = reaches(problem), problem.element_bytes
    width = tile.vector * problem.stride[1]
    window = (tile.rows + row.span - 1) * problem.multiplier
    loads = window * (divided(tile.vector, tile.load_vector) + min(column.span - 1, 2))
    elements = tile.rows * problem.stride[0] * width
    outputs = math.prod(problem.x_shape) * element
    needed = registers(problem, tile.rows, tile.vector, tile.together)
    instructions = (
        60
        + problem.taps * problem.multiplier * (tile.rows * tile.vector * (2 if element == 8 else 1) + 1.5)
        + 3.5 * loads
        + 3 * elements / tile.store_vector
        + (window * (tile.vector + column.span - 1) + elements / 2) * (element == 2)
    )
    scattered, written, waits, passed = 0.0, 1.0, 1.35, 0.0
    if tile.staged:
        instructions += 80 + 5 * elements * (1 + g_share(problem)) / tile.copy
        passed = element * (window * (tile.vector + column.span - 1) + 2 * elements * (1 + g_share(problem)))
    else:
        row_bytes, apart = problem.size[1] * element, math.log2(tile.rows)
        scattered, waits = 0.078 * outputs * apart, 0.23
        written += (32 - math.gcd(row_bytes, 32)) / row_bytes * (0.65 + 1.23 * apart)
        needed = needed * 18 // 25
    dram = (0.8 * problem.least_bytes + scattered) / (device.dram_gbs * 1e9)
    l2 = (1.02 * (problem.least_bytes - outputs) + 0.815 * outputs * written) / (device.dram_gbs * 1e9)
    threads = blocks * tile.threads / device.multiprocessors
    issue = 1.54 * threads / 32 * instructions / (4 * device.clock)
    shared = 4.3 * threads * passed / (128 * device.clock)
    full = rounds(device, blocks, tile.threads, needed, one.g_bytes + one.dx_bytes)
    return 7.2e-6 + norm(5.1, dram, l2, issue, shared, waits * 1e-9 * device.latency_ns * full)


def g_share(problem: DepthwiseProblem) -> float:
    """Elements of g for one of dx."""
    return math.prod(problem.y_shape) / max(1, math.prod(problem.x_shape))
