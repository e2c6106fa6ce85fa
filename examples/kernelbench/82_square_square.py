"""Depthwise convolution of square images with a square filter: 16 images of 64 channels, 512×512, 3×3."""

import torch
import torch.nn as nn


class Model(nn.Module):
    """Filters every channel by itself: `in_channels` planes in, as many out.

    Args:
        in_channels: channels of the input, and filters.
        kernel_size: height and width of each filter.
        stride, padding: as in nn.Conv2d, the same for rows and columns.
        bias: whether a learned constant is added to each channel.
    """

    def __init__(self, in_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, bias: bool = False):
        super().__init__()
        self.conv2d = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride=stride, padding=padding, groups=in_channels, bias=bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in_channels, height, width] -> [batch, in_channels, height_out, width_out]"""
        return self.conv2d(x)


batch_size = 16
in_channels = 64
kernel_size = 3
width = 512
height = 512
stride = 1
padding = 0


def get_inputs():
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs():
    return [in_channels, kernel_size, stride, padding]
