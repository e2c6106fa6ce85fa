"""taps_nhwc: gradients of filters and bias; a lane holds a tile of taps of its channels and marches down the image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from ..device import DeviceSpec
from ..plan import Plan, Rejection
from ..problem import DepthwiseProblem
from .base import Variant
from .march import axes, marching_plan, unmarchable
from .streams import streams
from .strips import depth_taps, planar
from .taps_nhwc_boxes import boxed, tensor_maps
from .taps_nhwc_cost import seconds
from .taps_nhwc_tiles import LARGE, MOST_COPIES, Tile, cut, lane_copies, piece_bytes, tiles

MOST_TILES = 14  # that are worth timing, by predicted time
MOST_ARRANGED = 12  # shapes whose warps and stages are tried out
MOST_SHAPES = 6  # that are offered with fewer stages, too
MOST_ALIKE = 4  # of the same taps, columns and channels of a lane
UNEVEN, WAVES = 0.9, 4  # below this share of rows that a tap meets on average, tiles of taps last unlike times


class TapsNhwc(Variant):
    stem = "taps_nhwc"
    directions = ("grad_weight",)
    dims = (2, 3)
    layouts = ("channels_last",)
    technique = (
        "rows of x and of y's gradient stream through shared memory, each lane holds the sums of some taps of its "
        "channels in registers, and the last block adds up what all have found"
    )

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        planes, deep = planar(problem), depth_taps(problem)
        timed: dict[Tile, float] = {}
        illegal: dict[Tile, None] = {}

        def consider(tile: Tile) -> None:
            if tile in timed or tile in illegal:
                return
            pieces = piece_bytes(planes, tile)
            one = cut(planes, device, tile, deep) if pieces else None
            if pieces is None or one is None or lane_copies(planes, tile, pieces, one) > MOST_COPIES:
                illegal[tile] = None
            else:
                timed[tile] = seconds(planes, device, tile, one)

        # Of each shape the first and the last arrangement of warps and stages, of the best shapes all.
        shapes = [boxed(problem, device, tile) for tile in dict.fromkeys(tiles(planes, device, deep))]
        for shape in shapes:
            consider(shape[0])
            consider(shape[-1])
        shapes_by_time = sorted(shapes, key=lambda shape: min(timed.get(shape[k], math.inf) for k in (0, -1)))
        for tile in chain.from_iterable(shapes_by_time[:MOST_ARRANGED]):
            consider(tile)
        # In the order of their shapes again, which equal times keep.
        timed = {tile: timed[tile] for tile in chain.from_iterable(shapes) if tile in timed}
        for tile in sorted(timed, key=timed.__getitem__)[:MOST_SHAPES]:
            for stages in () if tile.boxes else range(2, tile.stages):
                consider(replace(tile, stages=stages))
        for tile in sorted(timed, key=timed.__getitem__)[:MOST_TILES]:
            along, _ = axes(planes, tile.turned)
            if along.filter > max(LARGE, tile.taps[0]) and along.reached < UNEVEN and problem.element_bytes > 2:
                waves = replace(tile, waves=WAVES)
                several, one = (cut(planes, device, each, deep) for each in (waves, tile))
                if several and one and several.march.parts > one.march.parts:
                    consider(waves)
        for tile in sorted(timed, key=timed.__getitem__)[:MOST_TILES]:
            if min(piece_bytes(planes, tile) or (0,)) == 16 and not tile.boxes:
                consider(replace(tile, cached=False))
        alike: Counter[Tile] = Counter()
        offered: list[Tile] = []
        for tile in sorted(timed, key=timed.__getitem__):
            of_lane = replace(tile, lanes=0, warps=0, chunks=0, stages=0, min_blocks=0, cached=True)
            alike[of_lane] += 1
            if alike[of_lane] <= MOST_ALIKE and len(offered) < MOST_TILES:
                offered.append(tile)
        found = [self.plan(problem, device, tile) for tile in offered]
        yield from found
        for tile in illegal:
            rejected = self.plan(problem, device, tile)
            if isinstance(rejected, Rejection):
                yield rejected
        if not found and not illegal:
            reason = f"no tile fits in registers and divides the lanes by a multiplier of {problem.multiplier}"
            yield Rejection(self.stem, "", reason)

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        planes, deep = planar(problem), depth_taps(problem)
        if reason := unmarchable(problem, planes):
            return rejected(reason)
        if problem.multiplier > 1 and (tile.vector > 1 or tile.lanes % problem.multiplier):
            return rejected(f"{tile.lanes} lanes are no whole groups of {problem.multiplier} outputs of a channel")
        pieces = piece_bytes(planes, tile)
        if pieces is None:
            return rejected(f"{tile.vector} channels of a lane are no vector of each pixel")
        one = cut(planes, device, tile, deep)
        if one is None:
            return rejected(f"the rows of a block take more than {device.shared_bytes - 1024} bytes")
        if (copies := lane_copies(planes, tile, pieces, one)) > MOST_COPIES:
            return rejected(f"a lane would copy {copies} pieces of a row; {MOST_COPIES} are the most")
        maps = tensor_maps(problem, device, tile) if tile.boxes else ()
        if maps is None:
            return rejected(f"{device.arch} copies no such rows at once")
        constants = {
            "TURNED": int(tile.turned),
            "TAPS_D": tile.depth_taps,
            "TAPS_A": tile.taps[0],
            "TAPS_B": tile.taps[1],
            "COLUMNS": tile.columns,
            "LANES": tile.lanes,
            "VECTOR": tile.vector,
            "WARPS": tile.warps,
            "MIN_BLOCKS": tile.min_blocks,
            "CHUNKS": tile.chunks,
            "STAGES": tile.stages,
            "STAGE_STEPS": tile.stage_steps,
            "G_BYTES": pieces[0],
            "X_BYTES": pieces[1],
            "CACHED": int(tile.cached),
            "BOXES": int(tile.boxes),
            "EVICT_FIRST": int(tile.boxes and streams(problem, device, times=max(deep, one.march.tap_tiles))),
            "WIDTH": one.width,
            "SLAB": one.slab,
            "REPAIR": 1,
            "VOLUME": int(problem.dims == 3),
        }
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
            predicted_seconds=seconds(planes, device, tile, one),
            maps=maps,
        )
