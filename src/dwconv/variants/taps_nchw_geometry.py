"""How taps_nchw cuts a problem into stages and parts, and where elements stand in shared memory."""

from __future__ import annotations

import math
from dataclasses import replace

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .banks import banked
from .streams import BULK_COPIES, LINE
from .strips import divided, planar, up
from .taps_nchw_layout import (
    HEAD_BYTES,
    MOST_STAGES,
    Geometry,
    Pitches,
    Tile,
    read_widths,
    registers,
    shared_bytes,
)

SHORT_LINE = 1024  # bytes: shorter lines come through L1, for the sectors that two of them share
MOST_PARTIAL = 1 << 26  # bytes
MOST_PARTS = 128
# Bytes modulo which lines stand as in memory: sectors of L2, and its lines where these are few beside what is copied.
# The copy engine is up to a third slower where sectors lie across those of shared memory (H200, 2026-11).
SECTOR, LONG_LINES = 32, 7000
CLUSTERED = 0.9  # of the blocks that the card holds at a time, at most, where two of them are a cluster


def far_reach(problem: DepthwiseProblem) -> tuple[int, int]:
    """Rows and columns of padding below and right of x that outputs read."""
    below, right = (
        max(0, (out - 1) * stride - before + (taps - 1) * apart - (size - 1))
        for out, stride, (before, _), taps, apart, size in zip(
            problem.out_size,
            problem.stride,
            problem.padding,
            problem.filter,
            problem.dilation,
            problem.size,
            strict=True,
        )
    )
    return below, right


def pitches(
    step_image: int,
    step_plane: int,
    row: int,
    width: int,
    *,
    images: int,
    planes: int,
    rows: int,
    merges: bool,
    by_rows: bool,
    align: int,
    threads: int,
    element_bytes: int,
) -> Pitches:
    """Where lines stand in shared memory: steps congruent to memory's modulo `align` elements, and room beside them."""
    room = align + 16 // element_bytes  # a line begins behind a multiple of `align`, and ends with a whole piece
    row_pitch = up(width + room, align, row % align) if by_rows else row
    extent = (rows - 1) * row_pitch + width
    plane_pitch = step_plane if merges else up(extent + room, align, step_plane % align)
    image_pitch = up((planes - 1) * plane_pitch + extent + room, align, step_image % align)
    lines = rows * planes if by_rows else images * (1 if merges else planes)
    length = width if by_rows else (planes - 1) * plane_pitch + extent if merges else extent
    team = threads if lines == 1 else max(32, threads // lines // 32 * 32)
    elements = (images - 1) * image_pitch + (planes - 1) * plane_pitch + extent + room
    return Pitches(image_pitch, plane_pitch, row_pitch, merges, team, up(elements, align), length * element_bytes)


def geometry_of(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Geometry | str:
    """The stages and parts of a problem, or why there are none."""
    depth_taps, out_depth = (problem.filter[0], problem.out_size[0]) if problem.dims == 3 else (1, 0)
    problem = planar(problem)
    (out_h, out_w), multiplier = problem.out_size, problem.multiplier
    tap_tile_columns = divided(problem.filter[1], tile.tap_columns)
    tiled_taps = divided(problem.filter[0], tile.tap_rows) * tap_tile_columns
    if tile.rows > out_h or tile.columns > out_w:
        return "tiles must lie inside the output"
    if multiplier * tiled_taps > tile.threads:
        return f"a block of {tile.threads} threads can't make {multiplier} filters of {tiled_taps} tiles of taps each"
    row_tiles, column_tiles = divided(out_h, tile.rows), divided(out_w, tile.columns)
    room = tile.threads // (multiplier * tiled_taps)  # threads for the tiles of one stage
    for budget in (device.shared_bytes // 2 - 1024, device.shared_bytes - 1024):  # two blocks, or one
        threads = room
        while threads >= 1:
            asked = (problem, device, tile, threads, row_tiles, column_tiles, tiled_taps, tap_tile_columns, out_depth)
            found = _cut(*asked, SECTOR)
            if found.bulk and found.x.line_bytes + found.g.line_bytes >= LONG_LINES:
                found = _cut(*asked, LINE)
            if found.shared_bytes <= budget:
                found = replace(found, groups=found.groups * depth_taps, depth_taps=depth_taps)
                return _parted(problem, device, tile, _spread(problem, tile, found))
            threads = min(threads - 1, threads * 3 // 4)
    return f"no stage fits in the {device.shared_bytes - 1024} bytes of shared memory of a block"


def _cut(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    tile: Tile,
    threads: int,
    row_tiles: int,
    column_tiles: int,
    tiled_taps: int,
    tap_tile_columns: int,
    out_depth: int,
    bulk_align: int,
) -> Geometry:
    """The stages in which so many threads have a tile for each tile of taps and each of `multiplier` planes.

    out_depth: of volumes, whose planes have stages of their own; else 0. bulk_align: of lines that are sent, in bytes.
    """
    (height, width), (out_h, out_w), size = problem.size, problem.out_size, problem.element_bytes
    bulk = device.sm >= BULK_COPIES
    align_bytes = bulk_align if bulk else 16
    vector, align = 16 // size, align_bytes // size
    of_thread = divided(row_tiles * column_tiles, threads) if tiled_taps > 1 else 1
    column_bands = row_bands = channels = images = 1
    if column_tiles > threads:
        column_bands = divided(column_tiles, threads)
        column_tiles = divided(column_tiles, column_bands)
    lanes = divided(row_tiles, of_thread)
    if column_tiles * lanes > threads:
        fit = max(1, threads // column_tiles)
        row_bands = divided(lanes, fit)
        lanes = divided(lanes, row_bands)
        row_tiles = divided(row_tiles, row_bands)
        row_bands = divided(divided(out_h, tile.rows), row_tiles)
        lanes = divided(row_tiles, of_thread)
    elif column_bands == 1:
        planes = max(1, threads // (column_tiles * lanes))
        plane_bytes = height * width * size
        channels = min(problem.channels, planes, max(1, divided(SHORT_LINE, plane_bytes)))
        most = 1 if out_depth else max(1, problem.batch)  # images of a stage
        images = divided(most, divided(most, min(most, planes // channels)))
        channels = min(problem.channels, max(channels, planes // images))
        channels = divided(problem.channels, divided(problem.channels, channels))
    by_rows = column_bands > 1
    band_rows = min(out_h, row_tiles * tile.rows)
    band_columns = min(out_w, column_tiles * tile.columns) if by_rows else out_w
    in_rows = min(height, (band_rows - 1) * problem.stride[0] + (problem.filter[0] - 1) * problem.dilation[0] + 1)
    read_x, read_g = read_widths(problem, tile)
    reach = (band_columns - 1) * problem.stride[1] + (problem.filter[1] - 1) * problem.dilation[1] + 1
    in_columns = min(width, reach + read_x) if by_rows else width
    x_image, x_channel = problem.plane_strides[:2]
    whole, planes = row_bands == 1 and not by_rows, channels * problem.multiplier
    x = pitches(
        x_image, x_channel, width, in_columns, images=images, planes=channels, rows=in_rows,
        merges=whole and (channels == 1 or x_channel == height * width), by_rows=by_rows, align=align,
        threads=tile.threads, element_bytes=size,
    )  # fmt: skip
    g = pitches(
        problem.out_channels * out_h * out_w, out_h * out_w * max(1, out_depth), out_w, band_columns, images=images,
        planes=planes, rows=band_rows, merges=whole and out_depth < 2, by_rows=by_rows, align=align,
        threads=tile.threads, element_bytes=size,
    )  # fmt: skip
    beyond = (tap_tile_columns * tile.tap_columns - problem.filter[1]) * problem.dilation[1]
    below, right = far_reach(problem)
    x_begin = up(problem.padding[1][0] + vector, align)
    g_begin = x_begin + x.elements + up(right + beyond + vector, align)
    stage_elements = up(g_begin + g.elements, align)
    sums = tile.taps + problem.bias
    outputs = planes * tiled_taps * sums
    groups, units = (
        divided(problem.channels, channels),
        divided(max(1, problem.batch), images) * row_bands * column_bands,
    )
    found = Geometry(
        channels=channels, images=images, row_tiles=row_tiles, column_tiles=column_tiles, row_lanes=lanes,
        row_bands=row_bands, column_bands=column_bands, tap_tiles=tiled_taps, tap_tile_columns=tap_tile_columns,
        groups=groups, parts=1, units=units, part_units=units, read_x=read_x, read_g=read_g, reach=(below, right),
        cached=min(x.line_bytes, g.line_bytes) < SHORT_LINE, x=x, g=g, x_begin=x_begin, g_begin=g_begin,
        stage_elements=stage_elements, scratch=up(outputs + 1, 4), shared_bytes=0, partial_bytes=0,
        used=images * planes * tiled_taps * lanes * column_tiles,
        bulk=bulk, align=align_bytes, threads=tile.threads + (32 if bulk else 0),
    )  # fmt: skip
    return replace(found, shared_bytes=shared_bytes(problem, tile, found))


def lanes_of(problem: DepthwiseProblem, tile: Tile, geometry: Geometry) -> list[tuple[int, int, int]]:
    """Of the first warp: the image of each lane, and where in x and g it begins to read, in bytes."""
    size, x, g = problem.element_bytes, geometry.x, geometry.g
    planes, found = geometry.channels * problem.multiplier, []
    for thread in range(min(32, geometry.used)):
        above, lane = divmod(thread, geometry.row_lanes * geometry.column_tiles)
        row, column = divmod(lane, geometry.column_tiles)
        above, plane = divmod(above, planes)
        tap_tile, image = divmod(above, geometry.images)
        tap_row, tap_column = divmod(tap_tile, geometry.tap_tile_columns)
        row, column = row * tile.rows, column * tile.columns
        in_row = row * problem.stride[0] + tap_row * tile.tap_rows * problem.dilation[0]
        in_column = column * problem.stride[1] + tap_column * tile.tap_columns * problem.dilation[1]
        of_x = image * x.image + plane // problem.multiplier * x.plane + in_row * x.row + in_column
        found.append((image, size * of_x, size * (image * g.image + plane * g.plane + row * g.row + column)))
    return found


def _best_spread(lanes: list[tuple[int, int]], width: int, step: int | None) -> tuple[int, int]:
    """Clocks of a read, and by how many bytes, multiples of `step`, images are moved apart for them."""
    found = banked(tuple([at for _, at in lanes]), width), 0
    # 32 banks of 4 bytes
    for more in range(step, 128, step) if step else ():
        if found[0] == max(1, width * len(lanes) // 128):
            break
        found = min(found, (banked(tuple([at + more * image for image, at in lanes]), width), more))
    return found


def _spread(problem: DepthwiseProblem, tile: Tile, geometry: Geometry) -> Geometry:
    """With images as far apart as lets lanes read different banks."""
    size, lanes = problem.element_bytes, lanes_of(problem, tile, geometry)
    spreads = geometry.images > 1 and geometry.used // geometry.images < 32 and geometry.x.merged == geometry.g.merged
    of_x, of_g = [(image, at) for image, at, _ in lanes], [(image, at) for image, _, at in lanes]
    step = geometry.align if spreads else None
    x_clocks, x_more = _best_spread(of_x, size * geometry.read_x, step)
    g_clocks, g_more = _best_spread(of_g, size * geometry.read_g, step)
    if not x_more and not g_more:
        return replace(geometry, read_clocks=(x_clocks, g_clocks))
    last, x_more, g_more = geometry.images - 1, x_more // size, g_more // size
    x, g = geometry.x, geometry.g
    found = replace(
        geometry,
        x=replace(x, image=x.image + x_more, elements=x.elements + last * x_more),
        g=replace(g, image=g.image + g_more, elements=g.elements + last * g_more),
        g_begin=geometry.g_begin + last * x_more,
        stage_elements=geometry.stage_elements + last * (x_more + g_more),
        read_clocks=(x_clocks, g_clocks),
    )
    return replace(found, shared_bytes=shared_bytes(problem, tile, found))


def resident(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, geometry: Geometry) -> int:
    """Blocks that a multiprocessor holds."""
    needed = up(min(255, registers(problem, tile)), 8)
    by_registers = device.registers // (geometry.threads * needed)
    return max(
        1, min(device.shared_bytes // (geometry.shared_bytes + 1024), by_registers, device.threads // geometry.threads)
    )


def stages_of(problem: DepthwiseProblem, device: DeviceSpec, geometry: Geometry, blocks: int) -> int:
    """How many stages each of so many blocks of a multiprocessor has room for."""
    room = device.shared_bytes // blocks - 1024 - geometry.align
    return room // (geometry.stage_elements * problem.element_bytes + HEAD_BYTES)


def _parted(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, geometry: Geometry) -> Geometry:
    """With the tile's parts of the units, or as many as keep all multiprocessors busy to the end."""
    blocks = resident(problem, device, tile, geometry)
    wave = device.multiprocessors * blocks
    outputs = geometry.channels * problem.multiplier * geometry.tap_tiles
    outputs *= tile.taps + problem.bias
    best, least = 1, math.inf
    most = min(geometry.units, MOST_PARTS, 1 + 2 * wave // geometry.groups)
    for parts in [min(tile.parts, most)] if tile.parts else range(1, most + 1):
        each = divided(geometry.units, parts)
        rounds = geometry.groups * divided(geometry.units, each) / wave
        # a full wave runs at the rate of the whole device; a block starts and ends at the cost of half a stage or so
        full, rest = divmod(rounds, 1)
        cost = (full + (0 if rest < 1e-9 else max(rest, 0.6))) * (each + 1.0) + 0.02 * parts
        if cost < least and geometry.groups * parts * outputs * problem.sum_bytes <= MOST_PARTIAL:
            best, least = parts, cost
    each = divided(geometry.units, best)
    parts = divided(geometry.units, each)
    found = replace(geometry, parts=parts, part_units=each, blocks=blocks)
    if found.bulk:
        # Two parts side by side are added up 1 µs sooner; more, or few free places, keep clusters waiting (H200).
        if found.depth_taps == 1 and parts == 2 and found.groups * parts <= CLUSTERED * wave:
            found = replace(found, cluster=parts)
        needed = min(blocks, divided(found.groups * parts, device.multiprocessors))
        if found.cluster == 1 and stages_of(problem, device, found, needed) >= MOST_STAGES:
            blocks = needed
        stages = stages_of(problem, device, found, blocks)
        found = replace(found, blocks=blocks, stages=max(2, min(MOST_STAGES, stages, each + 1)))
    return replace(
        found,
        shared_bytes=shared_bytes(problem, tile, found),
        partial_bytes=geometry.groups * parts * outputs * problem.sum_bytes if parts > 1 else 0,
    )
