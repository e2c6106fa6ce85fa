"""Runs kernels with mistakes that AddressSanitizer or UBSan must stop; test_sanitizers.py starts it and reads its JSON.

Each case runs in a fork, as the sanitizers end the process that they stop.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace

import torch
from torch import Tensor

from dwconv import emulator
from dwconv.choose import candidates, choose
from dwconv.device import H200
from dwconv.emulator import build, launch
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem
from dwconv.variants import REGISTRY
from emulated_kernels import run_kernel
from problems import make_filter_gradient_inputs, make_filter_gradients, make_inputs, make_output

PROBLEM = DepthwiseProblem(1, 2, (6, 20), (3, 3))
# A variant shows its mistakes on the first of these that it takes.
PROBLEMS = [
    PROBLEM,
    DepthwiseProblem(1, 8, (6, 20), (3, 3), layout="channels_last"),
    DepthwiseProblem(1, 2, (4, 5, 20), (3, 3, 3)),
    DepthwiseProblem(1, 8, (4, 5, 20), (3, 3, 3), layout="channels_last"),
    DepthwiseProblem(1, 8, (14, 14), (3, 3), padding=((1, 1), (1, 1)), dtype="float16"),
    DepthwiseProblem(1, 16, (6, 20), (3, 3), dtype="float16", layout="channels_last"),
    DepthwiseProblem(1, 2, (12, 40), (9, 9)),
    DepthwiseProblem(1, 8, (12, 20), (9, 9), layout="channels_last"),
    DepthwiseProblem(1, 2, (13, 41), (3, 3), stride=(2, 2), direction="grad_input"),
    DepthwiseProblem(1, 8, (13, 41), (3, 3), stride=(2, 2), layout="channels_last", direction="grad_input"),
    DepthwiseProblem(1, 2, (6, 20), (3, 3), direction="grad_weight"),
    DepthwiseProblem(1, 8, (6, 20), (3, 3), layout="channels_last", direction="grad_weight"),
    DepthwiseProblem(1, 4, (6, 20), (3, 3), dtype="float16", direction="grad_weight"),
    DepthwiseProblem(1, 8, (6, 20), (3, 3), dtype="float16", layout="channels_last", direction="grad_weight"),
]


def taken(variant: str) -> tuple[DepthwiseProblem, DepthwiseProblem]:
    """A problem that the variant takes, and the same one with a row (a plane) of outputs more."""
    for problem in PROBLEMS:
        taller = replace(problem, size=(problem.size[0] + problem.stride[0], *problem.size[1:]))
        if all(isinstance(candidates(each, H200, variant)[0], Plan) for each in (problem, taller)):
            return problem, taller
    raise AssertionError(f"{variant} takes none of PROBLEMS: add one that it takes")


def launch_plan(plan: Plan, x: Tensor, other: Tensor, result: Tensor) -> None:
    """emulator.run, or emulator.run_filter_gradient, without its checks of the tensors."""
    if plan.problem.direction == "grad_weight":
        partial = torch.empty(plan.partial_bytes, dtype=torch.uint8)
        arrivals = torch.zeros(plan.arrivals, dtype=torch.int32)
        arguments = launch.kernel_arguments(plan, x, other, result, None, partial, arrivals)
    else:
        arguments = launch.kernel_arguments(plan, x, other, None, result, None, None, None)
    launch.launch_kernel(build.library(plan), plan.grid, plan.block, plan.shared_bytes, arguments)


def inputs_of(problem: DepthwiseProblem) -> tuple[Tensor, Tensor]:
    """What is multiplied: x, or y's gradient, and the filters; or x and y's gradient."""
    return make_filter_gradient_inputs(problem) if problem.direction == "grad_weight" else make_inputs(problem)[:2]


def result_of(problem: DepthwiseProblem) -> Tensor:
    if problem.direction == "grad_weight":
        return make_filter_gradients(problem, margin=0)[0].y
    return make_output(problem, margin=0).y


def larger_input(variant: str) -> None:
    """The real kernel, told that the image has one more row than its memory."""
    problem, taller = taken(variant)
    plan = choose(taller, H200, variant)
    x_strides = choose(problem, H200, variant).sizes[-5:]
    x, other = inputs_of(problem)
    launch_plan(replace(plan, sizes=(*plan.sizes[:-5], *x_strides)), x, other, result_of(taller))


def smaller_output(variant: str) -> None:
    """The real kernel, given room for one row less; for gradients of filters, for half of the channels."""
    problem, larger = taken(variant)
    if problem.direction == "grad_weight":
        larger = replace(problem, channels=2 * problem.channels)
    launch_plan(choose(larger, H200, variant), *inputs_of(larger), result_of(problem))


def right() -> None:
    x, weight, bias = make_inputs(PROBLEM)
    emulator.run(choose(PROBLEM, H200), x, weight, bias, make_output(PROBLEM, margin=0).y)


def body(text: str, **options: int):
    return lambda: run_kernel(text, torch.zeros(33), torch.zeros(33, dtype=torch.int32), **options)


CASES = {
    "right": right,
    "after an error": lambda: (_failing(), right()),
    "reads one element beyond": body("a[t] = a[t + 2];"),
    "reads one element before": body("a[t + 1] = a[t - 1];"),
    "writes one element beyond": body("a[t + 2] = 1;"),
    "shared memory one element too small": body(
        "float* s = dwconv::shared_memory<float>(); s[t] = t; __syncthreads(); a[t] = s[31 - t];", shared_bytes=124
    ),
    "array in registers": body("float r[4] = {}; r[(t >> 3) + b[t]] = 1; r[(t >> 2) + b[t]] = 1; a[t] = r[b[t]];"),
    "misaligned store": body("*reinterpret_cast<float4*>(a + 1) = float4{1, 2, 3, 4};", block=1),
    "signed overflow": body("b[t] = 2147483647 - t + b[t] + 1;"),
    "shift by 32": body("b[t] = 1 << (t + 1 + b[t]);"),
} | {
    f"{name}, {variant}": lambda case=case, variant=variant: case(variant)
    for variant in REGISTRY
    for name, case in (("larger input", larger_input), ("smaller output", smaller_output))
}


def _failing() -> None:
    try:
        run_kernel("volatile float r[8] = {}; r[t & 7] = t; if (t == 20) __trap(); __syncthreads();", torch.zeros(1))
    except emulator.EmulationError:
        return
    raise AssertionError("the kernel's mistake went unnoticed")


def run_in_fork(case) -> tuple[int, str]:
    """The exit status and what the sanitizers wrote."""
    with tempfile.TemporaryFile() as report:
        process = os.fork()
        if process == 0:
            os.dup2(report.fileno(), 2)
            status = 1
            try:
                case()
                status = 0
            except BaseException as error:
                os.write(2, repr(error).encode())
            finally:
                os._exit(status)
        _, status = os.waitpid(process, 0)
        report.seek(0)
        return status, report.read().decode(errors="replace")


if __name__ == "__main__":
    json.dump({name: run_in_fork(case) for name, case in CASES.items()}, sys.stdout)
