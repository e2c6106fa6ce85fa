"""`dwconv optimize` without a GPU: what it finds, what it writes, and what it says to bad input."""

from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dwconv import emulator, optimize
from dwconv.errors import DepthwiseError
from dwconv.optimize import verify
from dwconv.optimize.find import find_layers
from dwconv.optimize.model_file import load
from model_files import EXAMPLES, ZOO, exported, write

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # a layer of the zoo
]

EXAMPLE = EXAMPLES / "kernelbench" / "82_square_square.py"
GOOD = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, groups=channels)

    def forward(self, x):
        return self.conv(x)


def get_inputs():
    return [torch.rand(1, 4, 12, 12)]


def get_init_inputs():
    return [4]
"""


def run(path, *arguments, **options):
    """Runs the command; returns its exit code and what it printed."""
    text = io.StringIO()
    code = optimize.run(path, *arguments, console=Console(file=text, width=100, highlight=False), **options)
    return SimpleNamespace(code=code, text=text.getvalue())


# ---- what it writes ----


def test_the_main_job(tmp_path):
    out, figures = tmp_path / "out.py", tmp_path / "out.json"
    result = run(EXAMPLE, out, json_path=figures)
    assert result.code == 0
    text = out.read_text(encoding="utf-8")
    head = text.partition('"""')[0]
    assert "depthwise 3×3 convolution" in head
    assert "Predicted for NVIDIA H200, not measured" in head.replace("\n# ", " ")
    for part in ("class ModelNew(nn.Module)", "__global__", "load_inline", "def get_init_inputs():"):
        assert part in text
    content = json.loads(figures.read_text(encoding="utf-8"))
    assert content["arch"] == "sm_90"
    assert content["model"] is None
    (layer,) = content["layers"]
    assert layer["layers"] == ["conv2d"]
    assert layer["problem"]["size"] == [512, 512]
    assert 0 < layer["error_share"] <= 1
    assert layer["resources"]["registers"] > 0
    assert layer["resources"]["spill_bytes"] == 0
    assert layer["predicted_seconds"] > 0
    assert "predicted" in result.text
    assert "emulated" in result.text


def test_out_stands_in_the_current_directory_by_default(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    path = write(tmp_path / "models", GOOD, "net.py")
    monkeypatch.chdir(tmp_path)
    assert run(path).code == 0
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["net_dwconv.py"]


@pytest.mark.parametrize("arch", ["sm_75", "sm_120"])
def test_other_architectures(tmp_path, arch):
    path = write(tmp_path, GOOD)
    assert run(path, tmp_path / "out.py", arch).code == 0
    assert f"for {arch}." in (tmp_path / "out.py").read_text(encoding="utf-8")


# ---- what it finds ----


def test_layers_of_the_zoo(tmp_path):
    findings = find_layers(load(write(tmp_path, ZOO)))
    assert findings.real_run == ""
    found = {name: layer for layer in findings.found for name in layer.layer.names}
    assert set(found) == {"plain", "wide", "nested.0", "same", "again"}
    assert [problem.size for problem in found["plain"].problems] == [(20, 24), (16, 16)]
    assert found["same"] is found["again"]
    assert found["wide"].problems[0].multiplier == 2
    assert found["same"].problems[0].padding == ((4, 4), (4, 4))
    reasons = {left.names[0]: left.reason for left in findings.left_alone}
    assert set(reasons) == {"pointwise", "reflect", "own", "row", "uneven", "unused"}
    for name, words in {
        "pointwise": "groups=1",
        "reflect": "padding_mode='reflect'",
        "own": "subclass",
        "row": "1-D",
        "uneven": "uneven",
        "unused": "never called",
    }.items():
        assert words in reasons[name]


def test_large_inputs_cost_nothing(tmp_path):
    text = GOOD.replace("1, 4, 12, 12", "1024, 4, 40960, 40960")  # 27 TB
    problem = find_layers(load(write(tmp_path, text))).found[0].problems[0]
    assert problem.x_shape == (1024, 4, 40960, 40960)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("self.conv(x)", "self.conv(x.half())"), "float16"),
        (("self.conv(x)", "self.conv(x.to(memory_format=torch.channels_last))"), "channels-first"),
        (("self.conv(x)", "self.conv(x[0])"), "unbatched"),
        (("groups=channels)", "groups=2)"), "groups=2 with 4 input channels"),
        (("nn.Conv2d(channels", "nn.ConvTranspose2d(channels"), "transposed"),
    ],
)
def test_reasons_to_leave_a_layer_alone(tmp_path, change, reason):
    text = GOOD.replace(*change)
    if "half" in change[1]:
        text = text.replace("groups=channels)", "groups=channels).half()")
    with pytest.raises(DepthwiseError, match=f"no depthwise layer that can be replaced: conv .*{reason}"):
        find_layers(load(write(tmp_path, text)))


def test_a_model_that_reads_values_runs_for_real(tmp_path):
    text = GOOD.replace("return self.conv(x)", "return self.conv(x if x.sum() > 0 else -x)")
    result = run(write(tmp_path, text), tmp_path / "out.py")
    assert result.code == 0
    assert "real run on the CPU" in result.text


def test_several_inputs_and_keyword_arguments(tmp_path):
    text = GOOD.replace("forward(self, x)", "forward(self, x, scale, flags)").replace(
        "return [torch.rand(1, 4, 12, 12)]", "return [torch.rand(1, 4, 12, 12), 3.0, [True]]"
    )
    text = text.replace("return [4]", "return {'channels': 4}")
    assert run(write(tmp_path, text), tmp_path / "out.py").code == 0


# ---- bad input ----

BAD = {
    "syntax error": (GOOD.replace("def forward(self, x):", "def forward(self x):"), r"line \d+ is not valid Python"),
    "raises when run": ("import nothing_of_this_name\n" + GOOD, "can't be run: ModuleNotFoundError"),
    "exits when run": ("raise SystemExit(3)\n" + GOOD, "can't be run: SystemExit"),
    "no Model": (GOOD.replace("class Model", "class Net"), "defines no Model"),
    "no module": (GOOD.replace("Model(nn.Module)", "Model"), "is no torch.nn.Module"),
    "Model is imported": (
        "from torch.nn import Identity as Model\n" + GOOD.replace("class Model", "class Net"),
        "class",
    ),
    "no get_inputs": (GOOD.replace("get_inputs", "inputs"), r"defines no get_inputs\(\)"),
    "no get_init_inputs": (GOOD.replace("get_init_inputs", "init"), r"defines no get_init_inputs\(\)"),
    "get_inputs raises": (
        GOOD.replace("return [torch.rand", "return [torch.rend"),
        "get_inputs.* raises AttributeError",
    ),
    "get_inputs returns a tensor": (GOOD.replace("[torch.rand(1, 4, 12, 12)]", "torch.rand(4)"), "returns Tensor"),
    "constructor raises": (GOOD.replace("return [4]", "return []"), "Model's constructor raises .*TypeError"),
    "forward raises": (GOOD.replace("(1, 4, 12, 12)", "(1, 5, 12, 12)"), "Model.forward raises .*RuntimeError"),
    "no convolution": (
        GOOD.replace("nn.Conv2d(channels, channels, 3, groups=channels)", "nn.ReLU()"),
        "no torch.nn conv",
    ),
    "no depthwise layer": (GOOD.replace("groups=channels", "groups=1"), "no depthwise layer"),
    "ModelNew taken": (GOOD + "\nclass ModelNew: ...\n", "already uses the name ModelNew"),
    "empty": ("", "defines no Model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_a_sentence_and_nothing_is_written(tmp_path, name):
    text, words = BAD[name]
    path = write(tmp_path, text)
    with pytest.raises(DepthwiseError, match=words) as raised:
        run(path, tmp_path / "out.py", json_path=tmp_path / "out.json")
    assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model.py"]


def test_bad_places(tmp_path):
    path = write(tmp_path, GOOD)
    with pytest.raises(DepthwiseError, match="doesn't exist"):
        run(tmp_path / "none.py")
    with pytest.raises(DepthwiseError, match="is a directory"):
        run(tmp_path)
    with pytest.raises(DepthwiseError, match="is a directory"):
        run(path, tmp_path)
    with pytest.raises(DepthwiseError, match="there is no directory"):
        run(path, tmp_path / "none" / "out.py")
    with pytest.raises(DepthwiseError, match="is the model file itself"):
        run(path, path)
    with pytest.raises(DepthwiseError, match="unknown"):
        run(path, tmp_path / "out.py", "sm_1")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DepthwiseError, match="UTF-8"):
        run(path, tmp_path / "out.py")


def test_exit_code_of_the_command_line(tmp_path, capsys):
    from dwconv.cli import main

    assert main(["optimize", str(write(tmp_path, BAD["no Model"][0])), "-o", str(tmp_path / "out.py")]) == 2
    assert "defines no Model" in " ".join(capsys.readouterr().err.split())


# ---- verification ----


def test_a_wrong_kernel_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "run", lambda plan, x, weight, bias, y, **options: y.zero_())
    out = write(tmp_path, "the old one", "out.py")
    result = run(write(tmp_path, GOOD), out)
    assert result.code == 1
    assert re.search(r"verification failed: depthwise_3x3_bias: \d+ of 400 outputs are wrong", result.text)
    assert out.read_text() == "the old one"


def test_a_good_file_replaces_the_old_one(tmp_path):
    out = write(tmp_path, "the old one", "out.py")
    assert run(write(tmp_path, GOOD), out).code == 0
    assert "ModelNew" in out.read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.py", "out.py"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("        self.conv = nn", "        torch.rand(1)\n        self.conv = nn"), "conv.weight differs"),
        (("self.conv", "self.convolution"), "other keys"),
    ],
)
def test_twins_must_have_the_same_weights(tmp_path, change, words):
    file, export = exported(write(tmp_path, GOOD))
    with pytest.raises(verify.VerificationError, match=words):
        verify.load_twins(file, export.text("").replace(*change), "out.py")
