"""Runs a plan under the emulator and checks its result: what the tests of the variants share."""

from __future__ import annotations

import math

import torch

from dwconv import emulator, reference
from dwconv.emulator import build
from dwconv.plan import Plan
from problems import make_epilogue, make_inputs, make_output


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


def check_in_any_order(plan: Plan) -> None:
    """The result is right, and the same to the bit in another order of threads."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[plan.problem.element_bytes]
    assert torch.equal(check(plan).view(bits), check(plan, order_seed=2).view(bits))
