"""dwconv.conv2d on the GPU: streams, graphs, huge tensors, gradients, compilation, few kernels for many sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dwconv
from dwconv import DepthwiseError, compile, launch

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


def test_tf32_changes_nothing():
    x, weight = tensors(2, 6, 40, 50)
    exact = dwconv.conv2d(x, weight)
    torch.backends.cudnn.allow_tf32 = True
    assert torch.equal(dwconv.conv2d(x, weight), exact)


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


def test_gradients():
    x, weight = tensors(2, 6, 33, 40)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    theirs = [t.clone().requires_grad_() for t in (x, weight)]
    dwconv.conv2d(*ours, padding=1, stride=2).square().sum().backward()
    F.conv2d(*theirs, padding=1, stride=2, groups=6).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile():
    x, weight = tensors(2, 6, 33, 40)
    compiled = torch.compile(lambda t: F.relu(dwconv.conv2d(t, weight, padding=1)), fullgraph=True)
    torch.testing.assert_close(compiled(x), F.relu(F.conv2d(x, weight, padding=1, groups=6)))


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
    assert torch.equal(torch.ops.dwconv.conv2d(x, weight, None, 1, 1, 1, 1, 1, 1, 1, 1), expected)
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


def test_other_dtypes_and_layouts_go_to_torch():
    x, weight = tensors(2, 6, 20, 24)
    half = dwconv.conv2d(x.half(), weight.half())
    assert torch.equal(half, F.conv2d(x.half(), weight.half(), groups=6))
    last = x.to(memory_format=torch.channels_last)
    assert dwconv.conv2d(last, weight).stride() == F.conv2d(last, weight, groups=6).stride()


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
