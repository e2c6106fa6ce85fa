"""Runs some edge problems of every variant, dtype, layout and dimension on the GPU, for a checker that watches it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from dwconv.compile import compile_many, compile_plan  # noqa: E402
from dwconv.launch import device_spec, launch  # noqa: E402
from edge_plans import chosen_plans  # noqa: E402
from problems import make_epilogue, make_inputs, make_output  # noqa: E402

plans = chosen_plans(device_spec(0), most=4)
compile_many(plans)
for plan in plans:
    # no margins: a read or write beyond a tensor leaves its allocation
    inputs, epilogue = make_inputs(plan.problem, device="cuda"), make_epilogue(plan.problem, device="cuda")
    launch(plan, compile_plan(plan), *inputs, make_output(plan.problem, margin=0, device="cuda").y, **epilogue)
torch.cuda.synchronize()
print(f"{len(plans)} problems ran")
