"""Which plan a problem gets: a pure function of the problem and the device."""

from __future__ import annotations

from dataclasses import replace

from .device import DeviceSpec
from .errors import DepthwiseError
from .plan import Plan, Rejection, legal
from .problem import DepthwiseProblem
from .variants import REGISTRY


def candidates(problem: DepthwiseProblem, device: DeviceSpec, variant: str | None = None) -> list[Plan | Rejection]:
    """Every plan that comes into question, fastest first by its predicted time, then the rejected ones.

    Raises:
        DepthwiseError: `variant` is not registered.
    """
    if variant is not None and variant not in REGISTRY:
        raise DepthwiseError(f"variant={variant!r} is unknown: use one of {', '.join(REGISTRY)}")
    found: list[Plan | Rejection] = []
    lifted = problem.lifted(2)
    forward = lifted.as_forward()
    for stem, candidate in REGISTRY.items():
        if variant in (None, stem):
            posed = forward if forward is not None and "forward" in candidate.directions else lifted
            reason = candidate.unsupported(posed)
            found.extend([Rejection(stem, "", reason)] if reason else candidate.candidates(posed, device))
    if lifted is not problem or forward is not None:
        found = [replace(c, problem=problem) if isinstance(c, Plan) else c for c in found]
    return sorted(found, key=lambda c: c.predicted_seconds if isinstance(c, Plan) else float("inf"))


def choose(problem: DepthwiseProblem, device: DeviceSpec, variant: str | None = None) -> Plan:
    """The plan with the least predicted time.

    Raises:
        DepthwiseError: no variant takes the problem; the message says why each one doesn't.

    >>> from dwconv.device import H200
    >>> choose(DepthwiseProblem(16, 64, (512, 512), (3, 3)), H200).variant
    'direct_nchw'
    """
    return ranked(problem, device, variant)[0]


def ranked(problem: DepthwiseProblem, device: DeviceSpec, variant: str | None = None) -> list[Plan]:
    """Every legal plan, the one with the least predicted time first; there is at least one.

    Raises:
        DepthwiseError: no variant takes the problem; the message says why each one doesn't.
    """
    found = candidates(problem, device, variant)
    plans = legal(found)
    if plans:
        return plans
    reasons = dict.fromkeys(f"{c.variant}: {c.reason}" for c in found if isinstance(c, Rejection))
    raise DepthwiseError(
        f"no kernel takes this problem ({problem}): {'; '.join(reasons)}. Use torch.nn.functional for it."
    )
