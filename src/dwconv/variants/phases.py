"""Phases of a strided convolution's gradient: what variants that make several elements of dx from a place of g share.

Along a dimension, dx[t*S + r] is a sum over g[t + offset] with the taps whose remainder is r (kernels/phases.cuh).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..device import DeviceSpec
from ..plan import problem_sizes
from ..problem import DepthwiseProblem
from .strips import divided, up

MAX_TAPS = 49  # taps of a filter that are unrolled
MAX_PRODUCTS = 6400  # of a thread, unrolled: NVRTC takes some ten seconds for so many


@dataclass(frozen=True, slots=True)
class Reach:
    """Twin of `Phases` in the kernel, for one dimension.

    Attributes:
        first, last: offsets of the first and last place of g that dx at t*S ... t*S + S-1 reads, from t.
        places: t that dx has.
    """

    first: int
    last: int
    places: int

    @classmethod
    def of(cls, problem: DepthwiseProblem, dimension: int) -> Reach:
        """
        >>> Reach.of(DepthwiseProblem(1, 1, (28, 14), (3, 5), (2, 2), ((1, 1), (2, 2)), direction="grad_input"), 0)
        Reach(first=0, last=1, places=14)
        """
        stride, before = problem.stride[dimension], problem.padding[dimension][0]
        farthest = (problem.filter[dimension] - 1) * problem.dilation[dimension]
        return cls(-((farthest - before) // stride), -(-before // stride), divided(problem.size[dimension], stride))

    @property
    def span(self) -> int:
        return self.last - self.first + 1


def reaches(problem: DepthwiseProblem) -> tuple[Reach, Reach]:
    """Of rows and of columns."""
    return Reach.of(problem, 0), Reach.of(problem, 1)


def g_size(problem: DepthwiseProblem) -> tuple[int, int]:
    """Rows and columns of g."""
    return problem.out_size[0], problem.out_size[1]


def g_strides(problem: DepthwiseProblem) -> tuple[int, ...]:
    """Strides of g: of images, channels, rows and columns."""
    image, channel, _, row, column = problem_sizes(problem)[-5:]
    return image, channel, row, column


def out_of_reach(problem: DepthwiseProblem) -> str | None:
    """Why no tile of these variants serves the problem."""
    if problem.as_forward() is not None:
        return "with a stride and a multiplier of 1, forward kernels with reversed filters compute it"
    if problem.taps > MAX_TAPS:
        return f"the filter's {problem.taps} taps are too many to be unrolled; {MAX_TAPS} are not"
    return None


def rounds(device: DeviceSpec, blocks: int, threads: int, registers: int, shared_bytes: int) -> float:
    """How many times a multiprocessor fills up with blocks."""
    resident = min(device.threads // threads, device.registers // (up(registers, 8) * threads))
    resident = max(1, min(resident, device.shared_bytes // (shared_bytes + 1024)))
    return blocks / (device.multiprocessors * resident)


def norm(power: float, *times: float) -> float:
    """Near the largest, and above it where others are nearly as large: what overlaps, but not completely.

    >>> round(norm(5, 3.0, 4.0), 2)
    4.17
    """
    return math.pow(sum(time**power for time in times), 1 / power)
