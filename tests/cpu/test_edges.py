"""Every variant computes the edge problems that it takes under the emulator: within rounding, and it writes only y.

Every dtype, layout and number of dimensions has its part of them. test_sanitizers.py runs some of them again under
AddressSanitizer and UBSan; then the ends of all tensors are guarded by AddressSanitizer instead of by poison.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch

from dwconv import emulator, reference
from dwconv.device import H200
from dwconv.emulator import build
from dwconv.errors import DepthwiseError
from edge_plans import bits, chosen_plans, plan_id, tile_id, tile_plans
from problems import make_epilogue, make_inputs, make_output

SANITIZED = 4  # problems of one kind that run under the sanitizers

every_plan = pytest.mark.parametrize(
    "plan", chosen_plans(H200, most=SANITIZED if build.sanitizing() else None), ids=plan_id
)


@pytest.fixture(scope="module", autouse=True)
def built(request):
    """Compiles the kernels of all tests that are about to run at once, on every core."""
    with contextlib.suppress(DepthwiseError):  # the test of a kernel that doesn't compile says so
        build.build_many(item.callspec.params["plan"] for item in request.session.items if item.path == Path(__file__))


def run(plan, inputs, epilogue, order_seed=None):
    """The plan's result; nothing around it may have changed."""
    output = make_output(plan.problem, margin=0 if build.sanitizing() else 64)
    emulator.run(plan, *inputs, output.y, **epilogue, order_seed=order_seed)
    assert output.guards_are_intact(), "the kernel wrote outside of y"
    return output.y


@every_plan
def test_result_is_within_rounding(plan):
    inputs, epilogue = make_inputs(plan.problem), make_epilogue(plan.problem)
    y = run(plan, inputs, epilogue)
    assert reference.describe_mismatch(y, *reference.forward(*inputs, plan.problem, **epilogue)) is None


@every_plan
def test_order_of_threads_does_not_matter(plan):
    inputs, epilogue = make_inputs(plan.problem, seed=1), make_epilogue(plan.problem, seed=1)
    expected = bits(run(plan, inputs, epilogue))
    for order_seed in (0, 1):
        found = bits(run(plan, inputs, epilogue, order_seed))
        assert torch.equal(found, expected), f"order_seed={order_seed} changes the result"


@every_plan
def test_non_finite_inputs_reach_their_windows_only(plan):
    problem = plan.problem
    inputs, epilogue = make_inputs(problem, seed=2), make_epilogue(problem, seed=2)
    if inputs[0].numel() == 0:
        return
    for i, value in enumerate((math.inf, -math.inf, math.nan)):
        random = torch.Generator().manual_seed(i)
        inputs[0][tuple(int(torch.randint(size, (), generator=random)) for size in problem.x_shape)] = value
    y = run(plan, inputs, epilogue)
    assert reference.describe_mismatch(y, *reference.forward(*inputs, problem, **epilogue)) is None


@pytest.mark.parametrize("plan", tile_plans(H200), ids=tile_id)
def test_every_legal_tile_is_within_rounding(plan):
    inputs, epilogue = make_inputs(plan.problem, seed=3), make_epilogue(plan.problem, seed=3)
    inputs[0][(0,) * inputs[0].dim()] = math.inf
    expected = reference.forward(*inputs, plan.problem, **epilogue)
    for order_seed in (None, 3):
        wrong = reference.describe_mismatch(run(plan, inputs, epilogue, order_seed), *expected)
        assert wrong is None, f"{plan.tile}: {wrong}"
