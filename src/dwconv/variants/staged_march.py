"""The marches of staged_nchw, warp by warp: rows of float32 through a ring in shared memory, or whole small planes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem, dense_strides
from ..roofline import LAUNCH_SECONDS
from .banks import with_fewest_conflicts
from .base import GRID_X_LIMIT
from .strips import divided, short_divisor, too_long, up

FEW_TAPS = 25  # that direct_nchw holds in registers
MOST_TAPS = 49  # in registers beside the sums
NARROW = 16  # columns up to which lanes own whole rows, or halves
MOST_CONFLICTS = 4  # lanes that read the same bank
COLUMNS = 7  # of a lane that streams rows: 7, 14, 28, 56, ... are multiples, and odd steps meet no bank conflicts
MOST_ELEMENTS = 2**31 // 32  # of a plane: a warp's planes are numbered in 31 bits

# The constants and the fields of the tiling that only marches have, where there is none.
NO_MARCH = {"MARCH": 0, "STAGES": 2, "EVEN": 0, "WHOLE": 0, "WHOLE_LANES": 1, "IN_PLACE": 0, "AHEAD": 0}
NO_MARCH_TILING = (*fast_divisor(1), *(0,) * 11)


@dataclass(frozen=True, slots=True)
class March:
    """The free choices.

    Attributes:
        whole: whether a warp has whole planes in shared memory, else a ring of their rows.
        rows: that the loop takes at a time.
        threads: of a block.
        min_blocks: blocks that a multiprocessor must hold, which limits a thread's registers.
        stages: pairs of rows in the ring.
        strips: parts that the rows of a plane are cut into.
        ahead: whether a warp makes several items, and fetches the next one's whole planes while it sums one's.
    """

    whole: bool
    rows: int = 2
    threads: int = 128
    min_blocks: int = 3
    stages: int = 3
    strips: int = 1
    ahead: bool = False

    def __str__(self) -> str:
        how = "whole planes" if self.whole else f"{2 * self.stages} rows in shared memory"
        how += ", two items of them" if self.ahead else ""
        cut = f", {self.strips} strips of rows" if self.strips > 1 else ""
        return f"march of a warp, {how}{cut}, {self.rows} rows at a time, {self.threads} threads"


@dataclass(frozen=True, slots=True)
class MarchGeometry:
    """How a problem is cut into items, one for a warp, and what a warp has in shared memory.

    Attributes:
        planes: of an item, all of one image.
        lanes: of a plane.
        columns: of a lane.
        row_items, column_items: items of a plane.
        item_rows, item_columns: outputs of an item in a plane.
        granule, store: elements that are copied, stored at once.
        even: whether all tiles are whole, and a lane copies and stores pieces of four planes.
        plane_pitch: elements from one plane's row to the next plane's.
        out_pitch: elements from plane to plane in the buffer of outputs.
        ring, buffer: elements of shared memory for input, and for filters or outputs.
    """

    planes: int
    lanes: int
    columns: int
    ring: int
    buffer: int
    row_items: int = 1
    column_items: int = 1
    item_rows: int = 0
    item_columns: int = 0
    granule: int = 1
    store: int = 1
    even: bool = False
    plane_pitch: int = 0
    out_pitch: int = 0
    copy_lanes: int = 1
    store_lanes: int = 1


def unmarched(problem: DepthwiseProblem) -> str | None:
    """Why no march takes the problem."""
    if problem.element_bytes > 4 or (problem.element_bytes == 2 and problem.epilogue.residual):
        return f"takes float32, or 16 bits without a residual, whose results are rounded once, not {problem.dtype}"
    if problem.element_bytes == 2 and takes_whole(problem):
        return "streams rows of float32: copies move 4 bytes or more"
    if problem.dilation != (1, 1) or problem.multiplier != 1:
        return "takes neighbouring taps, and one output of each input"
    if problem.taps > MOST_TAPS:
        return f"holds all taps in registers; {problem.taps} are more than {MOST_TAPS}"
    if any(max(around) >= taps for around, taps in zip(problem.padding, problem.filter, strict=True)):
        return "padding as large as the filter makes outputs that see no input"
    if problem.plane_strides != dense_strides(problem.x_shape, "channels_first"):
        return "planes must be neighbours in memory"
    if max(math.prod(problem.size), math.prod(problem.out_size)) >= MOST_ELEMENTS:
        return "planes of a warp can't be numbered in 31 bits"
    return too_long(problem)


def takes_whole(problem: DepthwiseProblem) -> str | None:
    """Why lanes can't own a plane's rows, or halves of them."""
    (height, width), (_, out_w), (left, right) = problem.size, problem.out_size, problem.padding[1]
    if width > NARROW:
        return f"lanes own rows of up to {NARROW} columns, not of {width}"
    if max(problem.stride) > 2:
        return "lanes own rows with strides of 1 or 2"
    if out_w > NARROW // 2 and not (
        problem.size == problem.out_size and problem.stride == (1, 1) and width % 2 == 0 and left == right
    ):
        return f"rows of more than {NARROW // 2} outputs are halved, and halves must mirror each other"
    if (met := math.gcd(height * width, 32)) > MOST_CONFLICTS:
        return f"planes of {height * width} elements would have {met} lanes read the same bank"
    return None


def whole_geometry(problem: DepthwiseProblem) -> MarchGeometry:
    lanes = 2 if problem.out_size[1] > NARROW // 2 else 1
    planes = 32 // lanes
    out = 0 if problem.size == problem.out_size else math.prod(problem.out_size)
    return MarchGeometry(
        planes=planes,
        lanes=lanes,
        columns=problem.out_size[1] // lanes,
        ring=up(planes * math.prod(problem.size), 16 // problem.element_bytes),
        buffer=up(planes * max(out, problem.taps), 16 // problem.element_bytes),
    )


def conflicts(planes: int, lanes: int, pitch: int) -> int:
    """The most lanes of a warp that read the same bank."""
    return max(Counter((p * pitch + c * COLUMNS) % 32 for p in range(planes) for c in range(lanes)).values())


def ring_geometry(problem: DepthwiseProblem, march: March) -> MarchGeometry:
    """Twin of optimize/host/staged_nchw.cuh."""
    (_, width), (out_h, out_w) = problem.size, problem.out_size
    taps_w, left = problem.filter[1], problem.padding[1][0]
    aligned = problem.aligned >= 16
    granule = 4 if aligned and width % 4 == 0 and out_w % 4 == 0 else 1
    store = granule
    lead = up(left, granule)
    column_tiles = divided(out_w, COLUMNS)
    column_items = divided(column_tiles, 32)
    item_columns = out_w if column_items == 1 else up(divided(column_tiles, column_items) * COLUMNS, 4)
    if divided(item_columns, COLUMNS) > 32:
        item_columns -= 4
    column_items = divided(out_w, item_columns)
    lanes = divided(item_columns, COLUMNS)
    planes = 32 // lanes
    item_rows = up(divided(out_h, march.strips), 2)
    staged = min(width, item_columns + taps_w - 1 + granule)
    even = (
        granule == 4
        and lanes * planes == 32
        and lanes * COLUMNS == out_w
        and problem.channels % planes == 0
        and 2 * width <= 4 * 32
        and planes == 4 * (32 // (width // 2)) == 4 * (32 // (out_w // 2))
    )
    copy_lanes = width // 2 if even else min(32, divided(staged, granule))
    store_lanes = out_w // 2 if even else min(32, divided(item_columns, store))
    right = max(0, out_w - 1 - left + taps_w - width)
    least = up(max(lead + staged, staged + right), granule)
    pitches = range(least, least + 32, granule)
    plane_pitch = with_fewest_conflicts(pitches, lambda pitch: conflicts(planes, lanes, pitch), least=1)
    reach = lead - left + lanes * COLUMNS + taps_w - 1
    out_pitch = up(item_columns, 4) * (2 if even else 1)
    return MarchGeometry(
        planes=planes,
        lanes=lanes,
        columns=COLUMNS,
        ring=up(2 * march.stages * planes * plane_pitch + max(0, reach - plane_pitch), 4),
        buffer=up(planes * max(out_pitch, problem.taps), 4),
        row_items=divided(out_h, item_rows),
        column_items=column_items,
        item_rows=min(item_rows, out_h),
        item_columns=item_columns,
        granule=granule,
        store=store,
        even=even,
        plane_pitch=plane_pitch,
        out_pitch=out_pitch,
        copy_lanes=copy_lanes,
        store_lanes=store_lanes,
    )


def tile_of(problem: DepthwiseProblem, device: DeviceSpec) -> March:
    """The tile that measured best (docs/variants/staged_nchw.md)."""
    many = problem.taps > FEW_TAPS
    if takes_whole(problem) is not None:
        return March(False, threads=64, min_blocks=5 if many else 8)
    if problem.element_bytes == 2:
        return March(True, threads=32, min_blocks=20)
    if problem.stride[0] == 2:
        return March(True, threads=64, min_blocks=4)
    halves = problem.out_size[1] > NARROW // 2
    tile = March(True, 2 if many else 1, 64, min_blocks=6 if many else 8 if halves else 10)
    # Of 12 warps, or of 8 with more to sum, each can have two items in shared memory.
    for blocks in (6, 4) if many else (6,):
        ahead = replace(tile, threads=64, min_blocks=blocks, ahead=True)
        if problem.size == problem.out_size and fits(problem, device, ahead):
            return ahead
    return tile


def warp_elements(geometry: MarchGeometry, march: March) -> int:
    """Elements of shared memory that a warp has."""
    return geometry.ring * (2 if march.ahead else 1) + geometry.buffer


def fits(problem: DepthwiseProblem, device: DeviceSpec, march: March) -> bool:
    """Whether a multiprocessor's shared memory holds `min_blocks` blocks whose warps have whole planes."""
    elements = march.threads // 32 * warp_elements(whole_geometry(problem), march)
    return march.min_blocks * (elements * problem.element_bytes + 1024) <= device.shared_bytes


def march_of(stem: str, problem: DepthwiseProblem, device: DeviceSpec) -> Plan | Rejection:
    """The plan of the march of choice, or why there is none."""
    if reason := unmarched(problem):
        return Rejection(stem, "march of a warp", reason)
    tile = tile_of(problem, device)
    if not tile.whole and problem.taps <= FEW_TAPS:
        return Rejection(stem, str(tile), f"{FEW_TAPS} taps or fewer are as fast without a ring of rows")
    if problem.element_bytes == 2 and problem.stride != (2, 2):
        return Rejection(stem, str(tile), "16 bits with a stride of 1 are for tensor cores")
    if problem.element_bytes == 4 and problem.stride[0] == 2 and problem.taps <= 9:
        return Rejection(stem, str(tile), "9 taps or fewer, 2 rows apart, are as fast a tile a thread")
    if not tile.whole and problem.stride == (1, 1) and not ring_geometry(problem, tile).even:
        return Rejection(stem, str(tile), "rings of rows are for 28 or 56 columns, which a warp's lanes share evenly")
    return march_plan(stem, problem, device, tile)


def every_march(stem: str, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
    """The plans of all marches: for tests and for tuning."""
    if unmarched(problem) is None:
        tile = tile_of(problem, device)
        yield march_plan(stem, problem, device, tile)
        yield march_plan(stem, problem, device, March(False, stages=2, strips=2, threads=64, min_blocks=1))
        if tile.whole:
            yield march_plan(stem, problem, device, replace(tile, rows=3 - tile.rows, threads=32, min_blocks=1))


def march_plan(stem: str, problem: DepthwiseProblem, device: DeviceSpec, march: March) -> Plan | Rejection:
    """The plan of one tile, or why it is not legal."""

    def rejected(reason: str) -> Rejection:
        return Rejection(stem, str(march), reason)

    if reason := takes_whole(problem) if march.whole else None:
        return rejected(reason)
    if march.whole and problem.stride[0] > march.rows:
        return rejected("rows that are 2 apart come in pairs")
    if not march.whole and (problem.stride != (1, 1) or problem.element_bytes != 4):
        return rejected("rows of float32 are streamed, with strides of 1")
    if march.ahead and problem.size != problem.out_size:
        return rejected("outputs must take the input's place, or they would take that of the next item's filters")
    geometry = whole_geometry(problem) if march.whole else ring_geometry(problem, march)
    warps = march.threads // 32
    shared, limit = problem.element_bytes * warps * warp_elements(geometry, march), device.shared_bytes - 1024
    if shared > limit:
        return rejected(f"{warps} warps take {shared} bytes of shared memory; {limit} fit")
    groups = divided(problem.channels, geometry.planes)
    items = problem.batch * groups * geometry.row_items * geometry.column_items
    if items >= GRID_X_LIMIT or problem.batch * problem.channels >= 2**31:
        return rejected(f"{items} items can't be numbered in 31 bits")
    in_place = march.whole and problem.size == problem.out_size
    constants = problem_constants(problem) | {
        "THREADS": march.threads,
        "MIN_BLOCKS": march.min_blocks,
        "ROWS": march.rows,
        "COLUMNS": geometry.columns,
        "TAP_ROWS": problem.filter[0],
        "LOADS": 1,
        "GRANULE": geometry.granule,
        "STORE_VECTOR": geometry.store,
        "STRETCH": 0,
        "STAGE_OUTPUTS": 1,
        "SKIP_ROWS": 0,
        "SHARE_FILTERS": 1,
        "SHARED_BUDGET": limit,
        "SHARED_LIMIT": limit,
        "MARCH": int(not march.whole),
        "STAGES": march.stages,
        "EVEN": int(geometry.even),
        "WHOLE": problem.size[1] if march.whole else 0,
        "WHOLE_LANES": geometry.lanes if march.whole else 1,
        "IN_PLACE": int(in_place),
        "AHEAD": device.multiprocessors * march.min_blocks if march.ahead else 0,
    }
    blocks = divided(items, warps)
    if march.ahead:  # as many as are at work at a time
        blocks = min(blocks, device.multiprocessors * march.min_blocks)
    in_plane, out_plane = math.prod(problem.size), math.prod(problem.out_size)
    copied, stored = 32 // geometry.copy_lanes, 32 // geometry.store_lanes
    return Plan(
        problem=problem,
        device=device,
        variant=stem,
        constants=tuple(sorted(constants.items())),
        grid=(max(1, blocks), 1, 1),
        block=(march.threads, 1, 1),
        shared_bytes=shared,
        sizes=problem_sizes(problem),
        tiling=(
            *fast_divisor(geometry.row_items),
            *fast_divisor(geometry.column_items),
            *fast_divisor(problem.out_channels),
            *short_divisor(geometry.lanes),
            *short_divisor(1),
            *short_divisor(problem.size[1]),
            *short_divisor(1),
            geometry.planes,
            geometry.item_rows,
            geometry.item_columns,
            in_plane,
            out_plane,
            geometry.planes * geometry.plane_pitch,
            geometry.plane_pitch,
            *(0, 0, 0),
            *fast_divisor(groups),
            warp_elements(geometry, march),
            geometry.ring,
            geometry.out_pitch,
            *(geometry.copy_lanes, copied, copied * in_plane, copied * geometry.plane_pitch),
            *(geometry.store_lanes, stored, stored * out_plane, stored * geometry.out_pitch),
        ),
        tile=f"{march}, {geometry.planes} planes",
        predicted_seconds=march_seconds(problem, device, march, geometry, items),
    )


def march_seconds(
    problem: DepthwiseProblem, device: DeviceSpec, march: March, geometry: MarchGeometry, items: int
) -> float:
    """Predicted time: DRAM against the issue of all warps' instructions, or of one warp after the other.

    Of whole planes a warp loads, computes and stores in turns, which other warps' turns hide in part (a norm of 1.75),
    or its own next item (of 3); rows stream while others are computed (of 6). A multiprocessor issues 2.85 of 4 warp
    instructions a clock: register banks take a quarter of the slots, of which fewer warps leave more. Fitted to 13
    layers (H200, 2026-11).
    """
    products = problem.filter[0] / problem.stride[0] * geometry.columns * problem.filter[1]
    in_rows = problem.size[0]
    if march.whole:
        (_, width), left, stride = problem.size, problem.padding[1][0], problem.stride[1]
        columns = [o * stride + v - left for o in range(problem.out_size[1]) for v in range(problem.filter[1])]
        products = problem.filter[0] / problem.stride[0] * sum(0 <= c < width for c in columns) / geometry.lanes
        moved = geometry.planes * (math.prod(problem.size) + math.prod(problem.out_size)) / 128
        setup = 400 + 1.5 * problem.taps + 4 * moved
        row = 1.06 * products + (14 if march.rows == 2 else 20) + width / geometry.lanes + geometry.columns
    else:
        in_rows = min(in_rows, geometry.item_rows + problem.filter[0] - 1)
        setup = 1000 + 1.5 * problem.taps
        row = 1.06 * products + (45 if geometry.even else 60 + 2 * geometry.planes)
    instructions = setup + in_rows * row
    resident = march.min_blocks * march.threads // 32
    rounds = divided(items, device.multiprocessors * resident)
    issue = max(items * instructions / (2.85 * device.multiprocessors), rounds * instructions / 0.55) / device.clock
    dram = problem.least_bytes / (device.dram_gbs * 1e9)
    norm = 6.0 if not march.whole else 3.0 if march.ahead else 1.75
    together: float = (dram**norm + issue**norm) ** (1 / norm)
    return LAUNCH_SECONDS + 1.4e-9 * device.latency_ns + together
