"""staged_nchw: whole planes, or ranges of their rows, pass through shared memory: small images, filters up to 11×11."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, legal, problem_constants, problem_sizes
from ..problem import DepthwiseProblem, dense_strides
from ..roofline import LAUNCH_SECONDS
from .base import GRID_X_LIMIT, Variant
from .staged_march import FEW_TAPS, NO_MARCH, NO_MARCH_TILING, every_march, march_of
from .strips import divided, short_divisor, too_long, up, window_columns, window_rows

SMALL = 33  # rows and columns up to which an image is small
NARROW = 32  # columns below which the kernel is made for what the rows' length is a multiple of
WIDE_TILES = 64  # tiles side by side beyond which a plane is cut into ranges of columns
MAX_MULTIPLY_ADDS = 1400  # unrolled; more take too long to compile
MAX_REGISTERS = 190  # sums, taps and window of a thread; ptxas needs some more, and 255 is the most there are


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A thread makes `rows` x `columns` outputs.

    Attributes:
        threads: of a block.
        min_blocks: blocks that a multiprocessor must hold, which limits a thread's registers; 1 leaves that to ptxas.
        loads: vectors of 16 bytes that a thread has in flight.
        skip_rows: whether rows of padding are left out where a whole warp reads them.
        most_taps: filter taps that a thread holds at a time.
    """

    rows: int = 7
    columns: int = 4
    threads: int = 128
    min_blocks: int = 1
    loads: int = 8
    skip_rows: bool = False
    most_taps: int = 49

    def __str__(self) -> str:
        least = f", {self.min_blocks} blocks or more" if self.min_blocks > 1 else ""
        skipped = ", rows of padding left out" if self.skip_rows else ""
        return f"{self.rows} rows × {self.columns} columns a thread, {self.threads} threads{least}{skipped}"


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a problem is cut into items, and how an item lies in shared memory. Twin of `StagedNchwTiling`.

    Attributes:
        stretch: whether an item is one stretch of memory.
        planes: input planes of an item.
        row_items, column_items: items of a plane.
        item_rows, item_columns: outputs of an item in a plane.
        lines, line_units: the divisors that tell rows from planes and columns from rows.
        pitch, plane_pitch: elements of shared memory from row to row, from plane to plane.
        image_vectors: of 16 bytes, for the input; filter_elements: for the filters, as sums.
    """

    stretch: bool
    planes: int
    row_items: int
    column_items: int
    item_rows: int
    item_columns: int
    lines: int
    line_units: int
    pitch: int
    plane_pitch: int
    image_vectors: int
    filter_elements: int


def widths(problem: DepthwiseProblem) -> tuple[int, int]:
    """Elements, 4, 2 or 1, that stand together in a row of x at an aligned address, and in a row of y.

    They are compiled in, and images of 32 columns and more make do with two kinds of kernel.
    """
    most = min(4, problem.aligned // problem.element_bytes, 16 // problem.element_bytes)
    image, channel, row, _ = problem.plane_strides
    strides = (image, channel, row) if problem.x_strides else (row,)

    def limit(*numbers: int) -> int:
        return next(v for v in (4, 2, 1) if v <= most and all(n % v == 0 for n in numbers))

    load, store = limit(problem.size[1], *strides), limit(problem.out_size[1])
    few = problem.size[1] >= NARROW and min(load, store) < min(4, 16 // problem.element_bytes)
    return (1, 1) if few else (load, store)


def shares_filters(problem: DepthwiseProblem, tile: Tile) -> bool:
    """Whether filters are copied to shared memory: where a warp's lanes belong to many planes.

    Else neighbouring lanes read the same taps, which then come from L1 as fast.
    """
    return divided(problem.out_size[0], tile.rows) * divided(problem.out_size[1], tile.columns) < 8


def stages_outputs(problem: DepthwiseProblem, geometry: Geometry) -> bool:
    """Whether results leave through shared memory: where the rows of y don't take stores of several elements."""
    one_stretch = geometry.stretch and (geometry.row_items == 1 or problem.multiplier == 1)
    return one_stretch and widths(problem)[1] < min(4, 16 // problem.element_bytes)


def tap_rows(problem: DepthwiseProblem, tile: Tile) -> int:
    """Filter rows whose taps a thread holds at a time, as even parts of the filter."""
    height, width = problem.filter
    most = min(tile.most_taps // width, MAX_MULTIPLY_ADDS // (tile.rows * tile.columns * width))
    return divided(height, divided(height, max(1, most)))


def window_quads(problem: DepthwiseProblem, tile: Tile) -> set[int]:
    """Four neighbouring columns of shared memory each, those that a tile reads."""
    lead = up(problem.padding[1][0], widths(problem)[0]) - problem.padding[1][0]
    taps = range(0, problem.filter[1] * problem.dilation[1], problem.dilation[1])
    return {(lead + o * problem.stride[1] + v) // 4 for o in range(tile.columns) for v in taps}


def registers(problem: DepthwiseProblem, tile: Tile) -> int:
    """Estimate of a thread's registers: sums, taps, and the window of a row."""
    quads = window_quads(problem, tile)
    values = tile.rows * tile.columns + tap_rows(problem, tile) * problem.filter[1] + 4 * len(quads)
    return values * max(1, problem.element_bytes // 4)


def tile_for(problem: DepthwiseProblem) -> Tile:
    """The tile that measured best (docs/variants/staged_nchw.md); one for all sizes, but for small images."""
    out_h, loads = problem.out_size[0], 8 if problem.element_bytes > 2 else 4
    columns = 2 if problem.stride[1] % 4 == 2 else 4
    if problem.dtype == "float64":
        return Tile(4, columns, 128, 4, loads, most_taps=20)
    if problem.stride[1] > 1:
        rows, blocks = (4, 8) if problem.dtype == "float32" else (4, 10) if problem.taps <= 9 else (7, 8)
    elif problem.taps <= FEW_TAPS:
        rows, blocks = 7, 8
    else:
        rows, blocks = 7, 5 if problem.taps <= 49 else 4
    if out_h <= 24 and up(out_h, 7) > 1.1 * up(out_h, 4):
        rows = 4
    skip_rows = problem.taps >= FEW_TAPS and out_h <= rows and problem.stride[0] == 1
    if problem.stride[1] == 1 and FEW_TAPS < problem.taps <= 49 and problem.size[1] < NARROW:
        return Tile(rows, columns, 64, 10, loads, skip_rows)
    return Tile(rows, columns, 128, 6 if skip_rows and blocks > 6 else blocks, loads, skip_rows)


class StagedNchw(Variant):
    stem = "staged_nchw"
    technique = (
        "each block fetches whole planes, or a range of rows of one, as one stretch of memory into zero-padded shared "
        "memory; each thread sums a tile from there with its taps in registers"
    )

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """The tile of choice, and others to tune with."""
        tile = tile_for(problem)
        yield tile
        yield replace(tile, rows=11 - tile.rows)
        yield replace(tile, threads=64, min_blocks=1, skip_rows=not tile.skip_rows)

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        yield march_of(self.stem, problem, device)
        tile = tile_for(problem)
        if problem.taps <= FEW_TAPS and max(problem.size) > SMALL:
            yield Rejection(
                self.stem,
                str(tile),
                f"images of more than {SMALL} rows or columns are as fast row by row where {FEW_TAPS} taps or fewer "
                "fit in registers",
            )
        else:
            yield self.plan(problem, device, tile)

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles, of large images too: for tests and for tuning."""
        plans = [self.plan(problem, device, tile) for tile in self.tiles(problem)]
        plans += every_march(self.stem, problem, device)
        return legal(plans)

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        if problem.filter[1] > 31:
            return rejected(f"filter rows of {problem.filter[1]} taps don't fit in registers; 31 do")
        if tile.columns * problem.stride[1] % 4:
            return rejected("the windows of neighbouring tiles must be a multiple of 4 columns apart")
        if (needed := registers(problem, tile)) > MAX_REGISTERS:
            return rejected(f"needs about {needed} registers a thread; {MAX_REGISTERS} is the most")
        if problem.multiplier > tile.threads:
            return rejected(f"a block of {tile.threads} threads can't make {problem.multiplier} outputs of each input")
        if max(math.prod(problem.size), math.prod(problem.out_size)) >= 2**31:
            return rejected("a plane's elements can't be numbered in 31 bits")
        budget, limit = device.shared_bytes // 4 - 1024, device.shared_bytes - 1024
        geometry = cut(problem, tile, budget, limit)
        if geometry is None:
            return rejected(f"no item's input fits in the {limit} bytes of shared memory of a block")
        in_planes = problem.batch * problem.channels
        blocks = divided(in_planes, geometry.planes) * geometry.row_items * geometry.column_items
        if blocks > GRID_X_LIMIT or in_planes * problem.multiplier >= 2**31:
            return rejected(
                f"{max(blocks, in_planes * problem.multiplier)} planes or blocks can't be numbered in 31 bits"
            )
        load, store = widths(problem)
        constants = (
            problem_constants(problem)
            | {
                "THREADS": tile.threads,
                "MIN_BLOCKS": tile.min_blocks,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "TAP_ROWS": tap_rows(problem, tile),
                "LOADS": tile.loads,
                "GRANULE": load,
                "STORE_VECTOR": min(store, tile.columns),
                "STRETCH": int(geometry.stretch),
                "STAGE_OUTPUTS": int(stages_outputs(problem, geometry)),
                "SKIP_ROWS": int(tile.skip_rows),
                "SHARE_FILTERS": int(shares_filters(problem, tile)),
                "SHARED_BUDGET": budget,
                "SHARED_LIMIT": limit,
            }
            | NO_MARCH
        )
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(max(1, blocks), 1, 1),
            block=(tile.threads, 1, 1),
            shared_bytes=shared_bytes(problem, geometry),
            sizes=problem_sizes(problem),
            tiling=(
                *fast_divisor(geometry.row_items),
                *fast_divisor(geometry.column_items),
                *fast_divisor(problem.out_channels),
                *short_divisor(divided(geometry.item_columns, tile.columns)),
                *short_divisor(geometry.planes * problem.multiplier),
                *short_divisor(geometry.line_units),
                *short_divisor(geometry.lines),
                geometry.planes,
                geometry.item_rows,
                geometry.item_columns,
                math.prod(problem.size),
                math.prod(problem.out_size),
                geometry.pitch,
                geometry.plane_pitch,
                max(0, geometry.plane_pitch - geometry.lines * geometry.pitch),
                geometry.filter_elements,
                geometry.image_vectors,
                *NO_MARCH_TILING,
            ),
            tile=f"{tile}, {geometry.planes} planes" if geometry.planes > 1 else str(tile),
            predicted_seconds=staged_seconds(problem, device, tile, geometry, max(1, blocks)),
        )


def shared_bytes(problem: DepthwiseProblem, geometry: Geometry) -> int:
    """Filters, and the input or the results that take its place; 16 at least."""
    image = geometry.image_vectors * 16
    if stages_outputs(problem, geometry):
        element = problem.sum_bytes if problem.epilogue.residual else problem.element_bytes
        outputs = geometry.planes * problem.multiplier * geometry.item_rows * problem.out_size[1]
        image = max(image, up((outputs + 16 // problem.element_bytes) * element, 16))
    return geometry.filter_elements * problem.sum_bytes + image


def cut(problem: DepthwiseProblem, tile: Tile, budget: int, limit: int) -> Geometry | None:
    """The items of a problem: with as many tiles as a block has threads, or half as many, ..., until they fit in
    `budget` bytes of shared memory, so that several blocks share a multiprocessor, or at last in `limit`.
    """
    column_tiles = divided(problem.out_size[1], tile.columns)
    row_tiles = divided(problem.out_size[0], tile.rows)
    in_planes = max(1, problem.batch * problem.channels)
    tiles = tile.threads
    while tiles > 32 and in_planes * problem.multiplier * row_tiles * column_tiles < 256 * tiles:
        tiles //= 2  # a small problem wants a block for each multiprocessor first
    while tiles >= 1 and tiles >= problem.multiplier:
        of_block = tiles // problem.multiplier
        planes, rows, columns = 1, row_tiles, column_tiles
        if row_tiles * column_tiles <= of_block:
            planes = min(in_planes, of_block // (row_tiles * column_tiles))
        else:
            if column_tiles > min(WIDE_TILES, of_block):
                columns = divided(column_tiles, divided(column_tiles, min(32, of_block)))
            rows = max(1, of_block // columns)
            rows = divided(row_tiles, divided(row_tiles, rows))
        geometry = place(problem, tile, planes, rows, columns)
        lines = geometry.lines if planes > 1 else min(geometry.lines, window_rows(problem, geometry.item_rows))
        short = lines * planes * geometry.line_units < 2**16 and max(geometry.lines, geometry.line_units) < 2**15
        if short and shared_bytes(problem, geometry) <= (budget if tiles > 32 else limit):
            return geometry
        tiles //= 2
    return None


def place(problem: DepthwiseProblem, tile: Tile, planes: int, rows: int, columns: int) -> Geometry:
    """Items of so many input planes, of `rows` x `columns` tiles in each: their place in shared memory."""
    (height, width), (out_h, out_w) = problem.size, problem.out_size
    (taps_h, taps_w), (stride_h, stride_w), (apart_h, apart_w) = problem.filter, problem.stride, problem.dilation
    (top, _), (left, _) = problem.padding
    row_items = divided(divided(out_h, tile.rows), rows)
    column_items = divided(divided(out_w, tile.columns), columns)
    item_rows, item_columns = min(rows * tile.rows, out_h), min(columns * tile.columns, out_w)
    granule, across = widths(problem)[0], columns * tile.columns
    # a vector of 16 bytes may reach over two rows, not three
    dense = problem.plane_strides == dense_strides(problem.x_shape, "channels_first")
    stretch = dense and column_items == 1 and width >= max(2, 16 // problem.element_bytes - 1)
    lead = up(left, granule)

    def reach(outputs: int, stride: int, taps: int, apart: int) -> int:
        return (outputs - 1) * stride + (taps - 1) * apart + 1

    window_end = lead - left + reach(across, stride_w, taps_w, apart_w)  # also of outputs beyond the image
    if column_items == 1:
        right = max(0, reach(out_w, stride_w, taps_w, apart_w) - left - width)
        pitch = up(width + max(lead, right), 4)
    else:
        pitch = up(window_end, 4)
    tile_rows = reach(rows * tile.rows, stride_h, taps_h, apart_h)
    below = max(0, reach(out_h, stride_h, taps_h, apart_h) - top - height)
    # Lanes work on neighbouring columns, then planes, then rows of tiles. At the step from one to the next their
    # windows shall be as far apart as before, modulo the elements that shared memory gives at a time.
    banks = 128 // problem.element_bytes
    step = across * stride_w % banks
    plane_pitch, last_rows = 0, tile_rows
    if planes > 1:
        plane_pitch = up((height + max(top, below)) * pitch, banks, step)
        last_rows = max(tile_rows, top + height)
    elif tile.rows * stride_h % 2 and step:
        pitch += next(more for more in range(0, banks, 4) if (pitch + more) * tile.rows * stride_h % banks == step)
    lines = height if stretch or planes > 1 else min(height, reach(item_rows, stride_h, taps_h, apart_h))
    item_width = min(width, lead + reach(item_columns, stride_w, taps_w, apart_w))
    elements = (planes - 1) * plane_pitch + (last_rows - 1) * pitch + max(pitch, up(window_end, 4))
    taps = planes * problem.multiplier * problem.taps
    return Geometry(
        stretch=stretch,
        planes=planes,
        row_items=row_items,
        column_items=column_items,
        item_rows=item_rows,
        item_columns=item_columns,
        lines=lines,
        line_units=width if stretch else divided(item_width, granule),
        pitch=pitch,
        plane_pitch=plane_pitch,
        image_vectors=divided(elements * problem.element_bytes, 16),
        filter_elements=up(taps + 3, 4) if shares_filters(problem, tile) else 0,
    )


def staged_seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, geometry: Geometry, blocks: int) -> float:
    """Predicted time: DRAM, shared memory and instruction issue as a cube norm, and the latency of a first block.

    A thread issues its multiply-adds, loads of its windows (and conversions of 16 bits), and overhead for each vector
    fetched and output stored; a multiprocessor 2.9 of 4 warp instructions a clock. Granules take 4 clocks to be put.
    """
    outputs, warps = tile.rows * tile.columns, blocks * tile.threads / 32
    window, bytes_ = window_rows(problem, tile.rows), problem.element_bytes
    span = window_columns(problem, tile.columns)
    load, store = widths(problem)
    quads, granules = len(window_quads(problem, tile)), 16 // bytes_ / load
    in_rows = min(problem.size[0], window_rows(problem, geometry.item_rows))
    in_columns = min(problem.size[1], geometry.item_columns * problem.stride[1] + problem.filter[1])
    fetched = geometry.planes * in_rows * in_columns
    vectors, zeros = fetched * bytes_ / 16 / tile.threads, geometry.image_vectors / tile.threads
    staged, shared = stages_outputs(problem, geometry), shares_filters(problem, tile)
    used = 0.9 if tile.skip_rows else 1.0  # of the rows
    instructions = (
        200
        + used * outputs * problem.taps
        + used * window * (divided(span, 4) + (span if bytes_ == 2 else 0))
        + problem.taps * (10 if shared else 1)
        + vectors * (14 + 5 * granules)
        + zeros * 4
        + (8 * outputs // store if staged else 8 * tile.rows)
    )
    clocks = (
        used * window * quads * bytes_
        + problem.taps * (2 if shared else 1)
        + vectors * (4 + (4 if bytes_ == 2 else 7) * granules)
        + zeros * 4
        + (outputs / store + outputs * bytes_ / 2 if staged else outputs * bytes_ / 4)
    )
    doubled = 2 if problem.dtype == "float64" else 1  # half as many multiply-adds a clock
    issue = doubled * warps * instructions / (2.9 * device.multiprocessors * device.clock)
    sharing = warps * clocks / (device.multiprocessors * device.clock)
    halo = fetched * geometry.row_items * geometry.column_items / (geometry.planes * math.prod(problem.size))
    in_bytes = problem.batch * problem.channels * math.prod(problem.size) * bytes_
    dram = (problem.least_bytes + 0.3 * max(0.0, halo - 1) * in_bytes) / (device.dram_gbs * 1e9)
    return LAUNCH_SECONDS + 1.4e-9 * device.latency_ns + math.cbrt(dram**3 + issue**3 + sharing**3)
