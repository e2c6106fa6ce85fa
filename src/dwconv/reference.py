"""The result that every kernel is measured against: the definition in float64, and how far rounding may lead from it.

Nothing here uses the kernels, or PyTorch's convolution.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .problem import DepthwiseProblem


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, problem: DepthwiseProblem) -> tuple[Tensor, Tensor]:
    """The exact result, and the bound that a kernel which sums in float32 (float64 for float64) keeps.

        exact = b + sum of terms,   bound = 1.01 * (n * u * magnitude + eps / 2 * |exact|) + tiny

    with n = taps + 1, magnitude = |b| + sum of |terms|, u = 2^-24 (rounding of float32), eps that of the problem's
    dtype, and tiny what underflow may lose. The bound holds for any order of summation, with or without fused
    multiply-adds. Padding takes no part: it adds no term, not even zero times a weight, so that the result is not
    finite exactly where a window holds an Inf or NaN (or terms overflow).

    Args:
        x: [N, C, *size], any strides, any device.
        weight: [C*m, 1, *filter]; bias: [C*m] or None.
        problem: gives stride, padding (also uneven), dilation, multiplier and dtype.

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
    exact = exact.view(problem.y_shape)
    return exact, _bound(exact, magnitude.view(problem.y_shape), problem.taps + 1, problem.dtype)


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


def _bound(exact: Tensor, magnitude: Tensor, n: int, dtype: str) -> Tensor:
    result = torch.finfo(getattr(torch, dtype))
    if dtype == "float64":  # the reference rounds as much as the kernel does
        rounding, summed = 2 * 2.0**-53, torch.finfo(torch.float64)
    else:
        rounding, summed = 2.0**-24, torch.finfo(torch.float32)
    tiny = n * summed.smallest_normal * summed.eps + result.smallest_normal * result.eps
    return 1.01 * (n * rounding * magnitude + result.eps / 2 * exact.abs()) + tiny
