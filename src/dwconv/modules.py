"""Depthwise convolution as modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DepthwiseError
from .functional import CONVOLUTIONS


class _Depthwise(torch.nn.modules.conv._ConvNd):
    """What makes one of torch.nn's convolutions a depthwise one that dwconv computes; a mixin in front of it."""

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, *args, **kwargs)
        if self.groups != in_channels:
            raise DepthwiseError(
                f"groups={self.groups} is not depthwise: the layer has {in_channels} input channels, so groups must be "
                f"{in_channels}; use torch.nn.{type(self).__name__} for other groups"
            )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolution = CONVOLUTIONS[len(self.kernel_size)]
        stride, dilation = tuple(self.stride), tuple(self.dilation)
        if self.padding_mode == "zeros":
            return convolution(input, weight, bias, stride, self.padding, dilation)
        around = self._reversed_padding_repeated_twice
        return convolution(F.pad(input, around, mode=self.padding_mode), weight, bias, stride, 0, dilation)


class Conv1d(_Depthwise, torch.nn.Conv1d):
    """`torch.nn.Conv1d` for depthwise layers, computed by dwconv; see `dwconv.Conv2d`.

    Shapes: x [N, C, L] or [C, L] -> y [N, C*m, OL] or [C*m, OL]; see `dwconv.conv1d`.

    Raises:
        DepthwiseError: (a ValueError) `groups` differs from `in_channels`.

    >>> import torch, dwconv
    >>> layer = dwconv.Conv1d(16, 16, kernel_size=9, padding="same", groups=16)
    >>> layer(torch.randn(1, 16, 100)).shape
    torch.Size([1, 16, 100])
    """


class Conv2d(_Depthwise, torch.nn.Conv2d):
    """`torch.nn.Conv2d` for depthwise layers, computed by dwconv.

    The same constructor, initialisation (the same random numbers in the same order), state_dict and padding modes.
    `groups` must equal `in_channels`, and it must be given, as in torch.nn.Conv2d.

    Shapes: x [N, C, H, W] or [C, H, W] -> y [N, C*m, OH, OW] or [C*m, OH, OW]; see `dwconv.conv2d`.

    Raises:
        DepthwiseError: (a ValueError) `groups` differs from `in_channels`.

    >>> import torch, dwconv
    >>> layer = dwconv.Conv2d(16, 16, kernel_size=3, padding=1, groups=16)
    >>> layer(torch.randn(1, 16, 32, 32)).shape
    torch.Size([1, 16, 32, 32])
    """


class Conv3d(_Depthwise, torch.nn.Conv3d):
    """`torch.nn.Conv3d` for depthwise layers, computed by dwconv; see `dwconv.Conv2d`.

    Shapes: x [N, C, D, H, W] or [C, D, H, W] -> y [N, C*m, OD, OH, OW] or [C*m, OD, OH, OW]; see `dwconv.conv3d`.

    Raises:
        DepthwiseError: (a ValueError) `groups` differs from `in_channels`.

    >>> import torch, dwconv
    >>> layer = dwconv.Conv3d(16, 16, kernel_size=3, padding=1, groups=16)
    >>> layer(torch.randn(1, 16, 8, 8, 8)).shape
    torch.Size([1, 16, 8, 8, 8])
    """
