"""direct_nhwc: tiles with their halo wait in shared memory; the fast channels-last variant for small filters."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, legal, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .base import GRID_X_LIMIT, Variant
from .direct_tiles import Tile, best_cut, chunk_of, filter_bytes, lines_of, stage_bytes, staged_bytes, vectors
from .nhwc_tiles import Cut, tiling_of
from .strips import too_long, widest, window_columns, window_rows

MAX_TAPS = 32
USUAL_SIDES = (7, 14, 28, 56)  # of images
SHARED_STEPS = (0, 8, 16, 32, 64, 100, 132, 164, 196, 228)  # KiB of shared memory that the H200 can set apart
SMALL = 8 << 20  # bytes of traffic that take hardly longer than the launch
KEPT = 56  # numbers of the filter that a thread keeps in registers; more are read from shared memory for every row


class DirectNhwc(Variant):
    stem = "direct_nhwc"
    layouts = ("channels_last",)
    technique = (
        "each block copies a tile of some channels with its halo to shared memory, a thread then makes several rows "
        "and columns of outputs of neighbouring channels from it, with sums and filter in registers"
    )

    def shapes(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Tiles in question, the best first, as they measured on problems of the kind (H200, 2026-11).

        The order depends on the size of images only by a few classes, so that few kernels are compiled.
        """
        half, side = problem.element_bytes == 2, usual_side(problem)
        pixel = problem.out_channels * problem.element_bytes
        # rows, columns, vector, threads (0: about 128, four pixels or more), bytes of a pixel, stages, min_blocks, each
        one, many = (7, 4, 2, 256, 128, 1, 1, 1), (7, 4, 2, 256, 128, 2, 3, 0)
        square, flat = (7, 7, 2, 0, 128, 1, 1, 1), (7, 4, 2, 224, 128, 1, 1, 1)
        found: list[tuple[int, ...]]
        if problem.filter[0] == 1:
            found = [(1, 8, 4, 256, 128, 1, 1, 1), (1, 8, 4, 256, 128, 2, 2, 0)]
            if problem.taps > 5:
                found.reverse()
            if pixel < 64:
                found.insert(0, (1, 16, 2, 128, 128, 2, 4, 0))
        elif problem.filter[1] == 1:
            found = [(8, 1, 4, 256, 128, 1, 1, 1), (4, 1, 4, 256, 128, 1, 1, 1)]
        elif max(problem.stride) > 1 and problem.taps > 9:
            found = [
                (4, 2, 2, 256, 128, 2, 2, 0) if half else (2, 4, 2, 256, 128, 2, 2, 0),
                (4, 4, 2, 128, 128, 1, 1, 1),
            ]
        elif max(problem.stride) > 1 and half:
            found = [(2, 2, 4, 256, 128, 2, 2, 0), (2, 2, 2, 256, 128, 2, 3, 0)]
            if 128 < pixel <= 192:  # a block takes whole pixels
                found.insert(0, (4, 2, 2, 256, 192, 1, 1, 1))
        elif max(problem.stride) > 1:
            found = [(2, 2, 2, 256, 128 if pixel % 128 == 0 else 192, 1, 1, 1), (4, 2, 2, 256, 128, 1, 1, 1)]
        elif problem.taps > 9:
            found = (
                [(4, 8, 2, 128, 128, 2, 3, 0), (2, 4, 4, 256, 128, 2, 2, 0)] if half else [(4, 7, 2, 128, 128, 1, 1, 1)]
            )
        elif max(problem.dilation) > 1:
            found = [(2, 4, 4, 256, 128, 2, 2, 0)]
            if max(problem.dilation) < 4 and not half:
                found.insert(0, many)
        elif half and side >= 56:
            found = [square, (7, 4, 2, 128, 128, 2, 3, 0)]
            if pixel <= 64 or problem.multiplier > 1:
                found.reverse()
        elif half:
            found = [square]
            if side > 7:
                found.insert(0, (4, 4, 2, 256, 128, 2, 3, 0) if side == 28 else (7, 4, 2, 224, 128, 2, 3, 0))
        elif side >= 56:
            found = [flat if pixel % 128 == 0 else many, square]
            if problem.multiplier > 1:
                found.reverse()
        else:
            found = [one] if side == 28 else [flat if side == 14 else many, one]
        if is_small(problem):
            # one round of many small blocks: what counts is how soon the last one has its data
            found.insert(0, (2, 2, 2, 256, 192, 1, 1, 1) if half else (4, 2, 2, 256, 128, 1, 1, 1))
        if problem.dtype == "float64":  # a sum takes two registers
            found = [(min(2, rows), *shape) for rows, *shape in found]
        found.append((2, 2, 1, 128, 64, 1, 1, 1))  # where nothing else is legal
        for rows, columns, vector, threads, most_bytes, stages, min_blocks, each in found:
            yield self.tile(problem, rows, columns, vector, threads, most_bytes, stages, min_blocks, each=each)

    def tile(
        self,
        problem: DepthwiseProblem,
        rows: int,
        columns: int,
        vector: int,
        threads: int = 256,
        most_bytes: int = 128,
        stages: int = 1,
        min_blocks: int = 1,
        kept: bool | None = None,
        each: int | None = None,
    ) -> Tile:
        """A tile, with vectors and copies as wide as addresses allow."""
        vector = vectors(problem, vector)
        chunk = chunk_of(problem, vector, most_bytes)
        image, _, row, column = problem.plane_strides
        in_chunk = chunk // problem.multiplier
        copy = widest(
            max(1, min(16, problem.aligned) // problem.element_bytes), problem.channels, in_chunk, image, row, column
        )
        lanes = chunk // vector
        threads = threads or max(1, 128 // lanes // 4) * 4 * lanes
        kept = problem.taps * vector <= KEPT if kept is None else kept
        each = (0 if stages > 1 else 1) if each is None else each
        return Tile(rows, columns, vector, chunk, copy, threads, stages, min_blocks, kept, each)

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles: for tests and for tuning."""
        return legal(self.plan(problem, device, tile) for tile in self.shapes(problem))

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        chosen = False
        for tile in self.shapes(problem):
            plan = self.plan(problem, device, tile)
            if chosen and isinstance(plan, Plan):
                yield Rejection(self.stem, str(tile), "another tile measured faster on problems of this kind")
            else:
                yield plan
            chosen = chosen or isinstance(plan, Plan)

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        if problem.taps > MAX_TAPS:
            return rejected(f"the filter's {problem.taps} taps are too many to be unrolled; {MAX_TAPS} are not")
        if tile.chunk // problem.multiplier // tile.copy > tile.threads or tile.chunk // tile.vector > tile.threads:
            return rejected(f"a pixel's {tile.chunk} channels take more than {tile.threads} threads")
        most_bytes = device.shared_bytes - 1024 - filter_bytes(problem, tile)
        one = best_cut(problem, tile, most_bytes)
        if one is None:
            return rejected(f"a tile with its halo takes more than {most_bytes} bytes of shared memory")
        _, _, row, column = problem.plane_strides
        if (
            max(row, column, problem.out_size[1] * problem.out_channels * (tile.rows + 1), one.pixels * tile.chunk)
            >= 2**31
        ):
            return rejected("rows of x or y are too long for 32-bit offsets")
        chunks = -(-problem.out_channels // tile.chunk)
        tiles = max(1, one.tiles)
        shared_bytes = filter_bytes(problem, tile) + tile.stages * stage_bytes(problem, tile, one)
        each, first = tile.each, tile.each
        if tile.each == 0:
            resident = max(tile.min_blocks, 512 // tile.threads)
            resident = max(1, min(device.shared_bytes // (shared_bytes + 1024), resident))
            # all blocks are resident: one more would wait for another's last tile
            each, first = -(-tiles // max(1, device.multiprocessors * resident // chunks)), 1
        workers = -(-tiles // each)
        step = workers if tile.each == 0 else 1
        if max(workers * chunks, one.tiles + step * (each + tile.stages)) > GRID_X_LIMIT:
            return rejected(f"{tiles} tiles of {chunks} chunks can't be numbered in 31 bits")
        slots = tile.threads // (tile.chunk // problem.multiplier // tile.copy)
        constants = problem_constants(problem) | {
            "THREADS": tile.threads,
            "MIN_BLOCKS": tile.min_blocks,
            "CHUNK": tile.chunk,
            "VECTOR": tile.vector,
            "COPY": tile.copy,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "STAGES": tile.stages,
            "LOOP": int(tile.each != 1),
            "KEEP_FILTER": int(tile.kept),
            "MANY_IMAGES": int(one.images > 1),
        }
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(max(1, workers * chunks), 1, 1),
            block=(tile.threads, 1, 1),
            shared_bytes=shared_bytes,
            sizes=problem_sizes(problem),
            tiling=tiling_of(one, problem.batch, chunks, slots, first, step, each),
            tile=f"{tile}, tiles of {one.images} × {one.row_groups * tile.rows} × {one.column_groups * tile.columns}",
            predicted_seconds=seconds(problem, device, tile, one, shared_bytes, each, workers * chunks),
        )


def is_small(problem: DepthwiseProblem) -> bool:
    """3x3 on an image or two: 1 x 144 x 56 x 56 takes 6.3 us, of which 2.5 are the launch (H200, 2026-11)."""
    few = problem.batch <= 2 and problem.least_bytes < SMALL
    return few and problem.taps == 9 and max(*problem.stride, *problem.dilation) == 1


def usual_side(problem: DepthwiseProblem) -> int:
    """The side of usual images that is next to the problem's: a class of sizes."""
    side = math.sqrt(math.prod(problem.size))
    return min(USUAL_SIDES, key=lambda s: abs(math.log(side / s)))


def register_estimate(problem: DepthwiseProblem, tile: Tile) -> int:
    """About how many registers a thread takes: sums of unfinished rows, the window of one row, and addresses."""
    live = tile.rows
    if problem.dilation[0] == 1:
        live = min(live, -(-problem.filter[0] // problem.stride[0]))
    span = window_columns(problem, tile.columns)
    numbers = (live * tile.columns + span) * tile.vector * (2 if problem.dtype == "float64" else 1)
    return -(-(numbers + (30 if tile.each == 1 else 42)) // 8) * 8


def seconds(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    tile: Tile,
    one: Cut,
    shared_bytes: int,
    block_tiles: int,
    blocks: int,
) -> float:
    """Predicted time: the cube norm of what DRAM, L2 and issue would take, and of a block's own time over the blocks
    that share a multiprocessor. Where shared memory leaves little of L1, copies fetch sectors again.

    Constants were fitted to 355 measured tiles of 34 problems on an H200 (2026-11): root mean square error 14 %.
    """
    warps = -(-tile.threads // 32)
    by_registers = device.registers // (32 * min(255, register_estimate(problem, tile))) // warps
    by_memory = device.shared_bytes // (shared_bytes + 1024)
    resident = max(1, min(by_memory, by_registers, device.threads // (32 * warps)))
    taken = resident * (shared_bytes + 1024)
    # what is left of L1 and shared memory, which come in steps
    set_apart = next((step * 1024 for step in SHARED_STEPS if step * 1024 >= taken), device.shared_bytes)
    left = max(0, device.shared_bytes + 28 * 1024 - set_apart)

    tiles = max(1, one.tiles) * -(-problem.out_channels // tile.chunk)
    outputs = tile.rows * tile.columns
    span = window_columns(problem, tile.columns)
    window = window_rows(problem, tile.rows) * span
    half, pixel = problem.element_bytes == 2, problem.out_channels * problem.element_bytes
    instructions = (
        outputs * tile.vector * problem.taps
        + window * (1 + max(1, tile.vector // problem.multiplier) * half)  # shared loads and conversions
        + outputs * (4 + tile.vector * half / 2)  # stores
        + 16.5 * lines_of(problem, tile, one)
        + (235 if tile.each == 1 else 40)
    )
    if problem.dtype == "float64":
        instructions *= 2
    issue = warps * 32 * instructions / (128 * (0.92 if problem.taps < 20 else 0.55))
    bandwidth = device.dram_gbs * 1e9 / device.multiprocessors / device.clock  # bytes a clock
    again = 1 + 0.485 * max(0.0, 1 - left / (47.6 * 1024))
    dram = problem.least_bytes / tiles / (1.13 * bandwidth) * again
    in_bytes = staged_bytes(problem, tile, one)
    out_bytes = math.prod(problem.y_shape) * problem.element_bytes / tiles
    l2 = (in_bytes * again + out_bytes) / (1.27 * bandwidth)
    fetch = 3173 * device.latency_ns / 900 + in_bytes / 60
    alone = fetch + issue if tile.stages == 1 else max(fetch, issue)
    norm = math.cbrt(dram**3 + l2**3 + issue**3 + (alone / resident) ** 3)
    rounds = max(1.0, tiles / device.multiprocessors)
    if tile.each == 0:  # the multiprocessor with most blocks is the last to finish
        rounds = block_tiles * -(-blocks // device.multiprocessors)
    # What the fit leaves over: problems of 800 MB and more are 11 % faster.
    norm *= 1 - 0.11 * min(1.0, max(0.0, problem.least_bytes / 4e8 - 1))
    if half and pixel > 128 and pixel % 128:
        norm *= 1.15  # lines of which blocks take a part each,
    if problem.taps <= 9:
        norm *= 0.92  # and the tiles in the list are those that the fit is too hard on,
    clocks = norm * rounds + 1.35 * alone
    if problem.taps <= 11 and (usual_side(problem) <= 14 or (problem.filter[0] == 1 and tile.stages > 1)):
        clocks *= 0.84  # most of all on small images and sequences
    if is_small(problem):
        clocks *= 0.8
    # beside wide_nhwc's model, over both suites: 6 % less chooses the faster of the two most often (H200, 2026-11)
    return 0.94 * (LAUNCH_SECONDS + clocks / device.clock)
