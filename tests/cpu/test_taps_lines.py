"""Kernels that march over lines of outputs as matrices: taps_matrix_nchw under the emulator, every way through it, and
what its plans have in common with those of taps_sparse_nhwc (which test_taps_sparse_nhwc.py runs).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from checks import check_filter_gradient
from dwconv.choose import candidates
from dwconv.compile import compile_plan
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem
from dwconv.variants.taps_lines_cost import seconds
from dwconv.variants.taps_lines_tiles import Tile, across_axis, line_shapes, tap_rows
from dwconv.variants.taps_matrix_nchw import TapsMatrixNchw
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

VARIANT = TapsMatrixNchw()
BOTH = (VARIANT, TapsSparseNhwc())
FIRST = "channels_first"
EDGES, LAYERS = edges(FIRST), layers(FIRST)

# Ways that the tiles worth timing need not take.
WAYS = {
    "rows of taps": (problem(FIRST, 2, 4, (7, 7), 13, padding=6), Tile(False, (3, 13), 1, 2, 2, warps=2)),
    "rows and columns of taps": (
        problem(FIRST, 1, 4, (9, 20), 31, padding=15, dtype="bfloat16", bias=True),
        Tile(False, (2, 8), 3, 1, 2, warps=2),
    ),
    "lines, the last ones incomplete": (
        problem(FIRST, 9, 3, (4, 4), 3, padding=1, dtype="bfloat16"),
        Tile(False, (3, 3), 1, 7, 1, warps=2, stages=2),
    ),
    "two sets, channels that don't exist": (
        problem(FIRST, 3, 5, (6, 56), 3, padding=1),
        Tile(False, (3, 3), 7, 3, 2, warps=2, stages=3),
    ),
    "dilated windows of four matrices": (
        problem(FIRST, 1, 3, (9, 60), (2, 7), stride=(1, 2), padding=(0, 9), dilation=(3, 6), bias=True),
        Tile(False, (2, 7), 4, 1, 1, warps=2),
    ),
    "a multiplier of three": (
        problem(FIRST, 2, 5, (6, 9), 3, padding=1, multiplier=3, dtype="bfloat16"),
        Tile(False, (3, 3), 2, 2, 1, warps=4),
    ),
    "two channels of x, two outputs each": (
        problem(FIRST, 2, 5, (6, 8), (3, 5), padding=(1, 2), multiplier=2, bias=True),
        Tile(False, (3, 5), 1, 2, 4, warps=2),
    ),
    "many parts": (problem(FIRST, 1, 4, (250, 5), (1, 25), padding=(0, 12)), Tile(False, (1, 25), 1, 1, 4, warps=1)),
    "one part": (problem(FIRST, 1, 2, (3, 3), 3, padding=1, bias=True), Tile(False, (3, 3), 1, 1, 1, warps=2)),
    "a view": (
        problem(FIRST, 2, 3, (7, 8), 3, padding=1, x_strides=(1600, 400, 20, 1)),
        Tile(False, (3, 3), 1, 2, 1, warps=2),
    ),
}
PLANS = plans_of(VARIANT, EDGES) + [plan_of(VARIANT, *way) for way in WAYS.values()]
NOT_REPAIRED = [without_repair(plan) for plan in PLANS[::9]]

# What is wrong: (in the kernel, instead)
MUTANTS = {
    "sums of columns, not of diagonals": ("W::kStrideB * kPitch + 1)", "W::kStrideB * kPitch)"),
    "windows that begin at the lead": ("(v * W::kSpreadB + C::kLead)", "(v * W::kSpreadB)"),
    "rows of g of the segment before": (
        "static_cast<unsigned>(number - back - segment.first) >=",
        "static_cast<unsigned>(segment.first - segment.first) >=",
    ),
    "the row of g of another step": ("g[o][(Phase + W::kLive - back) % W::kLive]", "g[o][(Phase + back) % W::kLive]"),
    "other groups in the matrix": ("lane % 8 + lane / 16 * 8", "lane % 8 + lane / 8 % 2 * 8"),
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
        "OWN": {1, 2, 4},
        "X_BYTES": {2, 4, 8},
        "G_BYTES": {2, 4, 8},
        "VOLUME": {0, 1},
        "LEAD": {0, 1, 2, 3},
    }.items():
        assert {each[constant] for each in found} >= values, constant
    assert any(each["WIDTH"] > 0 for each in found)
    assert any(each["SLAB"] < each["TAPS_A"] for each in found)
    assert {plan.problem.dtype for plan in PLANS} == {"float16", "bfloat16"}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistakes_are_noticed(mistake, monkeypatch):
    given = problem(FIRST, 2, 6, (6, 12), 3, padding=1)
    plan = plan_of(VARIANT, given, Tile(False, (3, 3), 2, 2, 2, warps=2, stages=3))
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
    assert plan.shared_bytes == one.shared_bytes >= one.slab * one.layout.row_bytes * tile.warps
    assert plan.shared_bytes >= 16 * (plan.block[0] + 1)  # for the last block
    assert_in_kernel(
        plan,
        {
            "W::kStageBytes * Config::kWarps": one.layout.stage_bytes,
            "W::kCount": one.count,
            "W::XPieces::kCopies": one.layout.x_pieces,
            "W::GPieces::kCopies": one.layout.g_pieces,
            "W::kLive": one.live,
            "W::kRows": one.rows,
            "W::kTapTilesA * W::kTapTilesB": one.march.tap_tiles,
            "W::kSets * W::kMatrices * Config::kOwn": one.layout.products,
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
    given, tile = problem(FIRST, 2, 16, (9, 9), 3, padding=1), Tile(False, (3, 3), 2, 2, 2)
    assert "tensor cores of sm_75" in reason(VARIANT.plan(given, PRESETS["sm_75"], tile))
    assert "shared memory" in reason(VARIANT.plan(given, H200, replace(tile, warps=16, stages=64)))
    assert "pieces" in reason(VARIANT.plan(replace(given, batch=99), H200, replace(tile, lines=99)))
    assert "divide each other" in reason(VARIANT.plan(replace(given, multiplier=3), H200, tile))
    assert "2**31" in reason(VARIANT.plan(problem(FIRST, 9, 16, (9, 2**27), 3), H200, tile))

    def refused(other):
        [found] = candidates(other, H200, VARIANT.stem)
        return reason(found)

    assert "not float32" in refused(replace(given, dtype="float32"))
    assert "channels_first" in refused(replace(given, layout="channels_last"))
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


# ---- what both share ----


def layout_of(variant):
    return variant.layouts[0]


@pytest.mark.parametrize("variant", BOTH, ids=lambda variant: variant.stem)
def test_candidates_come_in_order_of_predicted_time(variant):
    for given in layers(layout_of(variant)):
        found = variant.every_plan(given, H200)
        times = [plan.predicted_seconds for plan in found]
        assert times == sorted(times)
        assert all(0 < time < 1 for time in times)


@pytest.mark.parametrize("variant", BOTH, ids=lambda variant: variant.stem)
def test_rows_of_outputs_are_all_some_blocks(variant):
    """Parts cover the positions, none of them is empty, and positions are all output rows of all lines."""
    for given in edges(layout_of(variant)):
        for plan in variant.every_plan(given, H200):
            images, lines, parts, part_rows, positions, gathered = plan.tiling[:6]
            assert (parts - 1) * part_rows < positions <= parts * part_rows
            assert 1 <= gathered <= parts
            assert images == given.batch * (given.out_size[0] if given.dims == 3 else 1)
            constants = dict(plan.constants)
            outputs = lines * 8 * constants["GROUPS"] * positions // -(-lines // constants["LINES"])
            assert outputs >= images * given.out_size[-1] * given.out_size[-2]


@pytest.mark.parametrize("variant", BOTH, ids=lambda variant: variant.stem)
def test_more_work_takes_longer(variant):
    layout = layout_of(variant)
    given, tile = problem(layout, 32, 64, (28, 28), 3, padding=1), Tile(False, (3, 3), 4, 4, 4)

    def predicted(other: DepthwiseProblem, tile: Tile = tile) -> float:
        return seconds(other, H200, tile, cut_of(variant, other, tile), variant.costs)

    assert predicted(replace(given, batch=128)) > predicted(given)
    assert predicted(replace(given, bias=True)) >= predicted(given)
    more_taps = replace(given, filter=(9, 3), padding=((4, 4), (1, 1)))
    assert predicted(more_taps) > predicted(given)
    assert predicted(replace(given, aligned=4)) > predicted(given)  # more copies, each of fewer bytes


@pytest.mark.parametrize("variant", BOTH, ids=lambda variant: variant.stem)
@pytest.mark.parametrize("arch", [arch for arch, device in PRESETS.items() if device.sm >= 80])
def test_every_card_has_tiles_that_fit(variant, arch):
    device = PRESETS[arch]
    for given in layers(layout_of(variant)):
        plans = variant.every_plan(given, device)
        assert plans
        assert all(isinstance(plan, Plan) and plan.shared_bytes <= device.shared_bytes - 1024 for plan in plans)


def test_lines_hold_most_of_a_product():
    for width in range(1, 300):
        for groups, lines in line_shapes(width, 16):
            assert groups * lines <= 16
            assert groups * (lines + 1) > 16 or groups * lines == 16
    assert [tap_rows(taps, 8) for taps in (5, 8, 9)] == [[5], [8], [5, 3]]


def test_columns_stay_together_channels_first():
    given = problem(FIRST, 1, 8, (99, 99), 3, stride=(4, 3), dilation=(6, 2))
    across = across_axis(given, False)
    assert (across.classes, across.stride, across.apart) == (1, 3, 1)
    across = across_axis(replace(given, layout="channels_last"), False)
    assert (across.classes, across.stride, across.apart) == (2, 3, 2)
