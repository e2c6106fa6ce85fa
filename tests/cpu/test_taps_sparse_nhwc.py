"""taps_sparse_nhwc under the emulator: every way through a problem, and that its plans know what the kernel does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from checks import check_filter_gradient
from dwconv.choose import candidates
from dwconv.compile import compile_plan
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.variants.taps_lines_tiles import Tile
from dwconv.variants.taps_sparse_nhwc import TapsSparseNhwc
from edge_plans import bits
from line_problems import (
    assert_in_kernel,
    cut_of,
    edges,
    layers,
    name,
    plan_of,
    plans_of,
    problem,
    reason,
    without_repair,
)

VARIANT = TapsSparseNhwc()
LAST = "channels_last"
EDGES, LAYERS = edges(LAST), layers(LAST)

# Ways that the tiles worth timing need not take.
WAYS = {
    "along rows": (
        problem(LAST, 1, 16, (15, 20), (2, 7), stride=(1, 2), padding=(1, 3), dtype="bfloat16", bias=True),
        Tile(True, (7, 2), 2, 2, 2, warps=4, stages=3),
    ),
    "rows of taps": (problem(LAST, 2, 16, (7, 7), 13, padding=6), Tile(False, (3, 13), 1, 2, 2, warps=4)),
    "rows and columns of taps": (
        problem(LAST, 1, 8, (9, 20), 31, padding=15, dtype="bfloat16", bias=True),
        Tile(False, (2, 9), 3, 1, 2, warps=4, cached=False),
    ),
    "pairs of lines, the last ones incomplete": (
        problem(LAST, 9, 8, (4, 4), 3, padding=1, dtype="bfloat16"),
        Tile(False, (3, 3), 1, 7, 2, warps=4),
    ),
    "lines, the last ones incomplete": (
        problem(LAST, 3, 8, (5, 20), 3, padding=1),
        Tile(False, (3, 3), 2, 4, 2, warps=4, stages=2),
    ),
    "two sets, of four channels": (problem(LAST, 9, 8, (6, 14), 3, padding=1), Tile(False, (3, 3), 2, 9, 4, warps=2)),
    "eight channels, channels that don't exist": (
        problem(LAST, 2, 20, (8, 8), 3, padding=1, dtype="bfloat16", bias=True),
        Tile(False, (3, 3), 1, 2, 8, warps=2, stages=2),
    ),
    "many parts": (problem(LAST, 1, 8, (250, 5), (1, 25), padding=(0, 12)), Tile(False, (1, 25), 1, 1, 2, warps=4)),
    "one part": (problem(LAST, 1, 8, (3, 3), 3, padding=1, bias=True), Tile(False, (3, 3), 1, 1, 2, warps=4)),
    "a view": (
        problem(LAST, 2, 8, (7, 8), 3, padding=1, x_strides=(9 * 9 * 24, 1, 9 * 24, 24)),
        Tile(False, (3, 3), 1, 2, 2, warps=4),
    ),
}
PLANS = plans_of(VARIANT, EDGES) + [plan_of(VARIANT, *way) for way in WAYS.values()]
NOT_REPAIRED = [without_repair(plan) for plan in PLANS[::9]]

# What is wrong: (in the kernel, instead)
MUTANTS = {
    "sums of columns, not of diagonals": ("W::kStrideB * kPitch + 1)", "W::kStrideB * kPitch)"),
    "rows of g of the segment before": (
        "static_cast<unsigned>(number - back - segment.first) <",
        "static_cast<unsigned>(segment.first - segment.first) <",
    ),
    "the row of g of another step": ("g[p][(Phase + W::kLive - back) % W::kLive]", "g[p][(Phase + back) % W::kLive]"),
    "the other channel's words": ("[channel / 2], channel % 2)", "[channel / 2], 1 - channel % 2)"),
    "the windows of other outputs": ("W::word_of(1, c)", "W::word_of(0, c)"),
    "a column of x too far": ("tap_b * W::kApartB * W::kSpreadB - W::kLead", "tap_b * W::kApartB * W::kSpreadB + 1"),
    "a stage that isn't cleared": ("= uint4{0, 0, 0, 0};", "= uint4{0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};"),
    "a part left out": (
        "unsigned part = first_part; part < end_part",
        "unsigned part = first_part + 1; part < end_part",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles the kernels of all tests at once, on every core."""
    build.build_many(PLANS + NOT_REPAIRED)


@pytest.mark.parametrize("plan", PLANS, ids=name)
def test_gradients_in_any_order_of_threads(plan):
    expected = bits(check_filter_gradient(plan))
    assert torch.equal(bits(check_filter_gradient(plan, order_seed=3)), expected)


@pytest.mark.parametrize("plan", PLANS, ids=name)
def test_infinities_beside_zeros_stay_where_they_belong(plan):
    check_filter_gradient(plan, order_seed=4, poison=True)


@pytest.mark.parametrize("plan", NOT_REPAIRED, ids=name)
def test_finite_inputs_need_no_second_computation(plan):
    check_filter_gradient(plan)


def test_the_tests_take_every_way():
    found = [dict(plan.constants) for plan in PLANS]
    for constant, values in {
        "TURNED": {0, 1},
        "OWN": {2, 4, 8},
        "X_BYTES": {4, 8, 16},
        "G_BYTES": {4, 8, 16},
        "CACHED": {0, 1},
        "VOLUME": {0, 1},
    }.items():
        assert {each[constant] for each in found} == values, constant
    assert any(each["WIDTH"] > 0 for each in found)
    assert any(each["SLAB"] < each["TAPS_A"] for each in found)
    assert {plan.problem.dtype for plan in PLANS} == {"float16", "bfloat16"}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistakes_are_noticed(mistake, monkeypatch):
    given = problem(LAST, 2, 16, (6, 12), 3, padding=1)
    plan = plan_of(VARIANT, given, Tile(False, (3, 3), 2, 2, 2, warps=4, stages=3))
    right, wrong = MUTANTS[mistake]
    text = build.kernel_text(VARIANT.stem)
    assert right in text, "the kernel has changed: make the mistake another way"
    mutant = build.load(text.replace(right, wrong), plan.constants, "a mutant")
    monkeypatch.setattr(build, "library", lambda _: mutant)
    with pytest.raises(AssertionError):
        check_filter_gradient(plan)


@pytest.mark.parametrize("way", WAYS)
def test_plans_know_what_the_kernel_does(way):
    given, tile = WAYS[way]
    one, plan = cut_of(VARIANT, given, tile), plan_of(VARIANT, given, tile)
    assert plan.shared_bytes == one.shared_bytes
    assert_in_kernel(
        plan,
        {
            "W::kStageBytes": one.layout.stage_bytes,
            "W::kGatesAt + dwconv::StageGates<Config::kStages, W::kThreads>::kBytes": plan.shared_bytes,
            "W::kSumsBytes": one.slab * one.layout.row_bytes * tile.warps,
            "W::kCount": one.count,
            "W::XPieces::kCopies": one.layout.x_pieces,
            "W::GPieces::kCopies": one.layout.g_pieces,
            "W::kLive": one.live,
            "W::kRows": one.rows,
            "W::kTapTilesA * W::kTapTilesB": one.march.tap_tiles,
            "W::kSets * W::kChunks * Config::kOwn / 2": one.layout.products,
        },
    )


def test_many_parts_are_gathered():
    plan = plan_of(VARIANT, *WAYS["many parts"])
    parts, gathered = plan.tiling[2], plan.tiling[5]
    assert 1 < gathered < parts
    assert plan.arrivals == -(-parts // gathered) + 1


def test_one_part_needs_no_memory_for_sums():
    plan = plan_of(VARIANT, *WAYS["one part"])
    assert (plan.grid, plan.partial_bytes, plan.arrivals) == ((1, 1, 1), 0, 0)


def test_what_it_refuses():
    given, tile = problem(LAST, 2, 16, (9, 9), 3, padding=1), Tile(False, (3, 3), 2, 2, 2)
    assert "tensor cores of sm_75" in reason(VARIANT.plan(given, PRESETS["sm_75"], tile))
    assert "shared memory" in reason(VARIANT.plan(given, H200, replace(tile, own=8, warps=16, stages=64)))
    assert "pieces" in reason(VARIANT.plan(replace(given, aligned=4), H200, replace(tile, lines=150, warps=1)))
    assert "words" in reason(VARIANT.plan(replace(given, aligned=2), H200, tile))
    assert "whole pairs" in reason(VARIANT.plan(replace(given, multiplier=3), H200, tile))
    assert "2**31" in reason(VARIANT.plan(problem(LAST, 9, 16, (9, 2**27), 3), H200, tile))

    def refused(other):
        [found] = candidates(other, H200, VARIANT.stem)
        return reason(found)

    assert "multiplier of 3" in refused(replace(given, multiplier=3))
    assert "not float32" in refused(replace(given, dtype="float32"))
    assert "channels_last" in refused(replace(given, layout="channels_first"))
    assert "grad_weight" in refused(replace(given, direction="forward"))
    assert not VARIANT.every_plan(given, PRESETS["sm_75"])


@pytest.mark.parametrize("given", LAYERS, ids=str)
def test_kernels_do_not_spill(given):
    plan = VARIANT.every_plan(given, PRESETS["sm_90"])[0]
    resources = compile_plan(plan).resources
    assert resources.spill_bytes == resources.stack_bytes == 0, f"{plan.tile}: {resources}"


@pytest.mark.parametrize("given", LAYERS, ids=str)
def test_parts_keep_the_card_busy_in_little_memory(given):
    plans = VARIANT.every_plan(given, H200)
    assert 0 < len(plans) <= 16
    for plan in plans:
        assert plan.partial_bytes <= 64 << 20
        assert plan.grid[0] >= 90
        assert plan.shared_bytes < H200.shared_bytes
