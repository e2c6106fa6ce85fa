"""What `dwconv optimize` found out, as frozen records: for the header of the file, the terminal and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..bench.timing import Timing
from ..compile import Resources
from ..problem import DepthwiseProblem
from .find import LeftAlone


@dataclass(frozen=True)
class LayerResult:
    """One problem of the model: which layers pose it, what kernel computes it, how well.

    Attributes:
        layers: names in the model.
        kernel: the function in the exported file.
        resources: of the kernel, for the architecture it was planned for.
        predicted_seconds, least_seconds: the plan's prediction, and what memory and arithmetic allow at best.
        fma_seconds: what arithmetic alone allows.
        checked: what part was compared with float64, in words.
        error, error_share: the largest error, and the largest share of its rounding bound (1 is the limit).
        times: measured: "original", "dwconv", "copy".
    """

    layers: tuple[str, ...]
    problem: DepthwiseProblem
    kernel: str
    variant: str
    technique: str
    tile: str
    resources: Resources
    predicted_seconds: float
    least_seconds: float
    fma_seconds: float
    checked: str = ""
    error: float = 0.0
    error_share: float = 0.0
    times: dict[str, Timing] = field(default_factory=dict)

    @property
    def predicted_attainment(self) -> float:
        return self.least_seconds / self.predicted_seconds


@dataclass(frozen=True)
class ModelResult:
    """The whole model beside the original, on a GPU.

    Attributes:
        seeds: inputs that were compared.
        difference: the largest between the two results.
        close: whether torch.allclose holds at 1e-5 for both tolerances, too (1e-4 is required).
        without_tf32: whether results had to be compared without TF32 in other layers.
        times: "original", "torch.compile", "ModelNew".
        no_compile: why torch.compile has no time, or "".
    """

    seeds: int
    difference: float
    close: bool
    without_tf32: bool = False
    times: dict[str, Timing] = field(default_factory=dict)
    no_compile: str = ""

    @property
    def speed_up(self) -> float | None:
        if not self.times:
            return None
        return self.times["original"].median / self.times["ModelNew"].median


@dataclass(frozen=True)
class Outcome:
    """Everything about one run.

    Attributes:
        path, out: what was read and written.
        device, arch: what the kernels were planned for.
        model: None where there was no GPU.
        notes: what a reader should know besides.
    """

    path: str
    out: str
    device: str
    arch: str
    layers: tuple[LayerResult, ...]
    left_alone: tuple[LeftAlone, ...]
    model: ModelResult | None
    notes: tuple[str, ...]

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the replaced layers."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.layers))

    @property
    def predicted_seconds(self) -> float:
        return sum(layer.predicted_seconds * len(layer.layers) for layer in self.layers)

    @property
    def least_seconds(self) -> float:
        return sum(layer.least_seconds * len(layer.layers) for layer in self.layers)
