"""Every variant computes every edge problem under the emulator: within rounding, and nothing but its output changes.

test_sanitizers.py runs this file again under AddressSanitizer and UBSan; then the ends of all tensors are guarded by
AddressSanitizer instead of by poison.
"""

from __future__ import annotations

import math

import pytest
import torch

from dwconv import emulator, reference
from dwconv.choose import choose
from dwconv.device import H200
from dwconv.emulator import build
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem
from dwconv.variants import REGISTRY
from problems import EDGE_PROBLEMS, make_inputs, make_output, problem_id

# Problems whose every legal tile runs, not only the chosen one.
SAMPLE = [
    DepthwiseProblem(1, 2, (9, 68), (3, 3), padding=((1, 1), (1, 1))),
    DepthwiseProblem(1, 2, (9, 33), (3, 3), padding=((1, 1), (1, 1)), multiplier=2, bias=True),
    DepthwiseProblem(1, 2, (10, 70), (3, 3)),
    DepthwiseProblem(1, 2, (9, 36), (3, 7)),
    DepthwiseProblem(1, 2, (7, 40), (5, 5), padding=((2, 2), (2, 2))),
    DepthwiseProblem(1, 2, (13, 64), (3, 3), stride=(2, 2), padding=((1, 1), (1, 1))),
    DepthwiseProblem(1, 2, (12, 26), (3, 3), padding=((3, 3), (3, 3)), dilation=(3, 3)),
    DepthwiseProblem(1, 2, (5, 18), (3, 3), padding=((2, 0), (5, 1))),
]

every_variant = pytest.mark.parametrize("variant", REGISTRY)
every_problem = pytest.mark.parametrize("problem", EDGE_PROBLEMS, ids=problem_id)


def legal_plans(problem: DepthwiseProblem, variant: str) -> list[Plan]:
    return REGISTRY[variant].every_plan(problem, H200)


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles all kernels at once, on every core."""
    plans = [choose(problem, H200, variant) for variant in REGISTRY for problem in EDGE_PROBLEMS]
    plans += [plan for variant in REGISTRY for problem in SAMPLE for plan in legal_plans(problem, variant)]
    build.build_many(plans)


def run(plan, inputs, order_seed=None):
    """The plan's result; nothing around it may have changed."""
    output = make_output(plan.problem, margin=0 if build.sanitizing() else 64)
    emulator.run(plan, *inputs, output.y, order_seed=order_seed)
    assert output.guards_are_intact(), "the kernel wrote outside of y"
    return output.y


def bits(tensor):
    return tensor.view(torch.int32)


@every_variant
@every_problem
def test_result_is_within_rounding(problem, variant):
    inputs = make_inputs(problem)
    y = run(choose(problem, H200, variant), inputs)
    assert reference.describe_mismatch(y, *reference.forward(*inputs, problem)) is None


@every_variant
@every_problem
def test_order_of_threads_does_not_matter(problem, variant):
    plan = choose(problem, H200, variant)
    inputs = make_inputs(problem, seed=1)
    expected = bits(run(plan, inputs))
    for order_seed in (0, 1, 2):
        assert torch.equal(bits(run(plan, inputs, order_seed)), expected), f"order_seed={order_seed} changes the result"


@every_variant
@every_problem
def test_non_finite_inputs_reach_their_windows_only(problem, variant):
    x, weight, bias = make_inputs(problem, seed=2)
    if x.numel() == 0:
        return
    for i, value in enumerate((math.inf, -math.inf, math.nan)):
        random = torch.Generator().manual_seed(i)
        place = tuple(int(torch.randint(size, (), generator=random)) for size in problem.x_shape)
        x[place] = value
    exact, bound = reference.forward(x, weight, bias, problem)
    y = run(choose(problem, H200, variant), (x, weight, bias))
    assert reference.describe_mismatch(y, exact, bound) is None


@every_variant
@pytest.mark.parametrize("problem", SAMPLE, ids=problem_id)
def test_every_legal_tile_is_within_rounding(problem, variant):
    inputs = make_inputs(problem, seed=3)
    inputs[0].view(-1)[5] = math.inf
    expected = reference.forward(*inputs, problem)
    plans = legal_plans(problem, variant)
    assert plans
    for plan in plans:
        for order_seed in (None, 3):
            wrong = reference.describe_mismatch(run(plan, inputs, order_seed), *expected)
            assert wrong is None, f"{plan.tile}: {wrong}"
