"""How far problems and tiles reach: what variants that cut images into strips of rows and columns share."""

from __future__ import annotations

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
