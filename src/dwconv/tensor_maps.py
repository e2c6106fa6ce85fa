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


def encoder(maps: Sequence[TensorMap], make_current: Callable[[], None]) -> Callable[..., Words]:
    """A function of the tensors' addresses that gives the maps as a kernel takes them, one after the other.

    What doesn't change from call to call is packed here, once: two maps take 3 µs, not 8 (without the driver's part).

    make_current: gives this thread the device's context, where it has none: threads of the backward pass begin so.

    Raises:
        DepthwiseError: when it is called: the driver refuses a map.
    """
    encode, words = _encode_tiled(), ctypes.c_uint64 * (_WORDS * len(maps))
    room_type = ctypes.c_uint8 * (BYTES * len(maps) + _ALIGNMENT)
    fixed = [_arguments(given) for given in maps]

    def encoded(*addresses: int) -> Words:
        room = room_type()
        found = words.from_buffer(room, -ctypes.addressof(room) % _ALIGNMENT)
        into = ctypes.addressof(found)
        for number, (before, after) in enumerate(fixed):
            arguments = ctypes.c_void_p(into), *before, ctypes.c_void_p(addresses[number]), *after
            status = encode(*arguments)
            if status == INVALID_CONTEXT:
                make_current()
                status = encode(*arguments)
            if status:
                raise DepthwiseError(f"the driver refuses a map of a tensor (CUDA error {status}): {maps[number]}")
            into += BYTES
        return found

    return encoded


def _arguments(given: TensorMap) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the driver is told of a map before the tensor's address, and behind it."""
    rank = len(given.sizes)
    return (_UNSIGNED[given.element_bytes], ctypes.c_uint32(rank)), (
        (ctypes.c_uint64 * rank)(*given.sizes),
        (ctypes.c_uint64 * (rank - 1))(*given.strides),
        (ctypes.c_uint32 * rank)(*given.box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        _NO_INTERLEAVE,
        _SWIZZLES[given.swizzle],
        _FETCH_LINES,
        _ZEROS_OUTSIDE,
    )


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
