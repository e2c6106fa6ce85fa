"""The reference against the definition written as loops, against PyTorch, and against results that must not pass."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dwconv import reference
from dwconv.problem import ACTIVATIONS, DepthwiseProblem, Epilogue
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("problem", [P(2, 8, (200,), (31,)), P(1, 4, (32, 32), (7, 7)), P(1, 2, (9, 9, 9), (3, 3, 3))])
def test_accumulation_in_sixteen_bits_breaks_the_bound(problem, dtype):
    problem = with_dtype(problem, dtype)
    x, weight, _ = make_inputs(problem)
    y = sum_of_terms(x, weight, problem)
    assert reference.mismatch(y, *reference.forward(x, weight, None, problem)).float().mean() > 0.5
    y = sum_of_terms(x.float(), weight.float(), problem).to(x.dtype)
    assert not reference.mismatch(y, *reference.forward(x, weight, None, problem)).any()


def sum_of_terms(x, weight, problem):
    """A convolution of stride 1 without padding, summed tap by tap in the dtype of the tensors."""
    y = torch.zeros(problem.y_shape, dtype=x.dtype)
    for tap in itertools.product(*map(range, problem.filter)):
        window = [slice(u, u + size) for u, size in zip(tap, problem.out_size, strict=True)]
        y += x[(..., *window)] * weight[(slice(None), 0, *tap)].view(-1, *(1,) * problem.dims)
    return y


FORMULAS = {  # of one number, in the words of PyTorch's documentation
    None: lambda v: v,
    "relu": lambda v: max(v, 0.0),
    "relu6": lambda v: min(max(v, 0.0), 6.0),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "hardswish": lambda v: v * min(max(v + 3, 0.0), 6.0) / 6,
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "leaky_relu": lambda v: v if v > 0 else 0.01 * v,
}
IN_TORCH = {
    None: lambda v: v,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    **{name: getattr(F, name) for name in ("relu", "relu6", "silu", "gelu", "hardswish", "sigmoid", "leaky_relu")},
}


def with_epilogue(dtype, activation, spread=3.0):
    """A problem with everything after its sum, and its tensors: x, weight, bias, scale, shift, residual."""
    epilogue = Epilogue(activation, scale=True, shift=True, residual=True)
    problem = P(2, 6, (20, 20), (3, 3), multiplier=2, bias=True, dtype=dtype, epilogue=epilogue)
    random = torch.Generator().manual_seed(1)
    beside = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((12,), (12,), problem.y_shape)]
    x, *others = make_inputs(problem)
    return problem, (x * spread, *others, *(tensor.to(x.dtype) for tensor in beside))


def in_the_arithmetic_of(dtype, problem, tensors, rounded_before=False):
    """The result by PyTorch's operations in a dtype, rounded at the end; or already before the epilogue."""
    x, weight, bias, scale, shift, residual = (tensor.to(dtype) for tensor in tensors)
    total = F.conv2d(x, weight, bias, groups=problem.channels)
    if rounded_before:
        total = total.to(tensors[0].dtype).to(dtype)
    y = IN_TORCH[problem.epilogue.activation](total) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + residual
    return y.to(tensors[0].dtype)


def test_every_activation_has_a_bound():
    assert set(reference.ACTIVATIONS) == set(ACTIVATIONS) == set(FORMULAS) - {None}
    v = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    for name, activation in reference.ACTIVATIONS.items():
        exact = activation.exact(v)
        expected = torch.tensor([FORMULAS[name](float(u)) for u in v[::1000]], dtype=torch.float64)
        assert torch.allclose(exact[::1000], expected, rtol=1e-9, atol=1e-12)
        steepest = float((exact.diff() / v.diff()).abs().max())
        assert steepest <= activation.slope * (1 + 1e-9)
        assert activation.slope < 1.05 * steepest, "the slope is no larger than it must be"


@pytest.mark.parametrize("activation", FORMULAS)
def test_epilogue_is_the_definition(activation):
    problem, tensors = with_epilogue("float64", activation)
    x, weight, bias, scale, shift, residual = tensors
    total, _ = by_loops(x[:1, :2], weight[:4], bias[:4], replace(problem, batch=1, channels=2))
    expected = torch.tensor([FORMULAS[activation](float(v)) for v in total.flatten()], dtype=torch.float64)
    expected = expected.view_as(total) * scale[:4].view(-1, 1, 1) + shift[:4].view(-1, 1, 1) + residual[:1, :4]
    exact, _ = reference.forward(x, weight, bias, problem, scale, shift, residual)
    assert torch.allclose(exact[:1, :4], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_bound_of_an_epilogue(dtype, activation):
    """It admits every operation in float32 and one rounding at the end, but none before the epilogue."""
    for spread in (1.0, 30.0):
        problem, tensors = with_epilogue(dtype, activation, spread)
        exact, bound = reference.forward(*tensors[:3], problem, *tensors[3:])
        y = in_the_arithmetic_of(torch.float64 if dtype == "float64" else torch.float32, problem, tensors)
        assert reference.describe_mismatch(y, exact, bound) is None
        if dtype in ("float16", "bfloat16"):
            assert reference.mismatch(y * (1 + 2 * torch.finfo(y.dtype).eps), exact, bound).float().mean() > 0.9
    if dtype in ("float16", "bfloat16") and activation not in ("relu6", "sigmoid"):
        y = in_the_arithmetic_of(torch.float32, problem, tensors, rounded_before=True)
        assert reference.mismatch(y, exact, bound).float().mean() > 0.02


@pytest.mark.parametrize("other", [("gelu", "gelu_tanh"), ("silu", "hardswish"), ("relu", "leaky_relu")], ids="-".join)
def test_bound_tells_activations_apart(other):
    problem, tensors = with_epilogue("float32", other[0])
    exact, bound = reference.forward(*tensors[:3], problem, *tensors[3:])
    problem = replace(problem, epilogue=replace(problem.epilogue, activation=other[1]))
    assert reference.mismatch(in_the_arithmetic_of(torch.float32, problem, tensors), exact, bound).float().mean() > 0.2


INF, NAN = math.inf, math.nan
NOT_FINITE = {  # of inf, -inf, nan
    "relu": (INF, 0.0, NAN),
    "relu6": (6.0, 0.0, NAN),
    "silu": (INF, NAN, NAN),
    "gelu": (INF, NAN, NAN),
    "gelu_tanh": (INF, NAN, NAN),
    "hardswish": (INF, NAN, NAN),
    "sigmoid": (1.0, 0.0, NAN),
    "leaky_relu": (INF, -INF, NAN),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_what_is_not_finite(activation):
    problem = P(1, 1, (3,), (1,), epilogue=Epilogue(activation))
    x = torch.tensor([[[INF, -INF, NAN]]])
    exact, bound = reference.forward(x, torch.ones(1, 1, 1), None, problem)
    assert torch.equal(exact.flatten().nan_to_num(7), torch.tensor(NOT_FINITE[activation]).double().nan_to_num(7))
    assert (bound[exact.isfinite()] < 1e-5).all(), "a finite result of an infinite sum is as exact as any"


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
