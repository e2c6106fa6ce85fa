"""`with emulated():` CPU tensors run the CUDA kernels under the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from ..problem import DepthwiseProblem
from ..variants import REGISTRY


@dataclass(frozen=True, slots=True)
class Emulation:
    """How CPU tensors are computed inside `emulated()`.

    Attributes:
        variant: the stem of the variant that must serve every problem of a direction that it computes; None chooses.
        arch: the architecture whose preset plans are made for.
        order_seed: shuffles the order of blocks and threads; None takes them as they come.
    """

    variant: str | None = None
    arch: str = "sm_90"
    order_seed: int | None = None

    def variant_for(self, problem: DepthwiseProblem) -> str | None:
        """The variant that must serve a problem, if it is one of this direction: others are chosen."""
        if self.variant is None or self.variant not in REGISTRY:
            return self.variant
        directions = REGISTRY[self.variant].directions
        takes = problem.direction in directions or (problem.as_forward() is not None and "forward" in directions)
        return self.variant if takes else None


_active: ContextVar[Emulation | None] = ContextVar("dwconv_emulation", default=None)


def active() -> Emulation | None:
    """The settings of the innermost `emulated()` of this thread, or None."""
    return _active.get()


@contextmanager
def emulated(variant: str | None = None, arch: str = "sm_90", order_seed: int | None = None) -> Iterator[Emulation]:
    """Inside, CPU tensors run the CUDA kernels on the CPU, a fiber per CUDA thread; needs g++, no GPU.

    It is slow (tens of millions of outputs per second) and exact: the same code, in the order of a GPU's barriers and
    shuffles. It holds for the calling thread.

    Args:
        variant: the stem of the variant to run; None lets `choose` decide.
        arch: the architecture that plans are made for, "sm_75" to "sm_120".
        order_seed: runs blocks and threads in an order that this number decides.

    Raises:
        DepthwiseError: `arch` or `variant` is unknown, or there is no C++ compiler; when an operator runs.

    >>> import torch, dwconv
    >>> x, weight = torch.rand(1, 2, 8, 8), torch.rand(2, 1, 3, 3)
    >>> with dwconv.emulated():
    ...     y = dwconv.conv2d(x, weight, padding=1)
    >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight, padding=1, groups=2))
    True
    """
    emulation = Emulation(variant, arch, order_seed)
    token = _active.set(emulation)
    try:
        yield emulation
    finally:
        _active.reset(token)
