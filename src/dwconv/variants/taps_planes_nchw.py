"""taps_planes_nchw: gradients of filters in 16 bits, channels first, of small planes: columns by columns, by images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..device import DeviceSpec
from ..plan import Plan, Rejection
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from . import taps_lines
from .base import Variant
from .march import March, marching_plan
from .parts import gathered
from .streams import BULK_COPIES, streams
from .strips import divided, up
from .taps_lines import FIRST_ARCHITECTURE

MOST_COLUMNS = 32  # of x and of g: a warp reads whole rows
MOST_PRODUCTS = 1200  # of a stage and a warp: the kernel is one line of instructions
MOST_REGISTERS = 216  # of a thread
OTHER_REGISTERS = 44  # of a thread, beside sums and rows
MOST_WARPS = 24  # of a multiprocessor
MOST_TAP_TILES = 4
ALIKE = 2  # tiles of the same images, channels and warps that are worth timing

# Constants of the cost model; estimates.
LEAST_STRETCH = 128  # bytes of x or g, on average: 98 of a 7² plane took 15.6 µs, not 14.0, 196 of two 15.4, not 16.5
STAGE = 40.0  # instructions of a warp beside reads, products and copies
FINISH = 8.0  # of a warp at the end for each register of sums
IDLE_WARPS = 5.0  # issue slots are used as warps / (warps + IDLE_WARPS)
PRODUCT = 4.2  # clocks of a multiprocessor for a product of matrices
L2_BYTES = 40.0  # of a clock, to a multiprocessor
LATE = 1.6  # latencies of DRAM that bytes in flight must last for
START, PARTS, ROUND = 6.0e-6, 2.5e-6, 0.57e-6  # beside the launch; to leave parts; a round of loads of parts


@dataclass(frozen=True, slots=True)
class Tile:
    """What is compiled in.

    Attributes:
        taps: rows of taps of a block.
        images: of a stage, 8 or 16: what a product of matrices sums over.
        own: channels of a warp.
        warps: of a block.
        stages: of shared memory of a warp; all but one are being filled.
        min_blocks: blocks that a multiprocessor shall hold, which limits a thread's registers.
    """

    taps: int
    images: int
    own: int
    warps: int
    stages: int = 2
    min_blocks: int = 1

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.own * self.warps

    def __str__(self) -> str:
        return (
            f"{self.taps} rows of taps, {self.images} images of {self.own} channels a warp, {self.warps} warps, "
            f"{self.stages} stages, {self.min_blocks} blocks"
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """What a tile means for a problem; the kernel's TapsPlanes computes the same.

    Attributes:
        stage_bytes: of a warp; shared_bytes: of a block; slab: rows of taps of a warp's channels that are in
            shared memory at the end.
        bulk: whether one lane sends whole stretches of memory, else all lanes copy pieces of them.
        count: sums of a block, as whole vectors; sums: registers of a thread that hold them.
        products: of matrices, of a warp and stage; reads, copies: instructions for them. Of several tiles of taps: on
            average.
        part_stages: of a block.
        resident: blocks that a multiprocessor holds.
        march: how blocks share the problem: a line is an image, a super-line a stage.
    """

    stage_bytes: int
    shared_bytes: int
    slab: int
    bulk: bool
    count: int
    sums: float
    products: float
    reads: float
    copies: int
    part_stages: int
    resident: int
    march: March


def stretch(size: int, behind: int, images: int) -> tuple[int, int]:
    """Bytes from the planes of one image to those of the next one in a stage, and a warp's instructions to copy them.

    The kernel's PlaneStretch computes the same: `size` bytes, and `behind` them some that are read.

    >>> stretch(784, 4, 16), stretch(392, 4, 16)
    ((800, 28), (416, 16))
    """
    before = 16 - math.gcd(16, size)
    pieces = divided(size + before, 16)
    needed = max(16 * pieces, size + before + behind)
    copies = min(divided(pieces, lanes) * divided(images * lanes, 32) for lanes in (8, 16, 32))
    return min(up(needed, 128, 32), up(needed, 128, 96)), copies


class TapsPlanesNchw(Variant):
    stem = "taps_planes_nchw"
    technique = (
        "whole planes of several images are staged; columns of x by columns of y's gradient are matrices that tensor "
        "cores multiply, summing over images, for each row of taps; filters' gradients are their diagonals"
    )
    directions = ("grad_weight",)
    dtypes = ("float16", "bfloat16")

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        if reason := unfit(problem, device):
            yield Rejection(self.stem, "", reason)
            return
        timed: dict[Tile, float] = {}
        for tile in tiles(problem):
            one = cut(problem, device, tile)
            if not isinstance(one, str):
                timed[tile] = seconds(problem, device, tile, one)
        alike: Counter[tuple[int, int, int, int]] = Counter()
        chosen = []
        for tile in sorted(timed, key=timed.__getitem__):
            key = tile.taps, tile.images, tile.own, tile.warps
            alike[key] += 1
            if alike[key] <= ALIKE:
                chosen.append(tile)
        yield from (self.plan(problem, device, tile) for tile in chosen[: taps_lines.MOST_TILES])
        if not timed:
            yield Rejection(self.stem, "", "no tile's planes fit in shared memory, and its sums in registers")

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""
        one = unfit(problem, device) or cut(problem, device, tile)
        if isinstance(one, str):
            return Rejection(self.stem, str(tile), one)
        if (one.march.super_lines + one.part_stages) * tile.images >= 2**31:
            return Rejection(self.stem, str(tile), "there are too many rows to number them in 31 bits")
        constants = {
            "HEIGHT": problem.size[0],
            "WIDTH": problem.size[1],
            "OUT_HEIGHT": problem.out_size[0],
            "OUT_WIDTH": problem.out_size[1],
            "TAPS_A": tile.taps,
            "IMAGES": tile.images,
            "OWN": tile.own,
            "WARPS": tile.warps,
            "MIN_BLOCKS": tile.min_blocks,
            "STAGES": tile.stages,
            "SLAB": one.slab,
            "BULK": int(one.bulk),
            "EVICT_FIRST": int(one.bulk and streams(problem, device, one.march.tap_tiles)),
            "REPAIR": 1,
        }
        return marching_plan(
            self.stem,
            problem,
            device,
            one.march,
            f"{tile}, {one.march.parts} parts of {one.part_stages} stages",
            constants,
            warps=tile.warps,
            shared_bytes=one.shared_bytes,
            count=one.count,
            predicted_seconds=seconds(problem, device, tile, one),
        )


def unfit(problem: DepthwiseProblem, device: DeviceSpec) -> str | None:
    """Why no tile can take a problem; None if one might."""
    if device.sm < FIRST_ARCHITECTURE:
        return f"tensor cores of {device.arch} have no such product"
    (height, width), out = problem.size, problem.out_size
    if max(width, out[1]) > MOST_COLUMNS:
        return f"rows of {max(width, out[1])} columns are wider than the {MOST_COLUMNS} that a warp reads"
    if min(problem.batch, *out) < 1:
        return "there are no outputs"
    image, channel, row, _ = problem.plane_strides
    dense = (height == 1 or row == width) and (problem.channels == 1 or channel == height * width)
    if not dense:
        return "planes of x aren't dense: a warp copies those of its channels as one stretch"
    of_images = (problem.channels * height * width, problem.out_channels * out[0] * out[1])
    apart = image if problem.batch > 1 else 0
    if problem.aligned < 16 or any(elements % 8 for elements in (*of_images, apart)):
        return "images of x or of y's gradient don't begin at multiples of 16 bytes"
    return None


def whole_channels(problem: DepthwiseProblem, own: int) -> bool:
    """Whether warps of so many channels have all outputs of their channels of x, and each channel a warp."""
    return own % problem.multiplier == 0 and problem.out_channels % own == 0


def tiles(problem: DepthwiseProblem) -> Iterator[Tile]:
    """Tiles in question."""
    # 16 images of 28 × 28 spill (5×5, NVRTC 13.0), and leave shared memory for few warps.
    for images in (16, 8) if problem.batch > 8 and problem.size[1] <= 16 else (8,):
        for own in (1, 2, 3, 4, 6, 8):
            if not whole_channels(problem, own):
                continue
            for taps in tap_rows(problem, images, own):
                for warps in (4, 2, 3, 5, 6, 7, 8, 10, 12, 16):
                    if (warps - 1) * own >= problem.out_channels and warps > 2:
                        continue
                    for blocks in (1, 2, 3, 4, 6, 8):
                        for stages in (3, 2, 4):
                            if blocks * warps <= MOST_WARPS:
                                yield Tile(taps, images, own, warps, stages, blocks)


def tap_rows(problem: DepthwiseProblem, images: int, own: int) -> list[int]:
    """Rows of taps of a tile: as many as registers are there for, shared evenly among the fewest tiles."""
    for tap_tiles in range(1, MOST_TAP_TILES + 1):
        taps = divided(problem.filter[0], tap_tiles)
        if most_registers(problem, taps, images, own) <= MOST_REGISTERS:
            return [taps]
    return []


def most_registers(problem: DepthwiseProblem, taps: int, images: int, own: int) -> int:
    """Registers of a thread, for the tile of taps that needs most of them."""
    found = (matrices(problem, first, taps, images) for first in range(0, problem.filter[0], taps))
    return OTHER_REGISTERS + images + max(own * sums + rows_of_g for _, _, sums, rows_of_g in found)


def blocks_meet(x_block: int, g_block: int, words: bool, stride: int, padding: int, reach: int) -> bool:
    """Whether any column of these blocks, 16 of x and 8 of g, meets another in a tap; words: g's are every other one.

    >>> [blocks_meet(1, g_block, False, 1, 1, 2) for g_block in range(4)]
    [False, True, True, True]
    """
    first = g_block // 2 * 16 + g_block % 2 if words else 8 * g_block
    last = first + (14 if words else 7)
    return 16 * x_block + 15 - stride * first + padding >= 0 and 16 * x_block - stride * last + padding <= reach


@lru_cache(maxsize=4096)
def matrices(problem: DepthwiseProblem, first: int, tap_rows: int, images: int) -> tuple[int, int, int, int]:
    """Of the tile of taps from row `first` on, a channel and a stage: products of matrices, instructions that read x
    and g, registers of a thread for sums, and for rows of g that are needed at a time."""
    (height, width), (out_height, out_width) = problem.size, problem.out_size
    stride, dilation, padding = problem.stride[0], problem.dilation[0], problem.padding[0][0]
    eights = images // 8
    x_rows = 2 if width <= 8 else 1
    x_words = width % 2 == 0 and height % x_rows == 0
    g_words = out_width % 2 == 0 and out_width > 8
    x_blocks = divided(width, 16)
    g_blocks = 2 * divided(out_width, 16) if g_words else divided(out_width, 8)
    reach = problem.stride[1], problem.padding[1][0], (problem.filter[1] - 1) * problem.dilation[1]
    pairs = sum(blocks_meet(x, g, g_words, *reach) for x in range(x_blocks) for g in range(g_blocks))
    taps = {u * dilation for u in range(first, min(first + tap_rows, problem.filter[0]))}
    bias = problem.bias and first == 0
    met = [
        (row, j, row - stride * j + padding)
        for row in range(0, height, x_rows)
        for j in range(out_height)
        if any(row + k - stride * j + padding in taps for k in range(x_rows))
    ]
    rows_of_x, rows_of_g = {row for row, _, _ in met}, {j for _, j, _ in met}
    if bias:
        rows_of_g = set(range(out_height))
    of_x, of_g = x_blocks * (4 if x_words else 6), g_blocks * (2 if g_words else 3)
    reads = eights * (len(rows_of_x) * of_x + len(rows_of_g) * of_g)
    products = len(met) * pairs + (out_height if bias else 0) * g_blocks
    sums = 4 * (pairs * len({distance for _, _, distance in met}) + (g_blocks if bias else 0))
    live = max((sum(row == r for r, _, _ in met) for row in rows_of_x), default=0)
    return products, reads, sums, live * g_blocks * eights


def cut(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Cut | str:
    """How a tile divides a problem that isn't unfit, or why it can't."""
    if not whole_channels(problem, tile.own):
        return (
            f"{tile.own} channels of a warp don't divide {problem.out_channels} into whole channels of x, "
            f"{problem.multiplier} outputs each"
        )
    (height, width), (out_height, out_width) = problem.size, problem.out_size
    tap_tiles = divided(problem.filter[0], tile.taps)
    found = [matrices(problem, k * tile.taps, tile.taps, tile.images) for k in range(tap_tiles)]
    products, reads, sums, _ = (sum(each) / tap_tiles for each in zip(*found, strict=True))
    if tile.own * products * tap_tiles > MOST_PRODUCTS:
        return f"warps would make {tile.own * products * tap_tiles:.0f} products of a stage, more than {MOST_PRODUCTS}"
    registers = most_registers(problem, tile.taps, tile.images, tile.own)
    limit = min(MOST_REGISTERS, device.registers // (32 * tile.warps * tile.min_blocks))
    if registers > limit:
        return f"a thread would need some {registers} registers, more than {limit}"
    x_columns = 8 if width <= 8 else up(width, 16)
    g_columns = up(out_width, 16 if out_width % 2 == 0 and out_width > 8 else 8)
    x_pitch, x_copies = stretch(
        2 * tile.own // problem.multiplier * height * width, 2 * (x_columns - width), tile.images
    )
    g_pitch, g_copies = stretch(2 * tile.own * out_height * out_width, 2 * (g_columns - out_width), tile.images)
    stage_bytes = tile.images * (x_pitch + g_pitch)
    in_stages, tap_row = tile.warps * tile.stages * stage_bytes, tile.warps * 4 * width * (out_width | 1)
    count = up((tile.taps * problem.filter[1] + problem.bias) * tile.channels, 4)
    slab = max(1, min(tile.own * tile.taps, (in_stages - 4 * count) // tap_row))
    shared_bytes = up(max(in_stages, 4 * count + slab * tap_row, 16 * 32 * tile.warps + 16), 16)
    of_image = 2 * tile.own * (height * width // problem.multiplier + out_height * out_width)
    bulk = device.sm >= BULK_COPIES and of_image >= 2 * LEAST_STRETCH
    if bulk:
        shared_bytes += 8 * tile.warps * tile.stages
    if tile.min_blocks * (shared_bytes + 1024) > device.shared_bytes:
        return f"its planes take {shared_bytes} bytes of shared memory of a block"
    groups, stages = divided(problem.out_channels, tile.channels), divided(problem.batch, tile.images)
    per_group = max(1, device.multiprocessors * tile.min_blocks // (groups * tap_tiles))
    part_stages = divided(stages, per_group)
    return Cut(
        stage_bytes=stage_bytes,
        shared_bytes=shared_bytes,
        slab=slab,
        bulk=bulk,
        count=count,
        sums=tile.own * sums,
        products=tile.own * products,
        reads=tile.own * reads,
        copies=x_copies + g_copies,
        part_stages=part_stages,
        resident=tile.min_blocks,
        march=March(
            tap_tiles=tap_tiles,
            groups=groups,
            column_tiles=1,
            lines=problem.batch,
            super_lines=stages,
            line_rows=out_height,
            positions=stages * out_height,
            parts=divided(stages, part_stages),
            part_rows=part_stages * out_height,
        ),
    )


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: tensor cores, instructions, L2 and DRAM beside each other, then the last blocks' additions."""
    stage = one.products + one.reads + 1.5 * one.copies + STAGE
    blocks = one.march.blocks
    of_multiprocessor = divided(blocks, device.multiprocessors)
    waves, at_once = divided(of_multiprocessor, one.resident), min(one.resident, of_multiprocessor)
    warps = at_once * tile.warps
    slots = waves * (warps + IDLE_WARPS) / 4 / device.clock  # seconds for an instruction of each warp
    issue = one.part_stages * stage * slots
    product = PRODUCT * tile.images / 16
    tensor = one.part_stages * one.products * tile.warps * product * of_multiprocessor / device.clock
    l2 = one.part_stages * tile.warps * one.stage_bytes * of_multiprocessor / (L2_BYTES * device.clock)
    ahead = min(tile.stages - 1, one.part_stages)
    flying = min(blocks, device.multiprocessors * one.resident) * tile.warps * ahead * one.stage_bytes
    dram = problem.least_bytes / (device.dram_gbs * 1e9)
    dram *= max(1.0, LATE * device.dram_gbs * device.latency_ns / flying)
    body = float((dram**3 + issue**3 + tensor**3 + l2**3) ** (1 / 3))
    # While the last stages are multiplied, nothing arrives.
    body += (stage + FINISH * one.sums) * slots
    parts = one.march.parts
    last = PARTS + ROUND * gathered(one.count // 4, 32 * tile.warps, parts)[1] if parts > 1 else 0.0
    return LAUNCH_SECONDS + START + body + last
