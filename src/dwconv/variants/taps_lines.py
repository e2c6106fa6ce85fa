"""What variants share whose kernels march over lines of outputs as matrices: tiles, plans, a cost model."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .base import GRID_X_LIMIT, Variant
from .parts import gathered
from .strips import divided, planar, too_deep, too_long, up
from .taps_nhwc_cost import l1_bytes
from .taps_nhwc_tiles import Axis, axes, reached

MOST_TILES = 12  # that are worth timing, by predicted time
MOST_PIECES = 32  # that a thread copies of a row: a bit says of each whether it exists
FIRST_ARCHITECTURE = 80  # with m16n8k16

# Constants of the cost model, in clocks and instructions of a warp; estimates.
PIECE, STEP, SEGMENT = 5.0, 40.0, 250.0
IDLE_WARPS = 5.0  # issue slots are used as warps / (warps + IDLE_WARPS)
PRODUCT = 4.2  # clocks of a multiprocessor for a product of matrices
L2_BYTES = 40.0  # of a clock, to a multiprocessor
LATE = 1.6  # latencies of DRAM that bytes in flight must last for
THRASH = 0.3  # more DRAM time for each doubling of the lines in flight beyond L1
PAST_NARROW = 0.14  # of copies past L1, for each halving of pieces of 128 bytes
START, PARTS, ROUND = 2.6e-6, 3.2e-6, 0.57e-6


@dataclass(frozen=True, slots=True)
class Tile:
    """What is compiled in.

    Attributes:
        turned: the march goes along the rows of the image, else down its columns.
        taps: of a block, along the march and across.
        groups: of eight neighbouring outputs, of a line.
        lines: of a step.
        own: channels of a warp.
        warps: of a block.
        stages: of shared memory; all but one are being filled.
        min_blocks: blocks that a multiprocessor shall hold, which limits a thread's registers.
        cached: copies go through L1.
    """

    turned: bool
    taps: tuple[int, int]
    groups: int
    lines: int
    own: int
    warps: int = 8
    stages: int = 4
    min_blocks: int = 1
    cached: bool = True

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.own * self.warps

    def __str__(self) -> str:
        ways = f"{', along rows' if self.turned else ''}{'' if self.cached else ', past L1'}"
        return (
            f"{self.taps[0]}×{self.taps[1]} taps, {self.lines} lines of {self.groups}·8 outputs, {self.warps} warps of "
            f"{self.own} channels, {self.stages} stages{ways}"
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tile's rows lie in shared memory; the kernels compute the same.

    Attributes:
        lead: positions before a window that make copies aligned.
        width: of the image, where it is one line wide, else 0.
        x_bytes, g_bytes: of a copy; x_pieces, g_pieces: that a thread copies of a row.
        stage_bytes, gate_bytes: of a block, for each stage; flying_bytes: of them that are copied.
        together_bytes: that stand together in memory.
        row_bytes: of a row of taps at the end, of a warp.
        products: of matrices, for a row of taps and all channels of a warp.
        loads: instructions of a warp for the fragments of a row of x, and of one of g.
        registers: of a thread for sums, rows of g and fragments.
    """

    lead: int
    width: int
    x_bytes: int
    g_bytes: int
    x_pieces: int
    g_pieces: int
    stage_bytes: int
    gate_bytes: int
    flying_bytes: int
    together_bytes: float
    row_bytes: int
    products: int
    loads: tuple[float, float]
    registers: int


@dataclass(frozen=True, slots=True)
class Cut:
    """What a tile means for a problem.

    Attributes:
        layout: of its rows in shared memory.
        live: rows of g that a row of x may meet; rows: of x, in a step.
        column_tiles: of one class of columns.
        shared_bytes: of a block; slab: rows of taps of a warp that are in shared memory at the end.
        count: sums of a block, as whole vectors.
        groups: of channels; tap_tiles: tiles of taps.
        lines, super_lines: of one class of rows; line_rows: positions of a super-line.
        positions: of all super-lines.
        resident: blocks that a multiprocessor holds.
        parts, part_rows: blocks of a group and tile of taps; positions of each.
    """

    layout: Layout
    live: int
    rows: int
    column_tiles: int
    shared_bytes: int
    slab: int
    count: int
    groups: int
    tap_tiles: int
    lines: int
    super_lines: int
    line_rows: int
    positions: int
    resident: int
    parts: int
    part_rows: int


def across_axis(problem: DepthwiseProblem, turned: bool) -> Axis:
    """The axis across the march; channels first its columns stay together, and taps lie apart."""
    across = axes(problem, turned)[1]
    if problem.layout == "channels_last":
        return across
    return replace(across, apart=1, classes=1, stride=problem.stride[1])


def narrow(problem: DepthwiseProblem, tile: Tile, first: int, line_chunks: int) -> bool:
    """Whether images are one line wide, so that only positions that exist need be copied; `first` is the first one."""
    across = across_axis(problem, tile.turned)
    one_line = across.classes == 1 and across.apart == 1 and across.out <= 8 * tile.groups
    return one_line and tile.taps[1] == across.filter and first < 8 * line_chunks


def line_shapes(width: int, most: int) -> Iterator[tuple[int, int]]:
    """Groups of eight outputs of a line, and lines, that make up most of `most` groups.

    >>> list(line_shapes(56, 16)), list(line_shapes(14, 16)), list(line_shapes(300, 16))
    ([(7, 2)], [(2, 8)], [(16, 1), (10, 1), (13, 1)])
    """
    eights = divided(width, 8)
    if eights <= most:
        yield eights, most // eights
        return
    found = []
    for groups in range(5, most + 1):
        lines = most // groups
        used = eights / (groups * divided(eights, groups)) * groups * lines / most
        found.append((-used, -groups, lines))
    for _, groups, lines in sorted(found)[:3]:
        yield -groups, lines


def tap_rows(taps: int, most: int) -> list[int]:
    """Rows of taps of a tile: as many as fit, and fewer that leave no more out.

    >>> tap_rows(7, 7), tap_rows(31, 8)
    ([7], [8, 7])
    """
    tiles = divided(taps, most)
    return [divided(taps, tiles)] + ([divided(taps, tiles + 1)] if tiles > 1 else [])


class LinesVariant(Variant):
    """A variant whose kernel marches over lines. Its own are the layout of shared memory, and the tiles."""

    directions = ("grad_weight",)
    dims = (2, 3)
    dtypes = ("float16", "bfloat16")

    @abstractmethod
    def layout(self, problem: DepthwiseProblem, tile: Tile) -> Layout | str:
        """How a tile's rows of a planar problem lie in shared memory, or why it can't take it."""

    @abstractmethod
    def tiles(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Tile]:
        """Tiles in question, of a planar problem; which of them are worth timing, the predicted time says."""

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        planes, depth_taps = planar(problem), problem.filter[0] if problem.dims == 3 else 1
        timed: dict[Tile, tuple[float, Tile]] = {}  # of tiles that differ in their stages only, the best one
        illegal: list[Tile] = []
        for tile in dict.fromkeys(self.tiles(planes, device)):
            one = self.cut(planes, device, tile, depth_taps)
            if isinstance(one, str):
                illegal.append(tile)
                continue
            found = seconds(planes, device, tile, one)
            if found < timed.get(replace(tile, stages=0), (math.inf, tile))[0]:
                timed[replace(tile, stages=0)] = (found, tile)
        best = sorted(timed.values(), key=lambda pair: pair[0])[:MOST_TILES]
        yield from (self.plan(problem, device, tile) for _, tile in best)
        yield from (self.plan(problem, device, tile) for tile in illegal)
        if not timed and not illegal:
            yield Rejection(self.stem, "", f"no tile makes whole channels of a multiplier of {problem.multiplier}")

    def cut(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, depth_taps: int = 1) -> Cut | str:
        """How a tile divides a planar problem, or why it can't. depth_taps: of volumes, whose planes are images."""
        layout = self.layout(problem, tile)
        if isinstance(layout, str):
            return layout
        if max(layout.x_pieces, layout.g_pieces) > MOST_PIECES:
            return f"a thread would copy {layout.x_pieces} pieces of each row of x and {layout.g_pieces} of g"
        along, across = axes(problem, tile.turned)[0], across_axis(problem, tile.turned)
        live, rows = divided(tile.taps[0], along.stride), min(along.stride, tile.taps[0])
        threads, limit = 32 * tile.warps, device.shared_bytes - 1024
        in_stages, tap_row = tile.stages * layout.stage_bytes, layout.row_bytes * tile.warps
        slab = max(1, min(tile.taps[0], in_stages // tap_row))
        shared_bytes = up(max(in_stages, slab * tap_row, 16 * threads + 16), 16) + tile.stages * layout.gate_bytes
        if shared_bytes > limit:
            return f"its rows take {shared_bytes} bytes of shared memory, more than {limit}"
        column_tiles = divided(divided(across.out, across.classes), 8 * tile.groups)
        lines = problem.batch * across.classes * column_tiles
        super_lines = divided(max(1, lines), tile.lines)
        line_rows = divided(along.out, along.classes)
        positions = along.classes * super_lines * line_rows
        groups = divided(problem.out_channels, tile.channels)
        tap_tiles = depth_taps * divided(along.filter, tile.taps[0]) * divided(across.filter, tile.taps[1])
        resident = max(1, min(tile.min_blocks, device.shared_bytes // (shared_bytes + 1024), device.threads // threads))
        per_group = max(1, device.multiprocessors * resident // (groups * tap_tiles))
        # At least a few rows: the first ones of a part are read twice.
        part_rows = max(divided(positions, per_group), min(positions, line_rows, max(2, live)))
        if part_rows > line_rows:  # whole super-lines where that costs little
            whole = up(part_rows, line_rows)
            part_rows = whole if whole <= 1.1 * part_rows else part_rows
        return Cut(
            layout=layout,
            live=live,
            rows=rows,
            column_tiles=column_tiles,
            shared_bytes=shared_bytes,
            slab=slab,
            count=up((tile.taps[0] * tile.taps[1] + problem.bias) * tile.channels, 4),
            groups=groups,
            tap_tiles=tap_tiles,
            lines=lines,
            super_lines=super_lines,
            line_rows=line_rows,
            positions=positions,
            resident=resident,
            parts=divided(positions, part_rows),
            part_rows=part_rows,
        )

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        planes = planar(problem)
        depth_taps, depths = (problem.filter[0], problem.out_size[0]) if problem.dims == 3 else (1, 1)
        if device.sm < FIRST_ARCHITECTURE:
            return rejected(f"tensor cores of {device.arch} have no such product")
        if reason := too_deep(problem) or too_long(planes):
            return rejected(reason)
        if max(planes.size) + max(map(max, planes.padding)) >= 2**29 or max(planes.stride + planes.dilation) >= 2**12:
            return rejected("rows and taps are too far apart for 32-bit numbers")
        if max(spans(problem, tile)) >= 2**31:
            return rejected(f"{tile.lines} lines span more than 2**31 elements")
        one = self.cut(planes, device, tile, depth_taps)
        if isinstance(one, str):
            return rejected(one)
        blocks = one.groups * one.tap_tiles * one.parts
        if blocks > GRID_X_LIMIT or max(one.positions, one.lines, blocks) + one.part_rows >= 2**31:
            return rejected("there are too many rows to number them in 31 bits")
        of_gatherer, _ = gathered(one.count // 4, 32 * tile.warps, one.parts)
        gatherers = divided(one.parts, of_gatherer)
        divisors = one.tap_tiles, one.groups, one.line_rows, one.super_lines, one.column_tiles, depths
        constants = problem_constants(problem) | {
            "TURNED": int(tile.turned),
            "TAPS_A": tile.taps[0],
            "TAPS_B": tile.taps[1],
            "GROUPS": tile.groups,
            "LINES": tile.lines,
            "OWN": tile.own,
            "WARPS": tile.warps,
            "MIN_BLOCKS": tile.min_blocks,
            "STAGES": tile.stages,
            "G_BYTES": one.layout.g_bytes,
            "X_BYTES": one.layout.x_bytes,
            "CACHED": int(tile.cached),
            "WIDTH": one.layout.width,
            "OUT_WIDTH": planes.out_size[0 if tile.turned else 1] if one.layout.width else 0,
            "SLAB": one.slab,
            "REPAIR": 1,
            "VOLUME": int(problem.dims == 3),
        }
        if problem.layout == "channels_first":
            constants["LEAD"] = one.layout.lead
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
                planes.batch,
                one.lines,
                one.parts,
                one.part_rows,
                one.positions,
                of_gatherer,
                *(field for divisor in divisors for field in fast_divisor(divisor)),
            ),
            tile=f"{tile}, {one.parts} parts of {one.part_rows} rows",
            predicted_seconds=seconds(planes, device, tile, one),
            partial_bytes=blocks * one.count * 4 if one.parts > 1 else 0,
            arrivals=one.groups * one.tap_tiles * (1 if gatherers == 1 else gatherers + 1) if one.parts > 1 else 0,
        )


def spans(problem: DepthwiseProblem, tile: Tile) -> tuple[int, int]:
    """How far the elements of a step lie apart in x, and in g, at most."""
    image, channel, *steps = problem.plane_strides
    in_x = sum(abs(step) * size for step, size in zip(steps, problem.size, strict=True))
    plane = math.prod(problem.out_size)
    in_g = plane * (problem.out_channels if problem.layout == "channels_last" else tile.channels)
    images = min(tile.lines, problem.batch)
    of_x = (images - 1) * abs(image) + in_x + abs(channel) * tile.channels
    return of_x, (images - 1) * plane * problem.out_channels + in_g


def with_residents(
    device: DeviceSpec, shape: Tile, registers: int, stage_bytes: int, most_stages: int
) -> Iterator[Tile]:
    """The tile with numbers of blocks of a multiprocessor, each with as many stages as fit beside each other."""
    # A block has registers for a multiple of four warps.
    most = min(device.registers // (32 * up(shape.warps, 4) * up(registers, 8)), device.threads // (32 * shape.warps))
    if registers > 248 or most == 0:
        return
    for blocks in sorted({most, max(1, most // 2)}):
        stages = min(most_stages, (device.shared_bytes // blocks - 1024) // stage_bytes)
        for fewer in sorted({stages, 4, 3} if stages >= 4 else {stages, 2}):
            if 2 <= fewer <= stages:
                yield replace(shape, stages=fewer, min_blocks=blocks)


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: tensor cores, instructions, L2 and DRAM beside each other, then the last blocks' additions."""
    along, layout = axes(problem, tile.turned)[0], one.layout
    met = reached(along) if along.filter == tile.taps[0] else min(1.0, 1.1 * reached(along))
    products = layout.products * tile.taps[0] * met
    step = products * 1.5 + one.rows * layout.loads[0] + layout.loads[1] + STEP
    step += PIECE * (one.rows * layout.x_pieces + layout.g_pieces)
    segments = max(1.0, one.part_rows / one.line_rows)
    steps = one.part_rows + segments * (one.live - 1) * 0.5
    of_multiprocessor = divided(one.groups * one.tap_tiles * one.parts, device.multiprocessors)
    waves = divided(of_multiprocessor, one.resident)
    at_once = min(one.resident, of_multiprocessor)
    warps = at_once * tile.warps
    issue = (steps * step + segments * SEGMENT) * waves * (warps + IDLE_WARPS) / 4 / device.clock
    tensor = steps * products * tile.warps * PRODUCT * of_multiprocessor / device.clock
    l2 = problem.least_bytes * one.tap_tiles / (L2_BYTES * device.multiprocessors * device.clock)
    dram = problem.least_bytes / (device.dram_gbs * 1e9)
    flying = at_once * (tile.stages - 1) * layout.flying_bytes
    together = layout.together_bytes  # of neighbouring bytes
    if tile.cached:
        dram *= 1.0 + 0.08 * math.log2(128 / min(128, together))
        lines = flying * 128 / min(128, together)
        dram *= 1.0 + THRASH * max(0.0, math.log2(lines / l1_bytes(device, one.resident, one.shared_bytes)))
    else:
        dram *= 1.0 + PAST_NARROW * math.log2(128 / min(128, together))
    dram *= max(1.0, LATE * device.dram_gbs * device.latency_ns / (device.multiprocessors * max(1, flying)))
    body = float((dram**3 + issue**3 + tensor**3 + l2**3) ** (1 / 3))
    last = PARTS + ROUND * gathered(one.count // 4, 32 * tile.warps, one.parts)[1] if one.parts > 1 else 0.0
    return LAUNCH_SECONDS + START + body + last
