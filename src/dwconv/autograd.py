"""Gradients of the operators: those of sums by dwconv's kernels, those of activations by PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import emulator, transforms
from .gradient_ops import filter_gradient, input_gradient, torch_gradients
from .ops import LIBRARY, geometry_of, operator_arguments, run_on_cuda, takes_now, torch_epilogue
from .tensors import NO_EXTRAS, Extras, Geometry, layout_of, result_layout

_aten, _ops = torch.ops.aten, torch.ops.dwconv


def _silu_backward(grad: Tensor, v: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # silu_backward has no derivative of its own
        gate = torch.sigmoid(v)
        return grad * gate * (1 + v * (1 - gate))
    grad_v: Tensor = _aten.silu_backward(grad, v)
    return grad_v


# gradient of the activation's input, from the gradient of its output and from its input
_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, v: _aten.threshold_backward(grad, v, 0),
    "relu6": lambda grad, v: _aten.hardtanh_backward(grad, v, 0, 6),
    "silu": _silu_backward,
    "gelu": lambda grad, v: _aten.gelu_backward(grad, v),
    "gelu_tanh": lambda grad, v: _aten.gelu_backward(grad, v, approximate="tanh"),
    "hardswish": lambda grad, v: _aten.hardswish_backward(grad, v),
    "sigmoid": lambda grad, v: _aten.sigmoid_backward(grad, torch.sigmoid(v)),
    "leaky_relu": lambda grad, v: _aten.leaky_relu_backward(grad, v, 0.01, False),
}


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras | None = None
) -> Tensor:
    """The operator, by the shortest way that the tensors allow, with gradients where some are required."""
    y: Tensor
    compiling = torch.compiler.is_compiling()
    if compiling or not takes_now(x, weight, bias, extras):
        if not compiling and transforms.is_transformed():
            y = transforms.convolution(x, weight, bias, geometry, extras)
        else:
            y = torch.ops.dwconv.convolution(*operator_arguments(x, weight, bias, geometry, extras or NO_EXTRAS))
    elif torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (extras is not None and any(tensor is not None and tensor.requires_grad for tensor in extras[1:]))
    ):
        y = _Convolution.apply(geometry, extras, x, weight, bias, *(extras or NO_EXTRAS)[1:])  # type: ignore[no-untyped-call]
    else:
        y = run_on_cuda(x, weight, bias, geometry, extras)
    return y


def _save(
    ctx: Any,
    geometry: Geometry,
    activation: str | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Keeps what the backward needs; it computes the sum again where the epilogue's gradients ask for it."""
    ctx.geometry, ctx.activation = geometry, activation
    ctx.save_for_backward(x, weight, None if activation is None and scale is None else bias, scale)


def _gradients(ctx: Any, grad: Tensor, needed: list[bool]) -> list[Tensor | None]:
    """Of x, weight, bias, scale, shift and residual, those that are needed."""
    x, weight, bias, scale = ctx.saved_tensors
    activation = ctx.activation
    all_but_channels = [0, *range(2, grad.dim())]
    grad_scale = None
    grad_shift = grad.sum(all_but_channels) if needed[4] else None
    grad_residual = grad if needed[5] else None
    if (activation is not None and any(needed[:3])) or needed[3]:
        total = convolution(x, weight, bias, ctx.geometry)
    if needed[3]:
        grad_scale = (grad * torch_epilogue(total, Extras(activation))).sum(all_but_channels)
    if scale is not None:
        grad = grad * scale.view(-1, *(1,) * (grad.dim() - 2))
    if activation is not None and any(needed[:3]):
        grad = _ACTIVATIONS[activation](grad, total)
    return [*_convolution_gradients(ctx, grad, x, weight, needed[:3]), grad_scale, grad_shift, grad_residual]


def _convolution_gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> list[Tensor | None]:
    """Of x, weight and bias."""
    geometry: Geometry = ctx.geometry
    if not any(needed):
        return [None, None, None]
    if not x.is_cuda and emulator.active() is None:
        found = torch_gradients(grad, x, weight, geometry, needed)
        return [value if need else None for value, need in zip(found, needed, strict=True)]
    layout = layout_of(x, result_layout(x, weight))
    shape, taps = tuple(x.shape), tuple(weight.shape[2:])
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or not takes_now(grad, x, weight, None)
    numbers = geometry.stride, geometry.padding, geometry.dilation
    grad_x = grad_weight = grad_bias = None
    if needed[0] and recorded:
        grad_x = _ops.input_gradient(grad, weight, shape, *numbers, layout == "channels_last")
    elif needed[0]:
        grad_x = input_gradient(grad, weight, shape, geometry, layout)
    if needed[1] and recorded:
        grad_weight, grad_bias = _ops.filter_gradient(x, grad, taps, *numbers, needed[2], layout == "channels_last")
    elif needed[1]:
        grad_weight, grad_bias = filter_gradient(x, grad, taps, geometry, needed[2], layout)
    elif needed[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return [grad_x, grad_weight, grad_bias if needed[2] else None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, scale, _, _, stride, padding, dilation, activation = inputs
    _save(ctx, geometry_of(tuple(stride), tuple(padding), tuple(dilation)), activation, x, weight, bias, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad, list(ctx.needs_input_grad[:6])), None, None, None, None)


torch.library.register_autograd("dwconv::convolution", _backward, setup_context=_setup_context, lib=LIBRARY)


class _Convolution(torch.autograd.Function):
    """The operator on CUDA tensors in eager mode, with gradients: the same as its registered autograd, at less cost."""

    @staticmethod
    def forward(ctx: Any, geometry: Geometry, extras: Extras | None, *tensors: Any) -> Tensor:
        x, weight, bias, scale, _, _ = tensors
        _save(ctx, geometry, None if extras is None else extras.activation, x, weight, bias, scale)
        return run_on_cuda(x, weight, bias, geometry, extras)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *_gradients(ctx, grads[0], list(ctx.needs_input_grad[2:8])))


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of a gradient: its two tensors, and what comes behind them."""
    first, second, *ctx.numbers = inputs
    ctx.save_for_backward(first, second)


def _backward_of_input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of y's gradient and of the filters, from `grad`, which is shaped like x."""
    grad_y, weight = ctx.saved_tensors
    _, *numbers, channels_last = ctx.numbers
    of_grad = of_weight = None
    if ctx.needs_input_grad[0]:
        of_grad = _ops.convolution(grad, weight, None, None, None, None, *numbers, None)
    if ctx.needs_input_grad[1]:
        of_weight, _ = _ops.filter_gradient(grad, grad_y, weight.shape[2:], *numbers, False, channels_last)
    return of_grad, of_weight, None, None, None, None, None


def _backward_of_filter_gradient(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    """Of x and of y's gradient, from gradients shaped like the filters and the bias."""
    x, grad_y = ctx.saved_tensors
    _, *numbers, bias, channels_last = ctx.numbers
    of_x = of_grad = None
    if ctx.needs_input_grad[0]:
        of_x = _ops.input_gradient(grad_y, grad_weight, x.shape, *numbers, channels_last)
    if ctx.needs_input_grad[1]:
        of_grad = _ops.convolution(x, grad_weight, grad_bias if bias else None, None, None, None, *numbers, None)
    return of_x, of_grad, None, None, None, None, None, None


for _name, _formula in (
    ("input_gradient", _backward_of_input_gradient),
    ("filter_gradient", _backward_of_filter_gradient),
):
    torch.library.register_autograd(f"dwconv::{_name}", _formula, setup_context=_save_factors, lib=LIBRARY)
