"""one_tap_per_block: the gradients of filters and bias, a block for each sum; takes what no other variant does."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..device import DeviceSpec
from ..plan import Plan, Rejection, problem_constants, problem_sizes
from ..problem import DTYPE_BYTES, DepthwiseProblem
from .base import Variant, tap_by_tap_seconds

THREADS = 256


class OneTapPerBlock(Variant):
    stem = "one_tap_per_block"
    directions = ("grad_weight",)
    dims = (2, 3)
    layouts = ("channels_first", "channels_last")
    technique = "each block makes one sum: its threads read all factors of it, from the L2 cache where they fit"

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        sums = problem.taps + problem.bias
        yield Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted((problem_constants(problem) | {"THREADS": THREADS}).items())),
            grid=(problem.out_channels * sums, 1, 1),
            block=(THREADS, 1, 1),
            shared_bytes=THREADS * DTYPE_BYTES["float64"],  # of its sums
            sizes=problem_sizes(problem),
            tiling=(problem.batch,),
            tile="1 sum a block",
            predicted_seconds=tap_by_tap_seconds(
                problem, device, math.prod(problem.y_shape), instructions_before=0, per_tap=60
            ),
        )
