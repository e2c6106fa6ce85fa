"""wide_nchw: one input row at a time, the filter in shared memory; for filters too large for registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..device import DeviceSpec
from ..plan import Plan, Rejection, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS, roofline
from .base import Variant
from .strips import Columns, Strips, columns_at, lanes_of, place_columns, too_long, vector_limits, window_rows

THREADS = 64
VECTOR = 4  # neighbouring outputs of a lane in a row
AHEAD = 2  # input rows in flight
CHUNK = 16  # filter taps of a row that are in registers at a time
SHARED_LIMIT = 48 * 1024  # more would have to be asked for, kernel by kernel
LOW = 8  # up to this height, images get strips of 4 rows: 7x7 images and filter reach 0.39 of the limit, not 0.30
MAX_CHUNKS = 8  # of a filter row; each adds its code to the kernel


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choice: output rows of a thread. 7 divides 7, 14, 28, 56: the heights of most networks' images."""

    rows: int
    load_vector: int
    store_vector: int

    def __str__(self) -> str:
        return (
            f"{self.rows} rows × {VECTOR} columns a lane, loads of {4 * self.load_vector} B, stores of "
            f"{4 * self.store_vector} B, {AHEAD} rows in flight, filter in shared memory"
        )


class WideNchw(Variant):
    stem = "wide_nchw"
    technique = (
        "the filter lies in shared memory; each thread takes one input row after the other, its neighbours' columns by "
        "warp shuffle, and adds the row to all output rows of its tile that read it"
    )

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        load_limit, store_limit = vector_limits(problem)
        load = 4 if load_limit == 4 else 1
        rows = 7 if problem.out_size[0] > LOW else 4
        yield self.plan(problem, device, Tile(rows, load, min(store_limit, load)))

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        # One strip owns every column of a narrow image; what lies beyond it is padding: there is no halo to load.
        columns = columns_at(problem, VECTOR, 0)
        whole_rows = max(-(-problem.size[1] // columns.own), -(-problem.out_size[1] // VECTOR)) <= 32
        if not whole_rows:
            columns = place_columns(problem, VECTOR, tile.load_vector)
        padded = -(-problem.filter[1] // 4) * 4
        if problem.filter[1] > CHUNK * MAX_CHUNKS:
            return rejected(f"filter rows of {problem.filter[1]} taps are longer than {CHUNK * MAX_CHUNKS}")
        if not whole_rows and columns.halo_lanes > 32:
            return rejected(f"the halo needs {columns.halo_lanes} lanes to load it; a warp has 32")
        width = max(-(-problem.size[1] // problem.stride[1]) if whole_rows else 0, problem.out_size[1])
        least = 1 if whole_rows else columns.halo_lanes
        lanes = lanes_of(width, VECTOR, least, whole_rows)
        while True:  # more lanes mean fewer groups in a block, and so fewer filters
            strips = Strips.of(problem, lanes, lanes * VECTOR, tile.rows)
            shared_bytes = strips.block_planes(THREADS) * problem.filter[0] * padded * 4
            if shared_bytes <= SHARED_LIMIT or lanes == 32:
                break
            lanes *= 2
        if shared_bytes > SHARED_LIMIT:
            return rejected(f"the filters of a block take {shared_bytes} bytes of shared memory; {SHARED_LIMIT} fit")
        if reason := strips.too_many(THREADS):
            return rejected(reason)
        constants = problem_constants(problem) | {
            "THREADS": THREADS,
            "SLOTS": 1,
            "VECTOR": VECTOR,
            "ROWS": tile.rows,
            "AHEAD": AHEAD,
            "LOAD_VECTOR": tile.load_vector,
            "STORE_VECTOR": tile.store_vector,
            "COLUMN_SHIFT": columns.shift,
            "WHOLE_ROWS": int(whole_rows),
        }
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(strips.blocks(THREADS), 1, 1),
            block=(THREADS, 1, 1),
            shared_bytes=shared_bytes,
            sizes=problem_sizes(problem),
            tiling=(*strips.tiling, strips.block_planes(THREADS)),
            tile=f"{tile}, {lanes} lanes",
            predicted_seconds=row_by_row_seconds(problem, device, tile, columns, strips),
        )


def row_by_row_seconds(
    problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, columns: Columns, strips: Strips
) -> float:
    """Predicted time: instruction issue at 2.5 of four warps a clock, or DRAM at 0.45 of a copy's rate.

    Both were measured on small images; large ones reach 0.75 of a copy's rate, less than direct_nchw all the same.

    A lane issues its multiply-adds, a shared load for every four taps of each output row, a shuffle and a selection
    for every column that isn't its own, and some 20 instructions to fetch a row.
    """
    rows = window_rows(problem, tile.rows)
    taps = tile.rows * problem.filter[0]
    chunks = -(-problem.filter[1] // CHUNK)
    foreign = columns.left + columns.right + (chunks - 1) * (VECTOR - 1)
    instructions = taps * (problem.filter[1] * VECTOR + problem.filter[1] / 4 + 3) + rows * (2 * foreign + 20)
    warps = strips.blocks(THREADS) * THREADS / 32
    issue = warps * instructions / (4 * device.multiprocessors * device.clock)
    return LAUNCH_SECONDS + max(2.2 * roofline(problem, device).copy, 1.6 * issue)
