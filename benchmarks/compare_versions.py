"""Times what several versions of dwconv choose, side by side on one GPU in one run: cards and runs differ by percents.

    PYTHONPATH=src python benchmarks/compare_versions.py --compile before.xz --direction grad_weight
    PYTHONPATH=src python benchmarks/compare_versions.py --compile after.xz --direction grad_weight
    PYTHONPATH=src python benchmarks/compare_versions.py --times before=before.xz after=after.xz --text compared.txt

The first two need no GPU, each in a checkout of its version; --arch says what they compile for. --times runs every
version's plans one after the other in each round, and the first version's a second time: its ratio to itself is noise.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from compiled_plans import COPY, read, time_plans, write

from dwconv.bench.results import attainment, geometric_mean, write_whole
from dwconv.bench.run import conditions_here
from dwconv.bench.suites import DIRECTIONS, LAYOUTS, SUITES, load_suite, select
from dwconv.choose import ranked
from dwconv.compile import CompiledKernel, compile_first
from dwconv.device import PRESETS, preset
from dwconv.launch import device_spec
from dwconv.plan import Plan
from dwconv.problem import DTYPE_BYTES, DepthwiseProblem
from dwconv.roofline import roofline

ROUNDS = 15
OFFERED = 3  # plans of a problem that are tried until one doesn't spill
AGAIN = "again"  # the label of the first version's second time

Chosen = tuple[str, Plan, CompiledKernel]  # of a case


def chosen(case: tuple[str, DepthwiseProblem, str]) -> Chosen:
    """What this version chooses for a case, as machine code of an architecture."""
    name, problem, arch = case
    plan, kernel = compile_first(ranked(problem, preset(arch))[:OFFERED])
    return name, plan, kernel


def compile_cases(options: argparse.Namespace) -> None:
    cases = [case for suite in options.suite or SUITES for case in load_suite(suite)]
    picked = list(select(cases, options.case, options.dtype, options.layout, options.direction))
    found: list[Chosen] = []
    with ProcessPoolExecutor() as pool:
        for one in pool.map(chosen, [(name, problem, options.arch) for name, problem in picked]):
            found.append(one)
            print(f"\r{len(found)} of {len(picked)} cases compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    write(options.compile, found)


def compare(options: argparse.Namespace) -> str:
    """Times all cases that every version has; a line of each, those that gained most first."""
    files = dict(each.split("=", 1) for each in options.times)
    labels = list(files)
    first, last = labels[0], labels[-1]
    cases: dict[tuple[str, DepthwiseProblem], dict[str, tuple[Plan, CompiledKernel]]] = {}
    for label, path in files.items():
        for name, plan, kernel in read(Path(path)):
            cases.setdefault((name, plan.problem), {})[label] = (plan, kernel)
    device, rows = device_spec(0), []
    for (name, problem), versions in cases.items():
        if len(versions) < len(files):
            continue
        timings = time_plans(problem, versions | {AGAIN: versions[first]}, ROUNDS)
        seconds = {label: timing.median for label, timing in timings.items()}
        if {first, last, AGAIN} <= seconds.keys():
            rows.append((seconds[last] / seconds[first], name, problem, seconds, versions[last][0]))
        torch.cuda.empty_cache()
    rows.sort(key=lambda row: row[0])

    conditions = conditions_here(torch, ROUNDS, shlex.join(["python", "benchmarks/compare_versions.py", *sys.argv[1:]]))
    lines = [
        conditions.command,
        f"{conditions.device}, driver {conditions.driver}, torch {conditions.torch}, {conditions.date}",
        f"{conditions.l2} L2, medians of {ROUNDS} interleaved rounds",
        "",
    ]
    for variant in sorted({row[4].variant for row in rows}):
        alike = [row for row in rows if row[4].variant == variant]
        noise = geometric_mean(row[3][AGAIN] / row[3][first] for row in alike)
        lines.append(
            f"{variant}: {len(alike)} cases, {geometric_mean(row[0] for row in alike):.3f} (noise {noise:.3f})"
        )
    lines += ["", f"{'  '.join(f'{label:>9} us' for label in labels)}   ratio  attainment"]
    for ratio, name, problem, seconds, plan in rows:
        times = "  ".join(f"{seconds[label] * 1e6:12.2f}" if label in seconds else f"{'-':>12}" for label in labels)
        fma = roofline(problem, device).fma
        was, now = (attainment(seconds[COPY], fma, seconds[label]) for label in (first, last))
        layout = problem.layout.removeprefix("channels_")
        lines.append(
            f"{times}  {ratio:.3f}  {was:.3f} -> {now:.3f}  {name} {problem.dtype} {layout} {problem.direction}: "
            f"{plan.variant}: {plan.tile}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--compile", type=Path, metavar="FILE", help="compiles what this version chooses, without a GPU")
    what.add_argument("--times", nargs="+", metavar="LABEL=FILE", help="times such files beside each other")
    parser.add_argument("--suite", action="append", choices=SUITES, help="all by default; repeatable, as the next ones")
    parser.add_argument("--case", action="append", default=[], help="part of a case's name")
    parser.add_argument("--dtype", action="append", default=[], choices=DTYPE_BYTES)
    parser.add_argument("--layout", action="append", default=[], choices=LAYOUTS)
    parser.add_argument("--direction", action="append", default=[], choices=DIRECTIONS)
    parser.add_argument("--arch", default="sm_90", choices=PRESETS)
    parser.add_argument("--text", type=Path, metavar="FILE", help="where --times writes its lines, too")
    options = parser.parse_args()
    if options.compile:
        compile_cases(options)
        return
    text = compare(options)
    print(text, end="")
    if options.text:
        write_whole(options.text, text)


if __name__ == "__main__":
    main()
