"""What a benchmark found, as frozen records with units, and their JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import DepthwiseError
from ..problem import DepthwiseProblem, Epilogue
from .classes import ALL, TARGETS, class_name, problem_class
from .timing import Timing

FORMAT = 1
COPY = "copy"
EAGER = "eager"
COMPILE = "compile"
OURS = "dwconv"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What must be known to read the figures, and to take them again.

    Attributes:
        driver: its release, and the CUDA version that it supports.
        cuda: the version that torch was built with.
        commit: of the source tree, if it is one under git; else "".
        date: UTC, ISO 8601.
        l2: "cold": flushed between samples; "warm": not flushed.
        rounds: samples asked for; each row says how many were taken.
        command: the command line.
    """

    device: str
    driver: str
    cuda: str
    torch: str
    dwconv: str
    commit: str
    date: str
    rounds: int
    command: str
    l2: str = "cold"


@dataclass(frozen=True, slots=True)
class Row:
    """One contender in one case. Times in seconds.

    Attributes:
        contender: "eager", "compile", "dwconv", or a variant's stem.
        attainment: the larger of copy time and FMA time, over the median.
        over_eager: eager's median over this one; above 1 is faster than eager. None where eager was not timed.
        over_copy: the copy's median over this one.
        error: largest distance from the float64 result, on the slice that was checked; None if not checked.
        error_share: the largest error as a share of its rounding bound; above 1 is wrong.
        note: the plan, in words.
    """

    contender: str
    timing: Timing
    attainment: float
    over_eager: float | None
    over_copy: float
    error: float | None = None
    error_share: float | None = None
    note: str = ""

    @property
    def within_bound(self) -> bool:
        return self.error_share is None or self.error_share <= 1


@dataclass(frozen=True, slots=True)
class Missing:
    """A contender that has no figure, and why."""

    contender: str
    reason: str


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One problem with all its contenders.

    Attributes:
        name: of the case in its suite.
        problem_class: the class that its figures are averaged in.
        copy: time of a copy_ that moves the problem's least traffic.
        fma_seconds: the multiply-adds at the card's float32 rate.
    """

    name: str
    problem: DepthwiseProblem
    problem_class: str
    copy: Timing
    fma_seconds: float
    rows: tuple[Row, ...]
    missing: tuple[Missing, ...] = ()

    @property
    def target(self) -> float | None:
        """What the case should attain."""
        return TARGETS[self.problem_class]

    def row(self, contender: str) -> Row | None:
        return next((row for row in self.rows if row.contender == contender), None)

    def over_fastest(self, row: Row) -> float | None:
        """The time of the faster one of eager and torch.compile over a row's; None where neither was timed."""
        times = [found.timing.median for name in (EAGER, COMPILE) if (found := self.row(name)) is not None]
        return min(times) / row.timing.median if times else None

    def below_target(self, row: Row) -> bool:
        return self.target is not None and row.attainment < self.target


@dataclass(frozen=True, slots=True)
class Mean:
    """One contender over the cases of a class: geometric means, and how many cases fall short.

    Attributes:
        attainment: geometric mean; least_attainment: of the worst case.
        target: what each case should attain, or for all cases together the geometric mean; None if there is none.
        below: cases that attain less than the target of their own class.
        over_eager, over_fastest: geometric means of the times as fast as eager, and as the faster one of eager and
            torch.compile; None if eager, or both, were timed in no case.
        slower: cases slower than the faster one of eager and torch.compile.
    """

    problem_class: str
    contender: str
    cases: int
    attainment: float
    least_attainment: float
    target: float | None
    below: int
    over_eager: float | None
    over_fastest: float | None
    slower: int


@dataclass(frozen=True, slots=True)
class Report:
    """All cases of one run."""

    conditions: Conditions
    cases: tuple[CaseResult, ...] = field(default=())

    @property
    def contenders(self) -> tuple[str, ...]:
        """Every contender that has a figure somewhere, in order of first appearance."""
        return tuple(dict.fromkeys(row.contender for case in self.cases for row in case.rows))

    @property
    def wrong(self) -> tuple[tuple[CaseResult, Row], ...]:
        """Rows of dwconv's own kernels that are not within the rounding bound."""
        return tuple(
            (case, row)
            for case in self.cases
            for row in case.rows
            if row.contender not in (EAGER, COMPILE) and not row.within_bound
        )

    @property
    def short(self) -> tuple[tuple[CaseResult, Row], ...]:
        """dwconv's rows that attain less than their class's target, or are slower than PyTorch; the worst first."""
        found = [(case, row) for case in self.cases if (row := case.row(OURS)) is not None]
        found = [(case, row) for case, row in found if case.below_target(row) or (case.over_fastest(row) or 1) < 1]
        return tuple(sorted(found, key=lambda pair: pair[1].attainment / (pair[0].target or 1)))

    def means(self) -> tuple[Mean, ...]:
        """Of every class and contender, in the order of TARGETS, "all" last."""
        groups = [(name, [case for case in self.cases if case.problem_class == name]) for name in TARGETS]
        groups = [(name, cases) for name, cases in groups if cases]
        for direction in dict.fromkeys(case.problem.direction for case in self.cases):
            cases = [case for case in self.cases if case.problem.direction == direction]
            if len({case.problem_class for case in cases}) > 1:
                groups.append((class_name(direction, ALL), cases))
        return tuple(mean for name, cases in groups for mean in self._means(name, cases))

    def _means(self, name: str, cases: list[CaseResult]) -> Iterator[Mean]:
        for contender in self.contenders:
            found = [(case, row) for case in cases if (row := case.row(contender)) is not None]
            if found:
                eager = [row.over_eager for _, row in found if row.over_eager is not None]
                fastest = [ratio for case, row in found if (ratio := case.over_fastest(row)) is not None]
                yield Mean(
                    problem_class=name,
                    contender=contender,
                    cases=len(found),
                    attainment=geometric_mean(row.attainment for _, row in found),
                    least_attainment=min(row.attainment for _, row in found),
                    target=TARGETS[name],
                    below=sum(case.below_target(row) for case, row in found),
                    over_eager=geometric_mean(eager) if eager else None,
                    over_fastest=geometric_mean(fastest) if fastest else None,
                    slower=sum(ratio < 1 for ratio in fastest),
                )


def attainment(copy_seconds: float, fma_seconds: float, seconds: float) -> float:
    """The larger yardstick over the time.

        attainment = max(copy time, FMA time) / measured time

    >>> attainment(0.5e-3, 0.1e-3, 1.0e-3)
    0.5
    """
    return max(copy_seconds, fma_seconds) / seconds


def geometric_mean(ratios: Iterable[float]) -> float:
    """The mean that ratios have.

    >>> round(geometric_mean([0.5, 2.0]), 6)
    1.0
    """
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms))


def case_result(
    name: str,
    problem: DepthwiseProblem,
    timings: dict[str, Timing],
    fma_seconds: float,
    checks: dict[str, tuple[float, float]],
    notes: dict[str, str],
    missing: Iterable[Missing] = (),
) -> CaseResult:
    """A case from its timings: one named COPY, the others contenders. `checks` holds (error, share of its bound)."""
    copy = timings[COPY]
    eager = timings.get(EAGER)
    rows = []
    for contender, timing in timings.items():
        if contender == COPY:
            continue
        error, share = checks.get(contender, (None, None))
        rows.append(
            Row(
                contender,
                timing,
                attainment(copy.median, fma_seconds, timing.median),
                eager.median / timing.median if eager else None,
                copy.median / timing.median,
                error,
                share,
                notes.get(contender, ""),
            )
        )
    return CaseResult(name, problem, problem_class(problem), copy, fma_seconds, tuple(rows), tuple(missing))


def problem_to_json(problem: DepthwiseProblem) -> dict[str, Any]:
    """Its constructor's arguments, and what follows from them: out_size, least_bytes, multiply_adds."""
    return asdict(problem) | {"least_bytes": problem.least_bytes, "multiply_adds": problem.multiply_adds}


def problem_from_json(values: dict[str, Any]) -> DepthwiseProblem:
    """A problem that `problem_to_json` wrote, of this version or an earlier one with fewer fields."""
    arguments = {f.name: _tuples(values[f.name]) for f in fields(DepthwiseProblem) if f.init and f.name in values}
    return DepthwiseProblem(**arguments | {"epilogue": Epilogue(**values.get("epilogue", {}))})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def to_json(report: Report) -> str:
    """The whole report; times in seconds. `from_json` reads it back."""
    cases = [asdict(case) | {"problem": problem_to_json(case.problem)} for case in report.cases]
    means = [asdict(mean) for mean in report.means()]
    content = {"format": FORMAT, "conditions": asdict(report.conditions), "means": means, "cases": cases}
    # JSON knows no infinity: an error that is not finite (a NaN in a result) becomes the string "inf"
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return "inf" if isinstance(value, float) and not math.isfinite(value) else value


def from_json(text: str) -> Report:
    """A report that `to_json` wrote.

    Raises:
        DepthwiseError: the text is no such report.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise DepthwiseError(f"the report has format {content['format']}; this version reads {FORMAT}")
        cases = tuple(_case_from_json(case) for case in content["cases"])
        return Report(Conditions(**content["conditions"]), cases)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DepthwiseError(f"this is no report that `dwconv bench --json` wrote ({error})") from error


def _case_from_json(values: dict[str, Any]) -> CaseResult:
    rows = []
    for row in values["rows"]:
        share = {key: None if row[key] is None else float(row[key]) for key in ("error", "error_share")}
        rows.append(Row(**{**row, **share, "timing": Timing(**row["timing"])}))
    problem = problem_from_json(values["problem"])
    return CaseResult(
        **{
            **values,
            "problem": problem,
            "problem_class": problem_class(problem),
            "copy": Timing(**values["copy"]),
            "rows": tuple(rows),
            "missing": tuple(Missing(**entry) for entry in values["missing"]),
        }
    )


def merged(reports: Sequence[Report]) -> Report:
    """One report of several, taken in parts under the same conditions.

    Of a case that several hold, the last counts.

    Raises:
        DepthwiseError: there are none, or they were taken on different cards or versions, or in different ways.
    """
    if not reports:
        raise DepthwiseError("nothing to merge: give the files that `dwconv bench --json` wrote")
    conditions = [report.conditions for report in reports]
    first = conditions[0]
    for name in ("device", "driver", "cuda", "torch", "dwconv", "l2"):
        values = list(dict.fromkeys(getattr(each, name) for each in conditions))
        if len(values) > 1:
            raise DepthwiseError(
                f"reports with different {name} ({' and '.join(values)}) can't be merged: measure again in one place"
            )
    cases = {(case.name, case.problem): case for report in reports for case in report.cases}
    joined = replace(
        first,
        commit=", ".join(dict.fromkeys(each.commit for each in conditions)),
        date=max(each.date for each in conditions),
        rounds=min(each.rounds for each in conditions),
        command="; ".join(dict.fromkeys(each.command for each in conditions)),
    )
    return Report(joined, tuple(cases.values()))


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that an existing one is replaced only by a complete one.

    Raises:
        DepthwiseError: it can't be written there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DepthwiseError(
            f"{path} can't be written ({error.strerror}): choose a file in a writable folder"
        ) from error
