"""sparse_nhwc at its own edges: parts that begin within images, strips, several images side by side, every tile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from checks import check_in_any_order
from dwconv.compile import compile_many
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection
from dwconv.problem import DepthwiseProblem, Epilogue
from dwconv.variants.sparse_nhwc import SparseNhwc
from dwconv.variants.sparse_rows import (
    Tile,
    cut,
    group_of,
    grouping_of,
    most_registers,
    registers,
    steps_of,
    turned,
)
from problems import problem_id

VARIANT = SparseNhwc()


def same(*taps: int) -> tuple[tuple[int, int], ...]:
    return tuple((k // 2, k // 2) for k in taps)


def P(*sizes, dtype: str = "float16", **rest) -> DepthwiseProblem:
    return DepthwiseProblem(*sizes, dtype=dtype, layout="channels_last", **rest)


FULL = Epilogue("silu", scale=True, shift=True, residual=True)
PROBLEMS = [
    # several images side by side; the last group of them starts earlier
    P(3, 24, (9, 28), (7, 7), padding=same(7, 7), bias=True),
    P(19, 16, (7, 7), (7, 7), padding=same(7, 7), dtype="bfloat16", epilogue=FULL),
    P(5, 40, (14, 14), (5, 5), padding=same(5, 5), bias=True, epilogue=FULL),
    P(1, 8, (30, 56), (7, 7), padding=same(7, 7), dtype="bfloat16"),
    # strips of columns; chunks that are partly beyond the channels
    P(1, 32, (5, 260), (3, 7), padding=same(3, 7), bias=True),
    P(2, 8, (4, 129), (5, 5), padding=((2, 2), (0, 1)), epilogue=Epilogue("relu", residual=True)),
    # one row, filters of several products, dilation
    P(3, 16, (1, 300), (1, 31), padding=((0, 0), (15, 15))),
    P(1, 32, (1, 200), (1, 4), padding=((0, 0), (3, 0)), dtype="bfloat16", bias=True),
    P(1, 16, (12, 30), (3, 3), padding=((1, 1), (3, 3)), dilation=(1, 3)),
    P(1, 8, (6, 20), (2, 9), padding=((1, 0), (4, 4)), dtype="bfloat16"),
    # strides, filters of even sizes, padding on one side
    P(2, 16, (14, 20), (5, 5), stride=(2, 2), padding=same(5, 5)),
    P(2, 8, (11, 13), (4, 3), stride=(3, 2), padding=((1, 2), (0, 1)), dtype="bfloat16", epilogue=FULL),
    P(1, 16, (9, 9), (3, 3), stride=(1, 2), padding=((0, 0), (1, 1))),
    # images as a whole
    P(19, 32, (7, 7), (13, 13), padding=same(13, 13), bias=True, epilogue=FULL),
    P(9, 64, (7, 5), (5, 5), stride=(2, 1), padding=same(5, 5), dtype="bfloat16"),
    P(17, 16, (8, 8), (4, 4), padding=((2, 1), (1, 2)), bias=True),
    # images of a few elements; padding of several rows
    P(20, 8, (1, 1), (3, 3), padding=same(3, 3)),
    P(2, 8, (3, 2), (5, 5), padding=((4, 4), (4, 4))),
    # tall filters, turned
    P(3, 16, (30, 13), (17, 3), padding=same(17, 3), bias=True, epilogue=FULL),
    P(2, 16, (12, 9), (7, 2), stride=(2, 1), padding=((3, 3), (1, 0)), dtype="bfloat16"),
    P(1, 16, (56, 10), (51, 5), padding=same(51, 5)),
    # views
    P(2, 16, (8, 10), (5, 5), padding=same(5, 5), x_strides=(8 * 10 * 48, 1, 10 * 48, 48)),
    P(3, 8, (6, 9), (3, 3), padding=same(3, 3), x_strides=(0, 1, 9 * 8, 8)),
]


def plans() -> list[Plan]:
    """Every tile, each of them also for few multiprocessors, so that blocks march through several images."""
    few = replace(H200, multiprocessors=2)
    found = []
    for i, problem in enumerate(PROBLEMS):
        made = VARIANT.every_plan(problem, few if i % 2 else H200)
        found += made[:1] + made[1 + i % 3 :: 3]
    return found


def plan_id(plan: Plan) -> str:
    return f"{problem_id(plan.problem)}-{plan.tile}-{plan.grid[0]}".replace(" ", "").replace(",", "-")


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles all kernels at once, on every core."""
    build.build_many(plans())


def test_all_problems_are_taken() -> None:
    for problem in PROBLEMS:
        assert VARIANT.every_plan(problem, H200), problem


@pytest.mark.parametrize("plan", plans(), ids=plan_id)
def test_results_are_within_rounding_in_any_order_of_threads(plan: Plan) -> None:
    check_in_any_order(plan)


def test_rows_come_as_boxes_where_the_copy_engine_takes_them() -> None:
    given = replace(PROBLEMS[0], batch=128, channels=192, size=(28, 28))
    (plan,) = (each for each in VARIANT.candidates(given, H200) if isinstance(each, Plan))
    assert plan.maps
    for other in (replace(given, aligned=8), replace(given, size=(1, 28), filter=(1, 9), padding=same(1, 9))):
        assert not any(each.maps for each in VARIANT.every_plan(other, H200)), other
    assert not any(each.maps for each in VARIANT.every_plan(given, PRESETS["sm_80"]))


def test_no_kernel_spills() -> None:
    archs = [device for device in PRESETS.values() if device.sm >= 80]
    shapes = [*PROBLEMS, *(P(8, 96, (56, 56), (k, k), padding=same(k, k), bias=True) for k in (3, 5, 7))]
    shapes += [P(8, 192, (28, 28), (7, 7), padding=same(7, 7), bias=True, epilogue=FULL)]
    shapes += [P(64, 96, (7, 7), (k, k), padding=same(k, k)) for k in (5, 7)]
    made = []
    for i, problem in enumerate(shapes):
        device = archs[i % len(archs)]
        made += [plan for plan in VARIANT.candidates(problem, device) if isinstance(plan, Plan)]
        made += VARIANT.every_plan(problem, device)[i % 6 :: 6]
    for plan, kernel in zip(made, compile_many(made), strict=True):
        resources = kernel.resources
        assert resources.spill_bytes == resources.stack_bytes == 0, f"{plan.problem}, {plan.tile}: {resources}"


def test_blocks_share_a_multiprocessor_only_where_their_registers_fit() -> None:
    for problem in PROBLEMS:
        for plan in VARIANT.every_plan(problem, H200):
            constants = dict(plan.constants)
            blocks, warps = int(constants["MIN_BLOCKS"]), int(constants["WARPS"])
            assert blocks * -(-warps // 4) * 4 * 32 * 24 <= 65536
            assert blocks * (plan.shared_bytes + 1024) <= H200.shared_bytes or blocks == 1


def test_groups_are_all_there() -> None:
    """The groups that columns of a product belong to are a permutation."""
    for between in (1, 2, 4):
        assert sorted(group_of(n, between) for n in range(16)) == list(range(16))


def test_steps_are_counted_as_the_kernel_counts_them() -> None:
    """No block makes more steps than its table of them has room for."""

    def of_unit(problem: DepthwiseProblem, tile: Tile, first: int, end: int) -> int:
        stride, taps, above = problem.stride[0], problem.filter[0], problem.padding[0][0]
        skipped = max(0, above - first * stride) // tile.rows
        return ((end - 1 - first) * stride + taps - 1) // tile.rows + 1 - skipped

    for problem in PROBLEMS:
        height = problem.out_size[0]
        for tile in VARIANT.tiles(problem):
            if tile.turned or tile.whole:
                continue
            for part_rows in (1, 2, 3, height, height + 1, 3 * height + 2):
                for first in range(height):
                    steps, row, left = 0, first, part_rows
                    while left:
                        end = min(height, row + left)
                        steps += of_unit(problem, tile, row, end)
                        left -= end - row
                        row = 0
                    if first == 0 or part_rows % height:
                        assert steps <= steps_of(problem, tile, part_rows), (problem, tile, part_rows, first)


def test_blocks_fit_every_device() -> None:
    problems = [*PROBLEMS, P(128, 96, (56, 56), (7, 7), padding=same(7, 7)), P(4000, 8, (224, 224), (3, 3))]
    for device in PRESETS.values():
        for problem in problems:
            for plan in VARIANT.every_plan(problem, device):
                assert plan.shared_bytes < device.shared_bytes


def test_all_rows_are_shared_out() -> None:
    for problem in (*PROBLEMS, P(128, 192, (28, 28), (7, 7), padding=same(7, 7))):
        for tile in VARIANT.tiles(problem):
            seen = turned(problem) if tile.turned else problem
            if (grouping := grouping_of(seen, tile)) is None or (max(seen.out_size[0], 8) > 8 and tile.whole):
                continue
            one = cut(seen, H200, tile, grouping)
            assert (one.parts - 1) * one.part_rows < one.rows <= one.parts * one.part_rows


@pytest.mark.parametrize(
    ("problem", "tile", "device", "reason"),
    [
        (P(1, 32, (32, 32), (15, 15), padding=same(15, 15)), Tile(), "sm_90", "registers"),
        (P(1, 8, (32, 300), (1, 80), padding=same(1, 80)), Tile(), "sm_90", "more than 64 pixels"),
        (P(1, 8, (32, 32), (3, 3), padding=same(3, 3)), Tile(), "sm_75", "no tensor cores"),
        (P(1, 12, (32, 32), (3, 3), padding=same(3, 3)), Tile(), "sm_90", "whole vectors of eight channels"),
        (P(1, 8, (32, 32), (3, 3), padding=same(3, 3), multiplier=2), Tile(), "sm_90", "several filters"),
        (P(1, 8, (32, 32), (3, 3), padding=((2, 2), (2, 2)), dilation=(2, 2)), Tile(), "sm_90", "must be neighbours"),
        (P(1, 8, (32, 32), (3, 3), padding=((3, 3), (1, 1))), Tile(), "sm_90", "in the padding as a whole"),
        (P(1, 8, (32, 32), (3, 3), padding=same(3, 3)), Tile(rows=32, whole=True), "sm_90", "too large"),
        (P(1, 8, (32, 32), (3, 3), padding=same(3, 3), stride=(2, 2)), Tile(), "sm_90", "end with an output row"),
        (P(1, 64, (8, 8000), (3, 3), padding=same(3, 3)), Tile(16, 4, 2, 8, 8), "sm_90", "registers"),
    ],
)
def test_rejections_say_why(problem: DepthwiseProblem, tile: Tile, device: str, reason: str) -> None:
    plan = VARIANT.plan(problem, PRESETS[device], tile)
    assert isinstance(plan, Rejection)
    assert reason in plan.reason


def test_what_others_compute_faster_is_left_to_them() -> None:
    for problem in (P(1, 8, (32, 32), (2, 2)), P(1, 8, (32, 32), (3, 3), stride=(2, 2))):
        assert not [plan for plan in VARIANT.candidates(problem, H200) if isinstance(plan, Plan)]
        assert VARIANT.every_plan(problem, H200)


def test_registers_are_what_a_multiprocessor_gives_out() -> None:
    assert [most_registers(Tile(warps)) for warps in (4, 8, 9, 12, 16)] == [255, 255, 168, 168, 128]
    assert registers(P(1, 8, (32, 32), (5, 5)), Tile(8, 2), 1) == 4 * 2 * (5 + 1) + 4 * 2 * 5 + 38
