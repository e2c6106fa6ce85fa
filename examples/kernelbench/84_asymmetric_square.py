"""Depthwise convolution of wide images with a square filter: 64 images of 128 channels, 256×512, 3×3."""

import torch
import torch.nn as nn


class Model(nn.Module):
    """Filters every channel by itself, into `out_channels / in_channels` output channels each.

    Args:
        in_channels: channels of the input.
        out_channels: filters; a multiple of in_channels.
        kernel_size: height and width of each filter.
        stride, padding: as in nn.Conv2d, the same for rows and columns.
        bias: whether a learned constant is added to each output channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
    ):
        super().__init__()
        self.conv2d = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=in_channels, bias=bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in_channels, height, width] -> [batch, out_channels, height_out, width_out]"""
        return self.conv2d(x)


batch_size = 64
in_channels = 128
out_channels = 128
kernel_size = 3
height_in = 256
width_in = 512
stride = 1
padding = 0


def get_inputs():
    return [torch.rand(batch_size, in_channels, height_in, width_in)]


def get_init_inputs():
    return [in_channels, out_channels, kernel_size, stride, padding]
