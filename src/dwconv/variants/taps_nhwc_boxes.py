"""Tiles of taps_nhwc whose rows the copy engine copies, each as a box of a tensor (sm_90 and newer)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

from ..device import DeviceSpec
from ..plan import TensorMap
from ..problem import DepthwiseProblem, dense_strides
from .march import axes
from .streams import BULK_COPIES
from .strips import planar, up
from .taps_nhwc_tiles import Tile, cut, lane_registers

MOST_OF_BOX = 256  # elements, along a dimension
# Warps of a block, and blocks of a multiprocessor, that are worth a prediction where rows come as boxes.
BOX_WARPS = ((8, 1), (10, 1), (12, 1), (14, 1), (16, 1), (6, 2), (8, 2))
BOX_STAGES = (2, 3, 4)


def tensor_maps(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> tuple[TensorMap, TensorMap] | None:
    """x and y's gradient as the copy engine sees them, with a tile's rows as boxes; None where it can't copy those.

    problem: of its own dimensions.
    """
    planes, size = planar(problem), problem.element_bytes
    _, across = axes(planes, tile.turned)
    if device.sm < BULK_COPIES or tile.lanes < 32 or tile.stage_steps > 1 or across.apart > 1 or problem.aligned < 16:
        return None
    if problem.dims == 3 and problem.plane_strides != dense_strides(problem.x_shape, problem.layout):
        return None  # planes can't be counted through all images
    one = cut(planes, device, replace(tile, boxes=True))
    if one is None:
        return None
    (height, width), (out_height, out_width) = planes.size, planes.out_size
    image, _, row, column = planes.plane_strides
    if planes.batch == 1:
        image = max(image, row * height)
    channels, of_x = tile.lanes * tile.vector, tile.lanes * tile.vector // problem.multiplier

    def box(channels: int, columns: int) -> tuple[int, int, int, int]:
        return (channels, 1, columns, 1) if tile.turned else (channels, columns, 1, 1)

    def apart(*strides: int) -> tuple[int, int, int]:
        a, b, c = (stride * size for stride in strides)
        return a, b, c

    g_column, g_row = problem.out_channels, out_width * problem.out_channels
    found = (
        TensorMap(
            0,
            (problem.channels, width, height, problem.batch * (problem.size[0] if problem.dims == 3 else 1)),
            apart(column, row, image),
            box(of_x, one.kept),
            size,
        ),
        TensorMap(
            1,
            (problem.out_channels, out_width, out_height, planes.batch),
            apart(g_column, g_row, out_height * g_row),
            box(channels, tile.columns),
            size,
        ),
    )
    fits = (
        all(stride % 16 == 0 and 0 < stride < 2**40 for stride in each.strides)
        and math.prod(each.box) * size % 128 == 0
        and each.box[0] * size % 16 == 0
        and max(each.box) <= MOST_OF_BOX
        and max(each.sizes) < 2**31
        for each in found
    )
    within = column >= problem.channels and row >= width * column and image >= height * row
    return found if all(fits) and within else None


def boxed(problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> list[Tile]:
    """A tile with rows as boxes, of more or fewer warps and stages; itself where the copy engine can't copy its rows.

    problem: of its own dimensions.
    """
    if tensor_maps(problem, device, tile) is None:
        return [tile]
    registers = lane_registers(planar(problem), tile.turned, tile.taps, tile.columns, tile.vector, tile.depth_taps)
    needed = registers + (36 if tile.vector == 1 else 26)  # what ptxas needs beside them (sm_90, NVRTC 13.0)
    warps_of = [
        (warps, blocks)
        for warps, blocks in BOX_WARPS
        if warps % tile.chunks == 0 and needed <= device.registers // (32 * up(warps, 4) * blocks) // 8 * 8
    ]
    return [
        replace(tile, boxes=True, warps=warps, min_blocks=blocks, stages=stages)
        for (warps, blocks), stages in product(warps_of or [(tile.warps, tile.min_blocks)], BOX_STAGES)
    ]
