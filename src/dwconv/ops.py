"""The operator that PyTorch sees: torch.ops.dwconv.convolution, for CUDA, CPU and tracing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import forward_ad

from . import emulator
from .choose import choose, ranked
from .compile import compile_first
from .device import preset
from .launch import Launch, device_spec, launcher
from .plan import Plan
from .problem import DepthwiseProblem, Layout, dense_strides
from .tensors import (
    NO_EXTRAS,
    Extras,
    Geometry,
    admits,
    check_residual,
    check_tensors,
    empty,
    in_layout,
    layout_of,
    problem_of,
    result_layout,
)

LIBRARY = torch.library.Library("dwconv", "DEF")
# padding: before and after the first dimension, then the next
LIBRARY.define(
    "convolution(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    "int[] stride, int[] padding, int[] dilation, str? activation) -> Tensor"
)

_PLAIN = (Tensor, torch.nn.Parameter)
MAX_PREPARED = 4096  # problems and calls that are remembered, for streams of shapes
_TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,  # slope 0.01
}


def takes_now(x: Tensor, weight: Tensor, bias: Tensor | None, extras: Extras | None) -> bool:
    """Whether a call may go straight to the CUDA kernels, past PyTorch's dispatcher (10 µs in Python).

    It may where nothing looks at the dispatch: no tracing, no subclass, no mode, no transform of torch.func, no
    forward-mode gradients.
    """
    return (
        x.is_cuda
        and type(x) is Tensor
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and (extras is None or all(tensor is None or type(tensor) in _PLAIN for tensor in extras[1:]))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def torch_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras = NO_EXTRAS
) -> Tensor:
    """PyTorch's own convolution of the same problem, and its epilogue; uneven padding is added by F.pad."""
    even = [min(pair) for pair in geometry.pairs]
    around = [pad - least for pair, least in zip(geometry.pairs[::-1], even[::-1], strict=True) for pad in pair]
    if any(around):
        x = F.pad(x, around)
    convolution = _TORCH[weight.dim() - 2]
    y: Tensor = convolution(x, weight, bias, geometry.stride, even, geometry.dilation, groups=x.shape[1])
    return torch_epilogue(y, extras)


def torch_epilogue(y: Tensor, extras: Extras) -> Tensor:
    """scale * activation(y) + shift + residual by PyTorch's operations, in y's dtype (which autocast may have set)."""

    def per_channel(values: Tensor) -> Tensor:
        return values.to(y.dtype).view(-1, *(1,) * (y.dim() - 2))

    if extras.activation is not None:
        y = _ACTIVATIONS[extras.activation](y)
    if extras.scale is not None:
        y = y * per_channel(extras.scale)
    if extras.shift is not None:
        y = y + per_channel(extras.shift)
    if extras.residual is not None:
        y = y + extras.residual.to(y.dtype)
    return y


@functools.lru_cache(maxsize=MAX_PREPARED)
def prepared(problem: DepthwiseProblem, index: int) -> tuple[Plan, Launch]:
    """Problem -> plan -> compiled kernel -> launcher; the whole flow, once for each problem and device."""
    plan, compiled = compile_first(ranked(problem, device_spec(index)))
    return plan, launcher(plan, compiled, index)


class _Prepared(NamedTuple):
    """What a call with these shapes and strides needs.

    Attributes:
        launch: a function of addresses.
        y_shape: the result's.
        y_strides: what the kernel writes; None where that is contiguous.
        layout: what kernels compute in.
        copies_x, copies_residual: whether they must be copied to this layout first.
        result: the layout that y is copied to, where PyTorch's memory format isn't the one that x lies in.
    """

    launch: Launch
    y_shape: tuple[int, ...]
    y_strides: tuple[int, ...] | None
    layout: Layout
    copies_x: bool
    copies_residual: bool
    result: Layout | None


# What a call looks up first: everything that decides its launcher, as plain values.
_prepared: dict[tuple[Any, ...], _Prepared] = {}


def _nothing(x: int, weight: int, bias: int, y: int, *epilogue: int) -> None:
    """The launcher of an empty output."""


def _arranged(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras
) -> tuple[DepthwiseProblem, Layout, Tensor, Extras]:
    """(problem, the result's layout, x, extras): x and the residual copied where kernels can't take them as they lie.

    Raises:
        DepthwiseError: the tensors don't belong together, or describe no convolution.
    """
    check_tensors(x, weight, bias, extras)
    result = result_layout(x, weight)
    layout = layout_of(x, result)
    problem = problem_of(x, weight, bias, geometry, extras, layout)
    readable = x if admits(x, layout) else in_layout(x, layout)
    beside = extras if extras.residual is None else extras._replace(residual=in_layout(extras.residual, layout))
    if readable is not x or beside.residual is not extras.residual:
        problem = problem_of(readable, weight, bias, geometry, beside, layout)
    return problem, result, readable, beside


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras) -> _Prepared:
    problem, result, readable, beside = _arranged(x, weight, bias, geometry, extras)
    if len(_prepared) >= MAX_PREPARED:
        _prepared.clear()
    shape, layout = problem.y_shape, problem.layout
    return _Prepared(
        launch=_nothing if 0 in shape else prepared(problem, x.get_device())[1],
        y_shape=shape,
        y_strides=None if layout == "channels_first" else dense_strides(shape, layout),
        layout=layout,
        copies_x=readable is not x,
        copies_residual=beside.residual is not extras.residual,
        result=None if layout == result else result,
    )


def run_on_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras | None = None
) -> Tensor:
    """The operator on CUDA tensors; records no gradients."""
    index = x.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return run_on_cuda(x, weight, bias, geometry, extras)
    address, dtype = x.data_ptr(), x.dtype
    key: tuple[Any, ...]
    key = (x.shape, x.stride(), weight.shape, weight.stride(), dtype, bias is None, address & 15, index, geometry)
    fits = weight.dtype is dtype and weight.get_device() == index
    if bias is not None:
        fits = fits and bias.dtype is dtype and bias.get_device() == index and bias.shape == weight.shape[:1]
    if extras is not None:
        key += (extras.activation, *map(_looked_up, extras[1:]))
    found = _prepared.get(key)
    if found is None or not fits:
        found = _prepared[key] = _prepare(x, weight, bias, geometry, extras or NO_EXTRAS)
    launch, shape, strides, layout, copies_x, copies_residual, result = found
    if copies_x:
        x = in_layout(x, layout)
        address = x.data_ptr()
    # Copies must live until the launch: the memory of one that is gone might be taken for the next.
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(shape) if strides is None else x.new_empty_strided(shape, strides)
    bias_address = 0 if bias is None else bias.data_ptr()
    if extras is None:
        launch(address, weight.data_ptr(), bias_address, y.data_ptr())
    else:
        beside = _dense(extras, layout if copies_residual else None)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in beside]
        launch(address, weight.data_ptr(), bias_address, y.data_ptr(), *addresses)
    return y if result is None else in_layout(y, result)


def _looked_up(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What decides about a tensor of the epilogue."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), tensor.data_ptr() & 15


def _dense(extras: Extras, layout: Layout | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Scale, shift and residual as kernels read them; the residual is copied to a layout where one is given."""
    _, scale, shift, residual = extras
    return (
        None if scale is None else scale.contiguous(),
        None if shift is None else shift.contiguous(),
        residual if residual is None or layout is None else in_layout(residual, layout),
    )


@functools.lru_cache(maxsize=MAX_PREPARED)
def geometry_of(stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]) -> Geometry:
    """The one Geometry of these numbers."""
    return Geometry(stride, padding, dilation)


_checked: set[tuple[Any, ...]] = set()


def _left_to_torch(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras) -> Tensor:
    """PyTorch's convolution, after the same checks (once for the same shapes) that dwconv's own kernels get."""
    tensors = (x, weight, bias, *extras[1:])
    key = (*((t.shape, t.dtype, t.device) if t is not None else None for t in tensors), extras.activation, geometry)
    if key not in _checked:
        problem_of(x, weight, bias, geometry, extras)
        if len(_checked) >= MAX_PREPARED:
            _checked.clear()
        _checked.add(key)
    return torch_convolution(x, weight, bias, geometry, extras)


def run_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras) -> Tensor:
    """The operator on CPU tensors: PyTorch's own convolution, or inside `emulated()` the kernels under the emulator."""
    emulation = emulator.active()
    if emulation is None:
        return _left_to_torch(x, weight, bias, geometry, extras)
    problem, result, x, extras = _arranged(x, weight, bias, geometry, extras)
    y = empty(x, problem.y_shape, problem.layout)
    if y.numel():
        plan = choose(problem, preset(emulation.arch), emulation.variant_for(problem))
        bias = None if bias is None else bias.contiguous()
        beside = _dense(extras, None)
        emulator.run(plan, x, weight.contiguous(), bias, y, *beside, order_seed=emulation.order_seed)
    return y if problem.layout == result else in_layout(y, result)


def _run_nowhere(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras) -> Tensor:
    """A tensor like the result, for tracing."""
    check_tensors(x, weight, bias, extras)
    if x.device.type == "cpu" and emulator.active() is None:
        return torch_convolution(x, weight, bias, geometry, extras)
    sizes = [
        (size + before + after - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, (before, after), dilation in zip(
            x.shape[2:], weight.shape[2:], geometry.stride, geometry.pairs, geometry.dilation, strict=True
        )
    ]
    shape = (x.shape[0], weight.shape[0], *sizes)
    check_residual(extras.residual, shape)
    if is_watched() and 0 not in shape:
        tensors = (None if tensor is None else without_data(tensor) for tensor in extras[1:])
        bias = None if bias is None else without_data(bias)
        found = _arranged(without_data(x), without_data(weight), bias, geometry, Extras(extras.activation, *tensors))
        note_traced(found[0], x.get_device())
    return empty(x, shape, result_layout(x, weight))


# What `watching` fills. No ContextVar: autograd runs the backward of CUDA tensors in threads of its own.
_watched: list[tuple[DepthwiseProblem, int]] | None = None
_one_watcher = Lock()


@contextmanager
def watching(found: list[tuple[DepthwiseProblem, int]]) -> Iterator[None]:
    """Inside, problems that operators are traced with are put in a list, with the index of their device (CPU: -1).

    One thread at a time can watch; others wait.
    """
    global _watched
    with _one_watcher:
        _watched = found
        try:
            yield
        finally:
            _watched = None


def is_watched() -> bool:
    """Whether traced problems are put in a list."""
    return _watched is not None


def note_traced(problem: DepthwiseProblem, index: int) -> None:
    """Puts a problem in the list of `watching`; only while there is one."""
    assert _watched is not None, "call it only where is_watched()"
    _watched.append((problem, index))


def without_data(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype on the meta device, whose address is 0: aligned to anything."""
    with unset_fake_temporarily():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _operator(run: Any) -> Any:
    """The operator's signature over a function of (x, weight, bias, geometry, extras)."""

    def convolution(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        activation: str | None,
    ) -> Tensor:
        geometry = geometry_of(tuple(stride), tuple(padding), tuple(dilation))
        extras = Extras(activation, scale, shift, residual)
        y: Tensor = run(x, weight, bias, geometry, extras)
        return y

    return convolution


def operator_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, extras: Extras
) -> tuple[Any, ...]:
    """The arguments of torch.ops.dwconv.convolution."""
    activation, *tensors = extras
    return x, weight, bias, *tensors, geometry.stride, geometry.padding, geometry.dilation, activation


LIBRARY.impl("convolution", _operator(run_on_cuda), "CUDA")
LIBRARY.impl("convolution", _operator(run_on_cpu), "CPU")
torch.library.register_fake("dwconv::convolution", _operator(_run_nowhere), lib=LIBRARY)
