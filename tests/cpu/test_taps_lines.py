"""Kernels that take lines of outputs as matrices, taps_matrix_nchw and taps_sparse_nhwc, under the emulator: every way
through them, and that their plans know what they do.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from checks import check_filter_gradient, check_filter_gradient_in_any_order
from dwconv.choose import candidates
from dwconv.compile import compile_plan
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem
from dwconv.variants.taps_lines_cost import seconds
from dwconv.variants.taps_lines_tiles import Tile, across_axis, line_shapes, tap_rows
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
from line_ways import BOTH, FIRST, LAST, MATRIX, MUTANTS, SPARSE, TAKEN, WAYS, numbers_of, sums_bytes

PLANS = {
    variant: plans_of(variant, edges(variant.layouts[0])) + [plan_of(variant, *way) for way in WAYS[variant].values()]
    for variant in BOTH
}
ALL = [plan for plans in PLANS.values() for plan in plans]
NOT_REPAIRED = [without_repair(plan) for plans in PLANS.values() for plan in plans[::9]]

every_variant = pytest.mark.parametrize("variant", BOTH, ids=lambda variant: variant.stem)
every_layer = pytest.mark.parametrize(
    ("variant", "given"),
    [(variant, given) for variant in BOTH for given in layers(variant.layouts[0])],
    ids=lambda value: getattr(value, "stem", None) or str(value),
)


def each_of(table):
    """A test for each entry of each variant's table."""
    entries = [(variant, entry) for variant in BOTH for entry in table[variant]]
    return [pytest.param(variant, entry, id=f"{variant.stem}, {entry}") for variant, entry in entries]


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles the kernels of all tests at once, on every core."""
    build.build_many(ALL + NOT_REPAIRED)


@pytest.mark.parametrize("plan", ALL, ids=name)
def test_gradients_in_any_order_of_threads(plan):
    check_filter_gradient_in_any_order(plan)


@pytest.mark.parametrize("plan", ALL, ids=name)
def test_infinities_beside_zeros_stay_where_they_belong(plan):
    check_filter_gradient(plan, order_seed=4, poison=True)


@pytest.mark.parametrize("plan", NOT_REPAIRED, ids=name)
def test_finite_inputs_need_no_second_computation(plan):
    check_filter_gradient(plan)


@every_variant
def test_the_tests_take_every_way(variant):
    found = [dict(plan.constants) for plan in PLANS[variant]]
    for constant, values in TAKEN[variant].items():
        assert {each[constant] for each in found} == values, constant
    assert any(each["WIDTH"] > 0 for each in found)
    assert {each["OWN"] * each["TAPS_A"] % 4 for each in found} >= {0, 2}  # sums of four products at a time
    assert any(each["TAPS_B"] > 16 for each in found)  # sums of eight taps at a time
    assert {plan.problem.dtype for plan in PLANS[variant]} == {"float16", "bfloat16"}


@pytest.mark.parametrize(("variant", "mistake"), each_of(MUTANTS))
def test_mistakes_are_noticed(variant, mistake, monkeypatch):
    given = problem(variant.layouts[0], 2, 16, (6, 12), 3, padding=1)
    plan = plan_of(variant, given, Tile(False, (3, 3), 2, 2, 2, warps=4, stages=3))
    right, wrong = MUTANTS[variant][mistake]
    text = build.kernel_text(variant.stem)
    assert right in text, "the kernel has changed: make the mistake another way"
    mutant = build.load(text.replace(right, wrong), plan.constants, "a mutant")
    monkeypatch.setattr(build, "library", lambda _: mutant)
    with pytest.raises(AssertionError):
        check_filter_gradient(plan)


def test_columns_that_no_box_brings_are_cleared(monkeypatch):
    plan = without_repair(plan_of(SPARSE, *WAYS[SPARSE]["boxes, rows of taps"]))
    check_filter_gradient(plan)
    text, cleared = build.kernel_text(SPARSE.stem), "clear_beside_boxes<C>(stages);"
    assert cleared in text
    mutant = build.load(text.replace(cleared, ""), plan.constants, "a mutant")
    monkeypatch.setattr(build, "library", lambda _: mutant)
    with pytest.raises(AssertionError):
        check_filter_gradient(plan)


@pytest.mark.parametrize(("variant", "way"), each_of(WAYS))
def test_plans_know_what_the_kernel_does(variant, way):
    given, tile = WAYS[variant][way]
    one, plan = cut_of(variant, given, tile), plan_of(variant, given, tile)
    assert plan.shared_bytes == one.shared_bytes >= sums_bytes(plan, tile)
    assert plan.shared_bytes >= 16 * (plan.block[0] + 1)  # for the last block
    assert_in_kernel(plan, numbers_of(variant, tile, one, plan))


@every_variant
def test_many_parts_are_gathered(variant):
    plan = plan_of(variant, *WAYS[variant]["many parts"])
    parts, gathered = plan.tiling[2], plan.tiling[5]
    assert 1 < gathered < parts
    assert plan.arrivals == -(-parts // gathered) + 1


@every_variant
def test_one_part_needs_no_memory_for_sums(variant):
    plan = plan_of(variant, *WAYS[variant]["one part"])
    assert (plan.grid, plan.partial_bytes, plan.arrivals) == ((1, 1, 1), 0, 0)


@every_variant
def test_what_it_refuses(variant):
    [layout] = variant.layouts
    given, tile = problem(layout, 2, 16, (9, 9), 3, padding=1), Tile(False, (3, 3), 2, 2, 2)
    assert "tensor cores of sm_75" in reason(variant.plan(given, PRESETS["sm_75"], tile))
    assert "shared memory" in reason(variant.plan(given, H200, replace(tile, warps=16, stages=64)))
    assert "pieces" in reason(variant.plan(replace(given, aligned=4), H200, replace(tile, lines=150, warps=1)))
    assert "2**31" in reason(variant.plan(problem(layout, 9, 16, (9, 2**27), 3), H200, tile))

    def refused(other):
        [found] = candidates(other, H200, variant.stem)
        return reason(found)

    assert "not float32" in refused(replace(given, dtype="float32"))
    assert layout in refused(replace(given, layout=FIRST if layout == LAST else LAST))
    assert "grad_weight" in refused(replace(given, direction="forward"))
    assert not variant.every_plan(given, PRESETS["sm_75"])


def test_what_each_refuses():
    given, tile = problem(FIRST, 2, 16, (9, 9), 3, padding=1, multiplier=3), Tile(False, (3, 3), 2, 2, 2)
    assert "divide each other" in reason(MATRIX.plan(given, H200, tile))
    given = replace(given, layout=LAST)
    assert "whole pairs" in reason(SPARSE.plan(given, H200, tile))
    [found] = candidates(given, H200, SPARSE.stem)
    assert "multiplier of 3" in reason(found)
    assert "words" in reason(SPARSE.plan(replace(given, multiplier=1, aligned=2), H200, tile))


@every_layer
def test_kernels_do_not_spill(variant, given):
    plan = variant.every_plan(given, PRESETS["sm_90"])[0]
    resources = compile_plan(plan).resources
    assert resources.spill_bytes == resources.stack_bytes == 0, f"{plan.tile}: {resources}"


@every_layer
def test_parts_keep_the_card_busy_in_little_memory(variant, given):
    plans = variant.every_plan(given, H200)
    assert 0 < len(plans) <= 16
    for plan in plans:
        assert plan.partial_bytes <= 64 << 20
        assert plan.grid[0] >= 90
        assert plan.shared_bytes < H200.shared_bytes


@every_variant
def test_candidates_come_in_order_of_predicted_time(variant):
    for given in layers(variant.layouts[0]):
        found = variant.every_plan(given, H200)
        times = [plan.predicted_seconds for plan in found]
        assert times == sorted(times)
        assert all(0 < time < 1 for time in times)


@every_variant
def test_rows_of_outputs_are_all_some_blocks(variant):
    """Parts cover the positions, none of them is empty, and positions are all output rows of all lines."""
    for given in edges(variant.layouts[0]):
        for plan in variant.every_plan(given, H200):
            images, lines, parts, part_rows, positions, gathered = plan.tiling[:6]
            assert (parts - 1) * part_rows < positions <= parts * part_rows
            assert 1 <= gathered <= parts
            assert images == given.batch * (given.out_size[0] if given.dims == 3 else 1)
            constants = dict(plan.constants)
            outputs = lines * 8 * constants["GROUPS"] * positions // -(-lines // constants["LINES"])
            assert outputs >= images * given.out_size[-1] * given.out_size[-2]


@every_variant
def test_more_work_takes_longer(variant):
    layout = variant.layouts[0]
    given, tile = problem(layout, 32, 64, (28, 28), 3, padding=1), Tile(False, (3, 3), 4, 4, 4)

    def predicted(other: DepthwiseProblem, tile: Tile = tile) -> float:
        return seconds(other, H200, tile, cut_of(variant, other, tile), variant.costs)

    assert predicted(replace(given, batch=128)) > predicted(given)
    assert predicted(replace(given, bias=True)) >= predicted(given)
    more_taps = replace(given, filter=(9, 3), padding=((4, 4), (1, 1)))
    assert predicted(more_taps) > predicted(given)
    assert predicted(replace(given, aligned=4)) > predicted(given)  # more copies, each of fewer bytes


@every_variant
@pytest.mark.parametrize("arch", [arch for arch, device in PRESETS.items() if device.sm >= 80])
def test_every_card_has_tiles_that_fit(variant, arch):
    device = PRESETS[arch]
    for given in layers(variant.layouts[0]):
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
