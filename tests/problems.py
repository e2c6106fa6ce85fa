"""Small problems at the edges of what is allowed, with tensors for them; CPU and GPU tests share them.

Filter, stride, padding, dilation, multiplier and bias are compiled in, so problems repeat them where they can: the
sizes are what differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dwconv.problem import DepthwiseProblem

POISON = 0xFF  # every byte of memory that nobody may read or that a kernel must overwrite: a NaN in each dtype


def _problem(
    batch: int,
    channels: int,
    size: tuple[int, int],
    filter: tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] = 0,
    dilation: int | tuple[int, int] = 1,
    multiplier: int = 1,
    bias: bool = False,
    aligned: int = 16,
    x_strides: tuple[int, ...] = (),
) -> DepthwiseProblem:
    def pair(value: int | tuple[int, int]) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else value

    pads = pair(padding)  # type: ignore[arg-type]
    return DepthwiseProblem(
        batch=batch,
        channels=channels,
        size=size,
        filter=filter,
        stride=pair(stride),
        padding=tuple(pair(pad) for pad in pads),
        dilation=pair(dilation),
        multiplier=multiplier,
        bias=bias,
        aligned=aligned,
        x_strides=x_strides,
    )


def _edge_problems() -> list[DepthwiseProblem]:
    p = _problem
    found = [p(1, 2, (5, width), (3, 3), padding=1) for width in _WIDTHS]
    found += [p(1, 1, (height, 12), (3, 3), padding=1) for height in (1, 2, 3, 9, 17)]
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
        # views: a cropped image, every second channel, a crop that starts between vectors, a transposed batch
        p(2, 2, (5, 12), (3, 3), padding=1, x_strides=(2 * 9 * 20, 9 * 20, 20, 1)),
        p(2, 3, (6, 16), (3, 3), padding=1, x_strides=(6 * 96, 2 * 96, 16, 1)),
        p(1, 2, (5, 13), (3, 3), padding=1, aligned=4, x_strides=(2 * 7 * 15, 7 * 15, 15, 1)),
        p(3, 2, (4, 8), (3, 3), padding=1, x_strides=(32, 96, 8, 1)),
        p(2, 2, (5, 8), (3, 3), padding=1, x_strides=(0, 40, 8, 1)),
    ]
    return found


_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 28, 31, 32, 33, 47, 56, 63, 64, 65, 66, 68, 69, 70)

EDGE_PROBLEMS: list[DepthwiseProblem] = _edge_problems()


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
    """x, weight and bias (None without) of a problem, standard normal.

    Each lies in memory of its own that ends with its last element, so that AddressSanitizer sees a read beyond it;
    what lies before it and between its elements is poison.

    Args:
        problem: also gives the strides of x.
        seed: the same numbers on every machine and device.
        offset: elements in front of each tensor; None takes what `problem.aligned` asks for.
        margin: elements of poison around each tensor, a multiple of 16; for devices without AddressSanitizer.
        device: where.
    """
    dtype: torch.dtype = getattr(torch, problem.dtype)
    random = torch.Generator().manual_seed(seed)
    front = margin + (first_offset(problem) if offset is None else offset)

    def tensor(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        storage = poisoned(front + (extent if 0 not in shape else 0) + margin, dtype, device)
        view = storage.as_strided(shape, strides, front)
        values = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        repeated = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
        view[repeated] = values[repeated].to(device)
        return view

    def contiguous(shape: tuple[int, ...]) -> Tensor:
        return tensor(shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))

    x = tensor(problem.x_shape, problem.plane_strides)
    return x, contiguous(problem.weight_shape), contiguous((problem.out_channels,)) if problem.bias else None


@dataclass(frozen=True)
class Output:
    """A poisoned y between two poisoned guard zones.

    Attributes:
        y: [N, C*m, *out_size], contiguous.
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
    elements = math.prod(problem.y_shape)
    memory = poisoned(front + elements + margin, getattr(torch, problem.dtype), device)
    return Output(memory[front : front + elements].view(problem.y_shape), memory, front)
