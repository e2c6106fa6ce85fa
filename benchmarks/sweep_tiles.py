"""Times tiles of a variant on this machine's GPU, all or those predicted as best, beside a copy of as many bytes.

    PYTHONPATH=src python benchmarks/sweep_tiles.py --variant direct_nchw --case 82_ --case 85_ --json tiles.json
    PYTHONPATH=src python benchmarks/sweep_tiles.py --variant taps_nchw --suite models --direction grad_weight --first 8
    PYTHONPATH=src python benchmarks/sweep_tiles.py --variant wide_nhwc --suite models --dtype float32 \\
        --vary part_rows=0,14,28 --vary stage_rows=2,4 --vary threads=64,128,192 --sample 90
    PYTHONPATH=src python benchmarks/sweep_tiles.py --variant taps_nhwc --suite models --direction grad_weight \\
        --sample 20 --compile tiles.xz
    PYTHONPATH=src python benchmarks/sweep_tiles.py --compiled tiles.xz --json tiles.json

Leaves out what spills or gives a wrong result, and prints the best, the one that the variant prefers with an arrow.
Tiles with the same figures differ by noise only: look at the spread. --vary gives fields of the tiles other values, all
combinations of them, and --sample times some of these, the same ones each time: what no model would have chosen.
--compile only compiles, for the architecture of --arch and without a GPU; --compiled times what such a file has: a
thousand tiles take minutes of a CPU, and then seconds of a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compiled_plans import COPY, read, time_plans, write

from dwconv.bench.baselines import best_plan
from dwconv.bench.results import attainment, write_whole
from dwconv.bench.run import conditions_here
from dwconv.bench.suites import DIRECTIONS, LAYOUTS, SUITES, load_suite, select
from dwconv.choose import candidates
from dwconv.compile import CompiledKernel, compile_many
from dwconv.device import PRESETS, DeviceSpec, preset
from dwconv.errors import DepthwiseError
from dwconv.launch import device_spec
from dwconv.plan import Plan, legal
from dwconv.problem import DTYPE_BYTES, DepthwiseProblem
from dwconv.roofline import roofline
from dwconv.variants import REGISTRY

ROUNDS = 15
BEST = 12

Values = tuple[str, list[int]]  # of a tile's field, true and false as 1 and 0
Tiles = dict[str, tuple[Plan, CompiledKernel]]


def varied(problem: DepthwiseProblem, device: DeviceSpec, stem: str, fields: Sequence[Values]) -> dict[str, Plan]:
    """Legal plans of a variant's tiles whose fields take other values, all combinations of them, by their names."""
    variant = REGISTRY[stem]
    seen: Any = variant  # a variant's `plan` takes one of its tiles, which its plans tell by a sentence alone
    with mock.patch.object(seen, "plan", wraps=seen.plan) as plan:
        variant.every_plan(problem, device)
    found: dict[str, Plan] = {}
    for tile in dict.fromkeys(call.args[2] for call in plan.call_args_list):
        if unknown := [name for name, _ in fields if not hasattr(tile, name)]:
            raise SystemExit(f"--vary {unknown[0]}: tiles of {stem} have {', '.join(tile.__dataclass_fields__)}")
        for values in itertools.product(*(given for _, given in fields)):
            named = dict(zip((name for name, _ in fields), values, strict=True))
            other = replace(tile, **{name: type(getattr(tile, name))(value) for name, value in named.items()})
            if isinstance(made := seen.plan(problem, device, other), Plan):
                found[f"{made.tile} ({', '.join(f'{name} {value}' for name, value in named.items())})"] = made
    return found


def compiled_tiles(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    stem: str,
    first: int | None,
    fields: Sequence[Values],
    sample: int | None,
) -> Tiles:
    """A variant's tiles that don't spill.

    first: so many of the tiles that are predicted as best; else all.
    """
    lifted = (problem.as_forward() or problem).lifted(2)
    if fields:
        plans = varied(lifted, device, stem, fields)
    elif first is None:
        plans = {plan.tile: plan for plan in REGISTRY[stem].every_plan(lifted, device)}
    else:
        plans = {plan.tile: plan for plan in legal(candidates(problem, device, stem))[:first]}
    if sample is not None and sample < len(plans):
        plans = dict(random.Random(0).sample(list(plans.items()), sample))
    plans = {name: replace(plan, problem=problem) for name, plan in plans.items()}
    compiled = zip(plans.items(), compile_many(plans.values()), strict=True)
    return {
        name: (plan, kernel)
        for (name, plan), kernel in compiled
        if kernel.constants == plan.constants and not kernel.resources.spill_bytes
    }


def sweep(problem: DepthwiseProblem, tiles: Tiles) -> list[dict[str, object]]:
    """Attainment, prediction, spread and registers of tiles, the best first."""
    device = device_spec(0)
    timings = time_plans(problem, tiles, ROUNDS)
    copy, fma = timings.pop(COPY).median, roofline(problem, device).fma
    rows = [
        {
            "tile": tile,
            "attainment": round(attainment(copy, fma, timing.median), 4),
            "microseconds": round(timing.median * 1e6, 2),
            "predicted": round(tiles[tile][0].predicted_seconds * 1e6, 2),
            "spread": round(timing.spread, 4),
            "registers": tiles[tile][1].resources.registers,
        }
        for tile, timing in timings.items()
    ]
    return sorted(rows, key=lambda row: -float(str(row["attainment"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--variant", choices=REGISTRY)
    source.add_argument("--compiled", type=Path, help="times the tiles of a file that --compile made")
    parser.add_argument("--suite", default="kernelbench", choices=SUITES)
    parser.add_argument("--case", action="append", default=[], help="part of a case's name; repeatable")
    parser.add_argument("--dtype", action="append", default=[], choices=DTYPE_BYTES)
    parser.add_argument("--layout", action="append", default=[], choices=LAYOUTS)
    parser.add_argument("--direction", default="forward", choices=DIRECTIONS)
    parser.add_argument("--first", type=int, help="time so many tiles, those predicted as best; all by default")
    parser.add_argument("--vary", action="append", default=[], metavar="FIELD=VALUE,...", help="repeatable")
    parser.add_argument("--sample", type=int, help="time so many tiles, picked at random")
    parser.add_argument("--compile", type=Path, metavar="FILE", help="compiles only, and writes what --compiled takes")
    parser.add_argument("--arch", default="sm_90", choices=PRESETS, help="what --compile compiles for")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = preset(options.arch) if options.compile else device_spec(0)
    every = read(options.compiled) if options.compiled else tiles_of(options, device)
    if options.compile:
        compiled = []
        for case in every:
            compiled.append(case)
            print(f"{case[0]} {case[1].dtype} {case[1].layout}: {len(case[3])} tiles compiled", flush=True)
        write(options.compile, compiled)
        return
    command = shlex.join(["python", "benchmarks/sweep_tiles.py", *sys.argv[1:]])
    report = {"conditions": asdict(conditions_here(torch, ROUNDS, command)), "cases": {}}
    for name, problem, preferred, tiles in every:
        rows = sweep(problem, tiles)
        report["cases"][f"{name} {problem.dtype} {problem.layout}"] = rows
        print(f"{name} {problem.dtype} {problem.layout}: {len(rows)} tiles")
        for number, row in enumerate(rows):
            is_preferred = str(row["tile"]).split(" (")[0] == preferred  # --vary adds its values in brackets
            if number < BEST or is_preferred:
                arrow = "→" if is_preferred else " "
                figures = f"{row['attainment']:.3f} ±{row['spread']:.1%} {row['registers']:4d} registers"
                print(f"{arrow} {figures}  {row['tile']}")
        torch.cuda.empty_cache()
    if options.json:
        write_whole(options.json, json.dumps(report, indent=1) + "\n")


def tiles_of(options: argparse.Namespace, device: DeviceSpec) -> Iterator[tuple[str, DepthwiseProblem, str, Tiles]]:
    """Of each case its name, problem, the tile that the variant prefers, and those that are to be timed."""
    fields = [
        (name, [int(v) for v in values.split(",")]) for name, _, values in (v.partition("=") for v in options.vary)
    ]
    cases = load_suite(options.suite)
    for name, problem in select(cases, options.case, options.dtype, options.layout, [options.direction]):
        try:
            preferred = best_plan(problem, device, options.variant).tile
        except DepthwiseError as error:
            print(f"{name} {problem.dtype} {problem.layout}: {error}")
            continue
        yield (
            name,
            problem,
            preferred,
            compiled_tiles(problem, device, options.variant, options.first, fields, options.sample),
        )


if __name__ == "__main__":
    main()
