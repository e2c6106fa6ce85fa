"""Times the original, torch.compile and the exported model side by side, and each replaced layer beside a copy."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from ..bench.timing import copy_contender, measure
from .model_file import ModelFile, make_inputs, said
from .results import LayerResult, ModelResult
from .verify import Twins, on_gpu


def time_models(file: ModelFile, twins: Twins, result: ModelResult) -> ModelResult:
    """Adds the times of whole models, called as their users call them: outside of no_grad."""
    inputs = on_gpu(make_inputs(file))
    contenders = {"original": lambda: twins.original(*inputs), "ModelNew": lambda: twins.new(*inputs)}
    no_compile = ""
    compiled = torch.compile(twins.original)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice is not about these files
            compiled(*inputs)
        contenders["torch.compile"] = lambda: compiled(*inputs)
    except Exception as error:  # whatever the compiler meets; the figure is left out, and the reason is shown
        no_compile = said(error)
    return replace(result, times=measure(contenders), no_compile=no_compile)


def time_layer(result: LayerResult, twins: Twins) -> LayerResult:
    """Adds the times of one replaced layer, of the original layer, and of a copy of as many bytes."""
    problem = result.problem
    new, original = twins.layer(result.layers[0])
    x = torch.rand(problem.x_shape, device="cuda")
    times = measure(
        {
            "original": lambda: original(x),
            "dwconv": lambda: new(x),
            "copy": copy_contender(problem.least_bytes, x.device),
        }
    )
    return replace(result, times=times)
