"""volume_ndhwc under the emulator: every dtype, tile and edge of 3-D channels-last problems, and no spills."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dwconv import reference
from dwconv.compile import compile_plan
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection, fast_divisor
from dwconv.problem import DepthwiseProblem
from dwconv.variants import REGISTRY
from dwconv.variants.volume_ndhwc import VolumeNdhwc
from dwconv.variants.volumes import Tile
from problems import problem_id
from volume_problems import EVERYTHING, Case, cropped, edges
from volume_problems import problem as any_problem


def problem(*arguments, **more) -> DepthwiseProblem:
    return any_problem(*arguments, layout="channels_last", **more)


VARIANT = VolumeNdhwc()
ONE_MULTIPROCESSOR = replace(H200, multiprocessors=1)  # so that a block's share of planes ends inside of tiles

EDGES = edges(
    "channels_last",
    [
        (cropped(problem(2, 8, (4, 6, 12), (3, 3, 3), padding=1), 8), ("float32", "float16")),
        (cropped(problem(1, 3, (4, 6, 9), (3, 3, 3), padding=1), 1), ("bfloat16",)),
        (problem(1, 64, (3, 5, 9), (3, 3, 3), padding=1), ("float32", "bfloat16")),  # two chunks of channels
        (problem(1, 54, (3, 5, 9), (3, 3, 3), padding=1), ("float16",)),
        (problem(1, 100, (3, 4, 6), (3, 3, 3), padding=1), ("float32",)),  # the last chunk is not full
        (problem(1, 7, (3, 4, 6), (3, 3, 3), padding=1), ("float64", "bfloat16")),
        (problem(1, 54, (3, 5, 9), (5, 5, 5), padding=2, bias=True), ("float16",)),  # 9 pairs of channels a block
        (problem(1, 3, (4, 6, 9), (3, 7, 7), padding=(1, 3, 3), epilogue=EVERYTHING), ("bfloat16",)),  # a lone channel
        (
            cropped(problem(2, 20, (4, 9, 12), (2, 5, 4), padding=2, dilation=2), 8),
            ("float16",),
        ),  # the last pairs are missing
    ],
)
SAMPLE = [
    problem(2, 3, (5, 9, 20), (3, 3, 3), padding=1, dtype="float32"),
    problem(1, 3, (5, 9, 20), (3, 3, 3), padding=1, dtype="bfloat16", bias=True),
    problem(1, 2, (6, 9, 12), (5, 5, 5), padding=2, dtype="float16"),
    problem(1, 2, (7, 9, 16), (3, 3, 3), stride=2, padding=1, dtype="float16"),
    problem(1, 2, (9, 8, 12), (3, 3, 3), padding=2, dilation=2, dtype="float16"),
]
TILES = [
    Tile(2, threads=64, resident=3, spots_x=2),
    Tile(4, resident=2, stages=2),
    Tile(1, rotate=True, unroll=True, batch=1),
    Tile(2, vector=2, spots_x=4),
    Tile(2, vector=2, load_vector=8, spots_x=2),
    Tile(4, matrix=True, resident=3),
    Tile(1, 8, matrix=True, resident=2, stages=2, unroll=True),
    Tile(2, matrix=True, held=True, rotate=True),
    Tile(8, 1, cubes=True, stages=2),
    Tile(8, 2, cubes=True),
    Tile(8, 4, cubes=True),
]
# For cubes of outputs: rows that are one stretch of memory, copied 16, 8 and 4 bytes at a time, and others; the last
# pixels, rows, planes and channels of tiles are missing; filters of fewer taps.
CUBES = [
    problem(1, 54, (5, 11, 12), (3, 3, 3), padding=1, dtype="float16"),
    problem(2, 6, (4, 9, 20), (3, 3, 3), padding=1, dtype="bfloat16", bias=True),
    problem(1, 2, (1, 3, 30), (3, 3, 3), padding=1, dtype="float16"),
    problem(2, 10, (5, 17, 9), (3, 3, 3), padding=((0, 2), (2, 1), (1, 0)), dtype="float16", epilogue=EVERYTHING),
    problem(1, 6, (2, 4, 8), (3, 3, 3), padding=((4, 0), (0, 5), (6, 1)), dtype="float16"),  # padding over the filter
    problem(1, 64, (3, 9, 10), (3, 3, 3), padding=1, dtype="bfloat16"),  # two chunks of channels
    problem(1, 100, (2, 5, 6), (3, 3, 3), dtype="float16", padding=1),  # the last chunk is not full
    cropped(problem(2, 20, (4, 9, 12), (2, 3, 1), padding=((1, 0), (4, 0), (0, 5)), dtype="float16"), 8),
]


def first(p: DepthwiseProblem) -> Plan:
    """The plan that the variant itself prefers."""
    return next(plan for plan in VARIANT.candidates(p, H200) if isinstance(plan, Plan))


def brief(p: DepthwiseProblem) -> Plan:
    """The same without what only makes the kernel longer, and slow to build for the emulator."""
    tiles = (replace(tile, rotate=False, unroll=False, rows=1) for tile in VARIANT.tiles(p))
    return next(plan for tile in tiles if isinstance(plan := VARIANT.plan(p, H200, tile), Plan))


def more_plans(p: DepthwiseProblem) -> list[Plan]:
    """Plans of tiles that candidates leave out, with shares of planes that end anywhere."""
    tiles = [replace(tile, reload=p.stride[0] > p.filter[0]) for tile in TILES]
    plans = (VARIANT.plan(p, ONE_MULTIPROCESSOR, tile) for tile in tiles)
    return [plan for plan in plans if isinstance(plan, Plan)]


def in_parts(plan: Plan, share: int) -> Plan:
    """A plan of cubes whose blocks make `share` output planes each."""
    parts = -(-plan.problem.out_size[0] // share)
    before = plan.tiling[6]
    tiling = (*plan.tiling[:6], *fast_divisor(parts), *plan.tiling[9:-2], share, plan.tiling[-1])
    return replace(plan, tiling=tiling, grid=(plan.grid[0] // before * parts, 1, 1))


def bits(y: torch.Tensor) -> torch.Tensor:
    return y.contiguous().view(torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def built():
    build.build_many([brief(p) for p in EDGES])


@pytest.mark.parametrize("p", EDGES, ids=problem_id)
def test_result_is_within_rounding(p):
    assert Case(p).mismatch(brief(p)) is None


@pytest.mark.parametrize("p", EDGES, ids=problem_id)
def test_non_finite_inputs_reach_their_windows_only(p):
    assert Case(p, seed=2, not_finite=True).mismatch(brief(p)) is None


@pytest.mark.parametrize("p", SAMPLE, ids=problem_id)
def test_order_of_threads_does_not_matter(p):
    case, plan = Case(p, seed=1), brief(p)
    expected = case.run(plan)
    for order_seed in (0, 1):
        assert torch.equal(bits(case.run(plan, order_seed)), bits(expected))


@pytest.mark.parametrize("p", SAMPLE, ids=problem_id)
def test_every_tile_is_within_rounding(p):
    case = Case(p, seed=3, not_finite=True)
    plans = {plan.constants: plan for plan in VARIANT.every_plan(p, H200)} | {q.constants: q for q in more_plans(p)}
    assert len(plans) > 3
    build.build_many(plans.values())
    for plan in plans.values():
        assert case.mismatch(plan, order_seed=3) is None


@pytest.mark.parametrize("p", CUBES, ids=problem_id)
def test_cubes_are_within_rounding(p):
    tiles = (Tile(8, columns, cubes=True, stages=stages) for columns, stages in ((1, 2), (2, 3)))
    plans = [plan for tile in tiles if isinstance(plan := VARIANT.plan(p, ONE_MULTIPROCESSOR, tile), Plan)]
    plans.append(in_parts(plans[0], 2))
    build.build_many(plans)
    for not_finite in (False, True):
        case = Case(p, seed=4, not_finite=not_finite)
        for plan in plans:
            for order_seed in (None, 4):
                assert case.mismatch(plan, order_seed) is None


def test_cubes_keep_not_finite_filters_where_they_belong():
    p = problem(1, 6, (4, 9, 10), (3, 3, 3), padding=1, dtype="float16")
    case = Case(p, seed=5)
    x, weight, bias = case.inputs
    weight[1, 0, 0, 2, 1], weight[4, 0, 2, 1, 1] = float("inf"), float("nan")
    case.expected = reference.forward(x, weight, bias, p)
    plan = VARIANT.plan(p, H200, Tile(8, 2, cubes=True))
    assert isinstance(plan, Plan)
    assert case.mismatch(plan) is None


@pytest.mark.parametrize("channels", [2, 18, 32, 54, 64, 108])
def test_cubes_do_not_spill(channels):
    p = problem(8, channels, (16, 56, 56), (3, 3, 3), padding=1, dtype="bfloat16", bias=True)
    for plan in (VARIANT.plan(p, H200, tile) for tile in VARIANT.tiles(p) if tile.cubes):
        if isinstance(plan, Plan):
            resources = compile_plan(plan).resources
            assert resources.spill_bytes == 0
            assert resources.stack_bytes == 0


@pytest.mark.parametrize("device", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("p", SAMPLE[:3], ids=problem_id)
def test_nothing_spills(p, device):
    large = replace(p, batch=8, channels=64, size=(16, 56, 56))
    plan = next(plan for plan in VARIANT.candidates(large, device) if isinstance(plan, Plan))
    resources = compile_plan(plan).resources
    assert resources.spill_bytes == 0
    assert resources.stack_bytes == 0


def test_sizes_compile_few_kernels():
    kernels = {
        first(problem(2, 32, (size // 4, size, size), (3, 3, 3), padding=1, dtype="float16")).kernel_id
        for size in range(32, 256, 8)
    }
    assert len(kernels) <= 4


def test_rejections_say_why():
    def reason(p: DepthwiseProblem, tile: Tile, device=H200) -> str:
        found = VARIANT.plan(p, device, tile)
        assert isinstance(found, Rejection)
        return found.reason

    p = problem(1, 6, (6, 9, 16), (3, 3, 3), padding=1, dtype="float16")
    assert "multiplier" in reason(replace(p, multiplier=2), Tile(2, vector=2))
    assert "multiplier" in reason(replace(p, multiplier=2), Tile(2, matrix=True))
    assert "multiplier" in reason(replace(p, multiplier=2), Tile(8, 2, cubes=True))
    assert "even number" in reason(replace(p, channels=5), Tile(8, 2, cubes=True))
    assert "stride" in reason(replace(p, stride=(1, 1, 2)), Tile(8, 2, cubes=True))
    assert "words" in reason(replace(p, aligned=2), Tile(8, 2, cubes=True))
    assert "16-bit" in reason(replace(p, dtype="float32"), Tile(2, matrix=True))
    assert "16-bit" in reason(replace(p, dtype="float32"), Tile(8, 2, cubes=True))
    assert "sm_75" in reason(p, Tile(2, matrix=True), PRESETS["sm_75"])
    assert "aligned" in reason(replace(p, aligned=2), Tile(2, vector=2))
    assert "reads its own" in reason(replace(p, stride=(3, 1, 1)), Tile(4))
    assert "stride of 1" in reason(replace(p, stride=(2, 1, 1)), Tile(4, held=True))
    assert "registers" in reason(replace(p, filter=(7, 7, 7), padding=((3, 3),) * 3), Tile(8))
    huge = problem(1, 1, (3, 2**16, 2**16), (3, 3, 3), padding=1)
    assert "31 bits" in reason(huge, Tile(4))
    assert REGISTRY["volume_ndhwc"].unsupported(replace(p, layout="channels_first"))
