"""Every variant computes every edge problem on the GPU: poisoned outputs, guard zones, the same bits every time."""

from __future__ import annotations

import math

import pytest
import torch

from dwconv import reference
from dwconv.choose import choose
from dwconv.compile import compile_many, compile_plan
from dwconv.launch import device_spec, launch
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem
from dwconv.variants import REGISTRY
from problems import EDGE_PROBLEMS, make_inputs, make_output, problem_id

MARGIN = 256  # elements of poison on both sides of every tensor

every_variant = pytest.mark.parametrize("variant", REGISTRY)
every_problem = pytest.mark.parametrize("problem", EDGE_PROBLEMS, ids=problem_id)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compiles all kernels at once, on every core."""
    compile_many(choose(problem, device_spec(0), variant) for variant in REGISTRY for problem in EDGE_PROBLEMS)


def run(plan: Plan, inputs: tuple) -> torch.Tensor:
    """The plan's result; nothing around it may have changed."""
    output = make_output(plan.problem, margin=MARGIN, device="cuda")
    launch(plan, compile_plan(plan), *inputs, output.y)
    torch.cuda.synchronize()
    assert output.guards_are_intact(), "the kernel wrote outside of y"
    return output.y


def worst(y, inputs, problem: DepthwiseProblem) -> str | None:
    x, weight, bias = (None if t is None else t.cpu() for t in inputs)
    return reference.describe_mismatch(y.cpu(), *reference.forward(x, weight, bias, problem))


@every_variant
@every_problem
def test_result_is_within_rounding(problem, variant):
    inputs = make_inputs(problem, margin=MARGIN, device="cuda")
    plan = choose(problem, device_spec(0), variant)
    y = run(plan, inputs)
    assert worst(y, inputs, problem) is None
    again = run(plan, inputs)
    assert torch.equal(y.view(torch.int32), again.view(torch.int32)), "the same bits every time"


@every_variant
@every_problem
def test_non_finite_inputs_reach_their_windows_only(problem, variant):
    inputs = make_inputs(problem, seed=2, margin=MARGIN, device="cuda")
    if inputs[0].numel() == 0:
        return
    for i, value in enumerate((math.inf, -math.inf, math.nan)):
        random = torch.Generator().manual_seed(i)
        inputs[0][tuple(int(torch.randint(size, (), generator=random)) for size in problem.x_shape)] = value
    assert worst(run(choose(problem, device_spec(0), variant), inputs), inputs, problem) is None


TILED = [
    DepthwiseProblem(2, 3, (37, 268), (3, 3), padding=((1, 1), (1, 1))),
    DepthwiseProblem(2, 3, (37, 201), (3, 3), padding=((1, 1), (1, 1)), multiplier=2, bias=True),
    DepthwiseProblem(2, 3, (40, 256), (3, 7)),
    DepthwiseProblem(2, 3, (29, 128), (5, 5), stride=(2, 2), padding=((2, 2), (2, 2))),
]


@pytest.mark.parametrize("problem", TILED, ids=problem_id)
def test_every_legal_tile_is_within_rounding(problem):
    inputs = make_inputs(problem, seed=3, margin=MARGIN, device="cuda")
    plans = REGISTRY["direct_nchw"].every_plan(problem, device_spec(0))
    compile_many(plans)
    for plan in plans:
        assert worst(run(plan, inputs), inputs, problem) is None, plan.tile
