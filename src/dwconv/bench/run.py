"""`dwconv bench --suite`: for every case, first checks the contenders' results, then times them side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import versions
from ..choose import choose
from ..compile import compile_many
from ..device import DeviceSpec
from ..errors import DepthwiseError
from ..problem import DepthwiseProblem, Direction, Layout
from ..roofline import roofline
from ..version import __version__
from . import report as reporting
from .results import (
    COMPILE,
    COPY,
    EAGER,
    OURS,
    CaseResult,
    Conditions,
    Missing,
    Report,
    case_result,
    from_json,
    merged,
    to_json,
    write_whole,
)
from .suites import DIRECTIONS, FEW, SUITES, load_suite, select
from .timing import ROUNDS, Clock, CudaClock, copy_contender, measure, require_gpu

CASE_LIMIT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run; an empty choice means all that the suite lists.

    Attributes:
        names: parts of case names.
        contenders: by name; empty means eager, torch.compile unless `compile` is false, dwconv, and for few problems
            every variant.
        shard: (number, of): every so many-th problem, from this one on, counted from 1.
    """

    suite: str
    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    layouts: tuple[Layout, ...] = ()
    directions: tuple[Direction, ...] = ("forward",)
    contenders: tuple[str, ...] = ()
    compile: bool = True
    shard: tuple[int, int] = (1, 1)
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
    number, of = settings.shard
    if not 1 <= number <= of:
        raise DepthwiseError(f"--shard {number}/{of} is no part of the suite: use 1/{of} to {of}/{of}")
    if settings.rounds < 1:
        raise DepthwiseError(f"--rounds {settings.rounds} takes no samples: use 1 or more, 25 for a figure to report")
    torch = require_gpu()
    names = _contender_names(settings, len(problems))
    problems = problems[number - 1 :: of]
    from ..launch import device_spec

    index = torch.cuda.current_device()
    device, spec = f"cuda:{index}", device_spec(index)
    conditions = conditions_here(torch, settings.rounds, command)
    clock = CudaClock()
    if OURS in names:
        _compile_ahead(problems, spec)
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
    return _finish(Report(conditions, tuple(cases)), settings.suite, settings.markdown_path, console)


def merge(paths: Sequence[Path], json_path: Path | None, markdown_path: Path | None, console: Console) -> int:
    """Makes one report of several files that `run` wrote, in the order of the suites; returns as `run`.

    Raises:
        DepthwiseError: a file can't be read, is no report, or was taken under other conditions.
    """
    reports = []
    for path in paths:
        try:
            reports.append(from_json(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DepthwiseError(f"{path} can't be read ({error.strerror}): give a file of `--json`") from error
    places = [
        (suite, name, problem) for suite in SUITES for name, problem in select(load_suite(suite), directions=DIRECTIONS)
    ]
    rank = {(name, problem): number for number, (_, name, problem) in enumerate(places)}
    report = merged(reports)
    ordered = sorted(report.cases, key=lambda case: rank.get((case.name, case.problem), len(rank)))
    report = Report(report.conditions, tuple(ordered))
    if json_path is not None:
        write_whole(json_path, to_json(report))
    held = {(case.name, case.problem) for case in report.cases}
    suites = dict.fromkeys(suite for suite, name, problem in places if (name, problem) in held)
    return _finish(report, " and ".join(suites), markdown_path, console)


def _finish(report: Report, suite: str, markdown_path: Path | None, console: Console) -> int:
    reporting.print_report(report, console)
    if markdown_path is not None:
        title = f"# dwconv bench: {suite} on {report.conditions.device}\n\n"
        write_whole(markdown_path, title + reporting.markdown(report))
    return 1 if report.wrong else 0


def _compile_ahead(problems: Sequence[tuple[str, DepthwiseProblem]], spec: DeviceSpec) -> None:
    """Compiles dwconv's kernels on every core, so that the GPU doesn't wait for one after the other."""
    plans = []
    for _, problem in problems:
        with contextlib.suppress(DepthwiseError):  # the case says why
            plans.append(choose(problem, spec))
    with contextlib.suppress(DepthwiseError):
        compile_many(plans)


def _contender_names(settings: Settings, problems: int) -> tuple[str, ...]:
    from .baselines import CONTENDERS

    for name in settings.contenders:
        if name not in CONTENDERS:
            raise DepthwiseError(f"contender={name!r} is unknown: use some of {', '.join(CONTENDERS)}")
    if settings.contenders:
        return settings.contenders
    names = CONTENDERS if problems <= FEW else (EAGER, COMPILE, OURS)
    return tuple(name for name in names if settings.compile or name != COMPILE)


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
        expected = expect(problem, tensors)
        ready: dict[str, baselines.Contender] = {}
        missing: list[Missing] = []
        checks: dict[str, tuple[float, float]] = {}
        for found in baselines.contenders(problem, tensors, names, spec):
            if isinstance(found, Missing):
                missing.append(found)
                continue
            try:
                checked = check(problem, tensors, found, expected)
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
        tensors = ready = runs = found = expected = None  # type: ignore[assignment]
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Expected:
    """A slice of a result in float64, with its rounding bound, on the problem's device.

    Channels don't depend on each other: the first, the last and the middle one. Neither do images, but in the
    gradients of filters: the first and the last one.

    Attributes:
        part: the slice of a result.
    """

    part: Callable[[Any], Any]
    exact: Any
    bound: Any


def expect(problem: DepthwiseProblem, tensors: Any) -> Expected | None:
    """What a contender must compute; None for an empty batch."""
    if problem.batch == 0:
        return None
    from .. import reference

    images = sorted({0, problem.batch - 1})
    channels = sorted({0, problem.channels // 2, problem.channels - 1})
    filters = [c * problem.multiplier + j for c in channels for j in range(problem.multiplier)]
    small = problem.with_batch(len(images), len(channels))
    if problem.direction == "grad_weight":
        small = problem.with_batch(problem.batch, len(channels))
        exact, bound = reference.filter_gradient(tensors.x[:, channels], tensors.grad[:, filters], small)
        taps = problem.taps
        return Expected(lambda y: y[filters].reshape(-1, taps), exact[:, :taps], bound[:, :taps])
    if problem.direction == "grad_input":
        exact, bound = reference.input_gradient(tensors.grad[images][:, filters], tensors.weight[filters], small)
        return Expected(lambda y: y[images][:, channels], exact, bound)
    bias = None if tensors.bias is None else tensors.bias[filters]
    exact, bound = reference.forward(tensors.x[images][:, channels], tensors.weight[filters], bias, small)
    return Expected(lambda y: y[images][:, filters], exact, bound)


def check(
    problem: DepthwiseProblem, tensors: Any, contender: Any, expected: Expected | None = None
) -> tuple[float, float] | None:
    """The largest error on a slice, and the largest share of its rounding bound; None for an empty batch.

    A result tensor that was allocated beforehand is filled with NaN, and none may be left.
    """
    if contender.y is not None:
        contender.y.fill_(math.nan)
    y = contender.run()
    expected = expect(problem, tensors) if expected is None else expected
    if expected is None:
        return None
    if y.isnan().any():
        return math.inf, math.inf
    error = (expected.part(y).double() - expected.exact).abs()
    return float(error.max()), float((error / expected.bound).max())


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
