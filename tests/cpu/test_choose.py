"""Plans: pure, complete, explained; few kernels serve many sizes; grids stay inside CUDA's limits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import dwconv.bench
from dwconv import DepthwiseError
from dwconv.choose import candidates, choose
from dwconv.device import H200, PRESETS, preset
from dwconv.plan import Plan, Rejection, fast_divisor
from dwconv.problem import DepthwiseProblem
from dwconv.variants import REGISTRY
from dwconv.variants.base import GRID_X_LIMIT, GRID_YZ_LIMIT
from problems import EDGE_PROBLEMS, problem_id

SUITES = Path(dwconv.bench.__file__).parent / "suites"


@pytest.mark.parametrize("problem", EDGE_PROBLEMS, ids=problem_id)
@pytest.mark.parametrize("variant", REGISTRY)
def test_every_problem_has_a_plan_inside_the_limits(problem: DepthwiseProblem, variant: str) -> None:
    for device in PRESETS.values():
        plan = choose(problem, device, variant)
        assert plan == choose(problem, device, variant), "a pure function of its arguments"
        assert plan.variant == variant
        assert 1 <= plan.grid[0] <= GRID_X_LIMIT
        assert all(1 <= size <= GRID_YZ_LIMIT for size in plan.grid[1:])
        assert plan.block[0] * plan.block[1] <= 1024
        assert all(0 <= field < 2**32 for field in plan.tiling)


@pytest.mark.parametrize("suite", ["kernelbench", "models"])
def test_every_float32_case_of_the_suites_prefers_a_fast_variant(suite: str) -> None:
    for case in json.loads((SUITES / f"{suite}.json").read_text())["cases"]:
        if len(case["kernel_size"]) != 2:
            continue
        problem = DepthwiseProblem(
            *case["input"][:2],
            size=tuple(case["input"][2:]),
            filter=tuple(case["kernel_size"]),
            stride=tuple(case["stride"]),
            padding=tuple((p, p) for p in case["padding"]),
            dilation=tuple(case["dilation"]),
            multiplier=case["multiplier"],
            bias=case["bias"],
        )
        wide = problem.taps > 25 or problem.dilation[0] > 4
        assert choose(problem, H200).variant == ("wide_nchw" if wide else "direct_nchw"), case["name"]


@pytest.mark.parametrize("taps", [(3, 3), (5, 5), (3, 7), (7, 7)], ids=str)
@pytest.mark.parametrize("same", [True, False], ids=["same", "valid"])
def test_a_hundred_image_sizes_compile_at_most_four_kernels(taps: tuple[int, int], same: bool) -> None:
    sizes = random.Random(0)
    padding = tuple((t // 2, t // 2) for t in taps) if same else ()
    kernels = set()
    for _ in range(100):
        size = (sizes.randint(32, 640), sizes.randint(32, 640))
        kernels.add(choose(DepthwiseProblem(8, 32, size, taps, padding=padding), H200).kernel_id)
    assert len(kernels) <= 4


def test_fast_division_is_exact() -> None:
    numbers = random.Random(1)
    for _ in range(2000):
        divisor = numbers.choice([numbers.randint(1, 100), numbers.randint(1, 2**31 - 1)])
        _, multiplier, shift = fast_divisor(divisor)
        assert multiplier < 2**32
        for n in (0, divisor - 1, divisor, 2**31 - 1, numbers.randint(0, 2**31 - 1), divisor * (2**31 // divisor) - 1):
            if 0 <= n < 2**31:
                assert n * multiplier >> shift == n // divisor


def test_rejections_say_why() -> None:
    wide = candidates(DepthwiseProblem(1, 4, (64, 64), (31, 31)), H200)
    reasons = [c.reason for c in wide if isinstance(c, Rejection)]
    assert reasons
    assert all(" " in reason for reason in reasons)
    assert isinstance(wide[0], Plan), "legal plans come first"


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (DepthwiseProblem(1, 4, (64,), (3,)), "takes two spatial dimensions"),
        (DepthwiseProblem(1, 4, (9, 9), (3, 3), dtype="float16"), "takes float32"),
        (DepthwiseProblem(1, 4, (9, 9), (3, 3), layout="channels_last"), "takes channels_first"),
        (DepthwiseProblem(1, 4, (9, 9), (3, 3), direction="grad_weight"), "computes forward only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problems_without_a_kernel_get_a_sentence(problem: DepthwiseProblem, reason: str) -> None:
    with pytest.raises(DepthwiseError, match=f"no kernel takes this problem .*{reason}"):
        choose(problem, H200)


def test_tensors_beyond_32_bits_have_plans() -> None:
    for problem in (
        DepthwiseProblem(1, 1, (70_000, 70_000), (3, 3)),
        DepthwiseProblem(70_000, 70_000, (1, 1), (1, 1)),
        DepthwiseProblem(1, 2, (3, 2**30), (3, 3), padding=((1, 1), (1, 1))),
        DepthwiseProblem(1, 1, (1, 2**31 + 9), (3, 3), padding=((1, 1), (1, 1))),
        DepthwiseProblem(1, 1, (2**31 - 1, 1), (1, 1)),
    ):
        plan = choose(problem, H200)
        assert plan.grid[0] <= GRID_X_LIMIT


def test_unknown_names() -> None:
    with pytest.raises(DepthwiseError, match=r"sm_42.*use one of sm_75"):
        preset("sm_42")
    with pytest.raises(DepthwiseError, match="variant='fft' is unknown: use one of direct_nchw"):
        choose(EDGE_PROBLEMS[0], H200, "fft")
