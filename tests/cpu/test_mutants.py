"""The edge tests can fail: mistakes that people make in depthwise kernels, made on purpose, are all noticed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dwconv import reference
from dwconv.choose import choose
from dwconv.device import H200
from dwconv.emulator import build, launch
from dwconv.problem import DepthwiseProblem, Epilogue
from problems import in_kind, make_epilogue, make_inputs, make_output, problem_id

IMAGES = DepthwiseProblem(
    2, 3, (9, 14), (3, 5), stride=(2, 1), padding=((1, 0), (3, 2)), dilation=(1, 2), multiplier=2, bias=True
)
FINISHED = replace(IMAGES, epilogue=Epilogue("silu", scale=True, shift=True, residual=True))
VOLUMES = DepthwiseProblem(
    1, 2, (4, 5, 9), (2, 3, 3), padding=((1, 0), (1, 1), (1, 1)), stride=(1, 2, 1), dilation=(2, 1, 1)
)

NOTHING = {"nothing": ("", "")}
SUMMED = "static_cast<Sum>(input[at]);"

# the problem, and what is wrong: (in the kernel one_per_thread, instead)
MUTANTS = {
    IMAGES: NOTHING
    | {
        "padding added instead of subtracted": ("C::kStrideH - C::kPadTop", "C::kStrideH + C::kPadTop"),
        "stride of the other dimension": ("j * C::kStrideW", "j * C::kStrideH"),
        "dilation forgotten": ("static_cast<long long>(v) * C::kDilationW", "static_cast<long long>(v)"),
        "multiplier read as c": ("channel / C::kMultiplier", "channel"),
        "channel of the input modulo C": (
            "channel / C::kMultiplier",
            "channel % (sizes.out_channels / C::kMultiplier)",
        ),
        "filter not by channel": ("tensors.w + channel *", "tensors.w + 0 *"),
        "bias of another channel": ("tensors.b[channel]", "tensors.b[channel / C::kMultiplier]"),
        "last tap left out": ("v < C::kFilterW", "v < C::kFilterW - 1"),
        "reads the column beyond the row": ("column >= sizes.in_w", "column > sizes.in_w"),
        "reads the column before the row": ("column < 0", "column < -1"),
        "leaves the last output out": ("index < outputs", "index < outputs - 1"),
        "writes beyond the last output": ("index < outputs", "index < outputs + 1"),
        "writes one output later": ("(tensors, index, &sum", "(tensors, index + 1, &sum"),
        "padding multiplied as zero": (
            "if (column < 0 || column >= sizes.in_w) continue;",
            """if (column < 0 || column >= sizes.in_w) {
                   const long long nearest = row * sizes.x_row + (column < 0 ? 0 : sizes.in_w - 1) * sizes.x_column;
                   sum += Sum(0) * static_cast<Sum>(filter[0]) * static_cast<Sum>(input[nearest]);
                   continue;
               }""",
        ),
        "sum rounded to 11 bits": (
            SUMMED,
            SUMMED + "sum = __uint_as_float((__float_as_uint(sum) + 0xfff) & ~0x1fffu);",
        ),
    },
    in_kind(IMAGES, "float16"): NOTHING
    | {"summed in float16": (SUMMED, SUMMED + "sum = static_cast<Sum>(Half(sum));")},
    in_kind(IMAGES, "bfloat16"): NOTHING
    | {"summed in bfloat16": (SUMMED, SUMMED + "sum = static_cast<Sum>(BFloat16(sum));")},
    in_kind(IMAGES, "float64"): NOTHING
    | {"summed in float32": (SUMMED, SUMMED + "sum = static_cast<Sum>(static_cast<float>(sum));")},
    in_kind(IMAGES, "float32", "channels_last"): NOTHING
    | {
        "columns are neighbours in memory": ("column * sizes.x_column", "column"),
        "rows as in channels-first memory": ("row * sizes.x_row", "row * sizes.in_w"),
    },
    FINISHED: NOTHING
    | {
        "activation forgotten": ("activated<C::kActivation>(sum)", "sum"),
        "scale before the activation": (
            "activated<C::kActivation>(sum)",
            "activated<C::kActivation>(sum * values.scale) / values.scale",
        ),
        "shift forgotten": ("v += values.shift;", ""),
        "residual before the scale": (
            "v *= values.scale;",
            "v = (v + static_cast<Sum>(residual)) * values.scale - static_cast<Sum>(residual);",
        ),
        "scale of another channel": ("tensors.scale + channel", "tensors.scale + channel / 2"),
        "residual of another place": ("tensors.residual + at", "tensors.residual + (at ^ 1)"),
    },
    VOLUMES: NOTHING
    | {
        "padding in front added": ("C::kStrideD - C::kPadFront", "C::kStrideD + C::kPadFront"),
        "dilation of planes forgotten": ("static_cast<long long>(t) * C::kDilationD", "static_cast<long long>(t)"),
        "reads the plane before the first": ("plane < 0 ||", ""),
        "taps of one plane only": ("(t * C::kFilterH + u)", "u"),
    },
}
CASES = [
    pytest.param(problem, right, wrong, id=f"{mistake}-{problem_id(problem)}")
    for problem, mistakes in MUTANTS.items()
    for mistake, (right, wrong) in mistakes.items()
]


def noticed(problem: DepthwiseProblem, text: str) -> str | None:
    """How the edge tests would notice a kernel's text; None if they don't."""
    plan = choose(problem, H200, "one_per_thread")
    library = build.load(text, plan.constants, "a mutant")
    places = [(0,) * (2 + problem.dims), tuple(size - 1 for size in problem.x_shape)]
    for place in (None, *places, tuple(size // 2 for size in problem.x_shape)):
        inputs, epilogue = make_inputs(problem), make_epilogue(problem)
        if place:
            inputs[0][place] = math.inf
        output = make_output(problem)
        finish = (epilogue.get(name) for name in ("scale", "shift", "residual"))
        arguments = launch.kernel_arguments(plan, *inputs, output.y, *finish)
        launch.launch_kernel(library, plan.grid, plan.block, 0, arguments)
        if not output.guards_are_intact():
            return "wrote outside of y"
        wrong = reference.describe_mismatch(output.y, *reference.forward(*inputs, problem, **epilogue))
        if wrong:
            return wrong
    return None


@pytest.mark.parametrize(("problem", "right", "wrong"), CASES)
def test_mistakes_are_noticed(problem, right, wrong):
    text = build.kernel_text("one_per_thread")
    assert right in text, "the kernel has changed: make the mistake another way"
    found = noticed(problem, text.replace(right, wrong) if right else text)
    assert (found is None) == (right == ""), found
