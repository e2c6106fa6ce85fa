"""taps_nhwc under the emulator: every dtype, tile and edge of channels-last gradients of filters, and no spills."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

import line_problems
from box_tiles import NHWC, box
from checks import check_filter_gradient, check_filter_gradient_in_any_order
from dwconv.compile import compile_plan
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection
from dwconv.variants.march import axes
from dwconv.variants.taps_nhwc import TapsNhwc
from dwconv.variants.taps_nhwc_tiles import Tile
from line_problems import name, without_repair

VARIANT = TapsNhwc()
MOST = 2 if build.sanitizing() else 3  # tiles of a problem


problem = partial(line_problems.problem, "channels_last", dtype="float32")

EDGES = [
    problem(2, 72, (14, 19), 3, padding=1, dtype="float16"),
    problem(3, 144, (7, 7), 3, padding=1, dtype="bfloat16", bias=True),
    problem(9, 40, (4, 4), 3, padding=1),
    problem(2, 33, (12, 9), 5, padding=2, dtype="float16"),  # odd channels: copies of two bytes
    problem(1, 10, (9, 40), 5, padding=2, dtype="float64", bias=True),
    problem(2, 24, (14, 14), 7, padding=3, dtype="bfloat16", bias=True),
    problem(1, 12, (13, 31), (2, 7), padding=((1, 0), (0, 4)), bias=True),
    # strides and dilations, with a common divisor and without
    problem(1, 24, (17, 23), 3, stride=2, padding=1, dtype="float16"),
    problem(1, 20, (16, 30), 5, stride=2, padding=2),
    problem(1, 8, (19, 21), (2, 3), stride=(5, 4), padding=1),
    problem(1, 16, (13, 29), 3, padding=6, dilation=6, dtype="float16"),
    problem(1, 8, (25, 27), 3, stride=2, padding=4, dilation=(3, 4)),
    problem(1, 8, (26, 33), 3, stride=(4, 3), padding=5, dilation=(6, 2), dtype="float64", bias=True),
    # tiles of taps
    problem(2, 16, (7, 7), 13, padding=6, dtype="float16"),
    problem(1, 8, (14, 14), 27, padding=13),
    problem(1, 8, (12, 28), (9, 29), padding=(4, 14), bias=True),
    problem(1, 8, (20, 33), 31, padding=15, dtype="bfloat16"),
    problem(1, 8, (30, 16), (51, 5), padding=(25, 2)),
    problem(1, 8, (15, 40), (5, 51), padding=(2, 25), bias=True),
    problem(2, 12, (6, 30), (1, 11), padding=(0, 5), dtype="float16"),
    problem(1, 8, (33, 1), (31, 1), padding=(15, 0)),
    problem(2, 8, (9, 9), 1, stride=2),
    # sequences
    problem(3, 40, (1, 50), (1, 4), padding=(0, (3, 0)), dtype="float16", bias=True),
    problem(2, 64, (1, 70), (1, 31), padding=(0, 15)),
    problem(2, 16, (1, 41), (1, 9), stride=(1, 2), padding=(0, 9), dilation=(1, 3), dtype="bfloat16"),
    problem(1, 12, (1, 100), (1, 96), padding=(0, (95, 0)), dtype="float16"),
    # multipliers: neighbouring outputs read one input
    problem(2, 16, (9, 8), 3, padding=1, multiplier=2, dtype="float16"),
    problem(1, 5, (9, 8), 3, padding=1, multiplier=4, bias=True),
    problem(1, 7, (6, 9), 3, multiplier=3),
    # tensors that start between vectors, and views
    problem(1, 16, (6, 9), 3, padding=1, aligned=4),
    problem(1, 16, (6, 9), 3, padding=1, aligned=2, dtype="float16"),
    problem(2, 8, (7, 8), 3, padding=1, x_strides=(9 * 9 * 24, 1, 9 * 24, 24), dtype="float16"),
    # volumes: padding, strides and dilations of the depth, with bias and without
    problem(2, 40, (5, 7, 9), 3, padding=1, dtype="float16", bias=True),
    problem(2, 32, (4, 6, 20), 3, padding=1),
    problem(1, 24, (9, 8, 11), (3, 3, 5), stride=(2, 1, 2), padding=2, dilation=(3, 1, 1), dtype="bfloat16", bias=True),
    problem(3, 16, (2, 5, 6), (2, 3, 3), padding=((4, 3), (1, 1), (1, 1)), bias=True),
    problem(2, 32, (6, 9, 8), (4, 5, 5), padding=(0, 2, 2), dtype="float64"),
    problem(1, 8, (4, 12, 12), (3, 13, 13), padding=(1, 6, 6), dtype="float16", bias=True),
    problem(2, 8, (5, 9, 1), (3, 3, 1), padding=(1, 1, 0), bias=True),
    problem(2, 8, (4, 6, 7), 3, padding=1, multiplier=2, stride=(2, 2, 1), bias=True),
    problem(2, 8, (4, 5, 6), 3, padding=1, x_strides=(12000, 1, 1500, 160, 16), bias=True),
    # no output meets a row of x
    problem(1, 16, (5, 1, 13), (3, 1, 2), stride=2, padding=((0, 9), (9, 0), 1), dilation=(3, 3, 1), bias=True),
]


def plans_of(given, most=MOST):
    """Some of the plans of a problem, the best and the last one among them."""
    plans = VARIANT.every_plan(given, H200)
    assert plans, VARIANT.candidates(given, H200)
    return plans[:: max(1, -(-(len(plans) - 1) // (most - 1)))] if most > 1 else plans[:1]


# Several taps of the depth a lane: all of them, or tiles with taps that do not exist; one tile a warp, or more.
DEPTHS = [
    (problem(2, 40, (5, 7, 9), 3, padding=1, bias=True), Tile(False, (3, 3), 4, 32, 1, warps=2, depth_taps=3)),
    (problem(2, 40, (5, 7, 9), 3, padding=1), Tile(False, (3, 3), 5, 8, 1, warps=3, depth_taps=2)),
    (problem(1, 64, (4, 6, 9), (5, 3, 5), padding=2), Tile(False, (3, 5), 4, 32, 1, stages=2, depth_taps=3)),
    (
        problem(2, 24, (9, 8, 11), (3, 3, 5), stride=(2, 1, 2), padding=2, dilation=(3, 1, 1), dtype="bfloat16"),
        Tile(False, (3, 5), 3, 8, 2, warps=3, stages=3, depth_taps=2),
    ),
    (
        problem(3, 16, (2, 5, 6), (4, 3, 3), padding=((4, 3), (1, 1), (1, 1)), bias=True, dtype="float16"),
        Tile(True, (3, 2), 5, 8, 1, warps=2, depth_taps=3),
    ),
    (
        problem(2, 32, (3, 9, 8), (2, 5, 5), stride=(1, 2, 1), dtype="float64"),
        Tile(False, (3, 5), 4, 32, 1, warps=4, depth_taps=2),
    ),
    (problem(2, 8, (4, 6, 7), 3, padding=1, multiplier=2, bias=True), Tile(False, (3, 3), 7, 16, 1, depth_taps=3)),
    (
        problem(2, 8, (4, 5, 6), 3, padding=1, x_strides=(12000, 1, 1500, 160, 16)),
        Tile(False, (3, 3), 6, 8, 1, depth_taps=3),
    ),
]
TILES = [plan for given in EDGES for plan in plans_of(given)]
TILES += [plan for given, tile in DEPTHS + NHWC if isinstance(plan := VARIANT.plan(given, H200, tile), Plan)]


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


def test_waves_are_parts_of_whole_rows_of_tiles():
    given, tile = problem(9, 8, (9, 10), (19, 11), padding=(9, 5)), Tile(False, (3, 11), 5, 8, 1, warps=2)
    waves = VARIANT.plan(given, H200, replace(tile, waves=8))
    assert isinstance(waves, Plan)
    assert waves.tiling[3] % 9 == 0
    check_filter_gradient_in_any_order(waves)


def test_tiles_of_several_depth_taps_are_legal():
    plans = [VARIANT.plan(given, H200, tile) for given, tile in DEPTHS]
    assert all(isinstance(plan, Plan) for plan in plans), plans
    assert {dict(plan.constants)["TAPS_D"] for plan in plans if isinstance(plan, Plan)} == {2, 3}


def test_tiles_of_boxes_are_legal():
    plans = [VARIANT.plan(given, H200, tile) for given, tile in NHWC]
    assert all(isinstance(plan, Plan) and plan.maps for plan in plans), plans
    assert {dict(plan.constants)["EVICT_FIRST"] for plan in plans if isinstance(plan, Plan)} == {0, 1}


def test_what_no_box_holds_is_copied_by_lanes():
    tile = box(False, (3, 3), 5)
    for given in (
        problem(2, 42, (7, 9), 3, padding=1),  # pixels that are no multiples of 16 bytes
        problem(2, 40, (7, 9), 3, padding=1, aligned=4),
        problem(2, 40, (7, 9), 3, padding=2, dilation=2),  # columns of classes
        problem(2, 32, (4, 5, 6), 3, padding=1, x_strides=(12000, 1, 3000, 320, 32)),
    ):
        assert isinstance(VARIANT.plan(given, H200, tile), Rejection)
        assert not any(plan.maps for plan in VARIANT.every_plan(given, H200))
    assert "sm_80" in VARIANT.plan(problem(2, 40, (7, 9), 3, padding=1), PRESETS["sm_80"], tile).reason


def test_the_last_block_adds_many_parts_in_slices():
    given = problem(2, 8, (61, 9), 3, padding=1)
    plan = VARIANT.every_plan(given, H200)[0]
    assert plan.grid[0] > 8
    assert plan.arrivals == 1
    assert plan.partial_bytes < 1 << 20
    check_filter_gradient(plan)


def test_blocks_that_gather_parts_leave_the_last_one_few():
    tile = Tile(False, (5, 5), 4, 32, 1, warps=2)
    plan = VARIANT.plan(problem(3, 64, (42, 5), 5, padding=2), H200, tile)
    assert isinstance(plan, Plan)
    parts, gathered = plan.tiling[2], plan.tiling[5]
    assert 1 < gathered < parts
    assert plan.arrivals == 2 * (-(-parts // gathered) + 1)
    check_filter_gradient_in_any_order(plan)


def test_a_problem_of_one_part_needs_no_memory_for_sums():
    plan = VARIANT.every_plan(problem(1, 8, (3, 3), 3, padding=1), H200)[0]
    assert (plan.grid, plan.partial_bytes, plan.arrivals) == ((1, 1, 1), 0, 0)
    check_filter_gradient(plan)


def test_lattices_of_strides_and_dilations():
    along, across = axes(problem(1, 8, (99, 99), 3, stride=(4, 3), dilation=(6, 2)), False)
    assert (along.classes, along.stride) == (3, 2)
    assert (across.classes, across.stride) == (2, 3)


def test_lanes_copy_no_more_pieces_than_a_word_has_bits():
    """11 steps of three rows of one channel a lane are 33 pieces of four bytes."""
    sequence = problem(2, 16, (99,), 31, stride=3, dilation=2, padding=3, bias=True, aligned=4).lifted(2)
    found = list(VARIANT.candidates(sequence, PRESETS["sm_89"]))
    assert any("33 pieces" in each.reason for each in found if isinstance(each, Rejection))
    check_filter_gradient(next(each for each in found if isinstance(each, Plan)))


def test_multipliers_that_divide_no_lanes_are_rejected():
    found = list(VARIANT.candidates(problem(1, 2, (9, 9), 3, multiplier=5), H200))
    assert all(isinstance(each, Rejection) for each in found)
    assert "multiplier of 5" in found[0].reason
    tile = Tile(False, (3, 3), 4, 16, 1)
    assert isinstance(VARIANT.plan(problem(1, 2, (9, 9), 3, multiplier=5), H200, tile), Rejection)


LAYERS = [
    problem(128, 144, (56, 56), 3, padding=1, dtype="float16"),
    problem(128, 96, (112, 112), 3, stride=2, padding=1),
    problem(128, 240, (28, 28), 5, padding=2, dtype="bfloat16"),
    problem(128, 384, (14, 14), 7, padding=3, bias=True),
    problem(32, 128, (56, 56), 31, padding=15, dtype="float16"),
    problem(8, 4096, (1, 2048), (1, 4), padding=(0, (3, 0)), dtype="bfloat16"),
    problem(8, 54, (16, 56, 56), 3, padding=1, dtype="float16"),
    problem(2, 64, (32, 64, 64), 5, padding=2, bias=True),
]


@pytest.mark.parametrize("given", LAYERS, ids=str)
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_kernels_do_not_spill(given, arch):
    plan = VARIANT.every_plan(given, PRESETS[arch])[0]
    assert isinstance(plan, Plan)
    assert compile_plan(plan).resources.spill_bytes == 0
    assert compile_plan(plan).resources.stack_bytes == 0


@pytest.mark.parametrize("given", LAYERS, ids=str)
def test_parts_keep_the_card_busy_in_little_memory(given):
    for plan in VARIANT.every_plan(given, H200):
        assert plan.partial_bytes <= 64 << 20
        assert plan.grid[0] >= 100


def test_few_tiles_to_time():
    assert all(0 < len(VARIANT.every_plan(given, H200)) <= 16 for given in EDGES + LAYERS)
