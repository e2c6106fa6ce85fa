"""Gradients on the GPU: edge problems of every variant, errors beside PyTorch's, the same bits every time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dwconv
from box_tiles import box_plans
from convolutions import FUNCTIONS, LAYOUTS, random_call
from dwconv import launch as launch_module
from dwconv import reference
from dwconv.compile import compile_many, compile_plan
from dwconv.device import H200
from dwconv.launch import device_spec, launch, launch_filter_gradient
from edge_plans import bits, chosen_plans, plan_id
from problems import make_filter_gradient_inputs, make_filter_gradients, make_inputs, make_output

MARGIN = 256  # elements of poison on both sides of every tensor
DEVICE = device_spec(0) if torch.cuda.is_available() else H200

input_gradients = pytest.mark.parametrize("plan", chosen_plans(DEVICE, 40, "grad_input"), ids=plan_id)
filter_gradients = pytest.mark.parametrize(
    "plan",
    [plan for plan in chosen_plans(DEVICE, 40, "grad_weight") if plan.problem.batch] + box_plans(DEVICE),
    ids=plan_id,
)


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """Compiles the kernels of all tests that are about to run at once, on every core."""
    plans = [getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__)]
    compile_many(spec.params["plan"] for spec in plans if spec is not None and "plan" in spec.params)


def poisoned_places(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, with an Inf, a -Inf and a NaN somewhere."""
    for i, value in enumerate((math.inf, -math.inf, math.nan)):
        if tensor.numel() > 8:
            random = torch.Generator().manual_seed(i)
            tensor[tuple(int(torch.randint(size, (), generator=random)) for size in tensor.shape)] = value
    return tensor


@pytest.mark.parametrize("poison", [False, True], ids=["finite", "inf_and_nan"])
@input_gradients
def test_gradient_of_x(plan, poison):
    grad, weight, _ = make_inputs(plan.problem, margin=MARGIN, device="cuda")
    if poison:
        poisoned_places(grad)
    found = []
    for _ in range(2):
        output = make_output(plan.problem, margin=MARGIN, device="cuda")
        launch(plan, compile_plan(plan), grad, weight, None, output.y)
        torch.cuda.synchronize()
        assert output.guards_are_intact(), "the kernel wrote outside of x's gradient"
        found.append(output.y.cpu())
    expected = reference.input_gradient(grad.cpu(), weight.cpu(), plan.problem)
    assert reference.describe_mismatch(found[0], *expected) is None
    assert torch.equal(bits(found[0]), bits(found[1])), "the same bits every time"


@pytest.mark.parametrize("poison", [False, True], ids=["finite", "inf_and_nan"])
@filter_gradients
def test_gradients_of_filters_and_bias(plan, poison):
    problem = plan.problem
    x, grad = make_filter_gradient_inputs(problem, margin=MARGIN, device="cuda")
    if poison:
        poisoned_places(x)
    found = []
    for _ in range(2):
        weight, bias = make_filter_gradients(problem, margin=MARGIN, device="cuda")
        launch_filter_gradient(plan, compile_plan(plan), x, grad, weight.y, None if bias is None else bias.y)
        torch.cuda.synchronize()
        assert weight.guards_are_intact(), "the kernel wrote beside the filters' gradients"
        assert bias is None or bias.guards_are_intact(), "the kernel wrote beside the bias's gradient"
        parts = [weight.y.view(problem.out_channels, -1)] + ([] if bias is None else [bias.y.view(-1, 1)])
        found.append(torch.cat(parts, 1).cpu())
    exact, bound = reference.filter_gradient(x.cpu(), grad.cpu(), problem)
    sums = found[0].shape[1]
    assert reference.describe_mismatch(found[0], exact[:, :sums], bound[:, :sums]) is None
    assert torch.equal(bits(found[0]), bits(found[1])), "the same bits every time"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "taps", "windows"),
    [
        ((8, 32, 56, 56), (3, 3), {"padding": 1}),
        ((8, 24, 57, 55), (5, 5), {"padding": 2, "stride": 2}),
        ((4, 16, 28, 28), (7, 7), {"padding": 3}),
        ((4, 16, 28, 28), (13, 13), {"padding": 6}),
        ((4, 24, 500), (31,), {"padding": 15}),
        ((2, 16, 8, 20, 20), (3, 3, 3), {"padding": 1}),
        ((2048, 8, 4, 4), (3, 3), {"padding": 1}),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_errors_are_at_most_twice_pytorchs(shape, taps, windows, dtype, layout):
    """Of filters' gradients, against float64: the root of the mean square; and the same bits over ten runs."""
    call = random_call(shape, taps, bias=True, dtype=dtype, layout=layout, device="cuda", **windows)
    leaves = [call.x, call.weight, call.bias]
    theirs = [t.detach().clone().requires_grad_() for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[call.x.dim()]
    expected = convolution(*exact, groups=shape[1], **windows)
    grad = torch.randn_like(expected).to(call.x.dtype)
    expected.backward(grad.double())
    convolution(*theirs, groups=shape[1], **windows).backward(grad)
    runs = []
    for _ in range(10):
        ours = [t.detach().clone().requires_grad_() for t in leaves]
        FUNCTIONS[call.x.dim() - 2](*ours, **windows).backward(grad)
        runs.append([t.grad for t in ours])
    for number, (mine, other, right) in enumerate(zip(runs[0], theirs, exact, strict=True)):
        assert all(torch.equal(bits(run[number]), bits(mine)) for run in runs), "the same bits every time"
        error = (mine.double() - right.grad).square().mean().sqrt()
        allowed = (other.grad.double() - right.grad).square().mean().sqrt()
        floor = torch.finfo(mine.dtype).eps / 4 * right.grad.square().mean().sqrt()  # of rounding the result
        assert error <= 2 * torch.maximum(allowed, floor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expanded_gradient(layout):
    """As `.sum().backward()` makes it."""
    call = random_call((2, 6, 20, 30), (3, 3), padding=1, layout=layout, device="cuda")
    call.x.requires_grad_()
    call.weight.requires_grad_()
    call().sum().backward()
    x, weight = (t.detach().clone().requires_grad_() for t in (call.x, call.weight))
    F.conv2d(x, weight, padding=1, groups=6).sum().backward()
    torch.testing.assert_close(call.x.grad, x.grad)
    torch.testing.assert_close(call.weight.grad, weight.grad)


def test_a_prepared_training_step_in_a_graph():
    """Captured before it ran, and replayed, beside the same step outside of the graph."""
    torch.manual_seed(0)
    layer = dwconv.Conv2d(16, 16, (3, 4), stride=2, padding=1, groups=16).cuda()
    x = torch.randn(4, 16, 20, 20, device="cuda").requires_grad_()

    def step() -> None:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        layer(x).square().mean().backward()

    torch.zeros(4, device="cuda", requires_grad=True).square().mean().backward()  # loads PyTorch's own kernels
    assert dwconv.prepare(layer, x) == 3
    loaded = len(launch_module._functions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert len(launch_module._functions) == loaded
    captured = [leaf.grad for leaf in (x, *layer.parameters())]
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    step()
    for kept, leaf in zip(captured, (x, *layer.parameters()), strict=True):
        assert torch.equal(kept, leaf.grad)


_GRADIENTS = """
import sys, torch, dwconv
torch.manual_seed(0)
found = []
for shape, taps, windows in (
    ((8, 24, 56, 56), 3, {"padding": 1}),
    ((8, 72, 28, 28), 5, {"padding": 2, "stride": 2}),
    ((64, 96, 7, 7), 7, {"padding": 3}),
):
    for dtype in (torch.float16, torch.float32):
        for format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).cuda().to(dtype).to(memory_format=format).requires_grad_()
            weight, bias = torch.randn(shape[1], 1, taps, taps).cuda().to(dtype), torch.randn(shape[1]).cuda().to(dtype)
            leaves = x, weight.requires_grad_(), bias.requires_grad_()
            y = dwconv.conv2d(*leaves, **windows)
            found += torch.autograd.grad(y, leaves, torch.randn(y.shape).cuda().to(dtype))
torch.save([grad.cpu() for grad in found], sys.argv[1])
"""


def test_two_processes_find_the_same_bits(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = []
    for name in ("first", "second"):
        command = [sys.executable, "-c", _GRADIENTS, str(tmp_path / name)]
        subprocess.run(command, env=environment, check=True)
        found.append(torch.load(tmp_path / name))
    assert len(found[0]) == 36
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(*found, strict=True))
