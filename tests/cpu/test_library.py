"""conv1d, conv2d and conv3d: the same as PyTorch's in shapes, numbers, memory formats and errors; no hidden copy."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._prims_common import suggest_memory_format

import dwconv
from convolutions import CONVERTED, COPIED, DTYPES, FUNCTIONS, LAYOUTS, VIEWS, random_call
from dwconv import DepthwiseError, emulator
from dwconv.problem import ACTIVATIONS
from dwconv.tensors import channels_last_strides, in_layout

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")

TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

CONFIGURATIONS = {
    "plain": {},
    "padded": {"padding": 1},
    "uneven stride": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": (1, 2), "padding": 2},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "same, dilated": {"padding": "same", "dilation": 2},
    "lists": {"padding": [[0, 0], [1, 1]], "stride": [1, 1], "dilation": [1]},
}


def tensors(multiplier: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 11, 14), torch.randn(3 * multiplier, 1, 3, 4), torch.randn(3 * multiplier)


def on_one_per_thread():
    """For tests of what surrounds the kernels: this one takes everything, and is quick to compile."""
    return dwconv.emulated(variant="one_per_thread")


@pytest.mark.parametrize("arguments", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("emulate", [False, True], ids=["torch", "emulated"])
def test_conv2d_is_torchs(arguments, emulate):
    x, weight, bias = tensors()
    theirs = arguments | ({"padding": (0, 1)} if isinstance(arguments.get("padding"), list) else {})
    expected = F.conv2d(x, weight, bias, groups=3, **theirs)
    with on_one_per_thread() if emulate else nullcontext():
        y = dwconv.conv2d(x, weight, bias, **arguments)
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("emulate", [False, True], ids=["torch", "emulated"])
@pytest.mark.parametrize("dims", [1, 3])
def test_conv1d_and_conv3d_are_torchs(dims, emulate):
    call = random_call((2, 3, 6, 5, 7)[: 2 + dims], (3, 2, 3)[:dims], multiplier=2, bias=True, padding=1, stride=2)
    expected = TORCH[dims](call.x, call.weight, call.bias, padding=1, stride=2, groups=3)
    with on_one_per_thread() if emulate else nullcontext():
        torch.testing.assert_close(call(), expected)
        torch.testing.assert_close(replace(call, x=call.x[0])(), expected[0])
        assert replace(call, x=call.x[:0])().shape == (0, *expected.shape[1:])


WINDOWS = {"stride": (2, 1, 1), "padding": ((2, 1), (0, 3), (1, 1)), "dilation": (1, 2, 1)}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_layout_and_dimension_is_within_rounding(dtype, dims):
    """In both layouts, by the plan that a user gets; the two results agree within the bound."""
    windows = {name: value[:dims] for name, value in WINDOWS.items()}
    shape, taps = (2, 8, *(9, 7, 10)[:dims]), (3, 2, 3)[:dims]
    results = []
    for layout in LAYOUTS:
        call = random_call(shape, taps, multiplier=2, bias=True, dtype=dtype, layout=layout, **windows)
        with dwconv.emulated():
            y = call()
        assert call.wrong(y) is None, call.wrong(y)
        results.append(y.double())
    _, bound = call.exact()
    assert ((results[0] - results[1]).abs() <= 2 * bound).all()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_uneven_padding_is_zeros_around_x(dims):
    pairs = ((2, 1), (0, 3), (1, 0))[:dims]
    call = random_call((2, 3, 6, 5, 7)[: 2 + dims], (3, 2, 3)[:dims], multiplier=2, bias=True, padding=pairs)
    around = [pad for pair in reversed(pairs) for pad in pair]
    expected = TORCH[dims](F.pad(call.x, around), call.weight, call.bias, groups=3)
    torch.testing.assert_close(call(), expected)
    with on_one_per_thread():
        torch.testing.assert_close(call(), expected)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_epilogue(activation):
    """By a kernel, and by PyTorch's operations."""
    for dtype, layout in (("float32", "channels_first"), ("float16", "channels_last")):
        call = random_call(
            (2, 3, 6, 9), (3, 3), multiplier=2, bias=True, padding=1, dtype=dtype, layout=layout,
            activation=activation, scale=True, shift=True, residual=True,
        )  # fmt: skip
        call.x[0, 0, 2, 2], call.x[1, 1, 3, 3], call.x[1, 2, 3, 7] = torch.inf, -torch.inf, torch.nan
        with on_one_per_thread():
            assert call.wrong(call()) is None, call.wrong(call())
        call = replace(call, x=call.x.nan_to_num(1, 1, -1))  # PyTorch's gelu makes inf a NaN on the CPU
        torch.testing.assert_close(call().double(), call.exact()[0], rtol=2e-2, atol=5e-2, check_stride=False)


@pytest.mark.parametrize("present", [("scale",), ("shift",), ("residual",), ("scale", "residual")], ids="+".join)
@pytest.mark.parametrize("dims", [1, 3])
def test_parts_of_an_epilogue(present, dims):
    shape, taps = (2, 2, 4, 5, 6)[: 2 + dims], (2, 2, 3)[:dims]
    call = random_call(shape, taps, padding=1, **dict.fromkeys(present, True))
    with on_one_per_thread():
        y = call()
        assert call.wrong(y) is None, call.wrong(y)
        if "residual" in present:  # without a batch, like x
            one = replace(call, x=call.x[0], arguments=call.arguments | {"residual": call.arguments["residual"][0]})
            assert torch.equal(one(), y[0])


@pytest.fixture
def launched(monkeypatch):
    """The tensors that launches under the emulator were given."""
    seen = []

    def run(plan, x, weight, bias, y, *others, **options):
        seen.append((x, y, *others))
        real(plan, x, weight, bias, y, *others, **options)

    real = emulator.run
    monkeypatch.setattr(emulator, "run", run)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*VIEWS, *COPIED])
def test_x_may_be_any_view(name, dtype, launched):
    torch.manual_seed(0)
    x = (VIEWS | COPIED)[name](torch.randn(2, 6, 12, 14).to(getattr(torch, dtype)))
    call = replace(random_call((1, x.shape[1], 3, 3), (3, 3), dtype=dtype, padding=1), x=x)
    before = x.clone()
    with on_one_per_thread():
        y = call()
    assert call.wrong(y) is None, call.wrong(y)
    assert torch.equal(x, before)
    assert y.stride() == F.conv2d(x, call.weight, padding=1, groups=x.shape[1]).stride()
    (seen, computed, *_), = launched  # fmt: skip
    assert (seen.data_ptr() == x.data_ptr()) == (name in VIEWS), "no copy but the documented ones"
    assert (computed.data_ptr() != y.data_ptr()) == (name in CONVERTED)


@pytest.mark.parametrize("dims", [1, 3])
def test_sequences_and_volumes_lie_in_both_layouts(dims, launched):
    shape = (2, 6, 5, 4, 7)[: 2 + dims]
    call = random_call(shape, (3, 3, 3)[:dims], padding=1)
    last = replace(call, x=in_layout(call.x, "channels_last"))
    views = [lambda x: x, lambda x: x[:, 1:4], lambda x: x[..., 1:5], lambda x: x[:1].expand(3, *[-1] * (dims + 1))]
    for view in views:
        for base in (call, last):
            viewed = replace(base, x=view(base.x))
            viewed = replace(viewed, weight=call.weight[: viewed.x.shape[1]])
            launched.clear()
            with on_one_per_thread():
                y = viewed()
            assert viewed.wrong(y) is None, viewed.wrong(y)
            assert launched[0][0].data_ptr() == viewed.x.data_ptr(), "no copy"
            if dims == 3:
                expected = F.conv3d(viewed.x, viewed.weight, padding=1, groups=viewed.x.shape[1])
                assert y.stride() == expected.stride()
            else:
                assert y.stride(1 if base is last else 2) == 1, "a result of one dimension lies as x does"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_channels_last_weight_makes_the_result_channels_last(dims, dtype, launched):
    shape, last = (2, 3, 5, 4, 7)[: 2 + dims], torch.channels_last if dims == 2 else torch.channels_last_3d
    call = random_call(shape, (3, 2, 3)[:dims], dtype=dtype, padding=1, residual=True)
    call = replace(call, weight=call.weight.to(memory_format=last))
    with on_one_per_thread():
        y = call()
    assert call.wrong(y) is None, call.wrong(y)
    x, weight = call.x, call.weight
    if x.element_size() == 2:  # what PyTorch does with them depends on the CPU
        x, weight = x.float(), weight.float()
    assert y.stride() == TORCH[dims](x, weight, padding=1, groups=3).stride()
    assert launched[0][0].data_ptr() == call.x.data_ptr()


def test_a_residual_of_another_layout_is_copied(launched):
    call = random_call((2, 4, 5, 8), (3, 3), padding=1, residual=True)
    for residual in (
        call.arguments["residual"],
        call.arguments["residual"].to(memory_format=torch.channels_last),
        call.arguments["residual"][:1].expand(2, -1, -1, -1),
    ):
        given = replace(call, arguments=call.arguments | {"residual": residual})
        launched.clear()
        with on_one_per_thread():
            y = given()
        assert given.wrong(y) is None, given.wrong(y)
        assert (launched[0][-1] is residual) == residual.is_contiguous()


def test_small_tensors_may_be_strided_and_start_anywhere():
    call = random_call((2, 4, 5, 8), (3, 3), padding=1, bias=True, scale=True, shift=True)

    def every_other(tensor):
        return torch.stack((torch.full_like(tensor, torch.nan), tensor), dim=-1)[..., 1]

    strided = {name: every_other(call.arguments[name]) for name in ("scale", "shift")}
    with on_one_per_thread():
        expected = call()
        other = replace(
            call, weight=every_other(call.weight), bias=every_other(call.bias), arguments=call.arguments | strided
        )
        assert torch.equal(other(), expected)
        moved = torch.cat((torch.zeros(1), call.weight.flatten()))[1:].view_as(call.weight)
        assert torch.equal(replace(call, weight=moved)(), expected)


@given(st.lists(st.integers(0, 4), min_size=4, max_size=5), st.lists(st.integers(0, 40), min_size=5, max_size=5))
def test_the_rule_of_memory_formats_is_pytorchs(shape, strides):
    tensor = torch.empty(4 * sum(strides) + 1, device="meta").as_strided(shape, strides[: len(shape)])
    ours = channels_last_strides(tensor.shape, tensor.stride())
    assert ours == (suggest_memory_format(tensor) != torch.contiguous_format)


def test_one_image_and_no_image():
    x, weight, bias = tensors()
    with on_one_per_thread():
        torch.testing.assert_close(dwconv.conv2d(x[0], weight, bias), F.conv2d(x[0], weight, bias, groups=3))
        last = x.to(memory_format=torch.channels_last)
        y, expected = dwconv.conv2d(last[0], weight, bias), F.conv2d(last[0], weight, bias, groups=3)
        assert y.stride() == expected.stride()
        assert dwconv.conv2d(last[:0], weight, bias).stride() == F.conv2d(last[:0], weight, bias, groups=3).stride()


BAD = {
    "not depthwise": (lambda x, w: dwconv.conv2d(x, torch.randn(4, 1, 3, 3)), "4 filters, but x has 3 channels"),
    "grouped": (lambda x, w: dwconv.conv2d(x, torch.randn(6, 3, 3, 3)), r"depthwise filter is \[C\*m, 1, KH, KW\]"),
    "rank of weight": (lambda x, w: dwconv.conv2d(x, w[0]), r"weight has shape \(1, 3, 4\)"),
    "rank of x": (lambda x, w: dwconv.conv2d(x[0, 0], w), r"conv2d takes \[N, C, H, W\]"),
    "images to conv1d": (lambda x, w: dwconv.conv1d(x, w), r"a depthwise filter is \[C\*m, 1, K\]"),
    "sequences to conv3d": (lambda x, w: dwconv.conv3d(x[0, 0], w[..., None]), r"conv3d takes \[N, C, D, H, W\]"),
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
    "activation": (lambda x, w: dwconv.conv2d(x, w, activation="swish"), "activation='swish' is unknown: use one of"),
    "scale": (lambda x, w: dwconv.conv2d(x, w, scale=torch.ones(3)), r"scale has shape \(3,\); it must be \[6\]"),
    "shift dtype": (lambda x, w: dwconv.conv2d(x, w, shift=torch.ones(6).half()), "but shift is torch.float16"),
    "residual": (lambda x, w: dwconv.conv2d(x, w, residual=x), "residual has shape .* it is added to y, which has"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("emulate", [False, True], ids=["torch", "emulated"])
def test_bad_input_gets_a_sentence(call, message, emulate):
    x, weight, _ = tensors()
    with dwconv.emulated() if emulate else nullcontext(), pytest.raises(DepthwiseError, match=message):
        call(x, weight)


def test_unknown_variant_and_architecture():
    x, weight, _ = tensors()
    with pytest.raises(DepthwiseError, match="variant='fft' is unknown"), dwconv.emulated(variant="fft"):
        dwconv.conv2d(x, weight)
    with pytest.raises(DepthwiseError, match="arch='sm_42' is unknown"), dwconv.emulated(arch="sm_42"):
        dwconv.conv2d(x, weight)


def test_every_function_documents_itself():
    for function in FUNCTIONS.values():
        for part in ("Equivalent to", "Args:", "Returns:", "Raises:", ">>>"):
            assert part in function.__doc__
