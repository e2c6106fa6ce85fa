"""taps_nhwc: gradients of filters and bias; a lane holds a tile of taps of its channels and marches down the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from .base import GRID_X_LIMIT, Variant
from .strips import divided, planar, too_deep, too_long
from .taps_nhwc_cost import gathered, reached, seconds
from .taps_nhwc_tiles import LARGE, Tile, axes, cut, piece_bytes, sum_bytes, tiles

MOST_TILES = 14  # that are worth timing, by predicted time
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
        planes, depth_taps = planar(problem), problem.filter[0] if problem.dims == 3 else 1
        timed: dict[Tile, float] = {}
        illegal: list[Tile] = []

        def consider(tile: Tile) -> None:
            one = cut(planes, device, tile, depth_taps) if piece_bytes(planes, tile) else None
            if one is None:
                illegal.append(tile)
            elif tile not in timed:
                timed[tile] = seconds(planes, device, tile, one)

        for tile in dict.fromkeys(tiles(planes, device, depth_taps)):
            consider(tile)
        for tile in sorted(timed, key=timed.__getitem__)[:MOST_SHAPES]:
            for stages in range(2, tile.stages):
                consider(replace(tile, stages=stages))
        for tile in sorted(timed, key=timed.__getitem__)[:MOST_TILES]:
            along, _ = axes(planes, tile.turned)
            if along.filter > max(LARGE, tile.taps[0]) and reached(along) < UNEVEN and problem.element_bytes > 2:
                waves = replace(tile, waves=WAVES)
                several, one = (cut(planes, device, each, depth_taps) for each in (waves, tile))
                if several and one and several.parts > one.parts:
                    consider(waves)
        for tile in sorted(timed, key=timed.__getitem__)[:MOST_TILES]:
            if min(piece_bytes(planes, tile) or (0,)) == 16:
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

        planes = planar(problem)
        depth_taps, depths = (problem.filter[0], problem.out_size[0]) if problem.dims == 3 else (1, 1)
        if reason := too_deep(problem) or too_long(planes):
            return rejected(reason)
        if max(planes.size) + max(map(max, planes.padding)) >= 2**29 or max(planes.stride + planes.dilation) >= 2**12:
            return rejected("rows and taps are too far apart for 32-bit numbers")
        if problem.multiplier > 1 and (tile.vector > 1 or tile.lanes % problem.multiplier):
            return rejected(f"{tile.lanes} lanes are no whole groups of {problem.multiplier} outputs of a channel")
        pieces = piece_bytes(planes, tile)
        if pieces is None:
            return rejected(f"{tile.vector} channels of a lane are no vector of each pixel")
        one = cut(planes, device, tile, depth_taps)
        if one is None:
            return rejected(f"the rows of a block take more than {device.shared_bytes - 1024} bytes")
        blocks = one.groups * one.tap_tiles * one.parts
        if blocks > GRID_X_LIMIT or max(one.positions, one.lines, blocks) + one.part_rows >= 2**31:
            return rejected("there are too many rows to number them in 31 bits")
        of_gatherer, _ = gathered(problem, tile, one)
        gatherers = divided(one.parts, of_gatherer)
        counters = 1 if gatherers == 1 else gatherers + 1
        constants = problem_constants(problem) | {
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
            "WIDTH": one.width,
            "SLAB": one.slab,
            "REPAIR": 1,
            "VOLUME": int(problem.dims == 3),
        }
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(blocks, 1, 1),
            block=(32 * tile.warps, 1, 1),
            shared_bytes=one.shared_bytes,
            sizes=problem_sizes(problem),
            tiling=(
                planes.batch,
                one.lines,
                one.parts,
                one.part_rows,
                one.positions,
                of_gatherer,
                *(
                    field
                    for divisor in (
                        one.tap_tiles,
                        one.groups,
                        one.line_rows,
                        one.super_lines,
                        one.column_tiles,
                        depths,
                    )
                    for field in fast_divisor(divisor)
                ),
            ),
            tile=f"{tile}, {one.parts} parts of {one.part_rows} rows",
            predicted_seconds=seconds(planes, device, tile, one),
            partial_bytes=blocks * one.count * sum_bytes(problem) if one.parts > 1 else 0,
            arrivals=one.groups * one.tap_tiles * counters if one.parts > 1 else 0,
        )
