"""direct_nchw under the emulator: every tile, in every dtype, at the edges of rows, cells and alignments; no spills."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from dwconv import emulator, reference
from dwconv.compile import compile_many
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan
from dwconv.problem import DTYPE_BYTES, DepthwiseProblem, Epilogue
from dwconv.variants.direct_nchw import DirectNchw
from problems import in_kind, make_epilogue, make_inputs, make_output, problem_id
from short_problems import problem

VARIANT = DirectNchw()


def sequence(n, c, size, taps, stride=1, padding=(0, 0), dilation=1, **more):
    return DepthwiseProblem(n, c, (size,), (taps,), (stride,), (padding,), (dilation,), **more)


# Each comes in every dtype. Widths decide the alignment class: 72 is a multiple of every vector, 36 and 18 of shorter.
SHAPES = [
    problem(1, 2, (9, 72), (3, 3), padding=(1, 1)),
    problem(2, 2, (5, 33), (3, 3), padding=(1, 1), multiplier=2, bias=True),
    problem(1, 3, (7, 36), (3, 7)),
    problem(1, 2, (10, 64), (3, 3), stride=(2, 2), padding=(1, 1)),
    problem(1, 2, (9, 18), (5, 5), padding=((2, 1), (0, 4))),
    problem(1, 1, (11, 40), (3, 3), padding=(2, 6), dilation=(2, 6)),
    sequence(2, 3, 200, 4, padding=(3, 0)),
    sequence(1, 2, 104, 31, padding=(15, 15), bias=True),
]

# Each comes in one dtype.
ODD = [
    problem(1, 2, (6, 16), (3, 3), padding=(1, 1), dtype="float16", aligned=2),
    problem(1, 2, (6, 32), (3, 3), padding=(1, 1), dtype="bfloat16", aligned=4),
    problem(1, 2, (6, 32), (3, 3), padding=(1, 1), dtype="float64", aligned=8),
    problem(2, 2, (5, 24), (3, 3), padding=(1, 1), dtype="float16", x_strides=(2 * 9 * 40, 9 * 40, 40, 1)),
    problem(2, 2, (5, 24), (3, 3), padding=(1, 1), dtype="float16", x_strides=(2 * 9 * 27, 9 * 27, 27, 1)),
    problem(3, 2, (4, 16), (3, 3), padding=(1, 1), dtype="bfloat16", x_strides=(0, 64, 16, 1)),
    problem(1, 2, (11, 48), (3, 5), stride=(3, 2), padding=((0, 2), (3, 1)), dtype="float16"),
    problem(1, 2, (9, 48), (3, 3), stride=(1, 3), padding=(1, 1), dtype="float16"),
    problem(1, 1, (13, 45), (3, 3), stride=(2, 1), padding=(3, 3), dilation=(3, 3), dtype="bfloat16"),
    problem(1, 2, (2, 3), (3, 3), padding=((5, 0), (0, 7)), dtype="float16"),
    problem(1, 1, (1, 1), (5, 5), padding=(2, 2), dtype="bfloat16"),
    problem(1, 3, (4, 24), (1, 1), dtype="float16"),
    problem(1, 2, (3, 130), (1, 11), padding=(0, 5), dtype="bfloat16"),
    problem(1, 1, (5, 520), (3, 3), padding=(1, 1), dtype="float16"),
    # strips of a warp whose lanes trade words: of loads, of stores, of both; neighbours on either side, and beyond
    problem(2, 2, (9, 510), (3, 3), padding=(2, 2), dtype="float16"),
    problem(1, 2, (9, 512), (3, 3), dtype="bfloat16", bias=True, epilogue=Epilogue("silu", scale=True, shift=True)),
    problem(1, 2, (8, 506), (3, 3), padding=(1, 1), dtype="bfloat16", multiplier=2),
    problem(1, 2, (16, 250), (3, 7), padding=((2, 2), (6, 6)), dtype="float16"),
    problem(1, 2, (9, 758), (3, 5), padding=((2, 0), (0, 4)), dilation=(1, 2), dtype="float16"),
    problem(1, 2, (9, 254), (3, 5), padding=((2, 2), (9, 9)), dilation=(1, 5), dtype="float16"),  # too far apart
    problem(1, 2, (9, 510), (3, 3), padding=(1, 1), dtype="float16", epilogue=Epilogue(residual=True)),
    # products column by column; a few rows loaded ahead of their use
    problem(1, 2, (17, 36), (5, 5), padding=(2, 2), bias=True, epilogue=Epilogue("silu", residual=True)),
    problem(1, 2, (33, 48), (5, 5), stride=(2, 2), padding=(2, 2), dtype="bfloat16", bias=True),
    problem(1, 2, (40, 19), (4, 5), stride=(1, 2), padding=(2, 1), dilation=(3, 1), dtype="bfloat16"),
    problem(0, 3, (5, 8), (3, 3), padding=(1, 1), dtype="float16"),
    problem(1, 2, (9, 20), (7, 7), padding=(3, 3), dtype="float16"),
    sequence(1, 2, 1200, 9, padding=(4, 4), dtype="float16"),
    sequence(2, 3, 77, 4, padding=(3, 0), dilation=5, dtype="bfloat16"),
    sequence(1, 4, 96, 8, stride=8, dtype="float16"),
    sequence(1, 4, 53, 5, stride=2, padding=(2, 2), dtype="bfloat16"),
    problem(
        1, 3, (6, 18), (3, 3), padding=(1, 1), bias=True, dtype="float16", epilogue=Epilogue("silu", True, True, True)
    ),
    problem(
        2, 2, (6, 16), (3, 3), padding=(1, 1), dtype="bfloat16", multiplier=2, epilogue=Epilogue("gelu", residual=True)
    ),
    sequence(1, 3, 70, 4, padding=(3, 0), bias=True, dtype="float32", epilogue=Epilogue("relu6", shift=True)),
    problem(1, 2, (5, 14), (3, 3), padding=(1, 1), dtype="float64", epilogue=Epilogue("hardswish", True, False, True)),
]

PROBLEMS = [in_kind(shape, dtype) for shape in SHAPES for dtype in DTYPE_BYTES] + ODD


def plans(p: DepthwiseProblem) -> list[Plan]:
    """The chosen tile, the next one, and the slow one that serves everything."""
    found = VARIANT.every_plan(p.lifted(2), H200)
    return [replace(plan, problem=p) for plan in dict.fromkeys((*found[:2], found[-1]))]


@pytest.fixture(scope="module", autouse=True)
def built():
    build.build_many([plan for p in PROBLEMS for plan in plans(p)])


@pytest.mark.parametrize("p", PROBLEMS, ids=problem_id)
def test_results_are_within_rounding_in_any_order(p):
    inputs, extra = make_inputs(p), make_epilogue(p)
    for i, value in enumerate((math.inf, -math.inf, math.nan) if inputs[0].numel() else ()):
        places = random.Random(i)
        inputs[0][tuple(places.randrange(size) for size in p.x_shape)] = value
    expected = reference.forward(*inputs, p, **extra)
    assert plans(p)
    for number, plan in enumerate(plans(p)):
        results = []
        for order_seed in (None, number):
            output = make_output(p, margin=0 if build.sanitizing() else 64)
            emulator.run(plan, *inputs, output.y, **extra, order_seed=order_seed)
            assert output.guards_are_intact(), f"{plan.tile} wrote outside of y"
            results.append(output.y)
        assert reference.describe_mismatch(results[0], *expected) is None, plan.tile
        assert torch.equal(results[0].view(torch.uint8), results[1].view(torch.uint8)), plan.tile


def random_problem(numbers: random.Random) -> DepthwiseProblem:
    """A problem as users may have one: what is compiled in is drawn, sizes don't matter."""
    dtype = numbers.choice(list(DTYPE_BYTES))
    if numbers.random() < 0.3:
        taps, dilation = numbers.choice([3, 4, 5, 9, 15, 31]), numbers.choice([1, 1, 2])
        before = numbers.choice([0, taps // 2, (taps - 1) * dilation])
        return sequence(
            8, 8, 8 * numbers.randint(20, 60), taps, numbers.choice([1, 1, 2]), (before, 9), dilation, dtype=dtype
        )
    taps = numbers.choice([(3, 3), (5, 5), (3, 7), (1, 11), (2, 2), (4, 4), (5, 3)])
    pad, width = numbers.randint(0, 3), numbers.choice([1, 2, 4, 8]) * numbers.choice([15, 27, 56, 64])
    stride, dilation = numbers.choice([1, 1, 2, 3]), numbers.choice([1, 1, 1, 2, 3])
    return problem(
        8,
        8,
        (60, max(width, 32)),
        taps,
        (stride, stride),
        (pad, pad),
        (dilation, dilation),
        dtype=dtype,
        bias=numbers.random() < 0.5,
        epilogue=Epilogue(numbers.choice([None, "silu"]), residual=numbers.random() < 0.2),
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_spills(seed):
    numbers = random.Random(seed)
    found = [
        plan
        for _ in range(2)
        for plan in VARIANT.every_plan(random_problem(numbers).lifted(2), numbers.choice(list(PRESETS.values())))
    ]
    for plan, kernel in zip(found, compile_many(found), strict=True):
        assert kernel.resources.spill_bytes == kernel.resources.stack_bytes == 0, f"{plan.problem}: {plan.tile}"
