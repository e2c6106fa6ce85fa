"""How far problems and tiles reach: what variants that cut images into strips of rows and columns share."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from ..problem import DepthwiseProblem


def divided(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def up(a: int, multiple: int, remainder: int = 0) -> int:
    """The least number from a on that is `remainder` modulo `multiple`.

    >>> up(9, 8), up(9, 8, 2)
    (16, 10)
    """
    return a + (remainder - a) % multiple


def widest(limit: int, *multiples: int) -> int:
    """The largest power of two, at most `limit`, that divides all of these."""
    width = 1
    while width * 2 <= limit and all(number % (width * 2) == 0 for number in multiples):
        width *= 2
    return width


def short_divisor(divisor: int) -> tuple[int, int]:
    """The fields of `dwconv::ShortDivisor`: divisor, and multiplier = 2**31 / divisor, rounded up.

    Exact for n < 2**16 and divisors below 2**15: the quotient is off by less than n * divisor / 2**31.

    >>> divisor, multiplier = short_divisor(7)
    >>> all(2 * n * multiplier >> 32 == n // 7 for n in range(2**16))
    True
    """
    return divisor, divided(2**31, divisor)


def window_rows(problem: DepthwiseProblem, rows: int) -> int:
    """Input rows that `rows` neighbouring output rows reach over."""
    return (rows - 1) * problem.stride[0] + (problem.filter[0] - 1) * problem.dilation[0] + 1


def window_columns(problem: DepthwiseProblem, columns: int) -> int:
    """Input columns that `columns` neighbouring output columns reach over."""
    return (columns - 1) * problem.stride[1] + (problem.filter[1] - 1) * problem.dilation[1] + 1


def too_long(problem: DepthwiseProblem) -> str | None:
    """Why rows and columns can't be numbered in 31 bits, with room for the last strip to reach past them."""
    longest = max(*problem.size, *problem.out_size) + max(problem.padding[0] + problem.padding[1])
    if longest < 2**31 - 2**16:
        return None
    return f"a padded row or column of {longest} elements is too long to be numbered in 31 bits"


@lru_cache(maxsize=1024)
def reached(taps: int, apart: int, size: int, stride: int, before: int, outputs: int) -> float:
    """The share of pairs of outputs and taps of one dimension that meet an input; `before`: the padding.

    >>> reached(13, 1, 7, 1, 6, 7)
    0.5384615384615384
    """
    inside = 0
    for tap in range(taps):
        first = max(0, -((tap * apart - before) // stride))
        last = (size - 1 + before - tap * apart) // stride
        inside += max(0, min(outputs - 1, last) - first + 1)
    return inside / (taps * outputs)


def planar(problem: DepthwiseProblem) -> DepthwiseProblem:
    """The gradients of filters of two dimensions that one tap of a volume's depth is: output planes are the images.

    The stride of images is the greatest that those of x's planes are multiples of.

    >>> planar(DepthwiseProblem(2, 8, (4, 6, 6), (3, 3, 3), direction="grad_weight")).x_shape
    (4, 8, 6, 6)
    """
    if problem.dims < 3:
        return problem
    image, channel, depth, row, column = problem.plane_strides
    apart = math.gcd(image if problem.batch > 1 else 0, depth if problem.size[0] > 1 else 0)
    return replace(
        problem,
        batch=problem.batch * problem.out_size[0],
        size=problem.size[1:],
        filter=problem.filter[1:],
        stride=problem.stride[1:],
        padding=problem.padding[1:],
        dilation=problem.dilation[1:],
        x_strides=(apart, channel, row, column),
    )


def depth_taps(problem: DepthwiseProblem) -> int:
    """Taps of the depth, each of which is a planar problem."""
    return problem.filter[0] if problem.dims == 3 else 1


def too_deep(problem: DepthwiseProblem) -> str | None:
    """Why a volume's planes can't be numbered in 31 bits."""
    if problem.dims < 3:
        return None
    planes = max(1, problem.batch) * problem.out_size[0]
    longest = max(planes, problem.size[0] + sum(problem.padding[0]))
    return None if longest < 2**30 else f"{longest} planes of volumes are too many to be numbered in 31 bits"
