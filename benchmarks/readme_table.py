"""Writes README.md's table of results from a report of `dwconv bench --json`.

python benchmarks/readme_table.py                        replaces what stands between the markers in README.md
python benchmarks/readme_table.py --check                changes nothing; exits with 1 if README.md has other figures
python benchmarks/readme_table.py --report OTHER.json    takes another report
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from dwconv.bench.report import duration
from dwconv.bench.results import EAGER, OURS, CaseResult, Report, Row, from_json, geometric_mean, write_whole

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REPORT = ROOT / "benchmarks" / "results" / "nvidia_h200" / "kernelbench.json"
START, END = "<!-- results -->", "<!-- /results -->"

# What stands beside dwconv.conv2d, and how the table calls it. The plain variants show what the fast one gains.
BESIDE = {EAGER: "PyTorch", "compile": "torch.compile", "tile16": "tile16", "one_per_thread": "one_per_thread"}
NONE = "–"


def problem_cells(case: CaseResult) -> tuple[str, str]:
    """The name of a case, as "82", and what it computes."""
    problem = case.problem
    number, _, rest = case.name.partition("_")
    by = "×".join
    text = f"{by(map(str, problem.x_shape))}, {by(map(str, problem.filter))}"
    for name in ("stride", "dilation"):
        value = getattr(problem, name)
        if set(value) != {1}:
            text += f", {name} {by(map(str, value))}"
    if any(map(sum, problem.padding)):
        text += f", padding {by(str(before) for before, _ in problem.padding)}"
    return (number if number.isdigit() else f"{number} {rest}".strip()), text


def share(row: Row | None) -> str:
    return NONE if row is None else f"{row.attainment:.2f}"


def with_seconds(row: Row | None) -> str:
    return NONE if row is None else f"{row.attainment:.2f}, {duration(row.timing.median)}"


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(report: Report, source: str) -> str:
    """The text between the markers: the table, then its conditions and what the columns mean.

    `source` is the report's path from the root of the repository.
    """
    beside = [name for name in BESIDE if name in report.contenders]
    headings = ["KernelBench", "input N×C×H×W, filter", "times as fast as PyTorch", "attainment, time"]
    headings += [BESIDE[name] for name in beside]
    rows = [line(headings), line(["---", "---", *["---:"] * (len(headings) - 2)])]
    for case in report.cases:
        ours = case.row(OURS)
        ratio = NONE if ours is None or ours.over_eager is None else f"**{ours.over_eager:.2f}**"
        cells = [*problem_cells(case), ratio, with_seconds(ours)]
        cells += [(with_seconds if name == EAGER else share)(case.row(name)) for name in beside]
        rows.append(line(cells))
    if len(report.cases) > 1:
        rows.append(mean_line(report, beside))
    return "\n".join(rows) + "\n\n" + conditions(report, beside, source)


def mean_line(report: Report, beside: list[str]) -> str:
    def mean(name: str, of: str) -> str:
        values = [getattr(row, of) for case in report.cases if (row := case.row(name)) is not None]
        known = [value for value in values if value is not None]
        return f"{geometric_mean(known):.2f}" if len(known) == len(report.cases) else NONE

    ratio = mean(OURS, "over_eager")
    return line(
        [
            "",
            "geometric mean",
            ratio if ratio == NONE else f"**{ratio}**",
            *(mean(name, "attainment") for name in (OURS, *beside)),
        ]
    )


def conditions(report: Report, beside: list[str], source: str) -> str:
    """How the figures came about."""
    dtypes = " and ".join(dict.fromkeys(case.problem.dtype for case in report.cases))
    layouts = " and ".join(dict.fromkeys(case.problem.layout for case in report.cases)).replace("_", " ")
    where = report.conditions
    command = re.sub(r" --(json|markdown) \S+", "", where.command)  # where the report went decides no figure
    device = (
        f"{where.device}, driver {where.driver}, torch {where.torch}, dwconv {where.dwconv}, {where.date.split('T')[0]}"
    )
    shown = [row for case in report.cases for name in (OURS, *beside) if (row := case.row(name)) is not None]
    wrong = [f"{row.contender} on {case.name}" for case, row in report.wrong]
    remark = f" **Not within the rounding bound: {', '.join(wrong)}.**" if wrong else ""
    return (
        f"{dtypes}, {layouts}, forward. {device}. {where.l2.capitalize()} L2, "
        f"{min(row.timing.samples for row in shown)} or more interleaved rounds, medians; the widest middle half of a "
        f"figure's samples is {max(row.timing.spread for row in shown):.1%} of its median. Every result was compared "
        f"with a float64 reference first.{remark} Attainment: the time of a copy that moves as many bytes, measured in "
        "the same rounds, or the least time of the arithmetic where that is larger, over the measured time. "
        f"Figures: [{source}]({source}), by `{command}`."
    )


def between_markers(readme: str) -> str:
    """What stands between the markers, without the empty lines around it."""
    if readme.count(START) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md must hold {START} and {END} once each")
    return readme.split(START)[1].split(END)[0].strip("\n")


def with_table(readme: str, text: str) -> str:
    """README.md with this text between the markers."""
    between_markers(readme)  # raises where they are missing
    before, _, rest = readme.partition(START)
    return f"{before}{START}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", type=Path, default=REPORT, help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=README, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if the figures differ")
    options = parser.parse_args()
    path = options.report.resolve()
    source = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    text = table(from_json(path.read_text(encoding="utf-8")), source)
    readme = options.readme.read_text(encoding="utf-8")
    if options.check:
        same = between_markers(readme) == text
        print(f"{options.readme.name} {'has' if same else 'does not have'} the figures of {source}")
        return 0 if same else 1
    write_whole(options.readme, with_table(readme, text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
