"""Problems in few words: one number stands for all dimensions."""

from __future__ import annotations

from dwconv.problem import DepthwiseProblem


def problem(n, c, size, taps, stride=1, padding=0, dilation=1, **more) -> DepthwiseProblem:
    """padding: a number, one for each dimension, or (before, after) for some of them."""

    def each(value):
        return value if isinstance(value, tuple) else (value,) * len(size)

    pads = tuple(pad if isinstance(pad, tuple) else (pad, pad) for pad in each(padding))
    return DepthwiseProblem(n, c, size, each(taps), each(stride), pads, each(dilation), **more)
