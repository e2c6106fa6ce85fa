"""Runs the blocks of a plan on the CPU, on the memory of torch's CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import env
from ..plan import Plan
from ..problem import contiguous_strides, dense_strides
from ..tensor_maps import emulated
from . import build

_MESSAGE_BYTES = 2048
_SLICE_SECONDS = 0.25  # after which Python looks for an interrupt, and progress is told
_MOST_THREADS, _MOST_GRID_X, _MOST_GRID_YZ = 1024, 2**31 - 1, 65535

Progress = Callable[[int, int], object]
Argument: TypeAlias = "ctypes.c_void_p | ctypes.Array[Any]"


class EmulationError(RuntimeError):
    """A kernel broke one of CUDA's rules: the message says which rule, and which block and thread."""


class _Launch(ctypes.Structure):
    """Twin of `dwconv_emulator::Launch`."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("arguments", ctypes.c_void_p),
        ("order_seed", ctypes.c_uint64),
        ("shuffled", ctypes.c_int),
        ("workers", ctypes.c_int),
        ("seconds", ctypes.c_double),
        ("next_block", ctypes.c_uint64),
        ("message", ctypes.c_char_p),
        ("message_bytes", ctypes.c_uint64),
    )


def run(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    order_seed: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Computes y by the plan's kernel, on the CPU. As on a GPU, an empty output launches nothing.

    Args:
        plan: any plan; its architecture only decides limits.
        x, weight, bias, y, scale, shift, residual: CPU tensors of the sizes and strides that the plan was made for.
        order_seed: runs blocks, and threads between barriers, in an order that this number decides; a correct kernel
            gives the same bits in any order. None takes them as they come.
        progress: called now and then with the blocks that are finished and the blocks in all.

    Raises:
        DepthwiseError: there is no C++ compiler, or it rejects the kernel.
        EmulationError: the kernel broke one of CUDA's rules.
        ValueError: a tensor is not what the plan was made for.
    """
    tensors = (x, weight, bias, y, scale, shift, residual)
    _check_tensors(plan, *tensors)
    if y.numel() == 0:
        return
    launch_kernel(
        build.library(plan),
        plan.grid,
        plan.block,
        plan.shared_bytes,
        kernel_arguments(plan, *tensors),
        most_shared_bytes=plan.device.shared_bytes - 1024,
        order_seed=order_seed,
        progress=progress,
    )


def run_filter_gradient(
    plan: Plan,
    x: Tensor,
    grad: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    *,
    order_seed: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Computes the gradients of filters and bias by a plan for grad_weight; otherwise as `run`.

    Args:
        grad: the gradient of y, dense in the problem's layout.
        grad_weight: [C*m, 1, *filter]; grad_bias: [C*m], or None where the problem has none.

    Raises:
        as `run`; EmulationError also where counters of blocks aren't zero again.
    """
    problem = plan.problem
    _check(plan, "x", x, problem.x_shape, problem.plane_strides)
    _check(plan, "grad", grad, problem.y_shape, dense_strides(problem.y_shape, problem.layout))
    _check(plan, "grad_weight", grad_weight, problem.weight_shape, contiguous_strides(problem.weight_shape))
    if (grad_bias is not None) != problem.bias:
        raise ValueError(f"the plan was made {'with' if problem.bias else 'without'} a gradient of the bias")
    if grad_bias is not None:
        _check(plan, "grad_bias", grad_bias, (problem.out_channels,), (1,))
    if problem.batch == 0:
        raise ValueError("an empty batch launches nothing: the gradients are zero")
    partial = torch.full((plan.partial_bytes,), 0xFF, dtype=torch.uint8)
    arrivals = torch.zeros(plan.arrivals, dtype=torch.int32)
    launch_kernel(
        build.library(plan),
        plan.grid,
        plan.block,
        plan.shared_bytes,
        kernel_arguments(plan, x, grad, grad_weight, grad_bias, partial, arrivals),
        most_shared_bytes=plan.device.shared_bytes - 1024,
        order_seed=order_seed,
        progress=progress,
    )
    if arrivals.any():
        raise EmulationError("counters of blocks that arrived are not zero again after the launch")


def kernel_arguments(plan: Plan, *tensors: Tensor | None) -> list[Argument]:
    """What the entry of every kernel takes: Tensors (x, weight, bias, y, scale, shift, residual) or FilterGradients (x,
    g, dw, db, partial, arrivals), Sizes and Tiling; where the plan has maps, those.
    """
    addresses = (ctypes.c_void_p * len(tensors))(
        *(tensor.data_ptr() if tensor is not None else None for tensor in tensors)
    )
    sizes = (ctypes.c_int64 * len(plan.sizes))(*plan.sizes)
    tiling = (ctypes.c_uint32 * len(plan.tiling))(*plan.tiling)
    if not plan.maps:
        return [addresses, sizes, tiling]
    return [addresses, sizes, tiling, emulated(plan.maps, [addresses[each.operand] or 0 for each in plan.maps])]


def launch_kernel(
    library: ctypes.CDLL,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    arguments: Sequence[Argument],
    *,
    most_shared_bytes: int = 227 * 1024,
    order_seed: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Runs a kernel that `build.load` loaded. `arguments` are passed by value, as bytes.

    Raises:
        EmulationError: the launch or the kernel broke one of CUDA's rules.
    """
    _check_launch(grid, block, shared_bytes, most_shared_bytes)
    _check_arguments(library, [ctypes.sizeof(argument) for argument in arguments])
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    blocks = prod(grid)
    launch = _Launch(
        grid=grid,
        block=block,
        shared_bytes=shared_bytes,
        arguments=ctypes.addressof(addresses),
        order_seed=order_seed or 0,
        shuffled=order_seed is not None,
        workers=max(1, min(env.read_integer("DWCONV_EMULATOR_THREADS"), blocks)),
        seconds=_SLICE_SECONDS,
        message=ctypes.cast(message, ctypes.c_char_p),
        message_bytes=_MESSAGE_BYTES,
    )
    while launch.next_block < blocks:
        if library.dwconv_emulator_launch(ctypes.byref(launch)) != 0:
            raise EmulationError(message.value.decode(errors="replace"))
        if progress is not None:
            progress(min(launch.next_block, blocks), blocks)


def _check_launch(grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, most_shared_bytes: int) -> None:
    """The limits at which cuLaunchKernel would refuse."""
    if min(grid) < 1 or min(block) < 1:
        raise EmulationError(f"grid {grid} and block {block} must be at least 1 in every dimension")
    if prod(block) > _MOST_THREADS or block[2] > 64:
        raise EmulationError(f"block {block} has {prod(block)} threads; {_MOST_THREADS} is the most, 64 in z")
    if grid[0] > _MOST_GRID_X or max(grid[1:]) > _MOST_GRID_YZ:
        raise EmulationError(f"grid {grid} is too large: {_MOST_GRID_X} is the most in x, {_MOST_GRID_YZ} in y and z")
    if not 0 <= shared_bytes <= most_shared_bytes:
        raise EmulationError(f"{shared_bytes} bytes of shared memory: a block may take up to {most_shared_bytes}")


def _check_arguments(library: ctypes.CDLL, given: list[int]) -> None:
    library.dwconv_emulator_argument_bytes.restype = ctypes.POINTER(ctypes.c_uint32)
    sizes = library.dwconv_emulator_argument_bytes()
    wanted: list[int] = []
    while sizes[len(wanted)]:
        wanted.append(sizes[len(wanted)])
    if wanted != given:
        raise EmulationError(
            f"the kernel takes arguments of {wanted} bytes, the launch passes {given}: the fields of Sizes and Tiling "
            "must be the plan's"
        )


def _check_tensors(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> None:
    problem = plan.problem
    epilogue, per_channel = problem.epilogue, (problem.out_channels,)
    expected = [
        ("x", x, problem.source_shape),
        ("weight", weight, problem.weight_shape),
        ("y", y, problem.result_shape),
    ]
    for name, tensor, wanted, shape in (
        ("bias", bias, problem.bias and problem.direction == "forward", per_channel),
        ("scale", scale, epilogue.scale, per_channel),
        ("shift", shift, epilogue.shift, per_channel),
        ("residual", residual, epilogue.residual, problem.y_shape),
    ):
        if (tensor is not None) != wanted:
            raise ValueError(f"the plan was made {'with' if wanted else 'without'} a {name}")
        if tensor is not None:
            expected.append((name, tensor, shape))
    for name, tensor, shape in expected:
        strides = contiguous_strides(shape)
        if name in ("y", "residual"):
            strides = dense_strides(shape, problem.layout)
        _check(plan, name, tensor, shape, problem.plane_strides if name == "x" else strides)


def _check(plan: Plan, name: str, tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    problem = plan.problem
    if tensor.device.type != "cpu" or str(tensor.dtype) != f"torch.{problem.dtype}" or tensor.shape != shape:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; the plan was made for {shape} "
            f"{problem.dtype} on the CPU"
        )
    if not _has_strides(tensor, strides):
        raise ValueError(f"{name} has strides {tensor.stride()}; the plan was made for {strides}")
    aligned = tensor.numel() == 0 or tensor.data_ptr() % problem.aligned == 0
    if name in ("x", "y", "residual", "grad") and not aligned:
        raise ValueError(f"{name} starts at an address that is not a multiple of {problem.aligned} bytes")


def _has_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether a tensor's strides are these, as far as they mean anything."""
    both = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return tensor.numel() == 0 or all(size == 1 or stride == planned for size, stride, planned in both)
