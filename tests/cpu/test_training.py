"""Training through the kernels, under the emulator: derivatives of any order, transforms, compilers, several processes.

Everything is compared with PyTorch's own convolution, or checked by its own checkers (gradcheck, opcheck).
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dwconv
from convolutions import FUNCTIONS, LAYOUTS, random_call
from dwconv.emulator import build

pytorchs_jvp_warns = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.fixture(autouse=True)
def on_kernels():
    """Every test runs dwconv's kernels."""
    torch.manual_seed(0)
    with dwconv.emulated() as emulation:
        yield emulation


def small(dims: int, layout: str = "channels_first", **windows):
    """x, weight, bias in float64, and the convolution as a function of them."""
    shape = (1, 2, 3, 4, 3) if dims == 3 else (2, 2, 4, 5)[: 2 + dims]
    call = random_call(shape, (3, 2, 2)[:dims], bias=True, dtype="float64", layout=layout)
    return (call.x, call.weight, call.bias), lambda *tensors: FUNCTIONS[dims](*tensors, **windows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("windows", [{"padding": 1}, {"stride": 2, "padding": 1}], ids=["plain", "strided"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradcheck(dims, windows, layout):
    tensors, function = small(dims, layout, **windows)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", ["input_gradient", "filter_gradient"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_operators_pass_opcheck(dims, name):
    (x, weight, _), function = small(dims, padding=1)
    y_grad = torch.randn_like(function(x, weight, None)).requires_grad_()
    numbers = [1] * dims, [1] * 2 * dims, [1] * dims
    if name == "input_gradient":
        arguments = (y_grad, weight.requires_grad_(), x.shape, *numbers, False)
    else:
        arguments = (x.requires_grad_(), y_grad, weight.shape[2:], *numbers, True, False)
    torch.library.opcheck(getattr(torch.ops.dwconv, name).default, arguments)


def test_an_expanded_gradient():
    (x, weight, bias), function = small(2, padding=1)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    found = torch.autograd.grad(function(*leaves).sum(), leaves)
    expected = torch.autograd.grad(F.conv2d(*leaves, padding=1, groups=2).sum(), leaves)
    torch.testing.assert_close(found, expected)


# ---- torch.func ----


@pytorchs_jvp_warns
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_grad_jvp_and_jacrev(dims):
    tensors, function = small(dims, padding=1)
    theirs = lambda *arguments: TORCH[dims](*arguments, padding=1, groups=2)  # noqa: E731
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    torch.testing.assert_close(jvp(function, tensors, tangents), jvp(theirs, tensors, tangents))
    for number in range(3):
        ours, others = (
            grad(lambda *arguments, f=f: f(*arguments).square().sum(), argnums=number)(*tensors)
            for f in (function, theirs)
        )
        torch.testing.assert_close(ours, others)
    x, weight, bias = (tensor[:1] if tensor.dim() > 1 else tensor for tensor in tensors)
    weight = tensors[1]
    torch.testing.assert_close(jacrev(function, 1)(x, weight, bias), jacrev(theirs, 1)(x, weight, bias))
    # forward over reverse, and reverse over forward
    for order in (lambda f: lambda w: jvp(grad(f), (w,), (w,))[1], lambda f: grad(lambda w: jvp(f, (w,), (w,))[1])):
        ours, others = (order(lambda w, f=f: f(x, w, bias).pow(3).sum())(weight) for f in (function, theirs))
        torch.testing.assert_close(ours, others)


@pytorchs_jvp_warns
def test_forward_mode_outside_of_torch_func():
    tensors, function = small(2, padding=1)
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
        found = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
        expected = torch.autograd.forward_ad.unpack_dual(F.conv2d(*duals, padding=1, groups=2)).tangent
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (1, None, None), (None, 0, None), (0, 0, 0), (2, 1, None), (None, None, 1)]
)
def test_vmap(in_dims):
    tensors, function = small(2, padding=1)
    mapped = [
        tensor if dim is None else torch.randn(*tensor.shape[:dim], 3, *tensor.shape[dim:], dtype=tensor.dtype)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    theirs = lambda *arguments: F.conv2d(*arguments, padding=1, groups=2)  # noqa: E731
    torch.testing.assert_close(vmap(function, in_dims)(*mapped), vmap(theirs, in_dims)(*mapped))
    ours, others = (
        vmap(grad(lambda *arguments, f=f: f(*arguments).square().sum(), argnums=(0, 1, 2)), in_dims)(*mapped)
        for f in (function, theirs)
    )
    torch.testing.assert_close(ours, others)


# ---- modules, memory, counters ----


class Network(nn.Module):
    """A MobileNet-like network of two blocks; `depthwise` makes its depthwise layers."""

    def __init__(self, depthwise) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU6(), depthwise(8, 8, 3, 1, 1, groups=8, bias=False),
            nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1),
            depthwise(16, 16, 5, 2, 2, groups=16), nn.BatchNorm2d(16), nn.Hardswish(),
        )  # fmt: skip
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def networks() -> tuple[Network, Network]:
    """The same network twice: with dwconv's layers, and with PyTorch's."""
    torch.manual_seed(1)
    theirs = Network(nn.Conv2d)
    ours = Network(dwconv.Conv2d)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(2)
    images = torch.randn(count, 4, 3, 16, 16, generator=random)
    return list(zip(images, torch.randint(4, (count, 4), generator=random), strict=True))


def test_ten_steps_follow_pytorchs_losses():
    losses = []
    for network in networks():
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        curve = []
        for images, labels in batches(10):
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        losses.append(torch.stack(curve))
    assert losses[1][-1] != losses[1][0]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_overflow_skips_the_step_as_with_pytorch(dtype):
    """Autocast and GradScaler; in step 2 of 4 a loss is too large for the gradients of the depthwise layers."""
    seen = []
    for network in networks():
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=100)
        states = []
        for step, (images, labels) in enumerate(batches(4)):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                outputs = network(images)
            loss = F.cross_entropy(outputs.float(), labels) * (1e38 if step == 2 else 1.0)
            before = [parameter.detach().clone() for parameter in network.parameters()]
            scaler.scale(loss * (1e3 if step == 2 else 1.0)).backward()
            finite = [bool(parameter.grad.isfinite().all()) for parameter in network.parameters()]
            scaler.step(optimizer)
            scaler.update()
            moved = any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
            states.append((scaler.get_scale(), moved, finite))
        seen.append(states)
    assert seen[0] == seen[1]
    assert [moved for _, moved, _ in seen[0]] == [True, True, False, True]


def test_checkpointing():
    ours, _ = networks()
    images, labels = batches(1)[0]
    found = []
    for run in (ours, lambda images: checkpoint(ours, images, use_reentrant=False)):
        ours.zero_grad()
        F.cross_entropy(run(images), labels).backward()
        found.append([parameter.grad.clone() for parameter in ours.parameters()])
    torch.testing.assert_close(*found)


def test_gradients_per_sample():
    """vmap over grad of a functional call, as differential privacy computes it."""
    layer = dwconv.Conv2d(4, 4, 3, padding=1, groups=4)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    images = torch.randn(3, 4, 6, 7)

    def loss(parameters, image):
        return functional_call(layer, parameters, (image.unsqueeze(0),)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, images)
    for number, image in enumerate(images):
        expected = grad(loss)(parameters, image)
        for name in parameters:
            torch.testing.assert_close(found[name][number], expected[name])


def test_flops_are_counted():
    """2 for each product, once for each of y, dx and dw."""
    x = torch.randn(2, 4, 6, 7).requires_grad_()
    layer = dwconv.Conv2d(4, 8, (3, 2), groups=4)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 8 * 4 * 6) * 6


# ---- compilers ----


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_steps(dynamic):
    """No graph break; with dynamic shapes one compilation serves other sizes."""
    layer = dwconv.Conv2d(4, 4, 3, padding=1, groups=4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(x):
        return layer(x).square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (6, 9, 12) if dynamic else (6, 6, 6):
        x = torch.randn(2, 4, size, size + 1).requires_grad_()
        leaves = [x, *layer.parameters()]
        torch.testing.assert_close(torch.autograd.grad(compiled(x), leaves), torch.autograd.grad(step(x), leaves))
    assert counter.frame_count == 1


def test_export():
    layer = dwconv.Conv2d(4, 4, 3, padding=1, groups=4)
    x = torch.randn(2, 4, 6, 7)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert "dwconv.convolution" in str(program.graph)
    torch.testing.assert_close(program.module()(x[:1]), layer(x[:1]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of PyTorch, in itself
def test_a_package_of_aotinductor(tmp_path: Path):
    layer = dwconv.Conv2d(4, 4, 3, padding=1, groups=4)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(2, 4, 6, 7),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        run = torch._inductor.aoti_load_package(package)
        x = torch.randn(3, 4, 6, 7)
        torch.testing.assert_close(run(x), layer(x))


# ---- two processes ----

_WORKER = """
import sys, torch, torch.distributed as dist, dwconv
from torch.nn.parallel import DistributedDataParallel
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
layer = dwconv.Conv2d(4, 4, 3, padding=1, groups=4)
images = torch.randn(4, 4, 8, 9)
with dwconv.emulated():
    network = DistributedDataParallel(layer)
    network(images[2 * rank : 2 * rank + 2]).square().mean().backward()
    both = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(images).square().mean().backward()
for shared, alone in zip(both, layer.parameters(), strict=True):
    torch.testing.assert_close(shared, alone.grad)
gathered = [torch.empty(0)] * 2
dist.all_gather_object(gathered, both)
assert all(torch.equal(a, b) for a, b in zip(*gathered, strict=True)), "the same bits in both processes"
dist.destroy_process_group()
"""


def test_two_processes_share_gradients(tmp_path: Path):
    paths = os.pathsep.join(filter(None, sys.path))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(rank), str(tmp_path / "meeting")],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors


def test_a_copied_module_trains_on_its_own():
    layer = dwconv.Conv2d(2, 2, 3, groups=2)
    other = copy.deepcopy(layer)
    layer(torch.randn(1, 2, 5, 5)).sum().backward()
    assert layer.weight.grad is not None
    assert other.weight.grad is None


# ---- kernels ahead of time ----


def test_prepare_finds_every_problem_and_changes_nothing():
    network, _ = networks()
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(4, 3, 16, 16)
    random = torch.get_rng_state()
    assert dwconv.prepare(network, images) == 6, "two layers, each forward, for its input, for its filters"
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.no_grad():
        assert dwconv.prepare(network, images) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert dwconv.prepare(network, images) == 6


def test_prepared_kernels_are_those_of_the_step():
    """Nothing is built any more when the step runs: in float16, with an epilogue, channels last, of a view."""
    layer = dwconv.Conv2d(6, 6, 3, stride=2, padding=1, groups=6).half()

    def step(x: torch.Tensor) -> torch.Tensor:
        return dwconv.conv2d(x[:, :, 1:], layer.weight, layer.bias, stride=2, padding=1, activation="silu")

    layer.forward = step
    x = torch.randn(2, 6, 9, 8).half().to(memory_format=torch.channels_last)
    assert dwconv.prepare(layer, x) == 3, "the sum with and without its activation, and the gradient of filters"
    built = build._library_of.cache_info().misses
    layer(x).sum().backward()
    assert build._library_of.cache_info().misses == built


def test_prepare_says_what_it_needs():
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            return None

    with pytest.raises(dwconv.DepthwiseError, match="returns no tensor"):
        dwconv.prepare(Nothing(), torch.zeros(1))
