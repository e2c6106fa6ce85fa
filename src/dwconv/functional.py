"""Depthwise convolution as functions of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import autograd, flops  # noqa: F401  # flops registers what profilers count
from .problem import ACTIVATIONS, Epilogue, Padding, expand, padding_pairs
from .tensors import Extras, Geometry, check_dims

__all__ = ["CONVOLUTIONS", "conv1d", "conv2d", "conv3d"]


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution of sequences: every channel is filtered by itself.

        sum[n, k, p] = bias[k] + sum_u weight[k, 0, u] * x[n, k // m, p*stride - before + u*dilation]
        y = scale * activation(sum) + shift + residual

    Equivalent to `torch.nn.functional.conv1d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])`, then the
    epilogue. `padding=((dilation*(K - 1), 0),)` is causal: y[..., p] depends on x[..., :p + 1].

    All else (memory, dtypes, gradients, where it runs) is as in `dwconv.conv2d`. PyTorch has no memory format
    channels_last for sequences: here a tensor [N, C, L] whose channels are neighbours in memory is channels-last, such
    as `x.transpose(1, 2)` of a contiguous [N, L, C], and so is its result on CUDA (PyTorch's is always contiguous).

    Args:
        x: [N, C, L], or [C, L] for one sequence; N may be 0.
        weight: [C*m, 1, K], m the channel multiplier.
        bias: [C*m], or None.
        stride, dilation: an integer.
        padding: zeros around x: an integer, 'valid', 'same' (stride 1 only), or one pair: ((before, after),).
        activation: None, 'relu', 'relu6', 'silu', 'gelu', 'gelu_tanh', 'hardswish', 'sigmoid', or 'leaky_relu' (0.01).
        scale, shift: [C*m], or None.
        residual: shaped like y, or None.

    Returns:
        y: [N, C*m, OL] with OL = (L + before + after - dilation*(K - 1) - 1) // stride + 1.

    Raises:
        DepthwiseError: (a ValueError) shapes, dtypes or devices don't belong together, the filter is larger than the
            padded input, a stride or dilation is below 1, or the activation is unknown.

    >>> import torch, dwconv
    >>> x, weight = torch.randn(2, 3, 100), torch.randn(3, 1, 4)
    >>> dwconv.conv1d(x, weight, padding=((3, 0),), activation="silu").shape
    torch.Size([2, 3, 100])
    """
    return _convolution(1, x, weight, bias, stride, padding, dilation, activation, scale, shift, residual)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution of images: every channel is filtered by itself.

        sum[n, k, p, q] = bias[k] + sum_{u, v} weight[k, 0, u, v]
            * x[n, k // m, p*stride - top + u*dilation, q*stride - left + v*dilation]
        y = scale * activation(sum) + shift + residual

    Equivalent to `torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])`; the
    groups are implied by the shapes. Then the epilogue: `y = F.relu(y) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) +
    residual` for activation='relu'. The kernels apply it before they store a sum, so it costs no memory traffic but the
    residual's, and y is rounded once.

    CUDA tensors run dwconv's kernels: float16, bfloat16 and float32 are summed in float32 (never TF32), float64 in
    float64. CPU tensors (outside of `dwconv.emulated()`) go to PyTorch's own convolution and operations. Under
    `torch.autocast` all tensors but those of float64 are cast to its dtype, as those of F.conv2d are.

    Gradients of x, weight and bias run dwconv's kernels, too, those that are asked for; of any order. Those of filters
    and bias are summed in float32 (float64), in an order that is the same on every run; up to 64 MB of workspace hold
    partial sums. With an activation or a scale the backward computes the sum again instead of keeping it. A gradient of
    y that isn't dense in x's layout, such as an expanded one, is copied.

    Memory: y has PyTorch's memory format: channels_last where x or weight is, by `Tensor.suggest_memory_format`
    (float64 on CUDA is always contiguous). Kernels read any x whose columns, or channels, are neighbours in memory as
    it lies, at any other strides: a crop, some of the channels, an expanded batch. What is copied: before, an x with
    neither, such as a transposed image; after, a y whose format isn't the layout that x lies in, such as of a
    contiguous x with a channels_last weight; a residual that isn't dense in the layout that x lies in; a weight, bias,
    scale or shift that isn't contiguous.

    Args:
        x: [N, C, H, W], or [C, H, W] for one image; N may be 0.
        weight: [C*m, 1, KH, KW], m the channel multiplier.
        bias: [C*m], or None.
        stride, dilation: one integer, or (height, width).
        padding: zeros around x: an integer, (height, width), 'valid', 'same' (stride 1 only), or a (before, after) pair
            for each dimension, such as ((1, 1), (2, 0)).
        activation: None, 'relu', 'relu6', 'silu', 'gelu', 'gelu_tanh', 'hardswish', 'sigmoid', or 'leaky_relu' (0.01).
        scale, shift: [C*m], or None.
        residual: shaped like y, or None.

    Returns:
        y: [N, C*m, OH, OW] with OH = (H + top + bottom - dilation*(KH - 1) - 1) // stride + 1, and OW alike.

    Raises:
        DepthwiseError: (a ValueError) shapes, dtypes or devices don't belong together, the filter is larger than the
            padded input, a stride or dilation is below 1, or the activation is unknown.

    >>> import torch, dwconv
    >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(3, 1, 3, 3)
    >>> dwconv.conv2d(x, weight, padding=1).shape
    torch.Size([2, 3, 8, 8])
    >>> y = dwconv.conv2d(x, weight, padding=1, activation="relu", residual=x)
    >>> torch.allclose(y, dwconv.conv2d(x, weight, padding=1).relu() + x)
    True
    """
    return _convolution(2, x, weight, bias, stride, padding, dilation, activation, scale, shift, residual)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution of volumes: every channel is filtered by itself.

        sum[n, k, o, p, q] = bias[k] + sum_{t, u, v} weight[k, 0, t, u, v]
            * x[n, k // m, o*stride - front + t*dilation, p*stride - top + u*dilation, q*stride - left + v*dilation]
        y = scale * activation(sum) + shift + residual

    Equivalent to `torch.nn.functional.conv3d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])`, then the
    epilogue. All else (memory, with channels_last_3d, dtypes, gradients, where it runs) is as in `dwconv.conv2d`.

    Args:
        x: [N, C, D, H, W], or [C, D, H, W] for one volume; N may be 0.
        weight: [C*m, 1, KD, KH, KW], m the channel multiplier.
        bias: [C*m], or None.
        stride, dilation: one integer, or (depth, height, width).
        padding: zeros around x: an integer, (depth, height, width), 'valid', 'same' (stride 1 only), or a (before,
            after) pair for each dimension.
        activation: None, 'relu', 'relu6', 'silu', 'gelu', 'gelu_tanh', 'hardswish', 'sigmoid', or 'leaky_relu' (0.01).
        scale, shift: [C*m], or None.
        residual: shaped like y, or None.

    Returns:
        y: [N, C*m, OD, OH, OW] with OD = (D + front + back - dilation*(KD - 1) - 1) // stride + 1, the others alike.

    Raises:
        DepthwiseError: (a ValueError) shapes, dtypes or devices don't belong together, the filter is larger than the
            padded input, a stride or dilation is below 1, or the activation is unknown.

    >>> import torch, dwconv
    >>> x, weight = torch.randn(2, 3, 4, 8, 8), torch.randn(3, 1, 3, 3, 3)
    >>> dwconv.conv3d(x, weight, padding="same", activation="relu6").shape
    torch.Size([2, 3, 4, 8, 8])
    """
    return _convolution(3, x, weight, bias, stride, padding, dilation, activation, scale, shift, residual)


# By the number of spatial dimensions.
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: conv1d, 2: conv2d, 3: conv3d}


def _geometry(
    stride: int | Sequence[int], padding: Padding, dilation: int | Sequence[int], weight_shape: Sequence[int]
) -> Geometry:
    """The windows, from any form that the functions take."""
    _, _, *filter_size = weight_shape
    dims = len(filter_size)
    strides = expand("stride", stride if isinstance(stride, int) else tuple(stride), dims)
    dilations = expand("dilation", dilation if isinstance(dilation, int) else tuple(dilation), dims)
    pairs = padding_pairs(padding, filter_size, strides, dilations)
    return Geometry(strides, tuple(pad for pair in pairs for pad in pair), dilations)


# The same forms give the same object, by which everything after this is looked up.
_known_geometry = functools.lru_cache(maxsize=1024)(_geometry)


def _hashable(value: object) -> object:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _convolution(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    activation: str | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    shape, batched = weight.shape, x.dim() == dims + 2
    if len(shape) != dims + 2 or not (batched or x.dim() == dims + 1):
        check_dims(dims, x, weight)  # raises
    if torch.compiler.is_compiling():
        geometry = _geometry(stride, padding, dilation, shape)
    else:
        try:
            geometry = _known_geometry(stride, padding, dilation, shape)
        except TypeError:  # lists can't be looked up
            geometry = _known_geometry(*map(_hashable, (stride, padding, dilation)), shape)
    extras = None
    if activation is not None or scale is not None or shift is not None or residual is not None:
        if activation is not None and activation not in ACTIVATIONS:
            Epilogue(activation)  # raises
        extras = Extras(activation, scale, shift, residual)
    if batched:
        return _convolve(x, weight, bias, geometry, extras)
    if extras is not None and residual is not None:
        extras = extras._replace(residual=residual.unsqueeze(0))
    return _convolve(x.unsqueeze(0), weight, bias, geometry, extras).squeeze(0)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras | None) -> Tensor:
    device = "cuda" if x.is_cuda else "cpu"
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
        if extras is not None:
            tensors = (None if tensor is None else _cast(tensor, dtype) for tensor in extras[1:])
            extras = Extras(extras.activation, *tensors)
    return autograd.convolution(x, weight, bias, geometry, extras)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as autocast hands it to a convolution: float64 stays what it is."""
    return tensor if tensor.dtype == torch.float64 or not tensor.is_floating_point() else tensor.to(dtype)
