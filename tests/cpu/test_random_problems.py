"""Problems that nobody thought of: hypothesis draws them, and a legal plan for each, and says how to repeat one.

Every kind of problem (what is compiled in) takes g++ half a second, so hundreds of problems share a few kinds. The
kinds are other ones in every run: pytest's first lines say the seed, and `--hypothesis-seed` repeats it.
"""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checks import check_filter_gradient, check_input_gradient
from dwconv import emulator, reference
from dwconv.choose import candidates
from dwconv.device import H200, PRESETS
from dwconv.plan import Plan
from dwconv.variants import REGISTRY
from problems import as_gradient, make_epilogue, make_inputs, make_output
from random_problems import random_kind, random_place, random_problem

KINDS = 16
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
randoms = st.integers(0, 2**32 - 1).map(Random)


def check(plan, random):
    """Runs a plan with one value in x that is not finite, and compares."""
    problem = plan.problem
    inputs, beside = make_inputs(problem), make_epilogue(problem)
    inputs[0][random_place(random, problem)] = random.choice((math.inf, -math.inf, math.nan))
    output = make_output(problem)
    emulator.run(plan, *inputs, output.y, **beside, order_seed=random.choice((None, 1)))
    assert output.guards_are_intact(), "the kernel wrote outside of y"
    wrong = reference.describe_mismatch(output.y, *reference.forward(*inputs, problem, **beside))
    assert wrong is None, f"{plan.variant} ({plan.tile}): {wrong}"


def plans_of(problem, device, variant=None):
    return [plan for plan in candidates(problem, device, variant) if isinstance(plan, Plan)]


@settings(max_examples=24, deadline=None, suppress_health_check=QUIET)
@given(random=randoms, device=st.sampled_from(list(PRESETS.values())))
def test_any_legal_plan_is_within_rounding(random, device):
    """Any kind, any tile of any variant, for any architecture."""
    check(random.choice(plans_of(random_problem(random, random_kind(random)), device)), random)


@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(random=randoms, device=st.sampled_from(list(PRESETS.values())))
def test_any_legal_plan_of_a_gradient_is_within_rounding(random, device):
    """A variant made for the direction, two times of three that of filters: any tile of it."""
    direction = random.choice(("grad_weight", "grad_weight", "grad_input"))
    problem = as_gradient(random_problem(random, random_kind(random)), direction)
    found = [plan for plan in plans_of(problem, device) if direction in REGISTRY[plan.variant].directions]
    variant = random.choice(sorted({plan.variant for plan in found}))
    plan = random.choice([plan for plan in found if plan.variant == variant])
    order_seed = random.choice((None, 1))
    if direction == "grad_weight":
        check_filter_gradient(plan, order_seed, poison=random.random() < 0.5)
    else:
        check_input_gradient(plan, order_seed)


@pytest.fixture(scope="module")
def kinds(pytestconfig):
    """Kinds of this run, each with a variant that takes it."""
    random = Random(pytestconfig.getoption("hypothesis_seed"))
    found = []
    while len(found) < KINDS:
        kind = random_kind(random)
        plans = plans_of(random_problem(random, kind), H200)
        found.append((kind, random.choice(sorted({plan.variant for plan in plans}))))
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
@given(number=st.integers(0, KINDS - 1), random=randoms)
def test_hundreds_of_problems_are_within_rounding(kinds, number, random):
    """Any sizes, strides of x and alignment, by the best plan of one variant; by the best of all where it has none."""
    kind, variant = kinds[number]
    problem = random_problem(random, kind)
    plans = plans_of(problem, H200, variant) or plans_of(problem, H200, "one_per_thread")
    check(plans[0], random)
