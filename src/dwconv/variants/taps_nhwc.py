"""taps_nhwc: gradients of filters and bias; a lane holds a tile of taps of its channels and marches down the image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .base import GRID_X_LIMIT, Variant
from .strips import divided, too_long
from .taps_nhwc_tiles import Cut, Tile, axes, cut, piece_bytes, reached, sum_bytes, tiles

MOST_TILES = 12  # that are worth timing, by predicted time


class TapsNhwc(Variant):
    stem = "taps_nhwc"
    directions = ("grad_weight",)
    layouts = ("channels_last",)
    technique = (
        "rows of x and of y's gradient stream through shared memory, each lane holds the sums of some taps of its "
        "channels in registers, and the last block adds up what all have found"
    )

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        found: list[Plan] = []
        of_plan: dict[str, Tile] = {}
        rejected: list[Rejection] = []
        for tile in dict.fromkeys(tiles(problem, device)):
            plan = self.plan(problem, device, tile)
            if isinstance(plan, Plan):
                of_plan[plan.tile] = tile
            found += [plan] if isinstance(plan, Plan) else []
            rejected += [plan] if isinstance(plan, Rejection) else []
        found.sort(key=lambda plan: plan.predicted_seconds)
        yield from found[:MOST_TILES]
        yield from rejected
        for best in {plan.kernel_id: plan for plan in found[:2]}.values():  # past L1, after the others
            past = self.plan(problem, device, replace(of_plan[best.tile], cached=False))
            if isinstance(past, Plan):
                yield replace(past, predicted_seconds=1.02 * past.predicted_seconds)
        if not found and not rejected:
            reason = f"no tile fits in registers and divides the lanes by a multiplier of {problem.multiplier}"
            yield Rejection(self.stem, "", reason)

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        if (
            max(problem.size) + max(map(max, problem.padding)) >= 2**29
            or max(problem.stride + problem.dilation) >= 2**12
        ):
            return rejected("rows and taps are too far apart for 32-bit numbers")
        if problem.multiplier > 1 and (tile.vector > 1 or tile.lanes % problem.multiplier):
            return rejected(f"{tile.lanes} lanes are no whole groups of {problem.multiplier} outputs of a channel")
        pieces = piece_bytes(problem, tile)
        if pieces is None:
            return rejected(f"{tile.vector} channels of a lane are no vector of each pixel")
        one = cut(problem, device, tile)
        if one is None:
            return rejected(f"the rows of a block take more than {device.shared_bytes - 1024} bytes")
        blocks = one.groups * one.tap_tiles * one.parts
        if blocks > GRID_X_LIMIT or max(one.positions, one.lines, blocks) + one.part_rows >= 2**31:
            return rejected("there are too many rows to number them in 31 bits")
        constants = problem_constants(problem) | {
            "TURNED": int(tile.turned),
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
                problem.batch,
                one.lines,
                one.parts,
                one.part_rows,
                one.positions,
                *(
                    field
                    for divisor in (one.tap_tiles, one.groups, one.line_rows, one.super_lines, one.column_tiles)
                    for field in fast_divisor(divisor)
                ),
            ),
            tile=f"{tile}, {one.parts} parts of {one.part_rows} rows",
            predicted_seconds=seconds(problem, device, tile, one),
            partial_bytes=blocks * one.count * sum_bytes(problem) if one.parts > 1 else 0,
            arrivals=one.groups * one.tap_tiles if one.parts > 1 else 0,
        )


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut) -> float:
    """Predicted time: instructions, DRAM and L2 beside each other, then the last block's additions."""
    along, across = axes(problem, tile.turned)
    half = problem.element_bytes == 2
    read = 1 + (tile.vector if half else 0)
    products = tile.columns * tile.taps[1]
    if one.width:
        columns = range(across.padding, across.padding + one.kept)
        products = sum(0 <= c - t * across.stride < tile.taps[1] for c in columns for t in range(tile.columns))
    pieces = piece_bytes(problem, tile) or (4, 4)
    word = tile.vector * problem.element_bytes
    flat = tile.stage_steps > 1
    g_columns, x_columns = (tile.stage_steps, tile.stage_steps * one.rows) if flat else (tile.columns, one.kept)
    copies = divided(g_columns, pieces[0] // word)
    copies += divided(x_columns, max(1, pieces[1] * problem.multiplier // word)) * (1 if flat else one.rows)
    double = 2 if problem.dtype == "float64" else 1
    met = min(1.0, along.size / (along.out * along.stride))  # rows of x that exist
    fma = products * tile.taps[0] * tile.vector * met
    if one.tap_tiles > 1 or along.filter > along.out:
        fma *= reached(along) if along.filter == tile.taps[0] else min(1.0, 1.1 * reached(along))
    step = fma * double + read * (tile.columns + one.rows * one.kept) + problem.bias * tile.columns * tile.vector
    # Beside these (SASS of sm_90, NVRTC 13.0): 50 of a stage and 7 for each copy of it; 8 for a row of taps.
    step += (50 + 7 * copies) / tile.stage_steps + (0 if flat else 8 * one.live)
    segments = max(1.0, one.part_rows / one.line_rows)
    steps = one.part_rows + segments * (one.live - 1) * (1.0 if tile.stage_steps > 1 else 0.4)
    block = steps * step + segments * 150 + 800 + 8 * one.values
    resident = one.resident
    grid = one.groups * one.tap_tiles * one.parts
    full, rest = divmod(divided(grid, device.multiprocessors), resident)
    warps = full * max(tile.warps * resident, 4) + (max(tile.warps * rest, 4) if rest else 0)
    issue = block * (warps + 2.5 * (full + bool(rest))) / (4 * 0.85) / device.clock

    elements = math.prod(problem.y_shape) * (1.0 + one.rows * one.kept / tile.columns / problem.multiplier)
    l2 = elements * problem.element_bytes * one.tap_tiles / (24.0 * device.multiprocessors * device.clock)
    dram = problem.least_bytes / (device.dram_gbs * 1e9)
    chunk_bytes = tile.lanes * word
    dram *= 1.0 + 0.08 * max(0.0, math.log2(128 / min(128, chunk_bytes)))
    flying = min(one.resident, divided(grid, device.multiprocessors)) * tile.warps * (tile.stages - 1) * one.stage_bytes
    dram *= max(1.0, device.dram_gbs * device.latency_ns / (device.multiprocessors * max(1, flying)))
    last = 1.5e-6 + one.parts * one.count * 4 / 4e11 if one.parts > 1 else 0.0
    return LAUNCH_SECONDS + 1.5e-6 + float((dram**3 + issue**3 + l2**3) ** (1 / 3)) + last
