"""What a variant is: one algorithm that turns problems into plans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from ..device import DeviceSpec
from ..plan import Plan, Rejection, legal
from ..problem import DTYPE_BYTES, DepthwiseProblem, Direction, Layout
from ..roofline import LAUNCH_SECONDS, roofline

GRID_X_LIMIT = 2**31 - 1
GRID_YZ_LIMIT = 65535


class Variant(ABC):
    """One algorithm. Its kernel is `kernels/<stem>.cuh`, its page `docs/variants/<stem>.md`.

    Attributes:
        stem: its name.
        technique: what it does, in one sentence that a user can read.
        directions: what it computes. Gradients of x that are forward problems, too (`DepthwiseProblem.as_forward`),
            come to it as those.
        dims: spatial dimensions it takes; a problem of one dimension comes to it with two, the first of one row.
        layouts, dtypes: what it takes.
    """

    stem: ClassVar[str]
    technique: ClassVar[str]
    directions: ClassVar[tuple[Direction, ...]] = ("forward",)
    dims: ClassVar[tuple[int, ...]] = (2,)
    layouts: ClassVar[tuple[Layout, ...]] = ("channels_first",)
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPE_BYTES)

    @abstractmethod
    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        """Every tile that comes into question, as a plan, or as a rejection with its reason."""

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles, also of those that `candidates` leaves out: for tests and for tuning."""
        return legal(self.candidates(problem, device))

    def unsupported(self, problem: DepthwiseProblem) -> str | None:
        """Why no tile of the variant can serve the problem; None if one might."""
        if problem.direction not in self.directions:
            return f"computes {_listed(self.directions)}, not {problem.direction}"
        if problem.dims not in self.dims:
            return f"takes {_listed(self.dims)} spatial dimensions, the problem has {problem.dims}"
        if problem.layout not in self.layouts:
            return f"takes {_listed(self.layouts)} memory, not {problem.layout}"
        if problem.dtype not in self.dtypes:
            return f"takes {_listed(self.dtypes)}, not {problem.dtype}"
        if problem.layout == "channels_first" and problem.plane_strides[-1] != 1:
            return "neighbouring columns of x must be neighbours in memory"
        if problem.layout == "channels_last" and problem.plane_strides[1] != 1:
            return "neighbouring channels of x must be neighbours in memory"
        return None


def _listed(values: Sequence[object]) -> str:
    return " or ".join(map(str, values))


def tap_by_tap_seconds(
    problem: DepthwiseProblem, device: DeviceSpec, outputs: int, *, instructions_before: int, per_tap: int = 8
) -> float:
    """Predicted time of a kernel that reads each tap's input from L1 and has few bytes in flight.

    A multiprocessor issues 4 warp instructions a clock; a tap costs about 8 (bounds, address, load, multiply-add).
    The DRAM reaches at most half of a copy's rate under such kernels.
    """
    instructions = (instructions_before + per_tap * problem.taps) * outputs / 32
    issue = instructions / (4 * device.multiprocessors * device.clock)
    limits = roofline(problem, device)
    return LAUNCH_SECONDS + max(2 * limits.copy, 1.75 * issue)
