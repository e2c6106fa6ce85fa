"""How far problems and tiles reach: what variants that cut images into strips of rows and columns share."""

from __future__ import annotations

from ..problem import DepthwiseProblem


def window_rows(problem: DepthwiseProblem, rows: int) -> int:
    """Input rows that `rows` neighbouring output rows reach over."""
    return (rows - 1) * problem.stride[0] + (problem.filter[0] - 1) * problem.dilation[0] + 1


def too_long(problem: DepthwiseProblem) -> str | None:
    """Why rows and columns can't be numbered in 31 bits, with room for the last strip to reach past them."""
    longest = max(*problem.size, *problem.out_size) + max(problem.padding[0] + problem.padding[1])
    if longest < 2**31 - 2**16:
        return None
    return f"a padded row or column of {longest} elements is too long to be numbered in 31 bits"
