"""volume_ncdhw: blocks march along depth, planes wait in shared memory; 3-D, channels first."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, legal
from ..problem import DepthwiseProblem
from .base import Variant
from .strips import divided, widest
from .volumes import (
    HELD_TAPS,
    March,
    Tile,
    copies,
    divisors,
    first_legal,
    fits_eights,
    lane_taps,
    make_plan,
    march_seconds,
    matrix_instructions,
    most_volumes,
    needs_reload,
    numbered,
    rejected_tile,
    rows_of,
    shared_bytes,
    shares,
    span,
    sum_instructions,
    table_entries,
    vector_limit,
    without_matrices,
)

WIDTHS = (8, 16, 32, 56, 64)  # output columns of a tile, at most: the class that a kernel is compiled for
MANY_TAPS = 100  # of a filter that lanes of a row of eight outputs sum faster than those of two rows of four


def load_vector(problem: DepthwiseProblem) -> int:
    """Elements that one copy moves: rows of x are whole vectors, and a tile's first column starts one."""
    return widest(16 // problem.element_bytes, vector_limit(problem), problem.size[2])


def pitch_of(problem: DepthwiseProblem, width: int, tile: Tile, vector: int) -> int:
    """Elements of a tile's row: whole vectors; a narrow tile's rows, several to a warp, lie in different banks."""
    offset = -problem.padding[2][0] % vector
    step = max(4, vector)
    pitch = -(-(offset + span(problem, width) + 3) // step) * step
    lanes = width // tile.columns
    if lanes < 8 and problem.stride[2] == 1:
        while tile.rows * problem.stride[1] * pitch % 32 != 16 and pitch % 32 != 0:
            pitch += step
    return pitch


def matrix_shared(problem: DepthwiseProblem, tile: Tile, volumes: int, warps: int, vectors: int, vector: int) -> int:
    """Shared memory of a block of tensor cores' products: tiles of x, bands of the filters, the table of vectors."""
    table = table_entries(volumes * vectors, tile, volumes * warps * 32)
    tiles = tile.stages * divided(volumes * vectors * vector, 8) * 16
    bands = volumes * problem.filter[0] * problem.filter[1] * 256
    return divided(tiles + bands + 4 * table, 16) * 16


class VolumeNcdhw(Variant):
    stem = "volume_ncdhw"
    dims = (3,)
    technique = (
        "blocks march along depth: each input plane of a tile comes into shared memory once, and is added, by tensor "
        "cores in 16 bits, to all output planes that read it, whose sums are in registers"
    )

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Every tile that comes into question, fastest first as measured (docs/variants/volume_ncdhw.md)."""
        reload = needs_reload(problem)
        flows = March.of(problem, reload).period == 1
        few = problem.filter[0] * problem.filter[1] <= 9
        groups = problem.out_size[1] * -(-problem.out_size[2] // 8)
        for rows in (4, 2, 1) if groups > 32 else (2, 1) if groups > 16 else (1,):
            if few:
                yield Tile(rows, threads=32, matrix=True, held=flows, reload=reload, rotate=flows, min_blocks=16)
            else:
                yield Tile(rows, threads=128, matrix=True, reload=reload, rotate=flows, min_blocks=2)
        if flows and problem.taps <= HELD_TAPS and problem.dtype != "float64":
            yield Tile(2, threads=64, stages=4, held=True, reload=reload)
        if flows and fits_eights(problem) and problem.taps >= MANY_TAPS:
            yield Tile(1, 8, threads=64, stages=4, min_blocks=8, unroll=8 * problem.taps <= 1000)
        for rows in (2, 1):
            unroll = 4 * rows * problem.taps <= 1000
            if problem.dtype == "float32":
                yield Tile(rows, threads=64, reload=reload, min_blocks=8, unroll=unroll)
            else:
                yield Tile(rows, threads=128, stages=4 if unroll else 3, reload=reload, min_blocks=4, unroll=unroll)
        if not reload:
            yield Tile(1, threads=128, reload=True, min_blocks=4)

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles: for tests and for tuning."""
        return legal(self.plan(problem, device, tile) for tile in self.tiles(problem))

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        yield from first_legal(self.stem, [(t, self.plan(problem, device, t)) for t in self.tiles(problem)])

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := rejected_tile(problem, tile):
            return rejected(reason)
        if tile.matrix:
            return self.matrix_plan(problem, device, tile)
        _, out_h, out_w = problem.out_size
        vector = min(tile.load_vector or 8, load_vector(problem))
        width = next((w for w in WIDTHS if w >= out_w), WIDTHS[-1])
        tiles_x = -(-out_w // width)
        lanes_x = divided(divided(out_w, tiles_x), tile.columns)
        if tiles_x > 1:
            lanes_x += lanes_x % 2  # tiles must start at vectors
        pitch = pitch_of(problem, width, tile, vector)
        groups = -(-out_h // tile.rows)
        most = max(1, tile.threads // lanes_x)
        planes = problem.batch * problem.out_channels
        limit = device.shared_bytes - 1024
        while True:
            tiles_y = -(-groups // most)
            lanes_y = -(-groups // tiles_y)
            tile_rows = rows_of(problem, lanes_y * tile.rows)
            vectors = tile_rows * pitch // vector
            taps = lane_taps(problem, tile)
            one = shared_bytes(problem, tile, vectors * vector, vectors + tile.batch * tile.threads, taps)
            if one <= limit or lanes_y == 1:
                break
            most = lanes_y - 1
        if one > limit:
            return rejected(f"a block would take {one} bytes of shared memory; {limit} is the most")
        volumes = 1
        if (
            tiles_x * tiles_y == 1
            and math.prod(problem.x_shape) < 2**30
            and not any(s >= 2**30 for s in self._ends(problem))
        ):
            volumes = min(tile.threads // (lanes_x * lanes_y), most_volumes(planes, device), max(1, limit // 2) // one)
            volumes = max(1, volumes)
        threads = -(-lanes_x * lanes_y * volumes // 32) * 32
        table = table_entries(volumes * vectors, tile, threads)
        shared = shared_bytes(problem, tile, volumes * vectors * vector, table, volumes * taps)
        shared = -(-shared // 16) * 16
        volume_groups = -(-planes // volumes)
        tiles = tiles_x * tiles_y * volume_groups
        march = March.of(problem, tile.reload)
        blocks, length, share, total = shares(problem, tile, device, tiles, threads, vector)
        if reason := numbered(total + share, planes):
            return rejected(reason)
        tile_columns = -problem.padding[2][0] % vector + span(problem, lanes_x * tile.columns)
        store = widest(min(tile.columns, 16 // problem.element_bytes), problem.aligned // problem.element_bytes, out_w)
        own_vectors = volumes * vectors / threads
        inputs = rows_of(problem, tile.rows) if tile.held else tile.rows * problem.filter[1]
        quads = -(-(span(problem, tile.columns) + -problem.padding[2][0] % vector % 4) // 4)
        taps_read = 0 if tile.held else problem.filter[1] * divided(march.ages * problem.filter[2], 4)
        stores = tile.rows * tile.columns // store
        instructions = sum_instructions(problem, tile, inputs * quads + taps_read, stores, own_vectors)
        return make_plan(
            self.stem,
            problem,
            device,
            tile,
            {"PITCH": pitch, "LOAD_VECTOR": vector, "STORE_VECTOR": store, "MATRIX": 0}
            | copies(volumes * vectors, tile, threads),
            share=share,
            blocks=blocks,
            threads=threads,
            shared=shared,
            tiling=(
                *divisors(tiles_x, tiles_y, length, problem.out_channels, lanes_x, lanes_y),
                volumes,
                tile_rows,
                tile_columns,
                volumes * vectors,
                1,
                table,
                threads,
                share,
                total,
            ),
            words=f"{tile}; {volumes} × {lanes_y} × {lanes_x} lanes, {share} planes a block",
            seconds=march_seconds(problem, device, tile, blocks, threads, share, instructions),
        )

    def matrix_plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of a tile whose products tensor cores sum, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := without_matrices(problem, device):
            return rejected(reason)
        if problem.stride[2] > 1:
            return rejected("a column stride leaves no band of taps")
        vector = min(tile.load_vector or 8, load_vector(problem))
        offset = -problem.padding[2][0] % vector
        reach = 8 + offset % 2 + (problem.filter[2] - 1) * problem.dilation[2]
        if reach > 16:
            return rejected(f"eight outputs reach over {reach} columns; a product has 16")
        _, out_h, out_w = problem.out_size
        across = -(-out_w // 8)
        tiles_x = -(-across // 8)
        lanes_x = -(-across // tiles_x)
        width = next(w for w in WIDTHS if w >= 8 * lanes_x)
        pitch = -(-(offset + width + 8) // 8) * 8
        warps = tile.threads // 32
        most = max(1, warps * tile.rows * 16 // lanes_x)
        planes = problem.batch * problem.out_channels
        limit = device.shared_bytes - 1024
        while True:
            tiles_y = -(-out_h // most)
            lanes_y = -(-out_h // tiles_y)
            own_warps = -(-lanes_y * lanes_x // (16 * tile.rows))
            tile_rows = rows_of(problem, lanes_y)
            vectors = tile_rows * pitch // vector

            one = matrix_shared(problem, tile, 1, own_warps, vectors, vector)
            if one <= limit or lanes_y == 1:
                break
            most = lanes_y - 1
        if one > limit:
            return rejected(f"a block would take {one} bytes of shared memory; {limit} is the most")
        volumes = 1
        if (
            tiles_x * tiles_y == 1
            and math.prod(problem.x_shape) < 2**30
            and not any(s >= 2**30 for s in self._ends(problem))
        ):
            volumes = max(1, min(warps // own_warps, most_volumes(planes, device)))
            while volumes > 1 and matrix_shared(problem, tile, volumes, own_warps, vectors, vector) > limit // 2:
                volumes -= 1
        threads = own_warps * volumes * 32
        tiles = tiles_x * tiles_y * -(-planes // volumes)
        blocks, length, share, total = shares(problem, tile, device, tiles, threads, vector)
        if reason := numbered(total + share, planes):
            return rejected(reason)
        store = widest(2, problem.aligned // 2, out_w)
        instructions = matrix_instructions(problem, tile, volumes * vectors / threads)
        return make_plan(
            self.stem,
            problem,
            device,
            tile,
            {"PITCH": pitch, "LOAD_VECTOR": vector, "STORE_VECTOR": store, "MATRIX": 1}
            | copies(volumes * vectors, tile, threads),
            share=share,
            blocks=blocks,
            threads=threads,
            shared=matrix_shared(problem, tile, volumes, own_warps, vectors, vector),
            tiling=(
                *divisors(tiles_x, tiles_y, length, problem.out_channels, lanes_x, lanes_y),
                volumes,
                tile_rows,
                offset + 8 * lanes_x + (problem.filter[2] - 1) * problem.dilation[2],
                volumes * vectors,
                own_warps,
                table_entries(volumes * vectors, tile, threads),
                threads,
                share,
                total,
            ),
            words=f"{tile}; {volumes} × {lanes_y} rows × {lanes_x} groups, {share} planes a block",
            seconds=march_seconds(problem, device, tile, blocks, threads, share, instructions),
        )

    @staticmethod
    def _ends(problem: DepthwiseProblem) -> tuple[int, int]:
        """How far x reaches over images, over channels."""
        image, channel, *_ = problem.plane_strides
        return problem.batch * image, problem.channels * channel
