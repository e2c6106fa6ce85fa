"""The functions on the GPU: numbers and memory formats beside PyTorch, hidden copies, streams, graphs, huge tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F

import dwconv
from convolutions import CONVERTED, COPIED, DTYPES, FUNCTIONS, LAYOUTS, VIEWS, Call, random_call
from dwconv import DepthwiseError, compile, launch, ops, reference
from dwconv.choose import choose
from dwconv.problem import ACTIVATIONS, DepthwiseProblem, Epilogue, dense_strides
from dwconv.tensors import in_layout
from problems import make_epilogue, make_inputs, make_output
from random_problems import random_kind, random_place, random_problem
from torch_samples import depthwise_samples

TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KINDS = 100  # of random problems, each compiled once

needs_20_gb = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
    reason="needs a GPU with 40 GB",
)


@pytest.fixture(autouse=True)
def exact_torch():
    """PyTorch's float32 is float32: the comparison must not be with TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def tensors(*shape: int, taps: tuple[int, int] = (3, 3)) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape, device="cuda"), torch.randn(shape[1], 1, *taps, device="cuda")


def test_same_as_torch_and_faster_paths_agree():
    x, weight = tensors(2, 6, 40, 50)
    bias = torch.randn(6, device="cuda")
    for arguments in ({}, {"padding": 1}, {"stride": 2, "padding": (1, 0)}, {"dilation": 2}):
        expected = F.conv2d(x, weight, bias, groups=6, **arguments)
        torch.testing.assert_close(dwconv.conv2d(x, weight, bias, **arguments), expected)
        torch.testing.assert_close(dwconv.conv2d(x[0], weight, bias, **arguments), expected[0])
    assert dwconv.conv2d(x[:0], weight).shape == (0, 6, 38, 48)


def test_other_machine_code_of_a_plan_is_not_taken_for_the_first():
    """Versions of a kernel that are timed beside each other differ in their code alone."""
    x, weight = tensors(2, 6, 20, 20)
    problem = DepthwiseProblem(2, 6, (20, 20), (3, 3))
    cut_off = replace(problem, epilogue=Epilogue("relu"))
    plan, other = (choose(each, launch.device_spec(0)) for each in (problem, cut_off))
    expected = F.conv2d(x, weight, groups=6)
    for kernel, wanted in ((plan, expected), (other, expected.relu())):
        y = torch.empty_like(expected)
        launch.launch(plan, compile.compile_plan(kernel), x, weight, None, y)
        torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_tf32_changes_nothing(dims, layout):
    call = random_call((2, 8, 6, 20, 30)[: 2 + dims], (3, 3, 3)[:dims], layout=layout, device="cuda")
    exact = call()
    torch.backends.cudnn.allow_tf32 = True
    assert torch.equal(call(), exact)


WINDOWS = {"stride": (2, 1, 1), "padding": ((2, 1), (0, 3), (1, 1)), "dilation": (1, 2, 1)}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_layout_and_dimension_is_within_rounding(dtype, dims):
    """In both layouts, which agree within the bound; plain and strided windows, without a bias and with one."""
    uneven = {name: value[:dims] for name, value in WINDOWS.items()}
    for windows, multiplier in (({"padding": "same"}, 1), (uneven, 2)):
        results = []
        for layout in LAYOUTS:
            call = random_call(
                (3, 24, *(12, 17, 40)[:dims]), (3, 3, 3)[:dims], dtype=dtype, layout=layout, device="cuda",
                multiplier=multiplier, bias=multiplier > 1, **windows,
            )  # fmt: skip
            y = call()
            assert call.wrong(y) is None, (layout, windows, call.wrong(y))
            results.append(y.double().cpu())
            if windows == {"padding": "same"} and dims > 1:
                expected = TORCH[dims](call.x, call.weight, padding="same", groups=24)
                assert y.stride() == expected.stride(), layout
        _, bound = call.exact()
        assert ((results[0] - results[1]).abs() <= 2 * bound).all()


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_epilogue(activation):
    for dtype, layout in (("float32", "channels_first"), ("float16", "channels_last"), ("float64", "channels_first")):
        call = random_call(
            (2, 16, 20, 24), (3, 3), multiplier=2, bias=True, padding=1, dtype=dtype, layout=layout, device="cuda",
            activation=activation, scale=True, shift=True, residual=True,
        )  # fmt: skip
        call.x[0] *= 30  # far out, where exp and erfc overflow or vanish
        for column, value in enumerate((math.inf, -math.inf, math.nan)):
            call.x[1, column, 9, 8 * column] = value
        assert call.wrong(call()) is None, (dtype, layout, call.wrong(call()))
        other = call.arguments["residual"].contiguous().to(memory_format=torch.channels_last)
        if layout == "channels_last":
            other = other.contiguous()
        assert torch.equal(
            replace(call, arguments=call.arguments | {"residual": other})().nan_to_num(7), call().nan_to_num(7)
        )
        one = replace(call, x=call.x[0], arguments=call.arguments | {"residual": call.arguments["residual"][0]})
        assert torch.equal(one(), call()[0])


@pytest.fixture
def launched(monkeypatch):
    """The addresses that kernels were launched with."""
    seen = []
    real = ops.prepared

    def prepared(problem, index):
        plan, launch_now = real(problem, index)

        def launch_and_tell(*addresses):
            seen.append(addresses)
            launch_now(*addresses)

        return plan, launch_and_tell

    monkeypatch.setattr(ops, "prepared", prepared)
    ops._prepared.clear()
    yield seen
    ops._prepared.clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", [*VIEWS, *COPIED])
def test_views_are_read_as_they_lie_and_formats_are_torchs(name, dtype, launched):
    torch.manual_seed(0)
    x = (VIEWS | COPIED)[name](torch.randn(2, 6, 12, 14, device="cuda").to(getattr(torch, dtype)))
    call = replace(random_call((1, x.shape[1], 3, 3), (3, 3), dtype=dtype, padding=1, device="cuda"), x=x)
    y = call()
    assert call.wrong(y) is None, call.wrong(y)
    assert y.stride() == F.conv2d(x, call.weight, padding=1, groups=x.shape[1]).stride()
    (seen_x, _, _, seen_y), = launched  # fmt: skip
    assert (seen_x == x.data_ptr()) == (name in VIEWS), "no copy but the documented ones"
    if dtype != "float64":  # whose results are always contiguous, as PyTorch's
        assert (seen_y != y.data_ptr()) == (name in CONVERTED)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    again = call()
    peak = torch.cuda.max_memory_allocated() - before
    if name in VIEWS and seen_y == y.data_ptr():
        assert peak <= again.nbytes + 512, "the result is all that is allocated"


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channels_last_weight_makes_the_result_channels_last(dims, dtype):
    call = random_call((2, 8, 5, 6, 7)[: 2 + dims], (3, 2, 3)[:dims], dtype=dtype, padding=1, device="cuda")
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    call = replace(call, weight=call.weight.to(memory_format=last))
    for x in (call.x, call.x.to(memory_format=last), call.x[:0]):
        call = replace(call, x=x)
        y = call()
        assert y.stride() == TORCH[dims](x, call.weight, padding=1, groups=8).stride()
        if x.shape[0]:
            assert call.wrong(y) is None, call.wrong(y)


def test_hundreds_of_random_problems():
    """The plan that a user gets, between guard zones, with one value in x that is not finite."""
    seed = Random().randrange(2**32)
    random = Random(seed)
    problems = [random_problem(random, kind) for kind in [random_kind(random) for _ in range(KINDS)] for _ in range(5)]
    plans = [choose(problem, launch.device_spec(0)) for problem in problems]
    for plan, compiled in zip(plans, compile.compile_many(plans), strict=True):
        problem, whose = plan.problem, f"Random({seed}): {plan.problem}, {plan.variant} ({plan.tile})"
        inputs = make_inputs(problem, margin=32, device="cuda")
        beside = make_epilogue(problem, margin=32, device="cuda")
        inputs[0][random_place(random, problem)] = random.choice((math.inf, -math.inf, math.nan))
        output = make_output(problem, device="cuda")
        launch.launch(plan, compiled, *inputs, output.y, **beside)
        wrong = reference.describe_mismatch(output.y, *reference.forward(*inputs, problem, **beside))
        assert wrong is None, f"{whose}: {wrong}"
        assert output.guards_are_intact(), f"{whose}: wrote outside of y"


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "layout"), list(zip(DTYPES, LAYOUTS[::-1] * 2, strict=True)))
def test_pytorchs_samples(dims, dtype, layout):
    for x, weight, bias, arguments in depthwise_samples(dims, getattr(torch, dtype), "cuda"):
        batched = x.dim() == dims + 2
        images = in_layout(x if batched else x.unsqueeze(0), layout)
        y = Call(images if batched else images[0], weight, bias, arguments)()
        wrong = Call(images, weight, bias, arguments).wrong(y if batched else y.unsqueeze(0))
        assert wrong is None, (x.shape, weight.shape, arguments, wrong)


def test_runs_on_the_current_stream():
    x, weight = tensors(8, 64, 512, 512)
    dwconv.conv2d(x, weight)
    expected = F.conv2d(2 * x, weight, groups=64)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what comes before on this stream must be waited for
        doubled = x * 2
        y = dwconv.conv2d(doubled, weight)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(y, expected)


def test_a_captured_graph_replays():
    x, weight = tensors(2, 8, 30, 30)
    dwconv.conv2d(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dwconv.conv2d(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, F.conv2d(x, weight, groups=8))


def test_a_new_kernel_in_a_capture_works_or_says_what_to_do():
    x, weight = tensors(1, 4, 30, 30, taps=(2, 5))
    graph = torch.cuda.CUDAGraph()
    refused = None
    try:
        with torch.cuda.graph(graph):
            y = dwconv.conv2d(x, weight)
        graph.replay()
    except DepthwiseError as error:  # drivers differ in whether they load a module during a capture
        refused = str(error)
        torch.cuda.synchronize()
        y = dwconv.conv2d(x, weight)
    assert refused is None or "call the layer once" in refused
    torch.testing.assert_close(y, F.conv2d(x, weight, groups=4))


@needs_20_gb
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 46_400, 46_400), (3, 70_000, 101, 103), (1, 2, 3, 2**28 + 5), (1, 1, 1, 2**31 + 9)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_more_than_2_to_the_31_elements(shape):
    if shape[0] * shape[1] * shape[2] * shape[3] * 8 > torch.cuda.mem_get_info()[0] * 0.8:
        pytest.skip("not enough free memory")
    x = torch.empty(shape, device="cuda").uniform_(-1, 1)
    weight = torch.randn(shape[1], 1, 3, 3, device="cuda")
    y = dwconv.conv2d(x, weight, padding=1)
    channels = slice(max(0, shape[1] - 2), shape[1])
    rows, columns = min(shape[2], 64), min(shape[3], 512)
    whole = int(rows == shape[2])  # then padding stands on the other side of the rows, too
    corner = F.pad(x[-1:, channels, -rows:, -columns:], (0, 1, whole, 1))
    expected = F.conv2d(corner, weight[channels], groups=corner.shape[1])
    torch.testing.assert_close(y[-1:, channels, -expected.shape[2] :, -columns + 1 :], expected)
    start = F.conv2d(F.pad(x[:1, :1, :rows, :columns], (1, 0, 1, whole)), weight[:1])
    torch.testing.assert_close(y[:1, :1, : start.shape[2], : columns - 1], start)
    del x, y
    torch.cuda.empty_cache()


@needs_20_gb
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements_in_sixteen_bits(dims, layout):
    size = {1: (2**26 + 3,), 2: (8195, 8200), 3: (130, 512, 1032)}[dims]
    shape = (1, 32, *size)
    if math.prod(shape) * 6 > torch.cuda.mem_get_info()[0]:
        pytest.skip("not enough free memory")
    x = torch.empty_strided(shape, dense_strides(shape, layout), dtype=torch.float16, device="cuda")
    x.uniform_(-1, 1)
    weight = torch.randn(32, 1, *(3,) * dims, dtype=torch.float16, device="cuda")
    y = FUNCTIONS[dims](x, weight)
    for end in (slice(None, 12), slice(-12, None)):
        corner = Call(x[(slice(None), slice(30, 32), *(end,) * dims)].contiguous(), weight[30:])
        got = y[(slice(None), slice(30, 32), *(slice(None, 10) if end.start is None else slice(-10, None),) * dims)]
        assert corner.wrong(got) is None, corner.wrong(got)
    del x, y
    torch.cuda.empty_cache()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradients(dims, layout):
    """In every dtype, beside float64 by PyTorch; with an epilogue too."""
    for dtype in DTYPES:
        for beside in ({}, {"activation": "silu", "scale": True, "shift": True, "residual": True}):
            call = random_call(
                (2, 8, *(6, 9, 12)[:dims]), (3, 2, 3)[:dims], bias=True, dtype=dtype, layout=layout, device="cuda",
                padding=((2, 0), (1, 1), (0, 1))[:dims], **beside,
            )  # fmt: skip
            named = {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}
            ours = [call.x, call.weight, call.bias, *named.values()]
            exact = [t.detach().double().cpu().requires_grad_() for t in ours]
            theirs = Call(*exact[:3], call.arguments | dict(zip(named, exact[3:], strict=True)))
            plain = call()
            for leaf in ours:
                leaf.requires_grad_()
            y = call()
            assert torch.equal(y, plain), "recording gradients changes no bit"
            y.square().sum().backward()
            theirs().square().sum().backward()
            for a, b in zip(ours, exact, strict=True):
                error = (a.grad.double().cpu() - b.grad).norm() / b.grad.norm()
                assert error < 16 * torch.finfo(a.dtype).eps, (dtype, beside, a.shape, error)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile():
    x, weight = tensors(2, 6, 33, 40)
    compiled = torch.compile(lambda t: 2 * dwconv.conv2d(t, weight, padding=1, activation="relu"), fullgraph=True)
    for t in (x, x.to(memory_format=torch.channels_last)):
        expected = 2 * F.relu(F.conv2d(t, weight, padding=1, groups=6))
        torch.testing.assert_close(compiled(t), expected)
        assert compiled(t).stride() == expected.stride()


def test_every_way_into_the_operator_agrees():
    """Straight to the kernels, through the dispatcher, under a dispatch mode, and with gradients: the same bits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passing(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Passing.calls += "dwconv" in str(func)
            return func(*args, **(kwargs or {}))

    x, weight = tensors(2, 6, 20, 24)
    expected = dwconv.conv2d(x, weight, padding=1)
    windows = ([1, 1], [1, 1, 1, 1], [1, 1])
    assert torch.equal(torch.ops.dwconv.convolution(x, weight, None, None, None, None, *windows, None), expected)
    with Passing():
        assert torch.equal(dwconv.conv2d(x, weight, padding=[1, 1]), expected)
    assert Passing.calls == 1, "modes see the operator"
    recorded = dwconv.conv2d(x, weight.requires_grad_(), padding=1)
    assert recorded.requires_grad
    assert torch.equal(recorded, expected)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_stream_of_sizes_compiles_few_kernels(padding):
    _, weight = tensors(1, 4, 8, 8, taps=(3, 4))
    before = len(compile._kernels)
    for i in range(100):
        x = torch.randn(1, 4, 40 + i, 300 - 2 * i if i % 3 else 299 - i, device="cuda")
        torch.testing.assert_close(
            dwconv.conv2d(x, weight, padding=padding), F.conv2d(x, weight, padding=padding, groups=4)
        )
    assert len(compile._kernels) - before <= 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_as_torch_does(dtype):
    x, weight = (tensor.requires_grad_() for tensor in tensors(2, 6, 20, 24))
    with torch.autocast("cuda", dtype):
        y, theirs = dwconv.conv2d(x, weight, activation="relu"), F.relu(F.conv2d(x, weight, groups=6))
    assert y.dtype == dtype
    torch.testing.assert_close(y, theirs)
    grad = torch.randn_like(y)
    ours, expected = (torch.autograd.grad(result, (x, weight), grad) for result in (y, theirs))
    for mine, other in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, atol=2 * torch.finfo(dtype).eps * float(other.abs().max()), rtol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one():
    x, weight = (t.to("cuda:1") for t in tensors(2, 6, 20, 24))
    assert torch.cuda.current_device() == 0
    y = dwconv.conv2d(x, weight)
    assert y.device == x.device
    torch.testing.assert_close(y, F.conv2d(x, weight, groups=6))


def test_the_device_is_known():
    spec = launch.device_spec(0)
    assert spec.multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
    assert launch.driver_version() >= (12, 0)
