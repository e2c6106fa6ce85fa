"""Rows of sparse_nhwc: how they are cut into groups and parts, where they lie in shared memory, what they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .banks import with_fewest_conflicts
from .strips import divided, up, window_columns

MOST_STEPS = 256  # of a block, with those behind the last one that are never made
MOST_PRODUCTS = 4  # of a filter row
MOST_ROWS = 8  # of a step
GATE_BYTES = 64  # of boxes' stages


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
        whole: a step takes images as a whole: their rows are `rows`, and no sums move.
        boxes: the copy engine brings the rows of a step (sm_90 and newer).
    """

    warps: int = 8
    pairs: int = 2
    tiles: int = 1
    stages: int = 4
    rows: int = 1
    turned: bool = False
    whole: bool = False
    boxes: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def channels(self) -> int:
        return 2 * self.pairs * self.warps

    @property
    def x_channels(self) -> int:
        """That a pixel of x has in shared memory: boxes bring 16, 32 or 64, whose banks the copy engine spreads."""
        return max(16, 1 << (self.channels - 1).bit_length()) if self.boxes else self.channels

    def __str__(self) -> str:
        return (
            f"{self.channels} channels, {self.warps} warps, {8 * self.tiles} groups, "
            f"{self.stages} stages of {self.rows} {'columns' if self.turned else 'rows'}"
            f"{', whole images' if self.whole else ''}{', boxes' if self.boxes else ''}"
        )


@dataclass(frozen=True, slots=True)
class Grouping:
    """How a row of outputs is cut into groups.

    Attributes:
        group: outputs of a group.
        distance: pixels of x from group to group.
        steps: products that a filter row takes, 16 pixels each.
        lead: pixels of shared memory in front of the input's first one.
        strips: of columns, side by side.
        slots: images side by side.
        groups: of a slot.
    """

    group: int
    distance: int
    steps: int
    lead: int
    strips: int
    slots: int
    groups: int

    @property
    def between(self) -> int:
        """How many groups lie between two that are read together, such that these are in different banks: four pixels
        of each, modulo 8. No number does it where banks are folded.
        """
        return next((d for d in (1, 2, 4) if self.distance * d % 8 == 4), 1)

    @property
    def folded(self) -> bool:
        """Whether places of octets change after eight pixels, too: `dwconv::SparseRows::place`."""
        return self.distance * self.between % 8 != 4


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


def live_rows(problem: DepthwiseProblem, tile: Tile) -> int:
    """Output rows in the making: those that one input row adds to, or all."""
    return problem.out_size[0] if tile.whole else divided(problem.filter[0], problem.stride[0])


def groupings(problem: DepthwiseProblem, tile: Tile) -> Iterator[Grouping]:
    """The ways to cut rows into groups."""
    width, stride, most = problem.out_size[1], problem.stride[1], 8 * tile.tiles
    if tile.whole:  # all of a row is read by its only group
        yield Grouping(width, width * stride, 1, 0, 1, min(most, problem.batch), 1)
        return
    reach = window_columns(problem, 1)
    for steps in range(1, MOST_PRODUCTS + 1):
        for group in range(1, min(8, (16 * steps - reach) // stride + 1) + 1):
            across = divided(width, group)
            strips = divided(across, most)
            groups = divided(across, strips)
            slots = min(most // groups, problem.batch) if strips == 1 else 1
            yield Grouping(group, group * stride, steps, problem.padding[1][0], strips, slots, groups)


def grouping_of(problem: DepthwiseProblem, tile: Tile) -> Grouping | None:
    """The one with the fewest products for an image. The copy engine doesn't fold banks."""

    def cost(one: Grouping) -> tuple[float, bool, int]:
        products = one.strips * one.steps / one.slots
        return products, one.folded, one.group

    found = (one for one in groupings(problem, tile) if not (tile.boxes and one.folded))
    return min(found, key=cost, default=None)


def most_registers(tile: Tile, blocks: int = 1) -> int:
    """That a thread can have: a multiprocessor gives them out to four warps at a time."""
    return min(255, 65536 // (blocks * up(tile.warps, 4) * 32) // 8 * 8)


def registers(problem: DepthwiseProblem, tile: Tile, steps: int, sm: int = 90) -> int:
    """That a thread takes: for matrices, sums and pixels; for what is done to sums; for the rest. ptxas keeps some sums
    twice where a step has several rows.

    No plan of those compiled for docs/variants/sparse_nhwc.md takes more.
    """
    epilogue = problem.epilogue
    sums = 4 * tile.pairs * live_rows(problem, tile) * tile.tiles
    kept = 4 * tile.pairs * steps * (problem.filter[0] + tile.tiles) + sums
    of_channel = problem.bias + epilogue.scale + epilogue.shift
    finishing = 2 * tile.pairs * of_channel + (24 if epilogue.residual else 0) + (8 if epilogue.activation else 0)
    if tile.whole:
        other = (50 if sm == 90 else 64) + max(0, sums - 64) // 4
    else:
        other = 38 if tile.rows == problem.stride[0] else 36 + problem.stride[0] * sums // 4
    return kept + finishing + other


def group_of(number: int, between: int) -> int:
    """The group that a column of products belongs to: `dwconv::SparseRows::group_of`."""
    return number // (2 * between) * 2 * between + number % 2 * between + number // 2 % between


def width_of(problem: DepthwiseProblem, tile: Tile, one: Grouping) -> int:
    """Pixels of shared memory from slot to slot such that groups that are read together are in different banks."""
    least, last = (one.groups - 1) * one.distance + 16 * one.steps, one.slots * one.groups - 1
    if tile.whole:
        least = up(problem.size[1], 4)

    def bank(pixel: int) -> int:  # of a pixel's octets; `dwconv::SparseRows::place`
        return (pixel ^ (pixel // 2 & 4) if one.folded else pixel) % 8

    def conflicts(width: int) -> int:
        numbers = [min(group_of(n, one.between), last) for n in range(8)]
        places = [n // one.groups * width + n % one.groups * one.distance for n in numbers]
        found = 0
        for pair in zip(places[::2], places[1::2], strict=True):
            banks = [bank(pixel) for pixel in {place + lane for place in pair for lane in range(4)}]
            found += max(map(banks.count, banks))
        return found

    # Boxes are swizzled by address: a row must begin where its first pixel's number is a multiple of eight.
    widths = [width for width in range(least, least + 8) if not tile.boxes or one.slots * width % 8 == 0]
    return with_fewest_conflicts(widths, conflicts, least=4)


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
    width = width_of(problem, tile, one)
    columns = min(problem.size[1] if tile.whole else window_columns(problem, one.groups * one.group), width)
    pitch = pitch_of(one.between)
    completed = out_h if tile.whole else tile.rows // stride[0]
    results = 2 * completed * 8 * tile.tiles * pitch * tile.channels
    words = 2 * tile.pairs * problem.filter[0]  # `dwconv::SparseBand::kEntry`, `kWords`
    filters = up((window_columns(problem, 1) + 2) * (words + (2 if words % 4 == 0 else 0)), 4)
    table = up(max(2 * results, 4 * tile.warps * filters), 32) + GATE_BYTES * tile.boxes
    row_bytes = 2 * one.slots * width * tile.x_channels
    stages = tile.stages * tile.rows * row_bytes
    shared_bytes = stages + table + 32 * MOST_STEPS
    taken, together = registers(problem, tile, one.steps, device.sm), 1
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
        pitch=pitch,
    )


def steps_of(problem: DepthwiseProblem, tile: Tile, part_rows: int, rows: int | None = None) -> int:
    """Steps of a block that makes so many output rows, at most; `rows`: of all images, one below the other."""
    if tile.whole:
        return part_rows // problem.out_size[0]
    height, stride, taps = problem.out_size[0], problem.stride[0], problem.filter[0]

    def of_unit(rows: int, above: int) -> int:
        return ((rows - 1) * stride + taps - 1) // tile.rows + 1 - above // tile.rows

    whole, rest = divmod(part_rows, height)
    steps = whole * of_unit(height, problem.padding[0][0])
    # A block may begin within an image, and end within the next one.
    if part_rows % height and part_rows > 1 and rows != height:
        steps += divided(taps - 1, tile.rows) + (rest > 0)
    return steps + (of_unit(rest, 0) if rest else 0)


def read_again(problem: DepthwiseProblem, part_rows: int) -> float:
    """Input rows that blocks of so many output rows read a second time, over all rows; none at the ends of images."""
    if part_rows % problem.out_size[0] == 0:
        return 0
    return max(problem.filter[0] - problem.stride[0], 0) / (part_rows * problem.stride[0])


def share_of(problem: DepthwiseProblem, places: int, tile: Tile, columns: int, rows: int) -> int:
    """Output rows of a block, of `rows` in each of so many columns of blocks: those that take the fewest steps."""

    def cost(part_rows: int) -> tuple[bool, float, int]:
        waves = divided(columns * divided(rows, part_rows), places)
        steps = steps_of(problem, tile, part_rows, rows)
        slower = 1 + 0.1 * read_again(problem, part_rows)
        return steps + tile.stages + 1 > MOST_STEPS, waves * (steps + 6) * slower, -part_rows

    most = max(1, divided(3 * places, columns))
    shares = {max(1, divided(rows, parts)) for parts in range(1, min(most, max(1, rows)) + 1)}
    longest = max((MOST_STEPS - tile.stages - 2) * tile.rows // problem.stride[0] - problem.filter[0], 1)
    shares |= {min(rows, longest), *(min(rows, problem.out_size[0] * k) for k in (1, 2, 3, 4))}
    if tile.whole:
        shares = {up(share, problem.out_size[0]) for share in shares}
    return min(shares, key=cost)
