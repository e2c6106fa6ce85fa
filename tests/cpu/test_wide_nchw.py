"""wide_nchw at its own edges: whole and cut lines, rows and columns, chunks of taps, bands, groups of images."""

from __future__ import annotations

from dataclasses import replace

import pytest

from checks import check, check_in_any_order
from dwconv import emulator, reference
from dwconv.choose import choose
from dwconv.compile import compile_many
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection
from dwconv.problem import DepthwiseProblem, Epilogue
from dwconv.variants.wide_bands import Tile, band_of
from dwconv.variants.wide_nchw import WideNchw
from problems import make_inputs, make_output, problem_id

VARIANT = WideNchw()


def same(*taps: int) -> tuple[tuple[int, int], ...]:
    return tuple((k // 2, k // 2) for k in taps)


P = DepthwiseProblem
SEVEN = Tile(7, 2, 7, chunk=16, channels=4, queued=False, threads=512)
FULL = Epilogue("gelu", scale=True, shift=True, residual=True)
PROBLEMS = [
    # whole lines: a lane owns 7, 14, 28 outputs of a row, or 56 of a column
    P(5, 3, (7, 7), (13, 13), padding=same(13, 13), dtype="float16"),
    P(9, 2, (14, 14), (27, 27), padding=same(27, 27), bias=True, dtype="bfloat16", epilogue=FULL),
    P(3, 2, (9, 14), (11, 5), padding=same(11, 5), dtype="float64", multiplier=2),
    P(2, 2, (28, 28), (9, 9), stride=(2, 2), padding=same(9, 9)),
    P(2, 1, (56, 6), (51, 5), padding=same(51, 5), dtype="float16", bias=True),
    # cut lines, of rows and of columns
    P(2, 2, (20, 45), (9, 31), padding=same(9, 31), dtype="float16"),
    P(3, 2, (23, 34), (15, 15), padding=((3, 9), (0, 7)), bias=True, epilogue=Epilogue("silu", residual=True)),
    P(2, 3, (45, 10), (31, 3), padding=same(31, 3), dtype="bfloat16"),
    P(2, 2, (33, 40), (7, 9), stride=(3, 2), padding=same(7, 9), dilation=(2, 3)),
    P(1, 2, (12, 37), (9, 9), padding=same(9, 9), dtype="float64", aligned=8),
    # sequences: several chunks of taps, causal, symmetric, dilated, without padding
    P(3, 2, (150,), (100,), padding=((99, 0),), dtype="float16"),
    P(2, 2, (130,), (67,), padding=((33, 33),), bias=True),
    P(2, 1, (301,), (41,), stride=(2,), dilation=(3,), padding=((70, 11),), dtype="bfloat16"),
    P(1, 2, (200,), (80,), dtype="float64"),
    # padding far beyond the image; more lanes than images; no images
    P(2, 3, (2, 3), (9, 9), padding=((12, 9), (10, 15)), dtype="float16"),
    P(37, 2, (7, 7), (9, 9), padding=same(9, 9)),
    P(0, 2, (7, 7), (9, 9), padding=same(9, 9)),
    # addresses between vectors; views
    P(2, 2, (14, 14), (11, 11), padding=same(11, 11), aligned=2, dtype="float16"),
    P(2, 2, (10, 16), (9, 9), padding=same(9, 9), x_strides=(2 * 12 * 20, 12 * 20, 20, 1)),
    P(2, 2, (7, 7), (9, 9), padding=same(9, 9), dtype="float16", x_strides=(2 * 81, 81, 9, 1)),
    P(2, 2, (6, 14), (9, 9), padding=same(9, 9), x_strides=(0, 14, 0, 1)),
]
# Of lines whose halves mirror each other: rows, columns, an odd number of lines; images that don't exist; views.
HALVES = [
    P(3, 2, (56, 6), (51, 5), padding=same(51, 5), dtype="float16", bias=True),
    P(2, 2, (56, 5), (51, 3), padding=same(51, 3)),
    P(3, 3, (14, 14), (27, 27), padding=same(27, 27), dtype="bfloat16", bias=True, epilogue=FULL),
    P(5, 2, (9, 28), (3, 9), padding=((1, 2), (12, 12)), dilation=(1, 3), multiplier=2),
    P(2, 2, (14, 9), (13, 4), padding=same(13, 4), dtype="float64"),
    P(2, 2, (10, 16), (9, 9), padding=same(9, 9), x_strides=(2 * 12 * 20, 12 * 20, 20, 1)),
    P(2, 3, (16, 7), (9, 3), padding=same(9, 3), dtype="float16", aligned=2),
]


def plans() -> list[Plan]:
    return [choose(problem, H200, VARIANT.stem) for problem in PROBLEMS]


def sample_of_tiles() -> list[Plan]:
    found = [plan for p in PROBLEMS[3:16:3] for plan in VARIANT.every_plan(p.lifted(2), H200)[1::2]]
    for channels, padding in ((8, 4), (6, 4), (8, 3)):  # planes of four channels are moved as one
        problem = P(3, channels, (7, 7), (9, 9), padding=((padding, padding + 1), (4, 4)), bias=True, epilogue=FULL)
        for dtype in ("float32", "float16"):
            found.append(VARIANT.plan(replace(problem, dtype=dtype), H200, SEVEN))
    return found


def plans_of_halves() -> list[Plan]:
    return [plan for p in HALVES for plan in VARIANT.every_plan(p, H200) if dict(plan.constants)["HALVES"]]


def plan_id(plan: Plan) -> str:
    return f"{problem_id(plan.problem)}-{plan.tile.split(',')[0]}".replace(" ", "")


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles all kernels at once, on every core."""
    build.build_many([*plans(), *sample_of_tiles(), *plans_of_halves()])


@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_results_are_within_rounding_in_any_order_of_threads(plan: Plan) -> None:
    check_in_any_order(plan)


@pytest.mark.parametrize("plan", sample_of_tiles(), ids=plan_id)
def test_every_tile_is_within_rounding(plan: Plan) -> None:
    check(plan, order_seed=1)


def test_halves_of_lines() -> None:
    found = plans_of_halves()
    assert {plan.problem for plan in found} == set(HALVES)
    for plan in found:
        check_in_any_order(plan)


def test_a_gradient_of_x_by_halves() -> None:
    """Taps are read from the last to the first, and mirrored on top of that."""
    p = replace(HALVES[1], reversed=True)
    x, weight, _ = make_inputs(p, seed=6)
    output = make_output(p)
    plan = next(plan for plan in VARIANT.every_plan(p, H200) if dict(plan.constants)["HALVES"])
    emulator.run(plan, x, weight, None, output.y)
    wanted = reference.forward(x, weight.flip(2, 3), None, HALVES[1])
    assert reference.describe_mismatch(output.y, *wanted) is None


def test_long_lines_are_halved_where_their_code_would_be_too_long() -> None:
    long = P(32, 128, (56, 56), (51, 5), padding=same(51, 5))
    chosen = choose(long, H200, VARIANT.stem)
    assert dict(chosen.constants)["HALVES"]
    assert compile_many([chosen])[0].resources.registers <= 96  # three blocks of 7 warps
    uneven = replace(long, padding=((24, 26), (1, 3)))
    assert not any(dict(plan.constants)["HALVES"] for plan in VARIANT.every_plan(uneven, H200))


def test_no_kernel_spills() -> None:
    problems = [PROBLEMS[i] for i in (0, 1, 2, 4, 6, 9)] + [P(1, 1, (56, 56), (31, 31), padding=same(31, 31))]
    problems.append(P(2, 4, (28, 28), (9, 9), stride=(2, 2), padding=same(9, 9), dtype="float64"))
    made = [
        choose(p, device, VARIANT.stem) for i, p in enumerate(problems) for device in list(PRESETS.values())[i % 2 :: 3]
    ]
    for plan, kernel in zip(made, compile_many(made), strict=True):
        resources = kernel.resources
        assert resources.spill_bytes == resources.stack_bytes == 0, f"{plan.problem}, {plan.tile}: {resources}"


def test_blocks_fit_every_device() -> None:
    problems = [*PROBLEMS, P(32, 128, (56, 56), (31, 31), padding=same(31, 31)), P(1, 1, (500, 900), (51, 51))]
    for device in PRESETS.values():
        for problem in problems:
            for plan in VARIANT.every_plan(problem.lifted(2), device):
                assert plan.shared_bytes < device.shared_bytes
                assert plan.block[0] <= int(dict(plan.constants)["THREADS"])


def test_images_of_one_channel_share_a_block() -> None:
    band = band_of(P(32, 1024, (7, 7), (13, 13), padding=same(13, 13)), Tile(7, 4, 7, chunk=16))
    assert (band.images, band.channels, band.near_tiles) == (32, 1, 1)
    few = band_of(P(2, 1024, (7, 7), (13, 13), padding=same(13, 13)), Tile(7, 4, 7, chunk=16))
    assert (few.images, few.channels) == (2, 16), "a warp is filled with channels where there are few images"


def test_few_kernels_serve_many_sizes() -> None:
    made = {
        choose(P(8, 32, (h, w), (31, 31), padding=same(31, 31)), H200, VARIANT.stem).kernel_id
        for h, w in [(40 + 7 * i % 600, 36 + 11 * i % 600) for i in range(100)]
    }
    assert len(made) <= 4


def test_what_does_not_fit_is_rejected_with_a_sentence() -> None:
    huge = P(1, 1, (3000, 3000), (200, 200), dilation=(12, 12))
    found = [c for c in VARIANT.candidates(huge, H200) if isinstance(c, Rejection)]
    assert found
    assert all("bytes of shared memory" in c.reason for c in found)
    long = replace(huge, size=(1, 2**31 - 5), filter=(1, 3), dilation=(1, 1))
    assert all("31 bits" in c.reason for c in VARIANT.candidates(long, H200) if isinstance(c, Rejection))
