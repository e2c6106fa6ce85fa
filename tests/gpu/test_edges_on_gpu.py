"""Every variant computes the edge problems that it takes on the GPU: poison, guard zones, the same bits every time.

Every dtype, layout and number of dimensions has its part of them; and its tensors of more than 2^31 elements.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from dwconv import reference
from dwconv.choose import candidates
from dwconv.compile import compile_many, compile_plan
from dwconv.device import H200
from dwconv.launch import device_spec, launch
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem, dense_strides
from edge_plans import bits, chosen_plans, plan_id, tile_id, tile_plans
from problems import make_epilogue, make_inputs, make_output

MARGIN = 256  # elements of poison on both sides of every tensor
DEVICE = device_spec(0) if torch.cuda.is_available() else H200

every_plan = pytest.mark.parametrize("plan", chosen_plans(DEVICE), ids=plan_id)


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """Compiles the kernels of all tests that are about to run at once, on every core."""
    compile_many(item.callspec.params["plan"] for item in request.session.items if item.path == Path(__file__))


def made(problem: DepthwiseProblem, seed: int = 0):
    """x, weight and bias, and what the epilogue takes."""
    return (
        make_inputs(problem, seed, margin=MARGIN, device="cuda"),
        make_epilogue(problem, seed, margin=MARGIN, device="cuda"),
    )


def run(plan: Plan, inputs, epilogue) -> torch.Tensor:
    """The plan's result; nothing around it may have changed."""
    output = make_output(plan.problem, margin=MARGIN, device="cuda")
    launch(plan, compile_plan(plan), *inputs, output.y, **epilogue)
    torch.cuda.synchronize()
    assert output.guards_are_intact(), "the kernel wrote outside of y"
    return output.y


def worst(y, inputs, epilogue, problem: DepthwiseProblem) -> str | None:
    inputs = (None if t is None else t.cpu() for t in inputs)
    epilogue = {name: t.cpu() for name, t in epilogue.items()}
    return reference.describe_mismatch(y.cpu(), *reference.forward(*inputs, problem, **epilogue))


@every_plan
def test_result_is_within_rounding(plan):
    inputs, epilogue = made(plan.problem)
    y = run(plan, inputs, epilogue)
    assert worst(y, inputs, epilogue, plan.problem) is None
    assert torch.equal(bits(y), bits(run(plan, inputs, epilogue))), "the same bits every time"


@every_plan
def test_non_finite_inputs_reach_their_windows_only(plan):
    problem = plan.problem
    inputs, epilogue = made(problem, seed=2)
    if inputs[0].numel() == 0:
        return
    for i, value in enumerate((math.inf, -math.inf, math.nan)):
        random = torch.Generator().manual_seed(i)
        inputs[0][tuple(int(torch.randint(size, (), generator=random)) for size in problem.x_shape)] = value
    assert worst(run(plan, inputs, epilogue), inputs, epilogue, problem) is None


@pytest.mark.parametrize("plan", tile_plans(DEVICE), ids=tile_id)
def test_every_legal_tile_is_within_rounding(plan):
    inputs, epilogue = made(plan.problem, seed=3)
    assert worst(run(plan, inputs, epilogue), inputs, epilogue, plan.problem) is None


# ---- beyond 2^31 elements ----

_HUGE = [
    DepthwiseProblem(1, 2, (33_000, 33_000), (3, 3), padding=((1, 1), (1, 1)), dtype="float16"),
    DepthwiseProblem(33_000, 64, (32, 32), (3, 3), padding=((1, 1), (1, 1)), dtype="bfloat16"),
    DepthwiseProblem(17, 128, (1_001, 1_000), (5, 5), padding=((2, 2), (2, 2))),
    DepthwiseProblem(1, 2, (1_100_000_000,), (4,), padding=((3, 0),), dtype="float16"),
    DepthwiseProblem(1, 4, (820, 820, 820), (3, 3, 3), padding=((1, 1),) * 3, dtype="float16"),
    DepthwiseProblem(1, 8, (16_500, 16_500), (3, 3), padding=((1, 1), (1, 1)), dtype="float16", layout="channels_last"),
    DepthwiseProblem(33_000, 64, (32, 32), (7, 7), padding=((3, 3), (3, 3)), dtype="float16", layout="channels_last"),
    DepthwiseProblem(17, 128, (1_001, 1_000), (3, 3), padding=((1, 1), (1, 1)), layout="channels_last"),
    DepthwiseProblem(1, 8, (270_000_001,), (4,), padding=((3, 0),), dtype="bfloat16", layout="channels_last"),
    DepthwiseProblem(1, 8, (650, 650, 650), (3, 3, 3), padding=((1, 1),) * 3, dtype="float16", layout="channels_last"),
]


def huge_plans() -> list[Plan]:
    """The best plan of every variant for tensors of more than 2^31 elements."""
    found = {}
    for problem in _HUGE:
        assert math.prod(problem.x_shape) > 2**31
        for plan in candidates(problem, DEVICE):
            if isinstance(plan, Plan):
                found.setdefault((problem, plan.variant), plan)
    return list(found.values())


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
    reason="needs a GPU with 40 GB",
)
@pytest.mark.parametrize("plan", huge_plans(), ids=plan_id)
def test_tensors_beyond_31_bits(plan):
    """All outputs are written; some, drawn from everywhere, and the first and the last, are compared."""
    problem = plan.problem
    dtype = getattr(torch, problem.dtype)
    random = torch.Generator("cuda").manual_seed(0)

    def uniform(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        values = torch.empty(math.prod(shape), dtype=dtype, device="cuda").uniform_(-1, 1, generator=random)
        return values.as_strided(shape, strides)

    x = uniform(problem.x_shape, problem.plane_strides)
    weight = uniform(problem.weight_shape, dense_strides(problem.weight_shape, "channels_first"))
    output = make_output(problem, margin=MARGIN, device="cuda")
    launch(plan, compile_plan(plan), x, weight, None, output.y)
    torch.cuda.synchronize()
    assert output.guards_are_intact(), "the kernel wrote outside of y"
    assert not output.y.isnan().any(), "an output was not written"

    places = torch.stack([torch.randint(n, (4096,), device="cuda", generator=random) for n in problem.y_shape])
    places[:, 0] = 0
    places[:, -1] = torch.tensor(problem.y_shape, device="cuda") - 1
    exact, magnitude = sums_at(places, x, weight, problem)
    found = output.y[tuple(places)].double()
    unit = 2.0**-24 * (problem.taps + 1)
    bound = 1.01 * (unit * magnitude + torch.finfo(dtype).eps / 2 * exact.abs()) + torch.finfo(dtype).tiny
    assert bool(((found - exact).abs() <= bound).all())


def sums_at(places, x, weight, problem):
    """What stands at these places [dims + 2, count] of y, in float64, and the sum of the absolute terms."""
    exact = torch.zeros(places.shape[1], dtype=torch.float64, device=places.device)
    magnitude = torch.zeros_like(exact)
    image, channel, *outputs = places
    for tap in itertools.product(*map(range, problem.filter)):
        inside = torch.ones_like(image, dtype=torch.bool)
        at = []
        for d, u in enumerate(tap):
            place = outputs[d] * problem.stride[d] - problem.padding[d][0] + u * problem.dilation[d]
            inside &= (place >= 0) & (place < problem.size[d])
            at.append(place.clamp(0, problem.size[d] - 1))
        values = x[(image, channel // problem.multiplier, *at)].double()
        term = torch.where(inside, values * weight[(channel, 0, *tap)].double(), 0.0)
        exact += term
        magnitude += term.abs()
    return exact, magnitude
