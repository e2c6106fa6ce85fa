"""Plans with kernels that were compiled beforehand: files of them, and their times beside each other on one GPU."""

from __future__ import annotations

import lzma
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwconv.bench.baselines import empty_result, make_tensors, variant_contender
from dwconv.bench.run import check, expect
from dwconv.bench.timing import Timing, copy_contender, measure
from dwconv.compile import CompiledKernel, remember
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem

COPY = "copy"
LIMIT_SECONDS = 60


def write(path: Path, found: list[Any]) -> None:
    path.write_bytes(lzma.compress(pickle.dumps(found), preset=1))


def read(path: Path) -> list[Any]:
    """What `write` wrote: code of this project's making, since a pickle may run whatever it likes."""
    found: list[Any] = pickle.loads(lzma.decompress(path.read_bytes()))
    return found


def time_plans(
    problem: DepthwiseProblem, plans: Mapping[str, tuple[Plan, CompiledKernel]], rounds: int
) -> dict[str, Timing]:
    """Times of a problem's plans, by their labels, and of a copy of as many bytes, COPY. Says, and leaves out, what
    gives a wrong result.
    """
    tensors = make_tensors(problem, "cuda")
    expected, y = expect(problem, tensors), empty_result(problem, "cuda")
    contenders = {COPY: copy_contender(problem.least_bytes, "cuda")}
    for label, (plan, kernel) in plans.items():
        remember(plan, kernel)
        contender = variant_contender(plan, tensors, y)
        checked = check(problem, tensors, contender, expected)
        if checked is not None and checked[1] > 1:
            print(f"  wrong, {checked[1]:.3g} times its bound: {label}: {plan.variant}: {plan.tile}")
            continue
        contenders[label] = contender.run
    return measure(contenders, rounds=rounds, limit_seconds=LIMIT_SECONDS)
