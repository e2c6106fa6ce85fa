"""The operators that PyTorch sees: torch.ops.dwconv.conv2d, for CUDA, CPU and tracing.

List arguments would dominate the cost of a dispatch, so the operator takes plain integers: stride, padding before and
after, and dilation, for height and width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import emulator
from .choose import choose
from .compile import compile_plan
from .device import preset
from .launch import Launch, device_spec, launcher
from .problem import DepthwiseProblem
from .tensors import Pair, check_tensors, problem_of, takes

LIBRARY = torch.library.Library("dwconv", "DEF")
LIBRARY.define(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, int stride_h, int stride_w, int pad_top, int pad_bottom, "
    "int pad_left, int pad_right, int dilation_h, int dilation_w) -> Tensor"
)

_PLAIN = (Tensor, torch.nn.Parameter)
_MAX_PREPARED = 4096  # problems and calls that are remembered, for streams of shapes


def takes_now(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a call may go straight to the CUDA kernels, past PyTorch's dispatcher (10 µs in Python).

    It may where nothing looks at the dispatch: no tracing, no subclass, no mode, no transform of torch.func, no
    forward-mode gradients.
    """
    return (
        x.is_cuda
        and type(x) is Tensor
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself where neighbouring columns are neighbours in memory, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or tensor.numel() == 0 else tensor.contiguous()


def torch_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: tuple[Pair, Pair],
    dilation: Pair,
) -> Tensor:
    """PyTorch's own convolution of the same problem; uneven padding is added by F.pad."""
    (top, bottom), (left, right) = padding
    even = (min(top, bottom), min(left, right))
    if top != bottom or left != right:
        x = F.pad(x, (left - even[1], right - even[1], top - even[0], bottom - even[0]))
    return F.conv2d(x, weight, bias, stride, even, dilation, groups=x.shape[1])


@functools.lru_cache(maxsize=_MAX_PREPARED)
def _launcher_of(problem: DepthwiseProblem, index: int) -> Launch:
    """Problem -> plan -> compiled kernel -> launcher; the whole flow, once for each problem and device."""
    plan = choose(problem, device_spec(index))
    return launcher(plan, compile_plan(plan), index)


# What a call looks up first: everything that decides its launcher, as plain values.
_prepared: dict[tuple[Any, ...], tuple[Launch, tuple[int, ...]]] = {}


def grouped(numbers: tuple[int, ...]) -> tuple[Pair, tuple[Pair, Pair], Pair]:
    """Stride, padding and dilation from the operator's eight integers."""
    stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w = numbers
    return (stride_h, stride_w), ((top, bottom), (left, right)), (dilation_h, dilation_w)


def _nothing(x: int, weight: int, bias: int, y: int) -> None:
    """The launcher of an empty output."""


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, numbers: tuple[int, ...]
) -> tuple[Launch, tuple[int, ...]]:
    problem = problem_of(x, weight, bias, *grouped(numbers))
    if len(_prepared) >= _MAX_PREPARED:
        _prepared.clear()
    empty = 0 in problem.y_shape
    return _nothing if empty else _launcher_of(problem, x.device.index), problem.y_shape


_checked: set[tuple[Any, ...]] = set()


def _left_to_torch(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: tuple[int, ...]) -> Tensor:
    """PyTorch's convolution, after the same checks (once for the same shapes) that dwconv's own kernels get."""
    key = (*((t.shape, t.dtype, t.device) if t is not None else None for t in (x, weight, bias)), numbers)
    if key not in _checked:
        problem_of(x, weight, bias, *grouped(numbers))
        if len(_checked) >= _MAX_PREPARED:
            _checked.clear()
        _checked.add(key)
    return torch_conv2d(x, weight, bias, *grouped(numbers))


def conv2d_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, *numbers: int) -> Tensor:
    """The operator on CUDA tensors; records no gradients."""
    if not takes(x):
        return _left_to_torch(x, weight, bias, numbers)
    x, weight = _readable(x), weight.contiguous()
    device = x.device
    if device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return conv2d_cuda(x, weight, bias, *numbers)
    address = x.data_ptr()
    key = (x.shape, x.stride(), weight.shape, bias is None, address & 15, device.index, numbers)
    found = _prepared.get(key)
    fits = weight.dtype == x.dtype and weight.device == device
    fits = fits and (
        bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.device == device)
    )
    if found is None or not fits:
        found = _prepared[key] = _prepare(x, weight, bias, numbers)
    run, shape = found
    y = x.new_empty(shape)
    run(address, weight.data_ptr(), 0 if bias is None else bias.contiguous().data_ptr(), y.data_ptr())
    return y


def _conv2d_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, *numbers: int) -> Tensor:
    emulation = emulator.active()
    if emulation is None or not takes(x):
        return _left_to_torch(x, weight, bias, numbers)
    x, weight = _readable(x), weight.contiguous()
    problem = problem_of(x, weight, bias, *grouped(numbers))
    y = x.new_empty(problem.y_shape)
    if y.numel():
        plan = choose(problem, preset(emulation.arch), emulation.variant)
        emulator.run(plan, x, weight, None if bias is None else bias.contiguous(), y, order_seed=emulation.order_seed)
    return y


def _conv2d_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *numbers: int) -> Tensor:
    check_tensors(x, weight, bias)
    stride, padding, dilation = grouped(numbers)
    if not takes(x) or (x.device.type == "cpu" and emulator.active() is None):
        return torch_conv2d(x, weight, bias, stride, padding, dilation)
    sizes = [
        (x.shape[2 + i] + sum(padding[i]) - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return x.new_empty((x.shape[0], weight.shape[0], *sizes))


LIBRARY.impl("conv2d", conv2d_cuda, "CUDA")
LIBRARY.impl("conv2d", _conv2d_cpu, "CPU")
torch.library.register_fake("dwconv::conv2d", _conv2d_fake, lib=LIBRARY)
