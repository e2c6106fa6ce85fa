"""matrix_nchw at its own edges: bands of every kind, stretches between vectors, items of images, channels and rows."""

from __future__ import annotations

import pytest

from checks import check, check_in_any_order
from dwconv.compile import compile_many
from dwconv.device import H200, PRESETS, DeviceSpec
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection
from dwconv.problem import DepthwiseProblem, Epilogue
from dwconv.variants.matrix_items import Tile
from dwconv.variants.matrix_nchw import MatrixNchw, tile_for
from dwconv.variants.matrix_slices import MAX_BANDS, block_count, reach, slice_plan, slice_plans, unsliced
from problems import problem_id

VARIANT = MatrixNchw()


def same(*taps: int) -> tuple[tuple[int, int], ...]:
    return tuple((k // 2, k // 2) for k in taps)


def P(*sizes, dtype: str = "float16", **rest) -> DepthwiseProblem:
    return DepthwiseProblem(*sizes, dtype=dtype, **rest)


FULL = Epilogue("silu", scale=True, shift=True, residual=True)
PROBLEMS = [
    # whole planes, several images and channels in an item: their bytes a multiple of 16, of 8, of 4, of 2
    P(3, 5, (28, 28), (5, 5), padding=same(5, 5)),
    P(9, 5, (14, 14), (5, 5), padding=same(5, 5), bias=True, epilogue=FULL),
    P(19, 11, (7, 7), (7, 7), padding=same(7, 7), dtype="bfloat16"),
    P(5, 3, (9, 11), (3, 3), padding=same(3, 3), epilogue=Epilogue("relu", residual=True)),
    P(2, 2, (56, 56), (7, 7), padding=same(7, 7)),
    # ranges of rows, ranges of columns
    P(1, 3, (112, 40), (7, 7), padding=same(7, 7), dtype="bfloat16", bias=True),
    P(1, 2, (61, 113), (5, 3), padding=((1, 3), (2, 0))),
    P(1, 1, (26, 530), (7, 7), padding=same(7, 7)),
    P(1, 1, (9, 1061), (3, 5), padding=same(3, 5), epilogue=FULL),
    P(1, 2, (1, 4500), (1, 4), padding=((0, 0), (3, 0)), bias=True, epilogue=FULL),
    # strides, dilation, multipliers, filters of even sizes, several products a row
    P(3, 6, (14, 14), (5, 5), stride=(2, 2), padding=same(5, 5)),
    P(2, 4, (56, 57), (5, 5), stride=(2, 2), padding=same(5, 5)),
    P(1, 4, (21, 30), (3, 3), stride=(3, 1), padding=((0, 2), (1, 0)), dtype="bfloat16"),
    P(2, 3, (20, 24), (3, 3), padding=((6, 6), (6, 6)), dilation=(6, 6), dtype="bfloat16"),
    P(2, 5, (8, 12), (3, 3), padding=same(3, 3), multiplier=3, bias=True, epilogue=FULL),
    P(1, 2, (60, 64), (3, 3), padding=same(3, 3), multiplier=2),
    P(2, 2, (10, 15), (4, 6), padding=((1, 2), (3, 2))),
    P(1, 2, (17, 40), (9, 9), padding=same(9, 9), bias=True),
    P(2, 2, (1, 300), (1, 31), padding=((0, 0), (15, 15)), dtype="bfloat16"),
    P(2, 2, (6, 40), (2, 31), padding=((0, 1), (15, 15))),
    # padding far beyond the image; planes of few elements; no images
    P(2, 3, (2, 9), (3, 3), padding=((5, 0), (0, 7))),
    P(6, 70, (2, 2), (3, 3), padding=same(3, 3)),
    P(9, 50, (1, 7), (1, 1), dtype="bfloat16"),
    P(0, 3, (7, 7), (3, 3), padding=same(3, 3)),
    # addresses between vectors; views
    P(2, 6, (14, 14), (3, 3), padding=same(3, 3), aligned=2),
    P(2, 6, (7, 8), (3, 3), padding=same(3, 3), aligned=4),
    P(2, 3, (6, 16), (5, 5), padding=same(5, 5), x_strides=(6 * 96, 2 * 96, 16, 1)),
    P(2, 2, (7, 7), (3, 3), padding=same(3, 3), x_strides=(2 * 81, 81, 9, 1)),
    P(3, 2, (5, 8), (3, 3), padding=same(3, 3), x_strides=(0, 40, 8, 1)),
]
SLICED = [
    # images that aren't a multiple of 16, slices of 8, 2, 4, 7 and 14 channels
    P(19, 16, (7, 7), (5, 5), padding=same(5, 5)),
    P(16, 8, (7, 7), (7, 7), padding=same(7, 7), bias=True, epilogue=FULL, dtype="bfloat16"),
    P(35, 4, (14, 14), (5, 5), padding=same(5, 5), dtype="bfloat16", bias=True),
    P(17, 2, (14, 14), (7, 7), padding=same(7, 7)),
    P(16, 4, (14, 7), (3, 3), padding=((2, 0), (0, 2)), dtype="bfloat16"),
    P(16, 7, (7, 8), (3, 3), padding=same(3, 3), epilogue=Epilogue("relu6", scale=True)),
    P(16, 14, (7, 4), (3, 1), padding=((2, 2), (0, 0)), dilation=(2, 1)),
    P(16, 4, (7, 14), (1, 5), padding=((0, 0), (4, 0))),
    P(16, 8, (7, 7), (13, 13), padding=same(13, 13)),  # larger than the planes
]


def slices(problem: DepthwiseProblem, device: DeviceSpec = H200) -> list[Plan]:
    return [plan for plan in slice_plans(VARIANT.stem, problem, device) if isinstance(plan, Plan)]


def plans() -> list[Plan]:
    found = [VARIANT.plan(problem, H200, tile_for(problem)) for problem in PROBLEMS]
    return [plan for plan in found if isinstance(plan, Plan)] + [plan for p in SLICED for plan in slices(p)]


def test_few_problems_are_left_to_others() -> None:
    assert len(plans()) >= len(PROBLEMS) - 4 + len(SLICED)


def sample_of_tiles() -> list[Plan]:
    """Other tiles, and other cuts of the same tile."""
    found = [plan for p in PROBLEMS[1:20:3] for plan in VARIANT.every_plan(p, H200)[1:]]
    for problem in PROBLEMS:
        cuts = VARIANT.cuts(problem, H200, tile_for(problem))
        found += cuts[:: max(1, len(cuts) // 3)]
    return found


def plan_id(plan: Plan) -> str:
    return f"{problem_id(plan.problem)}-{plan.tile}-{plan.grid[0]}x{plan.block[0]}".replace(" ", "").replace(",", "-")


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles all kernels at once, on every core."""
    build.build_many([*plans(), *sample_of_tiles()])


@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_results_are_within_rounding_in_any_order_of_threads(plan: Plan) -> None:
    check_in_any_order(plan)


@pytest.mark.parametrize("plan", sample_of_tiles(), ids=plan_id)
def test_every_tile_is_within_rounding(plan: Plan) -> None:
    check(plan, order_seed=1)


def test_no_kernel_spills() -> None:
    archs = [device for device in PRESETS.values() if device.sm >= 80]
    shapes = [p for p in PROBLEMS if p.batch] + [P(1, 1, (56, 56), (k, k), padding=same(k, k)) for k in (3, 5, 7, 9)]
    made = []
    for i, problem in enumerate(shapes):
        made += VARIANT.every_plan(problem, archs[i % len(archs)])
    for i, problem in enumerate(SLICED):
        made += slices(problem, archs[i % len(archs)])
    for plan, kernel in zip(made, compile_many(made), strict=True):
        resources = kernel.resources
        assert resources.spill_bytes == resources.stack_bytes == 0, f"{plan.problem}, {plan.tile}: {resources}"


def test_blocks_fit_every_device() -> None:
    problems = [*PROBLEMS, P(128, 96, (56, 56), (7, 7), padding=same(7, 7)), P(1, 1, (500, 900), (9, 9))]
    for device in PRESETS.values():
        for problem in problems:
            for plan in VARIANT.every_plan(problem, device):
                assert plan.shared_bytes < device.shared_bytes
                assert plan.block[0] % 32 == 0
                assert plan.block[0] <= dict(plan.constants)["THREADS"]


def test_few_kernels_serve_all_sizes() -> None:
    for taps, padding in ((5, 2), (7, 3), (7, 0)):
        sizes = [(h, w) for h in range(32, 256, 9) for w in range(32, 256, 5)]
        problems = [P(8, 32, size, (taps, taps), padding=((padding,) * 2,) * 2) for size in sizes]
        made = [VARIANT.plan(problem, H200, tile_for(problem)) for problem in problems]
        assert len({plan.kernel_id for plan in made if isinstance(plan, Plan)}) <= 7


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_of_slices_are_used_again(stages: int) -> None:
    """A block of many slices uses each stage again and again, and changes its channels in between."""
    problem = P(32, 24, (7, 7), (5, 5), padding=same(5, 5), bias=True)
    plan = slice_plan(VARIANT.stem, problem, H200, 1, stages, blocks=1)
    assert plan.grid == (1, 1, 1)
    check(plan, order_seed=4)


def test_blocks_of_slices_may_take_one_more() -> None:
    plan = slice_plan(VARIANT.stem, P(64, 16, (7, 7), (3, 3), padding=same(3, 3)), H200, 2, 3, blocks=3)
    assert (plan.grid[0], plan.tiling[25], plan.tiling[26], *plan.tiling[-2:]) == (3, 2, 8, 2, 0)
    check(plan)


def test_blocks_of_slices_take_whole_ones_first() -> None:
    """Five slices of four groups of images: one for each of three blocks, then 3, 3 and 2 groups of the other two."""
    plan = slice_plan(VARIANT.stem, P(64, 40, (7, 7), (3, 3), padding=same(3, 3)), H200, 2, 3, blocks=3)
    assert (plan.tiling[25], plan.tiling[26], *plan.tiling[-2:]) == (2, 20, 2, 4)
    check(plan)


def test_blocks_of_slices_are_parts_of_one_where_slots_allow() -> None:
    assert block_count(120, 8, 264) == 240
    assert block_count(96, 8, 264) == 192
    assert block_count(144, 8, 264) == 264
    assert block_count(3, 2, 264) == 6


def test_steps_of_slices_cover_what_their_outputs_read() -> None:
    for problem in SLICED:
        height, width = problem.size
        begin, _, steps_ = reach(problem)
        for output in range(392):
            plane, rest = divmod(output, height * width)
            row, column = divmod(rest, width)
            for u in range(problem.filter[0]):
                for v in range(problem.filter[1]):
                    i = row - problem.padding[0][0] + u * problem.dilation[0]
                    j = column - problem.padding[1][0] + v * problem.dilation[1]
                    if 0 <= i < height and 0 <= j < width:
                        at = (plane * height + i) * width + j - output // 56 * 56
                        assert begin <= at < begin + 16 * steps_


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (P(16, 8, (7, 7), (3, 3)), "a plane of y for each of x"),
        (P(16, 7, (7, 7), (3, 3), padding=same(3, 3)), "whole planes"),
        (P(16, 8, (28, 28), (3, 3), padding=same(3, 3)), "whole planes"),
        (P(16, 8, (7, 7), (3, 3), padding=same(3, 3), aligned=8), "must start at 16 bytes"),
        (P(15, 8, (7, 7), (3, 3), padding=same(3, 3)), "16 images at a time"),
        (P(16, 8, (14, 14), (11, 11), padding=same(11, 11)), f"{MAX_BANDS} do"),
    ],
)
def test_problems_without_slices_say_why(problem: DepthwiseProblem, reason: str) -> None:
    assert reason in (unsliced(problem) or "")
    (found,) = slice_plans(VARIANT.stem, problem, H200)
    assert isinstance(found, Rejection)


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (P(1, 4, (32, 32), (13, 13), padding=same(13, 13)), "sm_90", "bands don't fit in registers"),
        (P(1, 4, (32, 32), (3, 3), padding=same(3, 3)), "sm_75", "no tensor cores"),
        (P(1, 1, (9000, 300), (3, 3), dilation=(4000, 1)), "sm_90", "shared memory"),
    ],
)
def test_rejections_say_why(problem: DepthwiseProblem, device: str, reason: str) -> None:
    plan = VARIANT.plan(problem, PRESETS[device], Tile())
    assert isinstance(plan, Rejection)
    assert reason in plan.reason
