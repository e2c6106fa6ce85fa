"""staged_nchw at its own edges: stretches between vectors, items of planes, rows and columns, staged results."""

from __future__ import annotations

from dataclasses import replace

import pytest

from checks import check, check_in_any_order
from dwconv.compile import compile_many
from dwconv.device import H200, PRESETS, DeviceSpec
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection
from dwconv.problem import DepthwiseProblem, Epilogue
from dwconv.variants.staged_march import every_march, march_of
from dwconv.variants.staged_nchw import StagedNchw, Tile, tile_for
from problems import problem_id

VARIANT = StagedNchw()


def same(*taps: int) -> tuple[tuple[int, int], ...]:
    return tuple((k // 2, k // 2) for k in taps)


P = DepthwiseProblem
FULL = Epilogue("silu", scale=True, shift=True, residual=True)
PROBLEMS = [
    # whole planes, several in an item: their bytes a multiple of 16, of 8, of 2
    P(3, 5, (28, 28), (3, 3), padding=same(3, 3)),
    P(2, 9, (14, 14), (5, 5), padding=same(5, 5), dtype="float16", bias=True, epilogue=FULL),
    P(5, 37, (7, 7), (7, 7), padding=same(7, 7), dtype="bfloat16"),
    P(4, 11, (7, 7), (5, 5), padding=same(5, 5), bias=True, epilogue=Epilogue("relu", residual=True)),
    P(2, 7, (9, 11), (3, 3), padding=same(3, 3), dtype="float64", epilogue=Epilogue(scale=True)),
    P(3, 3, (33, 33), (3, 3), padding=same(3, 3), dtype="float16", epilogue=Epilogue("gelu")),
    # ranges of rows, ranges of columns
    P(1, 3, (112, 40), (7, 7), padding=same(7, 7), dtype="bfloat16", bias=True),
    P(1, 2, (61, 113), (5, 3), padding=((1, 3), (2, 0)), dtype="float16"),
    P(1, 2, (26, 530), (7, 7), padding=same(7, 7)),
    P(1, 1, (20, 431), (3, 5), padding=same(3, 5), dtype="float16", epilogue=FULL),
    # strides, dilation, multipliers, filters of even sizes, filters of several parts
    P(3, 6, (14, 14), (5, 5), stride=(2, 2), padding=same(5, 5), dtype="float16"),
    P(2, 4, (28, 28), (3, 3), stride=(2, 2), padding=same(3, 3)),
    P(1, 4, (21, 30), (3, 3), stride=(3, 1), padding=((0, 2), (1, 0)), dtype="float64"),
    P(2, 3, (20, 24), (3, 3), padding=((6, 6), (6, 6)), dilation=(6, 6), dtype="bfloat16"),
    P(2, 5, (8, 12), (3, 3), padding=same(3, 3), multiplier=3, bias=True, epilogue=FULL),
    P(1, 2, (60, 64), (3, 3), padding=same(3, 3), multiplier=2, dtype="float16"),
    P(2, 2, (10, 15), (4, 6), padding=((1, 2), (3, 2))),
    P(2, 3, (14, 14), (11, 11), padding=same(11, 11), dtype="float16"),
    P(1, 2, (17, 40), (9, 9), padding=same(9, 9), bias=True),
    P(2, 2, (9, 20), (2, 31), padding=((0, 1), (15, 15)), dtype="bfloat16"),
    # padding far beyond the image; planes of few elements; a sequence; no images
    P(2, 3, (2, 9), (3, 3), padding=((5, 0), (0, 7))),
    P(6, 70, (2, 2), (3, 3), padding=same(3, 3), dtype="float16"),
    P(9, 50, (1, 7), (1, 1), dtype="bfloat16"),
    P(3, 4, (1, 90), (1, 9), padding=((0, 0), (8, 0))),
    P(0, 3, (7, 7), (3, 3), padding=same(3, 3)),
    # addresses between vectors; views
    P(2, 6, (14, 14), (3, 3), padding=same(3, 3), dtype="float16", aligned=2),
    P(2, 6, (7, 8), (3, 3), padding=same(3, 3), aligned=4),
    P(2, 3, (6, 16), (5, 5), padding=same(5, 5), x_strides=(6 * 96, 2 * 96, 16, 1)),
    P(2, 2, (7, 7), (3, 3), padding=same(3, 3), dtype="float16", x_strides=(2 * 81, 81, 9, 1)),
    P(3, 2, (5, 8), (3, 3), padding=same(3, 3), x_strides=(0, 40, 8, 1)),
]
# The marches: rows through a ring, strips of columns, odd heights; whole planes, halves of rows, strides.
MARCHED = [
    P(2, 8, (56, 56), (7, 7), padding=same(7, 7), bias=True),
    P(2, 16, (28, 28), (7, 7), padding=same(7, 7), epilogue=FULL),
    P(2, 9, (29, 28), (7, 7), padding=same(7, 7)),
    P(1, 3, (20, 33), (5, 3), padding=((1, 3), (2, 0)), bias=True, epilogue=FULL),
    P(1, 2, (19, 300), (7, 7), padding=same(7, 7)),
    P(1, 2, (18, 301), (7, 5)),
    P(1, 3, (17, 112), (6, 6), padding=((5, 0), (0, 5)), aligned=4),
    P(2, 17, (14, 14), (7, 7), padding=same(7, 7), bias=True),
    P(2, 5, (3, 14), (5, 5), padding=same(5, 5), bias=True, epilogue=FULL),
    P(2, 33, (7, 7), (7, 7), padding=same(7, 7), epilogue=FULL),
    P(3, 5, (7, 8), (3, 5), padding=((2, 0), (0, 4)), aligned=4),
    P(2, 33, (14, 14), (5, 5), stride=(2, 2), padding=same(5, 5), bias=True, epilogue=FULL),
    P(2, 5, (13, 15), (4, 3), stride=(2, 2), padding=((1, 2), (0, 2))),
    P(2, 5, (9, 11), (3, 2), stride=(1, 2), padding=((0, 2), (0, 1))),
    P(2, 40, (1, 7), (1, 5), padding=same(1, 5)),
    P(0, 3, (7, 7), (3, 3), padding=same(3, 3)),
    # 16 bits: rows of pairs, and not; planes that begin between two pairs
    P(2, 33, (14, 14), (5, 5), stride=(2, 2), padding=same(5, 5), bias=True, dtype="float16"),
    P(
        2,
        33,
        (14, 14),
        (5, 5),
        stride=(2, 2),
        padding=same(5, 5),
        dtype="bfloat16",
        epilogue=Epilogue("relu", scale=True),
    ),
    P(2, 5, (13, 15), (4, 3), stride=(2, 2), padding=((1, 2), (0, 2)), dtype="bfloat16"),
    P(3, 5, (9, 8), (3, 3), stride=(2, 2), padding=same(3, 3), dtype="float16", aligned=2),
    P(2, 5, (6, 14), (5, 5), padding=same(5, 5), dtype="float16"),
]
# More items than a card of one multiprocessor has warps at a time: they fetch the next while they sum one.
SMALL_CARD = replace(H200, multiprocessors=1)
AHEAD = [
    P(14, 33, (7, 7), (7, 7), padding=same(7, 7), bias=True, epilogue=FULL),
    P(27, 5, (7, 7), (5, 5), padding=same(5, 5)),
    P(6, 33, (14, 14), (7, 7), padding=same(7, 7), bias=True),
]
TILES = [
    Tile(rows=4, threads=64, loads=1),
    Tile(rows=7, threads=32, loads=3, skip_rows=True),
    Tile(rows=5, threads=96, loads=2, most_taps=10),
]


def best(problem: DepthwiseProblem, device: DeviceSpec = H200) -> Plan:
    """The plan of the tile of choice, also where large images are left to other variants."""
    plan = VARIANT.plan(problem, device, tile_for(problem))
    assert isinstance(plan, Plan), plan
    return plan


def plans() -> list[Plan]:
    return [best(problem) for problem in PROBLEMS]


def sample_of_tiles() -> list[Plan]:
    found = [plan for p in PROBLEMS[1:20:6] for plan in VARIANT.every_plan(p, H200)[1:]]
    for i, problem in enumerate(PROBLEMS):
        plan = VARIANT.plan(problem, H200, TILES[i % len(TILES)])
        found += [plan] if isinstance(plan, Plan) else []
    return found


def marches() -> list[Plan]:
    found = [plan for p in MARCHED for plan in every_march(VARIANT.stem, p, H200)]
    found += [march_of(VARIANT.stem, p, SMALL_CARD) for p in AHEAD]
    return [plan for plan in found if isinstance(plan, Plan)]


def plan_id(plan: Plan) -> str:
    return f"{problem_id(plan.problem)}-{plan.tile}".replace(" ", "").replace(",", "-")


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles all kernels at once, on every core."""
    build.build_many([*plans(), *sample_of_tiles(), *marches()])


@pytest.mark.parametrize("plan", [*plans(), *marches()], ids=plan_id)
def test_results_are_within_rounding_in_any_order_of_threads(plan: Plan) -> None:
    check_in_any_order(plan)


@pytest.mark.parametrize("plan", sample_of_tiles(), ids=plan_id)
def test_every_tile_is_within_rounding(plan: Plan) -> None:
    check(plan, order_seed=1)


def test_no_kernel_spills() -> None:
    problems = [PROBLEMS[i] for i in (0, 1, 2, 4, 10, 13, 17)] + [P(1, 1, (56, 56), (7, 7), padding=same(7, 7))]
    archs = list(PRESETS.values())
    made = [best(p, device) for i, p in enumerate(problems) for device in archs[i % 3 :: 3]]
    for plan, kernel in zip(made, compile_many(made), strict=True):
        resources = kernel.resources
        assert resources.spill_bytes == resources.stack_bytes == 0, f"{plan.problem}, {plan.tile}: {resources}"


def test_no_march_spills() -> None:
    problems = [*MARCHED[::2], P(8, 64, (14, 14), (7, 7), padding=same(7, 7), bias=True)]
    archs = list(PRESETS.values())
    found = [march_of(VARIANT.stem, p, device) for i, p in enumerate(problems) for device in archs[i % 3 :: 3]]
    made = [plan for plan in found if isinstance(plan, Plan)]
    for plan, kernel in zip(made, compile_many(made), strict=True):
        resources = kernel.resources
        assert resources.spill_bytes == resources.stack_bytes == 0, f"{plan.problem}, {plan.tile}: {resources}"


def test_what_marches() -> None:
    def reason(problem: DepthwiseProblem) -> str:
        found = march_of(VARIANT.stem, problem, H200)
        return found.reason if isinstance(found, Rejection) else ""

    assert all(isinstance(march_of(VARIANT.stem, MARCHED[i], H200), Plan) for i in (0, 1, 7, 8, 9, 11, 16, 17))
    for problem in AHEAD:
        found = march_of(VARIANT.stem, problem, SMALL_CARD)
        assert isinstance(found, Plan)
        assert "two items" in found.tile
        assert found.grid[0] == dict(found.constants)["AHEAD"]
    assert "rounded once" in reason(replace(MARCHED[16], epilogue=FULL))
    assert "tensor cores" in reason(P(2, 33, (14, 14), (5, 5), padding=same(5, 5), dtype="float16"))
    assert "float32" in reason(P(1, 2, (28, 28), (7, 7), dtype="float16"))
    assert "neighbouring taps" in reason(P(1, 2, (28, 28), (7, 7), dilation=(1, 2)))
    assert "49" in reason(P(1, 2, (28, 28), (9, 9)))
    assert "see no input" in reason(P(1, 2, (28, 28), (3, 3), padding=((3, 3), (1, 1))))
    assert "neighbours in memory" in reason(P(1, 2, (28, 28), (7, 7), x_strides=(0, 840, 30, 1)))
    assert "as fast without" in reason(P(1, 2, (28, 28), (5, 5), padding=same(5, 5)))
    assert "28 or 56" in reason(P(1, 2, (40, 40), (7, 7), padding=same(7, 7)))


def test_blocks_fit_every_device() -> None:
    problems = [*PROBLEMS, P(128, 96, (56, 56), (7, 7), padding=same(7, 7)), P(1, 1, (500, 900), (11, 11))]
    for device in PRESETS.values():
        for problem in problems:
            for plan in VARIANT.every_plan(problem.lifted(2), device):
                assert plan.shared_bytes < device.shared_bytes
                assert plan.block[0] % 32 == 0


def test_large_images_are_left_to_others_and_few_kernels_serve_all_sizes() -> None:
    found = list(VARIANT.candidates(P(8, 32, (64, 64), (3, 3), padding=same(3, 3)), H200))
    assert all(isinstance(plan, Rejection) and "as fast" in plan.reason for plan in found)
    for taps, padding in ((7, 3), (7, 0), (11, 5)):
        sizes = [(h, w) for h in range(32, 256, 9) for w in range(32, 256, 5)]
        made = {best(P(8, 32, size, (taps, taps), padding=((padding,) * 2,) * 2)).kernel_id for size in sizes}
        assert len(made) <= 2


def test_a_plane_that_fits_in_no_block_is_rejected() -> None:
    plan = VARIANT.plan(P(1, 1, (9000, 300), (3, 3), dilation=(4000, 1)), H200, Tile())
    assert isinstance(plan, Rejection)
    assert "shared memory" in plan.reason
