"""Switches the depthwise layers of a model over to dwconv."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .modules import Conv1d, Conv2d, Conv3d

# torch.nn's layers, and what computes the depthwise ones among them
_LAYERS = {torch.nn.Conv1d: Conv1d, torch.nn.Conv2d: Conv2d, torch.nn.Conv3d: Conv3d}


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
    if isinstance(layer, (Conv1d, Conv2d, Conv3d)):
        return "is computed by dwconv already"
    if type(layer) not in _LAYERS:
        return f"{type(layer).__name__} isn't torch.nn.Conv1d, Conv2d or Conv3d itself"
    if layer.groups != layer.in_channels:
        return f"groups={layer.groups}, depthwise needs groups={layer.in_channels}"
    return None


def convert(model: torch.nn.Module) -> Conversion:
    """Makes dwconv compute the depthwise convolutions of a model, of one to three dimensions, in place.

    The layers stay the objects they are, with their parameters, hooks and names: only their class changes, for example
    from `torch.nn.Conv2d` to `dwconv.Conv2d`, a subclass. state_dict stays the same.

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
            layer.__class__ = _LAYERS[type(layer)]
            replaced.append(name)
        else:
            left_alone.append((name, reason))
    return Conversion(tuple(replaced), tuple(left_alone))
