"""Runs some edge problems of every variant, dtype, layout and dimension on the GPU, for a checker that watches it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from box_tiles import box_plans, forward_box_plans  # noqa: E402
from dwconv.compile import compile_many, compile_plan  # noqa: E402
from dwconv.launch import device_spec, launch, launch_filter_gradient  # noqa: E402
from edge_plans import chosen_plans  # noqa: E402
from problems import (  # noqa: E402
    make_epilogue,
    make_filter_gradient_inputs,
    make_filter_gradients,
    make_inputs,
    make_output,
)

plans = chosen_plans(device_spec(0), most=4) + forward_box_plans(device_spec(0))
gradients = [plan for way in ("grad_input", "grad_weight") for plan in chosen_plans(device_spec(0), 2, way)]
gradients += box_plans(device_spec(0))
compile_many(plans + gradients)
for plan in plans:
    # no margins: a read or write beyond a tensor leaves its allocation
    inputs, epilogue = make_inputs(plan.problem, device="cuda"), make_epilogue(plan.problem, device="cuda")
    launch(plan, compile_plan(plan), *inputs, make_output(plan.problem, margin=0, device="cuda").y, **epilogue)
for plan in gradients:
    if plan.problem.direction == "grad_input":
        grad, weight, _ = make_inputs(plan.problem, device="cuda")
        launch(plan, compile_plan(plan), grad, weight, None, make_output(plan.problem, margin=0, device="cuda").y)
    elif plan.problem.batch:
        results = [None if each is None else each.y for each in make_filter_gradients(plan.problem, 0, "cuda")]
        launch_filter_gradient(
            plan, compile_plan(plan), *make_filter_gradient_inputs(plan.problem, device="cuda"), *results
        )
torch.cuda.synchronize()
print(f"{len(plans) + len(gradients)} problems ran")
