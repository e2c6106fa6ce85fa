"""tile16: 16×16 output tiles of one (image, channel) pair in a three-dimensional grid; a plain baseline."""

from __future__ import annotations

from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from .base import GRID_YZ_LIMIT, Variant, tap_by_tap_seconds

SIDE = 16


class Tile16(Variant):
    stem = "tile16"
    technique = "each block makes a tile of 16×16 outputs of one plane, a thread each, reading through the L1 cache"

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        row_tiles, column_tiles = (-(-size // SIDE) for size in problem.out_size)
        planes = problem.batch * problem.out_channels
        outputs = planes * row_tiles * column_tiles * SIDE * SIDE  # threads past the edge cost as much as others
        yield Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted((problem_constants(problem) | {"THREADS": SIDE * SIDE}).items())),
            grid=(column_tiles, min(GRID_YZ_LIMIT, row_tiles), min(GRID_YZ_LIMIT, max(1, planes))),
            block=(SIDE, SIDE, 1),
            shared_bytes=0,
            sizes=problem_sizes(problem),
            tiling=(row_tiles,),
            tile="16×16 outputs a block",
            predicted_seconds=tap_by_tap_seconds(problem, device, outputs, instructions_before=60),
        )
