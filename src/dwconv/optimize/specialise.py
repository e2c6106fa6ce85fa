"""From found layers to specialised kernels: a plan for each problem, one kernel for all plans of the same code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..choose import candidates, choose
from ..compile import compile_many, compiled_plan
from ..device import DeviceSpec
from ..errors import DepthwiseError
from ..plan import Constants, Plan
from ..problem import DepthwiseProblem
from .find import Configuration, Found, LeftAlone, normalised
from .launches import has_launch


@dataclass(frozen=True)
class Use:
    """One problem of one layer, and its plan."""

    layer: Found
    plan: Plan

    @property
    def problem(self) -> DepthwiseProblem:
        return self.plan.problem


@dataclass(frozen=True)
class Specialisation:
    """One kernel of an exported file.

    Attributes:
        name: of its function: depthwise_3x3, depthwise_3x3_stride_2, ...
        configuration: what the layers were built with, padding in numbers.
        uses: the layers and problems that it serves.
    """

    name: str
    configuration: Configuration
    uses: tuple[Use, ...]

    @property
    def plan(self) -> Plan:
        """The plan of its largest problem; its constants are those of all."""
        return max((use.plan for use in self.uses), key=lambda plan: plan.problem.least_bytes)

    @property
    def camel(self) -> str:
        return "".join(word.capitalize() for word in self.name.split("_"))

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for use in self.uses for name in use.layer.layer.names))

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Image sizes that it was chosen for."""
        return tuple(dict.fromkeys(use.problem.size for use in self.uses))


def best_exportable(problem: DepthwiseProblem, device: DeviceSpec) -> Plan:
    """The plan with the least predicted time, of the variants that can stand in an exported file.

    Raises:
        DepthwiseError: there is none.
    """
    for plan in candidates(problem, device):
        if isinstance(plan, Plan) and has_launch(plan.variant):
            return plan
    plan = choose(problem, device)
    raise DepthwiseError(f"kernels of {plan.variant} can't be exported, and no other takes this problem ({problem})")


def specialise(found: Iterable[Found], device: DeviceSpec) -> tuple[tuple[Specialisation, ...], tuple[LeftAlone, ...]]:
    """Plans every problem. Layers for whose problems no kernel is legal come back as left alone, with the reason.

    Raises:
        DepthwiseError: no layer has a legal kernel.
    """
    groups: dict[tuple[Configuration, str, Constants], list[Use]] = {}
    left_alone: list[LeftAlone] = []
    chosen: list[tuple[Found, list[Plan]]] = []
    for layer in found:
        reasons, plans = [], []
        for problem in layer.problems:
            try:
                plans.append(best_exportable(problem, device))
            except DepthwiseError as error:
                reasons.append(str(error))
        chosen.append((layer, plans))
        if not plans:
            left_alone.append(LeftAlone(tuple(layer.layer.names), type(layer.layer.module).__name__, reasons[0]))
    compile_many(plan for _, plans in chosen for plan in plans)  # at once; below they come from memory
    for layer, plans in chosen:
        for plan in map(compiled_plan, plans):
            key = (normalised(plan.problem), plan.variant, plan.constants)
            groups.setdefault(key, []).append(Use(layer, plan))
    if not groups:
        raise DepthwiseError(left_alone[0].reason)
    names: set[str] = set()
    made = []
    for (configuration, _, _), group in groups.items():
        name = _name(configuration, names)
        names.add(name)
        made.append(Specialisation(name, configuration, tuple(group)))
    return tuple(made), tuple(left_alone)


def _name(configuration: Configuration, taken: set[str]) -> str:
    """A name that says what the kernel is for.

    >>> _name(((3, 3), (2, 2), (1, 1), (1, 1), 1, False), set())
    'depthwise_3x3_stride_2'
    """
    filter_, stride, _, dilation, multiplier, bias = configuration
    name = "depthwise_" + "x".join(map(str, filter_))
    for word, value in (("stride", stride), ("dilation", dilation)):
        if set(value) != {1}:
            name += f"_{word}_" + "x".join(map(str, value if len(set(value)) > 1 else value[:1]))
    if multiplier > 1:
        name += f"_times_{multiplier}"
    if bias:
        name += "_bias"
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
