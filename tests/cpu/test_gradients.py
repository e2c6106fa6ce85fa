"""Gradients of the functions, and the operator under opcheck, torch.compile and autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dwconv
from convolutions import FUNCTIONS, LAYOUTS, Call, random_call
from dwconv.problem import ACTIVATIONS

OPERATOR = torch.ops.dwconv.convolution
WINDOWS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "uneven": {"padding": ((2, 0), (0, 1), (1, 1))},
    "dilated": {"dilation": 2, "padding": "same"},
}


def requiring(call: Call) -> list[Tensor]:
    """The tensors of a call, made to require gradients."""
    beside = [call.arguments.get(name) for name in ("scale", "shift", "residual")]
    return [t.requires_grad_() for t in (call.x, call.weight, call.bias, *beside) if t is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradients_are_torchs(dims, windows, layout):
    windows = windows | ({"padding": windows["padding"][:dims]} if isinstance(windows.get("padding"), tuple) else {})
    call = random_call((2, 3, 6, 7, 5)[: 2 + dims], (3, 2, 3)[:dims], multiplier=2, bias=True, layout=layout, **windows)
    leaves = requiring(call)
    theirs = [t.detach().clone().requires_grad_() for t in leaves]
    expected = FUNCTIONS[dims](*theirs, **windows)  # by PyTorch's own convolution and autograd: not emulated
    grad = torch.randn_like(expected)
    expected.backward(grad)
    with dwconv.emulated(variant="one_per_thread"):
        y = call()
        y.backward(grad)
    torch.testing.assert_close(y, expected, check_stride=dims > 1)
    for ours, other in zip(leaves, theirs, strict=True):
        torch.testing.assert_close(ours.grad, other.grad)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_in_sixteen_bits(dtype):
    call = random_call((2, 4, 9, 8), (3, 3), bias=True, padding=1, dtype=dtype, activation="silu", scale=True)
    leaves = requiring(call)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with dwconv.emulated(variant="one_per_thread"):
        call().sum().backward()
    y = dwconv.conv2d(*exact[:3], padding=1, activation="silu", scale=exact[3])
    y.sum().backward()
    for ours, other in zip(leaves, exact, strict=True):
        error = (ours.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 4 * torch.finfo(ours.dtype).eps


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradients_of_the_epilogue(activation):
    call = random_call(
        (1, 1, 3, 4), (2, 3), multiplier=2, bias=True, dtype="float64", padding=((1, 0), (0, 2)), stride=2,
        activation=activation, scale=True, shift=True, residual=True,
    )  # fmt: skip

    def function(x, weight, bias, scale, shift, residual):
        beside = {"activation": activation, "scale": scale, "shift": shift, "residual": residual}
        return Call(x, weight, bias, call.arguments | beside)()

    leaves = requiring(call)
    assert torch.autograd.gradcheck(function, leaves)
    if activation in (None, "silu"):
        assert torch.autograd.gradgradcheck(function, leaves)


def test_only_the_gradients_that_are_needed():
    call = random_call((2, 3, 6, 7), (3, 3), bias=True, activation="relu", scale=True)
    call.weight.requires_grad_()
    call().sum().backward()
    assert call.weight.grad is not None
    assert call.x.grad is call.bias.grad is call.arguments["scale"].grad is None


def test_a_gradient_changes_no_bit_of_the_result():
    call = random_call((2, 3, 6, 7), (3, 3), padding=1, dtype="float16", activation="gelu", scale=True, residual=True)
    with dwconv.emulated(variant="one_per_thread"):
        plain = call()
        recorded = replace(call, weight=call.weight.clone().requires_grad_())()
    assert recorded.requires_grad
    assert torch.equal(recorded, plain)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_operator_passes_opcheck(dims, activation):
    call = random_call(
        (2, 3, 6, 7, 5)[: 2 + dims], (3, 2, 3)[:dims], multiplier=2, bias=True, scale=activation is not None,
        residual=activation is not None,
    )  # fmt: skip
    requiring(call)
    scale, residual = call.arguments.get("scale"), call.arguments.get("residual")
    windows = ([1] * dims, [0] * 2 * dims, [1] * dims)
    torch.library.opcheck(
        OPERATOR.default, (call.x, call.weight, call.bias, scale, None, residual, *windows, activation)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_tracing_knows_the_memory_format(dims, layout):
    """Meta tensors get the strides that CUDA tensors get; the emulator's stand in for these."""
    for dtype in ("float16", "float64"):
        call = random_call((2, 3, 6, 7, 5)[: 2 + dims], (3, 2, 3)[:dims], padding=1, dtype=dtype, layout=layout)
        with dwconv.emulated(variant="one_per_thread"):
            y = call()
        traced = replace(call, x=call.x.to("meta"), weight=call.weight.to("meta"))()
        assert traced.shape == y.shape
        contiguous = dtype == "float64" and dims == 2  # on CUDA; PyTorch's rule for the CPU is another
        assert traced.stride() == (y.contiguous().stride() if contiguous else y.stride())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_traces_through(dynamic):
    call = random_call((2, 3, 11, 14), (3, 4), multiplier=2, bias=True)

    def function(x, residual):
        y = dwconv.conv2d(x, call.weight, call.bias, padding=((1, 1), (1, 2)), activation="relu", residual=residual)
        return y + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for x in (call.x, call.x[:1], call.x[:, :, :9], call.x.to(memory_format=torch.channels_last)):
        residual = torch.randn(x.shape[0], 6, *x.shape[2:])
        expected = F.conv2d(F.pad(x, (1, 2, 1, 1)), call.weight, call.bias, groups=3).relu() + residual + 1
        torch.testing.assert_close(compiled(x, residual), expected)
    with dwconv.emulated(variant="one_per_thread"):
        torch.testing.assert_close(compiled(x, residual), expected)


def test_compile_traces_gradients():
    call = random_call((2, 3, 6, 7), (3, 3), padding=1, activation="gelu_tanh", scale=True)
    leaves = requiring(call)

    def function(x, weight, scale):
        return dwconv.conv2d(x, weight, padding=1, activation="gelu_tanh", scale=scale).square().sum()

    expected = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_autocast_casts_as_torch_does():
    call = random_call((2, 3, 11, 14), (3, 4), multiplier=2, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(), F.conv2d(call.x, call.weight, call.bias, groups=3))
    with torch.autocast("cpu", torch.bfloat16), dwconv.emulated():
        theirs = F.conv2d(call.x, call.weight, call.bias, groups=3)
        torch.testing.assert_close(call(), theirs)
        mixed = dwconv.Conv2d(3, 6, 3, padding=1, groups=3)(call.x.bfloat16())
        finished = dwconv.conv2d(
            call.x, call.weight, activation="relu", scale=call.bias, residual=torch.ones(2, 6, 9, 11)
        )
    assert mixed.dtype == finished.dtype == torch.bfloat16
