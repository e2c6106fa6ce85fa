"""Runs every variant on every third edge problem on the GPU, for a checker that watches the process from outside."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from dwconv.choose import choose  # noqa: E402
from dwconv.compile import compile_many, compile_plan  # noqa: E402
from dwconv.launch import device_spec, launch  # noqa: E402
from dwconv.variants import REGISTRY  # noqa: E402
from problems import EDGE_PROBLEMS, make_inputs, make_output  # noqa: E402

plans = [choose(problem, device_spec(0), variant) for variant in REGISTRY for problem in EDGE_PROBLEMS[::3]]
compile_many(plans)
for plan in plans:
    # no margins: a read or write beyond a tensor leaves its allocation
    inputs = make_inputs(plan.problem, offset=0, device="cuda") if plan.problem.aligned == 16 else None
    if inputs is not None:
        launch(plan, compile_plan(plan), *inputs, make_output(plan.problem, offset=0, margin=0, device="cuda").y)
torch.cuda.synchronize()
print(f"{len(plans)} problems ran")
