"""Small 3-D problems at the edges of what volume_ncdhw and volume_ndhwc take, and how their tests run a plan."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dwconv import emulator, reference
from dwconv.emulator import build
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem, Epilogue, Layout, dense_strides
from problems import POISON, first_offset, make_inputs, poisoned
from short_problems import problem

DTYPES = ("float32", "float16", "bfloat16", "float64")


EVERYTHING = Epilogue("silu", scale=True, shift=True, residual=True)
P = problem

# (problem, dtypes): constants are compiled in, so that each line costs a compilation a dtype
EDGES: list[tuple[DepthwiseProblem, tuple[str, ...]]] = [
    (P(2, 3, (5, 9, 20), (3, 3, 3), padding=1), DTYPES),
    (P(1, 2, (4, 7, 17), (3, 3, 3), padding=1, bias=True), ("float32", "float16")),  # odd rows
    (P(1, 6, (1, 1, 1), (3, 3, 3), padding=1), ("float32",)),
    (P(1, 2, (3, 18, 70), (3, 3, 3), padding=1), ("bfloat16",)),  # several tiles of columns
    (P(0, 3, (5, 9, 20), (3, 3, 3), padding=1), ("float32",)),
    (P(3, 5, (6, 7, 7), (3, 3, 3), padding=1), ("float16",)),  # several volumes in a block
    (P(1, 3, (7, 6, 8), (3, 3, 3)), ("float32",)),
    (P(1, 2, (6, 9, 12), (5, 5, 5), padding=2), ("float32", "float16", "float64")),
    (P(1, 3, (20, 5, 15), (5, 5, 5), padding=2, bias=True), ("float32",)),  # rows of eight outputs, planes to all sums
    (P(2, 2, (9, 3, 16), (5, 5, 5), padding=((7, 6), (2, 2), (2, 2))), ("float32",)),  # outputs of padding alone
    (P(1, 2, (2, 5, 8), (5, 3, 3), padding=((4, 3), (1, 1), (1, 1)), dilation=(2, 1, 1)), ("float32",)),
    (P(1, 2, (3, 5, 8), (5, 3, 3), stride=(2, 1, 1), padding=((4, 4), (1, 1), (1, 1))), ("float32", "float64")),
    (P(1, 2, (8, 5, 10), (3, 5, 2), padding=((0, 3), (2, 1), (1, 0))), ("float16",)),
    (P(2, 4, (4, 8, 16), (1, 3, 3), padding=(0, 1, 1)), ("float32", "float16")),
    (P(2, 4, (6, 5, 16), (3, 1, 1), padding=(1, 0, 0)), ("float16", "float64")),
    (P(1, 3, (4, 6, 9), (1, 1, 1)), ("float32",)),
    (P(1, 2, (7, 8, 9), (7, 7, 7), padding=3), ("float32",)),
    (P(1, 2, (7, 9, 16), (3, 3, 3), stride=2, padding=1), ("float32", "float16")),
    (P(1, 2, (9, 11, 16), (5, 3, 3), stride=(2, 2, 3), padding=1), ("bfloat16",)),
    (P(1, 2, (9, 7, 8), (2, 3, 3), stride=(3, 1, 2), padding=1), ("float32",)),
    (P(1, 2, (6, 9, 16), (3, 3, 3), stride=(1, 2, 2), padding=1), ("float16",)),
    (P(1, 2, (9, 8, 12), (3, 3, 3), padding=2, dilation=2), ("float32", "float16")),
    (P(1, 2, (11, 8, 12), (3, 3, 3), stride=(2, 1, 1), padding=3, dilation=(3, 1, 2)), ("float32",)),
    (P(1, 1, (2, 3, 4), (3, 3, 3), padding=((4, 0), (0, 5), (6, 1))), ("float32",)),  # padding over the filter
    (P(2, 3, (5, 6, 12), (3, 3, 3), padding=1, multiplier=2, bias=True), ("float32", "float16")),
    (P(1, 4, (4, 6, 8), (3, 3, 3), padding=1, aligned=4), ("float32", "float16")),
    (P(1, 4, (4, 6, 8), (3, 3, 3), padding=1, aligned=2), ("bfloat16",)),
    (P(2, 4, (5, 6, 8), (3, 3, 3), padding=1, bias=True, epilogue=EVERYTHING), ("float32", "float16")),
    (P(1, 2, (4, 6, 8), (5, 5, 5), padding=2, epilogue=Epilogue("relu", residual=True)), ("bfloat16",)),
]


def edges(layout: Layout, more: list[tuple[DepthwiseProblem, tuple[str, ...]]]) -> list[DepthwiseProblem]:
    """EDGES and some more, in a layout, in each of their dtypes."""
    return [replace(p, layout=layout, dtype=dtype) for p, dtypes in [*EDGES, *more] for dtype in dtypes]


def cropped(p: DepthwiseProblem, gap: int) -> DepthwiseProblem:
    """The problem on a view of an image that is larger by `gap` in every direction, channels last also in channels."""
    channels = p.channels + (gap if p.layout == "channels_last" else 0)
    return replace(p, x_strides=dense_strides((p.batch, channels, *(s + gap for s in p.size)), p.layout))


def per_channel(p: DepthwiseProblem, seed: int, wanted: bool) -> Tensor | None:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(p.out_channels, generator=random).to(getattr(torch, p.dtype)) if wanted else None


def like_y(p: DepthwiseProblem, fill: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """(tensor, memory, elements before it): a tensor as y between zones of poison, or at its memory's very end."""
    dtype, margin = getattr(torch, p.dtype), 0 if build.sanitizing() else 64
    front, elements = margin + first_offset(p), math.prod(p.y_shape)
    memory = poisoned(front + elements + margin, dtype)
    view = memory.as_strided(p.y_shape, dense_strides(p.y_shape, p.layout), front)
    if fill is not None:
        view.copy_(fill)
    return view, memory, front


class Case:
    """A problem with tensors for it and its exact result."""

    def __init__(self, p: DepthwiseProblem, seed: int = 0, not_finite: bool = False) -> None:
        x, weight, bias = make_inputs(p, seed)
        if not_finite and x.numel():
            random = torch.Generator().manual_seed(seed)
            for value in (math.inf, -math.inf, math.nan):
                x[tuple(int(torch.randint(size, (), generator=random)) for size in p.x_shape)] = value
        e, random = p.epilogue, torch.Generator().manual_seed(seed + 1)
        residual = like_y(p, torch.randn(p.y_shape, generator=random))[0] if e.residual else None
        self.problem = p
        self.inputs = (x, weight, bias)
        self.more = (per_channel(p, seed + 2, e.scale), per_channel(p, seed + 3, e.shift), residual)
        self.expected = reference.forward(*self.inputs, p, *self.more)

    def run(self, plan: Plan, order_seed: int | None = None) -> Tensor:
        """The plan's result; nothing around it may have changed."""
        y, memory, front = like_y(self.problem, None)
        emulator.run(plan, *self.inputs, y, *self.more, order_seed=order_seed)
        for zone in (memory[:front], memory[front + y.numel() :]):
            assert bool((zone.view(torch.uint8) == POISON).all()), "the kernel wrote outside of y"
        return y

    def mismatch(self, plan: Plan, order_seed: int | None = None) -> str | None:
        wrong = reference.describe_mismatch(self.run(plan, order_seed), *self.expected)
        return f"{plan.tile}: {wrong}" if wrong else None
