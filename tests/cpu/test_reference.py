"""The reference against the definition written as loops, against PyTorch, and against results that must not pass."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dwconv import reference
from dwconv.problem import DepthwiseProblem
from problems import EDGE_PROBLEMS, make_inputs, problem_id, with_dtype

P = DepthwiseProblem
SMALL = [
    P(2, 2, (9,), (3,), padding=((2, 0),)),
    P(1, 3, (11,), (4,), stride=(2,), padding=((0, 5),), dilation=(2,), multiplier=2, bias=True),
    P(2, 2, (4, 5), (3, 2), padding=((1, 2), (0, 3)), bias=True),
    P(1, 2, (7, 6), (3, 3), stride=(3, 2), padding=((4, 1), (2, 2)), dilation=(1, 2), multiplier=3),
    P(1, 1, (1, 1), (3, 3), stride=(2, 2), padding=((6, 6), (6, 6))),
    P(0, 2, (4, 5), (3, 2)),
    P(1, 2, (3, 4, 5), (2, 3, 2), stride=(1, 2, 2), padding=((1, 0), (1, 1), (0, 2)), multiplier=2),
    P(2, 1, (4, 3, 3), (2, 2, 3), dilation=(3, 1, 1), bias=True),
]
by_problem = pytest.mark.parametrize("problem", SMALL, ids=problem_id)


def by_loops(x, weight, bias, problem):
    """The definition: every output, every tap; a tap outside x adds nothing."""
    y = torch.zeros(problem.y_shape, dtype=torch.float64)
    magnitude = torch.zeros_like(y)
    for place in itertools.product(*map(range, problem.y_shape)):
        n, k, *p = place
        total = float(bias[k]) if bias is not None else 0.0
        absolute = abs(total)
        for tap in itertools.product(*map(range, problem.filter)):
            at = [
                p[d] * problem.stride[d] - problem.padding[d][0] + tap[d] * problem.dilation[d]
                for d in range(problem.dims)
            ]
            if all(0 <= at[d] < problem.size[d] for d in range(problem.dims)):
                term = float(x[(n, k // problem.multiplier, *at)]) * float(weight[(k, 0, *tap)])
                total += term
                absolute += abs(term)
        y[place] = total
        magnitude[place] = absolute
    return y, magnitude


@by_problem
def test_exact_is_the_definition(problem):
    inputs = make_inputs(problem)
    exact, bound = reference.forward(*inputs, problem)
    expected, magnitude = by_loops(*inputs, problem)
    assert exact.shape == expected.shape == problem.y_shape
    assert torch.allclose(exact, expected, rtol=1e-13, atol=1e-13)
    n = problem.taps + 1
    assert torch.allclose(bound, 1.01 * 2.0**-24 * (n * magnitude + expected.abs()), rtol=1e-9, atol=1e-37)


@by_problem
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_only_windows_that_hold_it_are_not_finite(problem, value):
    x, weight, bias = make_inputs(problem)
    if x.numel() == 0:
        return
    x[(0, 0, *(size // 2 for size in problem.size))] = value
    exact, bound = reference.forward(x, weight, bias, problem)
    expected, _ = by_loops(x, weight, bias, problem)
    assert torch.equal(exact.isnan(), expected.isnan())
    assert torch.equal(exact.isinf(), expected.isinf())
    assert not reference.mismatch(expected, exact, bound).any()


@by_problem
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pytorch_is_within_the_bound(problem, dtype):
    problem = with_dtype(problem, dtype)
    x, weight, bias = make_inputs(problem)
    pads = [pad for dimension in reversed(problem.padding) for pad in dimension]
    convolution = (F.conv1d, F.conv2d, F.conv3d)[problem.dims - 1]
    y = convolution(
        F.pad(x, pads), weight, bias, stride=problem.stride, dilation=problem.dilation, groups=problem.channels
    )
    assert reference.describe_mismatch(y, *reference.forward(x, weight, bias, problem)) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bound_admits_one_rounding_to_sixteen_bits(dtype):
    problem = P(2, 4, (20, 20), (5, 5), bias=True, dtype=dtype)
    inputs = make_inputs(problem)
    exact, bound = reference.forward(*inputs, problem)
    y = exact.float().to(inputs[0].dtype)
    assert not reference.mismatch(y, exact, bound).any()
    assert reference.mismatch(y * (1 + 2 * torch.finfo(y.dtype).eps), exact, bound).float().mean() > 0.9


def test_accumulation_in_float16_breaks_the_bound():
    problem = P(1, 4, (32, 32), (7, 7), dtype="float16")
    x, weight, _ = make_inputs(problem)
    exact, bound = reference.forward(x, weight, None, problem)
    y = torch.zeros(problem.y_shape, dtype=torch.float16)
    for u, v in itertools.product(range(7), range(7)):
        y += x[:, :, u : u + 26, v : v + 26] * weight[:, 0, u, v].view(1, -1, 1, 1)
    assert reference.mismatch(y, exact, bound).float().mean() > 0.5


def test_bound_rejects_a_wrong_tap():
    problem = P(1, 8, (32, 32), (3, 3), padding=((1, 1), (1, 1)))
    x, weight, _ = make_inputs(problem)
    exact, bound = reference.forward(x, weight, None, problem)
    nearly = weight.clone()
    nearly[:, 0, 1, 1] *= 1 + 2.0**-16
    other, _ = reference.forward(x, nearly, None, problem)
    assert reference.mismatch(other, exact, bound).float().mean() > 0.5


def test_padding_never_multiplies():
    problem = P(1, 1, (3,), (3,), padding=((2, 2),))
    weight = torch.tensor([[[math.inf, 1.0, 1.0]]])
    exact, _ = reference.forward(torch.ones(1, 1, 3), weight, None, problem)
    assert exact.flatten().tolist() == [1.0, 2.0, math.inf, math.inf, math.inf]


def test_mismatch_tells_infinities_apart():
    inf, nan = math.inf, math.nan
    exact = torch.tensor([inf, inf, -inf, nan, nan, 1.0, 1.0, 1.0], dtype=torch.float64)
    y = torch.tensor([inf, -inf, 1e30, nan, inf, inf, nan, 1.0])
    wrong = reference.mismatch(y, exact, torch.full((8,), 1e-6, dtype=torch.float64))
    assert wrong.tolist() == [False, True, True, False, True, True, True, False]


def test_description_names_the_worst():
    exact = torch.zeros(2, 3, dtype=torch.float64)
    bound = torch.full_like(exact, 0.5)
    y = exact.clone()
    y[0, 1], y[1, 2] = 1.0, -2.0
    text = reference.describe_mismatch(y, exact, bound)
    assert text == "2 of 6 outputs are wrong; the worst, at (1, 2), is -2 instead of 0, 4 times the bound"
    y[0, 0] = math.nan
    assert "at (0, 0), is nan instead of 0, which no rounding explains" in str(
        reference.describe_mismatch(y, exact, bound)
    )
    assert "shape (2, 2) instead of (2, 3)" in str(reference.describe_mismatch(y[:, :2], exact, bound))
    assert reference.describe_mismatch(exact, exact, bound) is None


def test_edge_problems_cover_what_they_should():
    assert len({problem_id(problem) for problem in EDGE_PROBLEMS}) == len(EDGE_PROBLEMS)
    assert {problem.filter for problem in EDGE_PROBLEMS} >= {(1, 1), (3, 3), (5, 5), (7, 7), (11, 11), (1, 31)}
    assert {problem.stride for problem in EDGE_PROBLEMS} >= {(1, 1), (2, 2), (3, 3), (1, 2), (3, 1)}
    assert {max(problem.dilation) for problem in EDGE_PROBLEMS} == {1, 2, 3}
    assert {problem.multiplier for problem in EDGE_PROBLEMS} == {1, 2, 3}
    assert {problem.aligned for problem in EDGE_PROBLEMS} == {4, 8, 16}
    assert {1, 70} <= {problem.size[1] for problem in EDGE_PROBLEMS}
    assert any(max(map(max, problem.padding)) > max(problem.filter) for problem in EDGE_PROBLEMS)
    assert any(problem.batch == 0 for problem in EDGE_PROBLEMS)


@pytest.mark.parametrize("problem", EDGE_PROBLEMS, ids=problem_id)
def test_inputs_have_the_strides_and_alignment_of_their_problem(problem):
    x, weight, bias = make_inputs(problem)
    assert tuple(x.shape) == problem.x_shape
    assert tuple(weight.shape) == problem.weight_shape
    assert (bias is not None) == problem.bias
    assert problem.batch == 0 or x.stride() == problem.plane_strides
    assert x.isfinite().all()
    assert weight.isfinite().all()
    for tensor in (x, weight):
        if tensor.numel():
            assert tensor.data_ptr() % 16 == problem.aligned % 16
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = (tensor.storage_offset() + last + 1) * tensor.element_size()
            assert end == tensor.untyped_storage().nbytes()
