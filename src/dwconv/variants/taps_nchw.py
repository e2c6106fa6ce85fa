"""taps_nchw: gradients of filters and bias, channels first: tiles of g in registers, x and g from shared memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from .base import GRID_X_LIMIT, Variant
from .streams import streams
from .strips import planar, too_deep, too_long
from .taps_nchw_cost import taps_seconds
from .taps_nchw_geometry import geometry_of
from .taps_nchw_layout import Geometry, Tile, at_once, whole
from .taps_nchw_tiles import tiles_of


class TapsNchw(Variant):
    stem = "taps_nchw"
    directions = ("grad_weight",)
    dims = (2, 3)
    technique = (
        "each block streams planes of x and of y's gradient through shared memory; a thread has a tile of the gradient "
        "and the sums of all taps in registers"
    )

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        if reason := unlaunchable(problem):
            yield Rejection(self.stem, "", reason)
            return
        found = tiles_of(problem, device)
        if not found:
            yield Rejection(self.stem, "", "no stage of any tile fits in a block's threads and shared memory")
        for tile, geometry in found:
            yield self.plan(problem, device, tile, geometry)

    def plan(
        self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, geometry: Geometry | None = None
    ) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""
        found = geometry or geometry_of(problem, device, tile)
        if isinstance(found, str):
            return Rejection(self.stem, str(tile), found)
        geometry = found
        if geometry.groups * geometry.parts > GRID_X_LIMIT or geometry.units >= 2**31:
            return Rejection(
                self.stem, str(tile), f"{geometry.groups * geometry.parts} blocks can't be numbered in 31 bits"
            )
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=constants_of(problem, device, tile, geometry),
            grid=(geometry.groups * geometry.parts, 1, 1),
            block=(geometry.threads, 1, 1),
            shared_bytes=geometry.shared_bytes,
            sizes=problem_sizes(problem),
            tiling=tiling_of(problem, geometry),
            tile=str(tile),
            predicted_seconds=taps_seconds(planar(problem), device, tile, geometry),
            partial_bytes=geometry.partial_bytes if geometry.parts > 1 else 0,
            arrivals=geometry.groups if geometry.parts > 1 else 0,
        )


def unlaunchable(problem: DepthwiseProblem) -> str | None:
    """Why no tile can serve the problem."""
    if reason := too_deep(problem):
        return reason
    problem = planar(problem)
    height, width = problem.size
    if reason := too_long(problem):
        return reason
    if height > 1 and problem.plane_strides[2] != width:
        return "rows of x must follow one another in memory"
    if max(height * width, math.prod(problem.out_size)) >= 2**31:
        return "a plane's elements can't be numbered in 31 bits"
    return None


def constants_of(
    problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, geometry: Geometry
) -> tuple[tuple[str, int | str], ...]:
    """What is compiled in: the problem's constants, and the tile's."""
    planes = planar(problem)
    found = problem_constants(problem) | {
        "THREADS": tile.threads,
        "MIN_BLOCKS": geometry.blocks,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "TAP_ROWS": tile.tap_rows,
        "TAP_COLUMNS": tile.tap_columns,
        "READ_X": geometry.read_x,
        "READ_G": geometry.read_g,
        "EVEN_ROWS": int(planes.out_size[0] % tile.rows == 0),
        "EVEN_COLUMNS": int(planes.out_size[1] % tile.columns == 0),
        "WHOLE_HEIGHT": int(whole(planes, tile, 0)),
        "WHOLE_WIDTH": int(whole(planes, tile, 1)),
        "BOTTOM_REACH": geometry.reach[0],
        "RIGHT_REACH": geometry.reach[1],
        "AT_ONCE": at_once(planes, tile, geometry),
        "CACHED": int(geometry.cached),
        "VOLUME": int(problem.dims == 3),
        "BULK": int(geometry.bulk),
        "STAGES": geometry.stages,
        "ALIGN": geometry.align,
        "CLUSTER": geometry.cluster,
        "EVICT_FIRST": int(geometry.bulk and streams(problem, device, times=problem.lifted(3).filter[0])),
    }
    return tuple(sorted(found.items()))


def tiling_of(problem: DepthwiseProblem, geometry: Geometry) -> tuple[int, ...]:
    """The fields of `TapsNchwTiling`."""
    return (
        *fast_divisor(geometry.parts),
        *fast_divisor(geometry.row_bands),
        *fast_divisor(geometry.column_bands),
        geometry.units,
        geometry.part_units,
        planar(problem).batch,
        geometry.images,
        geometry.channels,
        geometry.row_tiles,
        geometry.column_tiles,
        *fast_divisor(geometry.row_lanes * geometry.column_tiles),
        *fast_divisor(geometry.column_tiles),
        geometry.row_lanes,
        *fast_divisor(geometry.tap_tiles),
        *fast_divisor(geometry.tap_tile_columns),
        *fast_divisor(geometry.channels * problem.multiplier),
        *geometry.x.fields,
        *geometry.g.fields,
        geometry.x_begin,
        geometry.g_begin,
        geometry.stage_elements,
        *fast_divisor(geometry.x.team),
        *fast_divisor(geometry.g.team),
        geometry.scratch,
        *fast_divisor(problem.out_size[0] if problem.dims == 3 else 1),
    )
