"""Where the warps of chosen kernels are, and what they wait for: samples by instruction, with Nsight Compute.

    PYTHONPATH=src ncu --clock-control none -k regex:dwconv_kernel --section SourceCounters -o report \\
        python benchmarks/where_warps_wait.py --case mednext --dtype float32 --layout channels_first
    ncu -i report.ncu-rep --page source --csv > samples.csv
    PYTHONPATH=src python benchmarks/where_warps_wait.py --samples samples.csv

The first launches what dwconv chooses for each case once, and prints which is which. The last prints, of each kernel in
that order: reasons of all samples, and of those when the scheduler issued nothing, which is what costs time; samples of
instructions that run equally often, as parts of the kernel do; and the instructions with most samples.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path

import torch

from dwconv.bench.baselines import empty_result, make_tensors, variant_contender
from dwconv.bench.suites import DIRECTIONS, LAYOUTS, SUITES, load_suite, select
from dwconv.choose import choose
from dwconv.launch import device_spec
from dwconv.problem import DTYPE_BYTES

SAMPLES, IDLE, EXECUTED = "# Samples", " (Not Issued)", "Instructions Executed"  # columns of Nsight Compute
PARTS = 8  # of a kernel that are shown
LITTLE = 0.02  # of all samples: reasons that aren't shown

Row = dict[str, str]


def launch_chosen(options: argparse.Namespace) -> None:
    """Runs the chosen kernel of each case once."""
    cases = [case for suite in options.suite or SUITES for case in load_suite(suite)]
    picked = select(cases, options.case, options.dtype, options.layout, options.direction)
    for number, (name, problem) in enumerate(picked):
        plan = choose(problem, device_spec(0))
        contender = variant_contender(plan, make_tensors(problem, "cuda"), empty_result(problem, "cuda"))
        contender.run()
        torch.cuda.synchronize()
        print(f"{number}: {name} {problem.dtype} {problem.layout} {problem.direction}: {plan.variant}: {plan.tile}")
        del contender
        torch.cuda.empty_cache()


def kernels(path: Path) -> list[list[Row]]:
    """The instructions of each kernel of a source page, with their counters."""
    found: list[list[Row]] = []
    names: list[str] = []
    with path.open(newline="") as file:
        for line in csv.reader(file):
            if line and line[0] == "Kernel Name":
                found.append([])
                names = []
            elif line and line[0] == "Address":
                names = line
            elif names:
                found[-1].append(dict(zip(names, line, strict=True)))
    return found


def reasons(rows: list[Row], idle: bool) -> str:
    """Shares of all samples by what warps waited for; `idle`: of those when nothing was issued."""
    total = sum(int(row[SAMPLES]) for row in rows)
    columns = [name for name in rows[0] if name.startswith("stall_") and name.endswith(IDLE) == idle]
    shares = Counter({name: sum(int(row[name]) for row in rows) / max(1, total) for name in columns})
    return ", ".join(
        f"{name.removeprefix('stall_').removesuffix(IDLE)} {share:.0%}"
        for name, share in shares.most_common()
        if share >= LITTLE
    )


def describe(rows: list[Row], top: int) -> str:
    """A kernel's samples: by reason, by part, and of the `top` instructions with most of them."""
    total = max(1, sum(int(row[SAMPLES]) for row in rows))
    count, share = Counter[int](), Counter[int]()
    for row in rows:
        count[int(row[EXECUTED])] += 1
        share[int(row[EXECUTED])] += int(row[SAMPLES])
    parts = ", ".join(
        f"{count[executed]} instructions {executed} times {samples / total:.0%}"
        for executed, samples in share.most_common(PARTS)
    )
    lines = [f"  all samples: {reasons(rows, idle=False)}", f"  nothing issued: {reasons(rows, idle=True)}"]
    lines.append(f"  parts: {parts}")
    most = sorted(enumerate(rows), key=lambda each: -int(each[1][SAMPLES]))[:top]
    lines += [f"  {int(row[SAMPLES]) / total:6.1%}  {16 * at:#7x}  {row['Source'].strip()}" for at, row in most]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path, metavar="FILE", help="prints what Nsight Compute's source page has")
    parser.add_argument("--top", type=int, default=12, help="instructions of a kernel that are shown")
    parser.add_argument("--suite", action="append", choices=SUITES, help="all by default; repeatable, as the next ones")
    parser.add_argument("--case", action="append", default=[], help="part of a case's name")
    parser.add_argument("--dtype", action="append", default=[], choices=DTYPE_BYTES)
    parser.add_argument("--layout", action="append", default=[], choices=LAYOUTS)
    parser.add_argument("--direction", action="append", default=[], choices=DIRECTIONS)
    options = parser.parse_args()
    if not options.samples:
        launch_chosen(options)
        return
    for number, rows in enumerate(kernels(options.samples)):
        print(f"{number}: {len(rows)} instructions")
        print(describe(rows, options.top))


if __name__ == "__main__":
    main()
