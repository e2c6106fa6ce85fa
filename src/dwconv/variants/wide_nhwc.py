"""wide_nhwc: rows stream through shared memory, a lane is a channel; channels last, filters of many taps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS, roofline
from .base import GRID_X_LIMIT, Variant
from .strips import too_long

MARCH_REGISTERS = 125  # filter, sums and window of a thread; ptxas needs some more, and 128 let 16 warps be resident
MARCH_TAPS = 49  # beyond, compiling takes longer than the multiply-adds gain
MOST_COPIES = 2  # of a thread and row that are unrolled; three spill at 128 registers (7x7 float32)


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A thread makes `columns` neighbouring outputs of one channel in each of its rows.

    Attributes:
        march: the filter is in registers, and the sums move on row by row; else it is read from shared memory.
        channels: output channels of a block.
        rows: output rows of a thread, all at once; of no meaning to the march.
        taps: of a filter row that are in registers at a time; of no meaning to the march.
        threads: of a block, at most.
        stages: of rows of x in shared memory; all but one are being filled.
        stage_rows: of x, in a stage.
        unit_rows: output rows that the march makes in one go, 0: all.
        part_units: units that a block makes one after the other, 0: about a quarter of a block's share.
        min_blocks: blocks that a multiprocessor must hold, which limits a thread's registers; 1 leaves that to ptxas.
        share_out: outputs are gathered in shared memory, to leave as vectors of 16 bytes.
    """

    march: bool
    channels: int
    columns: int
    rows: int = 1
    taps: int = 8
    threads: int = 256
    stages: int = 3
    stage_rows: int = 2
    unit_rows: int = 0
    part_units: int = 0
    min_blocks: int = 2
    share_out: bool = True

    def __str__(self) -> str:
        how = "filter in registers" if self.march else f"{self.rows} rows, {self.taps} taps at a time"
        least = f", {self.min_blocks} blocks or more" if self.min_blocks > 1 else ""
        return (
            f"{self.columns} columns a lane, {self.channels} channels, {how}, {self.stages} stages of "
            f"{self.stage_rows} rows{least}"
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """How a block and the grid divide the problem.

    Attributes:
        groups: groups of columns of an image that a block works on.
        slots: images that it works on.
        columns, skipped: of x that are kept in shared memory, and those left of them that nothing reads.
        chunks: of channels.
        column_strips, row_strips, units: of all images, for each chunk.
        unit_rows: output rows of a unit.
        part_units, parts: units of a block, blocks of a chunk.
        shared_bytes: of a block.
        copies: of a thread and row.
    """

    groups: int
    slots: int
    columns: int
    skipped: int
    chunks: int
    column_strips: int
    row_strips: int
    units: int
    unit_rows: int
    part_units: int
    parts: int
    shared_bytes: int
    copies: int


class WideNhwc(Variant):
    stem = "wide_nhwc"
    layouts = ("channels_last",)
    technique = (
        "rows stream through shared memory, neighbouring lanes take neighbouring channels, and each lane makes several "
        "columns, with the filter in registers (or, where it is too large, in shared memory)"
    )

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        for tile in tiles(problem, device):
            yield self.plan(problem, device, tile)

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        for pads, taps, apart in zip(problem.padding, problem.filter, problem.dilation, strict=True):
            if max(pads) > (taps - 1) * apart:
                return rejected("some windows lie in the padding as a whole; each must reach the image")
        if tile.march and problem.dilation[0] > 1:
            return rejected("rows that a filter reads must be neighbours if the sums are to move on row by row")
        if tile.march and problem.dtype == "float64":
            return rejected("sums of 64 bits leave no registers for the filter")
        column = problem.plane_strides[3]
        if max(4 * column * tile.threads, (problem.out_size[1] + 64) * problem.out_channels) >= 2**31:
            return rejected("rows of y, or columns of x, are too far apart for 32-bit offsets")
        if tile.channels > tile.threads or -(-problem.out_channels // tile.channels) >= 2**31:
            return rejected(f"{problem.out_channels} channels can't be divided into chunks of {tile.channels}")
        one = cut(problem, device, tile)
        if one is None:
            return rejected(f"filter and rows of a block take more than {device.shared_bytes - 1024} bytes")
        if one.units + one.part_units >= 2**31 or one.chunks * one.parts > GRID_X_LIMIT:
            return rejected("there are too many strips to number them in 31 bits")
        constants = problem_constants(problem) | {
            "THREADS": tile.threads,
            "MIN_BLOCKS": tile.min_blocks,
            "MARCH": int(tile.march),
            "CHANNELS": tile.channels,
            "COLUMNS": tile.columns,
            "ROWS": tile.rows,
            "TAPS": tile.taps,
            "STAGES": tile.stages,
            "STAGE_ROWS": tile.stage_rows,
            "LOAD_BYTES": load_bytes(problem, tile),
            "STORE_BYTES": store_bytes(problem, tile),
            "COPIES": one.copies if tile.march and one.copies <= MOST_COPIES else 0,
        }
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(max(1, one.chunks * one.parts), 1, 1),
            block=(tile.channels * one.groups * one.slots, 1, 1),
            shared_bytes=one.shared_bytes,
            sizes=problem_sizes(problem),
            tiling=(
                one.groups,
                one.slots,
                one.columns,
                one.skipped,
                one.unit_rows,
                problem.batch,
                one.units,
                one.part_units,
                *(
                    field
                    for divisor in (one.chunks, one.row_strips, one.column_strips)
                    for field in fast_divisor(divisor)
                ),
            ),
            tile=f"{tile}, {one.slots} images × {one.groups} groups, {one.part_units} units of {one.unit_rows} rows",
            predicted_seconds=seconds(problem, device, tile, one),
        )


def load_bytes(problem: DepthwiseProblem, tile: Tile) -> int:
    """Bytes that one copy moves: 16, or fewer where addresses or the multiplier ask for it."""
    image, _, row, column = problem.plane_strides
    size = problem.element_bytes
    staged, rest = divmod(tile.channels, problem.multiplier)
    numbers = (problem.channels, staged, row, column, *((image,) if problem.batch > 1 else ()))
    most = 16
    while most > size and (rest or problem.aligned % most or any(n * size % most for n in numbers)):
        most //= 2
    return most


def store_bytes(problem: DepthwiseProblem, tile: Tile) -> int:
    """16 where whole vectors of 32 neighbouring channels can be stored, else what an element takes."""
    size = problem.element_bytes
    whole = tile.channels % 32 == 0 and problem.out_channels * size % 16 == 0 and problem.aligned % 16 == 0
    return 16 if whole and size < 8 and tile.share_out and not problem.epilogue.residual else size


def span(problem: DepthwiseProblem, tile: Tile, taps: int) -> int:
    """Columns from the first to the last that a lane reads for so many taps of a row."""
    return (tile.columns - 1) * problem.stride[1] + (taps - 1) * problem.dilation[1] + 1


def cut(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Cut | None:
    """How a tile divides the problem; None where it doesn't fit in shared memory."""
    height, width = problem.out_size
    size, sum_bytes = problem.element_bytes, 8 if problem.dtype == "float64" else 4
    most = tile.threads // tile.channels
    needed = -(-width // tile.columns)
    column_strips = -(-needed // most)
    groups = -(-needed // column_strips)
    slots = min(most // groups, max(1, problem.batch)) if column_strips == 1 else 1
    unit_rows = min((tile.unit_rows or height) if tile.march else tile.rows, height)
    row_strips = -(-height // unit_rows)
    chunks = -(-problem.out_channels // tile.channels)

    columns = (groups * tile.columns - 1) * problem.stride[1] + (problem.filter[1] - 1) * problem.dilation[1] + 1
    skipped = 0
    if not tile.march and column_strips == 1:  # parts of the filter that reach the image nowhere are left out
        beyond = span(problem, tile, min(tile.taps, problem.filter[1])) - 1
        skipped = max(0, problem.padding[1][0] - beyond)
        columns = min(columns - skipped, problem.padding[1][0] - skipped + problem.size[1] + beyond)

    staged, rest = divmod(tile.channels, problem.multiplier)
    if rest:
        staged = (tile.channels + problem.multiplier - 2) // problem.multiplier + 1
    if tile.march:
        filter_bytes = -(-tile.channels * problem.taps * size // 16) * 16
    else:
        filter_bytes = problem.filter[0] * -(-problem.filter[1] * sum_bytes // 16) * 16 * tile.channels
    copies = -(-columns // max(1, groups * tile.channels * load_bytes(problem, tile) // (staged * size)))
    while True:
        out_bytes = tile.channels * groups * slots * tile.columns * size if store_bytes(problem, tile) == 16 else 0
        row_bytes = -(-slots * columns * staged * size // 16) * 16
        shared_bytes = tile.stages * tile.stage_rows * row_bytes + filter_bytes + out_bytes
        if shared_bytes <= device.shared_bytes - 1024:
            break
        if slots == 1:
            return None
        slots -= 1

    units = -(-max(1, problem.batch) // slots) * column_strips * row_strips
    resident = device.multiprocessors * max(1, min(2, device.shared_bytes // (shared_bytes + 1024)))
    part_units = min(tile.part_units or max(1, units * chunks // (4 * resident)), units)
    return Cut(
        groups=groups,
        slots=slots,
        columns=columns,
        skipped=skipped,
        chunks=chunks,
        column_strips=column_strips,
        row_strips=row_strips,
        units=units,
        unit_rows=unit_rows,
        part_units=part_units,
        parts=-(-units // part_units),
        shared_bytes=shared_bytes,
        copies=copies,
    )


def tiles(problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Tile]:
    """Tiles in question, by what was measured on an H200 (docs/variants/wide_nhwc.md)."""
    height, width = problem.out_size
    single = problem.dtype != "float64"
    lanes = 32
    while lanes > 8 and problem.out_channels <= lanes // 2:
        lanes //= 2

    # The march: its thread has the filter, as many rows of sums as an input row adds to, and the row's window.
    live = -(-problem.filter[0] // problem.stride[0])
    for columns in (7, 4, 2):
        window = (columns - 1) * problem.stride[1] + (problem.filter[1] - 1) * problem.dilation[1] + 1
        fits = problem.taps + live * columns + window <= MARCH_REGISTERS and problem.taps <= MARCH_TAPS
        if single and fits and problem.dilation[0] == 1 and problem.filter[0] > 1:
            wide = Tile(True, lanes, columns, threads=256, stage_rows=4)
            narrow = Tile(True, lanes, columns, threads=128, min_blocks=4)
            if width > 4 * columns:
                yield wide
            yield narrow
            # All channels of a pixel, where they are few: then rows are one stretch of memory.
            channels, most = problem.out_channels, 192 if problem.element_bytes == 2 else 288
            if 32 < channels <= most and channels % 8 == 0 and width > columns:
                threads = most // channels * channels
                yield Tile(True, channels, columns, threads=threads, min_blocks=512 // threads)
            # Few images of few channels fill the multiprocessors only if their rows are shared.
            blocks = cut(problem, device, narrow)
            rows = height
            while blocks is not None and rows > 4 and blocks.chunks * blocks.parts < 4 * device.multiprocessors:
                rows = -(-rows // 2)
                short = Tile(True, lanes, columns, threads=128, min_blocks=4, unit_rows=rows, part_units=1)
                yield short
                blocks = cut(problem, device, short)
            return

    reach = problem.filter[1]
    if problem.filter[0] == 1:
        if not single:
            yield Tile(False, 16, 7, 1, 16, stages=2, stage_rows=1)
            return
        columns = 32 if width >= 128 else 16 if width >= 16 else 8
        if reach <= 64:
            # One round of blocks, each of which makes several units.
            tile = Tile(
                False, lanes, columns, 1, 32, stages=2, stage_rows=1, share_out=problem.dtype != "float32", part_units=1
            )
            one = cut(problem, device, tile)
            if one is not None:
                yield _with_units(tile, max(1, -(-one.units * one.chunks // (2 * device.multiprocessors))))
        elif problem.element_bytes == 2:
            yield Tile(False, 8, 24 if width >= 96 else 8, 1, 24, stages=2, stage_rows=1)
        else:
            yield Tile(False, 16, columns, 1, 32, 384, stages=2, stage_rows=1, min_blocks=1)
        yield Tile(False, 8, 16 if width >= 16 else 8, 1, 16, 128, stages=2, stage_rows=1)  # if shared memory is short
        return
    taps = reach + -reach % 4 if reach <= 20 else 16
    if single:
        yield Tile(False, 8, 7 if width > 4 else 4, 8 if reach < 8 else 7, taps, stages=2)
        yield Tile(False, 8, 7 if width > 4 else 4, 4, 8, 128, stages=2, stage_rows=1)  # if shared memory is short
    else:
        yield Tile(False, 8, 7 if width > 4 else 4, 2, 4, 128, stages=2, min_blocks=1)


def _with_units(tile: Tile, part_units: int) -> Tile:
    return replace(tile, part_units=part_units)


def reached(taps: int, apart: int, size: int, stride: int, before: int, outputs: int) -> float:
    """The share of a filter's taps that lie inside the image, over the outputs of one dimension.

    >>> reached(13, 1, 7, 1, 6, 7)
    0.5384615384615384
    """
    sampled = range(0, outputs, max(1, outputs // 64))
    inside = 0
    for i in sampled:
        first = i * stride - before
        lowest = max(0, -(first // apart) if first < 0 else 0)
        inside += max(0, min(taps - 1, (size - 1 - first) // apart) - lowest + 1)
    return inside / (len(sampled) * taps)


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: instruction issue against DRAM, and some microseconds until the first row is there.

    A multiprocessor issues 4 warp instructions a clock if enough warps are resident: 0.8 of that with 16, less with
    fewer. Compared with what was measured on an H200 (2026-11), nearly all cases of docs/variants/wide_nhwc.md are
    within a fifth.
    """
    filter_h, filter_w = problem.filter
    converts = 1 if problem.element_bytes == 2 else 0
    in_rows = min((one.unit_rows - 1) * problem.stride[0] + (filter_h - 1) * problem.dilation[0] + 1, problem.size[0])
    copying = 14 * one.copies + 16
    shared_out = store_bytes(problem, tile) == 16
    storing = tile.columns * ((2 if shared_out else 6) + converts) + 12
    if tile.march:
        window = span(problem, tile, filter_w)
        multiply_adds = problem.taps * tile.columns / problem.stride[0]
        unit = in_rows * (multiply_adds + window * (1 + converts) + copying) + one.unit_rows * storing + 60 * filter_h
    else:
        high, wide = (
            reached(problem.filter[d], problem.dilation[d], problem.size[d], problem.stride[d], problem.padding[d][0],
                    problem.out_size[d])
            for d in (0, 1)
        )  # fmt: skip
        taps = min(tile.taps, filter_w)
        chunks = -(-filter_w // taps) * min(1.0, wide + (taps + tile.columns) / (2 * filter_w))
        each = min(filter_w, taps) * tile.columns + taps / 4 + 6
        unit = tile.rows * filter_h * high * chunks * each
        unit += in_rows * (chunks * (span(problem, tile, taps) * (1 + converts) + 40) + copying + 30)
        unit += tile.rows * storing + 200
    warps = tile.channels * one.groups * one.slots / 32
    fetching = 300 if tile.march else 15 * problem.taps * tile.channels / (32 * warps)
    blocks = one.chunks * one.parts
    rounds = max(blocks / device.multiprocessors, float(-(-blocks // device.multiprocessors)) if blocks else 0.0)
    resident = min(16.0, warps * max(1.0, blocks / device.multiprocessors))
    fits = max(1, device.shared_bytes // (one.shared_bytes + 1024)) * warps
    resident = min(resident, fits)
    rate = 4 * device.clock * 0.88 * resident / (resident + 2.5)
    wide_double = 2 if problem.dtype == "float64" else 1
    issue = rounds * warps * (one.part_units * unit + fetching) * wide_double / rate
    # Chunks that share lines of 128 bytes, and blocks that march side by side through wide images, cost bandwidth.
    pixel, chunk = problem.out_channels * problem.element_bytes, tile.channels * problem.element_bytes
    scattered = 1.6 if pixel < 32 else 1.1 if one.chunks == 1 else 1.4 if pixel % 128 else 1.3 if chunk % 128 else 1.08
    scattered += 0.12 if tile.march and one.column_strips > 4 else 0.0
    memory = scattered * (roofline(problem, device).copy - LAUNCH_SECONDS)
    return LAUNCH_SECONDS + 2.5e-6 + math.pow(issue**6 + memory**6, 1 / 6)
