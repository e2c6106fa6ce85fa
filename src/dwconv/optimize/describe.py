"""Says what was replaced, by what, and what it gains: at the top of the file, on the terminal, as JSON."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..version import __version__
from .find import LeftAlone
from .results import LayerResult, Outcome

# PyTorch 2.11's own kernel, channels-first float32, four large problems (3×3, 3×1, 3×7); measured on an H200, 2026-11
PYTORCH_ATTAINMENT = (0.11, 0.20)


def header(outcome: Outcome) -> str:
    """The comment at the top of an exported file."""
    techniques = dict.fromkeys(layer.technique for layer in outcome.layers)
    text = f"{what(outcome)}: {'; or '.join(techniques)}. {gain(outcome)}"
    lines = textwrap.wrap(text, 116)
    lines.append(f"Written by dwconv {__version__} from {outcome.path.rsplit('/', 1)[-1]} for {outcome.arch}.")
    return "\n".join(f"# {line}" for line in lines)


def what(outcome: Outcome) -> str:
    """What was replaced, as a clause."""
    names = outcome.replaced
    filters = Counter("×".join(map(str, layer.problem.filter)) for layer in outcome.layers for _ in layer.layers)
    sizes = " and ".join(filters)
    kernels = len({layer.kernel for layer in outcome.layers})
    if len(names) == 1:
        return f"The depthwise {sizes} convolution ({names[0]}) is computed by a CUDA kernel made for exactly it"
    by = "one CUDA kernel" if kernels == 1 else f"{kernels} CUDA kernels"
    return f"The {len(names)} depthwise {sizes} convolutions are computed by {by} made for exactly them"


def gain(outcome: Outcome) -> str:
    """What that gains, in a sentence that says whether it is measured."""
    if outcome.model is not None and outcome.model.speed_up is not None:
        times = outcome.model.times
        text = (
            f"Measured on {outcome.device}: {outcome.model.speed_up:.2f} times as fast as the original "
            f"({_ms(times['ModelNew'].median)} instead of {_ms(times['original'].median)}"
        )
        if "torch.compile" in times:
            text += f"; torch.compile {_ms(times['torch.compile'].median)}"
        text += ")"
        attained = [_attained(layer) for layer in outcome.layers if layer.times]
        if len(outcome.layers) > 1 and attained:
            ratios = [layer.times["original"].median / layer.times["dwconv"].median for layer in outcome.layers]
            text += f"; the layers themselves {_range(ratios)} times"
        if attained:
            text += f"; {_range(attained)} of the speed of a plain copy"
        return text + "."
    share = [layer.predicted_attainment for layer in outcome.layers]
    low, high = PYTORCH_ATTAINMENT
    return (
        f"Predicted for {outcome.device}, not measured: {_ms(outcome.predicted_seconds)} for these layers, "
        f"{_range(share)} of the speed that its memory and arithmetic allow; PyTorch's own kernel reached {low:.2f} to "
        f"{high:.2f} of it on an H200."
    )


def report(outcome: Outcome, console: Console) -> None:
    """The result on the terminal: what, how well, what was left alone."""
    console.print(f"[bold]{escape(outcome.out)}[/bold]  ModelNew for {outcome.device} ({outcome.arch})", soft_wrap=True)
    console.print(escape(f"{what(outcome)}: {'; or '.join(dict.fromkeys(x.technique for x in outcome.layers))}."))
    console.print(escape(gain(outcome)))
    for layer in outcome.layers:
        for line in _layer(layer):
            console.print(escape(line), soft_wrap=True)
    if outcome.model is None:
        console.print("Verified: weights bit for bit; kernels under the emulator, within the bound of rounding.")
    else:
        tight = "also at 1e-5" if outcome.model.close else "not at 1e-5"
        console.print(
            f"Verified: weights bit for bit; {outcome.model.seeds} seeds at full size, largest difference from the "
            f"original {outcome.model.difference:.2g} (close at 1e-4, {tight}); kernels against float64; gradients."
        )
        if outcome.model.without_tf32:
            console.print("Compared without TF32 in cuDNN's convolutions, which enlarges differences of one rounding.")
        for name, timing in outcome.model.times.items():
            ratio = outcome.model.times["original"].median / timing.median
            console.print(
                f"  {name:14}{_ms(timing.median):>11}  {ratio:6.2f} times the original's speed, quartiles "
                f"{_ms(timing.low)} to {_ms(timing.high)}, {timing.samples} samples, cold L2",
                soft_wrap=True,
            )
        if outcome.model.no_compile:
            console.print(escape(f"  torch.compile has no time: {outcome.model.no_compile}"))
    for line in _left_alone(outcome.left_alone):
        console.print(escape(line))
    for note in outcome.notes:
        console.print(escape(f"Note: {note}."))


def _layer(layer: LayerResult) -> list[str]:
    """One replaced layer, in two lines."""
    more = f" and {len(layer.layers) - 1} more" if len(layer.layers) > 1 else ""
    if layer.times:
        ours, original = layer.times["dwconv"].median, layer.times["original"].median
        speed = (
            f"{original / ours:.2f} times the original's speed, {_ms(ours)}, {_attained(layer):.2f} of a copy's speed"
        )
    else:
        speed = f"{_ms(layer.predicted_seconds)} predicted, {layer.predicted_attainment:.2f} of what the card allows"
    resources = layer.resources
    takes = f"{resources.registers} registers, {resources.spill_bytes} B spilled, {resources.shared_bytes} B shared"
    return [
        f"  {layer.layers[0]}{more}: {layer.problem}",
        f"    {layer.kernel}: {speed}; {takes}; largest error {layer.error_share:.2f} of its bound ({layer.checked})",
    ]


def _left_alone(left_alone: Iterable[LeftAlone]) -> list[str]:
    """One line for each reason, with the layers it holds for."""
    by_reason: dict[str, list[str]] = {}
    for left in left_alone:
        by_reason.setdefault(f"{left.kind} {left.reason}", []).extend(left.names[:1])
    lines = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"Left alone: {shown}: {reason}")
    return lines


def to_json(outcome: Outcome) -> str:
    """All figures; times in seconds."""
    content: dict[str, Any] = {"dwconv": __version__} | asdict(outcome)
    for values, layer in zip(content["layers"], outcome.layers, strict=True):
        values["problem"] |= {"least_bytes": layer.problem.least_bytes, "multiply_adds": layer.problem.multiply_adds}
        if layer.times:
            values["attainment"] = _attained(layer)
    content["summary"] = {"what": what(outcome), "gain": gain(outcome), "measured": outcome.model is not None}
    if outcome.model is not None:
        content["model"]["speed_up"] = outcome.model.speed_up
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _attained(layer: LayerResult) -> float:
    """The larger of copy time and arithmetic's least time, over the measured time."""
    return max(layer.times["copy"].median, layer.fma_seconds) / layer.times["dwconv"].median


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _range(shares: list[float]) -> str:
    low, high = min(shares), max(shares)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
