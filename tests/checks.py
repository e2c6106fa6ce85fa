"""Runs a plan under the emulator and checks its result: what the tests of the variants share."""

from __future__ import annotations

import math

import torch

from dwconv import emulator, reference
from dwconv.emulator import build
from dwconv.plan import Plan
from edge_plans import bits
from problems import (
    make_epilogue,
    make_filter_gradient_inputs,
    make_filter_gradients,
    make_inputs,
    make_output,
)


def with_poison(x: torch.Tensor) -> torch.Tensor:
    """An Inf, a -Inf and a NaN at some places, also at both ends."""
    if x.numel() > 8:
        for i, value in enumerate((math.inf, -math.inf, math.nan)):
            x[tuple((size - 1) * i // 2 for size in x.shape)] = value
    return x


def check(plan: Plan, order_seed: int | None = None) -> torch.Tensor:
    """The result of a plan, which is within the bound of rounding; Inf and NaN stand where they belong.

    order_seed: of the order in which the emulator runs threads.
    """
    x, weight, bias = make_inputs(plan.problem, seed=5)
    inputs, epilogue = (with_poison(x), weight, bias), make_epilogue(plan.problem, seed=5)
    output = make_output(plan.problem, margin=0 if build.sanitizing() else 64)
    emulator.run(plan, *inputs, output.y, **epilogue, order_seed=order_seed)
    assert output.guards_are_intact(), "the kernel wrote outside of y"
    assert reference.describe_mismatch(output.y, *reference.forward(*inputs, plan.problem, **epilogue)) is None
    return output.y


def check_input_gradient(plan: Plan, order_seed: int | None = None) -> torch.Tensor:
    """The gradient of x by a plan, checked as `check` does."""
    grad, weight, _ = make_inputs(plan.problem, seed=5)
    grad, output = with_poison(grad), make_output(plan.problem, margin=0 if build.sanitizing() else 64)
    emulator.run(plan, grad, weight, None, output.y, order_seed=order_seed)
    assert output.guards_are_intact(), "the kernel wrote outside of x's gradient"
    assert reference.describe_mismatch(output.y, *reference.input_gradient(grad, weight, plan.problem)) is None
    return output.y


def check_filter_gradient(plan: Plan, order_seed: int | None = None, poison: bool = False) -> torch.Tensor:
    """The gradients of filters and bias by a plan, [C*m, taps (+ 1)]; with `poison`, x holds an Inf and a NaN."""
    problem = plan.problem
    x, grad = make_filter_gradient_inputs(problem, seed=5)
    x = with_poison(x) if poison else x
    weight, bias = make_filter_gradients(problem, margin=0 if build.sanitizing() else 64)
    emulator.run_filter_gradient(plan, x, grad, weight.y, None if bias is None else bias.y, order_seed=order_seed)
    assert weight.guards_are_intact(), "the kernel wrote beside the filters' gradients"
    assert bias is None or bias.guards_are_intact(), "the kernel wrote beside the bias's gradient"
    found = weight.y.view(problem.out_channels, -1)
    if bias is not None:
        found = torch.cat([found, bias.y.view(-1, 1)], 1)
    exact, bound = (each[:, : found.shape[1]] for each in reference.filter_gradient(x, grad, problem))
    assert reference.describe_mismatch(found, exact, bound) is None
    return found


def check_in_any_order(plan: Plan) -> None:
    """The result is right, and the same to the bit in another order of threads."""
    assert torch.equal(bits(check(plan)), bits(check(plan, order_seed=2)))


def check_filter_gradient_in_any_order(plan: Plan) -> None:
    """The same of gradients of filters and bias."""
    assert torch.equal(bits(check_filter_gradient(plan)), bits(check_filter_gradient(plan, order_seed=3)))
