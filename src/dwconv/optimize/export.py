"""Puts an exported file together: header, the original's text, the kernels, the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DepthwiseError
from .cuda_source import ExtensionSource, extension_source
from .layers import LAYERS
from .model_file import ModelFile
from .model_source import TwinSource, identifiers, twin_source
from .specialise import Specialisation

SWITCH = "use_depthwise_kernels"
OWN_NAMES = ("DEPTHWISE_CUDA", "DEPTHWISE_CPP", "DEPTHWISE_CONFIGURATIONS", "DepthwiseConv2d", SWITCH)


@dataclass(frozen=True)
class Export:
    """The parts of an exported file; only its header changes once it is measured.

    Attributes:
        extension: its CUDA and C++ sources.
        twin: the original's text, with `ModelNew`.
        layers: the Python between them.
    """

    extension: ExtensionSource
    twin: TwinSource
    layers: str

    def text(self, header: str) -> str:
        """The whole file under a header of comment lines."""
        before = self.twin.before.strip("\n")
        parts = [header.strip("\n") + "\n" + before, self.layers.strip("\n"), self.twin.model.strip("\n")]
        return "\n\n\n".join(parts) + "\n"


def export(file: ModelFile, made: Sequence[Specialisation]) -> Export:
    """The exported form of a model file with these kernels.

    Raises:
        DepthwiseError: the file can't be rewritten.
    """
    if "torch" in file.namespace and getattr(file.namespace["torch"], "__name__", "") != "torch":
        raise DepthwiseError(f"{file.path} uses the name torch for something else than PyTorch: rename it there")
    names = _free_names(identifiers(file.source) | set(file.namespace))
    extension = extension_source(made)
    layers = LAYERS
    for part, value in (
        ("EXTENSION", extension.name),
        ("CONFIGURATIONS", extension.configurations),
        ("CPP", extension.cpp),
        ("CUDA", extension.cuda),
    ):
        layers = layers.replace(f"@{part}@", value)
    if any(own != free for own, free in names.items()):
        layers = re.sub(r"\b(" + "|".join(names) + r")\b", lambda match: names[match.group()], layers)
    return Export(extension, twin_source(file, names[SWITCH]), layers)


def _free_names(taken: set[str]) -> dict[str, str]:
    """Our module-level names, each changed where the original uses it."""
    free = {}
    for name in OWN_NAMES:
        choices = (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3)))
        free[name] = next(choice for choice in choices if choice not in taken)
    return free
