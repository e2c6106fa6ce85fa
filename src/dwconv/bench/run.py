"""`dwconv bench --suite`: for every case, first checks the contenders' results, then times them side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import versions
from ..device import DeviceSpec
from ..errors import DepthwiseError
from ..problem import DepthwiseProblem, Direction, Layout
from ..roofline import roofline
from ..version import __version__
from . import report as reporting
from .results import COPY, OURS, CaseResult, Conditions, Missing, Report, case_result, to_json, write_whole
from .suites import load_suite, select
from .timing import ROUNDS, Clock, CudaClock, copy_contender, measure, require_gpu

CASE_LIMIT_SECONDS = 5.0
COMPILE_LIMIT = 12  # problems: torch.compile takes seconds for each, so larger suites ask for it by --compile


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run; an empty choice means all that the suite lists.

    Attributes:
        names: parts of case names.
        contenders: by name; empty means all, where `compile` decides on torch.compile (None: small suites only).
    """

    suite: str
    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    layouts: tuple[Layout, ...] = ()
    directions: tuple[Direction, ...] = ("forward",)
    contenders: tuple[str, ...] = ()
    compile: bool | None = None
    rounds: int = ROUNDS
    json_path: Path | None = None
    markdown_path: Path | None = None


def run(settings: Settings, console: Console, command: str) -> int:
    """Runs a suite and prints its report; 1 if a result of dwconv's was wrong, else 0.

    The JSON is written after every case, so that a run which is cut off keeps what it found. One case's tensors are
    allocated at a time.

    Raises:
        DepthwiseError: no GPU, an unknown suite or contender, or a choice that leaves no case.
    """
    problems = list(
        select(load_suite(settings.suite), settings.names, settings.dtypes, settings.layouts, settings.directions)
    )
    if settings.rounds < 1:
        raise DepthwiseError(f"--rounds {settings.rounds} takes no samples: use 1 or more, 25 for a figure to report")
    torch = require_gpu()
    names = _contender_names(settings, len(problems))
    from ..launch import device_spec

    index = torch.cuda.current_device()
    device, spec = f"cuda:{index}", device_spec(index)
    conditions = conditions_here(torch, settings.rounds, command)
    clock = CudaClock()
    cases: list[CaseResult] = []
    log = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=log, transient=True) as progress:
        task = progress.add_task("", total=len(problems))
        for name, problem in problems:
            progress.update(task, description=name)
            cases.append(run_case(name, problem, names, device=device, spec=spec, rounds=settings.rounds, clock=clock))
            progress.advance(task)
            progress.console.print(_summary(cases[-1]), highlight=False, markup=False, soft_wrap=True)
            if settings.json_path is not None:
                write_whole(settings.json_path, to_json(Report(conditions, tuple(cases))))
    report = Report(conditions, tuple(cases))
    reporting.print_report(report, console)
    if settings.markdown_path is not None:
        title = f"# dwconv bench: {settings.suite} on {conditions.device}\n\n"
        write_whole(settings.markdown_path, title + reporting.markdown(report))
    return 1 if report.wrong else 0


def _contender_names(settings: Settings, problems: int) -> tuple[str, ...]:
    from .baselines import COMPILE, CONTENDERS

    for name in settings.contenders:
        if name not in CONTENDERS:
            raise DepthwiseError(f"contender={name!r} is unknown: use some of {', '.join(CONTENDERS)}")
    if settings.contenders:
        return settings.contenders
    compiled = problems <= COMPILE_LIMIT if settings.compile is None else settings.compile
    return tuple(name for name in CONTENDERS if compiled or name != COMPILE)


def conditions_here(torch: Any, rounds: int, command: str, l2: str = "cold") -> Conditions:
    """The conditions of a run on the current GPU, now."""
    return Conditions(
        device=torch.cuda.get_device_name(),
        driver=versions.driver(),
        cuda=str(torch.version.cuda),
        torch=torch.__version__,
        dwconv=__version__,
        commit=versions.commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        rounds=rounds,
        command=command,
        l2=l2,
    )


def run_case(
    name: str,
    problem: DepthwiseProblem,
    names: Sequence[str],
    *,
    device: str,
    spec: DeviceSpec,
    rounds: int,
    clock: Clock,
) -> CaseResult:
    """Checks and times one problem on a device; its tensors are freed at the end."""
    import torch

    from . import baselines

    try:
        tensors = baselines.make_tensors(problem, device)
        ready: dict[str, baselines.Contender] = {}
        missing: list[Missing] = []
        checks: dict[str, tuple[float, float]] = {}
        for found in baselines.contenders(problem, tensors, names, spec):
            if isinstance(found, Missing):
                missing.append(found)
                continue
            try:
                checked = check(problem, tensors, found)
            except (DepthwiseError, RuntimeError) as error:  # PyTorch refuses it, or the memory doesn't suffice
                missing.append(Missing(found.name, _first_sentence(error)))
                continue
            ready[found.name] = found
            if checked is not None:
                checks[found.name] = checked
        runs: dict[str, Callable[[], object]] = {name: contender.run for name, contender in ready.items()}
        runs[COPY] = copy_contender(problem.least_bytes, device)
        timings = measure(runs, rounds=rounds, limit_seconds=CASE_LIMIT_SECONDS, clock=clock)
        fma = roofline(problem, spec).fma
        notes = {name: contender.note for name, contender in ready.items()}
        return case_result(name, problem, timings, fma, checks, notes, missing)
    finally:
        tensors = ready = runs = found = None  # type: ignore[assignment]
        torch.cuda.empty_cache()


def check(problem: DepthwiseProblem, tensors: Any, contender: Any) -> tuple[float, float] | None:
    """The largest error on a slice, and the largest share of its rounding bound; None for the backward directions.

    The slice is the first and last image, and the first, middle and last channel: images and channels don't depend on
    each other. A result tensor that was allocated beforehand is filled with NaN, and none may be left.
    """
    if contender.y is not None:
        contender.y.fill_(math.nan)
    y = contender.run()
    if problem.direction != "forward":
        return None
    from .. import reference

    if y.isnan().any():
        return math.inf, math.inf
    images = sorted({0, problem.batch - 1})
    channels = sorted({0, problem.channels // 2, problem.channels - 1})
    filters = [c * problem.multiplier + j for c in channels for j in range(problem.multiplier)]
    small = problem.with_batch(len(images), len(channels))
    bias = None if tensors.bias is None else tensors.bias[filters].cpu()
    x = tensors.x[images][:, channels].cpu()
    exact, bound = reference.forward(x, tensors.weight[filters].cpu(), bias, small)
    error = (y[images][:, filters].cpu().double() - exact).abs()
    return float(error.max()), float((error / bound).max())


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _summary(case: CaseResult) -> str:
    row = case.row(OURS) or (case.rows[0] if case.rows else None)
    problem = f"{case.name} {case.problem.dtype} {case.problem.layout} {case.problem.direction}"
    if row is None:
        return f"{problem}: no contender"
    ratio = "" if row.over_eager is None else f", {row.over_eager:.2f} × eager"
    return f"{problem}: {row.contender} attainment {row.attainment:.3f}{ratio}, {reporting.duration(row.timing.median)}"
