"""PyTorch's own samples of conv1d, conv2d and conv3d, batched and unbatched, under the emulator."""

from __future__ import annotations

import pytest
import torch

import dwconv
from convolutions import Call
from dwconv.tensors import in_layout
from torch_samples import depthwise_samples, op_info

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")


@pytest.mark.parametrize(("dtype", "layout"), [("float32", "channels_first"), ("float16", "channels_last")])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pytorchs_samples(dims, dtype, layout):
    count = 0
    for x, weight, bias, arguments in depthwise_samples(dims, getattr(torch, dtype)):
        batched = x.dim() == dims + 2
        images = in_layout(x if batched else x.unsqueeze(0), layout)
        call = Call(images, weight, bias, arguments)
        with dwconv.emulated():
            y = (call if batched else Call(images[0], weight, bias, arguments))()
        expected = op_info(dims).op(images if batched else images[0], weight, bias, groups=images.shape[1], **arguments)
        assert y.shape == expected.shape
        assert call.wrong(y if batched else y.unsqueeze(0)) is None, (call.problem, call.wrong(y))
        count += 1
    assert count >= 10
