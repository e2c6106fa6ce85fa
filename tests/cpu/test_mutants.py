"""The edge tests can fail: mistakes that people make in depthwise kernels, made on purpose, are all noticed."""

from __future__ import annotations

import math

import pytest

from dwconv import reference
from dwconv.choose import choose
from dwconv.device import H200
from dwconv.emulator import build, launch
from dwconv.problem import DepthwiseProblem
from problems import make_inputs, make_output

PROBLEM = DepthwiseProblem(
    2, 3, (9, 14), (3, 5), stride=(2, 1), padding=((1, 0), (3, 2)), dilation=(1, 2), multiplier=2, bias=True
)

# what is wrong: (in the kernel one_per_thread, instead)
MUTANTS = {
    "nothing": ("", ""),
    "padding added instead of subtracted": ("C::kStrideH - C::kPadTop", "C::kStrideH + C::kPadTop"),
    "stride of the other dimension": ("j * C::kStrideW", "j * C::kStrideH"),
    "dilation forgotten": ("v * C::kDilationW", "v"),
    "multiplier read as c": ("channel / C::kMultiplier", "channel"),
    "channel of the input modulo C": ("channel / C::kMultiplier", "channel % (sizes.out_channels / C::kMultiplier)"),
    "filter not by channel": ("w + channel *", "w + 0 *"),
    "bias of another channel": ("b[channel]", "b[channel / C::kMultiplier]"),
    "last tap left out": ("v < C::kFilterW", "v < C::kFilterW - 1"),
    "reads the column beyond the row": ("column >= sizes.in_w", "column > sizes.in_w"),
    "reads the column before the row": ("column < 0", "column < -1"),
    "leaves the last output out": ("index < outputs", "index < outputs - 1"),
    "writes beyond the last output": ("index < outputs", "index < outputs + 1"),
    "writes one output later": ("y[index]", "y[index + 1]"),
    "padding multiplied as zero": (
        "if (column < 0 || column >= sizes.in_w) continue;",
        """if (column < 0 || column >= sizes.in_w) {
               sum += 0 * filter[u * C::kFilterW + v] * input[row * sizes.x_row + (column < 0 ? 0 : sizes.in_w - 1)];
               continue;
           }""",
    ),
    "sum rounded to 11 bits": (
        "Sum sum =",
        """struct Rounded {
               float value;
               void operator+=(float term) {
                   value += term;
                   unsigned bits = (__float_as_uint(value) + 0xfff) & ~0x1fffu;
                   value = __uint_as_float(bits);
               }
               operator float() const { return value; }
           } sum;
           sum.value =""",
    ),
}


def noticed(text: str) -> str | None:
    """How the edge tests would notice a kernel's text; None if they don't."""
    plan = choose(PROBLEM, H200, "one_per_thread")
    library = build.load(text, plan.constants, "a mutant")
    for place in (None, (0, 0, 4, 0), (1, 2, 8, 13)):
        inputs = make_inputs(PROBLEM)
        if place:
            inputs[0][place] = math.inf
        output = make_output(PROBLEM)
        launch.launch_kernel(library, plan.grid, plan.block, 0, launch.kernel_arguments(plan, *inputs, output.y))
        if not output.guards_are_intact():
            return "wrote outside of y"
        wrong = reference.describe_mismatch(output.y, *reference.forward(*inputs, PROBLEM))
        if wrong:
            return wrong
    return None


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistakes_are_noticed(mistake):
    right, wrong = MUTANTS[mistake]
    text = build.kernel_text("one_per_thread")
    assert right in text, "the kernel has changed: make the mistake another way"
    assert (noticed(text.replace(right, wrong) if right else text) is None) == (mistake == "nothing")
