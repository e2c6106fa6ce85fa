"""The classes that a benchmark's figures are averaged in, and what each should attain."""

from __future__ import annotations

from ..problem import DepthwiseProblem, Direction

ALL = "all"

# What every case of a class should attain, and all of a direction in the geometric mean.
_FORWARD: dict[str, float | None] = {
    "filters up to 5×5, 64 MB or more": 0.90,
    "7×7, float32": 0.80,
    "7×7, 16 bits": 0.70,
    "13×13 to 51×51": 0.70,
    "1-D, 4 to 31 taps": 0.85,
    "1-D, more taps": None,
    "3-D": 0.70,
    "filters up to 5×5, less than 64 MB": 0.75,
}
_STRIDED: dict[str, float | None] = {"stride 2, 64 MB or more": 0.80, "stride 2, less than 64 MB": 0.65}
_GRAD_WEIGHT: dict[str, float | None] = {
    **dict.fromkeys(_FORWARD, 0.65),
    "filters up to 5×5, 64 MB or more": 0.85,
    "13×13 to 51×51": 0.55,
}


def class_name(direction: Direction, name: str) -> str:
    """A class of a direction, as reports name it."""
    return name if direction == "forward" else f"{direction}: {name}"


_DIRECTIONS: tuple[tuple[Direction, dict[str, float | None]], ...] = (
    ("forward", _FORWARD | {ALL: 0.82}),
    ("grad_input", _FORWARD | _STRIDED | {ALL: 0.78}),
    ("grad_weight", _GRAD_WEIGHT | {ALL: 0.70}),
)
TARGETS = {
    class_name(direction, name): target for direction, targets in _DIRECTIONS for name, target in targets.items()
}


def problem_class(problem: DepthwiseProblem) -> str:
    """The class a problem's figures are averaged in, one of TARGETS: by what limits it, so that a mean hides nothing.

    >>> problem_class(DepthwiseProblem(16, 64, (512, 512), (3, 3)))
    'filters up to 5×5, 64 MB or more'
    """
    return class_name(problem.direction, _class_in_direction(problem))


def _class_in_direction(problem: DepthwiseProblem) -> str:
    if problem.direction == "grad_input" and max(problem.stride) > 1:
        return "stride 2, " + ("64 MB or more" if problem.least_bytes >= 64e6 else "less than 64 MB")
    if problem.dims == 3:
        return "3-D"
    if problem.dims == 1:
        return "1-D, 4 to 31 taps" if problem.taps <= 31 else "1-D, more taps"
    if problem.taps > 121:
        return "13×13 to 51×51"
    if problem.taps > 25:
        return "7×7, 16 bits" if problem.element_bytes == 2 else "7×7, float32"
    return "filters up to 5×5, " + ("64 MB or more" if problem.least_bytes >= 64e6 else "less than 64 MB")
