"""dwconv.conv2d, Conv2d and convert: the same as PyTorch's in shapes, numbers, gradients, errors and initialisation."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dwconv
from dwconv import DepthwiseError

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")

CONFIGURATIONS = {
    "plain": {},
    "padded": {"padding": 1},
    "uneven stride": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": (1, 2), "padding": 2},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "same, dilated": {"padding": "same", "dilation": 2},
}


def tensors(multiplier: int = 2, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 14)
    weight = torch.randn(3 * multiplier, 1, 3, 4)
    return x, weight, torch.randn(3 * multiplier) if bias else None


@pytest.mark.parametrize("arguments", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("emulate", [False, True], ids=["torch", "emulated"])
def test_conv2d_is_torchs(arguments: dict[str, object], emulate: bool) -> None:
    x, weight, bias = tensors()
    expected = F.conv2d(x, weight, bias, groups=3, **arguments)
    if emulate:
        with dwconv.emulated():
            y = dwconv.conv2d(x, weight, bias, **arguments)
    else:
        y = dwconv.conv2d(x, weight, bias, **arguments)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)


def test_uneven_padding_is_zeros_around_x() -> None:
    x, weight, bias = tensors()
    expected = F.conv2d(F.pad(x, (0, 3, 2, 1)), weight, bias, groups=3)
    for y in (dwconv.conv2d(x, weight, bias, padding=((2, 1), (0, 3))), emulated(x, weight, bias, ((2, 1), (0, 3)))):
        torch.testing.assert_close(y, expected)


def emulated(x: Tensor, weight: Tensor, bias: Tensor | None, padding: object) -> Tensor:
    with dwconv.emulated():
        return dwconv.conv2d(x, weight, bias, padding=padding)


def test_one_image_and_no_image() -> None:
    x, weight, bias = tensors()
    with dwconv.emulated():
        torch.testing.assert_close(dwconv.conv2d(x[0], weight, bias), F.conv2d(x[0], weight, bias, groups=3))
        assert dwconv.conv2d(x[:0], weight, bias).shape == (0, 6, 9, 11)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 2:9, 3:12],
        lambda x: x[:, 1:3],
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.transpose(2, 3),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[..., ::2],
        lambda x: x[:, :, :1].transpose(2, 3),
        lambda x: x[:1, :, :, ::3].contiguous()[:, :, ::2],
    ],
    ids=[
        "cropped",
        "some channels",
        "every other channel",
        "expanded",
        "transposed",
        "channels_last",
        "strided",
        "one column",
        "rows",
    ],
)
def test_x_may_be_any_view(view) -> None:
    x = view(tensors()[0])
    weight = torch.randn(x.shape[1], 1, 3, 3)
    before = x.clone()
    with dwconv.emulated():
        y = dwconv.conv2d(x, weight, padding=1)
    expected = F.conv2d(x, weight, padding=1, groups=x.shape[1])
    torch.testing.assert_close(y, expected)
    if x.is_contiguous(memory_format=torch.channels_last):
        assert y.stride() == expected.stride()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_go_to_torch(dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype) for t in tensors())
    with dwconv.emulated():
        assert torch.equal(dwconv.conv2d(x, weight, bias), F.conv2d(x, weight, bias, groups=3))


@pytest.mark.parametrize("arguments", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_gradients_are_torchs(arguments: dict[str, object]) -> None:
    theirs = [t.requires_grad_() for t in tensors()]
    ours = [t.detach().clone().requires_grad_() for t in theirs]
    expected = F.conv2d(*theirs, groups=3, **arguments)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    with dwconv.emulated():
        dwconv.conv2d(*ours, **arguments).backward(grad)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_.grad, theirs_.grad)


def test_gradients_of_uneven_padding() -> None:
    x, weight, bias = (t.double().requires_grad_() for t in tensors())
    padding = ((2, 1), (0, 3))
    assert torch.autograd.gradcheck(lambda *t: dwconv.conv2d(*t, padding=padding, stride=2), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *t: dwconv.conv2d(*t, padding=padding, stride=2), (x, weight, bias))


def test_autocast_casts_as_torch_does() -> None:
    x, weight, bias = tensors()
    layer = dwconv.Conv2d(3, 6, 3, padding=1, groups=3)
    with torch.autocast("cpu", torch.bfloat16), dwconv.emulated():
        assert torch.equal(dwconv.conv2d(x, weight, bias), F.conv2d(x, weight, bias, groups=3))
        mixed = layer(x.bfloat16())
    assert mixed.dtype == torch.bfloat16


def test_only_the_gradients_that_are_needed() -> None:
    x, weight, bias = tensors()
    weight.requires_grad_()
    dwconv.conv2d(x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None


def test_the_operator_passes_opcheck() -> None:
    x, weight, bias = (t.requires_grad_() for t in tensors())
    torch.library.opcheck(torch.ops.dwconv.conv2d.default, (x, weight, bias, 1, 2, 1, 0, 2, 1, 1, 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_traces_through(dynamic: bool) -> None:
    x, weight, bias = tensors()
    compiled = torch.compile(
        lambda t: F.relu(dwconv.conv2d(t, weight, bias, padding=1)),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for batch in (x, x[:1], x[:, :, :9]):
        torch.testing.assert_close(compiled(batch), F.relu(F.conv2d(batch, weight, bias, padding=1, groups=3)))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"padding": "same", "bias": False},
        {"stride": 2, "padding": 1},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": (1, 2), "padding_mode": "circular", "dilation": (1, 2)},
        {"padding": "same", "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_module_is_torchs(arguments: dict[str, object]) -> None:
    torch.manual_seed(7)
    theirs = torch.nn.Conv2d(4, 8, 3, groups=4, **arguments)
    torch.manual_seed(7)
    ours = dwconv.Conv2d(4, 8, 3, groups=4, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), "the same random numbers in the same order"
    x = torch.randn(2, 4, 9, 10)
    with dwconv.emulated():
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    assert isinstance(ours, torch.nn.Conv2d)
    assert repr(ours) == repr(theirs)


def test_module_refuses_other_groups() -> None:
    with pytest.raises(DepthwiseError, match="groups=2 is not depthwise: the layer has 4 input channels"):
        dwconv.Conv2d(4, 8, 3, groups=2)


def test_convert_switches_depthwise_layers_only() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 1),
        torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.nn.ReLU()),
        torch.nn.Conv1d(8, 8, 3, groups=8),
        torch.nn.Conv2d(8, 8, 3, groups=4),
    )
    x = torch.randn(1, 4, 9, 9)
    state, expected = model.state_dict(), model[1](model[0](x))
    report = dwconv.convert(model)
    assert report.replaced == ("1.0",)
    assert [name for name, _ in report.left_alone] == ["0", "2", "3"]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with dwconv.emulated():
        torch.testing.assert_close(model[1](model[0](x)), expected)
    assert dwconv.convert(model).replaced == (), "a second time there is nothing left to switch"


BAD = {
    "not depthwise": (lambda x, w: dwconv.conv2d(x, torch.randn(4, 1, 3, 3)), "4 filters, but x has 3 channels"),
    "grouped": (lambda x, w: dwconv.conv2d(x, torch.randn(6, 3, 3, 3)), r"depthwise filter is \[C\*m, 1, KH, KW\]"),
    "rank of weight": (lambda x, w: dwconv.conv2d(x, w[0]), r"weight has shape \(1, 3, 4\)"),
    "rank of x": (lambda x, w: dwconv.conv2d(x[0, 0], w), r"conv2d takes \[N, C, H, W\]"),
    "bias": (lambda x, w: dwconv.conv2d(x, w, torch.randn(5)), r"bias has shape \(5,\); it must be \[6\]"),
    "dtypes": (lambda x, w: dwconv.conv2d(x, w.double()), "x is torch.float32, but weight is torch.float64"),
    "bias dtype": (lambda x, w: dwconv.conv2d(x, w, torch.randn(6).half()), "but bias is torch.float16"),
    "devices": (lambda x, w: dwconv.conv2d(x, w.to("meta")), "x is on cpu, but weight is on meta"),
    "integers": (lambda x, w: dwconv.conv2d(x.int(), w.int()), "convolution is for floating types"),
    "large filter": (lambda x, w: dwconv.conv2d(x[:, :, :2], w), "spans 3 elements of height .* padded input has 2"),
    "stride 0": (lambda x, w: dwconv.conv2d(x, w, stride=0), r"stride=\(0, 0\) is not possible"),
    "dilation": (lambda x, w: dwconv.conv2d(x, w, dilation=(1, -1)), "dilation=.* is not possible"),
    "negative padding": (lambda x, w: dwconv.conv2d(x, w, padding=-1), "crop x instead"),
    "three strides": (lambda x, w: dwconv.conv2d(x, w, stride=(1, 1, 1)), "give one integer, or 2"),
    "word": (lambda x, w: dwconv.conv2d(x, w, padding="full"), "use 'same', 'valid', or numbers"),
    "same, strided": (lambda x, w: dwconv.conv2d(x, w, padding="same", stride=2), "padding='same' needs stride 1"),
    "pairs": (lambda x, w: dwconv.conv2d(x, w, padding=((1, 2),)), r"give 2 \(before, after\) pairs"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("emulate", [False, True], ids=["torch", "emulated"])
def test_bad_input_gets_a_sentence(call, message: str, emulate: bool) -> None:
    x, weight, _ = tensors()
    with dwconv.emulated() if emulate else nullcontext(), pytest.raises(DepthwiseError, match=message):
        call(x, weight)


def test_unknown_variant_and_architecture() -> None:
    x, weight, _ = tensors()
    with pytest.raises(DepthwiseError, match="variant='fft' is unknown"), dwconv.emulated(variant="fft"):
        dwconv.conv2d(x, weight)
    with pytest.raises(DepthwiseError, match="arch='sm_42' is unknown"), dwconv.emulated(arch="sm_42"):
        dwconv.conv2d(x, weight)
