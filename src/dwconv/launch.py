"""Puts a compiled kernel on the GPU: module, arguments, stream. Pure Python on cuda.bindings."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .compile import CompiledKernel
from .device import PRESETS, DeviceSpec
from .errors import DepthwiseError
from .plan import Plan
from .tensor_maps import INVALID_CONTEXT, encoder

# Imported here and not where it is used first: it takes 10 ms, which no call should wait for.
try:
    from cuda.bindings import driver as _bindings
except ImportError:
    _bindings = None

_STREAM_CAPTURE_UNSUPPORTED = 900
_MOST_MAPS = 64  # addresses of a plan's operands whose maps are kept
_UNLOADABLE = (200, 209, 222)  # invalid image, no binary for the GPU, unsupported version

# (machine code, device index) -> CUfunction, and the module that keeps it loaded
_functions: dict[tuple[bytes, int], tuple[Any, Any]] = {}


def _driver() -> Any:
    if _bindings is None:
        raise DepthwiseError(
            "the CUDA driver's Python bindings can't be imported: install them with `pip install cuda-bindings`"
        )
    return _bindings


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call, or a DepthwiseError that names the call's purpose and the driver's reason."""
    status, *values = result
    if int(status) == 0:
        return values[0] if values else None
    raise _failure(int(status), what)


def _failure(status: int, what: str) -> DepthwiseError:
    """The error of a driver call that returned `status`."""
    if status == _STREAM_CAPTURE_UNSUPPORTED:
        return DepthwiseError(
            f"{what} isn't possible while a CUDA graph is being captured: call `dwconv.prepare(module, *inputs)`, or "
            "the layer once with the same shapes, before the capture, so that its kernels are loaded"
        )
    if status in _UNLOADABLE:
        return DepthwiseError(
            f"{what} failed (CUDA error {status}): the driver is older than the compiler that made the kernel; update "
            "the driver, or install a nvidia-cuda-nvrtc of the driver's CUDA version"
        )
    driver = _driver()
    _, name = driver.cuGetErrorName(driver.CUresult(status))
    return DepthwiseError(f"{what} failed with {name.decode() if name else f'CUDA error {status}'}")


def driver_version() -> tuple[int, int]:
    """The CUDA version that the installed driver supports, (major, minor)."""
    try:
        answer = _driver().cuDriverGetVersion()
    except RuntimeError as error:
        raise DepthwiseError(
            f"there is no NVIDIA driver on this machine ({error}): kernels run in the emulator"
        ) from error
    version = _checked(answer, "asking for the driver's version")
    return version // 1000, version % 1000 // 10


@functools.cache
def device_spec(index: int) -> DeviceSpec:
    """The GPU with this index. Rates that the driver doesn't tell come from the preset of the nearest architecture."""
    properties = torch.cuda.get_device_properties(index)
    arch = f"sm_{properties.major}{properties.minor}"
    if arch in PRESETS:
        nearest = PRESETS[arch]
    else:
        older = [spec for spec in PRESETS.values() if spec.sm <= properties.major * 10 + properties.minor]
        if not older:
            raise DepthwiseError(
                f"{properties.name} has architecture {arch}; dwconv's kernels need sm_75 or newer: use "
                "torch.nn.functional.conv2d on this GPU"
            )
        nearest = max(older, key=lambda spec: spec.sm)
    share = properties.multi_processor_count / nearest.multiprocessors
    return replace(
        nearest,
        name=properties.name,
        arch=arch,
        multiprocessors=properties.multi_processor_count,
        fp32_tflops=nearest.fp32_tflops * share,
        l2_bytes=properties.L2_cache_size or nearest.l2_bytes,
    )


def load(plan: Plan, compiled: CompiledKernel, index: int) -> Any:
    """The kernel as a function of the device with this index; loaded once."""
    key = (compiled.cubin, index)
    if key not in _functions:
        driver = _driver()
        with torch.cuda.device(index):
            _make_context_current(index)
            module = _checked(driver.cuModuleLoadData(compiled.cubin), f"loading {plan.variant}")
            function = _checked(driver.cuModuleGetFunction(module, compiled.entry.encode()), "finding the kernel")
            # As much as a block may take: plans of one kernel differ in what they need.
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            properties = torch.cuda.get_device_properties(index)
            most: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stubs
            _checked(driver.cuFuncSetAttribute(function, attribute, most), f"asking for {most} bytes of shared memory")
        _functions[key] = (function, module)
    return _functions[key][0]


def _make_context_current(index: int) -> None:
    """Gives this thread the device's primary context. Threads of the backward pass begin without one, and PyTorch's
    device guards don't set it where the device stays the same."""
    driver = _driver()
    device = _checked(driver.cuDeviceGet(index), "finding the device")
    context = _checked(driver.cuDevicePrimaryCtxRetain(device), "asking for the device's context")
    _checked(driver.cuCtxSetCurrent(context), "making the device's context current")


Launch = Callable[..., None]


@functools.cache
def _launch_kernel() -> Any:
    """cuLaunchKernel by ctypes: with prepared arguments a call takes less than half of cuda.bindings' time."""
    return ctypes.PyDLL("libcuda.so.1").cuLaunchKernel


def launcher(plan: Plan, compiled: CompiledKernel, index: int) -> Launch:
    """A function of addresses that launches on the current stream.

    They are those of x, weight, bias, y; then scale, shift, residual, which may be left out where there is no epilogue.
    For the gradient of x: that of y, weight, 0, and the result. For that of the filters: x, the gradient of y, the
    results for filters and bias, `Plan.partial_bytes` of memory, `Plan.arrivals` zeros. 0 stands for what isn't there.

    Everything that doesn't change from call to call is packed here, once.
    """
    function = ctypes.c_void_p(int(load(plan, compiled, index)))
    sizes = (ctypes.c_int64 * len(plan.sizes))(*plan.sizes)
    tiling = (ctypes.c_uint32 * len(plan.tiling))(*plan.tiling)
    shape = tuple(map(ctypes.c_uint, (*plan.grid, *plan.block, plan.shared_bytes)))
    launch_kernel, stream_of, address = _launch_kernel(), torch._C._cuda_getCurrentRawStream, ctypes.addressof
    tensors_type, arguments_type, pointer = ctypes.c_void_p * 7, ctypes.c_void_p * 4, ctypes.c_void_p

    mapped = [each.operand for each in plan.maps]
    if mapped:
        encode = encoder(plan.maps, functools.partial(_make_context_current, index))
        maps_at = functools.lru_cache(maxsize=_MOST_MAPS)(encode)

    def launch_now(*addresses: int) -> None:
        tensors = tensors_type(*addresses)  # twin of `dwconv::Tensors`, or of the smaller `dwconv::FilterGradients`
        maps = maps_at(*[addresses[operand] for operand in mapped]) if mapped else None
        arguments = arguments_type(
            address(tensors), address(sizes), address(tiling), None if maps is None else address(maps)
        )
        stream = pointer(stream_of(index))
        status = launch_kernel(function, *shape, stream, arguments, None)
        if status == INVALID_CONTEXT:  # the first call of a thread
            _make_context_current(index)
            status = launch_kernel(function, *shape, stream, arguments, None)
        if status:
            raise _failure(status, f"launching {plan.variant} with grid {plan.grid}")

    return launch_now


def launch(
    plan: Plan,
    compiled: CompiledKernel,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """Launches a plan once, on the current stream of x's device. An empty output launches nothing."""
    if y.numel():
        _launch_tensors(plan, compiled, x, weight, bias, y, scale, shift, residual)


def launch_filter_gradient(
    plan: Plan,
    compiled: CompiledKernel,
    x: torch.Tensor,
    grad: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor | None,
) -> None:
    """Launches a plan for grad_weight once, with memory of its own for partial sums."""
    partial = x.new_empty(plan.partial_bytes, dtype=torch.uint8)
    arrivals = x.new_zeros(plan.arrivals, dtype=torch.int32)
    _launch_tensors(plan, compiled, x, grad, grad_weight, grad_bias, partial, arrivals)


def _launch_tensors(plan: Plan, compiled: CompiledKernel, *tensors: torch.Tensor | None) -> None:
    assert tensors[0] is not None, "every kernel reads a tensor"
    index = tensors[0].device.index
    with torch.cuda.device(index):
        launcher(plan, compiled, index)(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
