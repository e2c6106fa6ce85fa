"""From tensors to a problem: what a caller handed over, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import DepthwiseError
from .problem import DepthwiseProblem, contiguous_strides

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}

Pair = tuple[int, int]


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises a DepthwiseError unless x [N, C, H, W], weight [C*m, 1, KH, KW] and bias [C*m] belong together."""
    if x.dim() != 4:
        raise DepthwiseError(f"x has shape {tuple(x.shape)}; conv2d takes [N, C, H, W], or [C, H, W] for one image")
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise DepthwiseError(
            f"weight has shape {tuple(weight.shape)}; a depthwise filter is [C*m, 1, KH, KW]: for other groups use "
            "torch.nn.functional.conv2d"
        )
    channels, filters = x.shape[1], weight.shape[0]
    if channels == 0 or filters == 0 or filters % channels:
        raise DepthwiseError(
            f"weight has {filters} filters, but x has {channels} channels: a depthwise convolution has the same number "
            "of filters for each channel, so their number must be a multiple of x's channels; for groups of several "
            "channels use torch.nn.functional.conv2d"
        )
    if bias is not None and bias.shape != (filters,):
        raise DepthwiseError(f"bias has shape {tuple(bias.shape)}; it must be [{filters}], one for each filter")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise DepthwiseError(f"x is {x.dtype}, but {name} is {tensor.dtype}: convert one of them with .to()")
        if tensor.device != x.device:
            raise DepthwiseError(f"x is on {x.device}, but {name} is on {tensor.device}: move one of them with .to()")
    if x.dtype not in DTYPES:
        raise DepthwiseError(f"x is {x.dtype}; convolution is for floating types: {', '.join(DTYPES.values())}")


def problem_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: tuple[Pair, Pair],
    dilation: Pair,
) -> DepthwiseProblem:
    """The validated problem that these tensors pose. x may have any strides.

    Raises:
        DepthwiseError: shapes, dtypes or devices don't belong together, or describe no convolution.
    """
    check_tensors(x, weight, bias)
    return DepthwiseProblem(
        batch=x.shape[0],
        channels=x.shape[1],
        size=tuple(x.shape[2:]),
        filter=tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        multiplier=weight.shape[0] // x.shape[1],
        bias=bias is not None,
        dtype=DTYPES[x.dtype],
        x_strides=_strides(x),
        aligned=alignment(x.data_ptr()),
    )


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of x, those of a contiguous tensor where a dimension has one element and its stride means nothing."""
    natural = contiguous_strides(tuple(x.shape))
    return tuple(n if size == 1 else s for size, s, n in zip(x.shape, x.stride(), natural, strict=True))


def alignment(address: int) -> int:
    """The largest power of two up to 16 that divides an address."""
    return min(16, address & -address) if address else 16


def takes(x: Tensor) -> bool:
    """Whether dwconv's own kernels take x; PyTorch's convolution computes what they don't take."""
    if x.dtype != torch.float32:
        return False
    return x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
