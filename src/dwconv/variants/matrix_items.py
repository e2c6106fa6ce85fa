"""Items of the matrix variants: which outputs a block makes, and where their input lies in shared memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..device import DeviceSpec
from ..plan import fast_divisor
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .banks import with_fewest_conflicts
from .strips import divided, short_divisor, up, window_columns, window_rows

MAX_BANDS = 16  # filter rows times products in a row: pairs of registers that hold the filter
MOST_WARPS = 4  # of a block that works on one image at a time, else twice as many
UNITS = (4, 8, 16)  # that a thread may fetch or store of an item


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A warp makes `tiles` products of 16 groups, each eight outputs wide and `rows` high.

    Attributes:
        stage: whether results leave through shared memory where they are one stretch.
    """

    rows: int = 7
    tiles: int = 1
    stage: bool = True

    def __str__(self) -> str:
        groups = f"{self.tiles} × 16 groups" if self.tiles > 1 else "16 groups"
        staged = "" if self.stage else ", stored directly"
        return f"{self.rows} rows × 8 columns × {groups} a warp{staged}"


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a problem is cut into items, and how an item lies in shared memory.

    Attributes:
        column_items, row_items, channel_items: how many there are, side by side, below one another, behind.
        image_groups: how many groups of images there are.
        groups, bands: of an item's plane: groups side by side, bands of rows below one another.
        images, channels: of an item; channels of x.
        warps: of a channel of y.
        lines: input rows of an item in shared memory.
        pitch, plane_pitch: elements of shared memory from row to row, from plane to plane.
    """

    column_items: int
    row_items: int
    channel_items: int
    image_groups: int
    groups: int
    bands: int
    images: int
    channels: int
    warps: int
    lines: int
    pitch: int
    plane_pitch: int

    @property
    def items(self) -> int:
        return self.column_items * self.row_items * self.channel_items * self.image_groups

    def block_warps(self, problem: DepthwiseProblem) -> int:
        return self.channels * problem.multiplier * self.warps


def steps(problem: DepthwiseProblem, lead: int) -> int:
    """Products of 16 columns that a filter row takes where `lead` columns stand in front of the input."""
    shift = lead - problem.padding[1][0]
    return divided(shift + window_columns(problem, 8), 16)


def filter_pitch(problem: DepthwiseProblem, lead: int) -> int:
    """Elements of a filter row in shared memory, with zeros around; `dwconv::Band::kPitch`."""
    return up(16 * steps(problem, lead) + 7 * problem.stride[1], 8)


def lead_of(problem: DepthwiseProblem, granules: tuple[int, ...]) -> tuple[int, int]:
    """Columns in front of the input and the granule that they are a multiple of: the widest one that costs no
    product.
    """
    before = problem.padding[1][0]
    least = steps(problem, up(before, granules[-1]))
    granule = next(g for g in granules if steps(problem, up(before, g)) == least)
    return up(before, granule), granule


def geometries(problem: DepthwiseProblem, tile: Tile, lead: int) -> Iterator[Geometry]:
    """The ways to cut a problem into items of up to eight warps."""
    out_h, out_w = problem.out_size
    per_warp = 16 * tile.tiles
    across = divided(out_w, 8)
    column_items = divided(across, MOST_WARPS * per_warp)
    groups = divided(across, column_items)
    all_bands = divided(out_h, tile.rows)
    for row_items in range(1, all_bands + 1):
        bands = divided(all_bands, row_items)
        if divided(all_bands, bands) != row_items:
            continue
        whole = row_items == column_items == 1
        slots = bands * groups
        if slots > per_warp * MOST_WARPS:
            continue
        for images in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64) if whole else (1,):
            warps = divided(images * slots, per_warp)
            if images > max(1, problem.batch) or warps > MOST_WARPS or (images > 4 and warps > 1):
                continue
            lines, pitch, plane_pitch = place(problem, tile, lead, (column_items, row_items), groups, bands, images)
            for channels in (1, 2, 3, 4, 6, 8) if whole else (1,):
                if channels > 1 and channels * warps * problem.multiplier > MOST_WARPS * (2 if images > 1 else 1):
                    continue
                if channels > problem.channels or problem.multiplier * warps > 32:
                    continue
                yield Geometry(
                    column_items=column_items,
                    row_items=row_items,
                    channel_items=divided(max(1, problem.channels), channels),
                    image_groups=divided(max(1, problem.batch), images),
                    groups=groups,
                    bands=bands,
                    images=images,
                    channels=channels,
                    warps=warps,
                    lines=lines,
                    pitch=pitch,
                    plane_pitch=plane_pitch,
                )
        if slots <= per_warp // 2:
            break  # shorter items would leave most of a product unused


def place(
    problem: DepthwiseProblem,
    tile: Tile,
    lead: int,
    items: tuple[int, int],
    groups: int,
    bands: int,
    images: int,
) -> tuple[int, int, int]:
    """An item's place in shared memory: rows of a plane, elements from row to row and from plane to plane.

    items: side by side, below one another.
    """
    column_items, row_items = items
    lines = window_rows(problem, bands * tile.rows)
    if row_items == 1:
        lines = max(lines, problem.padding[0][0] + problem.size[0])
    (left, _), width, out_w = problem.padding[1], problem.size[1], problem.out_size[1]
    if column_items == 1:  # the zeros between two rows belong to both
        right = (out_w - 1) * problem.stride[1] + (problem.filter[1] - 1) * problem.dilation[1] - left - (width - 1)
        least = width + max(left, right, 0)
    else:
        least = 8 * problem.stride[1] * (groups - 1) + 16 * steps(problem, lead)
    return lines, *spread(problem, tile, groups, bands, images, up(least, 8), lines)


def spread(
    problem: DepthwiseProblem, tile: Tile, groups: int, bands: int, images: int, least: int, lines: int
) -> tuple[int, int]:
    """Elements from row to row and from plane to plane, such that rows of A lie in different banks of shared memory.

    Eight of them, of 16 bytes each, are read at a time: those of neighbouring groups.
    """
    step, rows = tile.rows * problem.stride[0], images * bands * groups
    firsts = range(0, min(64, rows), 8)

    def conflicts(choice: tuple[int, int]) -> int:
        (pitch, plane), found = choice, 0
        for first in firsts:
            places = []
            for number in range(first, min(first + 8, rows)):
                above, column = divmod(number, groups)
                image, band = divmod(above, bands)
                places.append((image * plane + band * step * pitch + column * 8 * problem.stride[1]) // 8 % 8)
            found += max(map(places.count, places))
        return found

    pads = range(0, 64, 8)
    choices = [(least + p, lines * (least + p) + q) for p in pads[:3] for q in (pads if images > 1 else pads[:1])]
    choices.sort(key=lambda choice: choice[1])  # the smallest one of those with as few conflicts
    return with_fewest_conflicts(choices, conflicts, least=len(firsts))


def fetched_rows(problem: DepthwiseProblem, tile: Tile, geometry: Geometry) -> int:
    """Input rows of an item's plane."""
    if geometry.row_items == 1:
        return problem.size[0]
    return min(problem.size[0], window_rows(problem, geometry.bands * tile.rows))


def item_divisors(geometry: Geometry, image_groups: int) -> tuple[int, ...]:
    """The first fields of `dwconv::MatrixTiling`."""
    return (
        *fast_divisor(image_groups),
        *fast_divisor(geometry.column_items),
        *fast_divisor(geometry.row_items),
        *short_divisor(geometry.groups),
        *short_divisor(geometry.bands),
        *short_divisor(geometry.warps),
    )


def count_of(items: int, threads: int, counts: tuple[int, ...]) -> int | None:
    """What the kernel is compiled for, of `counts`, for so many items a thread; None if there are too many."""
    return next((count for count in counts if items <= count * threads), None)


def blocks_of_registers(problem: DepthwiseProblem, tile: Tile, lead: int, held: int, warps: int) -> int:
    """Blocks that the registers of a multiprocessor should hold: of 96 for each thread, 128, or all there are.

    held: registers for input in flight. The limits were read off ptxas' reports.
    """
    wanted = 4 * tile.tiles * tile.rows + 2 * problem.filter[0] * steps(problem, lead) + held
    return max(1, (5 if wanted <= 68 else 4 if wanted <= 84 else 2) * 4 // up(warps, 4))


def resident_blocks(device: DeviceSpec, threads: int, of_registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds, `of_registers` of them, as compiled for whole warps of 128 threads."""
    most = of_registers * up(threads, 128) // threads
    return max(1, min(most, device.shared_bytes // (shared + 1024), device.threads // threads, 32))


def shares(geometry: Geometry, slots: int) -> tuple[int, int, int]:
    """Blocks, the items of each, and the groups of images that they count by.

    Whole planes: one block for each of the device's slots, with equal shares. Where planes are cut into items,
    neighbouring blocks make neighbouring items of the same images at the same time, so that the rows they share come
    from L2: blocks begin at the same few images, and the last one of an item may make some images again.
    """
    groups = geometry.image_groups
    if geometry.row_items * geometry.column_items == 1:
        share = max(1, divided(geometry.items, slots))
        return divided(geometry.items, share), share, groups
    planes = geometry.items // groups

    def rounds(parts: int) -> float:
        waves = planes * parts / slots
        return (1.0 if waves <= 1 else waves + 0.5) * (divided(groups, parts) + 1.5)

    parts = min(range(1, min(groups, 64) + 1), key=rounds)
    share = divided(groups, parts)
    parts = divided(groups, share)
    return planes * parts, share, parts * share


def result_pitch(problem: DepthwiseProblem, tile: Tile, geometry: Geometry, least: int) -> int:
    """Elements of the results from image to image, such that neighbouring groups are put in different banks."""
    out_w = problem.out_size[1]

    def conflicts(pitch: int) -> int:
        words = []
        for number in range(8):
            above, column = divmod(number, geometry.groups)
            image, band = divmod(above, geometry.bands)
            first = image * pitch + band * tile.rows * out_w + column * 8
            words += [(first + 2 * pair) // 2 % 32 for pair in range(4)]
        return max(map(words.count, words))

    return with_fewest_conflicts(range(least, least + 64, 8), conflicts, least=1)


def item_seconds(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    tile: Tile,
    geometry: Geometry,
    lead: int,
    *,
    resident: int,
    blocks: int,
    share: int,
    warps: int,
    extra_instructions: float,
    extra_wavefronts: float,
) -> float:
    """Predicted time: a norm of DRAM and of what the blocks of a multiprocessor take for their shares: instruction
    issue, shared memory, tensor cores, latency.

    warps: whose work a block does, side by side or one after the other. extra_instructions, extra_wavefronts: of such a
    warp and item, for fetching and storing; wavefronts of shared memory. Constants were fitted to 189 measurements on
    an H200 (root mean square error 11 %).
    """
    of_row = steps(problem, lead)
    products = tile.tiles * tile.rows * problem.filter[0] * of_row
    matrices = tile.tiles * window_rows(problem, tile.rows) * of_row
    # of one image they hide behind other warps' products
    instructions = 63 + products + 2 * matrices + (1.2 if geometry.images > 1 else 0.3) * extra_instructions
    setup = 900 + 8 * problem.filter[0] * of_row
    wavefronts = (5 if problem.stride[1] == 1 else 9) * matrices + extra_wavefronts
    # warps of a multiprocessor; a few more cost nothing
    together = min(resident * warps, up(warps * divided(blocks, device.multiprocessors), 4))
    clocks, latency = together / device.clock, 1e-9 * device.latency_ns
    hidden = 1 + 2 / together + warps / 200  # few warps hide little; those of a block wait for one another
    times = (clocks * instructions * hidden / 1.5, clocks * wavefronts, clocks * products, 1.4 * latency)
    halo = fetched_rows(problem, tile, geometry) * geometry.row_items / problem.size[0] if problem.size[0] else 1.0
    in_bytes = problem.batch * problem.channels * math.prod(problem.size) * problem.element_bytes
    plane = math.prod(problem.size) * problem.element_bytes
    ends = 16 / max(16, geometry.channels * plane)  # sectors that two items share
    dram = (problem.least_bytes * (1 + ends) + 0.2 * max(0.0, halo - 1) * in_bytes) / (device.dram_gbs * 1e9)
    waves = blocks / (resident * device.multiprocessors)
    waves = 1.0 if waves <= 1 else waves + 1
    setups = max(1.0, share / geometry.image_groups)
    block_seconds = share * math.pow(sum(t**4 for t in times), 1 / 4)
    block_seconds += 0.1 * setups * (latency + clocks * setup / 1.5)
    return 1.95 * LAUNCH_SECONDS + 1.03 * math.pow(dram**2.7 + (waves * block_seconds) ** 2.7, 1 / 2.7)
