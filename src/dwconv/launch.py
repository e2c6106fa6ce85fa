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
from .plan import Constants, Plan

_DEFAULT_SHARED_BYTES = 48 * 1024  # more dynamic shared memory must be asked for, kernel by kernel
_STREAM_CAPTURE_UNSUPPORTED = 900

# (kernel_id, device index) -> CUfunction, and the module that keeps it loaded
_functions: dict[tuple[tuple[str, Constants, str], int], tuple[Any, Any]] = {}


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DepthwiseError(
            "the CUDA driver's Python bindings can't be imported: install them with `pip install cuda-bindings`"
        ) from error
    return driver


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call, or a DepthwiseError that names the call's purpose and the driver's reason."""
    status, *values = result
    if int(status) == 0:
        return values[0] if values else None
    _, name = _driver().cuGetErrorName(status)
    text = name.decode() if isinstance(name, bytes) else str(name)
    if int(status) == _STREAM_CAPTURE_UNSUPPORTED:
        raise DepthwiseError(
            f"{what} isn't possible while a CUDA graph is being captured ({text}): call the layer once with the same "
            "shapes before the capture, so that its kernel is loaded"
        )
    remedy = ""
    if "NO_BINARY" in text or "INVALID_IMAGE" in text or "UNSUPPORTED_PTX" in text:
        remedy = (
            ": the driver is older than the compiler that made the kernel; update the driver, or install a "
            "nvidia-cuda-nvrtc of the driver's CUDA version"
        )
    raise DepthwiseError(f"{what} failed with {text}{remedy}")


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
    key = (plan.kernel_id, index)
    if key not in _functions:
        driver = _driver()
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # creates the device's context
            module = _checked(driver.cuModuleLoadData(compiled.cubin), f"loading {plan.variant}")
            function = _checked(driver.cuModuleGetFunction(module, compiled.entry.encode()), "finding the kernel")
            if plan.shared_bytes > _DEFAULT_SHARED_BYTES:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked(
                    driver.cuFuncSetAttribute(function, attribute, plan.shared_bytes),
                    f"asking for {plan.shared_bytes} bytes of shared memory",
                )
        _functions[key] = (function, module)
    return _functions[key][0]


Launch = Callable[[int, int, int, int], None]


def launcher(plan: Plan, compiled: CompiledKernel, index: int) -> Launch:
    """A function of four addresses (x, weight, bias or 0, y) that launches the plan on the current stream.

    Everything that doesn't change from call to call is packed here, once.
    """
    function = load(plan, compiled, index)
    sizes = (ctypes.c_int64 * len(plan.sizes))(*plan.sizes)
    tiling = (ctypes.c_uint32 * len(plan.tiling))(*plan.tiling)
    launch_kernel = _driver().cuLaunchKernel
    stream_of = torch._C._cuda_getCurrentRawStream
    shape = (*plan.grid, *plan.block, plan.shared_bytes)
    pointers_type = ctypes.c_void_p * 4
    arguments_type = ctypes.c_void_p * 6
    pointer_bytes = ctypes.sizeof(ctypes.c_void_p)
    address = ctypes.addressof

    def launch_now(x: int, weight: int, bias: int, y: int) -> None:
        pointers = pointers_type(x, weight, bias, y)
        at = address(pointers)
        arguments = arguments_type(
            at, at + pointer_bytes, at + 2 * pointer_bytes, at + 3 * pointer_bytes, address(sizes), address(tiling)
        )
        result = launch_kernel(function, *shape, stream_of(index), address(arguments), 0)
        if result[0]:
            _checked(result, f"launching {plan.variant} with grid {plan.grid}")

    return launch_now


def launch(
    plan: Plan,
    compiled: CompiledKernel,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """Launches a plan once, on the current stream of x's device. An empty output launches nothing."""
    if y.numel() == 0:
        return
    index = x.device.index
    with torch.cuda.device(index):
        launcher(plan, compiled, index)(
            x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()
        )
