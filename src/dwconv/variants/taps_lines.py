"""What variants share whose kernels march over lines of outputs as matrices: their candidates and plans."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from ..device import DeviceSpec
from ..plan import Plan, Rejection
from ..problem import DepthwiseProblem
from .base import Variant
from .boxes import Maps
from .march import axes, march, marching_plan, unmarchable
from .streams import streams
from .strips import depth_taps, divided, planar, up
from .taps_lines_cost import Costs, seconds
from .taps_lines_tiles import Cut, Layout, Tile, across_axis, spans

MOST_TILES = 12  # that are worth timing, by predicted time
MOST_PIECES = 32  # that a thread copies of a row: a bit says of each whether it exists
SUMS_APART = 4  # floats between one tap's sums of a block and the next one's: kDiagonalsPitch of the kernels
FIRST_ARCHITECTURE = 80  # with m16n8k16


class LinesVariant(Variant):
    """A variant whose kernel marches over lines. Its own are the layout of shared memory, the tiles, the costs."""

    costs: ClassVar[Costs]
    directions = ("grad_weight",)
    dims = (2, 3)
    dtypes = ("float16", "bfloat16")

    @abstractmethod
    def layout(self, problem: DepthwiseProblem, tile: Tile) -> Layout | str:
        """How a tile's rows of a planar problem lie in shared memory, or why it can't take it."""

    def maps(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Maps | None:
        """Of a problem of its own dimensions: what a tile whose lines are boxes copies them from; None if it can't."""
        return None

    @abstractmethod
    def tiles(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Tile]:
        """Tiles in question, of a planar problem; which of them are worth timing, the predicted time says."""

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        planes, deep = planar(problem), depth_taps(problem)
        timed: dict[Tile, tuple[float, Tile]] = {}  # of tiles that differ in their stages only, the best one
        illegal: list[Tile] = []
        tiles = dict.fromkeys(self.tiles(planes, device))
        boxed = (replace(tile, boxes=True) for tile in tiles if tile.cached)
        for tile in (*tiles, *(tile for tile in boxed if self.maps(problem, device, tile))):
            one = self.cut(planes, device, tile, deep)
            if isinstance(one, str):
                illegal.append(tile)
                continue
            found = seconds(planes, device, tile, one, self.costs)
            if found < timed.get(replace(tile, stages=0), (math.inf, tile))[0]:
                timed[replace(tile, stages=0)] = (found, tile)
        best = sorted(timed.values(), key=lambda pair: pair[0])[:MOST_TILES]
        yield from (self.plan(problem, device, tile) for _, tile in best)
        yield from (self.plan(problem, device, tile) for tile in illegal)
        if not timed and not illegal:
            yield Rejection(
                self.stem,
                "",
                f"no tile has whole words of {problem.channels} channels with a multiplier of {problem.multiplier}",
            )

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
        sums = tile.taps[0] * tile.taps[1] + problem.bias
        in_sums = max(4 * sums * (tile.channels + SUMS_APART), 16 * threads + 16)
        shared_bytes = up(max(tile.stages * layout.stage_bytes, in_sums), 16) + tile.stages * layout.gate_bytes
        if shared_bytes > limit:
            return f"its rows take {shared_bytes} bytes of shared memory, more than {limit}"
        resident = max(1, min(tile.min_blocks, device.shared_bytes // (shared_bytes + 1024), device.threads // threads))
        return Cut(
            layout=layout,
            live=live,
            rows=rows,
            shared_bytes=shared_bytes,
            count=up(sums * tile.channels, 4),
            resident=resident,
            march=march(
                problem.batch,
                along,
                across,
                line_outputs=8 * tile.groups,
                lines=tile.lines,
                groups=divided(problem.out_channels, tile.channels),
                tap_tiles=depth_taps * divided(along.filter, tile.taps[0]) * divided(across.filter, tile.taps[1]),
                least_rows=max(2, live),
                slots=device.multiprocessors * resident,
            ),
        )

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        planes, deep = planar(problem), depth_taps(problem)
        if device.sm < FIRST_ARCHITECTURE:
            return rejected(f"tensor cores of {device.arch} have no such product")
        if reason := unmarchable(problem, planes):
            return rejected(reason)
        if max(spans(problem, tile)) >= 2**31:
            return rejected(f"{tile.lines} lines span more than 2**31 elements")
        one = self.cut(planes, device, tile, deep)
        if isinstance(one, str):
            return rejected(one)
        maps = self.maps(problem, device, tile) if tile.boxes else ()
        if maps is None:
            return rejected(f"{device.arch} copies no such lines at once")
        constants = {
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
            "REPAIR": 1,
            "VOLUME": int(problem.dims == 3),
        }
        if problem.layout == "channels_first":
            constants["LEAD"] = one.layout.lead
        else:
            constants["BOXES"] = int(tile.boxes)
            constants["EVICT_FIRST"] = int(tile.boxes and streams(problem, device, one.march.tap_tiles, shared=False))
        return marching_plan(
            self.stem,
            problem,
            device,
            one.march,
            f"{tile}, {one.march.parts} parts of {one.march.part_rows} rows",
            constants,
            warps=tile.warps,
            shared_bytes=one.shared_bytes,
            count=one.count,
            predicted_seconds=seconds(planes, device, tile, one, self.costs),
            maps=maps,
        )
