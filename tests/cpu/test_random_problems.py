"""Problems that nobody thought of: hypothesis draws them, and a legal plan for each, and says how to repeat one."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dwconv import emulator, reference
from dwconv.choose import candidates
from dwconv.device import PRESETS
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem
from problems import make_inputs, make_output

MOST_OUTPUTS = 20_000


@st.composite
def problems(draw):
    def pair(lowest, highest):
        return draw(st.tuples(st.integers(lowest, highest), st.integers(lowest, highest)))

    size = (draw(st.integers(1, 20)), draw(st.integers(1, 80)))
    filter = pair(1, 7)
    dilation = pair(1, 3)
    padding = (pair(0, 9), pair(0, 9))
    spans = [d * (taps - 1) + 1 for d, taps in zip(dilation, filter, strict=True)]
    assume(all(s <= n + sum(pad) for s, n, pad in zip(spans, size, padding, strict=True)))
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    gaps = draw(st.sampled_from([(0, 0), (1, 0), (4, 1), (8, 3)]))  # columns and rows that x's memory has besides x
    height, width = size[0] + gaps[1], size[1] + gaps[0]
    problem = DepthwiseProblem(
        batch=batch,
        channels=channels,
        size=size,
        filter=filter,
        stride=pair(1, 3),
        padding=padding,
        dilation=dilation,
        multiplier=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        x_strides=(channels * height * width, height * width, width, 1) if any(gaps) else (),
        aligned=draw(st.sampled_from([4, 8, 16])),
    )
    assume(math.prod(problem.y_shape) <= MOST_OUTPUTS)
    return problem


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(problem=problems(), device=st.sampled_from(list(PRESETS.values())), drawn=st.data())
def test_any_legal_plan_is_within_rounding(problem, device, drawn):
    plans = [plan for plan in candidates(problem, device) if isinstance(plan, Plan)]
    plan = drawn.draw(st.sampled_from(plans), label="plan")
    inputs = make_inputs(problem)
    inputs[0][0, 0, problem.size[0] // 2, problem.size[1] // 2] = math.inf
    output = make_output(problem)
    emulator.run(plan, *inputs, output.y, order_seed=drawn.draw(st.sampled_from([None, 1]), label="order_seed"))
    assert output.guards_are_intact(), "the kernel wrote outside of y"
    wrong = reference.describe_mismatch(output.y, *reference.forward(*inputs, problem))
    assert wrong is None, wrong
