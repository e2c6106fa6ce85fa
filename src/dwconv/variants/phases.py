"""Phases of a strided convolution's gradient: what variants that make several elements of dx from a place of g share.

Along a dimension, dx[t*S + r] is a sum over g[t + offset] with the taps whose remainder is r (kernels/phases.cuh).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..device import DeviceSpec
from ..plan import problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
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


def norm_seconds(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    written: float,
    blocks: int,
    threads: int,
    registers: int,
    shared_bytes: int,
    *busy: float,
) -> float:
    """Predicted time: a norm of DRAM, L2, what else is busy, and rounds of blocks that wait for memory. Not fitted yet.

    written: sectors that stores touch, over those that dx has.
    """
    outputs = math.prod(problem.x_shape) * problem.element_bytes
    dram = device.dram_gbs * 1e9
    l2 = (1.25 * (problem.least_bytes - outputs) + outputs * written) / (1.2 * dram)
    resident = min(device.threads // threads, device.registers // (up(registers, 8) * threads))
    resident = max(1, min(resident, device.shared_bytes // (shared_bytes + 1024)))
    rounds = blocks / (device.multiprocessors * resident)
    waits = 1.5e-9 * device.latency_ns * rounds
    times = (problem.least_bytes / dram, l2, waits, *busy)
    return 2 * LAUNCH_SECONDS + math.pow(sum(time**4 for time in times), 1 / 4) + 0.5 * waits / max(1.0, rounds)
