"""Small problems at the edges of what is allowed, with tensors for them; CPU and GPU tests share them.

Filter, stride, padding, dilation, multiplier and bias are compiled in, so problems repeat them where they can: the
sizes are what differs. The lists are of float32, channels first; `in_kind` makes other dtypes and layouts of them, and
`every_kind` is the selection that tests run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dwconv.problem import (
    ACTIVATIONS,
    DTYPE_BYTES,
    DepthwiseProblem,
    Direction,
    Epilogue,
    Layout,
    contiguous_strides,
    dense_strides,
)

POISON = 0xFF  # every byte of memory that nobody may read or that a kernel must overwrite: a NaN in each dtype
LAYOUTS: tuple[Layout, ...] = ("channels_first", "channels_last")
NO_EPILOGUE = Epilogue()


def _problem(
    batch: int,
    channels: int,
    size: tuple[int, ...],
    filter: tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | tuple[int, ...] = 1,
    multiplier: int = 1,
    bias: bool = False,
    aligned: int = 16,
    x_strides: tuple[int, ...] = (),
    layout: Layout = "channels_first",
    epilogue: Epilogue = NO_EPILOGUE,
) -> DepthwiseProblem:
    def each(value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * len(size) if isinstance(value, int) else value

    pads = (padding,) * len(size) if isinstance(padding, int) else padding
    return DepthwiseProblem(
        batch=batch,
        channels=channels,
        size=size,
        filter=filter,
        stride=each(stride),
        padding=tuple((pad, pad) if isinstance(pad, int) else pad for pad in pads),
        dilation=each(dilation),
        multiplier=multiplier,
        bias=bias,
        aligned=aligned,
        x_strides=x_strides,
        layout=layout,
        epilogue=epilogue,
    )


_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 28, 31, 32, 33, 47, 56, 63, 64, 65, 66, 68, 69, 70)
# What a vector of channels is made of in channels-last memory: whole ones, halves, odd ends.
_CHANNELS = (1, 3, 4, 5, 6, 7, 8, 12, 15, 16, 17, 20, 24, 32, 40, 63, 64, 66, 72, 136)


def _edge_2d() -> list[DepthwiseProblem]:
    p = _problem
    found = [p(1, 2, (5, width), (3, 3), padding=1) for width in _WIDTHS]
    found += [p(1, 1, (height, 12), (3, 3), padding=1) for height in (1, 2, 3, 9, 17)]
    found += [p(1, channels, (4, 6), (3, 3), padding=1) for channels in _CHANNELS]
    found += [
        # without padding, as KernelBench has it
        p(2, 3, (7, 34), (3, 3)),
        p(1, 2, (4, 70), (3, 3)),
        p(1, 1, (3, 3), (3, 3)),
        p(1, 3, (9, 21), (3, 1)),
        p(1, 2, (9, 36), (3, 7)),
        # other filters
        p(2, 2, (5, 9), (1, 1)),
        p(1, 3, (4, 33), (1, 1), bias=True),
        p(1, 2, (8, 20), (2, 2), padding=((0, 1), (0, 1))),
        p(1, 2, (9, 13), (5, 5), padding=2),
        p(2, 2, (7, 40), (5, 5), padding=2, bias=True),
        p(1, 2, (11, 19), (7, 7), padding=3),
        p(1, 2, (7, 7), (7, 7)),
        p(1, 1, (12, 37), (9, 9), padding=4),
        p(1, 2, (14, 14), (11, 11), padding=5),
        p(1, 1, (11, 11), (11, 11)),
        p(1, 2, (3, 45), (1, 31), padding=(0, 15)),
        p(1, 2, (2, 64), (1, 31)),
        p(1, 1, (40, 6), (31, 1), padding=(15, 0)),
        p(1, 2, (6, 29), (4, 6), padding=((1, 2), (2, 3))),
        # strides
        p(1, 2, (15, 15), (3, 3), stride=2, padding=1),
        p(1, 2, (16, 64), (3, 3), stride=2, padding=1),
        p(2, 3, (14, 28), (3, 3), stride=2, padding=((0, 1), (0, 1))),
        p(1, 2, (13, 35), (5, 5), stride=2, padding=2),
        p(1, 2, (10, 31), (3, 3), stride=3),
        p(1, 2, (11, 40), (3, 3), stride=(1, 2), padding=1),
        p(1, 2, (11, 24), (3, 3), stride=(3, 1), padding=1),
        p(1, 1, (9, 22), (1, 1), stride=2),
        p(1, 2, (9, 25), (2, 2), stride=3, padding=1),
        p(1, 1, (12, 66), (7, 7), stride=(2, 3), padding=3),
        # dilation
        p(1, 2, (9, 30), (3, 3), padding=2, dilation=2),
        p(1, 2, (12, 26), (3, 3), padding=3, dilation=3),
        p(1, 1, (11, 44), (3, 5), padding=(1, 6), dilation=(1, 3)),
        p(1, 1, (14, 18), (5, 3), padding=(4, 1), dilation=(2, 1)),
        p(1, 2, (13, 33), (3, 3), stride=2, padding=3, dilation=3),
        p(1, 1, (7, 50), (1, 9), padding=(0, 12), dilation=(1, 3)),
        # padding: uneven, and larger than the filter
        p(1, 2, (6, 11), (3, 3), padding=4),
        p(1, 1, (2, 3), (3, 3), padding=((5, 0), (0, 7))),
        p(1, 2, (5, 18), (3, 3), padding=((2, 0), (2, 0))),
        p(1, 2, (5, 18), (3, 3), padding=((0, 2), (0, 2))),
        p(1, 1, (1, 1), (5, 5), padding=2),
        p(1, 1, (1, 1), (3, 3), stride=2, padding=6),
        p(1, 1, (4, 6), (1, 1), padding=3),
        # channel multiplier and bias
        p(2, 3, (6, 17), (3, 3), padding=1, multiplier=2),
        p(1, 5, (5, 8), (3, 3), padding=1, multiplier=3, bias=True),
        p(2, 2, (9, 23), (3, 3), stride=2, padding=1, multiplier=2, bias=True),
        p(3, 2, (4, 10), (5, 5), padding=2, multiplier=3),
        p(2, 4, (6, 20), (3, 3), padding=1, bias=True),
        # many planes of few elements; planes no multiple of anything; no images at all
        p(5, 7, (2, 2), (3, 3), padding=1),
        p(3, 37, (1, 3), (3, 3), padding=1),
        p(2, 11, (7, 7), (3, 3), padding=1),
        p(0, 3, (5, 8), (3, 3), padding=1),
        # tensors that start between vectors
        p(1, 2, (5, 32), (3, 3), padding=1, aligned=4),
        p(1, 2, (5, 32), (3, 3), padding=1, aligned=8),
        p(1, 2, (6, 30), (3, 3), aligned=8),
        p(1, 2, (16, 64), (3, 3), stride=2, padding=1, aligned=4),
    ]
    return found


def _edge_1d() -> list[DepthwiseProblem]:
    p = _problem
    return [
        # causal, as state-space models have them
        p(2, 3, (37,), (4,), padding=[(3, 0)]),
        p(1, 16, (64,), (4,), padding=[(3, 0)], bias=True),
        p(1, 8, (1,), (4,), padding=[(3, 0)]),
        p(2, 5, (130,), (2,), padding=[(1, 0)]),
        p(1, 24, (33,), (3,), padding=[(2, 0)], dilation=4),
        # same
        p(2, 4, (48,), (9,), padding=4),
        p(1, 3, (101,), (9,), padding=4),
        p(1, 2, (75,), (31,), padding=15),
        p(1, 12, (40,), (31,), padding=15, bias=True),
        p(1, 2, (7,), (31,), padding=15),
        p(1, 2, (66,), (3,), padding=1),
        p(1, 17, (20,), (3,), padding=1),
        p(1, 1, (300,), (5,), padding=2),
        # as long as the sequence, and longer
        p(1, 3, (128,), (128,), padding=[(127, 0)]),
        p(1, 8, (100,), (100,), padding=[(99, 0)]),
        p(1, 2, (70,), (131,), padding=65),
        # the rest
        p(2, 3, (50,), (1,)),
        p(1, 4, (53,), (5,), stride=2, padding=2),
        p(1, 2, (64,), (8,), stride=8),
        p(1, 8, (41,), (10,), stride=5),
        p(1, 3, (45,), (3,), padding=6, dilation=6),
        p(2, 3, (29,), (4,), padding=[(1, 2)], multiplier=2, bias=True),
        p(40, 6, (5,), (3,), padding=1),
        p(0, 3, (9,), (3,), padding=1),
        p(1, 3, (9,), (3,), padding=[(9, 0)]),
        p(1, 4, (32,), (4,), padding=[(3, 0)], aligned=4),
    ]


def _edge_3d() -> list[DepthwiseProblem]:
    p = _problem
    return [
        p(1, 2, (5, 6, 9), (3, 3, 3), padding=1),
        p(2, 3, (4, 7, 20), (3, 3, 3), padding=1, bias=True),
        p(1, 8, (3, 5, 33), (3, 3, 3), padding=1),
        p(1, 24, (6, 4, 8), (3, 3, 3), padding=1),
        p(1, 5, (2, 3, 7), (3, 3, 3), padding=1),
        p(1, 2, (9, 10, 16), (3, 3, 3), stride=2, padding=1),
        p(1, 16, (6, 9, 11), (3, 3, 3), stride=(1, 2, 2), padding=1),
        p(1, 2, (8, 6, 12), (3, 3, 3), stride=(2, 1, 1), padding=1),
        p(1, 8, (8, 9, 8), (5, 5, 5), padding=2),
        p(1, 2, (8, 9, 10), (7, 7, 7), padding=3),
        p(1, 3, (3, 8, 21), (1, 3, 3), padding=(0, 1, 1)),
        p(1, 8, (9, 4, 7), (3, 1, 1), padding=(1, 0, 0)),
        p(1, 2, (8, 8, 13), (3, 3, 3), padding=2, dilation=2),
        p(1, 4, (5, 6, 14), (2, 3, 4), padding=[(1, 0), (0, 2), (2, 1)]),
        p(1, 3, (5, 5, 12), (3, 3, 3), multiplier=2),
        p(1, 1, (1, 1, 1), (3, 3, 3), padding=1),
        p(1, 2, (2, 2, 3), (3, 3, 3), padding=4),
        p(3, 5, (2, 2, 2), (1, 1, 1)),
        p(0, 3, (4, 5, 6), (3, 3, 3), padding=1),
        p(1, 2, (3, 5, 32), (3, 3, 3), padding=1, aligned=4),
    ]


def _inside(problem: DepthwiseProblem, *parent: int) -> DepthwiseProblem:
    """The problem with an x that is a part of a larger tensor: [N, C, *size] of the parent."""
    return replace(problem, x_strides=dense_strides(parent, problem.layout))


def _views(dims: int, layout: Layout) -> list[DepthwiseProblem]:
    """Problems whose x is a view: parts of larger images, every second channel, a batch that is transposed or one."""

    def p(*arguments: object, **more: object) -> DepthwiseProblem:
        return _problem(*arguments, layout=layout, padding=1, **more)  # type: ignore[arg-type]

    first = layout == "channels_first"
    if dims == 1:
        found = [_inside(p(2, 8, (20,), (3,)), 2, 24, 32), _inside(p(2, 3, (21,), (3,), aligned=4), 2, 5, 23)]
        return [*found, p(2, 8, (16,), (3,), x_strides=(0, 16, 1) if first else (0, 1, 8))]
    if dims == 3:
        found = [_inside(p(2, 8, (4, 5, 12), (3, 3, 3)), 2, 8, 5, 9, 20)]
        return [*found, _inside(p(1, 3, (3, 5, 13), (3, 3, 3), aligned=4), 1, 5, 3, 5, 15)]
    found = [
        _inside(p(2, 2, (5, 12), (3, 3)), 2, 2, 9, 20),
        _inside(p(2, 8, (5, 12), (3, 3)), 2, 24, 9, 20),
        _inside(p(1, 2, (5, 13), (3, 3), aligned=4), 1, 2, 7, 15),
        _inside(p(1, 6, (5, 13), (3, 3), aligned=4), 1, 9, 7, 15),
        p(3, 2, (4, 8), (3, 3), x_strides=(32, 96, 8, 1) if first else (2, 1, 48, 6)),
        p(2, 2, (5, 8), (3, 3), x_strides=(0, 40, 8, 1) if first else (0, 1, 16, 2)),
    ]
    if first:
        found.append(p(2, 3, (6, 16), (3, 3), x_strides=(6 * 96, 2 * 96, 16, 1)))
    return found


def _epilogues(dims: int) -> list[DepthwiseProblem]:
    """Every activation, alone or with something behind it, in memory of odd and of even sizes."""
    found = []
    size, taps = (2, 5, 12)[-dims:], (2, 3, 3)[-dims:]
    behind = [Epilogue(activation=name) for name in ACTIVATIONS[dims % 2 :: 2]]
    behind += [Epilogue(name, scale=True, shift=i % 2 == 0, residual=True) for i, name in enumerate(ACTIVATIONS[::3])]
    behind += [Epilogue(shift=True), Epilogue(residual=True), Epilogue("relu", scale=True)]
    for i, epilogue in enumerate(behind if dims == 2 else behind[-3::2]):
        size = (*size[:-1], size[-1] + i % 2)
        found.append(_problem(2, 3 + 5 * (i % 2), size, taps, padding=1, bias=i % 3 == 0, epilogue=epilogue))
    return found


EDGE_PROBLEMS: list[DepthwiseProblem] = _edge_2d() + _views(2, "channels_first")
EDGE_1D: list[DepthwiseProblem] = _edge_1d() + _views(1, "channels_first")
EDGE_3D: list[DepthwiseProblem] = _edge_3d() + _views(3, "channels_first")
EDGE_EPILOGUES: list[DepthwiseProblem] = [p for dims in (1, 2, 3) for p in _epilogues(dims)]

# Where every edge problem runs; other dtypes run some of them.
WHOLE = {
    (1, "channels_first"): "float16",
    (1, "channels_last"): "bfloat16",
    (2, "channels_first"): "float32",
    (2, "channels_last"): "float16",
    (3, "channels_first"): "float32",
    (3, "channels_last"): "float16",
}
SOME = {1: 6, 2: 12, 3: 5}  # every so many-th problem


def in_kind(problem: DepthwiseProblem, dtype: str, layout: Layout = "channels_first") -> DepthwiseProblem:
    """The same problem in another dtype and layout; what starts between vectors does so in its dtype too.

    A view stays in its layout.
    """
    assert not problem.x_strides or layout == problem.layout, "a view is of one layout"
    size = DTYPE_BYTES[dtype]
    return replace(
        problem, dtype=dtype, layout=layout, aligned=size if problem.aligned == 4 else max(problem.aligned, size)
    )


def edge_problems(dims: int, dtype: str, layout: Layout) -> list[DepthwiseProblem]:
    """All edge problems of one kind, those with an epilogue too."""
    plain = {1: EDGE_1D, 2: EDGE_PROBLEMS, 3: EDGE_3D}[dims]
    found = [p for p in (*plain, *_epilogues(dims)) if not p.x_strides] + _views(dims, layout)
    return [in_kind(problem, dtype, layout) for problem in found]


def every_kind() -> Iterator[DepthwiseProblem]:
    """Problems of every dtype, layout and number of dimensions: all in one dtype, some in every other."""
    for (dims, layout), whole in WHOLE.items():
        for number, dtype in enumerate(DTYPE_BYTES):
            found = edge_problems(dims, dtype, layout)  # type: ignore[arg-type]
            yield from found if dtype == whole else found[number :: SOME[dims]]


def problem_id(problem: DepthwiseProblem) -> str:
    """A problem in the characters that test names allow.

    >>> problem_id(_problem(1, 2, (5, 8), (3, 3), stride=2, padding=((0, 1), (0, 1)), bias=True))
    '1x2x5x8-k3x3-s2x2-p0.1x0.1-bias'
    """

    def by(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values))

    text = f"{by(problem.x_shape)}-k{by(problem.filter)}"
    if set(problem.stride) != {1}:
        text += f"-s{by(problem.stride)}"
    if any(map(any, problem.padding)):
        even = all(before == after for before, after in problem.padding)
        pads = [str(before) if even else f"{before}.{after}" for before, after in problem.padding]
        text += f"-p{'x'.join(pads)}"
    if set(problem.dilation) != {1}:
        text += f"-d{by(problem.dilation)}"
    if problem.multiplier > 1:
        text += f"-m{problem.multiplier}"
    text += "-bias" if problem.bias else ""
    text += f"-aligned{problem.aligned}" if problem.aligned < 16 else ""
    text += f"-strides{by(problem.x_strides)}" if problem.x_strides else ""
    text += f"-{str(problem.epilogue).replace(', ', '-')}" if problem.epilogue != NO_EPILOGUE else ""
    text += "-last" if problem.layout == "channels_last" else ""
    return text if problem.dtype == "float32" else f"{text}-{problem.dtype}"


def with_dtype(problem: DepthwiseProblem, dtype: str) -> DepthwiseProblem:
    """The same problem in another dtype."""
    return replace(problem, dtype=dtype)


def poisoned(elements: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Memory of exactly so many elements, every byte 0xFF."""
    return torch.full((elements * dtype.itemsize,), POISON, dtype=torch.uint8, device=device).view(dtype)


def first_offset(problem: DepthwiseProblem) -> int:
    """Elements by which tensors must be moved from an aligned address to be only as aligned as the problem says."""
    return problem.aligned % 16 // problem.element_bytes


def make_inputs(
    problem: DepthwiseProblem,
    seed: int = 0,
    offset: int | None = None,
    margin: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias (None without) of a problem, standard normal; for the gradient of x, that of y stands for x.

    Each lies in memory of its own that ends with its last element, so that AddressSanitizer sees a read beyond it;
    what lies before it and between its elements is poison.

    Args:
        problem: also gives the strides of x; the filter and the bias are contiguous.
        seed: the same numbers on every machine and device.
        offset: elements in front of each tensor; None takes what `problem.aligned` asks for.
        margin: elements of poison around each tensor, a multiple of 16; for devices without AddressSanitizer.
        device: where.
    """
    make = _Maker(problem, seed, offset, margin, device)
    x = make.tensor(problem.source_shape, problem.plane_strides)
    weight = make.contiguous(problem.weight_shape)
    return x, weight, make.contiguous((problem.out_channels,)) if problem.bias else None


def make_epilogue(
    problem: DepthwiseProblem, seed: int = 0, offset: int | None = None, margin: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Those of scale, shift and residual that a problem has, by name, made as `make_inputs` makes the others."""
    make = _Maker(problem, 1000 + seed, offset, margin, device)
    found = {}
    for name in ("scale", "shift"):
        if getattr(problem.epilogue, name):
            found[name] = make.contiguous((problem.out_channels,))
    if problem.epilogue.residual:
        found["residual"] = make.tensor(problem.y_shape, dense_strides(problem.y_shape, problem.layout))
    return found


def as_gradient(problem: DepthwiseProblem, direction: Direction) -> DepthwiseProblem:
    """The problem of a gradient of a forward problem's sum."""
    if direction == "forward":
        return problem
    if direction == "grad_input":
        return replace(problem, direction=direction, epilogue=NO_EPILOGUE, bias=False, x_strides=())
    return replace(problem, direction=direction, epilogue=NO_EPILOGUE)


def make_filter_gradient_inputs(
    problem: DepthwiseProblem, seed: int = 0, offset: int | None = None, margin: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """x and the gradient of y of a grad_weight problem, made as `make_inputs` makes tensors."""
    make = _Maker(problem, seed, offset, margin, device)
    x = make.tensor(problem.x_shape, problem.plane_strides)
    return x, make.tensor(problem.y_shape, dense_strides(problem.y_shape, problem.layout))


def make_filter_gradients(
    problem: DepthwiseProblem, margin: int = 64, device: str = "cpu"
) -> tuple[Output, Output | None]:
    """Room for the gradients of filters and bias (None without)."""
    weight = _output(problem, problem.weight_shape, contiguous_strides(problem.weight_shape), margin, margin, device)
    bias = _output(problem, (problem.out_channels,), (1,), margin, margin, device) if problem.bias else None
    return weight, bias


class _Maker:
    """Draws tensors, one after the other."""

    def __init__(self, problem: DepthwiseProblem, seed: int, offset: int | None, margin: int, device: str) -> None:
        self.dtype: torch.dtype = getattr(torch, problem.dtype)
        self.random = torch.Generator().manual_seed(seed)
        self.front = margin + (first_offset(problem) if offset is None else offset)
        self.margin, self.device = margin, device

    def tensor(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        storage = poisoned(self.front + (extent if 0 not in shape else 0) + self.margin, self.dtype, self.device)
        view = storage.as_strided(shape, strides, self.front)
        values = torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)
        repeated = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
        view[repeated] = values[repeated].to(self.device)
        return view

    def contiguous(self, shape: tuple[int, ...]) -> Tensor:
        return self.tensor(shape, dense_strides(shape, "channels_first"))


@dataclass(frozen=True)
class Output:
    """A poisoned y between two poisoned guard zones.

    Attributes:
        y: [N, C*m, *out_size], dense in the problem's layout.
        memory: y with its guard zones.
        front: elements before y.
    """

    y: Tensor
    memory: Tensor
    front: int

    def guards_are_intact(self) -> bool:
        """Whether nothing was written outside of y."""
        before = self.memory[: self.front].view(torch.uint8)
        after = self.memory[self.front + self.y.numel() :].view(torch.uint8)
        return bool((before == POISON).all()) and bool((after == POISON).all())


def make_output(problem: DepthwiseProblem, offset: int | None = None, margin: int = 64, device: str = "cpu") -> Output:
    """Room for a problem's result. With a margin of 0, AddressSanitizer guards its end instead."""
    front = margin + (first_offset(problem) if offset is None else offset)
    shape, layout = problem.result_shape, problem.layout
    return _output(problem, shape, dense_strides(shape, layout), front, margin, device)


def _output(
    problem: DepthwiseProblem, shape: tuple[int, ...], strides: tuple[int, ...], front: int, margin: int, device: str
) -> Output:
    memory = poisoned(front + math.prod(shape) + margin, getattr(torch, problem.dtype), device)
    return Output(memory.as_strided(shape, strides, front), memory, front)
