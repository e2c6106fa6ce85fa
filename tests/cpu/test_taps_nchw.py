"""taps_nchw: its ways through a problem, each in shuffled orders of threads, and what its plans promise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import short_problems
from checks import check_filter_gradient, check_filter_gradient_in_any_order
from dwconv import emulator, reference
from dwconv.choose import candidates, choose
from dwconv.device import H200, PRESETS, DeviceSpec
from dwconv.plan import Plan, Rejection
from dwconv.problem import DepthwiseProblem
from dwconv.variants import REGISTRY
from dwconv.variants.banks import banked
from dwconv.variants.taps_nchw_cost import valid_share
from dwconv.variants.taps_nchw_geometry import geometry_of
from dwconv.variants.taps_nchw_layout import Geometry, Tile
from dwconv.variants.taps_nchw_tiles import tiles_of
from problems import make_filter_gradient_inputs, make_filter_gradients

VARIANT = REGISTRY["taps_nchw"]


def problem_of(batch, channels, size, taps, padding=0, **others) -> DepthwiseProblem:
    return short_problems.problem(batch, channels, size, taps, padding=padding, direction="grad_weight", **others)


def plan_of(problem: DepthwiseProblem, tile: Tile, device: DeviceSpec = H200) -> Plan:
    plan = VARIANT.plan(problem, device, tile)
    assert isinstance(plan, Plan), plan
    return plan


# A problem, a tile, and what of the geometry makes it a way of its own.
WAYS = {
    "planes of several images": (problem_of(5, 3, (7, 7), (3, 3), 1), Tile(7, 7, 3, 3, 64), "images"),
    "several channels": (problem_of(2, 20, (14, 14), (3, 3), 1, dtype="float16"), Tile(7, 14, 3, 3, 64), "channels"),
    "bands of rows": (problem_of(1, 2, (57, 60), (3, 3), 1), Tile(4, 10, 3, 3, 64), "row_bands"),
    "bands of columns": (problem_of(2, 2, (9, 300), (3, 3), 1, multiplier=2), Tile(4, 4, 3, 3, 64), "column_bands"),
    "bands of a sequence": (problem_of(1, 2, (1, 999), (1, 9), ((0, 0), (8, 0))), Tile(1, 7, 1, 9, 64), "column_bands"),
    "several parts": (problem_of(9, 1, (30, 28), (5, 5), 2, bias=True), Tile(7, 7, 5, 5, 64), "parts"),
    "tiles of taps": (problem_of(2, 2, (20, 20), (13, 11), ((6, 6), (5, 5))), Tile(7, 5, 5, 4, 64), "tap_tiles"),
    "tiles of taps, bias, strides": (
        problem_of(1, 2, (23, 25), (9, 9), 4, stride=(2, 3), bias=True, dtype="bfloat16"),
        Tile(4, 3, 3, 5, 64),
        "tap_tiles",
    ),
    "rows of taps, of several images": (
        problem_of(5, 6, (7, 7), (13, 13), 6, bias=True),
        Tile(7, 7, 4, 13, 128),
        "images",
    ),
    "rows of taps, on whole rows": (
        problem_of(2, 2, (9, 28), (5, 29), ((2, 2), (14, 14)), multiplier=2),
        Tile(2, 28, 1, 29, 64),
        "tap_tiles",
    ),
    "columns of taps, on whole columns": (
        problem_of(2, 2, (6, 12), (5, 9), ((2, 2), (4, 4)), dtype="float64"),
        Tile(6, 4, 5, 3, 64),
        "tap_tiles",
    ),
    "dilation": (problem_of(1, 3, (33, 33), (3, 3), 6, dilation=(6, 6)), Tile(7, 11, 3, 3, 64), "channels"),
    "float64": (problem_of(2, 2, (15, 16), (3, 3), 1, dtype="float64"), Tile(5, 4, 3, 3, 64), "channels"),
    "volumes": (problem_of(2, 9, (5, 7, 7), (3, 3, 3), 1, bias=True), Tile(7, 7, 3, 3, 64), "channels"),
    "volumes, depth strides": (
        problem_of(3, 2, (9, 8, 12), (3, 3, 5), 2, stride=(2, 1, 2), dilation=(3, 1, 1), bias=True, dtype="float16"),
        Tile(5, 4, 3, 5, 64),
        "parts",
    ),
    "volumes, more padding than depth": (
        problem_of(2, 3, (2, 9, 10), (2, 3, 3), ((4, 3), (1, 1), (1, 1)), multiplier=2, bias=True, dtype="bfloat16"),
        Tile(4, 5, 3, 3, 64),
        "channels",
    ),
    "volumes, no padding": (problem_of(2, 3, (6, 9, 40), (4, 3, 3), dtype="float64"), Tile(7, 4, 3, 3, 64), "parts"),
    "volumes, tiles of taps": (
        problem_of(1, 2, (4, 12, 12), (3, 9, 9), ((1, 1), (4, 4), (4, 4)), bias=True),
        Tile(4, 6, 5, 5, 64),
        "tap_tiles",
    ),
    "volumes, bands": (
        problem_of(2, 1, (3, 9, 300), (2, 3, 3), ((1, 0), (1, 1), (1, 1)), bias=True),
        Tile(4, 4, 3, 3, 64),
        "column_bands",
    ),
    "volumes, one tap of the depth": (
        problem_of(2, 9, (3, 8, 8), (1, 3, 3), ((0, 0), (1, 1), (1, 1)), stride=(2, 1, 1)),
        Tile(4, 8, 3, 3, 64),
        "channels",
    ),
    "volumes, a view": (
        problem_of(2, 3, (4, 7, 9), (3, 3, 3), 1, bias=True, x_strides=(1400, 400, 70, 9, 1)),
        Tile(7, 5, 3, 3, 64),
        "channels",
    ),
    "padding beyond the filter": (problem_of(2, 2, (5, 6), (3, 3), 5), Tile(4, 5, 3, 3, 64), "channels"),
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("size", "align"), [((7, 7), 32), ((15, 17), 32), ((157, 61), 128), ((300, 301), 128)])
def test_lines_stand_in_shared_memory_as_in_memory(size, align, dtype):
    """Modulo sectors of L2, and its lines where these are long: the copy engine is slower otherwise."""
    problem = problem_of(9, 5, size, (3, 3), 1, dtype=dtype)
    geometry = geometry_of(problem, H200, Tile(5, 4, 3, 3, 128))
    assert isinstance(geometry, Geometry)
    assert geometry.align == align
    elements = align // problem.element_bytes
    x, g, plane = geometry.x, geometry.g, math.prod(size)
    for pitches in (x, g):
        assert (pitches.plane - plane) % elements == 0 or geometry.channels == 1
        assert (pitches.image - problem.channels * plane) % elements == 0 or geometry.images == 1
    for begin in (geometry.x_begin, geometry.g_begin, geometry.stage_elements):
        assert begin % elements == 0
    assert geometry.head_bytes % align == 0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_a_problem(way):
    problem, tile, several = WAYS[way]
    geometry = geometry_of(problem, H200, tile)
    assert isinstance(geometry, Geometry)
    assert getattr(geometry, several) > 1
    plan = plan_of(problem, tile)
    check_filter_gradient_in_any_order(plan)
    check_filter_gradient(plan, order_seed=4, poison=True)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_where_all_threads_copy(way):
    problem, tile, _ = WAYS[way]
    plan = plan_of(problem, tile, PRESETS["sm_80"])
    assert dict(plan.constants)["BULK"] == 0
    assert plan.block == (tile.threads, 1, 1)
    check_filter_gradient_in_any_order(plan)
    check_filter_gradient(plan, order_seed=4, poison=True)


def test_a_warp_of_its_own_sends_stages_that_nothing_else_would_use_the_memory_of():
    problem = problem_of(64, 32, (28, 28), (3, 3), 1)
    for threads in (64, 128, 224):
        tile = Tile(7, 7, 3, 3, threads)
        plan, geometry = plan_of(problem, tile), geometry_of(problem, H200, tile)
        assert isinstance(geometry, Geometry)
        assert plan.block == (threads + 32, 1, 1)
        assert 2 <= geometry.stages <= 4
        assert geometry.blocks * (plan.shared_bytes + 1024) <= H200.shared_bytes


@pytest.mark.parametrize(
    ("size", "tile"), [((7, 7), Tile(7, 7, 3, 3, 64)), ((9, 10), Tile(7, 7, 3, 3, 64)), ((9, 10), Tile(4, 4, 3, 3, 64))]
)
def test_padding_takes_no_part_where_g_is_not_finite(size, tile):
    problem = problem_of(2, 3, size, (3, 3), 1, bias=True)
    x, grad = make_filter_gradient_inputs(problem, seed=1)
    grad[0, 0, 0, 3], grad[1, 1, -1, -1] = math.inf, math.nan  # rows and columns beside them are padding
    weight, bias = make_filter_gradients(problem)
    emulator.run_filter_gradient(plan_of(problem, tile), x, grad, weight.y, bias.y)
    found = torch.cat([weight.y.view(3, -1), bias.y.view(3, 1)], 1)
    assert found[0, :3].isfinite().all()  # the filter's first row doesn't meet g's first row inside the image
    assert found[0, 3:9].isinf().all()
    assert found[1, [2, 5, 6, 7, 8]].isfinite().all()
    assert found[1, [0, 1, 3, 4, 9]].isnan().all()
    assert reference.describe_mismatch(found, *reference.filter_gradient(x, grad, problem)) is None


def test_padding_in_depth_takes_no_part_where_g_is_not_finite():
    problem = problem_of(2, 3, (3, 7, 8), (3, 3, 3), 1, bias=True)
    x, grad = make_filter_gradient_inputs(problem, seed=1)
    grad[0, 0, 0, 3, 3], grad[1, 1, -1, 2, 2] = math.inf, math.nan  # planes beside them are padding
    weight, bias = make_filter_gradients(problem)
    emulator.run_filter_gradient(plan_of(problem, Tile(7, 4, 3, 3, 64)), x, grad, weight.y, bias.y)
    assert weight.y[0, 0, 0].isfinite().all()
    assert weight.y[0, 0, 1:].isinf().all()
    assert weight.y[1, 0, :2].isnan().all()
    assert weight.y[1, 0, 2].isfinite().all()
    assert bias.y.isfinite().tolist() == [False, False, True]
    found = torch.cat([weight.y.view(3, -1), bias.y.view(3, 1)], 1)
    assert reference.describe_mismatch(found, *reference.filter_gradient(x, grad, problem)) is None


def test_few_tiles_for_each_problem_and_little_memory():
    for batch, channels, size, taps in [
        (128, 32, (112, 112), (3, 3)),
        (128, 960, (7, 7), (5, 5)),
        (32, 128, (56, 56), (31, 31)),
        (1, 96, (56, 56), (7, 7)),
        (2048, 64, (4, 4), (3, 3)),
        (32, 768, (1, 768), (1, 768)),
    ]:
        padding = tuple((taps_ - 1, 0) if taps_ > 100 else (taps_ // 2, taps_ // 2) for taps_ in taps)
        plans = VARIANT.every_plan(problem_of(batch, channels, size, taps, padding), H200)
        assert 1 <= len(plans) <= 16
        for plan in plans:
            assert plan.partial_bytes <= 1 << 26
            assert plan.shared_bytes < H200.shared_bytes
            assert plan.arrivals <= channels


@pytest.mark.parametrize("arch", PRESETS)
def test_every_card_has_a_tile(arch):
    for dtype in ("float32", "float16", "float64"):
        for taps in ((3, 3), (7, 7), (31, 31)):
            problem = problem_of(4, 8, (28, 28), taps, taps[0] // 2, dtype=dtype)
            assert tiles_of(problem, PRESETS[arch])


def test_shared_memory_is_congruent_to_memory():
    """Pieces of 16 bytes are aligned in both, for every line of a stage."""
    for problem, tile, _ in WAYS.values():
        geometry = geometry_of(problem, H200, tile)
        assert isinstance(geometry, Geometry)
        vector, (*_, out_w), outputs = 16 // problem.element_bytes, problem.out_size, math.prod(problem.out_size)
        image, channel, *_, row, _ = problem.plane_strides
        assert problem.dims == 2 or geometry.images == 1  # volumes' planes are no equal steps apart
        for pitches, steps in (
            (geometry.x, (image, channel, row)),
            (geometry.g, (problem.out_channels * outputs, outputs, out_w)),
        ):
            if geometry.images > 1:
                assert (pitches.image - steps[0]) % vector == 0
            assert (pitches.plane - steps[1]) % vector == 0
            assert (pitches.row - steps[2]) % vector == 0
        assert geometry.x_begin % vector == geometry.g_begin % vector == geometry.stage_elements % vector == 0


def test_what_it_refuses():
    def reason(problem: DepthwiseProblem) -> str:
        (rejection,) = candidates(problem, H200, "taps_nchw")
        assert isinstance(rejection, Rejection)
        return rejection.reason

    problem = problem_of(2, 3, (8, 8), (3, 3), 1)
    assert "follow one another" in reason(replace(problem, x_strides=(600, 200, 16, 1)))
    assert "threads" in reason(replace(problem, multiplier=300))
    assert "computes grad_weight" in reason(replace(problem, direction="forward"))
    assert choose(replace(problem, multiplier=300), H200).variant == "one_tap_per_block"


def test_banks_and_shares_of_products():
    assert banked(tuple(7 * 4 * lane for lane in range(32)), 4) == 1  # odd steps
    assert banked(tuple(16 * lane for lane in range(32)), 16) == 4
    assert banked(tuple(32 * lane for lane in range(32)), 16) == 8
    assert valid_share(problem_of(1, 1, (7, 7), (7, 7), 3), 0) == pytest.approx(37 / 49)
    assert valid_share(problem_of(1, 1, (9, 9), (3, 3)), 1) == 1
