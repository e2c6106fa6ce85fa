"""Random problems of every dtype, layout and dimension, for tests on the CPU and on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

from dwconv.problem import ACTIVATIONS, DTYPE_BYTES, DepthwiseProblem, Epilogue, dense_strides

MOST_OUTPUTS = 12_000
MOST_PRODUCTS = 400_000
_FILTERS = {1: (1, 2, 3, 4, 5, 9, 31), 2: (1, 2, 3, 4, 5, 7), 3: (1, 2, 3)}
_MOST = {1: (150,), 2: (20, 80), 3: (8, 10, 30)}  # the largest sizes


@dataclass(frozen=True)
class Kind:
    """What is compiled in; sizes, strides of x and alignment are not."""

    dtype: str
    layout: str
    filter: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    multiplier: int
    bias: bool
    epilogue: Epilogue


def random_kind(random: Random) -> Kind:
    dims = random.choice((1, 2, 2, 3))

    def each(*values: int) -> tuple[int, ...]:
        return tuple(random.choice(values) for _ in range(dims))

    filter = each(*_FILTERS[dims]) if random.random() < 0.5 else (random.choice(_FILTERS[dims]),) * dims
    dilation = each(1, 2, 3) if random.random() < 0.3 else (1,) * dims
    spans = [d * (taps - 1) for d, taps in zip(dilation, filter, strict=True)]
    whole = random.random() < 0.6  # centred or causal, as most are; else any
    return Kind(
        dtype=random.choice(tuple(DTYPE_BYTES)),
        layout=random.choice(("channels_first", "channels_last")),
        filter=filter,
        stride=each(1, 2, 3) if random.random() < 0.3 else (random.choice((1, 1, 1, 2)),) * dims,
        dilation=dilation,
        before=tuple(random.choice((span // 2, span // 2, span)) for span in spans) if whole else each(0, 1, 3, 9),
        multiplier=random.choice((1, 1, 1, 2, 3)),
        bias=random.random() < 0.5,
        epilogue=_random_epilogue(random) if random.random() < 0.5 else Epilogue(),
    )


def _random_epilogue(random: Random) -> Epilogue:
    activation = random.choice((None, *ACTIVATIONS))
    return Epilogue(activation, *(random.random() < 0.4 for _ in range(3)))


def random_problem(random: Random, kind: Kind) -> DepthwiseProblem:
    dims = len(kind.filter)
    while True:
        size = tuple(random.randint(1, most) for most in _MOST[dims])
        padding = tuple((before, random.choice((0, before, random.randint(0, 9)))) for before in kind.before)
        spans = [d * (taps - 1) + 1 for d, taps in zip(kind.dilation, kind.filter, strict=True)]
        if any(span > n + sum(pad) for span, n, pad in zip(spans, size, padding, strict=True)):
            continue
        batch, channels = random.randint(1, 3), random.choice((1, 2, 3, 5, 8, 16, 17, 24, 40))
        arguments: dict[str, Any] = {
            "batch": batch,
            "channels": channels,
            "size": size,
            "filter": kind.filter,
            "stride": kind.stride,
            "padding": padding,
            "dilation": kind.dilation,
            "multiplier": kind.multiplier,
            "bias": kind.bias,
            "dtype": kind.dtype,
            "layout": kind.layout,
            "epilogue": kind.epilogue,
            "aligned": random.choice((16, 16, 16, 8, DTYPE_BYTES[kind.dtype])),
        }
        if random.random() < 0.3:  # x is a part of a larger tensor
            parent = (batch, *(n + random.choice((0, 0, 1, 4, 8)) for n in (channels, *size)))
            arguments["x_strides"] = dense_strides(parent, kind.layout)  # type: ignore[arg-type]
        problem = DepthwiseProblem(**arguments)
        outputs = math.prod(problem.y_shape)
        if outputs <= MOST_OUTPUTS and outputs * problem.taps <= MOST_PRODUCTS:
            return problem


def random_place(random: Random, problem: DepthwiseProblem) -> tuple[int, ...]:
    """An element of x."""
    return tuple(random.randrange(n) for n in problem.x_shape)
