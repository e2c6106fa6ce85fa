"""Depthwise convolution of wide images with a wide filter: 32 images of 128 channels, 128×256, 3×7."""

import torch
import torch.nn as nn


class Model(nn.Module):
    """Filters every channel by itself; rows and columns have their own filter size, stride, padding and dilation.

    Args:
        in_channels: channels of the input, and filters.
        out_channels, groups: accepted for the sake of the signature; both are always in_channels.
        kernel_size_h, kernel_size_w: height and width of each filter.
        stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w: as in nn.Conv2d.
        bias: whether a learned constant is added to each channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size_h: int,
        kernel_size_w: int,
        stride_h: int = 1,
        stride_w: int = 1,
        padding_h: int = 0,
        padding_w: int = 0,
        dilation_h: int = 1,
        dilation_w: int = 1,
        groups: int = 1,
        bias: bool = False,
    ):
        super().__init__()
        self.conv2d = nn.Conv2d(
            in_channels,
            in_channels,
            (kernel_size_h, kernel_size_w),
            stride=(stride_h, stride_w),
            padding=(padding_h, padding_w),
            dilation=(dilation_h, dilation_w),
            groups=in_channels,
            bias=bias,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in_channels, height, width] -> [batch, in_channels, height_out, width_out]"""
        return self.conv2d(x)


batch_size = 32
in_channels = 128
out_channels = 128
kernel_size_h = 3
kernel_size_w = 7
height = 128
width = 256
stride_h = 1
stride_w = 1
padding_h = 0
padding_w = 0
dilation_h = 1
dilation_w = 1
groups = 128


def get_inputs():
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs():
    return [
        in_channels,
        out_channels,
        kernel_size_h,
        kernel_size_w,
        stride_h,
        stride_w,
        padding_h,
        padding_w,
        dilation_h,
        dilation_w,
        groups,
    ]
