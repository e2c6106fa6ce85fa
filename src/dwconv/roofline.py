"""The yardsticks: the times that no implementation of a problem can beat by much."""

from __future__ import annotations

from dataclasses import dataclass

from .device import DeviceSpec
from .problem import DepthwiseProblem

LAUNCH_SECONDS = 2.5e-6  # an empty kernel, from event to event (H200, 2026-11)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Least times of a problem on a device, in seconds.

    Attributes:
        copy: moving the least traffic as a device-to-device copy does.
        fma: the multiply-adds at the card's float32 rate.
    """

    copy: float
    fma: float

    @property
    def least(self) -> float:
        return max(self.copy, self.fma)

    @property
    def bound_by(self) -> str:
        return "memory" if self.copy >= self.fma else "arithmetic"


def roofline(problem: DepthwiseProblem, device: DeviceSpec) -> Roofline:
    """Predicts the yardsticks; a benchmark measures the copy time instead.

    copy = launch + least_bytes / bandwidth; fma = 2 * multiply_adds / float32 rate.

    >>> from dwconv.device import H200
    >>> limits = roofline(DepthwiseProblem(16, 64, (512, 512), (3, 3)), H200)
    >>> f"{limits.copy * 1e3:.2f} ms, bound by {limits.bound_by}"
    '0.50 ms, bound by memory'
    """
    return Roofline(
        copy=LAUNCH_SECONDS + problem.least_bytes / (device.dram_gbs * 1e9),
        fma=2 * problem.multiply_adds / (device.fp32_tflops * 1e12),
    )
