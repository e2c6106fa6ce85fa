"""one_input_per_thread: the gradient of x, a thread per element; takes what no other variant does."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from .base import GRID_X_LIMIT, Variant, tap_by_tap_seconds

THREADS = 256


class OneInputPerThread(Variant):
    stem = "one_input_per_thread"
    directions = ("grad_input",)
    dims = (2, 3)
    layouts = ("channels_first", "channels_last")
    technique = "each thread makes one element of x's gradient and reads every factor of it from the L1 cache"

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        elements = math.prod(problem.x_shape)
        blocks = min(GRID_X_LIMIT, max(1, -(-elements // THREADS)))
        yield Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted((problem_constants(problem) | {"THREADS": THREADS}).items())),
            grid=(blocks, 1, 1),
            block=(THREADS, 1, 1),
            shared_bytes=0,
            sizes=problem_sizes(problem),
            tiling=(blocks,),
            tile="1 element a thread",
            # the divisions of one_per_thread, and one by the stride for each tap
            predicted_seconds=tap_by_tap_seconds(
                problem, device, elements * problem.multiplier, instructions_before=120, per_tap=16
            ),
        )
