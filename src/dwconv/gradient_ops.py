"""The operators of the gradients: torch.ops.dwconv.input_gradient and filter_gradient, for CUDA, CPU and tracing.

With the convolution they are closed: the gradients of each are the other two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import emulator
from .choose import choose
from .device import preset
from .launch import Launch
from .ops import LIBRARY, MAX_PREPARED, geometry_of, is_watched, note_traced, prepared, without_data
from .plan import Plan
from .problem import DepthwiseProblem, Layout
from .tensors import Geometry, admits, empty, gradient_problem, in_layout

LIBRARY.define(
    "input_gradient(Tensor grad, Tensor weight, SymInt[] shape, int[] stride, int[] padding, int[] dilation, "
    "bool channels_last) -> Tensor"
)
# The gradient of the bias has no elements where it isn't wanted.
LIBRARY.define(
    "filter_gradient(Tensor x, Tensor grad, int[] filter, int[] stride, int[] padding, int[] dilation, bool bias, "
    "bool channels_last) -> (Tensor, Tensor)"
)

_aten = torch.ops.aten


def torch_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """PyTorch's own gradients of x, weight and bias; uneven padding is added to x and cut off its gradient."""
    even = [min(pair) for pair in geometry.pairs]
    extra = [(before - least, after - least) for (before, after), least in zip(geometry.pairs, even, strict=True)]
    uneven = any(map(any, extra))
    padded = F.pad(x, [pad for pair in reversed(extra) for pad in pair]) if uneven else x
    grad_x, grad_weight, grad_bias = _aten.convolution_backward(
        grad,
        padded,
        weight,
        [weight.shape[0]],
        list(geometry.stride),
        even,
        list(geometry.dilation),
        False,
        [0] * len(even),
        x.shape[1],
        list(needed),
    )
    if needed[0] and uneven:
        window = [slice(before, before + size) for (before, _), size in zip(extra, x.shape[2:], strict=True)]
        grad_x = grad_x[(slice(None), slice(None), *window)]
    return grad_x, grad_weight, grad_bias


# Zeros for blocks that count each other, by device and stream: every launch leaves them zero again.
_zeros: dict[tuple[int, int], Tensor] = {}


def _arrivals(count: int, like: Tensor) -> Tensor:
    """Counters that are zero. Those of a CUDA graph are its own: it may be replayed beside other launches."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    key = (like.get_device(), torch.cuda.current_stream().cuda_stream)
    found = _zeros.get(key)
    if found is None or found.numel() < count:
        found = _zeros[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=like.device)
    return found


class _Ready(NamedTuple):
    """What a call with these shapes and strides needs.

    Attributes:
        plan, launch: None of both where there is nothing to sum.
        copies_x, copies_grad: whether they must be copied to the layout first.
    """

    plan: Plan | None
    launch: Launch | None
    copies_x: bool
    copies_grad: bool


# What a call looks up first: everything that decides its launcher, as plain values.
_ready: dict[tuple[Any, ...], _Ready] = {}


def _remembered(key: tuple[Any, ...], ready: _Ready) -> _Ready:
    if len(_ready) >= MAX_PREPARED:
        _ready.clear()
    _ready[key] = ready
    return ready


def input_gradient(grad: Tensor, weight: Tensor, shape: tuple[int, ...], geometry: Geometry, layout: Layout) -> Tensor:
    """dx of this shape, dense in the layout, by dwconv's kernels: on a GPU, or under the emulator.

    A grad that isn't dense in the layout is copied.
    """
    index = grad.get_device()
    if index < 0:
        return _emulated_input_gradient(in_layout(grad, layout), weight.contiguous(), shape, geometry, layout)
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return input_gradient(grad, weight, shape, geometry, layout)
    key = (grad.shape, grad.stride(), weight.shape, shape, grad.dtype, grad.data_ptr() & 15, index, geometry, layout)
    ready = _ready.get(key)
    if ready is None:
        dense = in_layout(grad, layout)
        problem = gradient_problem("grad_input", dense, shape, weight.shape, geometry, layout=layout)
        plan, launch = prepared(problem, index) if 0 not in shape else (None, None)
        ready = _remembered(key, _Ready(plan, launch, False, dense is not grad))
    if ready.copies_grad:
        grad = in_layout(grad, layout)
    weight, result = weight.contiguous(), empty(grad, shape, layout)
    if ready.launch is not None:
        ready.launch(grad.data_ptr(), weight.data_ptr(), 0, result.data_ptr())
    return result


def filter_gradient(
    x: Tensor, grad: Tensor, taps: tuple[int, ...], geometry: Geometry, bias: bool, layout: Layout
) -> tuple[Tensor, Tensor]:
    """dw and db (without elements where `bias` is false), by dwconv's kernels: on a GPU, or under the emulator.

    A grad that isn't dense in the layout is copied, and an x whose columns or channels aren't neighbours there.
    """
    index = x.get_device()
    if index < 0:
        return _emulated_filter_gradient(_readable(x, layout), in_layout(grad, layout), taps, geometry, bias, layout)
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return filter_gradient(x, grad, taps, geometry, bias, layout)
    aligned = (x.data_ptr() | grad.data_ptr()) & 15
    key = (x.shape, x.stride(), grad.shape, grad.stride(), taps, x.dtype, aligned, index, geometry, bias, layout)
    ready = _ready.get(key)
    if ready is None:
        image, dense = _readable(x, layout), in_layout(grad, layout)
        weight_shape = (grad.shape[1], 1, *taps)
        problem = gradient_problem("grad_weight", dense, x.shape, weight_shape, geometry, image, bias, layout)
        plan, launch = prepared(problem, index) if x.numel() else (None, None)
        ready = _remembered(key, _Ready(plan, launch, image is not x, dense is not grad))
    if ready.copies_x:
        x = in_layout(x, layout)
    if ready.copies_grad:
        grad = in_layout(grad, layout)
    channels = grad.shape[1]
    grad_weight, grad_bias = x.new_empty((channels, 1, *taps)), x.new_empty(channels if bias else 0)
    plan, launch = ready.plan, ready.launch
    if plan is None or launch is None:
        return grad_weight.zero_(), grad_bias.zero_()
    # Both must live until the launch.
    partial = x.new_empty(plan.partial_bytes, dtype=torch.uint8) if plan.partial_bytes else None
    arrivals = _arrivals(plan.arrivals, x) if plan.arrivals else None
    launch(
        x.data_ptr(),
        grad.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        0 if arrivals is None else arrivals.data_ptr(),
    )
    return grad_weight, grad_bias


def _readable(x: Tensor, layout: Layout) -> Tensor:
    return x if admits(x, layout) else in_layout(x, layout)


def _emulated_input_gradient(
    grad: Tensor, weight: Tensor, shape: tuple[int, ...], geometry: Geometry, layout: Layout
) -> Tensor:
    problem = gradient_problem("grad_input", grad, shape, weight.shape, geometry, layout=layout)
    result = empty(grad, shape, layout)
    if result.numel():
        plan, emulation = _emulated_plan(problem)
        emulator.run(plan, grad, weight, None, result, order_seed=emulation.order_seed)
    return result


def _emulated_filter_gradient(
    x: Tensor, grad: Tensor, taps: tuple[int, ...], geometry: Geometry, bias: bool, layout: Layout
) -> tuple[Tensor, Tensor]:
    channels = grad.shape[1]
    grad_weight, grad_bias = x.new_empty((channels, 1, *taps)), x.new_empty(channels if bias else 0)
    if x.numel() == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    problem = gradient_problem("grad_weight", grad, x.shape, grad_weight.shape, geometry, x, bias, layout)
    plan, emulation = _emulated_plan(problem)
    of_bias = grad_bias if bias else None
    emulator.run_filter_gradient(plan, x, grad, grad_weight, of_bias, order_seed=emulation.order_seed)
    return grad_weight, grad_bias


def _emulated_plan(problem: DepthwiseProblem) -> tuple[Plan, emulator.Emulation]:
    emulation = emulator.active()
    assert emulation is not None, "CPU tensors go to PyTorch outside of the emulator"
    return choose(problem, preset(emulation.arch), emulation.variant_for(problem)), emulation


def _left_to_torch(tensor: Tensor) -> bool:
    return not tensor.is_cuda and emulator.active() is None


def _run_input_gradient(
    grad: Tensor, weight: Tensor, shape: tuple[int, ...], geometry: Geometry, layout: Layout
) -> Tensor:
    if _left_to_torch(grad):
        x = empty(grad, (1,) * len(shape), "channels_first").expand(shape)
        found = torch_gradients(grad, x, weight, geometry, (True, False, False))[0]
        assert found is not None
        return in_layout(found, layout)
    return input_gradient(grad, weight, shape, geometry, layout)


def _trace_input_gradient(
    grad: Tensor, weight: Tensor, shape: tuple[int, ...], geometry: Geometry, layout: Layout
) -> Tensor:
    if is_watched():
        dense = in_layout(without_data(grad), layout)
        problem = gradient_problem("grad_input", dense, shape, weight.shape, geometry, layout=layout)
        note_traced(problem, grad.get_device())
    return empty(grad, shape, layout)


def _run_filter_gradient(
    x: Tensor, grad: Tensor, taps: tuple[int, ...], geometry: Geometry, bias: bool, layout: Layout
) -> tuple[Tensor, Tensor]:
    if _left_to_torch(x):
        weight = x.new_empty((1,) * x.dim()).expand(grad.shape[1], 1, *taps)
        _, grad_weight, grad_bias = torch_gradients(grad, x, weight, geometry, (False, True, bias))
        assert grad_weight is not None
        return grad_weight.contiguous(), grad_bias if bias and grad_bias is not None else x.new_empty(0)
    return filter_gradient(x, grad, taps, geometry, bias, layout)


def _trace_filter_gradient(
    x: Tensor, grad: Tensor, taps: tuple[int, ...], geometry: Geometry, bias: bool, layout: Layout
) -> tuple[Tensor, Tensor]:
    weight_shape = (grad.shape[1], 1, *taps)
    if is_watched():
        image, dense = _readable(without_data(x), layout), in_layout(without_data(grad), layout)
        problem = gradient_problem("grad_weight", dense, x.shape, weight_shape, geometry, image, bias, layout)
        note_traced(problem, x.get_device())
    return x.new_empty(weight_shape), x.new_empty(grad.shape[1] if bias else 0)


def _input_gradient_operator(run: Any) -> Any:
    """The operator's signature over a function of (grad, weight, shape, geometry, layout)."""

    def operator(
        grad: Tensor,
        weight: Tensor,
        shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        channels_last: bool,
    ) -> Tensor:
        geometry = geometry_of(tuple(stride), tuple(padding), tuple(dilation))
        of_x: Tensor = run(grad, weight, tuple(shape), geometry, _layout(channels_last))
        return of_x

    return operator


def _filter_gradient_operator(run: Any) -> Any:
    """The operator's signature over a function of (x, grad, taps, geometry, bias, layout)."""

    def operator(
        x: Tensor,
        grad: Tensor,
        filter: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        bias: bool,
        channels_last: bool,
    ) -> tuple[Tensor, Tensor]:
        geometry = geometry_of(tuple(stride), tuple(padding), tuple(dilation))
        found: tuple[Tensor, Tensor] = run(x, grad, tuple(filter), geometry, bias, _layout(channels_last))
        return found

    return operator


def _layout(channels_last: bool) -> Layout:
    return "channels_last" if channels_last else "channels_first"


for _name, _operator, _run, _trace in (
    ("input_gradient", _input_gradient_operator, _run_input_gradient, _trace_input_gradient),
    ("filter_gradient", _filter_gradient_operator, _run_filter_gradient, _trace_filter_gradient),
):
    for _device in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _operator(_run), _device)
    torch.library.register_fake(f"dwconv::{_name}", _operator(_trace), lib=LIBRARY)
