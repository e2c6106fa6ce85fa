"""Tiles of taps_nhwc: what a lane, a warp and a block make, and how that divides a problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .march import March, axes, march
from .strips import divided, up

MOST_COPIES = 32  # of a lane and row: which pieces exist is a word of bits
NARROW = 28  # columns: the kernel is compiled for images up to this wide, and leaves products with padding out
LARGE = 9  # longer filters have tiles of taps
MOST_VALUES = 160  # registers of a lane for sums, rows of g and the window of x
MOST_DEPTH_VALUES = 180  # with several taps of the depth, which share the rest of the registers


@dataclass(frozen=True, slots=True)
class Tile:
    """What is compiled in.

    Attributes:
        turned: the march goes along the rows of the image, else down its columns.
        taps: of a lane, along the march and across.
        columns: neighbouring outputs across, of a lane.
        lanes: of a tile; a warp holds 32 // lanes tiles.
        vector: neighbouring channels of a lane.
        warps: of a block; a chunk of channels has warps // chunks of them.
        chunks: of channels of a block, lanes * vector each.
        stages: of shared memory of a warp; all but one are being filled.
        stage_steps: rows of g of a stage; more than one where an image is one column, or rows come as boxes.
        min_blocks: blocks that a multiprocessor shall hold, which limits a thread's registers.
        cached: copies go through L1.
        depth_taps: of a lane, of the depth: neighbouring ones, all of whose planes of x meet each row of g.
        boxes: rows come by one copy each, of the copy engine; else by the lanes' copies.
        waves: of blocks; more than one where tiles of taps meet unlike numbers of rows, and last unlike times.
    """

    turned: bool
    taps: tuple[int, int]
    columns: int
    lanes: int
    vector: int
    warps: int = 8
    chunks: int = 1
    stages: int = 4
    stage_steps: int = 1
    min_blocks: int = 1
    cached: bool = True
    depth_taps: int = 1
    waves: int = 1
    boxes: bool = False

    @property
    def flat(self) -> bool:
        """Whether an image is one column, and a stage several steps without a branch."""
        return self.stage_steps > 1 and not self.boxes

    def __str__(self) -> str:
        taps = "×".join(map(str, ((self.depth_taps,) if self.depth_taps > 1 else ()) + self.taps))
        waves = f", {self.waves} waves" if self.waves > 1 else ""
        return (
            f"{taps} taps, {self.columns} columns × {self.vector} channels a lane, {self.lanes} lanes, "
            f"{self.chunks} chunks, {self.warps} warps, {self.stages} stages of {self.stage_steps} steps{waves}"
            f"{', along rows' if self.turned else ''}{', boxes' if self.boxes else '' if self.cached else ', past L1'}"
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """What a tile means for a problem; the kernel's TapsNhwc computes the same.

    Attributes:
        live: rows of g that a row of x may meet; rows: of x, in a step.
        neighbours: whether the rows of x of all steps, one after the other, are neighbours in memory.
        kept: columns of x in shared memory; width: of the image, where it is compiled in, else 0.
        stage_bytes, shared_bytes: of a warp; of a block.
        values: sums of a lane; slab: of them that are in shared memory at a time.
        count: sums of a block, as whole vectors.
        resident: blocks that a multiprocessor holds.
        march: how blocks share the problem; its groups are of chunks.
    """

    live: int
    rows: int
    neighbours: bool
    kept: int
    width: int
    stage_bytes: int
    shared_bytes: int
    values: int
    slab: int
    count: int
    resident: int
    march: March


def piece_bytes(problem: DepthwiseProblem, tile: Tile) -> tuple[int, int] | None:
    """Bytes that one copy of g, and of x, moves; None where lanes' channels are no vectors."""
    image, _, row, column = problem.plane_strides
    size, channels = problem.element_bytes, tile.lanes * tile.vector
    in_x = (problem.channels, channels // problem.multiplier, row, column, *((image,) if problem.batch > 1 else ()))
    found = []
    for numbers in ((problem.out_channels, channels), in_x):
        most = 16
        while most > size and (problem.aligned % most or any(n * size % most for n in numbers)):
            most //= 2
        found.append(most)
    return None if min(found) < tile.vector * size else (found[0], found[1])


def lane_copies(problem: DepthwiseProblem, tile: Tile, pieces: tuple[int, int], one: Cut) -> int:
    """Pieces that a lane copies of a row of g, or of x: twin of `TapsNhwc::kGCopies` and `kXCopies`."""
    steps, channels = tile.stage_steps if tile.flat else 1, tile.lanes * tile.vector
    x_columns = steps * one.kept * (tile.depth_taps * one.rows if tile.flat else 1)
    found = []
    for columns, row, piece in (
        (steps * tile.columns, channels, pieces[0]),
        (x_columns, channels // problem.multiplier, pieces[1]),
    ):
        found.append(divided(columns, tile.lanes // (row * problem.element_bytes // piece)))
    return max(found)


def cut(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, depth_taps: int = 1) -> Cut | None:
    """How a tile divides the problem; None where it doesn't fit in shared memory.

    depth_taps: of volumes, whose planes are the problem's images once for each of them.
    """
    along, across = axes(problem, tile.turned)
    size, warp_tiles, channels = problem.element_bytes, 32 // tile.lanes, tile.lanes * tile.vector
    flat = tile.flat
    tap_tiles = divided(along.filter, tile.taps[0]) * divided(across.filter, tile.taps[1])
    tap_tiles *= divided(depth_taps, tile.depth_taps)
    live = divided(tile.taps[0], along.stride)
    rows = along.stride if flat else min(along.stride, tile.taps[0])
    window = (tile.columns - 1) * across.stride + tile.taps[1]
    one_line = divided(across.out, across.classes) <= tile.columns
    narrow = one_line and across.size <= NARROW and tile.taps[1] == across.filter and across.apart == 1
    narrow = narrow and across.padding < window and not flat
    kept = max(1, min(across.size, window - across.padding)) if narrow else window

    def region(columns: int, pitch: int) -> int:
        return up(columns * pitch * size, 128 if tile.boxes else 16)

    pitch = warp_tiles * channels
    stage_bytes = region(tile.stage_steps * tile.columns, pitch)
    stage_bytes += region(tile.stage_steps * tile.depth_taps * rows * kept, pitch // problem.multiplier)
    values = (tile.depth_taps * tile.taps[0] * tile.taps[1] + problem.bias) * tile.vector
    threads, of_sum = 32 * tile.warps, problem.sum_bytes
    gate_bytes = 8 * tile.warps * tile.stages if tile.boxes else 0
    limit = device.shared_bytes - 1024 - gate_bytes
    in_stages = max(tile.warps * tile.stages * stage_bytes, 16 * threads + 16)
    if in_stages > limit:
        return None
    # All sums at a time, if that costs no resident block.
    of_block = device.shared_bytes // (device.shared_bytes // (in_stages + gate_bytes + 1024))
    slab = max(1, min(values, (of_block - 1024 - gate_bytes) // (threads * of_sum)))
    shared_bytes = up(max(in_stages, slab * threads * of_sum), 16) + gate_bytes

    resident = max(1, min(tile.min_blocks, device.shared_bytes // (shared_bytes + 1024), device.threads // threads))
    return Cut(
        live=live,
        rows=rows,
        neighbours=along.apart == 1 and along.stride == rows,
        kept=kept,
        width=across.size if narrow else 0,
        stage_bytes=stage_bytes,
        shared_bytes=shared_bytes,
        values=values,
        slab=slab,
        count=up(values * tile.chunks * tile.lanes, 4),
        resident=resident,
        march=march(
            problem.batch,
            along,
            across,
            line_outputs=tile.columns,
            lines=tile.warps // tile.chunks * warp_tiles,
            groups=divided(divided(problem.out_channels, channels), tile.chunks),
            tap_tiles=tap_tiles,
            least_rows=max(2, live),
            slots=tile.waves * device.multiprocessors * resident,
            whole_lines=tile.waves > 1,
        ),
    )


def lane_registers(
    problem: DepthwiseProblem, turned: bool, taps: tuple[int, int], columns: int, vector: int, depth_taps: int = 1
) -> int:
    """32-bit registers of a lane for its sums, rows of g and the window of x."""
    along, across = axes(problem, turned)
    live = divided(taps[0], along.stride)
    window = min((columns - 1) * across.stride + taps[1], across.size if across.out <= columns else 2**31)
    values = depth_taps * taps[0] * taps[1] + problem.bias + live * columns + window
    return values * vector * (2 if problem.dtype == "float64" else 1)


def tap_sizes(taps: int, most: int) -> list[int]:
    """Sizes of the tiles that a filter's axis is cut into, none of them with many taps that don't exist.

    >>> tap_sizes(7, 8), tap_sizes(31, 11)
    ([7], [8, 11])
    """
    if taps <= most:
        return [taps]
    found = {divided(taps, divided(taps, size)) for size in range(2, most + 1)}
    return sorted(size for size in found if up(taps, size) <= 1.1 * taps + 1)[-2:] or [most]


def lane_choices(problem: DepthwiseProblem, vector: int) -> list[int]:
    """Lanes of a tile that leave few of a warp's without channels, and fill lines: the best one to three."""
    words = divided(problem.out_channels, vector)

    def used(lanes: int) -> float:
        return words / up(words, lanes) * (lanes * (32 // lanes) / 32)

    sizes = [lanes for lanes in (32, 16, 12, 8, 4) if lanes % problem.multiplier == 0]
    # Full lines of 128 bytes are worth many lanes: 32 won in 76 of 82 problems that had them (H200, 2026-11).
    sizes.sort(key=lambda lanes: -used(lanes) * min(1.0, 0.6 + 0.4 * lanes * vector * problem.element_bytes / 128))
    return sizes[: 1 if sizes and used(sizes[0]) >= 0.8 and sizes[0] * vector * problem.element_bytes >= 128 else 3]


def tiles(problem: DepthwiseProblem, device: DeviceSpec, depth: int = 1) -> Iterator[Tile]:
    """Tiles in question; which of them are worth timing, the predicted time says. depth: taps of a volume's depth."""
    half = problem.element_bytes == 2
    for turned in (False, True):
        along, across = axes(problem, turned)
        if along.out == 1 and (across.out > 1 or turned):
            continue  # a march of one step
        flat = across.size == across.out == across.filter == 1 and across.padding == 0
        large = not half and max(along.filter, across.filter) > LARGE
        if turned and not flat and along.filter <= across.filter and not (large and across.filter > 3 * along.filter):
            continue
        width = divided(across.out, across.classes)
        if flat:
            columns_of = [1]
        elif width <= 4:
            columns_of = [width]
        else:
            whole = [v for v in (14, 28) if v == width or (large and width % v == 0)]
            fitting = [v for v in (4, 5, 6, 7, 8) if v <= up(width, 4)] + whole
            columns_of = sorted(fitting, key=lambda v: (up(width, v) / width > 1.15, -v))[: 6 if large else 4]
        shapes = [
            (a, b)
            for a in tap_sizes(along.filter, 31 if flat else LARGE)
            + (tap_sizes(along.filter, 16) if flat else tap_sizes(along.filter, 3))
            + ([1, *tap_sizes(along.filter, 5)] if large and not flat else [])
            for b in ([across.filter] if width <= (NARROW // 2 if half else NARROW) or across.filter <= 7 else [])
            + tap_sizes(across.filter, LARGE)
            + (tap_sizes(across.filter, 16) if large else [])
        ]
        for vector in (2, 1) if half and problem.multiplier == 1 else (1,):
            depths = [1] if flat else sorted({divided(depth, count) for count in range(1, depth + 1)})
            for taps, columns, depth_taps in product(dict.fromkeys(shapes), columns_of, depths):
                registers = lane_registers(problem, turned, taps, columns, vector, depth_taps)
                if registers > (MOST_VALUES if depth_taps == 1 else MOST_DEPTH_VALUES):
                    continue
                for lanes in lane_choices(problem, vector):
                    yield shaped(problem, device, turned, taps, columns, lanes, vector, registers, flat, depth_taps)


def arranged(device: DeviceSpec, registers: int, chunks: int, chunk_bytes: int, lines: int) -> tuple[int, int, int]:
    """Chunks of a block, warps of a chunk, and blocks of a multiprocessor: as many warps as their registers allow.

    A block has registers for a multiple of four warps. Chunks of a 128-byte line belong together.
    """
    together = [k for k in range(1, 13) if chunks % k == 0 and chunk_bytes * k <= 512] or [1]
    whole = [k for k in together if chunk_bytes * k >= 96] or [together[-1]]

    def worth(choice: tuple[int, int, int]) -> tuple[int, int, int]:
        k, abreast, blocks = choice
        warps = k * abreast
        fits = registers <= device.registers // (32 * up(warps, 4) * blocks) // 8 * 8 or warps * blocks <= 8
        return (min(20, warps * blocks) if fits else 0, min(warps, 8) - warps % 4, -k)

    return max(
        (
            (k, abreast, blocks)
            for k in whole
            for abreast in range(1, max(1, min(16 // k, lines)) + 1)
            for blocks in range(1, 5)
        ),
        key=worth,
    )


def shaped(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    turned: bool,
    taps: tuple[int, int],
    columns: int,
    lanes: int,
    vector: int,
    registers: int,
    flat: bool,
    depth_taps: int,
) -> Tile:
    """A tile with as many warps as registers allow, and stages for what should be in flight."""
    along, across = axes(problem, turned)
    chunk_bytes, chunks = lanes * vector * problem.element_bytes, divided(problem.out_channels, lanes * vector)
    lines = problem.batch * across.classes * divided(divided(across.out, across.classes), columns)
    # What ptxas needs beside them (sm_90, NVRTC 13.0); a long window need not be whole at any time.
    needed = registers + (44 if vector == 1 or (lanes < 32 and registers < 100) else 42 if registers < 100 else 32)
    together, abreast, min_blocks = arranged(device, needed, chunks, chunk_bytes, divided(lines, 32 // lanes))
    live = divided(taps[0], along.stride)
    steps = 1
    if flat and along.out > 1:
        steps = max(2, live)
        while steps * (1 + along.stride) * chunk_bytes * (32 // lanes) < 1536:
            steps += live
        steps = up(steps, live)
    rows = along.stride if flat else min(along.stride, taps[0])
    window = (columns - 1) * across.stride + taps[1]
    stage = chunk_bytes * (32 // lanes) * steps * (columns + depth_taps * rows * window)
    room, warps = device.shared_bytes - 1024, together * abreast
    while warps * 2 * stage > room and abreast > 1:
        abreast = divided(abreast, 2)
        warps = together * abreast
    min_blocks = max(1, min(min_blocks, device.threads // (32 * warps)))
    resident = warps * min_blocks
    stages = next((k for k in (4, 3) if stage * k * resident <= 0.9 * room), 2)
    return Tile(
        turned,
        taps,
        columns,
        lanes,
        vector,
        warps=warps,
        chunks=together,
        stages=stages,
        stage_steps=steps,
        min_blocks=min_blocks,
        depth_taps=depth_taps,
    )
