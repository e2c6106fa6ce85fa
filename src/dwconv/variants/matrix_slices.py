"""Slices of small planes, for matrix_nchw: 392 neighbouring outputs of an image as they lie, 16 images at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem, dense_strides
from ..roofline import LAUNCH_SECONDS
from .strips import divided, short_divisor, up, window_rows

IMAGES, WARPS, PRODUCTS = 16, 7, 7  # that are multiplied at a time; of a block; of a warp, eight outputs wide
OUTPUTS = 8 * PRODUCTS  # of a warp
ELEMENTS = WARPS * OUTPUTS  # of a slice of y
MAX_BANDS = 50  # pairs of registers that hold a warp's part of the matrix
STAGES = (3, 2)  # slices of shared memory, in use or on their way; a fourth one gains nothing


def unsliced(problem: DepthwiseProblem) -> str | None:
    """Why a problem's images can't be cut into slices; None if they can."""
    height, width = problem.size
    if problem.multiplier > 1 or problem.out_size != problem.size or max(problem.stride) > 1:
        return "slices need a plane of y for each of x, as large"
    if OUTPUTS % width or ELEMENTS % (height * width) or problem.channels * height * width % ELEMENTS:
        return f"slices are {ELEMENTS} outputs, which must be whole planes, and {OUTPUTS} whole rows"
    if problem.aligned < 16 or problem.plane_strides != dense_strides(problem.x_shape, "channels_first"):
        return "slices must start at 16 bytes, image after image"
    if problem.batch < IMAGES:
        return f"slices are multiplied for {IMAGES} images at a time"
    if IMAGES * problem.channels * height * width >= 2**31:
        return f"elements of {IMAGES} images can't be numbered in 31 bits"
    rows = (2 * ELEMENTS // (height * width) + 2) * (height + max(window_rows(problem, 1), problem.padding[0][0]))
    if 2 * rows * table_pitch(problem) >= 2**16:
        return "the places of a slice's taps can't be numbered in 16 bits"
    if (bands := reach(problem)[1]) > MAX_BANDS:
        return f"{bands} pieces of a slice's matrix don't fit in registers; {MAX_BANDS} do"
    return None


def reach(problem: DepthwiseProblem) -> tuple[int, int, int]:
    """The first input of a warp from its first output on, the pieces of the matrix, and steps of 16 inputs.

    Twin of `dwconv::Slice`.
    """
    width, (top, left) = problem.size[1], (p[0] for p in problem.padding)

    def first(product: int) -> int:
        row, column = divmod(8 * product, width)
        return (row - top) * width + max(column - left, 0)

    def last(product: int) -> int:
        row, column = divmod(8 * product + 7, width)
        right = column - left + (problem.filter[1] - 1) * problem.dilation[1]
        return (row - top + window_rows(problem, 1) - 1) * width + min(right, width - 1)

    def bands(begin: int) -> int:
        return sum((last(p) - begin) // 16 - (first(p) - begin) // 16 + 1 for p in range(PRODUCTS))

    aligned = first(0) // 8 * 8
    begin = aligned - 8 if bands(aligned - 8) < bands(aligned) else aligned
    return begin, bands(begin), (last(PRODUCTS - 1) - begin) // 16 + 1


def table_rows(problem: DepthwiseProblem) -> tuple[int, int]:
    """Rows of zeros before a channel's taps in its table, and all rows: what a product's steps reach beyond the taps,
    with `apart` rows for each plane in between.
    """
    (height, width), window, top = problem.size, window_rows(problem, 1), problem.padding[0][0]
    across = max((8 * p + 7) // width - 8 * p // width for p in range(PRODUCTS))
    beyond, apart = across + divided(15, width), max(window, top)
    before = beyond + divided(top + beyond, height) * apart
    behind = beyond + divided(max(0, window - 1 - top) + beyond, height) * apart
    return before, before + window + behind


def reads_pairs(problem: DepthwiseProblem) -> bool:
    """Whether neighbouring inputs, the first at an even place, are always of one row."""
    return problem.size[1] % 2 == 0


def table_pitch(problem: DepthwiseProblem) -> int:
    """Elements from row to row of a channel's table."""
    return 2 * problem.size[1] - (0 if reads_pairs(problem) else 1)


def table_elements(problem: DepthwiseProblem) -> int:
    """Elements of a channel's table."""
    return up(table_rows(problem)[1] * table_pitch(problem), 8)


def shared_bytes(problem: DepthwiseProblem, stages: int) -> int:
    """Tables of taps and of places in them, values of the epilogue, stages with zeros around, results."""
    begin, _, steps = reach(problem)
    gap = max(-begin, begin + 16 * steps - OUTPUTS, 8)
    tables = (2 if reads_pairs(problem) else 1) * ELEMENTS // math.prod(problem.size)
    values = problem.bias + problem.epilogue.scale + problem.epilogue.shift
    elements = tables * table_elements(problem) + 2 * (1 + values) * ELEMENTS
    elements += up((WARPS - 1) * OUTPUTS + 16 * steps, 8) + gap
    return 2 * (elements + stages * (IMAGES * ELEMENTS + gap) + IMAGES * ELEMENTS)


def slice_plans(stem: str, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
    """The plan of a problem's slices, or why there is none."""
    if reason := unsliced(problem):
        yield Rejection(stem, "slices", reason)
        return
    blocks = 2 if reach(problem)[1] <= 36 else 1
    limits = [device.shared_bytes // count - 1024 for count in range(blocks, 0, -1)]
    stages = next((s for limit in limits for s in STAGES if shared_bytes(problem, s) <= limit), 0)
    if stages == 0:
        yield Rejection(stem, "slices", f"no two slices fit in {limits[-1]} bytes of shared memory")
        return
    yield slice_plan(stem, problem, device, blocks, stages)


def block_count(slices: int, groups: int, slots: int) -> int:
    """Blocks that share all groups of images of all slices: where it leaves few slots empty, so that each makes an even
    part of one slice, and neighbours work on the same images at the same time.
    """
    parts = (part for part in range(1, groups + 1) if groups % part == 0 and slices * part <= slots)
    even = slices * max(parts, default=0)
    return even if even >= 0.7 * slots else max(1, min(slots, slices * groups))


def slice_plan(
    stem: str, problem: DepthwiseProblem, device: DeviceSpec, min_blocks: int, stages: int, blocks: int = 0
) -> Plan:
    """A plan of blocks with so many stages, `min_blocks` of them on a multiprocessor as far as registers go."""
    shared = shared_bytes(problem, stages)
    height, width = problem.size
    groups = divided(problem.batch, IMAGES)
    channels = ELEMENTS // (height * width)
    slices = problem.channels // channels
    resident = max(1, min(min_blocks, device.shared_bytes // (shared + 1024)))
    total = slices * groups
    blocks = blocks or block_count(slices, groups, resident * device.multiprocessors)
    whole = slices // blocks * groups
    share, longer = divmod(total - whole * blocks, blocks)
    constants = problem_constants(problem) | {
        "THREADS": 32 * WARPS,
        "MIN_BLOCKS": min_blocks,
        "ROWS": 1,
        "TILES": 1,
        "LOADS": 1,
        "STORES": 1,
        "LEAD": 0,
        "GRANULE": 1,
        "UNIT": 1,
        "STORE_VECTOR": 1,
        "STORE_UNIT": 1,
        "ONE_IMAGE": 0,
        "INPUT": 1,
        "STAGE_OUTPUTS": 1,
        "SLICE": width,
        "STAGES": stages,
    }
    one = short_divisor(1)
    return Plan(
        problem=problem,
        device=device,
        variant=stem,
        constants=tuple(sorted(constants.items())),
        grid=(blocks, 1, 1),
        block=(32 * WARPS, 1, 1),
        shared_bytes=shared,
        sizes=problem_sizes(problem),
        tiling=(
            *fast_divisor(groups),
            *fast_divisor(1),
            *fast_divisor(slices),
            *one,
            *one,
            *one,
            *one,
            *one,
            *short_divisor(height),
            *one,
            IMAGES,
            channels,
            share,
            total,
            height,
            width,
            height * width,
            height * width,
            0,
            table_elements(problem),
            table_rows(problem)[0],
            *(0,) * 3,
            32 * WARPS,
            problem.batch - IMAGES,
            longer,
            whole,
        ),
        tile=(
            f"slices of {channels} channels × {IMAGES} images, {whole + share} a block, {stages} stages, "
            f"{min_blocks} blocks"
        ),
        predicted_seconds=slice_seconds(problem, device, resident, blocks, total),
    )


def slice_seconds(problem: DepthwiseProblem, device: DeviceSpec, resident: int, blocks: int, total: int) -> float:
    """Predicted time: building parts of M, then slices as fast as DRAM gives them to multiprocessors, some of which
    have more to do than others. Within 8 % of the measured times of the networks' layers (13x13: 19 %).
    """
    bands = reach(problem)[1]
    setup = 0.03e-6 * resident * bands * (0.4 if reads_pairs(problem) else 1.0)
    moved = problem.least_bytes / total
    slice_ = 1.25 * moved / (device.dram_gbs * 1e9) * device.multiprocessors
    if total % blocks or blocks % max(1, problem.channels * math.prod(problem.size) // ELEMENTS):
        slice_ *= 1.08  # blocks are at different images
    if resident == 1:  # nothing runs beside
        slice_ = max(slice_, (1000 + 38 * bands) / device.clock)
    most = divided(blocks, device.multiprocessors) * (total / blocks)
    slices = (most + total / device.multiprocessors) / 2
    return 1.5 * LAUNCH_SECONDS + setup + slices * slice_
