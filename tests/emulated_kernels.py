"""Kernels of a few lines for tests of the emulator: written in CUDA C++, run on torch tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dwconv.emulator import build, launch

_TYPES = {torch.float32: "float", torch.float64: "double", torch.int32: "int", torch.int64: "long long"}


def run_kernel(
    body: str,
    *buffers: Tensor,
    grid: int | tuple[int, int, int] = 1,
    block: int | tuple[int, int, int] = 32,
    shared_bytes: int = 0,
    order_seed: int | None = None,
    before: str = "",
) -> None:
    """Runs `body` once per thread. It sees the buffers as pointers a, b, c, ... and `t`, the thread's index in x.

    Args:
        body: the statements of the kernel; its first line is line 1 in messages.
        before: declarations in front of it.
    """
    parameters = ", ".join(f"{_TYPES[buffer.dtype]}* {chr(97 + i)}" for i, buffer in enumerate(buffers))
    text = (
        f'{before}\nextern "C" __global__ void dwconv_kernel({parameters}) {{\n'
        f'const int t = threadIdx.x; (void)t;\n#line 1 "kernel"\n{body.strip()}\n}}\n'
    )
    launch.launch_kernel(
        build.load(text, (), "a test's kernel"),
        (grid, 1, 1) if isinstance(grid, int) else grid,
        (block, 1, 1) if isinstance(block, int) else block,
        shared_bytes,
        [ctypes.c_void_p(buffer.data_ptr()) for buffer in buffers],
        order_seed=order_seed,
    )
