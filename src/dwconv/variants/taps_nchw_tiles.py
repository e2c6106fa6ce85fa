"""The tiles of taps_nchw: which come into question."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .strips import divided, planar, up
from .taps_nchw_cost import taps_seconds, valid_share
from .taps_nchw_geometry import geometry_of
from .taps_nchw_layout import (
    Geometry,
    Tile,
    read_widths,
    registers,
    whole,
    window_height,
    window_width,
)

MOST_TAPS = 50  # whose sums a thread has in registers; half as many in float64
MOST_ROW_TAPS = 60  # of whole rows of the filter on images as narrow as a tile, where no columns are masked
NARROW = 28  # columns of such images
MOST_ROWS = 8  # of such tiles, of outputs: 14 rows of 14 spill at 1×27 taps (sm_90, NVRTC 13.0)
MOST_PRODUCTS = 3200  # of a tile: its code is that long
MOST_REGISTERS = 200
MOST_TILES = 14
MOST_SHAPES = 8  # for which geometries are made, and as many that have few outputs, rows, columns
SMALL_TILE, FEW_ROWS, FEW_COLUMNS = 42, 2, 5
LONG_CODE = 1600  # products: longer code seldom pays
# Of the loops around a product, with few and with many columns: in longer ones the compiler leaves g in local memory.
MOST_STEPS, MORE_STEPS = 24000, 29000
THREADS = (64, 128, 192)
MORE_THREADS = (96, 160, 224, 256)  # for the shapes of the BETTER best
BETTER = 6
FEW_PARTS, LEAST_BLOCKS = 2, 0.8  # of a group; of a multiprocessor


def pieces(taps: int, most: int) -> Iterator[int]:
    """Sizes of tiles that cover `taps` with as few beyond them as that number of tiles allows."""
    seen = set()
    for count in range(1, taps + 1):
        size = divided(taps, count)
        if size <= most and size not in seen:
            seen.add(size)
            yield size
        if size == 1:
            return


def tap_tiles(problem: DepthwiseProblem) -> list[tuple[int, int]]:
    """Tiles of taps that come into question, best first: all taps, or those with the fewest beyond the filter."""
    taps_h, taps_w = problem.filter
    most = MOST_TAPS if problem.element_bytes < 8 else MOST_TAPS // 2
    if taps_h * taps_w <= most:
        return [(taps_h, taps_w)]
    found = []
    for rows in pieces(taps_h, most):
        for columns in pieces(taps_w, most // rows):
            covered = divided(taps_h, rows) * rows * divided(taps_w, columns) * columns / problem.taps
            # an x row of the window is read for `rows` rows of g, a column for `columns` of its columns
            reads = 1.0 / rows + 1.0 / columns + 2.0 / (rows * columns)
            found.append((covered * (1 + 0.5 * reads), rows, columns))
    # In 32 bits conflicts of banks decide as much as instructions, and few sizes have none.
    best = [(rows, columns) for _, rows, columns in sorted(found)[: 3 if problem.element_bytes == 2 else 5]]
    if problem.out_size[1] > NARROW or problem.element_bytes == 2:
        return best
    whole_rows = [(rows, taps_w) for rows in pieces(taps_h, MOST_ROW_TAPS * most // MOST_TAPS // taps_w)]
    return best + [tile for tile in whole_rows[:3] if tile not in best]


def rolled(problem: DepthwiseProblem, tile: Tile) -> bool:
    """Whether the compiler may not unroll the loops over rows and columns of x and outputs: ten to forty times slower.

    So it was for many of the tiles with that many steps and 7 to 13 columns, and with more of 14 columns and more.
    """
    read_x, _ = read_widths(problem, tile)
    width = window_width(problem, tile) + -problem.padding[1][0] % read_x
    steps = window_height(problem, tile) * up(width, read_x) * tile.rows * tile.columns
    return steps > (MOST_STEPS if tile.columns < 14 else MORE_STEPS)


def shapes_of(problem: DepthwiseProblem) -> list[Tile]:
    """Tiles whose values fit in registers and whose code isn't too long: those that take the fewest instructions."""
    out_h, out_w = problem.out_size
    found: list[tuple[float, Tile]] = []
    of_each: list[tuple[float, Tile]] = []  # tile of taps: geometries will tell whose reads meet few banks
    for tap_rows, tap_columns in tap_tiles(problem):
        covered = (
            divided(problem.filter[0], tap_rows) * tap_rows * divided(problem.filter[1], tap_columns) * tap_columns
        )
        legal = []
        whole_rows = tap_columns == problem.filter[1] and out_w <= NARROW and problem.element_bytes > 2
        for rows in dict.fromkeys(min(rows, out_h) for rows in (7, 1, 2, 3, 4, 5, 6, 8, 10, 14)):
            widest = NARROW if whole_rows or rows <= FEW_ROWS else 16 if out_h > 1 else 32
            for columns in range(min(2, out_w), min(widest, out_w) + 1):
                tile = Tile(rows, columns, tap_rows, tap_columns)
                products = rows * columns * tap_rows * tap_columns
                if whole(problem, tile, 1):
                    products = int(products * valid_share(problem, 1))
                if whole(problem, tile, 1) and tap_rows < problem.filter[0] and rows > MOST_ROWS:
                    continue
                if products > MOST_PRODUCTS or registers(problem, tile) > MOST_REGISTERS or rolled(problem, tile):
                    continue
                # A product is an instruction, an element of x or g two or three: it is read, converted, masked.
                width = window_width(problem, tile)
                if whole(problem, tile, 1):
                    width = min(width, problem.size[1])
                elements = window_height(problem, tile) * width + rows * columns
                instructions = products + 2 * elements + 80
                tiles = divided(out_h, rows) * divided(out_w, columns) * covered / (tap_rows * tap_columns)
                legal.append((tiles * instructions * (1 if products < LONG_CODE else 1.3), tile))
        legal = sorted(legal, key=lambda each: each[0]) or [(math.inf, Tile(1, min(4, out_w), tap_rows, tap_columns))]
        found += legal
        of_each += legal[:MOST_SHAPES] if problem.element_bytes > 2 else []
    ordered = [tile for _, tile in sorted(found, key=lambda each: each[0])]
    small = [tile for tile in ordered if tile.rows * tile.columns <= SMALL_TILE]  # more blocks, for the same memory
    low = [tile for tile in ordered if tile.rows <= FEW_ROWS]  # rows are read by whole vectors, or with few conflicts
    slim = [tile for tile in ordered if tile.columns <= FEW_COLUMNS]
    kept = [tile for some in (ordered, small, low, slim) for tile in some[:MOST_SHAPES]]
    return list(dict.fromkeys(kept + [tile for _, tile in of_each]))


def shape_of(tile: Tile) -> tuple[int, ...]:
    """What tiles have alike of which two at most are worth timing."""
    return tile.rows, tile.columns, tile.tap_rows


def tiles_of(problem: DepthwiseProblem, device: DeviceSpec) -> list[tuple[Tile, Geometry]]:
    """Tiles that come into question with their geometries, best first: at most MOST_TILES, two of a shape."""
    found: list[tuple[float, Tile, Geometry]] = []
    planes = planar(problem)

    def add(shape: Tile, threads: int, parts: int = 0) -> None:
        tile = replace(shape, threads=threads, parts=parts)
        geometry = geometry_of(problem, device, tile)
        if isinstance(geometry, Geometry):
            found.append((taps_seconds(planes, device, tile, geometry), tile, geometry))

    for shape in shapes_of(planes):
        for threads in THREADS:
            add(shape, threads)
    found.sort(key=lambda each: each[0])
    for shape in dict.fromkeys(replace(tile, threads=0) for _, tile, _ in found[:BETTER]):
        for threads in MORE_THREADS:
            add(shape, threads)
    # Fewer parts have less to add up; that multiprocessors have unlike numbers of blocks matters little.
    found.sort(key=lambda each: each[0])
    for _, tile, geometry in found[:MOST_TILES]:
        for parts in range(1, min(geometry.parts, FEW_PARTS + 1)):
            if geometry.groups * parts >= device.multiprocessors * LEAST_BLOCKS:
                add(tile, tile.threads, parts)
    chosen: list[tuple[Tile, Geometry]] = []
    for _, tile, geometry in sorted(found, key=lambda each: each[0]):
        same = [other for other, _ in chosen if shape_of(other) == shape_of(tile)]
        alike = [other for other in same if abs(other.threads - tile.threads) < 64]
        if len(same) < 2 and not alike and len(chosen) < MOST_TILES:
            chosen.append((tile, geometry))
    return chosen
