"""Tiles of taps_nhwc whose rows the copy engine copies, each as a box of a tensor (sm_90 and newer)."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .boxes import Maps, gradient_maps
from .march import axes
from .streams import LINE, MOST_SIZES
from .strips import planar, up
from .taps_nhwc_tiles import Tile, cut, lane_registers

# Warps of a block, and blocks of a multiprocessor, that are worth a prediction where rows come as boxes.
BOX_WARPS = ((8, 1), (10, 1), (12, 1), (13, 1), (14, 1), (16, 1), (6, 2), (8, 2))
BOX_STAGES = ((2, 1), (3, 1), (4, 1), (2, 2), (3, 2))  # stages, and steps of each
# Registers that a lane of one channel needs beside those that are counted, of up to SHORT columns and of more: 16 warps
# instead of 12 make 7×7 1 to 3 % faster, 10 instead of 8 with 14 columns make 31×31 12 % slower (H200, NVRTC 13.0).
LEAST_MORE, LONG_MORE, SHORT = 16, 36, 8
FEW_LINES = 2  # of L2, of a pixel
LONG, FEW_TAPS = 28, 25  # rows of a march, taps of a lane: stages of two steps pay where there are more (H200, 2026-11)


def tensor_maps(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Maps | None:
    """x and y's gradient with a tile's rows as boxes; None where the copy engine can't copy those.

    problem: of its own dimensions.
    """
    tile = replace(tile, boxes=True)
    one = cut(planar(problem), device, tile)
    if tile.lanes < 32 or one is None or (tile.stage_steps > 1 and not one.neighbours):
        return None
    pixel = problem.out_channels * problem.element_bytes
    if tile.vector == 1 and pixel <= FEW_LINES * LINE and problem.least_bytes > MOST_SIZES * device.l2_bytes:
        return None  # lanes' copies were faster: 485 µs, not 499, of 3×3 on 512² in float32 (H200, 2026-11)
    channels = tile.lanes * tile.vector
    x_box, g_box = (channels // problem.multiplier, one.kept), (channels, tile.columns)
    rows = (tile.stage_steps * one.rows if one.neighbours else 1, tile.stage_steps)
    return gradient_maps(problem, device, tile.turned, x_box, g_box, rows=rows)


def boxed(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> list[Tile]:
    """A tile with rows as boxes, of more or fewer warps and stages; itself where the copy engine can't copy its rows.

    problem: of its own dimensions.
    """
    if tile.stage_steps > 1 or tensor_maps(problem, device, tile) is None:
        return [tile]
    registers = lane_registers(planar(problem), tile.turned, tile.taps, tile.columns, tile.vector, tile.depth_taps)
    needed = registers + (26 if tile.vector > 1 else LEAST_MORE if tile.columns <= SHORT else LONG_MORE)
    warps_of = [
        (warps, blocks)
        for warps, blocks in BOX_WARPS
        if warps % tile.chunks == 0 and needed <= device.registers // (32 * up(warps, 4) * blocks) // 8 * 8
    ]
    warps_of = warps_of or [(tile.warps, tile.min_blocks)]
    along, _ = axes(planar(problem), tile.turned)
    two = replace(tile, boxes=True, warps=min(warps_of)[0], stages=2, stage_steps=2)
    long = along.stride == 1 and (along.out >= LONG or tile.taps[0] * tile.taps[1] > FEW_TAPS)
    most = 2 if long and tensor_maps(problem, device, two) is not None else 1
    return [
        replace(tile, boxes=True, warps=warps, min_blocks=blocks, stages=stages, stage_steps=steps)
        for (warps, blocks), (stages, steps) in product(warps_of, BOX_STAGES)
        if steps <= most
    ]
