"""The contenders of a benchmark: PyTorch eager and compiled, dwconv, and each of its variants by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..choose import candidates
from ..compile import compile_plan
from ..device import DeviceSpec
from ..errors import DepthwiseError
from ..launch import launcher
from ..plan import Plan, Rejection
from ..problem import DepthwiseProblem
from ..variants import REGISTRY
from .results import COMPILE, EAGER, OURS, Missing

CONTENDERS = (EAGER, COMPILE, OURS, *REGISTRY)

_CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, slots=True)
class Tensors:
    """Inputs of a problem. `grad` is the gradient of y, for the backward directions."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    grad: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """Something to time.

    Attributes:
        run: launches the work on the current stream and returns the result.
        note: the plan in words, for dwconv's own.
        y: where the result goes, if it was allocated beforehand; a check poisons it first.
    """

    name: str
    run: Callable[[], torch.Tensor]
    note: str = ""
    y: torch.Tensor | None = None


def in_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor of the same values in this layout: [N, C, L] has a channel stride of 1 in channels_last."""
    if layout == "channels_first":
        return tensor.contiguous()
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous(memory_format=_MEMORY_FORMATS[tensor.dim()])


def make_tensors(problem: DepthwiseProblem, device: torch.device | str, seed: int = 0) -> Tensors:
    """Random inputs, uniform in 0 to 1 as KernelBench's are; the filter uniform in ±1/sqrt(taps), as nn.Conv2d's."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, problem.dtype)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        drawn = torch.empty(shape, dtype=dtype, device=device).uniform_(low, high, generator=generator)
        return in_layout(drawn, problem.layout) if len(shape) > 1 else drawn

    scale = problem.taps**-0.5
    weight = uniform(problem.weight_shape, -scale, scale)
    bias = uniform((problem.out_channels,), -scale, scale) if problem.bias else None
    grad = None if problem.direction == "forward" else uniform(problem.y_shape, -1, 1)
    return Tensors(uniform(problem.x_shape, 0, 1), weight, bias, grad)


def pytorch_convolution(problem: DepthwiseProblem) -> Callable[..., torch.Tensor]:
    """The problem as a PyTorch user writes it, a function of (x, weight, bias).

    Where more zeros stand before than after (causal filters), the convolution pads both sides and its result is
    cropped; where more stand after, x is padded first.
    """
    convolution = _CONVOLUTIONS[problem.dims]
    before = tuple(pad[0] for pad in problem.padding)
    arguments: dict[str, Any] = {"stride": problem.stride, "dilation": problem.dilation, "groups": problem.channels}
    if all(first == last for first, last in problem.padding):
        return lambda x, weight, bias: convolution(x, weight, bias, padding=before, **arguments)
    if all(first >= last for first, last in problem.padding):
        window = (slice(None), slice(None), *(slice(size) for size in problem.out_size))
        return lambda x, weight, bias: convolution(x, weight, bias, padding=before, **arguments)[window]
    pads = [pad for both in reversed(problem.padding) for pad in both]
    return lambda x, weight, bias: convolution(functional.pad(x, pads), weight, bias, **arguments)


def _eager(problem: DepthwiseProblem, tensors: Tensors) -> Callable[[], torch.Tensor]:
    if problem.direction == "forward":
        convolution = pytorch_convolution(problem)
        return lambda: convolution(tensors.x, tensors.weight, tensors.bias)
    of_x = problem.direction == "grad_input"
    if any(first != last for first, last in problem.padding):
        return _by_autograd(problem, tensors)
    mask = [of_x, not of_x, not of_x and problem.bias]
    padding = [pad[0] for pad in problem.padding]
    zeros = [0] * problem.dims
    groups = problem.channels

    def backward() -> torch.Tensor:
        gradients = torch.ops.aten.convolution_backward(
            tensors.grad, tensors.x, tensors.weight, [problem.out_channels], list(problem.stride), padding,
            list(problem.dilation), False, zeros, groups, mask,
        )  # fmt: skip
        found: torch.Tensor = gradients[mask.index(True)]
        return found

    return backward


def _by_autograd(problem: DepthwiseProblem, tensors: Tensors) -> Callable[[], torch.Tensor]:
    """The gradient through what a user writes where convolution takes no such padding."""
    leaf = (tensors.x if problem.direction == "grad_input" else tensors.weight).detach().requires_grad_()
    x, weight = (leaf, tensors.weight) if problem.direction == "grad_input" else (tensors.x, leaf)
    y = pytorch_convolution(problem)(x, weight, tensors.bias)
    return lambda: torch.autograd.grad(y, leaf, tensors.grad, retain_graph=True)[0]


def _compiled(problem: DepthwiseProblem, tensors: Tensors) -> Callable[[], torch.Tensor]:
    if problem.direction != "forward":
        raise DepthwiseError("torch.compile is timed in the forward direction only")
    torch._dynamo.reset()  # else the limit on recompilations is met after a few cases, and eager would be timed
    convolution = torch.compile(pytorch_convolution(problem), fullgraph=True, dynamic=False)
    return lambda: convolution(tensors.x, tensors.weight, tensors.bias)


def _ours(problem: DepthwiseProblem, tensors: Tensors) -> Callable[[], torch.Tensor]:
    from .. import functional as ours
    from ..gradient_ops import filter_gradient, input_gradient
    from ..tensors import Geometry

    if problem.direction != "forward":
        assert tensors.grad is not None
        grad, layout = tensors.grad, problem.layout
        geometry = Geometry(problem.stride, tuple(pad for pair in problem.padding for pad in pair), problem.dilation)
        if problem.direction == "grad_input":
            return lambda: input_gradient(grad, tensors.weight, problem.x_shape, geometry, layout)
        return lambda: filter_gradient(tensors.x, grad, problem.filter, geometry, problem.bias, layout)[0]
    convolution = {1: ours.conv1d, 2: ours.conv2d, 3: ours.conv3d}[problem.dims]
    sizes = (problem.stride, problem.padding, problem.dilation)
    return lambda: convolution(tensors.x, tensors.weight, tensors.bias, *sizes)


def best_plan(problem: DepthwiseProblem, device: DeviceSpec, variant: str | None = None) -> Plan:
    """The plan with the least predicted time; the reasons, if there is none, don't name the problem's sizes."""
    found = candidates(problem, device, variant)
    if found and isinstance(found[0], Plan):
        return found[0]
    reasons = dict.fromkeys(
        c.reason if variant else f"{c.variant} {c.reason}" for c in found if isinstance(c, Rejection)
    )
    raise DepthwiseError("; ".join(reasons))


def variant_contender(plan: Plan, tensors: Tensors, y: torch.Tensor) -> Contender:
    """A plan by itself, which writes into y."""
    launch_now = launcher(plan, compile_plan(plan), y.device.index)
    operands: list[torch.Tensor | None] = [tensors.x, tensors.weight, tensors.bias, y]
    if plan.problem.direction == "grad_input":
        operands = [tensors.grad, tensors.weight, None, y]
    elif plan.problem.direction == "grad_weight":
        bias = None if tensors.bias is None else torch.empty_like(tensors.bias)
        partial = y.new_empty(plan.partial_bytes, dtype=torch.uint8)
        operands = [tensors.x, tensors.grad, y, bias, partial, y.new_zeros(plan.arrivals, dtype=torch.int32)]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in operands]

    def run() -> torch.Tensor:
        launch_now(*addresses)
        return operands[3 if plan.problem.direction != "grad_weight" else 2]  # type: ignore[return-value]

    return Contender(plan.variant, run, plan.tile, y)


def empty_result(problem: DepthwiseProblem, device: torch.device | str) -> torch.Tensor:
    """Where a plan of the problem writes: y or x's gradient in the problem's layout, or the filters' gradient."""
    empty = torch.empty(problem.result_shape, dtype=getattr(torch, problem.dtype), device=device)
    return empty if problem.direction == "grad_weight" else in_layout(empty, problem.layout)


def contenders(
    problem: DepthwiseProblem, tensors: Tensors, names: Iterable[str], device: DeviceSpec
) -> Iterator[Contender | Missing]:
    """Each contender, ready to run, or why it can't. dwconv's variants share one result tensor."""
    y: torch.Tensor | None = None
    for name in names:
        try:
            if name == EAGER:
                yield Contender(EAGER, _eager(problem, tensors))
            elif name == COMPILE:
                yield Contender(COMPILE, _compiled(problem, tensors))
            elif name == OURS:
                run = _ours(problem, tensors)
                yield Contender(OURS, run, f"{(plan := best_plan(problem, device)).variant}: {plan.tile}")
            elif name in REGISTRY:
                plan = best_plan(problem, device, name)
                if y is None:
                    y = empty_result(problem, tensors.x.device)
                yield variant_contender(plan, tensors, y)
            else:
                raise DepthwiseError(f"contender={name!r} is unknown: use some of {', '.join(CONTENDERS)}")
        except DepthwiseError as error:
            yield Missing(name, str(error))
