"""Rows of pixels: how wide_nhwc cuts a problem into blocks; the geometry of kernels/wide_nhwc_rows.cuh on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .boxes import MOST, Maps, forward_maps
from .strips import divided, reached, up, window_columns
from .wide_clocks import clocks_of_blocks, units_of_block

BOX_BYTES = 128  # boxes in shared memory begin at multiples of that
GATE_BYTES = 128  # before stages that boxes fill
MOST_BLOCKS = 8  # of a multiprocessor, that are worth it
SHORT_ROWS = 14  # of outputs; of longer ones, more blocks scatter what is read
FEW_TAPS = 512  # of filters in shared memory, up to which outputs as boxes are faster
LONG_FILTER = 64  # of sequences
NARROW = 8  # images of so few columns are compiled for: at 7x7 on 7x7, 12 of 49 products are with padding


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A thread makes `columns` neighbouring outputs of its channels in each of its rows.

    Attributes:
        march: the filter is in registers, and the sums move on row by row; else it is read from shared memory.
        channels: output channels of a block.
        vector: neighbouring channels of a thread; more than one is the march's.
        boxes: rows of x come as boxes of a tensor, a stage by one instruction (sm_90 and newer).
        out_boxes: the outputs of a warp leave as a box of y; where rows of x come as boxes.
        rows: output rows of a thread, all at once; of no meaning to the march.
        taps: of a filter row that are in registers at a time; of no meaning to the march.
        threads: of a block, at most.
        stages: of rows of x in shared memory; all but one are being filled.
        stage_rows: of x, in a stage.
        part_rows: output rows that a block makes one after the other, of as many images as that takes; 0: the march's
            are shared out among all blocks that the device holds at a time, others' are about a quarter of that.
        min_blocks: blocks that a multiprocessor must hold, which limits a thread's registers; 1 leaves that to ptxas.
        evict_first: what boxes bring leaves L2 before all else: of tiles that read x once.
        cached: copies go through L1. Past it, they fetch twice the sectors; but blocks whose shared memory leaves it
            little fetch them again. Boxes do neither.
        slower: measured time over that of a copy, where memory is the limit; 0: unknown.
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
    part_rows: int = 0
    min_blocks: int = 2
    share_out: bool = True
    vector: int = 1
    boxes: bool = False
    out_boxes: bool = False
    evict_first: bool = False
    cached: bool = False
    slower: float = 0.0

    def __str__(self) -> str:
        how = "filter in registers" if self.march else f"{self.rows} rows, {self.taps} taps at a time"
        if self.boxes:
            how += ", boxes of x and y" if self.out_boxes else ", boxes of x"
            how += ", read once" if self.evict_first else ""
        least = f", {self.min_blocks} blocks or more" if self.min_blocks > 1 else ""
        return (
            f"{self.columns} columns × {self.vector} channels a lane, {self.channels} channels, {how}, "
            f"{self.stages} stages of {self.stage_rows} rows{least}"
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """How a block and the grid divide the problem.

    Attributes:
        groups: groups of columns of an image that a block works on.
        slots: images that it works on.
        columns, skipped: of x that are kept in shared memory, and those left of them that nothing reads.
        boxes, box_columns: of a row of x that come as boxes side by side; of each.
        chunks: of channels.
        column_strips: of an image.
        unit_rows: output rows of an image that a block makes in one go, at most.
        rows: output rows of all images of a slot.
        part_rows, parts: output rows of a block; blocks of a chunk and strip.
        shared_bytes: of a block.
        resident: blocks that a multiprocessor holds, as far as shared memory and threads go.
        copies: of a thread and row.
    """

    groups: int
    slots: int
    columns: int
    skipped: int
    boxes: int
    box_columns: int
    chunks: int
    column_strips: int
    unit_rows: int
    rows: int
    part_rows: int
    parts: int
    shared_bytes: int
    resident: int
    copies: int


def narrow(problem: DepthwiseProblem, tile: Tile, groups: int) -> bool:
    """Whether the kernel is compiled for this width, so that it leaves out products with padding."""
    return (tile.march or tile.taps >= problem.filter[1]) and problem.size[1] <= NARROW and groups == 1


def vector_of(problem: DepthwiseProblem, most: int) -> int:
    """Neighbouring channels that a thread may own: `most`, or fewer as addresses and the multiplier ask for it."""
    image, _, row, column = problem.plane_strides
    size = problem.element_bytes
    numbers = (problem.channels, row, column, *((image,) if problem.batch > 1 else ()))
    while most > 1 and (problem.multiplier > 1 or problem.aligned % (most * size) or any(n % most for n in numbers)):
        most //= 2
    return most


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
    whole = (
        tile.vector == 1
        and tile.channels % 32 == 0
        and problem.out_channels * size % 16 == 0
        and problem.aligned % 16 == 0
    )
    return 16 if whole and size < 8 and tile.share_out and not problem.epilogue.residual else size


def maps(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> Maps | None:
    """x with a tile's stages as boxes, and y with the outputs of its warps where they leave so; None where the copy
    engine can't copy those.
    """
    lanes = tile.channels // tile.vector
    if tile.channels % problem.multiplier or lanes * one.groups * one.slots < 32:
        return None  # a whole warp elects the lane that sends
    if one.boxes > 1 and (one.slots > 1 or tile.stage_rows > 1):
        return None
    x_box = (tile.channels // problem.multiplier, one.box_columns, one.slots, tile.stage_rows)
    y_box = None
    if tile.out_boxes:
        of_warp, aside = min(lanes, 32), max(1, 32 // lanes)
        columns, images = min(aside, one.groups), max(1, aside // one.groups)
        whole = 32 % of_warp == 0 == lanes % of_warp and one.groups % columns == 0 == one.slots % images
        if problem.epilogue.residual or not whole or columns * images != aside:
            return None
        y_box = (of_warp * tile.vector, columns * tile.columns, images, 1)
    return forward_maps(problem, device, False, x_box, y_box, swizzled=False)


def with_boxes(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Tile:
    """The tile with rows of x, and if possible of y, as boxes; itself where the copy engine can't copy them."""
    # Outputs of whole pixels with many taps leave faster from lanes: 7×7 on 96 and 192 channels 0.84, not 0.82.
    whole = tile.march and problem.taps > 25 and 32 < tile.channels == problem.out_channels
    out_boxes = (tile.march or problem.taps <= FEW_TAPS) and not whole
    for found in (replace(tile, boxes=True, out_boxes=out_boxes), replace(tile, boxes=True)):
        one = cut(problem, device, found)
        if one is not None and maps(problem, device, found, one) is not None:
            return found
    return tile


def slow_as_boxes(problem: DepthwiseProblem, tile: Tile) -> bool:
    """Whether lanes' copies were faster (H200, 2026-11).

    So of pixels that share sectors of 32 bytes (5×5 with a stride on 72 channels of float16: 0.76, not 0.66), of few
    bytes (3×3 on 32: 0.91, not 0.89), or, of float32, that share lines where multiply-adds are few (5×5 on 120: 0.99,
    not 0.94); and of sequences of float32 with long filters (0.95, not 0.91).
    """
    pixel, single = problem.channels * problem.element_bytes, problem.element_bytes == 4
    if not tile.march:
        return single and problem.filter[1] > LONG_FILTER
    return (
        pixel % 32 > 0
        or pixel < BOX_BYTES
        or (single and pixel % 128 > 0 and max(problem.stride) == 1 and problem.taps <= 25)
    )


def boxed(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> list[Tile]:
    """The tile with boxes, and of narrow images the march also with as many blocks as its fewer registers let a
    multiprocessor hold; itself where lanes' copies are faster.

    In 16 bits with a stride, where loads and conversions are a third of all instructions, two channels a lane, too.
    """
    found = tile if slow_as_boxes(problem, tile) else with_boxes(problem, device, tile)
    if not found.boxes or not found.march:
        return [found]
    live = divided(problem.filter[0], problem.stride[0])

    def full(one: Tile) -> Tile:
        needed = one.vector * (problem.taps + live * one.columns + window_columns(problem, one.columns))
        registers = up(needed + 16 + 4 * one.vector, 8)  # with what ptxas needs beside them (sm_90, NVRTC 13.0)
        blocks = min(device.registers // (up(one.threads, 128) * registers), MOST_BLOCKS)
        return replace(one, min_blocks=max(1, blocks))

    several = [found]
    if problem.out_size[1] <= SHORT_ROWS and full(found).min_blocks > found.min_blocks:
        several.append(full(found))
    strided = problem.element_bytes == 2 and max(problem.stride) > 1
    if strided and tile.vector == 1 and tile.channels % 2 == 0 and vector_of(problem, 2) == 2:
        pair = with_boxes(problem, device, replace(tile, vector=2))
        several += [full(pair)] if pair.boxes else []
    return several


def span(problem: DepthwiseProblem, tile: Tile, taps: int) -> int:
    """Columns from the first to the last that a lane reads for so many taps of a row."""
    return (tile.columns - 1) * problem.stride[1] + (taps - 1) * problem.dilation[1] + 1


def cut(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Cut | None:
    """How a tile divides the problem; None where it doesn't fit in shared memory."""
    height, width = problem.out_size
    size = problem.element_bytes
    lanes = tile.channels // tile.vector
    most = tile.threads // lanes
    needed = -(-width // tile.columns)
    column_strips = -(-needed // most)
    groups = -(-needed // column_strips)
    slots = min(most // groups, max(1, problem.batch)) if column_strips == 1 else 1
    step = 1  # of slots: boxes of y take whole warps
    if tile.out_boxes:
        aside = max(1, 32 // lanes)
        if groups > aside:
            groups = max(aside, min(up(groups, aside), most // aside * aside))
            column_strips = -(-needed // groups)
        step = max(1, aside // groups)
        if slots > 1:
            slots = max(step, min(up(slots, step), most // groups // step * step))
    unit_rows = height if tile.march else min(tile.rows, height)
    chunks = -(-problem.out_channels // tile.channels)

    columns = window_columns(problem, groups * tile.columns)
    skipped = 0
    if narrow(problem, tile, groups * column_strips):
        columns, skipped = problem.size[1], problem.padding[1][0]
    elif not tile.march and column_strips == 1:  # parts of the filter that reach the image nowhere are left out
        beyond = span(problem, tile, min(tile.taps, problem.filter[1])) - 1
        skipped = max(0, problem.padding[1][0] - beyond)
        columns = min(columns - skipped, problem.padding[1][0] - skipped + problem.size[1] + beyond)

    staged, rest = divmod(tile.channels, problem.multiplier)
    if rest:
        staged = (tile.channels + problem.multiplier - 2) // problem.multiplier + 1
    boxes, box_columns = divided(columns, MOST), columns
    if boxes > 1 and tile.boxes:  # which begin at multiples of BOX_BYTES
        box_columns = up(divided(columns, boxes), BOX_BYTES // math.gcd(BOX_BYTES, staged * size))
        columns = boxes * box_columns
    if tile.march:
        filter_bytes = -(-tile.channels * problem.taps * size // 16) * 16
    else:
        filter_bytes = problem.filter[0] * -(-problem.filter[1] * problem.sum_bytes // 16) * 16 * tile.channels
    copies = -(-columns // max(1, groups * lanes * load_bytes(problem, tile) // (staged * size)))
    while True:
        row_bytes = up(slots * columns * staged * size, 16)
        stage_bytes, gates = tile.stage_rows * row_bytes, 0
        if tile.boxes:
            stage_bytes, gates = up(stage_bytes, BOX_BYTES), GATE_BYTES
        warp_bytes = 32 * tile.vector * tile.columns * size
        if tile.out_boxes:
            warp_bytes = up(warp_bytes, BOX_BYTES)
        elif store_bytes(problem, tile) < 16:
            warp_bytes = 0
        out_bytes = divided(lanes * groups * slots, 32) * warp_bytes
        shared_bytes = tile.stages * stage_bytes + filter_bytes + out_bytes + gates
        if shared_bytes <= device.shared_bytes - 1024:
            break
        if slots <= step:
            return None
        slots -= step

    warps = -(-lanes * groups * slots // 32)
    resident = max(1, min(device.shared_bytes // (shared_bytes + 1024), device.threads // (32 * warps)))
    rows = -(-problem.batch // slots) * height
    resident = min(resident, max(tile.min_blocks, 16 // warps))
    part_rows = tile.part_rows
    if tile.march and not part_rows:
        blocks = max(1, device.multiprocessors * resident // (chunks * column_strips))
        share = max(1, -(-rows // blocks))
        whole = -(-share // height) * height
        parts = {share, whole, *(-(-height // k) for k in range(1, 17) if height <= rows)}
        part_rows = min(
            sorted(parts, reverse=True),
            key=lambda each: march_clocks(problem, device, tile, chunks * column_strips, rows, each, resident, warps),
        )
    elif not part_rows and problem.filter[0] > 1:
        units = units_of_block(device, divided(rows, unit_rows), chunks * column_strips, resident, warps)
        part_rows = units * unit_rows
    elif not part_rows:
        share = rows * chunks * column_strips // (4 * device.multiprocessors * resident * unit_rows)
        part_rows = max(1, share) * unit_rows
    part_rows = max(1, min(part_rows, rows))
    return Cut(
        groups=groups,
        slots=slots,
        columns=columns,
        skipped=skipped,
        boxes=boxes,
        box_columns=box_columns,
        chunks=chunks,
        column_strips=column_strips,
        unit_rows=unit_rows,
        rows=rows,
        part_rows=part_rows,
        parts=-(-rows // part_rows),
        shared_bytes=shared_bytes,
        resident=resident,
        copies=copies,
    )


def most_in_rows(problem: DepthwiseProblem, rows: int, part_rows: int) -> int:
    """Input rows of the block of the march that reads most of them."""
    height, stride, pad = problem.out_size[0], problem.stride[0], problem.padding[0][0]

    def of_image(first: int, end: int) -> int:
        last = min((end - 1) * stride - pad + problem.filter[0], problem.size[0])
        return last - max(0, first * stride - pad) if end > first else 0

    most = 0
    for start in range(0, rows, max(1, rows // part_rows // 16) * part_rows):
        first, count = start % height, min(part_rows, rows - start)
        head = min(count, height - first)
        whole, tail = divmod(count - head, height)
        most = max(most, of_image(first, first + head) + whole * of_image(0, height) + of_image(0, tail))
    return most


def march_clocks(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    tile: Tile,
    columns: int,
    rows: int,
    part_rows: int,
    resident: int,
    warps: int,
) -> float:
    """Clocks that the march takes to issue its instructions, with `columns` chunks of strips of so many rows each."""
    converts = tile.vector if problem.element_bytes == 2 else 0
    taps = float(problem.taps)
    if narrow(problem, tile, -(-problem.out_size[1] // tile.columns)):  # products with padding are left out
        taps *= reached(
            problem.filter[1],
            problem.dilation[1],
            problem.size[1],
            problem.stride[1],
            problem.padding[1][0],
            tile.columns,
        )
    in_row = taps * tile.columns * tile.vector / problem.stride[0]
    in_row += span(problem, tile, problem.filter[1]) * (1 + converts) + (25 if tile.boxes else 45)
    out_row = tile.columns * ((2 if store_bytes(problem, tile) == 16 else 3) + converts) + 20
    block = most_in_rows(problem, rows, part_rows) * in_row + part_rows * out_row + 6 * problem.taps + 300
    if part_rows > problem.out_size[0] and part_rows % problem.out_size[0]:
        block *= 1.06  # rows around the ends of blocks are read twice
    blocks = divided(columns * divided(rows, part_rows), device.multiprocessors)
    return block * clocks_of_blocks(blocks, resident, warps)
