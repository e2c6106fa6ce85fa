"""Depthwise convolution of square images with a filter one column wide: 64 images of 8 channels, 512×512, 3×1."""

import torch
import torch.nn as nn


class Model(nn.Module):
    """Filters every column of every channel by itself.

    Args:
        in_channels: channels of the input, and filters.
        kernel_size: height of each filter; its width is 1.
        stride, padding, dilation: as in nn.Conv2d, the same for rows and columns.
        bias: whether a learned constant is added to each channel.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = False,
    ):
        super().__init__()
        self.conv2d = nn.Conv2d(
            in_channels,
            in_channels,
            kernel_size=(kernel_size, 1),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            bias=bias,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in_channels, height, width] -> [batch, in_channels, height_out, width_out]"""
        return self.conv2d(x)


batch_size = 64
in_channels = 8
kernel_size = 3
width = 512
height = 512
stride = 1
padding = 0
dilation = 1


def get_inputs():
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs():
    return [in_channels, kernel_size, stride, padding, dilation]
