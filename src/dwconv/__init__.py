"""dwconv: depthwise convolution in PyTorch as fast as the memory of the GPU allows.

    >>> import torch, dwconv
    >>> dwconv.conv2d(torch.randn(1, 8, 32, 32), torch.randn(8, 1, 3, 3), padding="same").shape
    torch.Size([1, 8, 32, 32])

Importing this package touches neither CUDA nor the disk, and torch only when a name that needs it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import DepthwiseError
from .version import __version__

if TYPE_CHECKING:
    from .conversion import convert
    from .emulator import emulated
    from .functional import conv1d, conv2d, conv3d
    from .modules import Conv1d, Conv2d, Conv3d
    from .preparation import prepare

_LAZY = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "functional"),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), "modules"),
    "convert": "conversion",
    "emulated": "emulator",
    "prepare": "preparation",
}

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DepthwiseError",
    "__version__",
    "conv1d",
    "conv2d",
    "conv3d",
    "convert",
    "emulated",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dwconv' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
