"""What tiles cost of variants whose kernels march over lines of outputs as matrices: predicted times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .march import axes
from .parts import gathered
from .streams import shares_lines
from .strips import divided
from .taps_lines_tiles import Cut, Tile

NORM = 3  # times beside each other take the norm of them, of this order


@dataclass(frozen=True, slots=True)
class Costs:
    """Constants of a variant's model. Instructions are a warp's, clocks a multiprocessor's.

    Attributes:
        product, piece, step, segment: instructions for a product, a copy, a step, a segment.
        idle_warps: issue slots are used as warps / (warps + idle_warps).
        tensor_clocks: of a product.
        copy_clocks: of shared memory, for a copy; its wavefronts take a clock each.
        l2_bytes: of a clock, to a multiprocessor.
        wait: latencies of DRAM that a stage takes, from when it is free.
        narrow, past_narrow: more DRAM time for each halving of 128 neighbouring bytes, through L1 and past it.
        past: more DRAM time past L1.
        thrash: more DRAM time for each doubling of the lines in flight beyond L1.
        box: instructions for a line's row that comes as a box; engine: clocks of the copy engine for a column of it.
        apart, together: more DRAM time of boxes that share lines of L2 with others, for each doubling of the bytes in
            flight of a multiprocessor beyond so many.
        start, parts, round: seconds beside the launch; to leave parts; of a round of loads of parts.
    """

    product: float
    piece: float
    step: float
    segment: float
    idle_warps: float
    tensor_clocks: float
    copy_clocks: float
    l2_bytes: float
    wait: float
    narrow: float
    past_narrow: float
    past: float
    thrash: float
    start: float
    parts: float
    round: float
    box: float = 0.0
    engine: float = 0.0
    apart: float = 0.0
    together: float = 1.0


def seconds(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, one: Cut, costs: Costs) -> float:
    """Predicted time: products, instructions, shared memory, L2 and DRAM beside each other, then the last blocks."""
    along, layout = axes(problem, tile.turned)[0], one.layout
    met = along.reached if along.filter == tile.taps[0] else min(1.0, 1.1 * along.reached)
    products, pieces = layout.products * tile.taps[0] * met, one.rows * layout.x_pieces + layout.g_pieces
    step = products * costs.product + one.rows * layout.loads[0] + layout.loads[1]
    step += costs.piece * pieces + costs.step
    if tile.boxes:
        step += costs.box * tile.lines * (one.rows + 1) / tile.warps
    wavefronts = one.rows * layout.wavefronts[0] + layout.wavefronts[1] + costs.copy_clocks * pieces
    segments = max(1.0, one.march.part_rows / one.march.line_rows)
    steps = one.march.part_rows + segments * (one.live - 1) * 0.5
    of_multiprocessor = divided(one.march.blocks, device.multiprocessors)
    full, rest = divmod(of_multiprocessor, one.resident)
    warps = of_multiprocessor * tile.warps
    instructions = steps * step + segments * costs.segment
    issue = instructions * (warps + costs.idle_warps * (full + bool(rest))) / 4 / device.clock
    tensor = steps * products * warps * costs.tensor_clocks / device.clock
    shared = steps * wavefronts * warps / device.clock
    l2 = problem.least_bytes * one.march.tap_tiles / (costs.l2_bytes * device.multiprocessors * device.clock)
    dram = problem.least_bytes / (device.dram_gbs * 1e9)
    flying = min(one.resident, of_multiprocessor) * (tile.stages - 1) * layout.flying_bytes
    together = min(128.0, layout.together_bytes)
    if tile.boxes:
        dram *= 1.0 + costs.narrow * math.log2(128 / together)
        if shares_lines(problem):
            dram *= 1.0 + costs.apart * max(0.0, math.log2(max(1.0, flying) / costs.together))
    elif tile.cached:
        lines = max(1.0, flying * 128 / together)
        dram *= 1.0 + costs.narrow * math.log2(128 / together)
        kept = device.l1_beside(one.resident * (one.shared_bytes + 1024))
        dram *= 1.0 + costs.thrash * max(0.0, math.log2(lines / kept))
    else:
        dram *= 1.0 + costs.past + costs.past_narrow * math.log2(128 / together)
    waits = steps * (full + bool(rest)) * costs.wait * device.latency_ns * 1e-9
    in_time = waits / (tile.stages - 1)
    columns = tile.lines * (one.rows * layout.box_columns[0] + layout.box_columns[1])
    engine = steps * columns * of_multiprocessor * costs.engine / device.clock
    times = dram, issue, tensor, shared, l2, in_time, engine
    body = float(sum(time**NORM for time in times) ** (1 / NORM))
    if min(layout.x_bytes, layout.g_bytes) == 2:  # a thread waits for such copies
        body += waits
    last = 0.0
    if one.march.parts > 1:
        last = costs.parts + costs.round * gathered(one.count // 4, 32 * tile.warps, one.march.parts)[1]
    return LAUNCH_SECONDS + costs.start + body + last
