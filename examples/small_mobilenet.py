"""A small MobileNetV2: six inverted residual blocks, their depthwise layers 3×3 with stride 1 and 2."""

import torch
import torch.nn as nn


class InvertedResidual(nn.Module):
    """Widens by a 1×1 convolution, filters each channel by itself, narrows again; adds its input where shapes allow."""

    def __init__(self, channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = channels * expansion
        self.residual = stride == 1 and channels == out_channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class Model(nn.Module):
    """Images to class scores: a stem of stride 2, the blocks, an average over the image, a linear layer."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        blocks = [  # out_channels, stride, expansion
            (width, 1, 1),
            (width * 2, 2, 6),
            (width * 2, 1, 6),
            (width * 3, 2, 6),
            (width * 3, 1, 6),
            (width * 4, 2, 6),
        ]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)]
        channels = width
        for out_channels, stride, expansion in blocks:
            layers.append(InvertedResidual(channels, out_channels, stride, expansion))
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 3, height, width] -> [batch, classes]"""
        return self.classifier(self.features(x).mean((2, 3)))


batch_size = 10
image_size = 224
classes = 100
width = 16


def get_inputs():
    return [torch.rand(batch_size, 3, image_size, image_size)]


def get_init_inputs():
    return [classes, width]
