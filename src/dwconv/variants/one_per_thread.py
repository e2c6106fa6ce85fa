"""one_per_thread: a thread per output, by linear index; the baseline that people write first."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from .base import GRID_X_LIMIT, Variant, tap_by_tap_seconds

THREADS = 256


class OnePerThread(Variant):
    stem = "one_per_thread"
    dims = (2, 3)
    layouts = ("channels_first", "channels_last")
    technique = "each thread makes one output and reads every input of its window from the L1 cache"

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        outputs = math.prod(problem.y_shape)
        blocks = min(GRID_X_LIMIT, max(1, -(-outputs // THREADS)))
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
            tile="1 output a thread",
            # 64-bit divisions by sizes unknown to the compiler: about 120 instructions before the first load
            predicted_seconds=tap_by_tap_seconds(problem, device, outputs, instructions_before=120),
        )
