"""Calls of dwconv's functions with everything around them: tensors in a layout, and the check against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dwconv
from dwconv import reference
from dwconv.functional import _geometry
from dwconv.problem import DepthwiseProblem, Epilogue
from dwconv.tensors import in_layout

DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("channels_first", "channels_last")
FUNCTIONS = {1: dwconv.conv1d, 2: dwconv.conv2d, 3: dwconv.conv3d}
EPILOGUE = ("activation", "scale", "shift", "residual")

# Views of a contiguous [2, 6, 12, 14] that kernels read as they lie.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "cropped": lambda x: x[:, :, 2:9, 3:12],
    "some channels": lambda x: x[:, 1:3],
    "every other channel": lambda x: x[:, ::2],
    "every other row": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "batch and channels swapped": lambda x: x.transpose(0, 1),
    "one channel": lambda x: x[:, :1],
    "one column": lambda x: x[..., 4:5],
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "channels_last, cropped": lambda x: x.to(memory_format=torch.channels_last)[:, :, 2:9, 3:12],
    "channels_last, some channels": lambda x: x.to(memory_format=torch.channels_last)[:, 1:4],
    "channels_last, one channel": lambda x: x[:, :1].to(memory_format=torch.channels_last),
    "channels_last, one pixel": lambda x: x[:, :, :1, :1].to(memory_format=torch.channels_last),
    "channels_last, every other column": lambda x: x.to(memory_format=torch.channels_last)[..., ::2],
    "channels_last, expanded": lambda x: x[:1].to(memory_format=torch.channels_last).expand(3, -1, -1, -1),
    "channels_last, rows and columns swapped": lambda x: x.to(memory_format=torch.channels_last).transpose(2, 3),
}
# What they can't read.
COPIED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(2, 3),
    "every other column": lambda x: x[..., ::2],
    "columns repeated": lambda x: x[..., :1].expand(-1, -1, -1, 9),
    "channels_last, every other channel": lambda x: x.to(memory_format=torch.channels_last)[:, ::2],
}
# Views that lie channels-last, but that PyTorch's rule calls contiguous: the result is copied.
CONVERTED = ("channels_last, expanded", "channels_last, rows and columns swapped")


@dataclass
class Call:
    """Arguments of conv1d, conv2d or conv3d, whichever fits the weight."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Tensor:
        return FUNCTIONS[self.weight.dim() - 2](self.x, self.weight, self.bias, **self.arguments)

    @property
    def windows(self) -> dict[str, Any]:
        """Stride, padding and dilation."""
        return {name: value for name, value in self.arguments.items() if name not in EPILOGUE}

    @property
    def problem(self) -> DepthwiseProblem:
        """Its problem, made from the arguments, not from the strides of the tensors. x must have a batch."""
        windows = {"stride": 1, "padding": 0, "dilation": 1} | self.windows
        geometry = _geometry(**windows, weight_shape=self.weight.shape)
        given = [self.arguments.get(name) for name in EPILOGUE]
        return DepthwiseProblem(
            batch=self.x.shape[0],
            channels=self.x.shape[1],
            size=tuple(self.x.shape[2:]),
            filter=tuple(self.weight.shape[2:]),
            stride=geometry.stride,
            padding=geometry.pairs,
            dilation=geometry.dilation,
            multiplier=self.weight.shape[0] // self.x.shape[1],
            bias=self.bias is not None,
            dtype=str(self.x.dtype).removeprefix("torch."),
            epilogue=Epilogue(given[0], *(tensor is not None for tensor in given[1:])),
        )

    def exact(self) -> tuple[Tensor, Tensor]:
        """The result in float64 and its bound, on the CPU."""

        def on_cpu(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().cpu()

        beside = [on_cpu(self.arguments.get(name)) for name in EPILOGUE[1:]]
        return reference.forward(on_cpu(self.x), on_cpu(self.weight), on_cpu(self.bias), self.problem, *beside)

    def wrong(self, y: Tensor) -> str | None:
        """What is wrong with a result, in a sentence; None where it is within rounding."""
        return reference.describe_mismatch(y.detach().cpu(), *self.exact())


def random_call(
    shape: tuple[int, ...],
    taps: tuple[int, ...],
    *,
    multiplier: int = 1,
    bias: bool = False,
    dtype: str = "float32",
    layout: str = "channels_first",
    device: str = "cpu",
    seed: int = 0,
    activation: str | None = None,
    scale: bool = False,
    shift: bool = False,
    residual: bool = False,
    **windows: Any,
) -> Call:
    """Standard normal tensors for x [N, C, *size] and a filter; x and the residual lie in the layout."""
    random = torch.Generator().manual_seed(seed)

    def tensor(*sizes: int) -> Tensor:
        drawn = torch.randn(sizes, generator=random, dtype=torch.float64).to(getattr(torch, dtype)).to(device)
        return in_layout(drawn, layout) if len(sizes) > 1 else drawn

    filters = shape[1] * multiplier
    call = Call(tensor(*shape), tensor(filters, 1, *taps).contiguous(), tensor(filters) if bias else None, windows)
    beside = {"scale": tensor(filters) if scale else None, "shift": tensor(filters) if shift else None}
    beside["residual"] = tensor(*call.problem.y_shape) if residual else None
    given = {name: value for name, value in (beside | {"activation": activation}).items() if value is not None}
    return Call(call.x, call.weight, call.bias, windows | given)
