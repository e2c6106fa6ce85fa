"""sparse_nhwc: filter rows of two channels as matrices on sparse tensor cores; 16 bits, channels last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS, roofline
from .banks import with_fewest_conflicts
from .base import GRID_X_LIMIT, Variant
from .matrix_items import count_of
from .strips import divided, too_long, up

MOST_STEPS = 256  # of a block, with those behind the last one that are never made
COUNTS = (1, 2, 3, 4, 6, 8)  # of copies and stores of a thread and row that the kernel is compiled for
MOST_PRODUCTS = 4  # of a filter row


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices.

    Attributes:
        warps: of a block.
        pairs: of neighbouring channels of a warp.
        tiles: of eight groups of outputs that a warp makes of a row.
        stages: of `rows` rows of x in shared memory; all but one are in flight.
        rows: input rows of a step; a multiple of the stride.
        turned: the march goes from left to right, and a matrix is of a column of the filter.
    """

    warps: int = 8
    pairs: int = 2
    tiles: int = 1
    stages: int = 4
    rows: int = 1
    turned: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def channels(self) -> int:
        return 2 * self.pairs * self.warps

    def __str__(self) -> str:
        return (
            f"{self.channels} channels, {self.warps} warps, {8 * self.tiles} groups, "
            f"{self.stages} stages of {self.rows} {'columns' if self.turned else 'rows'}"
        )


@dataclass(frozen=True, slots=True)
class Grouping:
    """How a row of outputs is cut into groups.

    Attributes:
        group: outputs of a group.
        steps: products that a filter row takes, 16 pixels each.
        lead: pixels of shared memory in front of the input's first one.
        strips: of columns, side by side.
        slots: images side by side.
        groups: of a slot.
    """

    group: int
    steps: int
    lead: int
    strips: int
    slots: int
    groups: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a block and the grid divide the problem; the fields of `dwconv::SparseTiling`, and shared memory."""

    grouping: Grouping
    chunks: int
    rows: int
    part_rows: int
    parts: int
    columns: int
    width: int
    row_bytes: int
    results: int
    table: int
    shared_bytes: int
    blocks: int
    apart: int
    pitch: int


def turned(problem: DepthwiseProblem) -> DepthwiseProblem:
    """The same problem with rows for columns: x as a view of its memory."""
    image, channel, row, column = problem.plane_strides
    return replace(
        problem,
        size=problem.size[::-1],
        filter=problem.filter[::-1],
        stride=problem.stride[::-1],
        padding=problem.padding[::-1],
        dilation=problem.dilation[::-1],
        x_strides=(image, channel, column, row),
    )


def live_rows(problem: DepthwiseProblem) -> int:
    """Output rows that one input row adds to."""
    return divided(problem.filter[0], problem.stride[0])


def apart(distance: int) -> int | None:
    """How many groups, so many pixels apart, lie between two that are read together, such that these are in different
    banks: four pixels of each, modulo 8. None: no number does it.
    """
    return next((d for d in (1, 2, 4) if distance * d % 8 == 4), None)


def groupings(problem: DepthwiseProblem, tiles: int) -> Iterator[Grouping]:
    """The ways to cut rows into groups."""
    width, stride, most = problem.out_size[1], problem.stride[1], 8 * tiles
    reach = (problem.filter[1] - 1) * problem.dilation[1] + 1
    for steps in range(1, MOST_PRODUCTS + 1):
        for group in range(1, 9):
            across = divided(width, group)
            strips = divided(across, most)
            groups = divided(across, strips)
            slots = min(most // groups, problem.batch) if strips == 1 else 1
            if (group - 1) * stride + reach <= 16 * steps:
                yield Grouping(group, steps, problem.padding[1][0], strips, slots, groups)
            elif across == 1 and problem.size[1] <= 16 * steps:  # all of a row is read by its only group
                yield Grouping(group, steps, 0, strips, slots, groups)


def grouping_of(problem: DepthwiseProblem, tiles: int) -> Grouping | None:
    """The one with the fewest products for an image."""

    def cost(one: Grouping) -> tuple[float, bool, int]:
        products = one.strips * one.steps / one.slots
        return products, apart(one.group * problem.stride[1]) is None, one.group

    return min(groupings(problem, tiles), key=cost, default=None)


def most_registers(tile: Tile, blocks: int = 1) -> int:
    """That a thread can have: a multiprocessor gives them out to four warps at a time."""
    return min(255, 65536 // (blocks * up(tile.warps, 4) * 32) // 8 * 8)


def registers(problem: DepthwiseProblem, tile: Tile, steps: int) -> int:
    """That a thread takes: for matrices, sums and pixels; for what is done to sums; for the rest. ptxas keeps some sums
    twice where a step has several rows.

    No plan of those compiled for docs/variants/sparse_nhwc.md takes more.
    """
    epilogue = problem.epilogue
    sums = 4 * tile.pairs * live_rows(problem) * tile.tiles
    kept = 4 * tile.pairs * steps * (problem.filter[0] + tile.tiles) + sums
    of_channel = problem.bias + epilogue.scale + epilogue.shift
    finishing = 2 * tile.pairs * of_channel + (24 if epilogue.residual else 0) + (8 if epilogue.activation else 0)
    return kept + finishing + (38 if tile.rows == problem.stride[0] else 36 + sums // 4)


def group_of(number: int, between: int) -> int:
    """The group that a column of products belongs to: `dwconv::SparseRows::group_of`."""
    return number // (2 * between) * 2 * between + number % 2 * between + number // 2 % between


def width_of(problem: DepthwiseProblem, one: Grouping, between: int) -> int:
    """Pixels of shared memory from slot to slot such that groups that are read together are in different banks."""
    distance = one.group * problem.stride[1]
    least, last = (one.groups - 1) * distance + 16 * one.steps, one.slots * one.groups - 1

    def conflicts(width: int) -> int:
        numbers = [min(group_of(n, between), last) for n in range(8)]
        places = [n // one.groups * width + n % one.groups * distance for n in numbers]
        found = 0
        for pair in zip(places[::2], places[1::2], strict=True):
            banks = [pixel % 8 for pixel in {place + lane for place in pair for lane in range(4)}]
            found += max(map(banks.count, banks))
        return found

    return with_fewest_conflicts(range(least, least + 8), conflicts, least=4)


def pitch_of(between: int) -> int:
    """Pixels from group to group of the results, eight of which are written, such that those written together are in
    different banks.
    """

    def conflicts(pitch: int) -> int:
        banks = [(group_of(2 * t, between) * pitch + o) % 8 for t in range(4) for o in range(2)]
        return max(map(banks.count, banks))

    return with_fewest_conflicts(range(8, 12), conflicts, least=1)


def cut(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Grouping) -> Cut:
    """How a tile divides the problem."""
    out_h, stride = problem.out_size[0], problem.stride
    between = apart(one.group * stride[1]) or 1
    width = width_of(problem, one, between)
    reach = (problem.filter[1] - 1) * problem.dilation[1] + 1
    columns = (one.groups * one.group - 1) * stride[1] + reach if one.lead == problem.padding[1][0] else problem.size[1]
    columns = min(columns, width)
    pitch = pitch_of(between)
    results = 2 * tile.rows // stride[0] * 8 * tile.tiles * pitch * tile.channels
    origin = max((one.group - 1) * stride[1] + one.lead - problem.padding[1][0], 0)
    of_row = up(max(16 * one.steps - one.lead + problem.padding[1][0] + origin, origin + reach), 8)
    filters = 2 * tile.channels * problem.filter[0] * of_row
    table = up(2 * max(results, filters), 32)
    row_bytes = 2 * one.slots * width * tile.channels
    stages = tile.stages * tile.rows * row_bytes
    shared_bytes = stages + table + 32 * MOST_STEPS
    taken, together = registers(problem, tile, one.steps), 1
    while taken <= most_registers(tile, together + 1) and (together + 1) * (shared_bytes + 1024) <= device.shared_bytes:
        together += 1
    chunks = divided(problem.channels, tile.channels)
    rows = divided(problem.batch, one.slots) * out_h
    part_rows = share_of(problem, device.multiprocessors * together, tile, chunks * one.strips, rows)
    return Cut(
        grouping=one,
        chunks=chunks,
        rows=rows,
        part_rows=part_rows,
        parts=divided(rows, part_rows),
        columns=columns,
        width=width,
        row_bytes=row_bytes,
        results=stages,
        table=table,
        shared_bytes=shared_bytes,
        blocks=together,
        apart=between,
        pitch=pitch,
    )


def steps_of(problem: DepthwiseProblem, tile: Tile, part_rows: int) -> int:
    """Steps of a block that makes so many output rows, at most."""
    height, stride, taps = problem.out_size[0], problem.stride[0], problem.filter[0]

    def of_unit(rows: int, above: int) -> int:
        return ((rows - 1) * stride + taps - 1) // tile.rows + 1 - above // tile.rows

    whole, rest = divmod(part_rows, height)
    steps = whole * of_unit(height, problem.padding[0][0])
    if part_rows % height and part_rows > 1:  # a block may begin within an image, and end within the next one
        steps += divided(taps - 1, tile.rows) + (rest > 0)
    return steps + (of_unit(rest, 0) if rest else 0)


def share_of(problem: DepthwiseProblem, places: int, tile: Tile, columns: int, rows: int) -> int:
    """Output rows of a block, of `rows` in each of so many columns of blocks: those that take the fewest steps."""

    def cost(part_rows: int) -> tuple[bool, float, int]:
        waves = divided(columns * divided(rows, part_rows), places)
        steps = steps_of(problem, tile, part_rows)
        return steps + tile.stages + 1 > MOST_STEPS, waves * (steps + 6), -part_rows

    most = max(1, divided(3 * places, columns))
    shares = {max(1, divided(rows, parts)) for parts in range(1, min(most, max(1, rows)) + 1)}
    longest = max((MOST_STEPS - tile.stages - 2) * tile.rows // problem.stride[0] - problem.filter[0], 1)
    shares |= {min(rows, longest), *(min(rows, problem.out_size[0] * k) for k in (1, 2, 3, 4))}
    return min(shares, key=cost)


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
        for warps, pairs in ((8, 4), (4, 4), (6, 4), (8, 2), (4, 2), (12, 2), (10, 2), (16, 2), (8, 1)):
            yield Tile(warps, pairs, 1, 4, 2 * stride[0])
            yield Tile(warps, pairs, 1, 6, stride[0])
        if turn:
            yield Tile(8, 1, 2, 4, 2 * stride[1], turned=True)
            yield Tile(8, 1, 1, 4, 2 * stride[1], turned=True)
            yield Tile(8, 1, 1, 4, stride[1], turned=True)

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        if max(problem.stride) > 1 and problem.taps < 25:
            yield Rejection(self.stem, "", "with strides and few taps, what is copied is read once: others are faster")
            return
        found = [self.plan(problem, device, tile) for tile in self.tiles(problem)]
        plans = [plan for plan in found if isinstance(plan, Plan)]
        yield min(plans, key=lambda plan: plan.predicted_seconds) if plans else found[-1]

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles: for tests and for tuning."""
        plans = (self.plan(problem, device, tile) for tile in self.tiles(problem))
        return [plan for plan in plans if isinstance(plan, Plan)]

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
        if tile.rows % problem.stride[0]:
            return rejected(f"a step of {tile.rows} rows doesn't end with an output row")
        if max(problem.padding[0]) >= problem.filter[0]:
            return rejected("some windows lie in the padding as a whole; each must reach the image")
        image, _, row, column = problem.plane_strides
        numbers = (problem.channels, row, column, *((image,) if problem.batch > 1 else ()))
        if problem.aligned % 16 or any(number % 8 for number in numbers):
            return rejected("pixels must be whole vectors of eight channels, at multiples of 16 bytes")
        if 0 in (problem.batch, *problem.size, *problem.out_size):
            return rejected("there is nothing to sum")
        grouping = grouping_of(problem, tile.tiles)
        if grouping is None:
            return rejected(f"a filter row reaches over more than {16 * MOST_PRODUCTS} pixels")
        taken = registers(problem, tile, grouping.steps)
        if taken > most_registers(tile):
            return rejected(f"{taken} registers for a thread of {tile.warps} warps are too many")
        one = cut(problem, device, tile, grouping)
        if one.shared_bytes > device.shared_bytes - 1024:
            return rejected(f"a block would take {one.shared_bytes} bytes of shared memory")
        out_image = math.prod(problem.out_size) * problem.channels
        if grouping.slots * max(image, out_image) + one.columns * column >= 2**31:
            return rejected("images of a block are too far apart for 32-bit offsets")
        if steps_of(problem, tile, one.part_rows) + tile.stages + 1 > MOST_STEPS:
            return rejected(f"a block can't number more than {MOST_STEPS} steps")
        if one.rows + one.part_rows >= 2**31 or one.chunks * grouping.strips * one.parts > GRID_X_LIMIT:
            return rejected("there are too many rows to number them in 31 bits")
        octets = tile.channels // 8
        loads = count_of(grouping.slots * one.columns * octets, tile.threads, COUNTS)
        stores = count_of(grouping.slots * grouping.groups * grouping.group * octets, tile.threads, COUNTS)
        if loads is None or stores is None:
            return rejected("a row takes too many copies of each thread")
        constants = problem_constants(problem) | {
            "WARPS": tile.warps,
            "MIN_BLOCKS": one.blocks,
            "PAIRS": tile.pairs,
            "TILES": tile.tiles,
            "GROUP": grouping.group,
            "APART": one.apart,
            "PITCH": one.pitch,
            "CACHED": int(max(problem.stride) > 1),  # past L1, strided rows are slower
            "STEPS": grouping.steps,
            "LEAD": grouping.lead,
            "STAGES": tile.stages,
            "ROWS": tile.rows,
            "LOADS": loads,
            "STORES": stores,
            "TURNED": int(tile.turned),
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
                    )
                    for field in fast_divisor(divisor)
                ),
                grouping.slots,
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
        )


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: DRAM, whose lines narrow chunks of channels share, and the steps of a block: for each row that a
    warp takes, what it loads, multiplies and finishes.

    Fitted to 480 measured tiles of 37 problems (H200, 2026-11): root mean square error 19 %.
    """
    grouping, strided = one.grouping, max(problem.stride) > 1
    waves = divided(one.chunks * grouping.strips * one.parts, device.multiprocessors * one.blocks)
    reach = (grouping.group - 1) * problem.stride[1] + (problem.filter[1] - 1) * problem.dilation[1] + 1
    loads = divided(min(reach, 16 * grouping.steps), 4)
    products = problem.filter[0] * grouping.steps / problem.stride[0]
    row = 8 + one.blocks * tile.warps * tile.tiles * (5 * loads + tile.pairs * (4.1 + 0.2 * products))
    march = waves * steps_of(problem, tile, one.part_rows) * (38 + tile.rows * row) / device.clock
    filled = problem.channels / (one.chunks * tile.channels)
    lines = 0.98 if tile.channels % 64 == 0 else 0.86 if tile.channels % 32 == 0 else 0.78
    lines *= filled**0.2 if not strided else 1.2 if filled == 1 else 0.7
    dram = (roofline(problem, device).copy - LAUNCH_SECONDS) / lines
    return 7.8e-6 + math.pow(dram**1.4 + march**1.4, 1 / 1.4)
