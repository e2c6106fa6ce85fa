"""Finds the depthwise layers of a model and the shapes that they meet, at no cost: the model runs on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import DepthwiseError
from ..problem import DTYPE_BYTES, DepthwiseProblem
from .model_file import ModelFile, construct, make_inputs, said

Configuration = tuple[tuple[int, ...], tuple[int, ...], str | tuple[int, ...], tuple[int, ...], int, bool]


@dataclass(frozen=True)
class Meeting:
    """What a layer was called with."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


@dataclass
class ConvLayer:
    """A convolution layer of the model, under all its names, with every distinct input that it met, in order."""

    names: list[str]
    module: _ConvNd
    met: list[Meeting] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def configuration(self) -> Configuration:
        """What an exported layer looks its kernel up by."""
        layer = self.module
        return (
            tuple(layer.kernel_size),
            tuple(layer.stride),
            layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
            tuple(layer.dilation),
            layer.out_channels // layer.groups,
            layer.bias is not None,
        )


def normalised(problem: DepthwiseProblem) -> Configuration:
    """The configuration of the layer that poses a problem, with padding in numbers instead of 'same' or 'valid'."""
    padding = tuple(before for before, _ in problem.padding)
    return problem.filter, problem.stride, padding, problem.dilation, problem.multiplier, problem.bias


@dataclass(frozen=True)
class Found:
    """A depthwise layer that can be replaced, with a problem for each distinct input."""

    layer: ConvLayer
    problems: tuple[DepthwiseProblem, ...]


@dataclass(frozen=True)
class LeftAlone:
    """A convolution layer that stays as it is, and why."""

    names: tuple[str, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """All convolution layers of a model. `model` is the one that was searched, drawn from seed 42."""

    model: torch.nn.Module
    found: tuple[Found, ...]
    left_alone: tuple[LeftAlone, ...]
    real_run: str  # why fake tensors didn't serve, or ""


def find_layers(file: ModelFile, announce: Callable[[str], None] = lambda text: None) -> Findings:
    """Runs the model once and sorts its convolution layers.

    Raises:
        DepthwiseError: the constructor or forward raises, or no layer is depthwise.
    """
    model = construct(file, file.namespace["Model"])
    layers: dict[_ConvNd, ConvLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _ConvNd):
            layers.setdefault(module, ConvLayer([], module)).names.append(name)
    if not layers:
        raise DepthwiseError(
            f"Model in {file.path} holds no torch.nn convolution layer, so there is nothing to replace (calls of "
            "torch.nn.functional are not layers: use torch.nn.Conv2d)"
        )
    real_run = _watch(file, model, layers, announce)
    found: list[Found] = []
    left_alone: list[LeftAlone] = []
    for layer in layers.values():
        reason = _reason_to_leave(layer)
        problems: list[DepthwiseProblem] = []
        for met in () if reason else layer.met:
            problem = _problem(layer, met)
            if isinstance(problem, str):
                reason = problem
            elif problem not in problems:
                problems.append(problem)
        if problems:
            found.append(Found(layer, tuple(problems)))
        else:
            left_alone.append(LeftAlone(tuple(layer.names), type(layer.module).__name__, reason or "is never called"))
    if not found:
        reasons = "; ".join(dict.fromkeys(f"{left.names[0]} ({left.kind}) {left.reason}" for left in left_alone[:4]))
        more = f"; and {len(left_alone) - 4} more" if len(left_alone) > 4 else ""
        raise DepthwiseError(f"Model in {file.path} has no depthwise layer that can be replaced: {reasons}{more}")
    return Findings(model, tuple(found), tuple(left_alone), real_run)


def _watch(
    file: ModelFile, model: torch.nn.Module, layers: dict[_ConvNd, ConvLayer], announce: Callable[[str], None]
) -> str:
    """Fills in what the layers meet. Returns why a real run was needed, or ""."""

    def hook(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0] if arguments else None
        if isinstance(module, _ConvNd) and isinstance(x, torch.Tensor):
            met = Meeting(tuple(map(int, x.shape)), tuple(map(int, x.stride())), str(x.dtype).removeprefix("torch."))
            if met not in layers[module].met:
                layers[module].met.append(met)

    handles = [module.register_forward_pre_hook(hook) for module in layers]
    try:
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                model(*make_inputs(file))
            return ""
        except Exception as error:
            why = said(error)
        for layer in layers.values():
            layer.met.clear()
        announce("running the model on the CPU once, because it can't run on tensors without memory")
        inputs = make_inputs(file)
        try:
            with torch.no_grad():
                model(*inputs)
        except Exception as error:
            raise DepthwiseError(f"Model.forward raises with get_inputs(): {said(error)}") from error
        return why
    finally:
        for handle in handles:
            handle.remove()


_PLAIN = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def _reason_to_leave(layer: ConvLayer) -> str | None:
    """Why a layer can't be replaced whatever it meets; None if it might be."""
    module = layer.module
    if isinstance(module, _ConvTransposeNd):
        return "is transposed"
    if module.groups == 1:
        return "is not depthwise: groups=1"
    if module.groups != module.in_channels:
        return f"is not depthwise: groups={module.groups} with {module.in_channels} input channels"
    if type(module) not in _PLAIN:
        return f"is depthwise, but a subclass of torch.nn's with its own behaviour ({type(module).__qualname__})"
    if type(module) is not torch.nn.Conv2d:
        dims = 1 if isinstance(module, torch.nn.Conv1d) else 3
        return f"is depthwise in {dims}-D, which this version leaves to PyTorch"
    if module.padding_mode != "zeros":
        return f"is depthwise, but pads with padding_mode={module.padding_mode!r}; kernels are made for zeros"
    reaches = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "same" and any(reach % 2 for reach in reaches):
        return "is depthwise, but padding='same' is uneven for its filter, which this version leaves to PyTorch"
    return None


def _problem(layer: ConvLayer, met: Meeting) -> DepthwiseProblem | str:
    """The problem that one input poses, or why it is left to PyTorch."""
    module = layer.module
    if met.dtype != "float32":
        known = met.dtype in DTYPE_BYTES
        return f"is depthwise, but meets {met.dtype}" + ("; this version makes kernels for float32" if known else "")
    if len(met.shape) != 4:
        return f"is depthwise, but meets unbatched input of shape {met.shape}"
    if met.strides != _contiguous(met.shape) and min(met.shape):
        return "is depthwise, but meets input that is not contiguous and channels-first in memory"
    padding = _even_padding(module)
    return DepthwiseProblem(
        batch=met.shape[0],
        channels=met.shape[1],
        size=met.shape[2:],
        filter=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=tuple((pad, pad) for pad in padding),
        dilation=tuple(module.dilation),
        multiplier=module.out_channels // module.groups,
        bias=module.bias is not None,
    )


def _even_padding(module: _ConvNd) -> tuple[int, ...]:
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    assert not isinstance(module.padding, str)
    return tuple(module.padding)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
