"""What the launcher says when the driver refuses; the launches themselves are tested on a GPU."""

from __future__ import annotations

import pytest
import torch

from dwconv import DepthwiseError, launch
from dwconv.device import H200


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (900, "call `dwconv.prepare"),
        (209, "update the driver, or install a nvidia-cuda-nvrtc of the driver's CUDA version"),
        (222, "the driver is older than the compiler"),
    ],
)
def test_refusals_name_the_remedy(status: int, remedy: str) -> None:
    with pytest.raises(DepthwiseError, match=f"loading direct_nchw .*{remedy}"):
        launch._checked((status,), "loading direct_nchw")


def test_values_come_through() -> None:
    assert launch._checked((0, 7), "asking") == 7
    assert launch._checked((0,), "asking") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_no_driver_is_a_sentence() -> None:
    with pytest.raises(DepthwiseError, match="there is no NVIDIA driver on this machine"):
        launch.driver_version()


class _Properties:
    name, major, minor = "NVIDIA Future", 10, 3
    multi_processor_count, L2_cache_size = 74, 64 << 20


@pytest.mark.parametrize(("version", "nearest"), [((10, 3), "sm_100"), ((8, 7), "sm_86"), ((12, 1), "sm_120")])
def test_unknown_gpus_take_the_rates_of_the_nearest_older_preset(monkeypatch, version, nearest: str) -> None:
    monkeypatch.setattr(_Properties, "major", version[0])
    monkeypatch.setattr(_Properties, "minor", version[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: _Properties)
    spec = launch.device_spec.__wrapped__(0)
    assert spec.arch == f"sm_{version[0]}{version[1]}"
    assert spec.dram_gbs == launch.PRESETS[nearest].dram_gbs
    assert spec.multiprocessors == 74


def test_gpus_older_than_turing_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(_Properties, "major", 7)
    monkeypatch.setattr(_Properties, "minor", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: _Properties)
    with pytest.raises(DepthwiseError, match="sm_70; dwconv's kernels need sm_75 or newer"):
        launch.device_spec.__wrapped__(0)
    assert H200.arch == "sm_90"
