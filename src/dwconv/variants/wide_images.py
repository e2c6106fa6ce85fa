"""Marches of wide_nhwc whose blocks make one image each, or some rows of it: what was measured (H200, 2026-11).

Blocks that run at a time then read memory that lies together, and none waits for those with longer shares
(docs/variants/wide_nhwc.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .boxes import copies_boxes
from .streams import MOST_SIZES
from .wide_rows import Tile

COLUMNS = 7  # of a thread
CHUNK, PIXEL = 64, 0  # channels of a block; all of a pixel
LEAST_IMAGES, LEAST_CHANNELS = 4, 32  # of a problem
MOST_PIXEL, NARROW_PIXEL, TALL_PIXEL = 256, 96, 144  # channels that a block may make as a whole


@dataclass(frozen=True, slots=True)
class Blocks:
    """What a block makes.

    Attributes:
        groups: of columns, side by side or of several images.
        slower: measured time over that of a copy, where memory is the limit.
        chunk: channels, at most; or PIXEL.
        vector: neighbouring channels of a thread.
        rows: of outputs; 0: `images` images, one after the other.
        stages: of `stage_rows` rows of x in shared memory.
        out_boxes: outputs leave as boxes.
        once: what boxes bring leaves L2 first, of tensors of up to four times L2: with a stride x is far more than y,
            and what was written before may stay. small: other tensors were faster otherwise.
    """

    groups: int
    slower: float
    chunk: int = CHUNK
    vector: int = 1
    rows: int = 0
    images: int = 1
    stages: int = 3
    stage_rows: int = 2
    out_boxes: bool = False
    once: bool = False
    small: bool = False


FEW, MORE, MANY, SEVERAL = range(1, 10), range(10, 26), range(26, 50), range(10, 50)  # taps
MOST_ROWS = 2**31
TINY, LOW, MIDDLE, TALL = range(1, 8), range(8, 15), range(15, 29), range(29, MOST_ROWS)  # rows of an image's outputs
SMALL, LARGE, ANY = range(1, 15), range(15, MOST_ROWS), range(1, MOST_ROWS)

Measured = dict[tuple[range, range], Blocks]  # the first that has a problem's taps and rows counts

FLOAT32: Measured = {
    (FEW, TINY): Blocks(2, 0.85),
    (MORE, TINY): Blocks(1, 0.9, chunk=32, out_boxes=True),
    (MANY, TINY): Blocks(1, 0.9, chunk=32, images=2, out_boxes=True),
    (FEW, LOW): Blocks(2, 0.92, out_boxes=True),
    (MORE, LOW): Blocks(1, 0.92, out_boxes=True),
    (MANY, MIDDLE): Blocks(4, 0.9, chunk=32, images=2, stage_rows=4, out_boxes=True),
    (FEW, TALL): Blocks(1, 0.96, rows=14, stage_rows=4),
    (MORE, TALL): Blocks(2, 0.96, rows=14, stage_rows=4),
}
FLOAT32_STRIDED: Measured = {
    (FEW, TINY): Blocks(2, 0.93, vector=2, stages=4, once=True),
    (FEW, ANY): Blocks(2, 0.93, once=True),
    (SEVERAL, SMALL): Blocks(1, 0.95, images=2),
}
FLOAT32_STRIDED_PIXELS: Measured = {(FEW, ANY): Blocks(2, 1.0, PIXEL, vector=2, once=True)}  # CHUNK doesn't divide them
HALF_STRIDED: Measured = {(SEVERAL, SMALL): Blocks(2, 1.05, 32, images=2, out_boxes=True, once=True)}
HALF_STRIDED_PIXELS: Measured = {
    (FEW, ANY): Blocks(1, 0.95, PIXEL, vector=2, once=True, small=True),
    (SEVERAL, LARGE): Blocks(2, 0.85, PIXEL, vector=2, once=True),
}
HALF_STRIDED_NARROW: Measured = {(SEVERAL, ANY): Blocks(4, 1.2, PIXEL, stage_rows=4, once=True)}


def measured_for(problem: DepthwiseProblem) -> list[Measured]:
    """What was measured with problems of this kind; the first that has its taps and rows counts."""
    channels, strided = problem.out_channels, max(problem.stride) > 1
    if problem.dtype == "float32" and not strided:
        return [FLOAT32]
    pixels = channels <= MOST_PIXEL and channels % 2 == 0
    if problem.dtype == "float32":
        return [*([FLOAT32_STRIDED_PIXELS] if pixels and channels % CHUNK else []), FLOAT32_STRIDED]
    if problem.element_bytes == 2 and strided and channels % 2 == 0:
        narrow = [HALF_STRIDED_NARROW] if channels <= NARROW_PIXEL else []
        return [*narrow, *([HALF_STRIDED_PIXELS] if pixels else []), HALF_STRIDED]
    return []


def image_march(problem: DepthwiseProblem, device: DeviceSpec) -> Tile | None:
    """The march for a problem, where one was measured."""
    channels, height = problem.out_channels, problem.out_size[0]
    unsuited = problem.filter[0] == 1 or problem.dilation != (1, 1)
    if unsuited or not copies_boxes(device) or problem.batch < LEAST_IMAGES or channels < LEAST_CHANNELS:
        return None
    found = (
        blocks
        for measured in measured_for(problem)
        for (taps, rows), blocks in measured.items()
        if problem.taps in taps and height in rows
    )
    blocks = next(found, None)
    fits = problem.least_bytes <= MOST_SIZES * device.l2_bytes
    if blocks is None or (blocks.small and not fits):
        return None
    chunk = channels if blocks.chunk == PIXEL else min(blocks.chunk, 64 if channels > 32 else 32)
    if blocks.rows and channels % CHUNK:  # of tall images, pixels that chunks don't divide
        chunk = min(channels, TALL_PIXEL)
    return Tile(
        True,
        chunk,
        COLUMNS,
        threads=chunk // blocks.vector * blocks.groups,
        vector=blocks.vector,
        stages=blocks.stages,
        stage_rows=blocks.stage_rows,
        part_rows=blocks.rows or blocks.images * height,
        min_blocks=1,
        slower=blocks.slower,
        boxes=True,
        out_boxes=blocks.out_boxes,
        evict_first=blocks.once and fits,
    )
