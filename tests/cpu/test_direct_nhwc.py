"""direct_nhwc under the emulator: every dtype, tile and edge of channels-last problems, and no spills."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import short_problems
from dwconv import emulator, reference
from dwconv.compile import compile_plan
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem, Epilogue, dense_strides
from dwconv.variants import REGISTRY
from problems import make_inputs, poisoned

VARIANT = REGISTRY["direct_nhwc"]
SMALL = replace(H200, multiprocessors=1)  # so that a block takes several tiles


problem = partial(short_problems.problem, layout="channels_last")

EDGES = [
    problem(2, 8, (9, 11), (3, 3), padding=1),
    problem(1, 64, (16, 19), (3, 3), padding=1, dtype="float16"),
    problem(3, 72, (7, 7), (3, 3), padding=1, dtype="bfloat16"),
    problem(5, 16, (7, 7), (5, 5), padding=2, dtype="float16"),
    problem(1, 20, (13, 9), (5, 5), padding=2, bias=True),
    problem(2, 6, (6, 10), (3, 3), dtype="float64", padding=1, bias=True),
    problem(2, 5, (8, 9), (3, 3), padding=1),  # odd channels: a thread owns one
    problem(1, 7, (9, 8), (3, 3), padding=1, dtype="float16"),
    problem(1, 3, (9, 8), (3, 3), padding=1, dtype="float64"),
    problem(1, 54, (10, 9), (3, 3), padding=1, dtype="bfloat16"),
    problem(2, 12, (6, 30), (1, 11), padding=(0, 5), dtype="float16"),
    problem(2, 8, (21, 12), (3, 1)),
    problem(1, 40, (9, 30), (3, 7), dtype="float16"),
    problem(2, 100, (11, 10), (3, 3), padding=1),  # the last chunk of channels is not full
    problem(2, 200, (5, 6), (2, 2), padding=((0, 1), (1, 0)), dtype="float16"),
    problem(1, 8, (4, 5), (1, 1), bias=True),
    problem(2, 16, (15, 14), (3, 3), stride=2, padding=1, dtype="float16"),
    problem(1, 12, (17, 15), (5, 5), stride=2, padding=2),
    problem(1, 8, (16, 13), (3, 3), stride=(3, 2), padding=((0, 2), (3, 1))),
    problem(1, 8, (11, 12), (3, 3), stride=(1, 3), padding=1, dtype="bfloat16"),
    problem(2, 16, (14, 13), (3, 3), padding=2, dilation=2),
    problem(1, 8, (18, 17), (3, 3), padding=6, dilation=6, dtype="float16"),
    problem(1, 8, (12, 15), (3, 3), stride=2, padding=3, dilation=(3, 2)),
    problem(2, 16, (9, 8), (3, 3), padding=1, multiplier=2, dtype="float16"),
    problem(2, 6, (9, 8), (3, 3), padding=1, multiplier=4, bias=True),
    problem(1, 5, (9, 8), (3, 3), padding=1, multiplier=3, bias=True),
    problem(1, 4, (6, 8), (3, 3), stride=2, padding=1, multiplier=2, dtype="float64"),
    problem(1, 8, (2, 3), (3, 3), padding=((5, 0), (0, 7))),
    problem(1, 8, (1, 1), (5, 5), padding=2),
    problem(0, 8, (5, 8), (3, 3), padding=1),
    problem(1, 16, (6, 9), (3, 3), padding=1, aligned=4),
    problem(1, 16, (6, 9), (3, 3), padding=1, aligned=8, dtype="float16"),
    problem(1, 16, (6, 9), (3, 3), padding=1, aligned=2, dtype="float16"),
    # views: a crop, some of the channels, a crop that starts between vectors, repeated images
    problem(2, 8, (5, 6), (3, 3), padding=1, x_strides=(9 * 9 * 8, 1, 9 * 8, 8)),
    problem(2, 8, (5, 6), (3, 3), padding=1, x_strides=(6 * 7 * 24, 1, 7 * 24, 24), dtype="float16"),
    problem(1, 6, (5, 6), (3, 3), padding=1, x_strides=(6 * 7 * 7, 1, 7 * 7, 7), aligned=2, dtype="float16"),
    problem(3, 8, (5, 6), (3, 3), padding=1, x_strides=(0, 1, 6 * 8, 8)),
    # sequences
    DepthwiseProblem(2, 24, (37,), (4,), padding=((3, 0),), dtype="float16", layout="channels_last"),
    DepthwiseProblem(1, 40, (50,), (9,), padding=((4, 4),), bias=True, layout="channels_last"),
    DepthwiseProblem(1, 8, (50,), (5,), (2,), ((1, 3),), (3,), dtype="bfloat16", layout="channels_last"),
    # epilogues
    problem(2, 8, (6, 7), (3, 3), padding=1, epilogue=Epilogue("silu", True, True, True), bias=True),
    problem(1, 10, (6, 7), (3, 3), padding=1, epilogue=Epilogue("relu6", shift=True), dtype="float16"),
    problem(1, 8, (6, 7), (3, 3), padding=1, epilogue=Epilogue("gelu", residual=True), dtype="bfloat16", multiplier=2),
]


def name(p: DepthwiseProblem) -> str:
    return str(p).replace(" ", "_").replace(",", "")


def plans(p: DepthwiseProblem) -> list[Plan]:
    """The chosen tile, and one of the others: which one depends on the problem's place in the list."""
    lifted = p.lifted(2)
    assert VARIANT.unsupported(lifted) is None
    others = VARIANT.every_plan(lifted, SMALL)
    found = [next(c for c in VARIANT.candidates(lifted, H200) if isinstance(c, Plan))]
    found += [others[EDGES.index(p) % len(others)]] if p in EDGES else []
    return [replace(plan, problem=p) for plan in found]


def per_channel(p: DepthwiseProblem, seed: int) -> torch.Tensor:
    return torch.randn(p.out_channels, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, p.dtype))


def run(plan: Plan, inputs, extra=(None, None, None), order_seed=None) -> torch.Tensor:
    """The plan's result; nothing around it may have changed."""
    p = plan.problem
    dtype, margin = getattr(torch, p.dtype), 0 if build.sanitizing() else 64
    front = margin + p.aligned % 16 // p.element_bytes
    elements = math.prod(p.y_shape)
    memory = poisoned(front + elements + margin, dtype)
    y = memory[front : front + elements].as_strided(p.y_shape, dense_strides(p.y_shape, p.layout))
    emulator.run(plan, *inputs, y, *extra, order_seed=order_seed)
    guards = torch.cat([memory[:front], memory[front + elements :]]).view(torch.uint8)
    assert bool((guards == 0xFF).all()), "the kernel wrote outside of y"
    return y


def bits(y: torch.Tensor) -> torch.Tensor:
    return y.contiguous().flatten().clone().view(torch.uint8)


def extras(p: DepthwiseProblem):
    e = p.epilogue
    residual = None
    if e.residual:
        memory = torch.randn(math.prod(p.y_shape), generator=torch.Generator().manual_seed(9))
        residual = memory.to(getattr(torch, p.dtype)).as_strided(p.y_shape, dense_strides(p.y_shape, p.layout))
    return per_channel(p, 7) if e.scale else None, per_channel(p, 8) if e.shift else None, residual


@pytest.fixture(scope="module", autouse=True)
def built():
    build.build_many([plan for p in EDGES for plan in plans(p)])


@pytest.mark.parametrize("p", EDGES, ids=name)
def test_every_tile_is_within_rounding_in_any_order(p):
    inputs = make_inputs(p)
    if inputs[0].numel() and p.epilogue == Epilogue():
        for i, value in enumerate((math.inf, -math.inf, math.nan)):
            place = torch.Generator().manual_seed(i)
            inputs[0][tuple(int(torch.randint(size, (), generator=place)) for size in p.x_shape)] = value
    extra = extras(p)
    wanted = reference.forward(*inputs, p, *extra)
    assert plans(p)
    for number, plan in enumerate(plans(p)):
        y = run(plan, inputs, extra)
        assert reference.describe_mismatch(y, *wanted) is None, plan.tile
        again = run(plan, inputs, extra, order_seed=number)
        assert torch.equal(bits(y), bits(again)), plan.tile


SAMPLE = [
    (problem(8, 64, (56, 56), (3, 3), padding=1, dtype="float16"), "sm_90"),
    (problem(8, 64, (56, 56), (5, 5), padding=2, dtype="bfloat16"), "sm_90"),
    (problem(8, 64, (56, 56), (5, 5), stride=2, padding=2), "sm_90"),
    (problem(8, 64, (56, 56), (3, 3), stride=2, padding=1, dtype="float64"), "sm_90"),
    (problem(8, 64, (56, 56), (3, 7), dtype="float16"), "sm_90"),
    *((problem(8, 64, (56, 56), (3, 3), padding=1, dtype="float16"), arch) for arch in PRESETS if arch != "sm_90"),
]


@pytest.mark.parametrize(("p", "arch"), SAMPLE, ids=lambda value: value if isinstance(value, str) else name(value))
def test_nothing_spills(p, arch):
    for plan in VARIANT.candidates(p, PRESETS[arch]):
        if isinstance(plan, Plan):
            resources = compile_plan(plan).resources
            assert resources.spill_bytes == resources.stack_bytes == 0, plan.tile
