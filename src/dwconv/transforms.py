"""The convolution under torch.func and forward-mode differentiation: the operators with rules for vmap and jvp.

A convolution is linear in x and in its filters, so a derivative along a direction is a convolution, too. Channels don't
depend on each other, so what vmap maps over becomes more channels; or more images, where the filters are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .ops import torch_epilogue
from .tensors import NO_EXTRAS, Extras, Geometry, layout_of, result_layout

_ops = torch.ops.dwconv

Dims = tuple[int | None, ...]


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, looks at what is computed.

    `ops.takes_now` looks at the same: ask only where that is false, so that eager calls don't pay twice.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras | None = None
) -> Tensor:
    """The convolution and its epilogue, which is PyTorch's operations here."""
    y: Tensor = _Convolution.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return torch_epilogue(y, extras or NO_EXTRAS)


def _input_gradient(grad: Tensor, weight: Tensor, shape: Sequence[int], geometry: Geometry, last: bool) -> Tensor:
    of_x: Tensor = _InputGradient.apply(grad, weight, shape, geometry, last)  # type: ignore[no-untyped-call]
    return of_x


def _filter_gradient(x: Tensor, grad: Tensor, taps: Sequence[int], geometry: Geometry, last: bool) -> Tensor:
    of_weight: Tensor = _FilterGradient.apply(x, grad, taps, geometry, last)  # type: ignore[no-untyped-call]
    return of_weight


def _sum(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _numbers(geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return geometry.stride, geometry.padding, geometry.dilation


def _in_front(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """The tensor with what is mapped over as its first dimension, `count` times the same where it isn't mapped."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _as_images(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """[N, C, ...] mapped over becomes [count * N, C, ...]."""
    return _in_front(tensor, dim, count).flatten(0, 1)


def _as_channels(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """[N, C, ...] mapped over becomes [N, count * C, ...]."""
    return _in_front(tensor, dim, count).transpose(0, 1).flatten(1, 2)


class _Bilinear(torch.autograd.Function):
    """An operator that is linear in its first two arguments."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        first, second, *ctx.others = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)


class _Convolution(_Bilinear):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        y: Tensor = _ops.convolution(x, weight, bias, None, None, None, *_numbers(geometry), None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        bias, geometry = ctx.others
        last = layout_of(x, result_layout(x, weight)) == "channels_last"
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _input_gradient(grad, weight, x.shape, geometry, last)
        if ctx.needs_input_grad[1]:
            of_weight = _filter_gradient(x, grad, weight.shape[2:], geometry, last)
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = grad.sum([0, *range(2, grad.dim())])
        return of_x, of_weight, of_bias, None

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None, _: None) -> Tensor:
        x, weight = ctx.saved_tensors
        geometry = ctx.others[1]
        parts = []
        if of_x is not None:
            parts.append(convolution(of_x, weight, None, geometry))
        if of_weight is not None:
            parts.append(convolution(x, of_weight, of_bias, geometry))
        elif of_bias is not None:
            parts.append(convolution(x, torch.zeros_like(weight), of_bias, geometry))
        return _sum(parts)

    @staticmethod
    def vmap(
        info: Any, in_dims: Dims, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, int]:
        count = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            y = convolution(_as_images(x, in_dims[0], count), weight, bias, geometry)
            return y.unflatten(0, (count, -1)), 0
        weights = _in_front(weight, in_dims[1], count).flatten(0, 1)
        biases = None if bias is None else _in_front(bias, in_dims[2], count).flatten(0, 1)
        y = convolution(_as_channels(x, in_dims[0], count), weights, biases, geometry)
        return y.unflatten(1, (count, -1)), 1


def _along(operator: Callable[..., Tensor], ctx: Any, of_first: Tensor | None, of_second: Tensor | None) -> Tensor:
    """The derivative of a `_Bilinear` operator along directions of its two tensors, of which one may be missing."""
    first, second = ctx.saved_tensors
    parts = []
    if of_first is not None:
        parts.append(operator(of_first, second, *ctx.others))
    if of_second is not None:
        parts.append(operator(first, of_second, *ctx.others))
    return _sum(parts)


class _InputGradient(_Bilinear):
    @staticmethod
    def forward(grad: Tensor, weight: Tensor, shape: Sequence[int], geometry: Geometry, last: bool) -> Tensor:
        of_x: Tensor = _ops.input_gradient(grad, weight, shape, *_numbers(geometry), last)
        return of_x

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        _, geometry, last = ctx.others
        of_grad = of_weight = None
        if ctx.needs_input_grad[0]:
            of_grad = convolution(grad_x, weight, None, geometry)
        if ctx.needs_input_grad[1]:
            of_weight = _filter_gradient(grad_x, grad, weight.shape[2:], geometry, last)
        return of_grad, of_weight, None, None, None

    @staticmethod
    def jvp(ctx: Any, of_grad: Tensor | None, of_weight: Tensor | None, *_: None) -> Tensor:
        return _along(_input_gradient, ctx, of_grad, of_weight)

    @staticmethod
    def vmap(
        info: Any, in_dims: Dims, grad: Tensor, weight: Tensor, shape: Sequence[int], geometry: Geometry, last: bool
    ) -> tuple[Tensor, int]:
        count, (images, channels, *size) = info.batch_size, shape
        if in_dims[1] is None:
            grads = _as_images(grad, in_dims[0], count)
            of_x = _input_gradient(grads, weight, (count * images, channels, *size), geometry, last)
            return of_x.unflatten(0, (count, -1)), 0
        grads, weights = _as_channels(grad, in_dims[0], count), _in_front(weight, in_dims[1], count).flatten(0, 1)
        of_x = _input_gradient(grads, weights, (images, count * channels, *size), geometry, last)
        return of_x.unflatten(1, (count, -1)), 1


class _FilterGradient(_Bilinear):
    @staticmethod
    def forward(x: Tensor, grad: Tensor, taps: Sequence[int], geometry: Geometry, last: bool) -> Tensor:
        of_weight: Tensor = _ops.filter_gradient(x, grad, taps, *_numbers(geometry), False, last)[0]
        return of_weight

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        x, grad = ctx.saved_tensors
        _, geometry, last = ctx.others
        of_x = of_grad = None
        if ctx.needs_input_grad[0]:
            of_x = _input_gradient(grad, grad_weight, x.shape, geometry, last)
        if ctx.needs_input_grad[1]:
            of_grad = convolution(x, grad_weight, None, geometry)
        return of_x, of_grad, None, None, None

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_grad: Tensor | None, *_: None) -> Tensor:
        return _along(_filter_gradient, ctx, of_x, of_grad)

    @staticmethod
    def vmap(
        info: Any, in_dims: Dims, x: Tensor, grad: Tensor, taps: Sequence[int], geometry: Geometry, last: bool
    ) -> tuple[Tensor, int]:
        count = info.batch_size
        images, grads = _as_channels(x, in_dims[0], count), _as_channels(grad, in_dims[1], count)
        of_weight = _filter_gradient(images, grads, taps, geometry, last)
        return of_weight.unflatten(0, (count, -1)), 0
