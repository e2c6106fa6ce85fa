"""Model files in KernelBench's format, for tests of `dwconv optimize`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dwconv.device import preset
from dwconv.optimize.export import Export, export
from dwconv.optimize.find import find_layers
from dwconv.optimize.model_file import ModelFile, load, run_source
from dwconv.optimize.specialise import specialise

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE_FILES = sorted(EXAMPLES.rglob("*.py"))

# A file of many layers: shared, called with two sizes, nested, with and without bias, and some that must stay.
ZOO = '''
"""A zoo of convolutions. The forward pass runs them one after another."""
from __future__ import annotations

import torch
from torch import nn


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Empty(nn.Module):
    pass


# The model:
class Model(nn.Module):
    """Forward pass: each layer in its turn, except those that are never called."""

    def __init__(self, channels):
        super(Model, self).__init__()
        self.plain = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.wide = nn.Conv2d(channels, 2 * channels, (3, 5), padding=(1, 2), groups=channels, bias=False)
        self.nested = nn.Sequential(nn.Conv2d(2 * channels, 2 * channels, 3, 2, 1, groups=2 * channels), nn.ReLU())
        many = 2 * channels
        self.same = nn.Conv2d(many, many, 5, padding="same", dilation=2, groups=many, bias=False)
        self.again = self.same
        self.pointwise = nn.Conv2d(2 * channels, channels, 1)
        self.reflect = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, padding_mode="reflect")
        self.own = OwnConv(channels, channels, 3, padding=1, groups=channels)
        self.row = nn.Conv1d(channels, channels, 3, padding=1, groups=channels)
        self.uneven = nn.Conv2d(channels, channels, 2, padding="same", groups=channels)
        self.unused = nn.Conv2d(channels, channels, 3, groups=channels)
        self.empty = Empty()

    def forward(self, x):
        x = self.plain(x) + self.plain(x[:, :, :16, :16].contiguous()).mean()
        x = self.again(self.same(self.nested(self.wide(x))))
        x = self.uneven(self.own(self.reflect(self.pointwise(x))))
        return self.row(x.flatten(2)).view(x.shape)


def get_inputs():
    return [torch.rand(2, 6, 20, 24)]


def get_init_inputs():
    return [6]
'''


def write(folder: Path, text: str, name: str = "model.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def exported(path: Path, arch: str = "sm_90") -> tuple[ModelFile, Export]:
    """A loaded file and its exported form."""
    file = load(path)
    made, _ = specialise(find_layers(file).found, preset(arch))
    return file, export(file, made)


def load_both(path: Path, text: str) -> SimpleNamespace:
    """Original and exported text run in one namespace, as the judges do it, and what that namespace then holds."""
    namespace: dict[str, Any] = run_source(path.read_text(encoding="utf-8"), "original", {})
    before = dict(namespace)
    run_source(text, "exported", namespace)
    return SimpleNamespace(before=before, after=namespace)
