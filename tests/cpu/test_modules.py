"""Conv1d, Conv2d, Conv3d and convert: torch.nn's layers, computed by dwconv."""

from __future__ import annotations

import pytest
import torch

import dwconv
from dwconv import DepthwiseError

LAYERS = {1: (dwconv.Conv1d, torch.nn.Conv1d), 2: (dwconv.Conv2d, torch.nn.Conv2d), 3: (dwconv.Conv3d, torch.nn.Conv3d)}
ARGUMENTS = [
    {},
    {"padding": "same", "bias": False},
    {"stride": 2, "padding": 1},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "dilation": 2},
    {"padding": "same", "padding_mode": "replicate"},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("dims", LAYERS)
def test_module_is_torchs(dims, arguments):
    ours_type, theirs_type = LAYERS[dims]
    torch.manual_seed(7)
    theirs = theirs_type(4, 8, 3, groups=4, **arguments)
    torch.manual_seed(7)
    ours = ours_type(4, 8, 3, groups=4, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), "the same random numbers in the same order"
    x = torch.randn(2, 4, *(9, 10, 6)[:dims])
    with dwconv.emulated(variant="one_per_thread"):
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    assert isinstance(ours, theirs_type)
    assert repr(ours) == repr(theirs)


def test_uneven_arguments_of_each_dimension():
    arguments = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)}
    theirs = torch.nn.Conv2d(4, 8, groups=4, **arguments)
    ours = dwconv.Conv2d(4, 8, groups=4, **arguments)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, 10)
    with dwconv.emulated(variant="one_per_thread"):
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dims", LAYERS)
def test_module_refuses_other_groups(dims):
    with pytest.raises(DepthwiseError, match="groups=2 is not depthwise: the layer has 4 input channels"):
        LAYERS[dims][0](4, 8, 3, groups=2)


def test_convert_switches_depthwise_layers_only():
    torch.manual_seed(0)

    class Other(torch.nn.Conv2d):
        pass

    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 1),
        torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.nn.ReLU()),
        torch.nn.Conv1d(8, 8, 3, groups=8),
        torch.nn.Conv3d(8, 16, 3, groups=8),
        torch.nn.Conv2d(8, 8, 3, groups=4),
        torch.nn.ConvTranspose2d(8, 8, 3, groups=8),
        Other(8, 8, 3, groups=8),
    )
    x, sequence, volume = torch.randn(1, 4, 9, 9), torch.randn(2, 8, 20), torch.randn(1, 8, 4, 5, 6)
    state = model.state_dict()

    def results():
        return model[1](model[0](x)), model[2](sequence), model[3](volume)

    expected = results()
    report = dwconv.convert(model)
    assert report.replaced == ("1.0", "2", "3")
    assert [name for name, _ in report.left_alone] == ["0", "4", "5", "6"]
    assert [type(model[i]) for i in (2, 3)] == [dwconv.Conv1d, dwconv.Conv3d]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with dwconv.emulated(variant="one_per_thread"):
        torch.testing.assert_close(results(), expected)
    assert dwconv.convert(model).replaced == (), "a second time there is nothing left to switch"
