"""PyTorch's own samples of convolutions (OpInfo), those that are depthwise and those that can be made so."""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


def op_info(dims: int) -> Any:
    """PyTorch's description of conv1d, conv2d or conv3d."""
    if "expecttest" not in sys.modules:  # the samples stand beside test classes that need it; they themselves don't
        try:
            import expecttest  # noqa: F401
        except ImportError:
            sys.modules["expecttest"] = stub = types.ModuleType("expecttest")
            stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    with warnings.catch_warnings(), patch("torch.backends.disable_global_flags"):  # no test after this could set them
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return next(info for info in op_db if info.name == f"nn.functional.conv{dims}d")


Sample = tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]


def depthwise_samples(dims: int, dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """x, weight, bias, and stride, padding and dilation. Samples of other groups lose them: each channel keeps the
    filter that stands first for it, so that sizes and windows are PyTorch's."""
    for sample in op_info(dims).sample_inputs(device, dtype):
        x, (weight, bias) = sample.input, sample.args[:2]
        names = ("stride", "padding", "dilation", "groups")
        arguments = dict(zip(names, sample.args[2:], strict=False)) | sample.kwargs
        groups = arguments.pop("groups", 1)
        channels = x.shape[-dims - 1]
        if groups != channels:
            filters = max(1, weight.shape[0] // channels) * channels
            rows = torch.arange(filters, device=x.device) % weight.shape[0]
            weight, bias = weight[rows, :1].contiguous(), None if bias is None else bias[rows]
        yield x, weight, bias, arguments
