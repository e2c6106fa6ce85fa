"""Tensors as the copy engine sees them: `TensorMap`s with an address, for the driver and for the emulator."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

from .errors import DepthwiseError
from .plan import TensorMap

BYTES, _ALIGNMENT = 128, 64  # of a map
_WORDS = BYTES // 8
# The driver's names of types: unsigned integers, whose bits nothing changes.
_UNSIGNED = {1: 0, 2: 1, 4: 2, 8: 4}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_NO_INTERLEAVE = _ZEROS_OUTSIDE = 0
INVALID_CONTEXT = 201  # of a thread that has none yet
_FETCH_LINES = 2  # L2 fetches 128 bytes where less is wanted

Words = Any  # ctypes.c_uint64 * n


@functools.cache
def _encode_tiled() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


def encoded(maps: Sequence[TensorMap], addresses: Sequence[int], make_current: Callable[[], None]) -> Words:
    """The maps as a kernel takes them, one after the other, each of the tensor at its address.

    make_current: gives this thread the device's context, where it has none: threads of the backward pass begin so.

    Raises:
        DepthwiseError: the driver refuses one.
    """
    found = (ctypes.c_uint64 * (_WORDS * len(maps)))()
    room = (ctypes.c_uint8 * (BYTES + _ALIGNMENT))()
    aligned = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    for number, (given, address) in enumerate(zip(maps, addresses, strict=True)):
        rank = len(given.sizes)
        arguments = (
            ctypes.c_void_p(aligned),
            _UNSIGNED[given.element_bytes],
            ctypes.c_uint32(rank),
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*given.sizes),
            (ctypes.c_uint64 * (rank - 1))(*given.strides),
            (ctypes.c_uint32 * rank)(*given.box),
            (ctypes.c_uint32 * rank)(*(1,) * rank),
            _NO_INTERLEAVE,
            _SWIZZLES[given.swizzle],
            _FETCH_LINES,
            _ZEROS_OUTSIDE,
        )
        status = _encode_tiled()(*arguments)
        if status == INVALID_CONTEXT:
            make_current()
            status = _encode_tiled()(*arguments)
        if status:
            raise DepthwiseError(f"the driver refuses a map of a tensor (CUDA error {status}): {given}")
        ctypes.memmove(ctypes.addressof(found) + number * BYTES, aligned, BYTES)
    return found


def emulated(maps: Sequence[TensorMap], addresses: Sequence[int]) -> Words:
    """The same for the emulator, whose kernels read the maps' fields themselves (kernels/tensor_copies.cuh)."""
    words: list[int] = []
    for given, address in zip(maps, addresses, strict=True):
        fields = (
            address,
            *given.sizes,
            *given.strides,
            *given.box,
            given.element_bytes,
            given.swizzle,
        )
        words += [*fields, *(0,) * (_WORDS - len(fields))]
    return (ctypes.c_uint64 * len(words))(*words)
