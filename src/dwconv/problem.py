"""What is to be computed: one depthwise convolution, described and validated. Pure Python, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from .errors import DepthwiseError

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

Direction = Literal["forward", "grad_input", "grad_weight"]
Layout = Literal["channels_first", "channels_last"]

Padding = int | str | Sequence[int] | Sequence[Sequence[int]]

ACTIVATIONS = ("relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "leaky_relu")

_DIMENSION_NAMES = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def expand(name: str, value: int | tuple[int, ...] | list[int], dims: int) -> tuple[int, ...]:
    """One integer per spatial dimension, from an integer or a sequence of them.

    Raises:
        DepthwiseError: the value is neither an integer nor a sequence of `dims` integers.
    """
    if isinstance(value, int):
        return (value,) * dims
    if isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
        if len(value) == dims:
            return tuple(value)
        if len(value) == 1:
            return tuple(value) * dims
    raise DepthwiseError(f"{name}={value!r} doesn't fit: give one integer, or {dims}, one for each spatial dimension")


def padding_pairs(
    padding: Padding, filter_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Zeros (before, after) each spatial dimension, from any form that `dwconv.conv2d` takes.

    Raises:
        DepthwiseError: an unknown word, 'same' with a stride, or a wrong number of entries.

    >>> padding_pairs("same", (3, 4), (1, 1), (1, 1))
    ((1, 1), (1, 2))
    >>> padding_pairs([(2, 0), (1, 1)], (3, 3), (1, 1), (1, 1))
    ((2, 0), (1, 1))
    """
    dims = len(filter_size)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * dims
        if padding != "same":
            raise DepthwiseError(f"padding={padding!r} is unknown: use 'same', 'valid', or numbers")
        if any(s != 1 for s in stride):
            raise DepthwiseError(
                f"padding='same' needs stride 1, but stride is {tuple(stride)}: give the padding in numbers"
            )
        totals = [d * (k - 1) for d, k in zip(dilation, filter_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if not isinstance(padding, int) and any(not isinstance(entry, int) for entry in padding):
        pairs = [tuple(entry) if isinstance(entry, Sequence) else (entry, entry) for entry in padding]
        if len(pairs) != dims or any(len(pair) != 2 for pair in pairs):
            raise DepthwiseError(f"padding={padding!r} doesn't fit: give {dims} (before, after) pairs")
        return tuple((before, after) for before, after in pairs)
    return tuple((p, p) for p in expand("padding", padding if isinstance(padding, int) else tuple(padding), dims))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What is done to a sum before it is rounded and stored: scale * activation(conv + bias) + shift + residual.

    Attributes:
        activation: one of `ACTIVATIONS`, or None.
        scale, shift: whether there is a factor, a summand, for each output channel.
        residual: whether a tensor shaped like y is added.

    Raises:
        DepthwiseError: an unknown activation.
    """

    activation: str | None = None
    scale: bool = False
    shift: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise DepthwiseError(
                f"activation={self.activation!r} is unknown: use one of {', '.join(ACTIVATIONS)}, or apply it to the "
                "result"
            )

    def __str__(self) -> str:
        names = [self.activation] if self.activation else []
        return ", ".join(names + [name for name in ("scale", "shift", "residual") if getattr(self, name)])


@dataclass(frozen=True, slots=True)
class DepthwiseProblem:
    """One validated depthwise convolution, or a gradient of it. Sizes in elements.

        y[n, c*m + j, p] = b[c*m + j] + sum_u w[c*m + j, 0, u] * x[n, c, p*stride - padding_before + u*dilation]

    With g for the gradient of y, grad_input and grad_weight are the sums of all products of this formula in which an
    element of x, or of w, takes part:

        dx[n, c, q] = sum_j sum_{p, u: p*stride - padding_before + u*dilation = q} w[c*m + j, 0, u] * g[n, c*m + j, p]
        dw[c*m + j, 0, u] = sum_{n, p} g[n, c*m + j, p] * x[n, c, p*stride - padding_before + u*dilation]
        db[c*m + j] = sum_{n, p} g[n, c*m + j, p]

    Attributes:
        batch: N.
        channels: C, the input channels; the output has C*m.
        size: spatial sizes of x, one to three.
        filter: spatial sizes of the filter.
        stride, dilation: one number per spatial dimension.
        padding: (before, after) per spatial dimension, zeros.
        multiplier: m, output channels per input channel.
        bias: whether b is added; of grad_weight, whether db is wanted, too.
        layout: of x and y in memory: columns are neighbours in channels_first, channels in channels_last.
        direction: what is computed: y from x and w, dx from g and w, or dw from x and g. g is dense in the layout.
        x_strides: strides of x in elements, [N, C, *spatial]; () means dense in its layout.
        reversed: filters are read backwards: tap u of the sum is w's last tap but u.
        epilogue: what follows the sum.
        aligned: bytes that the starts of x, y and their gradients are known to be a multiple of (at most 16 matters).

    Raises:
        DepthwiseError: sizes that describe no convolution.

    >>> problem = DepthwiseProblem(batch=16, channels=64, size=(512, 512), filter=(3, 3))
    >>> problem.out_size, problem.least_bytes
    ((510, 510), 2139113728)
    """

    batch: int
    channels: int
    size: tuple[int, ...]
    filter: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    multiplier: int = 1
    bias: bool = False
    dtype: str = "float32"
    layout: Layout = "channels_first"
    direction: Direction = "forward"
    x_strides: tuple[int, ...] = ()
    aligned: int = 16
    reversed: bool = False
    epilogue: Epilogue = Epilogue()
    out_size: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        dims = len(self.size)
        set_ = object.__setattr__
        set_(self, "stride", self.stride or (1,) * dims)
        set_(self, "dilation", self.dilation or (1,) * dims)
        set_(self, "padding", self.padding or ((0, 0),) * dims)
        self._validate(dims)
        set_(
            self,
            "out_size",
            tuple(
                (size + sum(pad) - dilation * (taps - 1) - 1) // stride + 1
                for size, pad, dilation, taps, stride in zip(
                    self.size, self.padding, self.dilation, self.filter, self.stride, strict=True
                )
            ),
        )

    def _validate(self, dims: int) -> None:
        if dims not in _DIMENSION_NAMES:
            raise DepthwiseError(f"size={self.size} has {dims} spatial dimensions; dwconv takes one, two or three")
        if self.dtype not in DTYPE_BYTES:
            raise DepthwiseError(
                f"dtype={self.dtype!r} is not a floating type that dwconv takes: use one of {', '.join(DTYPE_BYTES)}"
            )
        for name in ("filter", "stride", "dilation", "padding"):
            if len(getattr(self, name)) != dims:
                raise DepthwiseError(
                    f"{name}={getattr(self, name)} has {len(getattr(self, name))} entries, but x has {dims} spatial "
                    f"dimensions: give {dims}"
                )
        if self.batch < 0 or self.channels < 1 or self.multiplier < 1:
            raise DepthwiseError(
                f"batch={self.batch}, channels={self.channels}, multiplier={self.multiplier}: there must be at least "
                "one channel and a multiplier of one or more"
            )
        for i, dimension in enumerate(_DIMENSION_NAMES[dims]):
            if self.size[i] < 1:
                raise DepthwiseError(f"x has a {dimension} of {self.size[i]}; only the batch may be empty")
            if self.filter[i] < 1:
                raise DepthwiseError(f"the filter's {dimension} is {self.filter[i]}; it must be 1 or more")
            if self.stride[i] < 1:
                raise DepthwiseError(f"stride={self.stride} is not possible: the {dimension}'s must be 1 or more")
            if self.dilation[i] < 1:
                raise DepthwiseError(f"dilation={self.dilation} is not possible: the {dimension}'s must be 1 or more")
            if min(self.padding[i]) < 0:
                raise DepthwiseError(
                    f"padding={self.padding} is negative in {dimension}: crop x instead, for example x[..., 1:-1]"
                )
            padded = self.size[i] + sum(self.padding[i])
            extent = self.dilation[i] * (self.filter[i] - 1) + 1
            if extent > padded:
                raise DepthwiseError(
                    f"the filter spans {extent} elements of {dimension} ({self.filter[i]} taps, dilation "
                    f"{self.dilation[i]}), but the padded input has {padded}: use more padding or a smaller filter"
                )

    @property
    def dims(self) -> int:
        return len(self.size)

    @property
    def out_channels(self) -> int:
        return self.channels * self.multiplier

    @property
    def taps(self) -> int:
        """Products summed for one output."""
        return math.prod(self.filter)

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def sum_bytes(self) -> int:
        """Bytes of what kernels add up in: float64 in its own type, all else in float32."""
        return max(4, self.element_bytes)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, 1, *self.filter)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.batch, self.out_channels, *self.out_size)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Of what kernels read as x: x itself, or the gradient of y where that of x is computed from it."""
        return self.y_shape if self.direction == "grad_input" else self.x_shape

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Of what kernels write: y, or the gradient of x or of the filters."""
        return {"forward": self.y_shape, "grad_input": self.x_shape, "grad_weight": self.weight_shape}[self.direction]

    @property
    def least_bytes(self) -> int:
        """The least DRAM traffic: input, filter, bias, output and what the epilogue reads, once each."""
        outputs, epilogue = math.prod(self.y_shape), self.epilogue
        elements = math.prod(self.x_shape) + math.prod(self.weight_shape) + outputs * (2 if epilogue.residual else 1)
        per_channel = self.bias + epilogue.scale + epilogue.shift
        return (elements + per_channel * self.out_channels) * self.element_bytes

    @property
    def multiply_adds(self) -> int:
        return math.prod(self.y_shape) * self.taps

    @property
    def plane_strides(self) -> tuple[int, ...]:
        """Strides of what is read as x in elements, [N, C, *spatial]."""
        return self.x_strides or dense_strides(self.source_shape, self.layout)

    def lifted(self, dims: int) -> DepthwiseProblem:
        """The same convolution with at least so many spatial dimensions: those added in front have one element.

        >>> DepthwiseProblem(1, 8, (100,), (3,)).lifted(2).size
        (1, 100)
        """
        added = dims - self.dims
        if added <= 0:
            return self
        ones = (1,) * added
        image, channel, *spatial = self.plane_strides
        return replace(
            self,
            size=ones + self.size,
            filter=ones + self.filter,
            stride=ones + self.stride,
            padding=((0, 0),) * added + self.padding,
            dilation=ones + self.dilation,
            x_strides=(image, channel, *(0,) * added, *spatial),
        )

    def as_forward(self) -> DepthwiseProblem | None:
        """The forward problem that computes dx, with g for x: its filters are reversed. None where there is none: with
        a stride, a multiplier, or more zeros around x than the filter reaches over.

        >>> problem = DepthwiseProblem(1, 8, (30,), (4,), padding=((3, 0),), direction="grad_input")
        >>> forward = problem.as_forward()
        >>> forward.size, forward.padding, forward.out_size, forward.reversed
        ((30,), ((0, 3),), (30,), True)
        """
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.filter, strict=True)]
        padding = tuple((r - before, r - after) for r, (before, after) in zip(reach, self.padding, strict=True))
        if (
            self.direction != "grad_input"
            or set(self.stride) != {1}
            or self.multiplier > 1
            or min(map(min, padding)) < 0
        ):
            return None
        return replace(
            self, direction="forward", size=self.out_size, padding=padding, reversed=not self.reversed, bias=False
        )

    def with_batch(self, batch: int, channels: int) -> DepthwiseProblem:
        """The same convolution of fewer images and channels: they don't depend on each other."""
        return replace(self, batch=batch, channels=channels, x_strides=())

    def __str__(self) -> str:
        def by(values: tuple[int, ...]) -> str:
            return "×".join(map(str, values))

        text = f"{by(self.x_shape)} {self.dtype} {self.layout}, filter {by(self.filter)}"
        for name in ("stride", "dilation"):
            value: tuple[int, ...] = getattr(self, name)
            if set(value) != {1}:
                text += f", {name} {by(value)}"
        if any(map(sum, self.padding)):
            even = all(before == after for before, after in self.padding)
            text += f", padding {by(tuple(p[0] for p in self.padding)) if even else self.padding}"
        if self.multiplier > 1:
            text += f", multiplier {self.multiplier}"
        text += ", bias" if self.bias else ""
        text += f", {self.epilogue}" if self.epilogue != Epilogue() else ""
        return text + ("" if self.direction == "forward" else f", {self.direction}")


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor.

    >>> contiguous_strides((2, 3, 5))
    (15, 5, 1)
    """
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@lru_cache(maxsize=256)
def dense_strides(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Strides in elements of a dense tensor [N, C, *spatial] in a layout.

    >>> dense_strides((2, 3, 5), "channels_last")
    (15, 1, 3)
    """
    if layout == "channels_first":
        return contiguous_strides(shape)
    image, *spatial, channel = contiguous_strides((shape[0], *shape[2:], shape[1]))
    return (image, channel, *spatial)
