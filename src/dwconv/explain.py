"""`dwconv explain`: what a problem costs at least, and which plan it gets, and why. Needs no torch and no GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .bench.report import amount, duration
from .bench.results import problem_to_json
from .choose import candidates
from .compile import Resources, compile_plan
from .device import DeviceSpec
from .errors import DepthwiseError
from .plan import Plan, Rejection
from .problem import DepthwiseProblem
from .roofline import Roofline, roofline
from .variants import REGISTRY


@dataclass(frozen=True, slots=True)
class Explanation:
    """A problem on a device.

    Attributes:
        plans: fastest first, by predicted time; empty if no variant takes the problem.
        rejections: tiles and variants that can't serve it.
        resources: of the first plan's kernel; None if it couldn't be compiled here.
        not_compiled: why it couldn't.
    """

    problem: DepthwiseProblem
    device: DeviceSpec
    limits: Roofline
    plans: tuple[Plan, ...]
    rejections: tuple[Rejection, ...]
    resources: Resources | None = None
    not_compiled: str = ""

    @property
    def chosen(self) -> Plan | None:
        return self.plans[0] if self.plans else None


def explain(problem: DepthwiseProblem, device: DeviceSpec, variant: str | None = None) -> Explanation:
    """Every candidate, and what the compiled kernel of the best one takes.

    Raises:
        DepthwiseError: `variant` is unknown.
    """
    found = candidates(problem, device, variant)
    plans = tuple(candidate for candidate in found if isinstance(candidate, Plan))
    rejections = tuple(candidate for candidate in found if isinstance(candidate, Rejection))
    resources, not_compiled = None, ""
    if plans:
        try:
            resources = compile_plan(plans[0]).resources
        except DepthwiseError as error:
            not_compiled = str(error)
    return Explanation(problem, device, roofline(problem, device), plans, rejections, resources, not_compiled)


def to_json(explanation: Explanation) -> dict[str, Any]:
    """Everything `dwconv explain` prints; times in seconds."""
    chosen, resources = explanation.chosen, explanation.resources
    limits = explanation.limits
    return {
        "problem": problem_to_json(explanation.problem),
        "device": asdict(explanation.device),
        "roofline": asdict(limits) | {"least": limits.least, "bound_by": limits.bound_by},
        "chosen": None if chosen is None else _plan_to_json(chosen),
        "resources": None if resources is None else asdict(resources),
        "not_compiled": explanation.not_compiled or None,
        "candidates": [
            {"variant": plan.variant, "tile": plan.tile, "predicted_seconds": plan.predicted_seconds}
            for plan in explanation.plans
        ]
        + [asdict(rejection) for rejection in explanation.rejections],
    }


def _plan_to_json(plan: Plan) -> dict[str, Any]:
    return {
        "variant": plan.variant,
        "tile": plan.tile,
        "predicted_seconds": plan.predicted_seconds,
        "grid": plan.grid,
        "block": plan.block,
        "shared_bytes": plan.shared_bytes,
        "constants": dict(plan.constants),
    }


def render(explanation: Explanation) -> RenderableType:
    """The explanation for the terminal: problem, limits, candidates, choice."""
    return Group(
        _facts(explanation), Text(), _candidates(explanation), Text(), _choice(explanation), *_remarks(explanation)
    )


def print_explanation(explanation: Explanation, console: Console) -> None:
    console.print(render(explanation))


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _facts(explanation: Explanation) -> Table:
    problem, device, limits = explanation.problem, explanation.device, explanation.limits
    table = _grid()
    output = "×".join(map(str, problem.y_shape))
    table.add_row("problem", escape(str(problem)))
    table.add_row("output", output)
    table.add_row("device", escape(f"{device.name} ({device.arch})"))
    table.add_row(
        "copy",
        f"{duration(limits.copy)}: {amount(problem.least_bytes, 'B')} at least (input, filter, output once each), "
        f"{device.dram_gbs:.0f} GB/s",
    )
    table.add_row(
        "FMA",
        f"{duration(limits.fma)}: {amount(problem.multiply_adds, 'FMA')}, {device.fp32_tflops:g} TFLOP/s",
    )
    table.add_row("limit", f"{duration(limits.least)}, set by {limits.bound_by}; attainment = this over the time")
    return table


def _candidates(explanation: Explanation) -> Table:
    table = Table(title="candidates, by predicted time", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    table.add_column("attainment", justify="right", no_wrap=True)
    table.add_column("predicted", justify="right", no_wrap=True)
    table.add_column("tile, or why it is not legal", overflow="fold")
    for number, plan in enumerate(explanation.plans):
        table.add_row(
            "→" if number == 0 else "",
            plan.variant,
            f"{explanation.limits.least / plan.predicted_seconds:.2f}",
            duration(plan.predicted_seconds),
            escape(plan.tile),
            style="green" if number == 0 else "",
        )
    if explanation.plans and explanation.rejections:
        table.add_section()
    for rejection in explanation.rejections:
        text = Text(rejection.reason)
        if rejection.tile:
            text = Text.assemble((rejection.tile, "dim"), ": ", rejection.reason)
        table.add_row("✗", rejection.variant, "", "", text, style="dim")
    return table


def _choice(explanation: Explanation) -> RenderableType:
    plan = explanation.chosen
    if plan is None:
        return Text(
            "No kernel takes this problem: the reasons stand above. dwconv.conv2d leaves it to PyTorch.", style="yellow"
        )
    table = _grid()
    table.add_row("chosen", f"{plan.variant}: {REGISTRY[plan.variant].technique}")
    table.add_row("launch", f"grid {'×'.join(map(str, plan.grid))}, block {'×'.join(map(str, plan.block))}")
    if explanation.resources is not None:
        taken = explanation.resources
        spills = f"{taken.spill_bytes} B spilled" if taken.spill_bytes else "no spills"
        table.add_row(
            "kernel",
            f"{taken.registers} registers a thread, {spills}, {plan.shared_bytes + taken.shared_bytes} B shared memory "
            "a block",
        )
    table.add_row("constants", escape(" ".join(f"{name}={value}" for name, value in plan.constants)))
    return table


def _remarks(explanation: Explanation) -> list[Text]:
    remarks = []
    if explanation.not_compiled:
        remarks.append(Text(f"Not compiled: {explanation.not_compiled}", style="yellow"))
    if explanation.resources is not None and explanation.resources.spill_bytes:
        remarks.append(Text("This kernel spills registers, which is a defect: please report it.", style="red"))
    return remarks
