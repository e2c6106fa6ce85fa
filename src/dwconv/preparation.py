"""Loads kernels before they are needed: a CUDA graph can't be captured while one is compiled or loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from . import emulator, ops
from .choose import choose
from .compile import compile_many
from .device import preset
from .errors import DepthwiseError
from .launch import device_spec
from .problem import DepthwiseProblem


def prepare(module: nn.Module, *inputs: Any, **keywords: Any) -> int:
    """Compiles and loads every kernel that a module launches for inputs like these, forward and backward.

    Nothing is computed: the module runs on tensors without data (torch's fake tensors), so its parameters, its
    statistics and the random numbers stay as they are. Afterwards a training step with tensors of these shapes, dtypes
    and memory formats can be captured as a CUDA graph, and its first call waits for no compiler. Gradients are
    prepared for inputs and parameters that require them. Under `torch.autocast` call it there, too.

    Args:
        module: any module with dwconv's layers, or that calls its functions.
        inputs, keywords: what it will be called with.

    Returns:
        How many different problems its kernels solve: for each layer's shape one forward, one for each gradient.

    Raises:
        DepthwiseError: the module's output holds no tensor, or a layer gets what no kernel takes.

    >>> import torch, dwconv
    >>> layer = dwconv.Conv2d(4, 4, 3, padding=1, groups=4)
    >>> with dwconv.emulated():  # without it, layers on the CPU run PyTorch's convolution: nothing to prepare
    ...     dwconv.prepare(layer, torch.randn(2, 4, 8, 8))
    2
    """
    watched: list[tuple[DepthwiseProblem, int]] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, ops.watching(watched):

        def without_data(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        outputs = functional_call(module, tree_map(without_data, state), *tree_map(without_data, (inputs, keywords)))
        tensors = [output for output in tree_flatten(outputs)[0] if isinstance(output, Tensor)]
        if not tensors:
            raise DepthwiseError("the module returns no tensor: prepare a module whose forward returns some")
        results = [tensor for tensor in tensors if tensor.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    problems = list(dict.fromkeys(watched))
    emulation = emulator.active()
    on_gpu = [(problem, index) for problem, index in problems if index >= 0]
    compile_many(choose(problem, device_spec(index)) for problem, index in on_gpu)
    for problem, index in on_gpu:
        ops.prepared(problem, index)
    if emulation is not None:
        plans = (choose(p, preset(emulation.arch), emulation.variant_for(p)) for p, index in problems if index < 0)
        emulator.build_many(plans)
    return len(problems)
