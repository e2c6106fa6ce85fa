"""Every variant computes the gradients of the edge problems that it takes, under the emulator: within rounding, in any
order of threads, with Inf and NaN where they belong.

test_sanitizers.py runs some of them again under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from checks import check_filter_gradient, check_input_gradient
from dwconv.device import H200
from dwconv.emulator import build
from dwconv.errors import DepthwiseError
from dwconv.plan import Plan
from dwconv.problem import Direction
from dwconv.variants import REGISTRY
from edge_plans import bits, chosen_plans, plan_id

# Problems of one variant, dtype, layout and number of dimensions: of gradients' own variants, and of those of the
# forward direction, with reversed filters.
OWN, REVERSED = (3, 1) if build.sanitizing() else (12, 4)


def plans(direction: Direction) -> list[Plan]:
    own = [plan for plan in chosen_plans(H200, OWN, direction) if direction in REGISTRY[plan.variant].directions]
    others = [
        plan for plan in chosen_plans(H200, REVERSED, direction) if "forward" in REGISTRY[plan.variant].directions
    ]
    return own + others


input_gradients = pytest.mark.parametrize("plan", plans("grad_input"), ids=plan_id)
filter_gradients = pytest.mark.parametrize(
    "plan", [plan for plan in plans("grad_weight") if plan.problem.batch], ids=plan_id
)


@pytest.fixture(scope="module", autouse=True)
def built(request):
    """Compiles the kernels of all tests that are about to run at once, on every core."""
    with contextlib.suppress(DepthwiseError):  # the test of a kernel that doesn't compile says so
        build.build_many(item.callspec.params["plan"] for item in request.session.items if item.path == Path(__file__))


@input_gradients
def test_gradient_of_x(plan):
    expected = bits(check_input_gradient(plan))
    assert torch.equal(bits(check_input_gradient(plan, order_seed=1)), expected), "the order of threads changes it"


@filter_gradients
def test_gradients_of_filters_and_bias(plan):
    expected = bits(check_filter_gradient(plan))
    assert torch.equal(bits(check_filter_gradient(plan, order_seed=1)), expected), "the order of threads changes them"


@filter_gradients
def test_non_finite_inputs_reach_the_taps_that_meet_them(plan):
    check_filter_gradient(plan, poison=True)
