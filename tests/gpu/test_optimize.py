"""Exported files on a GPU: same results, fallbacks, gradients, streams, torch.compile, and the whole command."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from dwconv import optimize
from model_files import EXAMPLES, ZOO, exported, load_both, write

# PyTorch's own advice: on padding='same', profiling, and compiling
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Both models of the zoo on the GPU, and the exported file's operator."""
    path = write(tmp_path_factory.mktemp("zoo"), ZOO)
    _, export = exported(path)
    both = load_both(path, export.text("# zoo"))
    torch.manual_seed(42)
    original = both.before["Model"](*both.before["get_init_inputs"]()).cuda()
    torch.manual_seed(42)
    new = both.after["ModelNew"](*both.after["get_init_inputs"]()).cuda()
    operator = getattr(torch.ops, export.extension.name).conv2d
    return SimpleNamespace(original=original, new=new, operator=operator)


def image(*shape, **kwargs):
    return torch.rand(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0), **kwargs)


def close(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 20, 24), (3, 6, 64, 80), (1, 6, 19, 23), (2, 6, 33, 30)], ids=str)
def test_model_agrees_at_traced_and_other_sizes(zoo, shape):
    x = image(*shape)
    with torch.no_grad():
        torch.testing.assert_close(zoo.new(x), zoo.original(x), rtol=1e-4, atol=1e-4)


def test_kernels_run(zoo):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        zoo.new.plain(image(2, 6, 20, 24))
        torch.cuda.synchronize()
    assert any("depthwise_3x3" in event.key for event in profile.key_averages())


@pytest.mark.parametrize(
    "make",
    [
        lambda: image(2 * 6 * 20 * 24 + 1)[1:].view(2, 6, 20, 24),  # starts at 4 bytes past a multiple of 16
        lambda: image(2, 6, 20, 24).to(memory_format=torch.channels_last),
        lambda: image(2, 6, 20, 48)[..., ::2],
        lambda: image(6, 20, 24),
        lambda: image(0, 6, 20, 24),
        lambda: image(2, 6, 20, 24).cpu(),
    ],
    ids=["unaligned", "channels_last", "strided", "unbatched", "empty", "cpu"],
)
def test_other_inputs_take_the_original_way(zoo, make):
    x = make()
    ours, theirs = zoo.new.plain, zoo.original.plain
    if not x.is_cuda:
        ours, theirs = copy.deepcopy(ours).cpu(), copy.deepcopy(theirs).cpu()
    y = ours(x)
    close(y, theirs(x))
    assert y.stride() == theirs(x).stride()


def test_half_and_autocast_as_the_original(zoo):
    x = image(2, 6, 20, 24)
    with torch.autocast("cuda", dtype=torch.float16):
        assert zoo.new.plain(x).dtype == torch.float16
        assert torch.equal(zoo.new.plain(x), zoo.original.plain(x))
    ours, theirs = copy.deepcopy(zoo.new.plain).half(), copy.deepcopy(zoo.original.plain).half()
    assert torch.equal(ours(x.half()), theirs(x.half()))


@pytest.mark.parametrize("name", ["plain", "wide", "nested.0", "same"])
def test_gradients_and_their_gradients(zoo, name):
    results = []
    for model in (zoo.original, zoo.new):
        layer = model.get_submodule(name)
        x = image(2, layer.in_channels, 20, 24).requires_grad_()
        gradients = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), [x, *layer.parameters()])
        results.append((*gradients, *second))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))


def test_only_wanted_gradients(zoo):
    layer = copy.deepcopy(zoo.new.plain).requires_grad_(False)
    x = image(2, 6, 20, 24).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_side_stream_and_graph(zoo):
    x = image(2, 6, 20, 24)
    with torch.no_grad():
        wanted = zoo.new.plain(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = zoo.new.plain(x)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(y, wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = zoo.new.plain(x)
        y.zero_()
        graph.replay()
        assert torch.equal(y, wanted)


def test_torch_compile_traces_through(zoo):
    layer = torch.compile(zoo.new.plain, fullgraph=True)
    for height in (20, 28, 36):  # the second size makes shapes dynamic
        x = image(2, 6, height, 24).requires_grad_()
        y = layer(x)
        close(y, zoo.original.plain(x))
        y.sum().backward()
        assert x.grad is not None


def test_operator_keeps_the_rules_of_torch_library(zoo):
    x = image(2, 6, 20, 24).requires_grad_()
    torch.library.opcheck(zoo.operator.default, (x, zoo.new.plain.weight, zoo.new.plain.bias, 0))


def test_a_file_can_be_run_twice(tmp_path):
    path = write(tmp_path, ZOO)
    text = exported(path)[1].text("# zoo")
    for _ in range(2):
        layer = load_both(path, text).after["ModelNew"](6).cuda().plain
        x = image(2, 6, 20, 24)
        with torch.no_grad():
            close(layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1, groups=6))


def test_operator_refuses_in_sentences(zoo):
    weight, bias = zoo.new.plain.weight, zoo.new.plain.bias
    with pytest.raises(RuntimeError, match=r"weight has shape .*; it must be"):
        zoo.operator(image(2, 6, 20, 24), weight[:3], bias, 0)
    with pytest.raises(RuntimeError, match="made for layers with a bias"):
        zoo.operator(image(2, 6, 20, 24), weight, None, 0)
    with pytest.raises(RuntimeError, match="contiguous float32"):
        zoo.operator(image(2, 6, 20, 24).half(), weight, bias, 0)
    with pytest.raises(RuntimeError, match="is unknown"):
        zoo.operator(image(2, 6, 20, 24), weight, bias, 99)
    small = torch.nn.Conv2d(6, 6, 3, groups=6).cuda()
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        zoo.new.unused(image(2, 6, 2, 2))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        small(image(2, 6, 2, 2))


def test_the_whole_command(tmp_path):
    out, figures = tmp_path / "out.py", tmp_path / "out.json"
    assert optimize.run(EXAMPLES / "small_mobilenet.py", out, json_path=figures) == 0
    content = json.loads(figures.read_text())
    assert content["model"]["seeds"] == 5
    assert content["model"]["speed_up"] > 0
    assert {"original", "ModelNew"} <= set(content["model"]["times"])
    assert all(layer["error_share"] <= 1 and layer["attainment"] > 0 for layer in content["layers"])
    assert "Measured on" in out.read_text(encoding="utf-8").partition('"""')[0]
