"""Depthwise convolution as modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DepthwiseError
from .functional import conv2d


class Conv2d(torch.nn.Conv2d):
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

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, *args, **kwargs)
        if self.groups != in_channels:
            raise DepthwiseError(
                f"groups={self.groups} is not depthwise: the layer has {in_channels} input channels, so groups must be "
                f"{in_channels}; use torch.nn.Conv2d for other groups"
            )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, dilation = tuple(self.stride), tuple(self.dilation)
        if self.padding_mode == "zeros":
            return conv2d(input, weight, bias, stride, self.padding, dilation)
        around = self._reversed_padding_repeated_twice
        return conv2d(F.pad(input, around, mode=self.padding_mode), weight, bias, stride, 0, dilation)
