"""Switches the depthwise layers of a model over to dwconv."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .modules import Conv2d


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did.

    Attributes:
        replaced: names of the layers that dwconv computes now.
        left_alone: (name, reason) of every other convolution.
    """

    replaced: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        count = len(self.replaced)
        layers = "depthwise layer is" if count == 1 else "depthwise layers are"
        lines = [f"{count} {layers} computed by dwconv: {', '.join(self.replaced) or 'none'}"]
        return "\n".join(lines + [f"left alone: {name}: {reason}" for name, reason in self.left_alone])


def why_not(layer: torch.nn.Module) -> str | None:
    """Why a convolution layer can't be switched over; None if it can.

    >>> why_not(torch.nn.Conv2d(8, 8, 3))
    'groups=1, depthwise needs groups=8'
    """
    if isinstance(layer, Conv2d):
        return "is computed by dwconv already"
    if type(layer) is not torch.nn.Conv2d:
        return f"{type(layer).__name__} isn't torch.nn.Conv2d itself"
    if layer.groups != layer.in_channels:
        return f"groups={layer.groups}, depthwise needs groups={layer.in_channels}"
    return None


def convert(model: torch.nn.Module) -> Conversion:
    """Makes dwconv compute the depthwise `torch.nn.Conv2d` layers of a model, in place.

    The layers stay the objects they are, with their parameters, hooks and names: only their class changes to
    `dwconv.Conv2d`, a subclass of theirs. state_dict stays the same.

    >>> import torch, dwconv
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 16, 1))
    >>> print(dwconv.convert(model))
    1 depthwise layer is computed by dwconv: 0
    left alone: 1: groups=1, depthwise needs groups=8
    """
    replaced: list[str] = []
    left_alone: list[tuple[str, str]] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.modules.conv._ConvNd):
            continue
        reason = why_not(layer)
        if reason is None:
            layer.__class__ = Conv2d
            replaced.append(name)
        else:
            left_alone.append((name, reason))
    return Conversion(tuple(replaced), tuple(left_alone))
