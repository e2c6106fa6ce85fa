"""Copies that the copy engine makes, and whether L2 should keep what they read."""

from __future__ import annotations

from ..device import DeviceSpec
from ..problem import DepthwiseProblem

BULK_COPIES = 90  # the first architecture whose copies take an instruction each, whatever their length
LINE = 128  # bytes of L2
SHARING = 1024  # bytes of all channels from which on few of their lines are shared by chunks of them
MOST_SIZES = 4  # of L2


def shares_lines(problem: DepthwiseProblem) -> bool:
    """Whether pixels of channels last share lines of L2 with their neighbours: their bytes aren't a multiple."""
    return problem.layout == "channels_last" and problem.out_channels * problem.element_bytes % LINE != 0


def streams(problem: DepthwiseProblem, device: DeviceSpec, times: int = 1, shared: bool = True) -> bool:
    """Whether what the kernel reads shall leave L2 before all else: it is read once, and isn't much more than L2 holds.

    L2 holds what kernels before have written. Lines that are read take its place, and it has to go to memory first: of
    77 MB that are read, 5 µs of 30 (H200, 2026-11). Those that leave first take the place of one another. Of much more
    than L2 holds that is little, and neighbours, who share some of the lines, lose more; so do channels last, where
    chunks of few channels share lines, unless all fits.

    times: how often blocks read a line, apart from what neighbours share.
    shared: whether those who share lines read them at about the same time: where much is in flight, they don't (38 µs,
        not 34, of 5×5 on 120 channels of float16).

    >>> from dwconv.device import H200
    >>> streams(DepthwiseProblem(128, 384, (14, 14), (3, 3), padding=((1, 1), (1, 1))), H200)
    True
    >>> streams(DepthwiseProblem(16, 64, (512, 512), (3, 3)), H200)
    False
    """
    most = MOST_SIZES
    if shares_lines(problem) and problem.out_channels * problem.element_bytes < SHARING:
        most = 1 if shared else 0
    return times == 1 and problem.least_bytes <= most * device.l2_bytes
