"""wide_nhwc under the emulator: every dtype, tile and edge of channels-last problems with many taps, and no spills."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import short_problems
from box_tiles import WIDE
from dwconv import emulator, reference
from dwconv.bench.suites import load_suite, select
from dwconv.compile import compile_many, compile_plan
from dwconv.device import H200, PRESETS
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection
from dwconv.problem import DepthwiseProblem, Epilogue, dense_strides
from dwconv.variants.boxes import copies_boxes
from dwconv.variants.wide_images import image_march
from dwconv.variants.wide_nhwc import Tile, WideNhwc
from problems import make_inputs, poisoned

VARIANT = WideNhwc()


problem = partial(short_problems.problem, layout="channels_last")

EDGES = [
    problem(2, 40, (11, 16), 7, padding=3),
    problem(3, 72, (7, 7), 7, padding=3, dtype="float16", bias=True),
    problem(1, 33, (14, 15), 7, padding=3, dtype="bfloat16"),
    problem(1, 20, (9, 8), 7, padding=3, dtype="float64"),
    problem(2, 96, (9, 16), 5, padding=2, dtype="float16"),
    problem(2, 5, (12, 9), 5, padding=2, dtype="float16"),  # odd channels: copies of two bytes
    problem(1, 6, (9, 10), 5, bias=True),
    problem(2, 10, (8, 9), 5, padding=((4, 0), (1, 3)), dtype="float16"),
    problem(1, 34, (16, 70), 5, stride=2, padding=2, dtype="float16"),
    problem(1, 12, (17, 15), 7, stride=(2, 3), padding=3),
    problem(2, 9, (13, 12), 7, stride=(3, 1), padding=((3, 5), (6, 2)), dtype="bfloat16"),
    problem(1, 8, (19, 11), (5, 3), stride=(7, 4), padding=1),  # rows that no output reads
    problem(1, 12, (18, 17), 5, padding=4, dilation=2),
    problem(1, 8, (15, 20), (5, 7), padding=(2, 9), dilation=(1, 3), dtype="float16"),
    problem(1, 8, (21, 17), 5, stride=(2, 3), padding=5, dilation=(3, 2), dtype="float64"),
    # filters in shared memory
    problem(5, 40, (7, 7), 13, padding=6, bias=True),
    problem(2, 16, (14, 14), 27, padding=13, dtype="float16"),
    problem(1, 8, (20, 33), 31, padding=15),
    problem(1, 10, (17, 18), 29, padding=14, dtype="bfloat16"),
    problem(1, 8, (30, 16), (51, 5), padding=(25, 2), dtype="float16"),
    problem(1, 8, (16, 40), (5, 51), padding=(2, 25)),
    problem(1, 8, (13, 12), 11, padding=5, dtype="float64"),
    problem(2, 7, (14, 13), 9, stride=(2, 3), padding=((4, 8), (8, 3))),
    problem(1, 8, (23, 25), 9, padding=12, dilation=(2, 3), dtype="float16"),
    problem(1, 8, (40, 39), 31),
    problem(2, 6, (6, 50), (1, 11), padding=(0, 5), dtype="float16"),
    problem(1, 8, (33, 5), (31, 1), padding=(15, 0)),
    problem(1, 8, (9, 9), (1, 1)),
    # sequences
    DepthwiseProblem(2, 40, (150,), (31,), padding=((15, 15),), dtype="float16", layout="channels_last"),
    DepthwiseProblem(1, 12, (200,), (160,), padding=((159, 0),), layout="channels_last"),
    DepthwiseProblem(2, 8, (90,), (31,), (2,), ((30, 7),), (2,), bias=True, dtype="float64", layout="channels_last"),
    # channel multipliers
    problem(2, 16, (9, 8), 7, padding=3, multiplier=2, dtype="float16"),
    problem(1, 5, (9, 8), 7, padding=3, multiplier=3, bias=True),
    problem(1, 24, (8, 9), 11, padding=5, multiplier=4, dtype="bfloat16"),
    problem(1, 11, (8, 9), 11, padding=5, multiplier=5, dtype="float16"),
    problem(1, 1, (8, 9), 7, padding=3, multiplier=40),
    problem(0, 8, (9, 8), 7, padding=3),
    # tensors that start between vectors, and views: a crop, some of the channels, repeated images
    problem(1, 16, (6, 9), 7, padding=3, aligned=4),
    problem(1, 16, (6, 9), 7, padding=3, aligned=8, dtype="float16"),
    problem(1, 16, (8, 9), 9, padding=4, aligned=2, dtype="float16"),
    problem(2, 8, (7, 8), 7, padding=3, x_strides=(9 * 9 * 8, 1, 9 * 8, 8)),
    problem(2, 8, (7, 8), 7, padding=3, x_strides=(7 * 8 * 24, 1, 8 * 24, 24), dtype="float16"),
    problem(1, 6, (7, 8), 9, padding=4, x_strides=(7 * 9 * 7, 1, 9 * 7, 7), aligned=2, dtype="float16"),
    problem(3, 8, (7, 8), 7, padding=3, x_strides=(0, 1, 8 * 8, 8)),
    # epilogues
    problem(2, 8, (9, 8), 7, padding=3, epilogue=Epilogue("silu", True, True, True), bias=True),
    problem(1, 10, (9, 8), 9, padding=4, epilogue=Epilogue("relu6", shift=True), dtype="float16"),
    problem(1, 8, (9, 8), 7, padding=3, epilogue=Epilogue("gelu", residual=True), dtype="bfloat16", multiplier=2),
]

# Vectors of channels; strips of columns, blocks that begin and end inside of images.
VECTORS = [
    (problem(2, 24, (9, 20), 3, padding=1), Tile(True, 24, 4, threads=36, vector=2, cached=True, part_rows=4)),
    (problem(3, 16, (7, 9), 3, padding=1, dtype="float16"), Tile(True, 16, 7, threads=32, vector=2)),
    (
        problem(5, 16, (7, 7), 3, stride=2, padding=1, dtype="bfloat16", bias=True),
        Tile(True, 16, 4, threads=16, vector=4, stages=4, stage_rows=1, part_rows=5),
    ),
    (problem(2, 20, (6, 11), 3, padding=1), Tile(True, 8, 4, threads=16, vector=4, part_rows=5)),
    (problem(0, 8, (6, 7), 3, padding=1), Tile(True, 8, 7, threads=8, vector=2)),
]

# Beside those that `candidates` yields: other column counts, strips of rows and columns, several units a block.
TILES = [
    Tile(True, 8, 7, threads=16, part_rows=4, stages=2, stage_rows=2),
    Tile(True, 40, 4, threads=80, part_rows=5),
    Tile(True, 96, 7, threads=192, stages=2, stage_rows=1),
    Tile(False, 16, 5, 3, 4, threads=48, stages=2, stage_rows=4),
    Tile(False, 8, 7, 2, 8, threads=32, stages=3, part_rows=4),
    Tile(False, 32, 4, 4, 64, threads=128, part_rows=16),
]


def name(p: DepthwiseProblem) -> str:
    return str(p).replace(" ", "_").replace(",", "")


def plans(p: DepthwiseProblem) -> list[Plan]:
    """What would be chosen, and one of TILES: in turn, so that each meets many problems."""
    lifted = p.lifted(2)
    assert VARIANT.unsupported(lifted) is None
    offered = [plan for plan in VARIANT.candidates(lifted, H200) if isinstance(plan, Plan)]
    found = [min(offered, key=lambda plan: plan.predicted_seconds)]
    turn = EDGES.index(p) if p in EDGES else 0
    others = (VARIANT.plan(lifted, H200, TILES[(turn + k) % len(TILES)]) for k in range(len(TILES)))
    found += [plan for plan in others if isinstance(plan, Plan)][:1]
    return [replace(plan, problem=p) for plan in found]


def per_channel(p: DepthwiseProblem, seed: int) -> torch.Tensor:
    return torch.randn(p.out_channels, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, p.dtype))


def run(plan: Plan, inputs, extra=(None, None, None), order_seed=None) -> torch.Tensor:
    """The plan's result; nothing around it may have changed."""
    p = plan.problem
    dtype, margin = getattr(torch, p.dtype), 0 if build.sanitizing() else 64
    front = margin + p.aligned % 16 // p.element_bytes
    elements = math.prod(p.y_shape)
    memory = poisoned(front + elements + margin, dtype)
    y = memory[front : front + elements].as_strided(p.y_shape, dense_strides(p.y_shape, p.layout))
    emulator.run(plan, *inputs, y, *extra, order_seed=order_seed)
    guards = torch.cat([memory[:front], memory[front + elements :]]).view(torch.uint8)
    assert bool((guards == 0xFF).all()), "the kernel wrote outside of y"
    return y


def extras(p: DepthwiseProblem):
    e = p.epilogue
    residual = None
    if e.residual:
        memory = torch.randn(math.prod(p.y_shape), generator=torch.Generator().manual_seed(9))
        residual = memory.to(getattr(torch, p.dtype)).as_strided(p.y_shape, dense_strides(p.y_shape, p.layout))
    return per_channel(p, 7) if e.scale else None, per_channel(p, 8) if e.shift else None, residual


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.int16)


@pytest.fixture(scope="module", autouse=True)
def built():
    build.build_many([plan for p in EDGES for plan in plans(p)])


@pytest.mark.parametrize("p", EDGES, ids=name)
def test_every_tile_is_within_rounding_in_any_order(p):
    inputs = make_inputs(p)
    if inputs[0].numel() and p.epilogue == Epilogue():
        for i, value in enumerate((math.inf, -math.inf, math.nan)):
            place = torch.Generator().manual_seed(i)
            inputs[0][tuple(int(torch.randint(size, (), generator=place)) for size in p.x_shape)] = value
    extra = extras(p)
    wanted = reference.forward(*inputs, p, *extra)
    assert plans(p)
    for number, plan in enumerate(plans(p)):
        y = run(plan, inputs, extra)
        assert reference.describe_mismatch(y, *wanted) is None, plan.tile
        again = run(plan, inputs, extra, order_seed=number)
        assert torch.equal(bits(y), bits(again)), plan.tile


@pytest.mark.parametrize(("p", "tile"), VECTORS + WIDE, ids=lambda value: name(value))
def test_vectors_of_channels_and_boxes(p, tile):
    plan = VARIANT.plan(p, H200, tile)
    assert isinstance(plan, Plan), plan
    inputs, extra = make_inputs(p), extras(p)
    wanted = reference.forward(*inputs, p, *extra)
    y = run(plan, inputs, extra)
    assert reference.describe_mismatch(y, *wanted) is None
    assert torch.equal(bits(y), bits(run(plan, inputs, extra, order_seed=3)))


@pytest.mark.parametrize(
    ("p", "tile", "reason"),
    [
        (problem(1, 5, (9, 9), 3, padding=1), Tile(True, 5, 7, vector=2), "vector"),
        (problem(1, 8, (9, 9), 3, padding=1, multiplier=2), Tile(True, 16, 7, vector=2), "vector"),
        (problem(1, 12, (9, 9), 3, padding=1, dtype="float16"), Tile(True, 32, 7, boxes=True), "at once"),
        (problem(1, 32, (9, 9), 3, padding=1, aligned=8), Tile(True, 32, 7, boxes=True), "at once"),
        (problem(3, 32, (7, 8), 3, x_strides=(0, 1, 8 * 32, 32)), Tile(True, 32, 7, boxes=True), "at once"),
        (problem(0, 32, (9, 9), 3), Tile(True, 32, 7, boxes=True), "at once"),
        (problem(1, 8, (5, 5), 3), Tile(True, 8, 7, boxes=True), "at once"),  # a block of less than a warp
        (problem(1, 24, (9, 40), 3), Tile(True, 24, 4, boxes=True, out_boxes=True), "at once"),
    ],
    ids=str,
)
def test_what_vectors_and_boxes_need(p, tile, reason):
    assert reason in VARIANT.plan(p, H200, tile).reason


def test_a_gradient_of_x_comes_and_leaves_as_boxes():
    p = problem(2, 40, (9, 8), 5, padding=((4, 0), (1, 3)), reversed=True)
    plan = VARIANT.plan(p, H200, Tile(True, 32, 4, threads=64, boxes=True, out_boxes=True))
    assert isinstance(plan, Plan), plan
    x, w, _ = make_inputs(p)
    wanted = reference.forward(x, w.flip(2, 3), None, replace(p, reversed=False))
    assert reference.describe_mismatch(run(plan, (x, w, None)), *wanted) is None


def test_boxes_are_for_devices_that_have_them():
    p, tile = problem(8, 96, (28, 28), 7, padding=3), Tile(True, 32, 7, boxes=True, out_boxes=True)
    assert {arch for arch in PRESETS if isinstance(VARIANT.plan(p, PRESETS[arch], tile), Plan)} == {
        arch for arch, device in PRESETS.items() if copies_boxes(device)
    }
    for device in PRESETS.values():
        offered = [plan for plan in VARIANT.candidates(p, device) if isinstance(plan, Plan)]
        assert offered
        assert all(bool(plan.maps) == copies_boxes(device) for plan in offered)


IMAGES = [
    (n, p)
    for suite in ("models", "kernelbench")
    for n, p in select(load_suite(suite), [], ["float32", "float16"], ["channels_last"], ["forward"])
    if p.dims == 2 and image_march(p, H200)
]


def test_blocks_of_one_image_each_are_legal_and_fit():
    """Tiles that were measured with these layers, and nothing else would reject."""
    assert len(IMAGES) > 20
    found = []
    for _, p in IMAGES:
        plan = VARIANT.plan(p, H200, image_march(p, H200))
        assert isinstance(plan, Plan), plan
        assert plan.maps
        found.append(plan)
    for resources in (kernel.resources for kernel in compile_many(found[::4])):
        assert resources.spill_bytes == resources.stack_bytes == 0
    assert image_march(IMAGES[0][1], PRESETS["sm_80"]) is None


@pytest.mark.parametrize(
    "p",
    [
        problem(5, 40, (12, 14), 5, padding=2, bias=True),
        problem(4, 96, (7, 7), 7, padding=3),
        problem(5, 72, (30, 9), 3, padding=1),
        problem(4, 40, (13, 15), 3, stride=2, padding=1),
        problem(5, 40, (16, 31), 5, stride=2, padding=2, dtype="float16"),
        problem(4, 96, (14, 13), 5, stride=2, padding=2, dtype="bfloat16"),
    ],
    ids=name,
)
def test_blocks_of_one_image_each(p):
    plan = VARIANT.plan(p, H200, image_march(p, H200))
    assert isinstance(plan, Plan), plan
    inputs = make_inputs(p)
    assert reference.describe_mismatch(run(plan, inputs, order_seed=2), *reference.forward(*inputs, p)) is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_finite_inputs(dtype):
    """Without an Inf, whose NaNs hide errors of their neighbours."""
    for p in (problem(2, 20, (16, 17), 7, padding=3, dtype=dtype), problem(2, 9, (12, 17), 13, padding=6, dtype=dtype)):
        inputs = make_inputs(p, seed=4)
        wanted = reference.forward(*inputs, p)
        for plan in plans(p):
            assert reference.describe_mismatch(run(plan, inputs), *wanted) is None, plan.tile


def test_what_others_serve_is_rejected_with_a_reason():
    far = problem(1, 8, (2, 3), 3, padding=((5, 0), (0, 7)))
    found = list(VARIANT.candidates(far, H200))
    assert found
    assert all(isinstance(one, Rejection) and "padding" in one.reason for one in found)


SAMPLE = [
    (problem(8, 96, (56, 56), 7, padding=3, dtype="float16"), "sm_90"),
    (problem(8, 96, (28, 28), 7, padding=3, dtype="bfloat16", epilogue=Epilogue("gelu", residual=True)), "sm_90"),
    (problem(8, 96, (56, 56), 5, stride=2, padding=2), "sm_90"),
    (problem(8, 96, (56, 56), 31, padding=15, dtype="float64"), "sm_90"),
    (problem(8, 96, (7, 7), 13, padding=6, dtype="float16"), "sm_90"),
    (problem(8, 96, (1, 1000), (1, 31), padding=(0, 15), dtype="float16"), "sm_90"),
    *((problem(8, 96, (56, 56), 7, padding=3, dtype="float16"), arch) for arch in PRESETS if arch != "sm_90"),
    *((problem(8, 96, (56, 56), 31, padding=15), arch) for arch in PRESETS if arch != "sm_90"),
]


@pytest.mark.parametrize(("p", "arch"), SAMPLE, ids=lambda value: value if isinstance(value, str) else name(value))
def test_nothing_spills(p, arch):
    found = [plan for plan in VARIANT.candidates(p, PRESETS[arch]) if isinstance(plan, Plan)]
    assert found
    for plan in found:
        resources = compile_plan(plan).resources
        assert resources.spill_bytes == resources.stack_bytes == 0, plan.tile
