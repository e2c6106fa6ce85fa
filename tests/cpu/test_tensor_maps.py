"""Tensors as the copy engine sees them: which tensors it takes, and what the emulator is told."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest

from dwconv.device import H200, PRESETS
from dwconv.errors import DepthwiseError
from dwconv.problem import DepthwiseProblem
from dwconv.tensor_maps import BYTES, emulated, encoder
from dwconv.variants.boxes import forward_maps, gradient_maps
from dwconv.variants.sparse_rows import turned
from dwconv.variants.streams import streams

GIVEN = DepthwiseProblem(
    2, 48, (9, 20), (3, 3), padding=((1, 1), (1, 1)), stride=(1, 2), layout="channels_last", direction="grad_weight"
)


def test_the_maps_of_a_problem():
    x, g = gradient_maps(GIVEN, H200, False, (32, 9), (32, 4))
    assert (x.operand, x.sizes, x.strides, x.box) == (0, (48, 20, 9, 2), (192, 3840, 34560), (32, 9, 1, 1))
    assert (g.operand, g.sizes, g.strides, g.box) == (1, (48, 10, 9, 2), (192, 1920, 17280), (32, 4, 1, 1))
    x, g = gradient_maps(GIVEN, H200, True, (32, 9), (32, 4), rows=(2, 3))
    assert (x.sizes, x.strides, x.box) == ((48, 9, 20, 2), (3840, 192, 34560), (32, 9, 2, 1))
    assert (g.sizes, g.strides, g.box) == ((48, 9, 10, 2), (1920, 192, 17280), (32, 4, 3, 1))
    assert gradient_maps(GIVEN, H200, False, (32, 9), (32, 4), swizzled=True)[0].swizzle == 128


def test_the_maps_of_a_view_and_of_a_volume():
    view = replace(GIVEN, x_strides=(20000, 1, 1000, 48))
    x, g = gradient_maps(view, H200, False, (32, 9), (32, 4))
    assert x.strides == (192, 4000, 80000)
    assert g == gradient_maps(GIVEN, H200, False, (32, 9), (32, 4))[1]
    volume = DepthwiseProblem(2, 48, (3, 9, 20), (3, 3, 3), layout="channels_last", direction="grad_weight")
    x, g = gradient_maps(volume, H200, False, (32, 9), (32, 4))
    assert (x.sizes, g.sizes) == ((48, 20, 9, 6), (48, 18, 7, 2))


@pytest.mark.parametrize(
    "given",
    [
        replace(GIVEN, channels=42),
        replace(GIVEN, aligned=8),
        replace(GIVEN, dilation=(1, 2)),
        replace(GIVEN, x_strides=(20 * 900, 1, 902, 48)),
        replace(GIVEN, x_strides=(0, 1, 960, 48)),
        replace(GIVEN, x_strides=(9 * 960, 1, 480, 48)),
    ],
    ids=["channels", "alignment", "classes of columns", "rows", "one image for all", "overlapping rows"],
)
def test_what_the_engine_does_not_take(given):
    assert gradient_maps(given, H200, False, (32, 9), (32, 4)) is None


def test_boxes_that_the_engine_does_not_make():
    for arch in ("sm_89", "sm_120"):
        assert gradient_maps(GIVEN, PRESETS[arch], False, (32, 9), (32, 4)) is None
    assert gradient_maps(GIVEN, H200, False, (32, 257), (32, 4)) is None
    assert gradient_maps(GIVEN, H200, False, (8, 9), (8, 4)) is None  # no multiple of 128 bytes
    assert gradient_maps(GIVEN, H200, False, (24, 16), (24, 16), swizzled=True) is None


def test_the_maps_of_what_is_read_and_of_what_is_written():
    given = replace(GIVEN, direction="forward", dtype="float16")
    x, y = forward_maps(given, H200, False, (64, 9, 2, 3), (32, 7, 1, 1))
    assert (x.operand, x.sizes, x.strides) == (0, (48, 20, 2, 9), (96, 17280, 1920))
    assert (x.box, x.swizzle) == ((64, 9, 2, 3), 128)
    assert (y.operand, y.sizes, y.strides) == (3, (48, 10, 2, 9), (96, 8640, 960))
    assert (y.box, y.swizzle) == ((32, 7, 1, 1), 64)
    assert forward_maps(given, H200, False, (64, 9, 2, 3)) == (x,)  # y has no boxes
    x, y = forward_maps(turned(given), H200, True, (64, 9, 2, 3), (32, 7, 1, 1))
    assert (x.sizes, x.strides) == ((48, 9, 2, 20), (1920, 17280, 96))
    assert (y.sizes, y.strides) == ((48, 9, 2, 10), (960, 8640, 96))
    one = replace(given, batch=1, x_strides=(8, 1, 20 * 48, 48))  # of one image, any stride will do
    assert forward_maps(one, H200, False, (64, 9, 1, 3), (32, 7, 1, 1)) is not None
    for refused in (replace(given, x_strides=(0, 1, 20 * 48, 48)), replace(given, aligned=8)):
        assert forward_maps(refused, H200, False, (64, 9, 2, 3), (32, 7, 1, 1)) is None
    assert forward_maps(given, H200, False, (96, 9, 2, 3), (32, 7, 1, 1)) is None  # no pixels of 192 bytes
    assert forward_maps(given, PRESETS["sm_89"], False, (64, 9, 2, 3), (32, 7, 1, 1)) is None


def test_the_emulator_is_told_the_fields():
    maps = gradient_maps(GIVEN, H200, False, (32, 9), (32, 4), swizzled=True)
    words = list(emulated(maps, [4096, 8192]))
    assert len(words) * 8 == BYTES * len(maps)
    assert words[:14] == [4096, 48, 20, 9, 2, 192, 3840, 34560, 32, 9, 1, 1, 4, 128]
    assert words[16:20] == [8192, 48, 10, 9]


def test_a_refusal_of_the_driver_names_the_map(monkeypatch):
    monkeypatch.setattr("dwconv.tensor_maps._encode_tiled", lambda: lambda *_: 1)
    with pytest.raises(DepthwiseError, match="refuses a map of a tensor"):
        encoder(gradient_maps(GIVEN, H200, False, (32, 9), (32, 4)), lambda: None)(4096, 8192)


def test_a_thread_without_a_context_gets_one(monkeypatch):
    calls, answers = [], iter([201, 0, 0])
    monkeypatch.setattr("dwconv.tensor_maps._encode_tiled", lambda: lambda *_: next(answers))
    found = encoder(gradient_maps(GIVEN, H200, False, (32, 9), (32, 4)), lambda: calls.append("current"))(4096, 8192)
    assert calls == ["current"]
    assert len(found) * 8 == 2 * BYTES


def test_what_leaves_the_cache_first():
    small = replace(GIVEN, batch=128, channels=384, size=(14, 14))
    assert streams(small, H200)
    assert not streams(small, H200, times=3)
    assert streams(replace(small, channels=40), H200)  # chunks of channels share lines, but all fits
    assert not streams(replace(small, channels=40), H200, shared=False)
    assert not streams(replace(small, channels=40, size=(99, 99)), H200)
    assert streams(replace(small, channels=40, layout="channels_first"), H200)
    assert not streams(replace(small, size=(56, 56)), H200)


def test_the_driver_is_told_of_each_tensor_and_where_to_put_its_map(monkeypatch):
    told = []

    def encode(into, kind, rank, address, sizes, strides, box, steps, *rest):
        told.append((kind, rank.value, address.value, list(sizes), list(strides), list(box), list(steps), rest))
        assert into.value % 64 == 0
        ctypes.memset(into.value, len(told), BYTES)
        return 0

    monkeypatch.setattr("dwconv.tensor_maps._encode_tiled", lambda: encode)
    maps = gradient_maps(GIVEN, H200, False, (32, 9), (32, 4), swizzled=True)
    at = encoder(maps, lambda: None)
    found = [bytes(at(4096, 8192)), bytes(at(12288, 16384))]
    assert [each[2] for each in told] == [4096, 8192, 12288, 16384]
    assert told[0][3:7] == (list(maps[0].sizes), list(maps[0].strides), list(maps[0].box), [1] * 4)
    assert told[0][7] == (0, 3, 2, 0)  # rows of 128 bytes are swizzled, L2 fetches 128
    assert found == [b"\1" * BYTES + b"\2" * BYTES, b"\3" * BYTES + b"\4" * BYTES]
