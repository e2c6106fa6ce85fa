"""Proves that an exported file computes the same as the original: on a GPU as a whole, elsewhere by the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import emulator, reference
from ..choose import candidates
from ..compile import relaxed
from ..plan import Plan
from ..problem import DepthwiseProblem
from .find import Found
from .model_file import ModelFile, construct, make_inputs, run_source, seed_everything
from .results import LayerResult, ModelResult
from .specialise import Specialisation

SEEDS = 5
TOLERANCE, TIGHT_TOLERANCE = 1e-4, 1e-5
FEW_IMAGES, FEW_CHANNELS = 2, 4
_CHUNK = 1 << 25  # outputs that are compared with float64 at a time

Announce = Callable[[str], None]


class VerificationError(Exception):
    """The exported file doesn't compute what the original does. The message says where."""


@dataclass(frozen=True)
class Twins:
    """Original and exported model, made as the judges make them: one namespace, the same seed before each."""

    original: torch.nn.Module
    new: torch.nn.Module

    def layer(self, name: str) -> tuple[torch.nn.Conv2d, torch.nn.Conv2d]:
        """A replaced layer, new and original."""
        new, original = self.new.get_submodule(name), self.original.get_submodule(name)
        assert isinstance(new, torch.nn.Conv2d)
        assert isinstance(original, torch.nn.Conv2d)
        return new, original


def load_twins(file: ModelFile, text: str, name: str) -> Twins:
    """Runs the exported text in the original's namespace, as judges do, and makes both models.

    Raises:
        VerificationError: a parameter or buffer differs, in name or in any bit, or inputs would differ.
    """
    namespace = run_source(file.source, str(file.path), {})
    shared = replace(file, namespace=namespace)
    original = construct(shared, namespace["Model"])
    run_source(text, name, namespace)
    new = construct(shared, namespace["ModelNew"])
    ours, theirs = new.state_dict(), original.state_dict()
    if list(ours) != list(theirs):
        raise VerificationError(f"state_dict has other keys: {sorted(set(ours) ^ set(theirs)) or 'in another order'}")
    for key, value in theirs.items():
        if isinstance(value, Tensor) and not _same_bits(value, ours[key]):
            raise VerificationError(f"{key} differs from the original's after the same seed")
    return Twins(original, new)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# ---- without a GPU ----


def emulate(s: Specialisation, result: LayerResult, found: Found) -> LayerResult:
    """Runs one problem's kernel under the emulator: full images, a few of them and a few channels, the layer's weights.

    Raises:
        VerificationError: an output is outside of its rounding bound.
    """
    whole = result.problem
    problem = whole.with_batch(min(whole.batch, FEW_IMAGES), min(whole.channels, FEW_CHANNELS))
    plan = same_kernel(s.plan, problem)
    module = found.layer.module
    weight = module.weight.detach()[: problem.out_channels].contiguous()
    bias = None if module.bias is None else module.bias.detach()[: problem.out_channels].contiguous()
    x = torch.rand(problem.x_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.full(problem.y_shape, float("nan"))
    try:
        emulator.run(plan, x, weight, bias, y)
    except emulator.EmulationError as broken:
        raise VerificationError(f"{s.name} breaks a rule of CUDA under the emulator: {broken}") from broken
    error, share = _compare(y, x, weight, bias, problem, s.name)
    checked = f"{problem.batch} of {whole.batch} images, {problem.channels} of {whole.channels} channels, emulated"
    return replace(result, checked=checked, error=error, error_share=share)


def same_kernel(plan: Plan, problem: DepthwiseProblem) -> Plan:
    """The plan of another problem that runs the same machine code.

    Raises:
        VerificationError: there is none.
    """
    for candidate in candidates(problem, plan.device, plan.variant):
        if isinstance(candidate, Plan):
            for found in (candidate, replace(candidate, constants=relaxed(candidate.constants))):
                if found.kernel_id == plan.kernel_id:
                    return found
    raise VerificationError(f"no plan of {plan.variant} for {problem} runs the same kernel as for {plan.problem}")


def _compare(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, problem: DepthwiseProblem, name: str
) -> tuple[float, float]:
    """The largest error against float64, and the largest share of the bound."""
    exact, bound = reference.forward(x, weight, bias, problem)
    wrong = reference.describe_mismatch(y, exact, bound)
    if wrong:
        raise VerificationError(f"{name}: {wrong} (compared with float64)")
    if not y.numel():
        return 0.0, 0.0
    error = (y.double() - exact).abs()
    return float(error.max()), float((error / bound).max())


# ---- with a GPU ----


def compare_models(file: ModelFile, twins: Twins, announce: Announce) -> ModelResult:
    """Runs both models on the GPU at full size with five seeds.

    Where other layers round to TF32, which cuDNN does by default, they may turn differences of one float32 rounding
    into larger ones. A seed whose results differ is therefore compared again without TF32.

    Raises:
        VerificationError: shape, dtype or values differ by more than 1e-4 (torch.allclose with both tolerances).
    """
    result = ModelResult(SEEDS, difference=0.0, close=True)
    for seed in range(SEEDS):
        announce(f"comparing with the original, seed {seed + 1} of {SEEDS}")
        inputs = on_gpu(make_inputs(file, seed))
        difference, close, tight = _difference(twins, inputs, seed)
        if not close:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                difference, close, tight = _difference(twins, inputs, seed)
            result = replace(result, without_tf32=True)
        if not close:
            raise VerificationError(f"differs from the original by {difference:.3g} (seed {seed}); 1e-4 is allowed")
        result = replace(result, difference=max(result.difference, difference), close=result.close and tight)
    return result


def _difference(twins: Twins, inputs: list[Any], seed: int) -> tuple[float, bool, bool]:
    """The largest difference of the two results, and whether they are close at 1e-4 and at 1e-5."""
    results = []
    for model in (twins.original, twins.new):
        seed_everything(seed)
        with torch.no_grad():
            results.append(list(_tensors(model(*inputs))))
    if len(results[0]) != len(results[1]):
        raise VerificationError(f"returns {len(results[1])} tensors; the original returns {len(results[0])}")
    difference, close, tight = 0.0, True, True
    for theirs, ours in zip(*results, strict=True):
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise VerificationError(
                f"returns {ours.dtype} {tuple(ours.shape)}, the original {theirs.dtype} {tuple(theirs.shape)}"
            )
        if theirs.numel():
            difference = max(difference, float((theirs - ours).abs().max()))
        close = close and torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
        tight = tight and torch.allclose(ours, theirs, rtol=TIGHT_TOLERANCE, atol=TIGHT_TOLERANCE)
    return difference, close, tight


def check_on_gpu(result: LayerResult, twins: Twins) -> LayerResult:
    """Compares one problem's kernel with float64 at full size, and its gradients with the original layer's.

    Raises:
        VerificationError: an output is outside of its rounding bound, or a gradient differs.
    """
    problem = result.problem
    layer, original = twins.layer(result.layers[0])
    x = torch.rand(problem.x_shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 2 - 1
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    with torch.no_grad():
        y = layer(x)
    error = share = 0.0
    step = max(1, _CHUNK // max(1, problem.channels * problem.multiplier * problem.out_size[0] * problem.out_size[1]))
    for first in range(0, problem.batch, step):
        images = slice(first, min(first + step, problem.batch))
        part = problem.with_batch(images.stop - images.start, problem.channels)
        found = _compare(y[images], x[images], weight, bias, part, result.kernel)
        error, share = max(error, found[0]), max(share, found[1])
    del y
    few = x[:FEW_IMAGES].clone()
    for name, ours, theirs in zip(
        ("input", "weight", "bias"), _gradients(layer, few), _gradients(original, few), strict=False
    ):
        if not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(theirs.abs().max())):
            raise VerificationError(f"{result.kernel}: the gradient of the {name} differs from the original layer's")
    return replace(result, checked="all outputs, and gradients, on the GPU", error=error, error_share=share)


def _gradients(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    incoming = torch.rand(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(1))
    return torch.autograd.grad(y, (x, *layer.parameters()), incoming)


def on_gpu(inputs: list[Any]) -> list[Any]:
    """The inputs, tensors moved to the GPU."""
    return [value.cuda() if isinstance(value, Tensor) else value for value in inputs]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a model's result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
