"""taps_planes_nchw: gradients of filters in 16 bits, channels first, of small planes: columns by columns, by images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .base import GRID_X_LIMIT, Variant
from .parts import gathered
from .strips import divided, up
from .taps_lines import FIRST_ARCHITECTURE, IDLE_WARPS, L2_BYTES, LATE, MOST_TILES, PARTS, PRODUCT, ROUND, START

MOST_COLUMNS = 16  # of x and of g: a warp reads whole rows
MOST_PRODUCTS = 1200  # of a stage and a warp: the kernel is one line of instructions
MOST_REGISTERS = 216  # of a thread
OTHER_REGISTERS = 44  # of a thread, beside sums and rows
STAGES = (2, 3, 4)

# Constants of the cost model; estimates.
STAGE = 40.0  # instructions of a warp beside reads, products and copies
FINISH = 14.0  # of a warp at the end for each register of sums


@dataclass(frozen=True, slots=True)
class Tile:
    """What is compiled in.

    Attributes:
        images: of a stage, 8 or 16: what a product of matrices sums over.
        own: channels of a warp.
        warps: of a block.
        stages: of shared memory of a warp; all but one are being filled.
        min_blocks: blocks that a multiprocessor shall hold, which limits a thread's registers.
    """

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
            f"{self.images} images of {self.own} channels a warp, {self.warps} warps, {self.stages} stages, "
            f"{self.min_blocks} blocks"
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """What a tile means for a problem; the kernel's TapsPlanes computes the same.

    Attributes:
        stage_bytes: of a warp; shared_bytes: of a block; slab: rows of taps of a warp that are in shared memory at the
            end.
        count: sums of a block, as whole vectors; sums: registers of a thread that hold them.
        registers: of a thread.
        products: of matrices, of a warp and stage; reads, copies: instructions for them.
        groups: of channels; stages: of images; parts, part_stages: blocks of a group, and stages of each.
        resident: blocks that a multiprocessor holds.
    """

    stage_bytes: int
    shared_bytes: int
    slab: int
    count: int
    sums: int
    registers: int
    products: int
    reads: int
    copies: int
    groups: int
    stages: int
    parts: int
    part_stages: int
    resident: int


def stretch(size: int, behind: int, images: int) -> tuple[int, int]:
    """Bytes from the planes of one image to those of the next one in a stage, and a warp's instructions to copy them.

    The kernel's PlaneStretch computes the same: `size` bytes, and `behind` them some that are read.

    >>> stretch(784, 4, 16), stretch(392, 4, 16)
    ((800, 56), (416, 32))
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
        yield from (self.plan(problem, device, tile) for tile in sorted(timed, key=timed.__getitem__)[:MOST_TILES])
        if not timed:
            yield Rejection(self.stem, "", "no tile's planes fit in shared memory, and its sums in registers")

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""
        one = unfit(problem, device) or cut(problem, device, tile)
        if isinstance(one, str):
            return Rejection(self.stem, str(tile), one)
        blocks, rows = one.groups * one.parts, problem.out_size[0]
        if blocks > GRID_X_LIMIT or (one.stages + one.part_stages) * max(rows, tile.images) >= 2**31:
            return Rejection(self.stem, str(tile), "there are too many rows to number them in 31 bits")
        of_gatherer, _ = gathered(one.count // 4, 32 * tile.warps, one.parts)
        gatherers = divided(one.parts, of_gatherer)
        constants = problem_constants(problem) | {
            "HEIGHT": problem.size[0],
            "WIDTH": problem.size[1],
            "OUT_HEIGHT": rows,
            "OUT_WIDTH": problem.out_size[1],
            "IMAGES": tile.images,
            "OWN": tile.own,
            "WARPS": tile.warps,
            "MIN_BLOCKS": tile.min_blocks,
            "STAGES": tile.stages,
            "SLAB": one.slab,
            "REPAIR": 1,
        }
        # LinesTiling: a line is an image, a super-line a stage.
        divisors = 1, one.groups, rows, one.stages, 1, 1
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(blocks, 1, 1),
            block=(32 * tile.warps, 1, 1),
            shared_bytes=one.shared_bytes,
            sizes=problem_sizes(problem),
            tiling=(
                problem.batch,
                problem.batch,
                one.parts,
                one.part_stages * rows,
                one.stages * rows,
                of_gatherer,
                *(field for divisor in divisors for field in fast_divisor(divisor)),
            ),
            tile=f"{tile}, {one.parts} parts of {one.part_stages} stages",
            predicted_seconds=seconds(problem, device, tile, one),
            partial_bytes=blocks * one.count * 4 if one.parts > 1 else 0,
            arrivals=one.groups * (1 if gatherers == 1 else gatherers + 1) if one.parts > 1 else 0,
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


def tiles(problem: DepthwiseProblem) -> Iterator[Tile]:
    """Tiles in question."""
    for images in (16, 8):
        if images == 16 and problem.batch <= 8:
            continue
        for own in (1, 2, 3, 4, 6, 8):
            if own % problem.multiplier or problem.out_channels % own:
                continue
            for warps in (4, 8, 6, 5, 7, 10, 12, 16, 2):
                if warps * own >= problem.out_channels + own and warps > 2:
                    continue
                for stages in STAGES:
                    for blocks in (1, 2, 3, 4):
                        if blocks * warps <= 24:
                            yield Tile(images, own, warps, stages, blocks)


def matrices(problem: DepthwiseProblem, images: int) -> tuple[int, int, int, int]:
    """Of one channel and stage: products of matrices, instructions that read x and g, registers of a thread for sums, and
    for rows of g that are needed at a time."""
    (height, width), (out_height, out_width) = problem.size, problem.out_size
    stride, dilation, padding = problem.stride[0], problem.dilation[0], problem.padding[0][0]
    eights = images // 8
    x_rows = 2 if width <= 8 else 1
    x_words = width % 2 == 0 and height % x_rows == 0
    g_words = out_width % 2 == 0 and out_width > 8
    g_blocks = 2 * divided(out_width, 16) if g_words else divided(out_width, 8)
    taps = {u * dilation for u in range(problem.filter[0])}
    met = [
        (row, j, row - stride * j + padding)
        for row in range(0, height, x_rows)
        for j in range(out_height)
        if any(row + k - stride * j + padding in taps for k in range(x_rows))
    ]
    rows_of_x, rows_of_g = {row for row, _, _ in met}, {j for _, j, _ in met}
    if problem.bias:
        rows_of_g = set(range(out_height))
    reads = eights * (len(rows_of_x) * (4 if x_words else 6) + len(rows_of_g) * g_blocks * (2 if g_words else 3))
    products = (len(met) + (out_height if problem.bias else 0)) * g_blocks
    sums = 4 * g_blocks * (len({distance for _, _, distance in met}) + problem.bias)
    live = max((sum(row == r for r, _, _ in met) for row in rows_of_x), default=0)
    return products, reads, sums, live * g_blocks * eights


def cut(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Cut | str:
    """How a tile divides a problem that isn't unfit, or why it can't."""
    (height, width), (out_height, out_width) = problem.size, problem.out_size
    products, reads, sums, rows_of_g = matrices(problem, tile.images)
    if tile.own * products > MOST_PRODUCTS:
        return f"a warp would make {tile.own * products} products of a stage, more than {MOST_PRODUCTS}"
    registers = tile.own * sums + rows_of_g + tile.images + OTHER_REGISTERS
    limit = min(MOST_REGISTERS, device.registers // (32 * tile.warps * tile.min_blocks))
    if registers > limit:
        return f"a thread would need some {registers} registers, more than {limit}"
    x_columns = 8 if width <= 8 else 16
    g_columns = up(out_width, 16 if out_width % 2 == 0 and out_width > 8 else 8)
    x_pitch, x_copies = stretch(
        2 * tile.own // problem.multiplier * height * width, 2 * (x_columns - width), tile.images
    )
    g_pitch, g_copies = stretch(2 * tile.own * out_height * out_width, 2 * (g_columns - out_width), tile.images)
    stage_bytes = tile.images * (x_pitch + g_pitch)
    in_stages, tap_row = tile.warps * tile.stages * stage_bytes, tile.warps * 4 * width * (out_width | 1)
    slab = max(1, min(problem.filter[0], in_stages // tap_row))
    shared_bytes = up(max(in_stages, slab * tap_row, 16 * 32 * tile.warps + 16), 16)
    if tile.min_blocks * (shared_bytes + 1024) > device.shared_bytes:
        return f"its planes take {shared_bytes} bytes of shared memory of a block"
    groups, stages = divided(problem.out_channels, tile.channels), divided(problem.batch, tile.images)
    per_group = max(1, device.multiprocessors * tile.min_blocks // groups)
    part_stages = divided(stages, per_group)
    return Cut(
        stage_bytes=stage_bytes,
        shared_bytes=shared_bytes,
        slab=slab,
        count=up((problem.taps + problem.bias) * tile.channels, 4),
        sums=tile.own * sums,
        registers=registers,
        products=tile.own * products,
        reads=tile.own * reads,
        copies=x_copies + g_copies,
        groups=groups,
        stages=stages,
        parts=divided(stages, part_stages),
        part_stages=part_stages,
        resident=tile.min_blocks,
    )


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: tensor cores, instructions, L2 and DRAM beside each other, then the last blocks' additions."""
    step = one.products * (1.2 if problem.bias else 1.0) + one.reads + 1.5 * one.copies + STAGE
    of_multiprocessor = divided(one.groups * one.parts, device.multiprocessors)
    waves, at_once = divided(of_multiprocessor, one.resident), min(one.resident, of_multiprocessor)
    warps = at_once * tile.warps
    issue = (one.part_stages * step + FINISH * one.sums) * waves * (warps + IDLE_WARPS) / 4 / device.clock
    product = PRODUCT * tile.images / 16
    tensor = one.part_stages * one.products * tile.warps * product * of_multiprocessor / device.clock
    dram = problem.least_bytes / (device.dram_gbs * 1e9)
    moved = one.part_stages * tile.warps * one.stage_bytes * of_multiprocessor
    l2 = moved / (L2_BYTES * device.clock)
    flying = at_once * tile.warps * (tile.stages - 1) * one.stage_bytes
    dram *= max(1.0, LATE * device.dram_gbs * device.latency_ns / (device.multiprocessors * flying))
    # While the first stages arrive, nothing is multiplied; while the last ones are, nothing arrives.
    dram += device.latency_ns * 1e-9 * (waves - 1) * 0.5
    body = float((dram**3 + issue**3 + tensor**3 + l2**3) ** (1 / 3))
    last = PARTS + ROUND * gathered(one.count // 4, 32 * tile.warps, one.parts)[1] if one.parts > 1 else 0.0
    return LAUNCH_SECONDS + START + body + last
