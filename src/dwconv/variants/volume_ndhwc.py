"""volume_ndhwc: blocks march along depth, planes wait in shared memory; 3-D, channels last."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, legal
from ..problem import DepthwiseProblem
from .base import Variant
from .strips import divided, widest
from .volume_cubes import by_prediction, cubes_plan, tiles_of
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
    needs_reload,
    numbered,
    pair_instructions,
    pair_steps,
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

MOST_CHANNELS = 64  # channels of a chunk
MANY_TAPS = 100  # from here on, tensor cores are faster than multiply-adds, if many planes are in the making
GROUPS = (1, 2, 4, 7, 8)  # of four columns, beside one another on tensor cores: the class that a kernel is compiled for


def chunk_of(problem: DepthwiseProblem, vector: int) -> int:
    """Input channels of a block: all, or equal chunks of whole vectors, of whole warps where they divide."""
    channels = problem.channels
    if channels % 32 == 0:
        return 32
    most = max(1, MOST_CHANNELS // problem.multiplier)
    chunks = -(-channels // most)
    return divided(divided(channels, chunks), vector) * vector


def pairs_of(channels: int) -> int:
    """Pairs of channels in a block of tensor cores' products: 32 bytes where they divide, else the fewest in vain."""
    pairs = divided(channels, 2)
    if channels % 16 == 0 or pairs <= 8:
        return min(pairs, 8)
    return min(range(10, 5, -1), key=lambda n: -(-pairs // n) * n)


class VolumeNdhwc(Variant):
    stem = "volume_ndhwc"
    dims = (3,)
    layouts = ("channels_last",)
    technique = (
        "blocks march along depth: each input plane of a tile of channels comes into shared memory once, and is "
        "added to all output planes that read it, whose sums are in registers"
    )

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """Every tile that comes into question, fastest first as measured (docs/variants/volume_ndhwc.md)."""
        reload = needs_reload(problem)
        flows = March.of(problem, reload).period == 1
        if problem.taps == 27 and problem.element_bytes == 2:
            yield from tiles_of(problem)
        if flows and problem.filter[0] >= 5 and problem.taps >= MANY_TAPS:
            for rows in (2, 1):  # more than 5 ages are too many to unroll the march by
                yield Tile(rows, matrix=True, reload=reload, rotate=problem.filter[0] <= 5, min_blocks=2)
        if flows and problem.taps <= HELD_TAPS and problem.dtype != "float64":
            if fits_eights(problem):
                yield Tile(1, 8, 2, held=True, reload=reload, min_blocks=2)
            for channels in (2, 1):
                yield Tile(2, 4, channels, 128, held=True, reload=reload, rotate=True, spots_x=2, min_blocks=4)
        if flows and fits_eights(problem):
            yield Tile(1, 8, reload=reload, min_blocks=2, unroll=8 * problem.taps <= 1000)
        for rows, columns in ((2, 4), (1, 4), (1, 2), (1, 1)):
            unroll = rows * columns * problem.taps <= 1000
            yield Tile(rows, columns, reload=reload, spots_x=2, min_blocks=2, unroll=unroll)
        if not reload:
            yield Tile(1, 4, reload=True, spots_x=2)

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles: for tests and for tuning."""
        return legal(self.plan(problem, device, tile) for tile in self.tiles(problem))

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        plans = [(t, self.plan(problem, device, t)) for t in self.tiles(problem)]
        yield from first_legal(self.stem, by_prediction(plans))

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if tile.cubes:
            return cubes_plan(self.stem, problem, device, tile)
        if reason := rejected_tile(problem, tile):
            return rejected(reason)
        if tile.matrix:
            return self.matrix_plan(problem, device, tile)
        if tile.vector > 1 and (problem.multiplier > 1 or problem.channels % tile.vector):
            return rejected(f"lanes of {tile.vector} channels need a multiplier of 1 and as many channels")
        if tile.vector * problem.element_bytes > problem.aligned:
            return rejected(f"stores of {tile.vector} channels need tensors that are aligned to them")
        _, out_h, out_w = problem.out_size
        channels, width, columns_apart = problem.channels, problem.size[2], problem.plane_strides[-1]
        limit = min(tile.load_vector or 8, vector_limit(problem))
        vector = widest(limit, channels, columns_apart)
        chunk = chunk_of(problem, vector)
        align, linear = 1, chunk == channels and columns_apart == channels
        if linear:  # rows of all channels are one stretch: vectors may lie across columns
            stretch = widest(limit, width * channels)
            if not tile.load_vector:  # 8 bytes, where at most one column more has to be fetched at each end
                most_bytes = max(8, vector * problem.element_bytes)
                fitting = (v for v in (1, 2, 4, 8) if v <= stretch and v * problem.element_bytes <= most_bytes)
                stretch = max(v for v in fitting if v // math.gcd(v, channels) <= 2)
            vector = max(vector, stretch)
            align = vector // math.gcd(vector, channels)
        lanes = chunk * problem.multiplier // tile.vector
        if lanes > 512:
            return rejected(f"a chunk of {chunk} channels makes {lanes} lanes")
        across = -(-out_w // tile.columns)
        spots_x = min(tile.spots_x, 1 << (across - 1).bit_length())
        if spots_x * tile.columns * problem.stride[2] % align and across > spots_x:
            return rejected("tiles would start between the vectors that copies move")
        spots = max(spots_x, tile.threads // lanes)
        block_limit = -(-spots_x * lanes // tile.threads) * tile.threads
        if block_limit > 1024:
            return rejected(f"{spots_x} groups of {lanes} lanes are more than a block takes")
        tiles_x = -(-across // spots_x)
        offset = -problem.padding[2][0] % align
        tile_columns = -(-(offset + span(problem, spots_x * tile.columns)) // align) * align
        pitch = tile_columns * chunk
        groups = -(-out_h // tile.rows)
        most = spots // spots_x
        taps = lane_taps(problem, tile) * lanes
        shared_limit = device.shared_bytes - 1024
        while True:
            tiles_y = -(-groups // most)
            lanes_y = -(-groups // tiles_y)
            tile_rows = rows_of(problem, lanes_y * tile.rows)
            vectors = tile_rows * pitch // vector
            threads = -(-lanes * spots_x * lanes_y // 32) * 32
            table = table_entries(vectors, tile, threads)
            shared = -(-shared_bytes(problem, tile, vectors * vector, table, taps) // 16) * 16
            if shared <= shared_limit or lanes_y == 1:
                break
            most = lanes_y - 1
        if shared > shared_limit:
            return rejected(f"a block would take {shared} bytes of shared memory; {shared_limit} is the most")
        chunks = -(-channels // chunk)
        tiles = tiles_x * tiles_y * chunks * problem.batch
        march = March.of(problem, tile.reload)
        blocks, length, share, total = shares(problem, tile, device, tiles, threads, vector)
        if reason := numbered(total + share, problem.batch * problem.out_channels):
            return rejected(reason)
        inputs = rows_of(problem, tile.rows) if tile.held else tile.rows * problem.filter[1]
        loads = inputs * span(problem, tile.columns)
        loads += 0 if tile.held else problem.filter[1] * divided(march.ages * problem.filter[2] * tile.vector, 4)
        instructions = sum_instructions(problem, tile, loads, tile.rows * tile.columns, vectors / threads)
        return make_plan(
            self.stem,
            problem,
            device,
            tile,
            {
                "THREADS": max(tile.threads, threads),
                "VECTOR": tile.vector,
                "CHUNK": chunk,
                "SPOTS_X": spots_x,
                "PITCH": pitch,
                "LOAD_VECTOR": vector,
                "STORE_VECTOR": tile.vector,
                "MATRIX": 0,
                "CUBES": 0,
                "PLANE": 0,
                "LINEAR": int(linear),
                "COLUMN_ALIGN": align,
            }
            | copies(vectors, tile, threads),
            share=share,
            blocks=blocks,
            threads=threads,
            shared=shared,
            tiling=(
                *divisors(tiles_x, tiles_y, length, chunks, 1, lanes_y),
                1,
                tile_rows,
                tile_columns,
                vectors,
                1,
                table,
                threads,
                share,
                total,
            ),
            words=f"{tile}; {chunk} channels × {lanes_y} × {spots_x} groups of lanes, {share} planes a block",
            seconds=march_seconds(problem, device, tile, blocks, threads, share, instructions),
        )

    def matrix_plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of a tile whose products tensor cores sum, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := without_matrices(problem, device):
            return rejected(reason)
        if problem.multiplier > 1:
            return rejected("a multiplier leaves no pairs of channels that inputs and outputs share")
        _, out_h, out_w = problem.out_size
        if out_h * out_w * problem.channels >= 2**31:
            return rejected("a plane of y reaches over 2³¹ elements or more, so that its places can't be numbered")
        steps = pair_steps(problem)
        vector = widest(min(2, vector_limit(problem)), problem.channels, problem.plane_strides[-1])
        pairs = pairs_of(problem.channels)
        chunk, pixel = 2 * pairs, pairs // 2 * 4 + 2
        across = -(-out_w // 4)
        tiles_x = -(-across // tile.columns)
        lanes_x = -(-across // tiles_x)
        beside = next(g for g in GROUPS if g >= lanes_x)
        columns = (4 * beside - 4) * problem.stride[2] + 8 * steps  # that products read; bands are zero beyond windows
        pitch = columns * pixel
        pitch += 2 * ((4 * beside * pixel - pitch) // 2 % 32)  # rows go on in the banks where a row of groups ends
        taps = pairs * problem.filter[0] * problem.filter[1] * 2 * (problem.filter[2] + 1)
        most = max(1, 16 * tile.rows // lanes_x)
        outputs = 64 * tile.rows
        shared_limit = device.shared_bytes - 1024
        threads = 32 * pairs
        while True:
            tiles_y = -(-out_h // most)
            lanes_y = -(-out_h // tiles_y)
            tile_rows = rows_of(problem, lanes_y)
            vectors = tile_rows * pitch // vector
            table = table_entries(vectors, tile, threads)
            slots = tile.stages * divided(vectors * vector, 8) * 16
            shared = slots + 4 * (taps + table + outputs * pairs + 2 * outputs * (pairs // 2 * 2 + 1))
            shared = divided(shared, 16) * 16
            if shared <= shared_limit or lanes_y == 1:
                break
            most = lanes_y - 1
        if shared > shared_limit:
            return rejected(f"a block would take {shared} bytes of shared memory; {shared_limit} is the most")
        chunks = -(-problem.channels // chunk)
        tiles = tiles_x * tiles_y * chunks * problem.batch
        blocks, length, share, total = shares(problem, tile, device, tiles, threads, vector)
        if reason := numbered(total + share, problem.batch * problem.out_channels):
            return rejected(reason)
        instructions = pair_instructions(problem, tile, vectors / threads)
        return make_plan(
            self.stem,
            problem,
            device,
            tile,
            {
                "THREADS": threads,
                "COLUMNS": 1,
                "VECTOR": 1,
                "STORE_VECTOR": 2 if problem.channels % 2 == 0 and problem.aligned >= 4 else 1,
                "CHUNK": chunk,
                "SPOTS_X": 1,
                "PITCH": pitch,
                "LOAD_VECTOR": vector,
                "MATRIX": 1,
                "CUBES": 0,
                "PLANE": 0,
                "LINEAR": 0,
                "COLUMN_ALIGN": 1,
            }
            | copies(vectors, tile, threads),
            share=share,
            blocks=blocks,
            threads=threads,
            shared=shared,
            tiling=(
                *divisors(tiles_x, tiles_y, length, chunks, lanes_x, lanes_y),
                outputs,
                tile_rows,
                (lanes_x * 4 - 1) * problem.stride[2] + (problem.filter[2] - 1) * problem.dilation[2] + 1,
                vectors,
                1,
                table,
                threads,
                share,
                total,
            ),
            words=f"{tile}; {chunk} channels × {lanes_y} rows × {lanes_x} groups, {share} planes a block",
            seconds=march_seconds(problem, device, tile, blocks, threads, share, instructions),
        )
