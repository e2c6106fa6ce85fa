"""sparse_nhwc: filter rows of two channels as matrices on sparse tensor cores; 16 bits, channels last."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, legal, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS, roofline
from .base import GRID_X_LIMIT, Variant
from .boxes import forward_maps
from .matrix_items import count_of
from .sparse_rows import (
    MOST_PRODUCTS,
    MOST_ROWS,
    MOST_STEPS,
    Cut,
    Tile,
    cut,
    grouping_of,
    most_registers,
    read_again,
    registers,
    steps_of,
    turned,
)
from .strips import divided, too_long, window_columns

COUNTS = (1, 2, 3, 4, 6, 8)  # of copies and stores of a thread and row that the kernel is compiled for


class SparseNhwc(Variant):
    stem = "sparse_nhwc"
    layouts = ("channels_last",)
    dtypes = ("float16", "bfloat16")
    technique = (
        "rows of pixels stream through shared memory; sparse tensor cores multiply them, as they lie, by the rows of "
        "two channels' filters as matrices that are half zeros, with float32 sums in registers"
    )

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Tiles in question, by what was measured (docs/variants/sparse_nhwc.md)."""
        stride, turn = problem.stride, problem.filter[0] > problem.filter[1]
        if problem.size[0] > 1:  # sequences are faster without boxes, which take no groups of eight
            yield from self.box_tiles(problem)
        for warps, pairs in ((8, 4), (4, 4), (6, 4), (8, 2), (4, 2), (12, 2), (10, 2), (16, 2), (8, 1)):
            yield Tile(warps, pairs, 1, 4, 2 * stride[0])
            yield Tile(warps, pairs, 1, 6, stride[0])
        if max(*problem.size, *problem.out_size) <= 8:
            for warps, pairs, stages in ((8, 2, 3), (8, 1, 3), (4, 2, 2)):
                yield Tile(warps, pairs, 1, stages, problem.size[0], whole=True)
        if turn:
            yield Tile(8, 1, 2, 4, 2 * stride[1], turned=True)
            yield Tile(8, 1, 1, 4, 2 * stride[1], turned=True)
            yield Tile(8, 1, 1, 4, stride[1], turned=True)

    def box_tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Those whose rows the copy engine brings; not of 7×7 on narrow images (384×14²: 0.73, not 0.79)."""
        rows = problem.stride[0]
        for warps in (8, 6, 4):
            yield Tile(warps, 4, 1, 4, 2 * rows, boxes=True)
        if rows > 1:
            yield Tile(8, 4, 1, 6, rows, boxes=True)
        if problem.filter[0] > 5 and problem.out_size[1] > 16:  # matrices of eight channels don't fit in registers
            yield Tile(8, 2, 1, 4, 2 * rows, boxes=True)
            yield Tile(8, 2, 1, 3, 4 * rows, boxes=True)
        if max(*problem.size, *problem.out_size) <= 8:
            yield Tile(8, 2, 1, 3, problem.size[0], whole=True, boxes=True)

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        if problem.taps < 9:
            yield Rejection(self.stem, "", "few taps are multiplied faster one by one")
            return
        if max(problem.stride) > 1 and (problem.taps < 25 or problem.out_size[1] < 16):
            yield Rejection(self.stem, "", "with strides, few taps or narrow images leave most of a product empty")
            return
        found = [self.plan(problem, device, tile) for tile in self.tiles(problem)]
        # Boxes serve more sizes with the same kernel, so that a stream of sizes compiles few.
        yield min(legal(found), key=lambda plan: plan.predicted_seconds * (1 if plan.maps else 1.05), default=found[-1])

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles: for tests and for tuning."""
        return legal(self.plan(problem, device, tile) for tile in self.tiles(problem))

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""
        if not tile.turned:
            return self._plan(problem, problem, device, tile)
        return self._plan(problem, turned(problem), device, tile)

    def _plan(
        self, given: DepthwiseProblem, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile
    ) -> Plan | Rejection:
        """The same, of a problem as it is given and as the kernel sees it."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        if device.sm < 80:
            return rejected(f"{device.arch} has no tensor cores for sparse products of 16×8×32")
        if problem.multiplier > 1:
            return rejected("a multiplier gives each channel of x several filters")
        if problem.dilation[0] > 1:
            return rejected("rows that a filter reads must be neighbours if the sums are to move on row by row")
        if tile.whole and (max(*problem.out_size, tile.rows) > 8 or problem.size[1] > 16):
            return rejected("images are too large to be taken as a whole")
        if not tile.whole and tile.rows % problem.stride[0]:
            return rejected(f"a step of {tile.rows} rows doesn't end with an output row")
        if tile.rows > MOST_ROWS:
            return rejected(f"a step of {tile.rows} rows is longer than {MOST_ROWS}")
        if max(problem.padding[0]) >= problem.filter[0]:
            return rejected("some windows lie in the padding as a whole; each must reach the image")
        image, _, row, column = problem.plane_strides
        numbers = (problem.channels, row, column, *((image,) if problem.batch > 1 else ()))
        if problem.aligned % 16 or any(number % 8 for number in numbers):
            return rejected("pixels must be whole vectors of eight channels, at multiples of 16 bytes")
        if 0 in (problem.batch, *problem.size, *problem.out_size):
            return rejected("there is nothing to sum")
        grouping = grouping_of(problem, tile)
        if grouping is None:
            many = f"a filter row reaches over more than {16 * MOST_PRODUCTS} pixels"
            return rejected("groups of eight pixels would meet in the same banks" if tile.whole else many)
        taken = registers(problem, tile, grouping.steps, device.sm)
        if taken > most_registers(tile):
            return rejected(f"{taken} registers for a thread of {tile.warps} warps are too many")
        one = cut(problem, device, tile, grouping)
        if one.shared_bytes > device.shared_bytes - 1024:
            return rejected(f"a block would take {one.shared_bytes} bytes of shared memory")
        out_image = math.prod(problem.out_size) * problem.channels
        if max(grouping.slots * max(image, out_image) + problem.size[1] * column, row) >= 2**31:
            return rejected("images of a block are too far apart for 32-bit offsets")
        if steps_of(problem, tile, one.part_rows, one.rows) + tile.stages + 1 > MOST_STEPS:
            return rejected(f"a block can't number more than {MOST_STEPS} steps")
        if one.rows + one.part_rows >= 2**31 or one.chunks * grouping.strips * one.parts > GRID_X_LIMIT:
            return rejected("there are too many rows to number them in 31 bits")
        octets = tile.channels // 8
        loads = 1 if tile.boxes else count_of(grouping.slots * one.columns * octets, tile.threads, COUNTS)
        stores = count_of(grouping.slots * grouping.groups * grouping.group * octets, tile.threads, COUNTS)
        if loads is None or stores is None:
            return rejected("a row takes too many copies of each thread")
        x_box = (tile.x_channels, one.width, grouping.slots, tile.rows)
        maps = forward_maps(problem, device, tile.turned, x_box) if tile.boxes else ()
        if maps is None:
            return rejected("boxes are of aligned pixels and at most 64 channels (sm_90)")
        constants = problem_constants(problem) | {
            "WARPS": tile.warps,
            "MIN_BLOCKS": one.blocks,
            "PAIRS": tile.pairs,
            "TILES": tile.tiles,
            "GROUP": grouping.group,
            "APART": grouping.between,
            "FOLDED": int(grouping.folded),
            "PITCH": one.pitch,
            "CACHED": int(max(problem.stride) > 1),  # past L1, strided rows are slower
            "STEPS": grouping.steps,
            "LEAD": grouping.lead,
            "STAGES": tile.stages,
            "ROWS": tile.rows,
            "LOADS": loads,
            "STORES": stores,
            "TURNED": int(tile.turned),
            "WHOLE": int(tile.whole),
            "BOXES": int(tile.boxes),
            "X_CHANNELS": tile.x_channels,
            "OUT_ROWS": problem.out_size[0] if tile.whole else 0,
            "COLUMNS": problem.size[1] if tile.whole else 0,
        }
        return Plan(
            problem=given,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(one.chunks * grouping.strips * one.parts, 1, 1),
            block=(tile.threads, 1, 1),
            shared_bytes=one.shared_bytes,
            sizes=problem_sizes(problem),
            tiling=(
                *(
                    field
                    for divisor in (
                        one.chunks,
                        grouping.strips,
                        problem.out_size[0],
                        steps_of(problem, tile, problem.out_size[0]),
                        one.columns,
                        grouping.groups * grouping.group,
                        grouping.groups,
                        grouping.slots,
                    )
                    for field in fast_divisor(divisor)
                ),
                problem.batch,
                one.rows,
                one.part_rows,
                one.width,
                one.row_bytes,
                one.results,
                one.table,
                problem.channels if tile.turned else problem.out_size[1] * problem.channels,
                problem.out_size[0] * problem.channels if tile.turned else problem.channels,
            ),
            tile=(
                f"{tile}; {grouping.slots} images × {grouping.groups} groups of {grouping.group}, "
                f"{one.part_rows} rows a block"
            ),
            predicted_seconds=seconds(problem, device, tile, one),
            maps=maps,
        )


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: DRAM, whose lines narrow chunks of channels share, and the steps of a block: for each row that a
    warp takes, what it loads, multiplies and finishes.

    Fitted to 480 measured tiles of 37 problems, and to 190 of boxes of 26 (H200, 2026-11): root mean square error 19 %
    and 13 %.
    """
    filled, strided = problem.channels / (one.chunks * tile.channels), max(problem.stride) > 1
    copy = roofline(problem, device).copy - LAUNCH_SECONDS
    if tile.boxes:
        lines = 1.02 if tile.channels == 64 else 0.91 if tile.channels > 32 else 0.88
        lines *= 0.93 if 2 * problem.channels % 32 else 1  # neighbouring pixels share sectors
        dram = copy / (lines * filled**0.43)
        march = march_seconds(problem, device, tile, one, step=132, row=0, load=2.7, pair=0, product=0.87)
        start = 6.4e-6 if tile.whole else 7.8e-6
    else:
        lines = 0.98 if tile.channels % 64 == 0 else 0.86 if tile.channels % 32 == 0 else 0.78
        lines *= filled**0.2 if not strided else 1.2 if filled == 1 else 0.7
        dram = copy / lines * (1 + 0.2 * read_again(problem, one.part_rows))
        march = march_seconds(problem, device, tile, one, step=150, row=8, load=5, pair=4.1, product=0.2)
        start = 5.9e-6 if tile.whole else 6.8e-6
    return start + math.pow(dram**1.4 + march**1.4, 1 / 1.4)


def march_seconds(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    tile: Tile,
    one: Cut,
    *,
    step: float,
    row: float,
    load: float,
    pair: float,
    product: float,
) -> float:
    """Of all steps of a block, from clocks of a step, of a row, and of what a warp does for a row: of a load, of a pair
    of channels, of a product.
    """
    grouping = one.grouping
    waves = divided(one.chunks * grouping.strips * one.parts, device.multiprocessors * one.blocks)
    loads = divided(min(window_columns(problem, grouping.group), 16 * grouping.steps), 4)
    products = problem.filter[0] * grouping.steps / problem.stride[0]
    clocks = row + one.blocks * tile.warps * tile.tiles * (load * loads + tile.pairs * (pair + product * products))
    steps = waves * steps_of(problem, tile, one.part_rows, one.rows)
    seconds = steps * (step / one.blocks + tile.rows * clocks) / device.clock
    # Of low images, what comes before and after one weighs more.
    return seconds * (1.3 if 1 < problem.out_size[0] <= 8 and not tile.whole else 1)
