"""Depthwise convolution as functions of tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, ops
from .errors import DepthwiseError
from .problem import Padding, expand, padding_pairs


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Depthwise convolution of images: every channel is filtered by itself.

        y[n, c*m + j, p, q] = b[c*m + j]
            + sum_{u, v} w[c*m + j, 0, u, v] * x[n, c, p*stride - padding + u*dilation, q*stride - padding + v*dilation]

    Equivalent to `torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])`; the
    groups are implied by the shapes. Runs dwconv's kernels for float32 on CUDA and channels-first memory (columns
    contiguous, any other strides); PyTorch's own convolution computes other dtypes, channels-last memory, CPU tensors,
    and everything under `torch.autocast`.

    Args:
        x: [N, C, H, W], or [C, H, W] for one image; N may be 0. Where neighbouring columns aren't neighbours in memory
            (and x isn't channels_last), x is copied first.
        weight: [C*m, 1, KH, KW], m the channel multiplier.
        bias: [C*m], or None.
        stride, dilation: one integer, or (height, width).
        padding: zeros around x: an integer, (height, width), 'valid', 'same' (stride 1 only), or a (before, after) pair
            for each dimension, such as ((1, 1), (2, 0)).

    Returns:
        y: [N, C*m, OH, OW] with OH = (H + padding - dilation*(KH - 1) - 1) // stride + 1, and OW alike.

    Raises:
        DepthwiseError: (a ValueError) shapes, dtypes or devices don't belong together, the filter is larger than the
            padded input, or a stride or dilation is below 1.

    >>> import torch, dwconv
    >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(3, 1, 3, 3)
    >>> dwconv.conv2d(x, weight, padding=1).shape
    torch.Size([2, 3, 8, 8])
    """
    if weight.dim() != 4:
        raise DepthwiseError(f"weight has shape {tuple(weight.shape)}; a depthwise filter is [C*m, 1, KH, KW]")
    sizes = (stride, padding, dilation, weight.shape[2], weight.shape[3])
    if torch.compiler.is_compiling():
        numbers = _numbers(*sizes)
    else:
        try:
            numbers = _known_numbers(*sizes)
        except TypeError:  # lists can't be looked up
            numbers = _numbers(*sizes)
    if x.dim() == 3:
        return _conv2d(x.unsqueeze(0), weight, bias, numbers).squeeze(0)
    return _conv2d(x, weight, bias, numbers)


def _numbers(
    stride: int | Sequence[int], padding: Padding, dilation: int | Sequence[int], filter_h: int, filter_w: int
) -> tuple[int, ...]:
    """The operator's integers: stride, padding (top, bottom, left, right) and dilation."""
    strides = expand("stride", stride if isinstance(stride, int) else tuple(stride), 2)
    dilations = expand("dilation", dilation if isinstance(dilation, int) else tuple(dilation), 2)
    (top, bottom), (left, right) = padding_pairs(padding, (filter_h, filter_w), strides, dilations)
    return (*strides, top, bottom, left, right, *dilations)


_known_numbers = functools.lru_cache(maxsize=1024)(_numbers)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: tuple[int, ...]) -> Tensor:
    y: Tensor
    if torch.is_autocast_enabled(x.device.type):  # to 16 bits, which PyTorch computes
        return ops.torch_conv2d(x, weight, bias, *ops.grouped(numbers))
    if torch.compiler.is_compiling() or not ops.takes_now(x, weight, bias):
        y = torch.ops.dwconv.conv2d(x, weight, bias, *numbers)
    elif torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = autograd.Conv2dFunction.apply(x, weight, bias, numbers)  # type: ignore[no-untyped-call]
    else:
        y = ops.conv2d_cuda(x, weight, bias, *numbers)
    return y
