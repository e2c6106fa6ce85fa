"""taps_planes_nchw under the emulator: every edge of gradients of filters of small planes, and no spills."""

from __future__ import annotations

from functools import partial

import pytest

import line_problems
from checks import check_filter_gradient, check_filter_gradient_in_any_order
from dwconv.compile import compile_plan
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection
from dwconv.variants.taps_planes_nchw import TapsPlanesNchw, Tile
from line_problems import name, without_repair

VARIANT = TapsPlanesNchw()
MOST = 2  # tiles of a problem


problem = partial(line_problems.problem, "channels_first")

EDGES = [
    problem(16, 16, (7, 7), 3, padding=1),
    problem(19, 24, (7, 7), 5, padding=2, dtype="bfloat16", bias=True),
    problem(3, 16, (7, 7), 13, padding=6),
    problem(9, 16, (6, 14), 3, padding=1),
    problem(5, 16, (4, 14), 7, padding=3, dtype="bfloat16", bias=True),
    # columns in pairs and one by one, of one row and of two
    problem(2, 8, (5, 15), 3, padding=1, bias=True),
    problem(11, 12, (8, 8), 3, padding=1, dtype="bfloat16", bias=True),
    problem(3, 8, (5, 6), (2, 3), padding=((1, 0), (0, 1)), bias=True),
    problem(2, 8, (4, 2), 1),
    problem(2, 64, (1, 16), (1, 4), padding=(0, (3, 0))),
    # rows of several matrices, of which some meet
    problem(3, 8, (4, 28), 3, padding=1, bias=True),
    problem(3, 8, (3, 21), 5, padding=2, dtype="bfloat16"),
    # strides and dilations
    problem(10, 16, (6, 14), 3, stride=2, padding=1),
    problem(4, 16, (6, 14), 3, padding=2, dilation=2),
    problem(4, 8, (6, 16), 5, stride=(1, 2), padding=4, dilation=(1, 2), bias=True),
    problem(4, 16, (7, 6), 3, stride=(2, 1), padding=3, dilation=(3, 2), bias=True),
    problem(4, 16, (9, 3), 3, stride=(4, 1), padding=1, dtype="bfloat16", bias=True),
    # neighbouring outputs read one input; images that lie apart
    problem(3, 8, (5, 12), 3, padding=1, multiplier=2, bias=True),
    problem(2, 8, (7, 8), 3, padding=1, x_strides=(7 * 8 * 24, 56, 8, 1)),
]


def plans_of(given, most=MOST):
    """Some of the plans of a problem, the best and the last one among them."""
    plans = VARIANT.every_plan(given, H200)
    assert plans, list(VARIANT.candidates(given, H200))
    return plans[:: max(1, -(-(len(plans) - 1) // (most - 1)))]


TILES = [plan for given in EDGES for plan in plans_of(given)]


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles the kernels of all tests at once, on every core."""
    build.build_many(TILES + [without_repair(plan) for plan in TILES[::MOST]])


@pytest.mark.parametrize("plan", TILES, ids=name)
def test_tiles_in_any_order_of_threads(plan):
    check_filter_gradient_in_any_order(plan)


@pytest.mark.parametrize("plan", TILES[::MOST], ids=name)
def test_finite_inputs_need_no_second_computation(plan):
    check_filter_gradient(without_repair(plan))


@pytest.mark.parametrize("plan", TILES, ids=name)
def test_infinities_beside_zeros_stay_where_they_belong(plan):
    check_filter_gradient(plan, poison=True)


@pytest.mark.parametrize(("own", "images"), [(1, 16), (2, 8), (4, 16), (8, 8)])
def test_stretches_between_pieces_of_16_bytes(own, images):
    tile = Tile(3, images, own, warps=2, stages=2)
    plan = VARIANT.plan(problem(37, 24, (7, 7), 3, padding=1), H200, tile)
    assert isinstance(plan, Plan)
    check_filter_gradient(plan)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_tiles_of_taps(taps):
    plan = VARIANT.plan(problem(9, 8, (5, 7), 5, padding=2, bias=True), H200, Tile(taps, 8, 1, warps=4))
    assert isinstance(plan, Plan)
    assert plan.grid[0] == 2 * -(-5 // taps) * plan.tiling[2]
    check_filter_gradient(plan)
    check_filter_gradient(plan, poison=True)


def test_parts_of_images_are_added_up():
    plan = VARIANT.plan(problem(61, 16, (7, 7), 3, padding=1, bias=True), H200, Tile(3, 8, 2, warps=4))
    assert isinstance(plan, Plan)
    assert plan.grid[0] == 16
    assert plan.arrivals == 2
    check_filter_gradient_in_any_order(plan)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (problem(2, 16, (33, 33), 3, padding=1), "wider than"),
        (problem(2, 9, (7, 7), 3, padding=1), "multiples of 16 bytes"),
        (problem(2, 16, (7, 7), 3, padding=1, aligned=8), "multiples of 16 bytes"),
        (problem(2, 8, (6, 8), 3, padding=1, x_strides=(8 * 80, 80, 10, 1)), "aren't dense"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value),
)
def test_what_is_no_stretch_of_whole_pieces_is_rejected(given, reason):
    found = list(VARIANT.candidates(given, H200))
    assert all(isinstance(each, Rejection) for each in found)
    assert reason in found[0].reason


@pytest.mark.parametrize(("multiplier", "own"), [(1, 3), (2, 1), (2, 3)])
def test_warps_have_whole_channels(multiplier, own):
    found = VARIANT.plan(problem(2, 16, (7, 7), 3, padding=1, multiplier=multiplier), H200, Tile(3, 8, own, warps=4))
    assert isinstance(found, Rejection)
    assert "whole channels" in found.reason


LAYERS = [
    problem(128, 960, (7, 7), 3, padding=1),
    problem(128, 960, (7, 7), 5, padding=2, dtype="bfloat16"),
    problem(128, 768, (7, 7), 7, padding=3, bias=True),
    problem(32, 1024, (7, 7), 13, padding=6),
    problem(128, 384, (14, 14), 3, padding=1),
    problem(128, 384, (14, 14), 7, padding=3, dtype="bfloat16", bias=True),
    problem(128, 672, (14, 14), 5, stride=2, padding=2),
    problem(128, 240, (28, 28), 3, stride=2, padding=1),
    problem(32, 512, (14, 14), 27, padding=13),
]


@pytest.mark.parametrize("given", LAYERS, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_do_not_spill(given, arch):
    plan = VARIANT.every_plan(given, PRESETS[arch])[0]
    assert compile_plan(plan).resources.spill_bytes == 0
    assert compile_plan(plan).resources.stack_bytes == 0


@pytest.mark.parametrize("given", LAYERS, ids=str)
def test_parts_keep_the_card_busy_in_little_memory(given):
    for plan in VARIANT.every_plan(given, H200):
        assert plan.partial_bytes <= 64 << 20
        assert plan.grid[0] >= 60


def test_few_tiles_to_time():
    assert all(0 < len(VARIANT.every_plan(given, H200)) <= 12 for given in EDGES + LAYERS)
