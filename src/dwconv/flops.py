"""What torch.utils.flop_counter counts for dwconv's operators: a multiplication and an addition for each product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.dwconv


def _products(y_shape: Sequence[int], filter_size: Sequence[int]) -> int:
    return 2 * math.prod(y_shape) * math.prod(filter_size)


@register_flop_formula(_ops.convolution)
def _of_convolution(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return _products(out_shape, weight[2:])


@register_flop_formula(_ops.input_gradient)
def _of_input_gradient(grad: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return _products(grad, weight[2:])


@register_flop_formula(_ops.filter_gradient)
def _of_filter_gradient(x: Sequence[int], grad: Sequence[int], filter: Sequence[int], *_: Any, **__: Any) -> int:
    return _products(grad, filter)
