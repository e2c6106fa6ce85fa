"""wide_nhwc: rows stream through shared memory, a lane is a channel; channels last, filters of many taps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS, roofline
from .base import GRID_X_LIMIT, Variant
from .strips import divided, reached, too_long, window_columns
from .wide_clocks import clocks_of_blocks
from .wide_images import image_march
from .wide_rows import (
    Cut,
    Tile,
    boxed,
    cut,
    load_bytes,
    maps,
    march_clocks,
    narrow,
    span,
    store_bytes,
    vector_of,
)

MARCH_REGISTERS = 125  # filter, sums and window of a thread; ptxas needs some more, and 128 let 16 warps be resident
MARCH_TAPS = 49  # beyond, compiling takes longer than the multiply-adds gain
MOST_COPIES = 2  # of a thread and row that are unrolled; three spill at 128 registers (7x7 float32)


class WideNhwc(Variant):
    stem = "wide_nhwc"
    layouts = ("channels_last",)
    technique = (
        "rows stream through shared memory, neighbouring lanes take neighbouring channels, and each lane makes several "
        "columns, with the filter in registers (or, where it is too large, in shared memory)"
    )

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        offered = [each for tile in tiles(problem, device) for each in boxed(problem, device, tile)]
        if march := image_march(problem, device):
            offered.append(march)
        for tile in dict.fromkeys(offered):
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
        if tile.vector > 1 and (not tile.march or vector_of(problem, tile.vector) < tile.vector):
            return rejected(f"{tile.vector} channels of a thread are no vector of each pixel")
        if max(4 * column * tile.threads, 2 * (problem.out_size[1] + 64) * problem.out_channels) >= 2**31:
            return rejected("rows of y, or columns of x, are too far apart for 32-bit offsets")
        if tile.channels // tile.vector > tile.threads or -(-problem.out_channels // tile.channels) >= 2**31:
            return rejected(f"{problem.out_channels} channels can't be divided into chunks of {tile.channels}")
        one = cut(problem, device, tile)
        if one is None:
            return rejected(f"filter and rows of a block take more than {device.shared_bytes - 1024} bytes")
        if one.rows + one.part_rows >= 2**31 or one.chunks * one.column_strips * one.parts > GRID_X_LIMIT:
            return rejected("there are too many rows to number them in 31 bits")
        found = maps(problem, device, tile, one) if tile.boxes else ()
        if found is None:
            return rejected(f"{device.arch} copies no such rows at once")
        constants = problem_constants(problem) | {
            "THREADS": tile.threads,
            "MIN_BLOCKS": tile.min_blocks,
            "MARCH": int(tile.march),
            "CHANNELS": tile.channels,
            "VECTOR": tile.vector,
            "BOXES": one.boxes if tile.boxes else 0,
            "BOX_COLUMNS": one.box_columns if tile.boxes and one.boxes > 1 else 0,
            "OUT_BOXES": int(tile.out_boxes),
            "EVICT_FIRST": int(tile.evict_first),
            "CACHED": int(tile.cached),
            "COLUMNS": tile.columns,
            "ROWS": tile.rows,
            "TAPS": tile.taps,
            "STAGES": tile.stages,
            "STAGE_ROWS": tile.stage_rows,
            "LOAD_BYTES": load_bytes(problem, tile),
            "STORE_BYTES": store_bytes(problem, tile),
            "WIDTH": problem.size[1] if narrow(problem, tile, one.groups * one.column_strips) else 0,
            "COPIES": one.copies if tile.march and one.copies <= MOST_COPIES else 0,
        }
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(max(1, one.chunks * one.column_strips * one.parts), 1, 1),
            block=(tile.channels // tile.vector * one.groups * one.slots, 1, 1),
            shared_bytes=one.shared_bytes,
            sizes=problem_sizes(problem),
            tiling=(
                one.groups,
                one.slots,
                one.columns,
                one.skipped,
                one.unit_rows,
                problem.batch,
                one.rows,
                one.part_rows,
                *(
                    field
                    for divisor in (one.chunks, one.column_strips, problem.out_size[0])
                    for field in fast_divisor(divisor)
                ),
            ),
            tile=f"{tile}, {one.slots} images × {one.groups} groups, {one.part_rows} rows a block",
            predicted_seconds=seconds(problem, device, tile, one),
            maps=found,
        )


def tiles(problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Tile]:
    """Tiles in question, by what was measured on an H200 (docs/variants/wide_nhwc.md)."""
    width = problem.out_size[1]
    single = problem.dtype != "float64"
    lanes = 32
    while lanes > 8 and problem.out_channels <= lanes // 2:
        lanes //= 2

    # The march: its thread has the filter, as many rows of sums as an input row adds to, and the row's window.
    live = -(-problem.filter[0] // problem.stride[0])
    for columns in (7, 4, 2):
        window = window_columns(problem, columns)
        fits = problem.taps + live * columns + window <= MARCH_REGISTERS and problem.taps <= MARCH_TAPS
        if single and fits and problem.dilation[0] == 1 and problem.filter[0] > 1:
            if columns == 7:
                yield from measured_marches(problem)
            if width > 4 * columns:
                yield Tile(True, lanes, columns, threads=256, stage_rows=4)
            many = problem.taps > 25 and width <= columns
            yield Tile(True, lanes, columns, threads=128, min_blocks=3 if many else 4, cached=True)
            # All channels of a pixel, where they are few: then rows are one stretch of memory.
            channels, most = problem.out_channels, 192 if problem.element_bytes == 2 else 288
            if 32 < channels <= most and channels % 8 == 0 and width > columns:
                threads = most // channels * channels
                yield Tile(True, channels, columns, threads=threads, min_blocks=512 // threads, cached=True)
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
                False, lanes, columns, 1, 32, stages=2, stage_rows=1, share_out=problem.dtype != "float32", part_rows=1
            )
            one = cut(problem, device, tile)
            if one is not None:
                blocks = max(1, 2 * device.multiprocessors // (one.chunks * one.column_strips))
                yield replace(tile, part_rows=max(1, -(-one.rows // blocks)))
        elif problem.element_bytes == 2:
            yield Tile(False, 8, 24 if width >= 96 else 8, 1, 24, stages=2, stage_rows=1)
        else:
            yield Tile(False, 16, columns, 1, 32, 384, stages=2, stage_rows=1, min_blocks=1)
        yield Tile(False, 8, 16 if width >= 16 else 8, 1, 16, 128, stages=2, stage_rows=1)  # if shared memory is short
        return
    taps = reach + -reach % 4 if reach <= 20 else 16
    if single:
        columns = 7 if width > 4 else 4
        tile = Tile(False, 8, columns, 7, taps, stages=2, stage_rows=4 if reach < 8 else 2)
        yield tile
        if reach < 8:
            yield Tile(False, 8, columns, 8, taps, stages=2)
        if cut(problem, device, tile) is None:  # shared memory is short
            yield Tile(False, 8, columns, 4, 8, 128, stages=2, stage_rows=1)
    else:
        yield Tile(False, 8, 7 if width > 4 else 4, 2, 4, 128, stages=2, min_blocks=1)


def measured_marches(problem: DepthwiseProblem) -> Iterator[Tile]:
    """Marches that beat the general ones on the problems that they were measured with (H200, 2026-11).

    Tall images are cut into parts of 14 rows: blocks that run at a time then read memory that lies together.
    """
    channels, width, half = problem.out_channels, problem.out_size[1], problem.element_bytes == 2
    vector = vector_of(problem, 4)
    part_rows = 14 if problem.out_size[0] >= 56 and problem.batch > 4 else 0
    if problem.taps > 25 and not half:
        if width > 7 and 32 < channels <= 192:  # whole pixels
            threads = 192 // channels * channels
            yield Tile(True, channels, 7, threads=threads, stage_rows=3 if channels <= 96 else 2)
        elif width > 7 and 192 < channels <= 384:
            yield Tile(True, channels, 7, threads=384 // channels * channels, min_blocks=1)
        if problem.batch <= 4:
            yield Tile(True, 32, 7, threads=64, min_blocks=5, cached=True)
    elif problem.taps <= 9 and vector > 1 and half and max(problem.stride) == 1:
        if width >= 56 and 64 <= channels <= 256 and vector == 4:
            lanes = channels // 4
            yield Tile(True, channels, 4, threads=252 // lanes * lanes, vector=4, part_rows=part_rows, cached=True)
        elif channels == 32:
            yield Tile(True, 32, 7, threads=128, min_blocks=4, vector=2, part_rows=part_rows, cached=True, slower=0.92)
        elif 64 <= channels <= 256:
            lanes = channels // 2
            threads = 192 // lanes * lanes
            yield Tile(True, channels, 7, threads=threads, min_blocks=3, vector=2, cached=True, slower=1.0)
    elif problem.taps <= 9 and vector > 1 and max(problem.stride) == 2:
        if half and 192 < channels <= 256:
            yield Tile(True, channels, 7, threads=channels // 2, min_blocks=4, vector=2, cached=True)
        elif not half and channels % 64 == 0:
            yield Tile(True, 64, 7, threads=64, min_blocks=6, vector=2, cached=True, slower=0.95)


def unit_instructions(problem: DepthwiseProblem, tile: Tile, one: Cut) -> float:
    """What a thread issues for `rows` output rows of an image, without the march."""
    filter_h, filter_w = problem.filter
    converts = 1 if problem.element_bytes == 2 else 0
    in_rows = min((tile.rows - 1) * problem.stride[0] + (filter_h - 1) * problem.dilation[0] + 1, problem.size[0])
    storing = tile.columns * ((2 if store_bytes(problem, tile) == 16 else 6) + converts) + 12
    high, wide = (
        reached(problem.filter[d], problem.dilation[d], problem.size[d], problem.stride[d], problem.padding[d][0],
                problem.out_size[d])
        for d in (0, 1)
    )  # fmt: skip
    taps = min(tile.taps, filter_w)
    chunks = -(-filter_w // taps) * min(1.0, wide + (taps + tile.columns) / (2 * filter_w))
    each = min(filter_w, taps) * tile.columns + taps / 4 + 6
    unit = tile.rows * filter_h * high * chunks * each
    unit += in_rows * (chunks * (span(problem, tile, taps) * (1 + converts) + 40) + 14 * one.copies + 46)
    return unit + tile.rows * storing + 200


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: instruction issue against DRAM, and some microseconds until the first row is there.

    A multiprocessor issues 4 warp instructions a clock if enough warps are resident: 0.8 of that with 16, less with
    fewer. Compared with what was measured on an H200 (2026-11), nearly all cases of docs/variants/wide_nhwc.md are
    within a fifth.
    """
    warps = tile.channels // tile.vector * one.groups * one.slots / 32
    blocks = one.chunks * one.column_strips * one.parts
    if tile.march:
        columns = one.chunks * one.column_strips
        clocks = march_clocks(
            problem, device, tile, columns, one.rows, one.part_rows, one.resident, max(1, math.ceil(warps))
        )
        issue = clocks / device.clock
        if problem.taps > 25 and one.chunks == 1:
            issue *= 0.98  # 7×7 on whole pixels of 96 channels of float32: 95 µs, not 98 (H200, 2026-11)
    else:
        fetching = 15 * problem.taps * tile.channels / (32 * warps)
        part = one.part_rows / tile.rows * unit_instructions(problem, tile, one) + fetching
        wide_double = 2 if problem.dtype == "float64" else 1
        of_each = divided(blocks, device.multiprocessors)
        issue = part * wide_double * clocks_of_blocks(of_each, one.resident, max(1, math.ceil(warps))) / device.clock
    # Chunks that share lines of 128 bytes, and blocks that march side by side through wide images, cost bandwidth.
    pixel, chunk = problem.out_channels * problem.element_bytes, tile.channels * problem.element_bytes
    scattered = 1.6 if pixel < 32 else 1.1 if one.chunks == 1 else 1.4 if pixel % 128 else 1.3 if chunk % 128 else 1.08
    scattered += (0.12 if one.chunks == 1 else 0.18) if tile.march and one.column_strips > 4 else 0.0
    memory = (tile.slower or scattered) * (roofline(problem, device).copy - LAUNCH_SECONDS)
    if problem.element_bytes == 2 and problem.taps > 9 and max(problem.stride) > 1:
        issue, memory = 1.35 * issue, 1.35 * memory  # measured so at 5x5; loads of two bytes are part of it
    return LAUNCH_SECONDS + 2.5e-6 + math.pow(issue**6 + memory**6, 1 / 6)
