"""Gradients of the operators, by PyTorch's own backward of convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import LIBRARY, conv2d_cuda


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *numbers = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_size = None if bias is None else list(bias.shape)
    ctx.numbers = numbers


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, of those that are needed; uneven padding is added to x and cut off again."""
    x, weight = ctx.saved_tensors
    stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w = ctx.numbers
    even = (min(top, bottom), min(left, right))
    extra = (left - even[1], right - even[1], top - even[0], bottom - even[0])
    padded = F.pad(x, extra) if any(extra) else x
    needed = list(ctx.needs_input_grad[:3])
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        padded,
        weight,
        ctx.bias_size,
        [stride_h, stride_w],
        list(even),
        [dilation_h, dilation_w],
        False,
        [0, 0],
        x.shape[1],
        needed,
    )
    if needed[0] and any(extra):
        grad_x = grad_x[:, :, extra[2] : extra[2] + x.shape[2], extra[0] : extra[0] + x.shape[3]]
    grads = [value if need else None for value, need in zip((grad_x, grad_weight, grad_bias), needed, strict=True)]
    return (*grads, *[None] * len(ctx.numbers))


torch.library.register_autograd("dwconv::conv2d", _backward, setup_context=_setup_context, lib=LIBRARY)


class Conv2dFunction(torch.autograd.Function):
    """The operator on CUDA tensors in eager mode, with gradients: the same as its registered autograd, at less cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, numbers: tuple[int, ...]) -> Tensor:
        _setup_context(ctx, (x, weight, bias, *numbers), x)
        return conv2d_cuda(x, weight, bias, *numbers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, *grads)[:3], None)
