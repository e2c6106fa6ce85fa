"""The result that every kernel is measured against: the definition in float64, and how far rounding may lead from it.

Nothing here uses the kernels, or PyTorch's convolution. Activations are PyTorch's, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import DepthwiseProblem


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation in float64, and how far a kernel's may be from it.

    Attributes:
        exact: as PyTorch defines it, for Inf and NaN too.
        slope: the largest |derivative|, rounded up: an error of the sum grows by no more.
        roundings: error of its own, in roundings u of max(|sum|, |activated|). A multiplication, addition, division
            or constant is 1 of its result, CUDA's exp 2 (1 ulp), erfc 8 (4 ulp). Where the error of an argument is
            magnified (exp and erfc far out), the result is small: |a| exp(-|a|) < 0.37, and |a| exp(-a²) < 0.43.
    """

    exact: Callable[[Tensor], Tensor]
    slope: float
    roundings: int


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, 1.0, 0),
    "relu6": Activation(F.relu6, 1.0, 0),
    "silu": Activation(F.silu, 1.1, 4),
    "gelu": Activation(F.gelu, 1.13, 12),
    "gelu_tanh": Activation(lambda v: F.gelu(v, approximate="tanh"), 1.13, 8),
    # not F.hardswish: on CUDA it multiplies by a sixth that is rounded to float32, also in float64
    "hardswish": Activation(lambda v: v * (v + 3).clamp(0, 6) / 6, 1.5, 4),
    "sigmoid": Activation(torch.sigmoid, 0.25, 4),
    "leaky_relu": Activation(lambda v: F.leaky_relu(v, 0.01), 1.0, 2),
}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    problem: DepthwiseProblem,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The exact result, and the bound that a kernel which sums in float32 (float64 for float64) keeps.

        sum = b + sum of terms,   exact = scale * activation(sum) + shift + residual
        bound = 1.01 * (error + eps / 2 * |exact|) + tiny,   and without an epilogue error = n * u * magnitude

    with n = taps + 1, magnitude = |b| + sum of |terms|, u = 2^-24 (rounding of float32), eps that of the problem's
    dtype, and tiny what underflow may lose. The bound holds for any order of summation, with or without fused
    multiply-adds. Padding takes no part: it adds no term, not even zero times a weight, so that the result is not
    finite exactly where a window holds an Inf or NaN (or terms overflow).

    The error goes through the epilogue, and each step adds the rounding of its own result: the activation multiplies
    it by at most its slope and adds `Activation.roundings`; the scale multiplies it by |scale| and adds one rounding
    of |scale * activated|; shift and residual add one rounding each of all that has been summed, in absolute value.

    Args:
        x: [N, C, *size], any strides, any device.
        weight: [C*m, 1, *filter]; bias: [C*m] or None.
        problem: gives stride, padding (also uneven), dilation, multiplier, dtype and activation.
        scale, shift: [C*m] or None; residual: [N, C*m, *out_size] or None.

    Returns:
        exact and bound, [N, C*m, *out_size] float64.

    >>> problem = DepthwiseProblem(batch=1, channels=1, size=(4,), filter=(3,))
    >>> exact, bound = forward(torch.arange(4.0).view(1, 1, 4), torch.ones(1, 1, 3), None, problem)
    >>> exact.tolist(), bool((bound < 1e-5).all())
    ([[[3.0, 6.0]]], True)
    """
    grouped = (problem.batch, problem.channels, problem.multiplier, *problem.out_size)
    exact = torch.zeros(grouped, dtype=torch.float64, device=x.device)
    magnitude = torch.zeros_like(exact)
    images = x.double().unsqueeze(2)
    taps = weight.double().view(problem.channels, problem.multiplier, *problem.filter)
    for tap in itertools.product(*map(range, problem.filter)):
        outputs, inputs = _reached(problem, tap)
        if outputs is None:
            continue
        index = tuple(slice(u, u + 1) for u in tap)
        term = images[_last(inputs)] * taps[_last(index)]
        exact[_last(outputs)] += term
        magnitude[_last(outputs)] += term.abs_()
    if bias is not None:
        added = bias.double().view(1, problem.channels, problem.multiplier, *(1,) * problem.dims)
        exact += added
        magnitude += added.abs()
    total = exact.view(problem.y_shape)
    unit, tiny = _rounding(problem)
    error = (problem.taps + 1) * unit * magnitude.view(problem.y_shape)
    epilogue = problem.epilogue
    if epilogue.activation is not None:
        total, error, tiny = _activated(ACTIVATIONS[epilogue.activation], total, error, unit, tiny)

    def per_channel(values: Tensor) -> Tensor:
        return values.double().view(1, -1, *(1,) * problem.dims)

    # What is added is rounded as a whole: |total| so far.
    added = total.abs()
    if scale is not None:
        total = total * per_channel(scale)
        error = error * per_channel(scale).abs() + unit * total.abs()
        tiny = tiny * max(1.0, float(scale.double().abs().max()))
        added = total.abs()
    for summand in (None if shift is None else per_channel(shift), None if residual is None else residual.double()):
        if summand is not None:
            total = total + summand
            added = added + summand.abs()
            error = error + unit * added
    result = torch.finfo(getattr(torch, problem.dtype))
    tiny += result.smallest_normal * result.eps
    return total, 1.01 * (error + result.eps / 2 * total.abs()) + tiny


def input_gradient(grad: Tensor, weight: Tensor, problem: DepthwiseProblem) -> tuple[Tensor, Tensor]:
    """The exact gradient of x, and the bound of a kernel that sums in float32 (float64 for float64).

    As `forward`: the terms of dx[n, c, q] are all w[c*m + j, 0, u] * g[n, c*m + j, p] whose product with x[n, c, q] is
    part of y; at most taps * m of them.

    Args:
        grad: the gradient of y, [N, C*m, *out_size]; weight: [C*m, 1, *filter].

    Returns:
        exact and bound, [N, C, *size] float64.

    >>> problem = DepthwiseProblem(batch=1, channels=1, size=(4,), filter=(2,), stride=(2,), direction="grad_input")
    >>> input_gradient(torch.tensor([[[1.0, 10.0]]]), torch.tensor([[[2.0, 3.0]]]), problem)[0].tolist()
    [[[2.0, 3.0, 20.0, 30.0]]]
    """
    exact = torch.zeros(problem.x_shape, dtype=torch.float64, device=grad.device)
    magnitude = torch.zeros_like(exact)
    grads = grad.double().reshape(problem.batch, problem.channels, problem.multiplier, *problem.out_size)
    taps = weight.double().view(problem.channels, problem.multiplier, *problem.filter)
    for tap in itertools.product(*map(range, problem.filter)):
        outputs, inputs = _reached(problem, tap)
        if outputs is None:
            continue
        index = tuple(slice(u, u + 1) for u in tap)
        terms = grads[_last(outputs)] * taps[_last(index)]
        exact[_last(inputs)] += terms.sum(2)
        magnitude[_last(inputs)] += terms.abs_().sum(2)
    return exact, _bound(problem, exact, magnitude, problem.taps * problem.multiplier)


def filter_gradient(x: Tensor, grad: Tensor, problem: DepthwiseProblem) -> tuple[Tensor, Tensor]:
    """The exact gradients of each filter's taps and of its bias, and the bound of a kernel that sums in float32
    (float64 for float64) in any order: as `forward`, for as many terms as a tap meets in all images.

    Args:
        x: [N, C, *size]; grad: the gradient of y, [N, C*m, *out_size].

    Returns:
        exact and bound, [C*m, taps + 1] float64: those of the taps, then that of the bias.

    >>> problem = DepthwiseProblem(batch=1, channels=1, size=(3,), filter=(2,), direction="grad_weight")
    >>> filter_gradient(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 10.0]]]), problem)[0].tolist()
    [[21.0, 32.0, 11.0]]
    """
    exact = torch.zeros((problem.channels, problem.multiplier, problem.taps + 1), dtype=torch.float64, device=x.device)
    magnitude = torch.zeros_like(exact)
    images = x.double().unsqueeze(2)
    grads = grad.double().reshape(problem.batch, problem.channels, problem.multiplier, *problem.out_size)
    over = (0, *range(3, grads.dim()))
    for number, tap in enumerate(itertools.product(*map(range, problem.filter))):
        outputs, inputs = _reached(problem, tap)
        if outputs is None:
            continue
        terms = grads[_last(outputs)] * images[_last(inputs)]
        exact[..., number] = terms.sum(over)
        magnitude[..., number] = terms.abs_().sum(over)
    exact[..., -1] = grads.sum(over)
    magnitude[..., -1] = grads.abs().sum(over)
    exact, magnitude = exact.flatten(0, 1), magnitude.flatten(0, 1)
    return exact, _bound(problem, exact, magnitude, problem.batch * math.prod(problem.out_size))


def mismatch(y: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """Where a result breaks the bound, as a mask. NaN matches NaN only, an Inf only the same Inf.

    >>> inf, nan = math.inf, math.nan
    >>> exact = torch.tensor([1.0, inf, nan, 1.0], dtype=torch.float64)
    >>> mismatch(torch.tensor([1.0, inf, nan, nan]), exact, torch.full((4,), 1e-6)).tolist()
    [False, False, False, True]
    """
    y = y.double()
    close = (y - exact).abs() <= bound
    return ~torch.where(exact.isfinite(), close, (y == exact) | (y.isnan() & exact.isnan()))


def describe_mismatch(y: Tensor, exact: Tensor, bound: Tensor) -> str | None:
    """What is wrong with a result, in a sentence that names the worst output; None where it keeps the bound.

    >>> one = torch.ones(2, dtype=torch.float64)
    >>> describe_mismatch(torch.tensor([1.0, 1.5]), one, one * 0.25)
    '1 of 2 outputs are wrong; the worst, at (1,), is 1.5 instead of 1, 2 times the bound'
    """
    if y.shape != exact.shape:
        return f"the result has shape {tuple(y.shape)} instead of {tuple(exact.shape)}"
    wrong = mismatch(y, exact, bound)
    count = int(wrong.sum())
    if count == 0:
        return None
    excess = torch.where(wrong, ((y.double() - exact).abs() / bound).nan_to_num(math.inf, math.inf), 0.0)
    flat = int(excess.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), y.shape))
    times = float(excess.flatten()[flat])
    size = f"{times:.3g} times the bound" if math.isfinite(times) else "which no rounding explains"
    got, wanted = y.flatten()[flat].item(), exact.flatten()[flat].item()
    return (
        f"{count} of {y.numel()} outputs are wrong; the worst, at {place}, is {got:.9g} instead of {wanted:.9g}, {size}"
    )


def _last(slices: tuple[slice, ...]) -> Any:
    """The index that takes these slices of the spatial dimensions."""
    return (..., *slices)


def _reached(problem: DepthwiseProblem, tap: tuple[int, ...]) -> tuple[tuple[slice, ...] | None, tuple[slice, ...]]:
    """The outputs whose window has this tap inside x, and the inputs that it meets there; None if there are none."""
    outputs, inputs = [], []
    for size, out, stride, (before, _), dilation, u in zip(
        problem.size, problem.out_size, problem.stride, problem.padding, problem.dilation, tap, strict=True
    ):
        offset = u * dilation - before  # output p meets input p * stride + offset
        first = max(0, -(offset // stride))
        last = min(out - 1, (size - 1 - offset) // stride)
        if first > last:
            return None, ()
        outputs.append(slice(first, last + 1))
        inputs.append(slice(first * stride + offset, last * stride + offset + 1, stride))
    return tuple(outputs), tuple(inputs)


def _rounding(problem: DepthwiseProblem) -> tuple[float, float]:
    """The relative error of one operation of a kernel, and what underflow may take from its sums."""
    if problem.dtype == "float64":  # the reference rounds as much as the kernel does
        unit, summed = 2 * 2.0**-53, torch.finfo(torch.float64)
    else:
        unit, summed = 2.0**-24, torch.finfo(torch.float32)
    return unit, (problem.taps + 1) * summed.smallest_normal * summed.eps


def _bound(problem: DepthwiseProblem, exact: Tensor, magnitude: Tensor, terms: int) -> Tensor:
    """1.01 * ((terms + 1) * u * magnitude + eps / 2 * |exact|) + tiny, as `forward` explains it."""
    unit, tiny = _rounding(problem)
    result = torch.finfo(getattr(torch, problem.dtype))
    tiny = tiny * (terms + 1) / (problem.taps + 1) + result.smallest_normal * result.eps
    return 1.01 * ((terms + 1) * unit * magnitude + result.eps / 2 * exact.abs()) + tiny


def _activated(
    activation: Activation, total: Tensor, error: Tensor, unit: float, tiny: float
) -> tuple[Tensor, Tensor, float]:
    """The sum, its error and what underflow takes, after the activation."""
    activated = activation.exact(total)
    own = activation.roundings * unit * torch.maximum(total.abs(), activated.abs())
    # A sum that isn't finite has no error, also where the activation is finite again: relu(-inf) = 0.
    error = torch.where(total.isfinite(), activation.slope * error + own, 0.0)
    # Where exp overflows, 1 / exp is 0 instead of at most |sum| / the largest number: |sum| < 800 there.
    summed = torch.finfo(torch.float64 if unit < 2.0**-50 else torch.float32)
    return activated, error, activation.slope * tiny + 1024 * summed.smallest_normal
