"""Gradients of the operator, by PyTorch's own backward of convolution and of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import LIBRARY, geometry_of, operator_arguments, run_on_cuda, takes_now, torch_epilogue
from .tensors import NO_EXTRAS, Extras, Geometry

_aten = torch.ops.aten


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
    if torch.compiler.is_compiling() or not takes_now(x, weight, bias, extras):
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
    ctx.bias_size = None if bias is None else list(bias.shape)
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
    """Of x, weight and bias; uneven padding is added to x and cut off its gradient."""
    if not any(needed):
        return [None, None, None]
    geometry: Geometry = ctx.geometry
    even = [min(pair) for pair in geometry.pairs]
    extra = [(before - least, after - least) for (before, after), least in zip(geometry.pairs, even, strict=True)]
    uneven = any(map(any, extra))
    padded = F.pad(x, [pad for pair in reversed(extra) for pad in pair]) if uneven else x
    grad_x, grad_weight, grad_bias = _aten.convolution_backward(
        grad,
        padded,
        weight,
        ctx.bias_size,
        list(geometry.stride),
        even,
        list(geometry.dilation),
        False,
        [0] * len(even),
        x.shape[1],
        needed,
    )
    if needed[0] and uneven:
        window = [slice(before, before + size) for (before, _), size in zip(extra, x.shape[2:], strict=True)]
        grad_x = grad_x[(slice(None), slice(None), *window)]
    return [value if need else None for value, need in zip((grad_x, grad_weight, grad_bias), needed, strict=True)]


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
