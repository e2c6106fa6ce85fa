"""Times tiles of direct_nchw beside each other on this machine's GPU: the tool behind docs/measurements.md.

    PYTHONPATH=src python benchmarks/sweep_tiles.py --case 85 --rows 3,4 --threads 96,192 --blocks 1,7 --json tiles.json

Tries every combination of the options, leaves out what is not legal and what spills, checks each result against
PyTorch's, and prints the best. Tiles with the same figures differ by noise only: look at the spread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from dwconv.bench.results import attainment, write_whole
from dwconv.bench.run import conditions_here
from dwconv.bench.suites import load_suite
from dwconv.bench.timing import copy_contender, measure
from dwconv.compile import compile_many
from dwconv.launch import device_spec, launcher
from dwconv.ops import torch_conv2d
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem
from dwconv.roofline import roofline
from dwconv.variants.direct_nchw import DirectNchw, window_tile

ROUNDS = 15
BEST = 12


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def plans_of(problem: DepthwiseProblem, options: argparse.Namespace) -> dict[str, Plan]:
    """The legal tiles among all combinations of the options, by name."""
    found = {}
    for columns, rows, threads, blocks in itertools.product(
        options.columns.split(","), options.rows, options.threads, options.blocks
    ):
        slots, vector = (int(part) for part in columns.split("x"))
        tile = window_tile(problem, vector, slots, rows, threads, blocks)
        plan = DirectNchw().plan(problem, device_spec(0), tile)
        if isinstance(plan, Plan):
            found[f"{rows} rows, {columns} columns, {threads} threads, {blocks} blocks"] = plan
    return found


def sweep(problem: DepthwiseProblem, plans: dict[str, Plan]) -> list[dict[str, object]]:
    """Attainment, spread and registers of every plan that meets its blocks without spilling, the best first."""
    x = torch.rand(problem.x_shape, device="cuda")
    weight = torch.randn(problem.weight_shape, device="cuda")
    expected = torch_conv2d(x, weight, None, problem.stride, problem.padding, problem.dilation)
    y = torch.empty_like(expected)
    contenders, registers = {"copy": copy_contender(problem.least_bytes, "cuda")}, {}
    for (name, plan), kernel in zip(plans.items(), compile_many(plans.values()), strict=True):
        if kernel.constants != plan.constants:
            continue  # it would spill
        run = launcher(plan, kernel, 0)
        y.fill_(float("nan"))
        run(x.data_ptr(), weight.data_ptr(), 0, y.data_ptr())
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        contenders[name] = lambda run=run: run(x.data_ptr(), weight.data_ptr(), 0, y.data_ptr())
        registers[name] = kernel.resources.registers
    del expected
    timings = measure(contenders, rounds=ROUNDS, limit_seconds=60)
    copy, fma = timings.pop("copy").median, roofline(problem, device_spec(0)).fma
    rows = [
        {
            "tile": name,
            "attainment": round(attainment(copy, fma, timing.median), 4),
            "spread": round(timing.spread, 4),
            "registers": registers[name],
        }
        for name, timing in timings.items()
    ]
    return sorted(rows, key=lambda row: -float(str(row["attainment"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", required=True, help="part of a KernelBench case's name; repeatable")
    parser.add_argument("--columns", default="2x4,1x4", help="slots x vector of a lane (default 2x4,1x4)")
    parser.add_argument("--rows", type=numbers, default=(2, 3, 4))
    parser.add_argument("--threads", type=numbers, default=(96, 128, 192, 256))
    parser.add_argument("--blocks", type=numbers, default=(1,), help="blocks that a multiprocessor shall hold")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    command = shlex.join(["python", "benchmarks/sweep_tiles.py", *sys.argv[1:]])
    report = {"conditions": asdict(conditions_here(torch, ROUNDS, command)), "cases": {}}
    for case in load_suite("kernelbench"):
        if not any(part in case.name for part in options.case):
            continue
        problem = case.problem("float32", "channels_first", "forward")
        rows = sweep(problem, plans_of(problem, options))
        report["cases"][case.name] = rows
        print(f"{case.name}: {len(rows)} tiles")
        for row in rows[:BEST]:
            print(f"  {row['attainment']:.3f} ±{row['spread']:.1%} {row['registers']:4d} registers  {row['tile']}")
        torch.cuda.empty_cache()
    if options.json:
        write_whole(options.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
