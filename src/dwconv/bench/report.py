"""A report for people: a table on the terminal, or Markdown. Ratios stand before absolute times."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .results import CaseResult, Conditions, Report, Row

NOISY_SPREAD = 0.05
CASE_COLUMNS = ("case", "contender", "attainment", "× eager", "× fastest", "× copy", "time", "spread", "error/bound")
MEAN_COLUMNS = (
    "class", "contender", "cases", "attainment", "least", "target", "below", "× eager", "× fastest", "slower",
)  # fmt: skip
SHORT_COLUMNS = ("case", "class", "attainment", "target", "× fastest", "tile")
_TEXT_COLUMNS = frozenset({"case", "contender", "class", "tile"})
NONE = "–"


def duration(seconds: float) -> str:
    """Three or more digits with a fitting unit.

    >>> duration(2.0136e-3), duration(51.4e-6), duration(1.5)
    ('2.014 ms', '51.4 µs', '1.50 s')
    """
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def amount(number: float, unit: str) -> str:
    """Three digits with a decimal prefix.

    >>> amount(2139490560, "B"), amount(2396160, "FMA")
    ('2.14 GB', '2.4 MFMA')
    """
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def condition_lines(conditions: Conditions) -> tuple[str, ...]:
    """The conditions of a run in three lines."""
    commits = ", ".join(commit[:12] for commit in conditions.commit.split(", "))
    commit = f" ({commits})" if commits else ""
    return (
        (
            f"{conditions.device}, driver {conditions.driver}, torch {conditions.torch} (CUDA {conditions.cuda}), "
            f"dwconv {conditions.dwconv}{commit}, {conditions.date}"
        ),
        (
            f"{conditions.l2} L2, {conditions.rounds} interleaved rounds, medians; spread: width of the middle half of "
            "all samples over the median"
        ),
        f"$ {conditions.command}",
    )


def case_line(case: CaseResult) -> str:
    """What was computed, and its yardsticks."""
    problem = case.problem
    return (
        f"{problem}; {amount(problem.least_bytes, 'B')}: copy {duration(case.copy.median)}; "
        f"{amount(problem.multiply_adds, 'FMA')}: {duration(case.fma_seconds)}"
    )


def _two(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}"


def case_cells(case: CaseResult, row: Row) -> tuple[str, ...]:
    """The cells of CASE_COLUMNS after the first."""
    return (
        row.contender,
        f"{row.attainment:.3f}",
        _two(row.over_eager),
        _two(case.over_fastest(row)),
        f"{row.over_copy:.3f}",
        duration(row.timing.median),
        f"{row.timing.spread:.1%}",
        _two(row.error_share),
    )


def mean_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """The cells of MEAN_COLUMNS."""
    for mean in report.means():
        yield (
            mean.problem_class,
            mean.contender,
            str(mean.cases),
            f"{mean.attainment:.3f}",
            f"{mean.least_attainment:.3f}",
            _two(mean.target),
            str(mean.below),
            _two(mean.over_eager),
            _two(mean.over_fastest),
            NONE if mean.over_fastest is None else str(mean.slower),
        )


def short_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """The cells of SHORT_COLUMNS: every case where dwconv misses its target or is slower than PyTorch."""
    for case, row in report.short:
        yield (
            f"{case.name}, {_short(case)}",
            case.problem_class,
            f"{row.attainment:.3f}",
            _two(case.target),
            _two(case.over_fastest(row)),
            row.note,
        )


def remarks(report: Report) -> Iterator[str]:
    """What a reader must know beside the figures: wrong results, noise, contenders without a figure."""
    for case, row in report.wrong:
        yield f"WRONG: {row.contender} on {case.name} ({case.problem}): {row.error_share:.3g} times the rounding bound"
    noisy = [row for case in report.cases for row in case.rows if row.timing.spread > NOISY_SPREAD]
    if noisy:
        yield (
            f"{len(noisy)} of {sum(len(case.rows) for case in report.cases)} figures spread by more than "
            f"{NOISY_SPREAD:.0%}: is the GPU busy with other work? More rounds (--rounds) narrow the median."
        )
    absent: dict[tuple[str, str], list[str]] = {}
    for case in report.cases:
        for missing in case.missing:
            absent.setdefault((missing.contender, missing.reason), []).append(case.name)
    for (contender, reason), names in absent.items():
        where = names[0] if len(names) == 1 else f"{len(names)} cases, the first {names[0]}"
        yield f"no figure for {contender} ({where}): {reason}"


def terminal(report: Report) -> RenderableType:
    """The report as rich renders it."""
    cases = _table(CASE_COLUMNS)
    for case in report.cases:
        cases.add_row(Text(case.name, style="bold"), Text("copy", style="dim"), *[""] * 4, *_copy_cells(case), "")
        for number, row in enumerate(case.rows):
            style = "red" if not row.within_bound else "green" if row.contender == "dwconv" else ""
            label = _short(case) if number == 0 else ""
            cases.add_row(Text(label, style="dim"), *(Text(cell, style=style) for cell in case_cells(case, row)))
        cases.add_section()
    means = _table(MEAN_COLUMNS, title="geometric means by class")
    for cells in mean_rows(report):
        means.add_row(*map(escape, cells))
    short = _table(SHORT_COLUMNS, title="below the target, or slower than eager or torch.compile")
    for cells in short_rows(report):
        short.add_row(*map(escape, cells))
    lines = [Text(line, style="dim") for line in condition_lines(report.conditions)]
    notes = [Text(line, style="bold red" if line.startswith("WRONG") else "yellow") for line in remarks(report)]
    return Group(*lines, cases, *([short] if report.short else []), means, *notes)


def _copy_cells(case: CaseResult) -> tuple[Text, Text]:
    return Text(duration(case.copy.median), style="dim"), Text(f"{case.copy.spread:.1%}", style="dim")


def _short(case: CaseResult) -> str:
    problem = case.problem
    direction = "" if problem.direction == "forward" else f" {problem.direction}"
    return f"{problem.dtype} {problem.layout}{direction}"


def _table(columns: tuple[str, ...], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        text = column in _TEXT_COLUMNS
        table.add_column(column, justify="left" if text else "right", no_wrap=column not in ("case", "tile"))
    return table


def markdown(report: Report) -> str:
    """The report as Markdown: conditions, means, every case, remarks."""
    device, method, command = condition_lines(report.conditions)
    parts = [
        f"Conditions: {device}. {method[0].upper()}{method[1:]}.",
        f"```\n{command}\n```",
        (
            "attainment = the larger of copy time and FMA time, over the measured time; × eager and × copy: how many "
            "times as fast as each; × fastest: as the faster one of eager and torch.compile. below: cases that attain "
            "less than the target of their class; slower: cases slower than the faster one of eager and torch.compile."
        ),
        "## Geometric means by class",
        _markdown_table(MEAN_COLUMNS, mean_rows(report)),
    ]
    if report.short:
        parts += ["## Below the target, or slower than PyTorch", _markdown_table(SHORT_COLUMNS, short_rows(report))]
    rows = ((f"{case.name}, {_short(case)}", *case_cells(case, row)) for case in report.cases for row in case.rows)
    parts += ["## Cases", _markdown_table(CASE_COLUMNS, rows)]
    parts.append("## Problems\n\n" + "\n".join(f"- **{case.name}**: {case_line(case)}" for case in report.cases))
    found = [f"- {line}" for line in remarks(report)]
    if found:
        parts.append("## Remarks\n\n" + "\n".join(found))
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = tuple("---" if column in _TEXT_COLUMNS else "---:" for column in columns)
    return "\n".join([line(columns), line(rule), *map(line, rows)])


def print_report(report: Report, console: Console) -> None:
    console.print(terminal(report))
