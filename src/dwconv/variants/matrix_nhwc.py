"""matrix_nhwc: filter rows as banded matrices on tensor cores, marching down rows; 16 bits, channels last."""

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
from .matrix_items import count_of, filter_pitch, steps
from .strips import divided, too_long, up

OTHER_REGISTERS = 30  # of a thread, beside bands and sums
MAX_BANDS = 24  # filter rows times products in a row
MOST_STEPS = 256  # of a block, with those behind the last one that are never made
COUNTS = (1, 2, 3, 4, 6, 8)  # of copies, stores and turns of a thread and row that the kernel is compiled for


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices.

    Attributes:
        warps, helpers: of a block: those that multiply; those that copy, turn and store.
        own: neighbouring channels of a warp that multiplies.
        stages: of `rows` rows of x in shared memory; all but one are in flight.
        rows: input rows of a step; a multiple of the stride.
        turned: the march goes from left to right, and bands are columns of the filter.
    """

    warps: int = 12
    own: int = 2
    helpers: int = 4
    stages: int = 3
    rows: int = 2
    turned: bool = False

    @property
    def threads(self) -> int:
        return 32 * (self.warps + self.helpers)

    @property
    def channels(self) -> int:
        return self.warps * self.own

    def __str__(self) -> str:
        return (
            f"{self.channels} channels, {self.warps} warps and {self.helpers} helpers, "
            f"{self.stages} stages of {self.rows} {'columns' if self.turned else 'rows'}"
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """How a block and the grid divide the problem; the fields of `dwconv::MatrixMarchTiling`, and shared memory."""

    chunks: int
    strips: int
    slots: int
    groups: int
    rows: int
    part_rows: int
    parts: int
    units: int
    unit_stride: int
    columns: int
    plane_slot: int
    plane_pitch: int
    step_place: int
    shared_bytes: int


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


def registers(problem: DepthwiseProblem, own: int) -> int:
    """Of a thread, for bands and sums."""
    return own * (4 * live_rows(problem) + 2 * problem.filter[0] * steps(problem, problem.padding[1][0]))


def pixel_pitch(tile: Tile) -> int:
    """Elements of shared memory from pixel to pixel: `dwconv::MatrixRows::kPixel`."""
    return tile.channels if tile.channels // 8 % 2 else tile.channels + 8


def plane_slot_of(slots: int, groups: int, least: int) -> int:
    """Elements from slot to slot such that the eight groups that are read together are in different banks."""

    def conflicts(slot: int) -> int:
        places = [(n // groups * slot // 8 + n % groups) % 8 for n in range(slots * groups)]
        return sum(max(map(part.count, part)) for part in (places[:8], places[8:]) if part)

    return with_fewest_conflicts(range(least, least + 64, 8), conflicts, least=divided(slots * groups, 8))


def cut(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Cut:
    """How a tile divides the problem."""
    (out_h, out_w), stride = problem.out_size, problem.stride
    across = divided(out_w, 8)
    strips = divided(across, 16)
    groups = divided(across, strips)
    slots = min(16 // groups, problem.batch) if strips == 1 else 1
    of_row = steps(problem, problem.padding[1][0])
    units = stride[1] * (groups - 1) + 2 * of_row
    unit_stride = divided(units, stride[1])
    columns = min(8 * units, (8 * groups - 1) * stride[1] + (problem.filter[1] - 1) * problem.dilation[1] + 1)
    plane_slot = plane_slot_of(slots, groups, 8 * stride[1] * unit_stride)
    plane_pitch = up(slots * plane_slot, 8)
    plane_pitch += 8 if plane_pitch // 8 % 2 == 0 else 0  # rows of eight channels are in different banks
    pixel = pixel_pitch(tile)
    behind = 2 * (tile.rows * tile.channels * plane_pitch + tile.rows // stride[0] * 16 * (8 * pixel + 8))
    filters = tile.channels * problem.filter[0] * filter_pitch(problem, problem.padding[1][0])
    step_place = up(max(behind, filters), 8)
    shared_bytes = 2 * (tile.stages * tile.rows * slots * units * 8 * pixel + step_place) + 32 * MOST_STEPS
    chunks = divided(problem.channels, tile.channels)
    rows = divided(problem.batch, slots) * out_h
    part_rows = share_of(problem, device, tile, chunks * strips, rows)
    return Cut(
        chunks=chunks,
        strips=strips,
        slots=slots,
        groups=groups,
        rows=rows,
        part_rows=part_rows,
        parts=divided(rows, part_rows),
        units=units,
        unit_stride=unit_stride,
        columns=columns,
        plane_slot=plane_slot,
        plane_pitch=plane_pitch,
        step_place=step_place,
        shared_bytes=shared_bytes,
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


def share_of(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, columns: int, rows: int) -> int:
    """Output rows of a block, of `rows` in each of so many columns of blocks: those that take the fewest steps."""
    places = device.multiprocessors  # a block takes most of a multiprocessor's registers

    def cost(part_rows: int) -> tuple[bool, float, int]:
        waves = divided(columns * divided(rows, part_rows), places)
        steps = steps_of(problem, tile, part_rows)
        return steps + tile.stages + 1 > MOST_STEPS, waves * (steps + 6), -part_rows

    most = max(1, divided(3 * places, columns))
    shares = {max(1, divided(rows, parts)) for parts in range(1, min(most, max(1, rows)) + 1)}
    longest = max((MOST_STEPS - tile.stages - 2) * tile.rows // problem.stride[0] - problem.filter[0], 1)
    shares |= {min(rows, longest), *(min(rows, problem.out_size[0] * k) for k in (1, 2, 3, 4))}
    return min(shares, key=cost)


class MatrixNhwc(Variant):
    stem = "matrix_nhwc"
    layouts = ("channels_last",)
    dtypes = ("float16", "bfloat16")
    technique = (
        "rows of pixels stream through shared memory, where they are turned into rows of channels; tensor cores "
        "multiply them by all rows of the filter, as banded matrices, with float32 sums in registers"
    )

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Tiles in question, by what was measured (docs/variants/matrix_nhwc.md)."""
        stride, taken = problem.stride[0], registers(problem, 2)
        if problem.out_size[0] == 1:
            yield Tile(16, 2, 8, stages=4, rows=stride)
        elif taken <= 50:
            yield Tile(16, 2, 8, rows=2 * stride)
        elif taken <= 66:
            yield Tile(12, 2, 8, rows=2 * stride)
        for stages, rows in ((3, 2 * stride), (4, stride)):
            yield Tile(12, 2, 4, stages, rows)
            yield Tile(8, 2, 4, stages, rows)
        yield Tile(8, 1, 4, 2, stride)  # if registers or shared memory are short
        if problem.filter[0] > problem.filter[1]:
            yield Tile(12, 2, 4, 3, 2 * problem.stride[1], turned=True)
            yield Tile(16, 1, 4, 3, 2 * problem.stride[1], turned=True)

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        if max(problem.stride) > 1:
            yield Rejection(self.stem, "", "with strides, more of a row is turned than is multiplied: slower")
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
            return rejected(f"{device.arch} has no tensor cores for products of 16×8×16")
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
        if (bands := problem.filter[0] * steps(problem, problem.padding[1][0])) > MAX_BANDS:
            return rejected(f"the filter's {bands} bands don't fit in registers; {MAX_BANDS} do")
        if registers(problem, tile.own) > 65536 // tile.threads // 8 * 8 - OTHER_REGISTERS:
            return rejected(f"bands and sums of {tile.own} channels don't fit in registers")
        if 0 in (problem.batch, *problem.size, *problem.out_size):
            return rejected("there is nothing to sum")
        one = cut(problem, device, tile)
        if one.shared_bytes > device.shared_bytes - 1024:
            return rejected(f"a block would take {one.shared_bytes} bytes of shared memory")
        out_image = math.prod(problem.out_size) * problem.channels
        if one.slots * max(image, out_image) + one.columns * column >= 2**31:
            return rejected("images of a block are too far apart for 32-bit offsets")
        if steps_of(problem, tile, one.part_rows) + tile.stages + 1 > MOST_STEPS:
            return rejected(f"a block can't number more than {MOST_STEPS} steps")
        if one.rows + one.part_rows >= 2**31 or one.chunks * one.strips * one.parts > GRID_X_LIMIT:
            return rejected("there are too many rows to number them in 31 bits")
        octets, threads = tile.channels // 8, 32 * tile.helpers
        loads = count_of(one.slots * one.columns * octets, threads, COUNTS)
        stores = count_of(one.slots * one.groups * 8 * octets, threads, COUNTS)
        depth = next(d for d in (4, 3, 2, 1) if octets % d == 0)  # octets of a load that turns pixels
        each = 4 // depth if depth == octets else 1
        turns = count_of(divided(one.slots * one.units, each) * (octets // depth), tile.helpers, COUNTS)
        if loads is None or stores is None or turns is None:
            return rejected("a row takes too many copies of each thread")
        constants = problem_constants(problem) | {
            "WARPS": tile.warps,
            "HELPERS": tile.helpers,
            "MIN_BLOCKS": 1,
            "OWN": tile.own,
            "STAGES": tile.stages,
            "ROWS": tile.rows,
            "LOADS": loads,
            "STORES": stores,
            "TURNS": turns,
            "TURNED": int(tile.turned),
        }
        return Plan(
            problem=given,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(one.chunks * one.strips * one.parts, 1, 1),
            block=(tile.threads, 1, 1),
            shared_bytes=one.shared_bytes,
            sizes=problem_sizes(problem),
            tiling=(
                *(
                    field
                    for divisor in (one.chunks, one.strips, problem.out_size[0])
                    for field in fast_divisor(divisor)
                ),
                one.slots,
                one.groups,
                problem.batch,
                one.rows,
                one.part_rows,
                one.units,
                one.unit_stride,
                one.columns,
                one.plane_slot,
                one.plane_pitch,
                one.step_place,
                problem.channels if tile.turned else problem.out_size[1] * problem.channels,
                problem.out_size[0] * problem.channels if tile.turned else problem.channels,
            ),
            tile=f"{tile}; {one.slots} images × {one.groups} groups, {one.part_rows} rows a block",
            predicted_seconds=seconds(problem, device, tile, one),
        )


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: DRAM, whose lines several blocks share, and the steps of a block: what the warps multiply, and
    what the helpers move.

    Fitted to 21 measured tiles of 14 problems (H200, 2026-11): root mean square error 6 %.
    """
    waves = divided(one.chunks * one.strips * one.parts, device.multiprocessors)
    products = tile.warps * tile.own * problem.filter[0] * steps(problem, problem.padding[1][0])
    step = 200 + tile.rows * (1.5 * products + 20 * one.slots * one.units)
    march = waves * steps_of(problem, tile, one.part_rows) * step / device.clock
    dram = (roofline(problem, device).copy - LAUNCH_SECONDS) / (0.85 if tile.channels % 32 == 0 else 0.8)
    return LAUNCH_SECONDS + 3e-6 + math.pow(dram**1.5 + march**1.5, 1 / 1.5)
