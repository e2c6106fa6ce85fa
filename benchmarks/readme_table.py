"""Writes README.md's tables of results from reports of `dwconv bench --json`.

python benchmarks/readme_table.py                    replaces what stands between the markers in README.md
python benchmarks/readme_table.py --check            changes nothing; exits with 1 if README.md has other figures
python benchmarks/readme_table.py --results FOLDER   takes the reports of another folder
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from dwconv.bench.report import duration
from dwconv.bench.results import EAGER, OURS, CaseResult, Report, Row, from_json, geometric_mean, write_whole

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "nvidia_h200"

# What stands beside dwconv.conv2d, and how the table calls it. The plain variants show what the fast one gains.
BESIDE = {EAGER: "PyTorch", "compile": "torch.compile", "tile16": "tile16", "one_per_thread": "one_per_thread"}
NONE = "–"
MOST_COMMANDS = 2  # that a caption repeats


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


def kernelbench_table(report: Report, source: str) -> str:
    """A row for each problem, then the conditions and what the columns mean.

    `source` is the report's path from the root of the repository.
    """
    beside = [name for name in BESIDE if name in report.contenders]
    headings = ["KernelBench", "input N×C×H×W, filter", "dtype, layout", "times as fast as PyTorch", "attainment, time"]
    headings += [BESIDE[name] for name in beside]
    rows = [line(headings), line([*["---"] * 3, *["---:"] * (len(headings) - 3)])]
    for case in report.cases:
        ours = case.row(OURS)
        ratio = NONE if ours is None or ours.over_eager is None else f"**{ours.over_eager:.2f}**"
        kind = f"{case.problem.dtype}, {case.problem.layout.replace('_', ' ')}"
        cells = [*problem_cells(case), kind, ratio, with_seconds(ours)]
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
            "",
            ratio if ratio == NONE else f"**{ratio}**",
            *(mean(name, "attainment") for name in (OURS, *beside)),
        ]
    )


def models_table(report: Report, source: str) -> str:
    """A row for each class of problems: dwconv's attainment, and how it compares with PyTorch."""
    headings = [
        "class",
        "cases",
        "attainment",
        "worst",
        "times as fast as PyTorch",
        "as the faster of it and torch.compile",
    ]
    rows = [line([*headings, "PyTorch's attainment"]), line(["---", *["---:"] * len(headings)])]
    means = {(mean.problem_class, mean.contender): mean for mean in report.means()}
    for (name, contender), mean in means.items():
        if contender != OURS:
            continue
        eager = means.get((name, EAGER))
        cells = [name, str(mean.cases), f"**{mean.attainment:.2f}**", f"{mean.least_attainment:.2f}"]
        cells += [NONE if ratio is None else f"{ratio:.2f}" for ratio in (mean.over_eager, mean.over_fastest)]
        rows.append(line([*cells, NONE if eager is None else f"{eager.attainment:.2f}"]))
    return "\n".join(rows) + "\n\n" + conditions(report, [EAGER], source)


# The name of a pair of markers: the report that stands between them, and how.
TABLES: dict[str, tuple[str, Callable[[Report, str], str]]] = {
    "results": ("kernelbench.json", kernelbench_table),
    "models": ("models.json", models_table),
    "gradients": ("gradients.json", models_table),
}


def conditions(report: Report, beside: list[str], source: str) -> str:
    """How the figures came about."""
    dtypes = _listed([case.problem.dtype for case in report.cases])
    layouts = _listed([case.problem.layout for case in report.cases]).replace("_", " ")
    directions = _listed([case.problem.direction for case in report.cases])
    where = report.conditions
    # where the report went, and in how many parts it was taken, decides no figure
    commands = re.sub(r" --(json|markdown|shard) [^\s;]+", "", where.command).split("; ")
    few = len(set(commands)) <= MOST_COMMANDS
    command = _listed(commands, "`") if few else "the commands that it names"
    device = (
        f"{where.device}, driver {where.driver}, torch {where.torch}, dwconv {where.dwconv}, {where.date.split('T')[0]}"
    )
    shown = [row for case in report.cases for name in (OURS, *beside) if (row := case.row(name)) is not None]
    wrong = [f"{row.contender} on {case.name}" for case, row in report.wrong]
    remark = f" **Not within the rounding bound: {', '.join(wrong)}.**" if wrong else ""
    return (
        f"{dtypes}, {layouts}, {directions}. {device}. {where.l2.capitalize()} L2, "
        f"{min(row.timing.samples for row in shown)} or more interleaved rounds, medians; the widest middle half of a "
        f"figure's samples is {max(row.timing.spread for row in shown):.1%} of its median. Every result was compared "
        f"with a float64 reference first.{remark} Attainment: the time of a copy that moves as many bytes, measured in "
        "the same rounds, or the least time of the arithmetic where that is larger, over the measured time. "
        f"Figures: [{source}]({source}), by {command}."
    )


def _listed(words: list[str], quote: str = "") -> str:
    """ "a, b and c", each once."""
    *most, last = (f"{quote}{word}{quote}" for word in dict.fromkeys(words))
    return f"{', '.join(most)} and {last}" if most else last


def between_markers(readme: str, name: str) -> str:
    """What stands between the markers of a table, without the empty lines around it."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if readme.count(start) != 1 or readme.count(end) != 1:
        raise SystemExit(f"README.md must hold {start} and {end} once each")
    return readme.split(start)[1].split(end)[0].strip("\n")


def with_table(readme: str, name: str, text: str) -> str:
    """README.md with this text between the markers of a table."""
    between_markers(readme, name)  # raises where they are missing
    before, start, rest = readme.partition(f"<!-- {name} -->")
    end = f"<!-- /{name} -->"
    return f"{before}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def tables(results: Path) -> dict[str, str]:
    """The text of every table, by the name of its markers."""
    found = {}
    for name, (file, written) in TABLES.items():
        path = (results / file).resolve()
        source = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        found[name] = written(from_json(path.read_text(encoding="utf-8")), source)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=README, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if the figures differ")
    options = parser.parse_args()
    before = readme = options.readme.read_text(encoding="utf-8")
    for name, text in tables(options.results).items():
        readme = with_table(readme, name, text)
    if options.check:
        print(
            f"{options.readme.name} {'has' if readme == before else 'does not have'} the figures of {options.results}"
        )
        return 0 if readme == before else 1
    write_whole(options.readme, readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
