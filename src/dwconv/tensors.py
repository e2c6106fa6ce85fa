"""From tensors to a problem: what a caller handed over, checked; in which memory it lies, and the result will."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import DepthwiseError
from .problem import DepthwiseProblem, Direction, Epilogue, Layout, dense_strides

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}

MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the tensor's dimensions

_SIZES = {1: ("L", "K"), 2: ("H, W", "KH, KW"), 3: ("D, H, W", "KD, KH, KW")}


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """Where the windows stand. Compared by identity, so that looking one up costs nothing.

    Attributes:
        stride, dilation: one number for each spatial dimension.
        padding: zeros before and after the first dimension, then the next.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The padding as (before, after) for each spatial dimension."""
        return tuple(zip(self.padding[::2], self.padding[1::2], strict=True))


class Extras(NamedTuple):
    """What follows the sum: scale * activation(sum) + shift + residual."""

    activation: str | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.activation, *(tensor is not None for tensor in self[1:]))


NO_EXTRAS = Extras()


def check_dims(dims: int, x: Tensor, weight: Tensor) -> None:
    """Raises a DepthwiseError unless weight, and x with or without a batch, have so many spatial dimensions."""
    size, taps = _SIZES[dims]
    if weight.dim() != dims + 2:
        raise DepthwiseError(f"weight has shape {tuple(weight.shape)}; a depthwise filter is [C*m, 1, {taps}]")
    if x.dim() not in (dims + 1, dims + 2):
        raise DepthwiseError(
            f"x has shape {tuple(x.shape)}; conv{dims}d takes [N, C, {size}], or [C, {size}] without a batch"
        )


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, extras: Extras = NO_EXTRAS) -> None:
    """Raises a DepthwiseError unless x, weight and bias, and the epilogue's scale and shift, belong together.

    x is [N, C, *size], weight [C*m, 1, *filter]; bias, scale and shift are [C*m].
    """
    dims = weight.dim() - 2
    if x.dim() != weight.dim() or dims not in _SIZES:
        raise DepthwiseError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}: they must have one, two or three spatial "
            "dimensions, after a batch and channels"
        )
    if weight.shape[1] != 1:
        raise DepthwiseError(
            f"weight has shape {tuple(weight.shape)}; a depthwise filter is [C*m, 1, {_SIZES[dims][1]}]: for other "
            f"groups use torch.nn.functional.conv{dims}d"
        )
    channels, filters = x.shape[1], weight.shape[0]
    if channels == 0 or filters == 0 or filters % channels:
        raise DepthwiseError(
            f"weight has {filters} filters, but x has {channels} channels: a depthwise convolution has the same number "
            "of filters for each channel, so their number must be a multiple of x's channels; for groups of several "
            f"channels use torch.nn.functional.conv{dims}d"
        )
    named = {"weight": weight, "bias": bias, "scale": extras.scale, "shift": extras.shift, "residual": extras.residual}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if name in ("bias", "scale", "shift") and tuple(tensor.shape) != (filters,):
            raise DepthwiseError(f"{name} has shape {tuple(tensor.shape)}; it must be [{filters}], one for each filter")
        if tensor.dtype != x.dtype:
            raise DepthwiseError(f"x is {x.dtype}, but {name} is {tensor.dtype}: convert one of them with .to()")
        if tensor.device != x.device:
            raise DepthwiseError(f"x is on {x.device}, but {name} is on {tensor.device}: move one of them with .to()")
    if x.dtype not in DTYPES:
        raise DepthwiseError(f"x is {x.dtype}; convolution is for floating types: {', '.join(DTYPES.values())}")
    Epilogue(extras.activation)  # raises for an unknown one


def check_residual(residual: Tensor | None, y_shape: Sequence[int]) -> None:
    """Raises a DepthwiseError unless the residual is shaped like y."""
    if residual is not None and tuple(residual.shape) != tuple(y_shape):
        raise DepthwiseError(
            f"residual has shape {tuple(residual.shape)}; it is added to y, which has shape {tuple(y_shape)}: give it "
            "that shape, for example with .expand()"
        )


def problem_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    extras: Extras = NO_EXTRAS,
    layout: Layout = "channels_first",
) -> DepthwiseProblem:
    """The validated problem that these tensors pose in a layout that x admits (`layout_of`).

    Raises:
        DepthwiseError: shapes, dtypes or devices don't belong together, or describe no convolution.
    """
    check_tensors(x, weight, bias, extras)
    shape = tuple(x.shape)
    strides = _meaningful(shape, x.stride(), layout)
    addresses = [x.data_ptr()] + ([extras.residual.data_ptr()] if extras.residual is not None else [])
    problem = DepthwiseProblem(
        batch=shape[0],
        channels=shape[1],
        size=shape[2:],
        filter=tuple(weight.shape[2:]),
        stride=geometry.stride,
        padding=geometry.pairs,
        dilation=geometry.dilation,
        multiplier=weight.shape[0] // shape[1],
        bias=bias is not None,
        dtype=DTYPES[x.dtype],
        layout=layout,
        x_strides=() if strides == dense_strides(shape, layout) else strides,
        aligned=min(map(alignment, addresses)),
        epilogue=extras.epilogue,
    )
    check_residual(extras.residual, problem.y_shape)
    return problem


def gradient_problem(
    direction: Direction,
    grad: Tensor,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    geometry: Geometry,
    x: Tensor | None = None,
    bias: bool = False,
    layout: Layout = "channels_first",
) -> DepthwiseProblem:
    """The problem of a gradient: of x, which has this shape, or of filters and bias, from x and from y's gradient.

    Raises:
        DepthwiseError: sizes that describe no convolution, or a grad of another shape than y.
    """
    shape = tuple(shape)
    strides = () if x is None else _meaningful(shape, x.stride(), layout)
    addresses = [tensor.data_ptr() for tensor in (grad, x) if tensor is not None]
    problem = DepthwiseProblem(
        batch=shape[0],
        channels=shape[1],
        size=shape[2:],
        filter=tuple(weight_shape[2:]),
        stride=geometry.stride,
        padding=geometry.pairs,
        dilation=geometry.dilation,
        multiplier=weight_shape[0] // shape[1],
        bias=bias,
        dtype=DTYPES[grad.dtype],
        layout=layout,
        direction=direction,
        x_strides=() if strides == dense_strides(shape, layout) else strides,
        aligned=min(map(alignment, addresses)),
    )
    if tuple(grad.shape) != problem.y_shape:
        raise DepthwiseError(f"the gradient of y has shape {tuple(grad.shape)}; y has {problem.y_shape}")
    return problem


def _meaningful(shape: tuple[int, ...], strides: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The strides, those of a dense tensor where a dimension has one element and its stride means nothing."""
    natural = dense_strides(shape, layout)
    return tuple(n if size == 1 else s for size, s, n in zip(shape, strides, natural, strict=True))


def alignment(address: int) -> int:
    """The largest power of two up to 16 that divides an address."""
    return min(16, address & -address) if address else 16


def has_strides(shape: Sequence[int], strides: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether strides are the wanted ones wherever they mean something."""
    return 0 in shape or all(n == 1 or s == w for n, s, w in zip(shape, strides, wanted, strict=True))


def admits(x: Tensor, layout: Layout) -> bool:
    """Whether kernels of this layout can read x as it lies: its columns, or channels, are neighbours in memory."""
    inner = 1 if layout == "channels_last" else x.dim() - 1
    return x.shape[inner] == 1 or x.stride(inner) == 1 or 0 in x.shape


def channels_last_strides(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """PyTorch's rule (`Tensor.suggest_memory_format`): whether these strides call a tensor channels_last.

    Channels, columns, rows, ... lie in this order, each beyond the ones before; what can be read both ways isn't
    channels_last. A tensor [N, C, L], for which PyTorch has no such format, is seen as [N, C, 1, L].

    >>> channels_last_strides((2, 8, 5, 5), (200, 1, 40, 8)), channels_last_strides((2, 8, 5), (40, 1, 8))
    (True, True)
    >>> channels_last_strides((2, 8, 1, 1), (8, 1, 1, 1))
    False
    """
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * shape[d]
    return True


def result_layout(x: Tensor, weight: Tensor) -> Layout:
    """The layout of the result: PyTorch's memory format, from the strides of x and of weight.

    As PyTorch, it leaves float64 channels_first (but for images on the CPU), and results without images. Its result
    of one dimension is always contiguous; dwconv keeps x's layout there.
    """
    if x.dim() == 3:
        return layout_of(x, "channels_last" if channels_last_strides(x.shape, x.stride()) else "channels_first")
    if x.shape[0] == 0 or (x.dtype == torch.float64 and not (x.device.type == "cpu" and x.dim() == 4)):
        return "channels_first"
    either = any(channels_last_strides(tensor.shape, tensor.stride()) for tensor in (x, weight))
    return "channels_last" if either else "channels_first"


def layout_of(x: Tensor, result: Layout) -> Layout:
    """The layout that kernels compute in: the result's, unless x can be read as it lies in the other one only."""
    other: Layout = "channels_last" if result == "channels_first" else "channels_first"
    return other if not admits(x, result) and admits(x, other) else result


def in_layout(tensor: Tensor, layout: Layout) -> Tensor:
    """The tensor itself where it is dense in the layout, else a copy that is.

    >>> in_layout(torch.zeros(2, 3, 4), "channels_last").stride()
    (12, 1, 3)
    """
    strides = dense_strides(tuple(tensor.shape), layout)
    if has_strides(tensor.shape, tensor.stride(), strides):
        return tensor
    return empty(tensor, tuple(tensor.shape), layout).copy_(tensor)


def empty(like: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """An uninitialized tensor of this shape, dense in the layout; dtype and device are `like`'s."""
    if layout == "channels_first":
        return like.new_empty(shape)
    return like.new_empty_strided(shape, dense_strides(shape, layout))
