"""Tiles whose rows the copy engine copies as boxes, on problems that show its edges: for the emulator and for a GPU."""

from __future__ import annotations

from functools import partial

from dwconv.device import DeviceSpec
from dwconv.plan import Plan
from dwconv.problem import Epilogue
from dwconv.variants.boxes import copies_boxes
from dwconv.variants.sparse_nhwc import SparseNhwc
from dwconv.variants.sparse_rows import Tile as SparseTile
from dwconv.variants.taps_lines_tiles import Tile as LineTile
from dwconv.variants.taps_nhwc import TapsNhwc
from dwconv.variants.taps_nhwc_tiles import Tile as RowTile
from dwconv.variants.taps_sparse_nhwc import TapsSparseNhwc
from dwconv.variants.wide_nhwc import WideNhwc
from dwconv.variants.wide_rows import Tile as WideTile
from line_problems import problem
from short_problems import problem as any_problem

last = partial(problem, "channels_last")
wide = partial(last, dtype="float32")

# Of taps_nhwc: incomplete chunks and lines, narrow images, strides, multipliers, classes of rows, tiles of taps, depth.
box = partial(RowTile, lanes=32, vector=1, warps=2, boxes=True)
NHWC = [
    (wide(2, 40, (7, 9), 3, padding=1, bias=True), box(False, (3, 3), 5)),
    (wide(3, 80, (6, 14), 5, padding=2, dtype="float16"), box(False, (5, 5), 14, vector=2, stages=2)),
    (wide(2, 32, (9, 7), 7, padding=3, dtype="float64"), box(False, (7, 7), 7, warps=3, stages=3)),
    (wide(1, 64, (17, 23), 3, stride=2, padding=1, dtype="bfloat16"), box(False, (3, 3), 6, vector=2)),
    (wide(2, 16, (9, 20), 3, padding=1, multiplier=2), box(False, (3, 3), 8)),
    (wide(1, 32, (25, 27), 3, stride=(2, 1), padding=4, dilation=(3, 1)), box(False, (3, 3), 4, stages=4)),
    (wide(1, 32, (12, 28), (9, 13), padding=(4, 6), bias=True), box(False, (5, 13), 8)),
    (wide(1, 36, (20, 9), (3, 8), padding=(0, 3)), box(True, (8, 3), 6)),
    (wide(2, 32, (7, 8), 3, padding=1, x_strides=(9 * 9 * 48, 1, 9 * 48, 48)), box(False, (3, 3), 4)),
    (wide(2, 40, (5, 7, 9), 3, padding=1, bias=True), box(False, (3, 3), 4, depth_taps=3)),
    (wide(2, 32, (6, 9, 8), (4, 5, 5), stride=(2, 1, 1), padding=(1, 2, 2)), box(False, (5, 5), 4, depth_taps=2)),
    # stages of several steps
    (wide(3, 40, (9, 7), 7, padding=3, bias=True), box(False, (7, 7), 7, warps=3, stages=2, stage_steps=2)),
    (wide(2, 64, (15, 23), 5, stride=2, padding=2, dtype="float16"), box(False, (5, 5), 6, vector=2, stage_steps=3)),
    (wide(5, 32, (4, 20), 3, padding=1, multiplier=2), box(False, (3, 3), 8, stages=3, stage_steps=2)),
    (wide(1, 36, (20, 9), (3, 8), padding=(0, 3)), box(True, (8, 3), 6, stages=3, stage_steps=2)),
    (wide(2, 32, (5, 7, 9), 3, padding=1, bias=True), box(False, (3, 3), 4, depth_taps=3, stages=2, stage_steps=2)),
    (wide(1, 32, (12, 28), (9, 13), padding=(4, 6), bias=True), box(False, (5, 13), 8, stages=2, stage_steps=2)),
]

# Of taps_sparse_nhwc.
SPARSE = {
    "boxes, two senders, channels that don't exist": (
        last(9, 48, (14, 14), 7, padding=3, bias=True),
        LineTile(False, (7, 7), 2, 8, 4, stages=4, boxes=True),
    ),
    "boxes, rows of taps": (
        last(5, 32, (9, 14), 7, padding=3, dtype="bfloat16"),
        LineTile(False, (4, 7), 2, 8, 2, stages=3, boxes=True),
    ),
    "boxes of two sets": (
        last(5, 40, (6, 28), 5, padding=2),
        LineTile(False, (5, 5), 4, 8, 2, stages=3, boxes=True),
    ),
    "boxes with a stride": (
        last(5, 32, (17, 28), 5, stride=2, padding=2),
        LineTile(False, (5, 5), 2, 8, 4, stages=3, boxes=True),
    ),
    "boxes of 128 bytes, and of half of that": (
        last(3, 32, (7, 56), 3, padding=1, multiplier=2),
        LineTile(False, (3, 3), 7, 2, 8, stages=4, boxes=True),
    ),
    "boxes, lines of a part of the image": (
        last(2, 32, (5, 150), 5, padding=2, dtype="bfloat16"),
        LineTile(False, (5, 5), 8, 2, 4, stages=4, boxes=True),
    ),
    "boxes of one line": (
        last(2, 32, (7, 100), 5, padding=2),
        LineTile(False, (5, 5), 13, 1, 4, stages=4, boxes=True),
    ),
    "boxes, pairs of lines": (
        last(40, 32, (7, 7), 7, padding=3, bias=True),
        LineTile(False, (7, 7), 1, 32, 4, stages=3, boxes=True),
    ),
    "boxes of planes": (
        last(2, 32, (4, 5, 14), 3, padding=1, bias=True),
        LineTile(False, (3, 3), 2, 8, 4, stages=4, boxes=True),
    ),
    "boxes along rows": (
        last(2, 32, (30, 16), (3, 9), padding=(1, 4), bias=True),
        LineTile(True, (3, 3), 4, 4, 4, stages=4, boxes=True),
    ),
}

# Of wide_nhwc, whose outputs leave as boxes, too.
forward = partial(any_problem, layout="channels_last")
march = partial(WideTile, True, boxes=True, out_boxes=True)
stay = partial(WideTile, False, boxes=True, out_boxes=True)
WIDE = [
    # chunks of channels, images and columns that don't exist; blocks that begin and end inside of images
    (forward(3, 40, (9, 7), 7, padding=3, bias=True), march(32, 7, threads=64)),
    (forward(2, 72, (11, 16), 5, padding=2, dtype="float16"), march(64, 4, threads=128, vector=2, part_rows=4)),
    (forward(2, 40, (9, 30), 3, padding=1, dtype="bfloat16"), march(16, 4, threads=64, vector=2, stages=2)),
    (forward(3, 32, (10, 8), 3, padding=1), march(8, 4, threads=32, part_rows=13)),
    (forward(5, 24, (6, 5), 3, padding=1, dtype="float16"), march(8, 7, threads=64, part_rows=5)),
    # strips, strides, rows that no output reads
    (forward(1, 32, (16, 70), 5, stride=2, padding=2), march(32, 4, threads=64, stages=4, stage_rows=1, part_rows=3)),
    (forward(1, 64, (17, 15), 7, stride=(2, 3), padding=3), march(64, 4, threads=128, stage_rows=3)),
    (forward(2, 48, (13, 12), (3, 5), stride=(5, 1), padding=(1, 4), dtype="float16"), march(32, 7, threads=64)),
    # filters in shared memory: several images side by side, dilation, float64
    (forward(5, 40, (7, 7), 13, padding=6, bias=True), stay(8, 7, 7, 16, threads=64)),
    (forward(2, 24, (20, 33), 9, padding=4, dtype="float16"), stay(8, 5, 3, 8, threads=64, stage_rows=4, part_rows=7)),
    (forward(1, 32, (23, 25), 5, padding=6, dilation=(2, 3)), stay(32, 4, 4, 8, threads=64, stages=3)),
    (forward(2, 16, (13, 12), 5, stride=(2, 1), padding=2, dtype="float64"), stay(16, 3, 2, 4, threads=64)),
    # sequences, a row of which is two boxes
    (forward(1, 40, (1, 500), (1, 31), padding=(0, 15)), stay(32, 32, 1, 32, stages=2, stage_rows=1)),
    (forward(2, 8, (1, 600), (1, 3), padding=(0, (2, 0)), dtype="float16"), stay(8, 8, 1, 4, threads=64, stages=2)),
    # a crop of some channels, a multiplier, epilogues
    (forward(2, 32, (7, 8), 7, padding=3, x_strides=(9 * 9 * 48, 1, 9 * 48, 48)), march(32, 4, threads=64)),
    (forward(2, 24, (9, 8), 5, padding=2, multiplier=2), march(32, 4, threads=64)),
    (
        forward(2, 64, (9, 8), 3, padding=1, epilogue=Epilogue("silu", scale=True, shift=True), dtype="float16"),
        march(64, 7, threads=64, vector=2),
    ),
    (
        forward(2, 40, (9, 8), 7, padding=3, epilogue=Epilogue("relu", residual=True)),
        march(32, 7, threads=64, out_boxes=False),
    ),
    (forward(2, 24, (9, 20), 3, padding=1), march(24, 4, threads=72, vector=2, out_boxes=False)),
]


# Of sparse_nhwc: chunks of channels that are narrower than boxes or don't exist, several images, strips, strides.
half = partial(forward, dtype="float16")
brain = partial(forward, dtype="bfloat16")
steps = partial(SparseTile, tiles=1, boxes=True)
SPARSE_ROWS = [
    (half(3, 40, (9, 28), 7, padding=3, bias=True), steps(8, 2, stages=4, rows=2)),
    (brain(5, 72, (14, 14), 5, padding=2), steps(6, 4, stages=4, rows=2)),
    (half(2, 24, (5, 130), (3, 7), padding=(1, 3)), steps(3, 4, stages=3, rows=4)),
    (half(2, 40, (17, 30), 5, stride=2, padding=2, bias=True), steps(5, 4, stages=6, rows=2)),
    (brain(1, 64, (12, 29), 3, padding=1, x_strides=(12 * 29 * 80, 1, 29 * 80, 80)), steps(16, 2, stages=8, rows=1)),
    (
        brain(19, 40, (7, 7), 7, padding=3, epilogue=Epilogue("silu", scale=True, shift=True, residual=True)),
        steps(8, 2, stages=3, rows=7, whole=True),
    ),
    (half(3, 16, (30, 13), (17, 3), padding=(8, 1)), steps(8, 1, stages=4, rows=2, turned=True)),
    (half(2, 16, (1, 100), (1, 31), padding=(0, 15), bias=True), steps(4, 2, stages=6, rows=1)),
]


def forward_box_plans(device: DeviceSpec) -> list[Plan]:
    """The plans of WIDE and SPARSE_ROWS; none where the device has no copy engine."""
    if not copies_boxes(device):
        return []
    found = [WideNhwc().plan(given, device, tile) for given, tile in WIDE]
    found += [SparseNhwc().plan(given, device, tile) for given, tile in SPARSE_ROWS]
    assert all(isinstance(plan, Plan) and plan.maps for plan in found), found
    return found


def box_plans(device: DeviceSpec) -> list[Plan]:
    """The plans of all gradients of filters; none where the device has no copy engine."""
    if not copies_boxes(device):
        return []
    found = [TapsNhwc().plan(given, device, tile) for given, tile in NHWC]
    found += [TapsSparseNhwc().plan(given, device, tile) for given, tile in SPARSE.values()]
    assert all(isinstance(plan, Plan) and plan.maps for plan in found), found
    return found
