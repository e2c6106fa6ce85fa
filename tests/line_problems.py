"""What tests of gradients of filters share, and small problems at the edges of what kernels by lines take."""

from __future__ import annotations

from dataclasses import replace

import short_problems
from dwconv.device import H200
from dwconv.emulator import build
from dwconv.plan import Plan, Rejection
from dwconv.problem import DepthwiseProblem, Layout
from dwconv.variants.strips import depth_taps, planar
from dwconv.variants.taps_lines import LinesVariant
from dwconv.variants.taps_lines_tiles import Cut, Tile


def problem(layout: Layout, n, c, size, taps, stride=1, padding=0, dilation=1, dtype="float16", **more):
    """A grad_weight problem; one number stands for all dimensions."""
    steps = stride, padding, dilation
    return short_problems.problem(n, c, size, taps, *steps, dtype=dtype, layout=layout, direction="grad_weight", **more)


def edges(layout: Layout) -> list[DepthwiseProblem]:
    """Problems of every kind that both variants take: constants are compiled in, so that each is a compilation."""

    def p(*args, **more):
        return problem(layout, *args, **more)

    more = layout == "channels_last"  # where pairs of channels must be words
    return [
        p(2, 72, (14, 14), 3, padding=1),
        p(3, 40, (7, 7), 5, padding=2, dtype="bfloat16", bias=True),
        p(9, 16, (4, 4), 3, padding=1),  # the last lines of a step have no image
        p(2, 33 + more, (12, 9), 5, padding=2),  # odd channels, odd rows: copies of two bytes; channels last, of four
        p(1, 10, (9, 40), (3, 7), padding=(1, 3), dtype="bfloat16", bias=True),
        p(1, 8, (6, 300), 3, padding=1),  # wider than a line
        p(2, 8, (9, 9), 1, stride=2, dtype="bfloat16"),
        # strides and dilations, with a common divisor and without
        p(1, 24, (17, 23), 3, stride=2, padding=1),
        p(1, 8, (19, 21), (2, 3), stride=(5, 4), padding=1, dtype="bfloat16"),
        p(1, 16, (15, 18), 3, padding=2, dilation=2, dtype="bfloat16"),
        p(1, 16, (13, 29), 3, padding=6, dilation=6),
        p(1, 8, (26, 33), 3, stride=(4, 3), padding=5, dilation=(6, 2), bias=True),
        # tiles of taps
        p(1, 8, (9, 40), (5, 51), padding=(2, 25), bias=True),
        p(1, 8, (9, 100), (2, 70), padding=(1, 35), dtype="bfloat16"),
        # sequences
        p(3, 40, (1, 50), (1, 4), padding=(0, (3, 0)), bias=True),
        p(1, 12, (1, 100), (1, 96), padding=(0, (95, 0))),
        p(2, 16, (1, 41), (1, 9), stride=(1, 2), padding=(0, 9), dilation=(1, 3), dtype="bfloat16"),
        # multipliers: neighbouring outputs read one input
        p(2, 16, (9, 8), 3, padding=1, multiplier=2),
        p(1, 5 + more, (9, 8), 3, padding=1, multiplier=4, dtype="bfloat16", bias=True),
        # a tensor that starts between vectors
        p(1, 16, (6, 16), 3, padding=1, aligned=4, dtype="bfloat16"),
        # volumes: padding, strides and dilations of the depth
        p(2, 24, (4, 7, 9), 3, padding=1, bias=True),
        p(1, 8, (9, 8, 11), (3, 3, 5), stride=(2, 1, 2), padding=2, dilation=(3, 1, 1), dtype="bfloat16", bias=True),
        p(3, 8, (2, 5, 6), (2, 3, 3), padding=((4, 3), (1, 1), (1, 1))),
    ]


def layers(layout: Layout) -> list[DepthwiseProblem]:
    """Layers of networks, too large for the emulator."""

    def p(*args, **more):
        return problem(layout, *args, **more)

    return [
        p(128, 144, (56, 56), 3, padding=1),
        p(128, 144, (56, 56), 5, stride=2, padding=2, dtype="bfloat16"),
        p(128, 384, (14, 14), 7, padding=3, bias=True),
        p(128, 768, (7, 7), 7, padding=3),
        p(32, 128, (56, 56), 31, padding=15),
        p(8, 4096, (1, 2048), (1, 4), padding=(0, (3, 0)), dtype="bfloat16"),
        p(8, 54, (16, 56, 56), 3, padding=1),
    ]


def plan_of(variant: LinesVariant, given: DepthwiseProblem, tile: Tile) -> Plan:
    plan = variant.plan(given, H200, tile)
    assert isinstance(plan, Plan), plan
    return plan


def plans_of(variant: LinesVariant, problems: list[DepthwiseProblem]) -> list[Plan]:
    """A plan of each problem: the best one, and of every second problem the last one that is worth timing."""
    found = [variant.every_plan(each, H200) for each in problems]
    for each, plans in zip(problems, found, strict=True):
        assert plans, list(variant.candidates(each, H200))
    return [plans[-(number % 2)] for number, plans in enumerate(found)]


def without_repair(plan: Plan) -> Plan:
    """The plan without its second computation of sums that aren't finite."""
    return replace(plan, constants=tuple((name, 0 if name == "REPAIR" else value) for name, value in plan.constants))


def name(plan: Plan) -> str:
    return f"{plan.problem}-{plan.tile}".replace(" ", "")


def cut_of(variant: LinesVariant, given: DepthwiseProblem, tile: Tile) -> Cut:
    one = variant.cut(planar(given), H200, tile, depth_taps(given))
    assert isinstance(one, Cut), one
    return one


def assert_in_kernel(plan: Plan, numbers: dict[str, int]) -> None:
    """Fails to compile where an expression in the kernel's W, for the constants of a plan, isn't the number."""
    text, entry, _ = build.kernel_text(plan.variant).partition('extern "C" __global__')
    assert entry
    kind = {"taps_sparse_nhwc": "TapsSparse", "taps_matrix_nchw": "TapsMatrix"}[plan.variant]
    text += f"using W = dwconv::{kind}<Config>;\n"
    text += "".join(f'static_assert({each} == {n}, "{each} is not {n}");\n' for each, n in numbers.items())
    text += entry + " void dwconv_kernel(const dwconv::Sizes) {}\n"
    build.load(text, plan.constants, "constants of a kernel")


def reason(found: Plan | Rejection) -> str:
    assert isinstance(found, Rejection), found
    return found.reason
