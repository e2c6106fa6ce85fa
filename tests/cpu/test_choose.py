"""Plans: pure, complete, explained; few kernels serve many sizes; grids stay inside CUDA's limits."""

from __future__ import annotations

import random

import pytest

from dwconv import DepthwiseError
from dwconv.bench.suites import SUITES, load_suite, select
from dwconv.choose import candidates, choose
from dwconv.device import H200, PRESETS, preset
from dwconv.plan import Plan, Rejection, fast_divisor
from dwconv.problem import DTYPE_BYTES, DepthwiseProblem, Direction
from dwconv.variants import REGISTRY
from dwconv.variants.base import GRID_X_LIMIT, GRID_YZ_LIMIT
from problems import EDGE_PROBLEMS, LAYOUTS, as_gradient, every_kind, problem_id

KINDS = list(every_kind())
DEVICES = list(PRESETS.values())
PLAIN = ("one_per_thread", "tile16", "one_input_per_thread", "one_tap_per_block")


def assert_inside_the_limits(plan: Plan) -> None:
    assert 1 <= plan.grid[0] <= GRID_X_LIMIT
    assert all(1 <= size <= GRID_YZ_LIMIT for size in plan.grid[1:])
    assert plan.block[0] * plan.block[1] * plan.block[2] <= 1024
    assert all(0 <= field < 2**32 for field in plan.tiling)
    assert 0 <= plan.shared_bytes <= plan.device.shared_bytes - 1024


@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda number: problem_id(KINDS[number]))
def test_every_problem_has_plans_inside_the_limits(number: int) -> None:
    """On the H200, and on one of the other architectures in turn."""
    problem = KINDS[number]
    for device in (H200, DEVICES[number % len(DEVICES)]):
        plan = choose(problem, device)
        assert plan == choose(problem, device), "a pure function of its arguments"
        assert plan.problem == problem
        for candidate in candidates(problem, device):
            if isinstance(candidate, Plan):
                assert_inside_the_limits(candidate)


@pytest.mark.parametrize("variant", REGISTRY)
def test_every_variant_serves_what_it_names(variant: str) -> None:
    """A problem of every dtype, layout and dimension, not necessarily of all their mixtures."""
    posed = [as_gradient(problem, direction) for direction in REGISTRY[variant].directions for problem in KINDS]
    plans = [candidates(problem, H200, variant)[0] for problem in posed]
    served = [plan.problem.lifted(2) for plan in plans if isinstance(plan, Plan)]
    assert {problem.dtype for problem in served} == set(REGISTRY[variant].dtypes)
    assert {problem.layout for problem in served} == set(REGISTRY[variant].layouts)
    assert {problem.dims for problem in served} == set(REGISTRY[variant].dims)


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_of_the_suites_prefers_a_fast_variant(suite: str) -> None:
    for name, problem in select(load_suite(suite)):
        assert choose(problem, H200).variant not in PLAIN, f"{name}: {problem}"


STREAMS = [
    *(((3, 3), dtype, layout) for dtype in DTYPE_BYTES for layout in LAYOUTS),
    *(((5, 5), dtype, layout) for dtype in ("float32", "float16") for layout in LAYOUTS),
    *(((3, 7), "float32", layout) for layout in LAYOUTS),
    *(((7, 7), dtype, layout) for dtype in ("float32", "float16") for layout in LAYOUTS),
    *(((31, 31), "float16", layout) for layout in LAYOUTS),
    *((taps, dtype, layout) for taps in ((4,), (31,)) for dtype in ("float32", "float16") for layout in LAYOUTS),
    *(((3, 3, 3), dtype, layout) for dtype in ("float32", "float16") for layout in LAYOUTS),
]


@pytest.mark.parametrize(("taps", "dtype", "layout"), STREAMS, ids=str)
@pytest.mark.parametrize("same", [True, False], ids=["same", "valid"])
def test_a_hundred_image_sizes_compile_few_kernels(taps, dtype, layout, same: bool) -> None:
    """At most four; eight where tensor cores take some sizes and another variant the rest; more for volumes, whose rows
    stand in the source (docs/variants/volume_ncdhw.md).
    """
    two_variants = dtype in ("float16", "bfloat16")
    sizes = random.Random(0)
    padding = tuple((t // 2, t // 2) for t in taps) if same else ()
    lowest, highest = {1: (200, 20_000), 2: (32, 640), 3: (8, 96)}[len(taps)]
    kernels = set()
    for _ in range(100):
        size = tuple(sizes.randint(lowest, highest) for _ in taps)
        problem = DepthwiseProblem(8, 32, size, taps, padding=padding, dtype=dtype, layout=layout)
        kernels.add(choose(problem, H200).kernel_id)
    assert len(kernels) <= (24 if len(taps) == 3 else 8 if two_variants else 4)


def test_fast_division_is_exact() -> None:
    numbers = random.Random(1)
    for _ in range(2000):
        divisor = numbers.choice([numbers.randint(1, 100), numbers.randint(1, 2**31 - 1)])
        _, multiplier, shift = fast_divisor(divisor)
        assert multiplier < 2**32
        for n in (0, divisor - 1, divisor, 2**31 - 1, numbers.randint(0, 2**31 - 1), divisor * (2**31 // divisor) - 1):
            if 0 <= n < 2**31:
                assert n * multiplier >> shift == n // divisor


@pytest.mark.parametrize("direction", ["grad_input", "grad_weight"])
@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda number: problem_id(KINDS[number]))
def test_every_gradient_has_plans_inside_the_limits(number: int, direction: Direction) -> None:
    problem, device = as_gradient(KINDS[number], direction), DEVICES[number % len(DEVICES)]
    for candidate in (choose(problem, H200), *candidates(problem, device)):
        if isinstance(candidate, Plan):
            assert candidate.problem == problem
            assert_inside_the_limits(candidate)
            assert candidate.partial_bytes <= 64 * 2**20, "the workspace that the documents promise"


def test_rejections_say_why() -> None:
    wide = candidates(DepthwiseProblem(1, 4, (64, 64), (31, 31)), H200)
    reasons = [c.reason for c in wide if isinstance(c, Rejection)]
    assert reasons
    assert all(" " in reason for reason in reasons)
    assert isinstance(wide[0], Plan), "legal plans come first"


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (DepthwiseProblem(1, 4, (9, 9), (3, 3), x_strides=(648, 162, 18, 2)), "neighbouring columns of x must be"),
        (
            DepthwiseProblem(1, 4, (9, 9), (3, 3), x_strides=(648, 2, 72, 8), layout="channels_last"),
            "neighbouring channels of x must be",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problems_without_a_kernel_get_a_sentence(problem: DepthwiseProblem, reason: str) -> None:
    with pytest.raises(DepthwiseError, match=f"no kernel takes this problem .*{reason}"):
        choose(problem, H200)


def test_tensors_beyond_32_bits_have_plans() -> None:
    for layout in LAYOUTS:
        for problem in (
            DepthwiseProblem(1, 1, (70_000, 70_000), (3, 3), layout=layout),
            DepthwiseProblem(70_000, 70_000, (1, 1), (1, 1), layout=layout, dtype="float16"),
            DepthwiseProblem(1, 2, (3, 2**30), (3, 3), padding=((1, 1), (1, 1)), layout=layout),
            DepthwiseProblem(1, 1, (1, 2**31 + 9), (3, 3), padding=((1, 1), (1, 1)), layout=layout),
            DepthwiseProblem(1, 1, (2**31 - 1, 1), (1, 1), layout=layout),
            DepthwiseProblem(1, 8, (2**31 + 9,), (4,), padding=((3, 0),), layout=layout, dtype="float16"),
            DepthwiseProblem(1, 3, (2**20, 50, 60), (3, 3, 3), layout=layout, dtype="bfloat16"),
        ):
            assert_inside_the_limits(choose(problem, H200))


def test_unknown_names() -> None:
    with pytest.raises(DepthwiseError, match=r"sm_42.*use one of sm_75"):
        preset("sm_42")
    with pytest.raises(DepthwiseError, match="variant='fft' is unknown: use one of direct_nchw"):
        choose(EDGE_PROBLEMS[0], H200, "fft")
