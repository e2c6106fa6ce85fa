"""phases_nchw and phases_nhwc under the emulator: every tile, at the edges of places, planes, bands and alignments."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import short_problems
from checks import check_input_gradient
from dwconv.choose import candidates, choose
from dwconv.compile import compile_many
from dwconv.device import H200
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection
from dwconv.problem import DTYPE_BYTES, DepthwiseProblem, Layout
from dwconv.variants import REGISTRY
from dwconv.variants.phases import Reach
from edge_plans import bits
from problems import LAYOUTS, in_kind, problem_id

STEMS: dict[Layout, str] = {"channels_first": "phases_nchw", "channels_last": "phases_nhwc"}


problem = partial(short_problems.problem, stride=2, padding=1, direction="grad_input")

# Each comes in every dtype and both layouts.
SHAPES = [
    problem(2, 5, (14, 14), (3, 3)),  # planes side by side, rows that end between vectors
    problem(1, 3, (28, 56), (3, 3)),
    problem(3, 8, (9, 15), (5, 5), padding=(2, 2)),
    problem(2, 4, (7, 20), (3, 3), stride=(1, 1), multiplier=2),
]

# Each comes in one dtype and both layouts.
ODD = [
    problem(1, 2, (90, 64), (3, 3), dtype="float16"),  # bands of rows
    problem(1, 1, (61, 131), (5, 3), padding=((2, 1), (0, 2))),
    problem(9, 37, (2, 3), (3, 3), dtype="bfloat16"),
    problem(1, 6, (12, 13), (3, 3), stride=(3, 2), padding=((5, 0), (0, 7)), dtype="float16"),  # wider than the filter
    problem(1, 2, (11, 17), (2, 2), stride=(3, 3), padding=(0, 0), dtype="float16"),  # some elements meet no tap
    problem(1, 3, (13, 22), (3, 3), padding=(3, 3), dilation=(3, 3), dtype="bfloat16"),
    problem(1, 8, (10, 16), (3, 3), padding=(2, 2), dilation=(2, 2), dtype="float16"),  # odd rows meet none
    problem(1, 2, (15, 18), (7, 7), padding=(3, 3), dtype="bfloat16"),
    problem(1, 4, (8, 24), (7, 7), stride=(1, 2), padding=(3, 3)),
    problem(2, 3, (9, 10), (3, 3), multiplier=3, dtype="bfloat16"),
    problem(1, 2, (8, 12), (3, 3), multiplier=4, dtype="float64"),
    problem(1, 4, (20, 8), (5, 5), stride=(1, 1), padding=(2, 2), multiplier=2, dtype="float16"),
    problem(1, 4, (6, 8), (3, 3), stride=(1, 1), padding=(4, 4)),  # a stride of 1, but no forward problem
    problem(1, 8, (9, 32), (3, 3), dtype="float16", aligned=2),
    problem(1, 8, (9, 32), (3, 3), dtype="bfloat16", aligned=8),
    problem(1, 4, (16, 16), (1, 1), stride=(4, 4), padding=(0, 0), dtype="float16"),
    problem(0, 3, (8, 8), (3, 3)),
    DepthwiseProblem(2, 8, (53,), (5,), (2,), ((2, 2),), direction="grad_input", dtype="float16"),
    DepthwiseProblem(1, 3, (64,), (8,), (8,), ((3, 4),), direction="grad_input"),
    DepthwiseProblem(2, 3, (40,), (4,), (1,), ((3, 0),), multiplier=2, direction="grad_input", dtype="bfloat16"),
]

PROBLEMS = [in_kind(p, dtype, layout) for p in SHAPES for dtype in DTYPE_BYTES for layout in LAYOUTS]
PROBLEMS += [replace(p, layout=layout) for p in ODD for layout in LAYOUTS]


def every_plan(p: DepthwiseProblem) -> list[Plan]:
    plans = REGISTRY[STEMS[p.layout]].every_plan(p.lifted(2), H200)
    return [replace(plan, problem=p) for plan in plans]


def some_plans(p: DepthwiseProblem) -> list[Plan]:
    """Some tiles of either kind."""
    plans = every_plan(p)
    return plans[:: max(1, len(plans) // (2 if build.sanitizing() else 4))]


@pytest.fixture(scope="module", autouse=True)
def built():
    build.build_many([plan for p in PROBLEMS for plan in some_plans(p)])


@pytest.mark.parametrize("p", PROBLEMS, ids=problem_id)
def test_tiles_are_within_rounding_in_any_order(p):
    plans = some_plans(p)
    assert plans
    for plan in plans:
        found = check_input_gradient(plan)
        assert torch.equal(bits(found), bits(check_input_gradient(plan, order_seed=2))), plan.tile


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_that_no_tap_meets_are_zeros(layout):
    p = replace(problem(2, 8, (12, 12), (1, 1), stride=(3, 3), padding=(0, 0)), layout=layout)
    for plan in every_plan(p):
        found = check_input_gradient(plan)  # g holds Inf and NaN
        met = torch.zeros(12, 12, dtype=torch.bool)
        met[::3, ::3] = True
        assert torch.equal(found[..., ~met], torch.zeros_like(found[..., ~met])), plan.tile


def test_g_may_be_a_view_but_not_where_planes_are_staged():
    p = problem(2, 3, (12, 16), (3, 3), x_strides=(5 * 8 * 10, 8 * 10, 10, 1))
    found = candidates(p, H200, "phases_nchw")
    assert all("staged" not in plan.tile for plan in found if isinstance(plan, Plan))
    assert any("dense" in each.reason for each in found if isinstance(each, Rejection))
    plan = next(plan for plan in found if isinstance(plan, Plan))
    check_input_gradient(plan)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize(("taps", "before"), [(1, 0), (1, 4), (3, 0), (3, 1), (3, 7), (4, 2), (7, 3)])
def test_reach_is_what_the_formula_says(stride, dilation, taps, before):
    p = DepthwiseProblem(
        1, 1, (40, 41), (taps, taps), (stride,) * 2, ((before, 9),) * 2, (dilation,) * 2, direction="grad_input"
    )
    reach, shift = Reach.of(p, 1), 1000 * stride
    met = {
        place - 1000
        for at in range(shift, shift + stride)
        for u in range(taps)
        for place, rest in [divmod(at + before - u * dilation, stride)]
        if rest == 0
    }
    assert (reach.first, reach.last) == (min(met), max(met))
    assert reach.places * stride >= 41 > (reach.places - 1) * stride


def test_forward_kernels_keep_what_is_theirs():
    p = problem(2, 8, (14, 14), (3, 3), stride=(1, 1))
    for layout, stem in STEMS.items():
        [found] = candidates(replace(p, layout=layout), H200, stem)
        assert isinstance(found, Rejection)
        assert "forward" in found.reason


def test_large_filters_are_left_to_others():
    [found] = candidates(problem(1, 2, (20, 20), (9, 9), padding=(4, 4)), H200, "phases_nchw")
    assert isinstance(found, Rejection)
    assert "81 taps" in found.reason


USUAL = [
    ((96, 112), 3),
    ((144, 56), 3),
    ((192, 28), 3),
    ((576, 14), 3),
    ((240, 28), 3),
    ((72, 56), 5),
    ((144, 56), 5),
    ((672, 14), 5),
    ((32, 112), 7),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "taps"), USUAL, ids=str)
def test_usual_problems_prefer_phases(shape, taps, layout):
    channels, side = shape
    for dtype in DTYPE_BYTES:
        p = problem(128, channels, (side, side), (taps, taps), padding=(taps // 2,) * 2, dtype=dtype, layout=layout)
        assert choose(p, H200).variant == STEMS[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "p",
    [
        problem(128, 192, (28, 28), (3, 3)),
        problem(128, 72, (56, 56), (5, 5), padding=(2, 2)),
        problem(32, 128, (56, 56), (3, 3), stride=(1, 1), multiplier=2),
    ],
    ids=problem_id,
)
def test_tiles_do_not_spill(p, dtype, layout):
    plans = every_plan(in_kind(p, dtype, layout))
    for plan, kernel in zip(plans, compile_many(plans), strict=True):
        assert kernel.resources.spill_bytes == kernel.resources.stack_bytes == 0, plan.tile


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(layout):
    """Grids stay inside CUDA's limits; where places can't be numbered, that is said."""
    plans = every_plan(problem(4096, 512, (56, 56), (3, 3), layout=layout))
    assert plans
    assert all(plan.grid[0] < 2**31 and max(plan.tiling) < 2**32 for plan in plans)
    huge = candidates(problem(2**21, 4096, (2, 2), (3, 3), layout=layout), H200, STEMS[layout])
    assert all(plan.grid[0] < 2**31 for plan in huge if isinstance(plan, Plan))
