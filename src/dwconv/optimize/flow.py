"""The whole of `dwconv optimize`: load, find, plan, compile, write, verify, time, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from ..bench.results import write_whole
from ..compile import compile_many
from ..device import PRESETS, DeviceSpec, preset
from ..errors import DepthwiseError
from ..launch import device_spec
from ..roofline import roofline
from ..variants import REGISTRY
from . import describe, verify
from .export import Export, export
from .find import Findings, find_layers
from .model_file import ModelFile, load
from .results import LayerResult, ModelResult, Outcome
from .specialise import Specialisation, specialise

DEFAULT_ARCH = "sm_90"


def optimize(
    path: Path, out: Path | None, arch: str | None, bench: bool, json_path: Path | None, console: Console | None
) -> int:
    """See `dwconv.optimize.run`."""
    console = Console(highlight=False) if console is None else console
    out = Path(f"{path.stem}_dwconv.py") if out is None else out
    device, on_gpu = _target(arch)
    _check_places(path, out, json_path)
    with console.status("reading the model") as status:
        file = load(path)
        findings = find_layers(file, status.update)
        made, rejected = specialise(findings.found, device)
        exported = export(file, made)
        status.update(f"compiling {len(made)} kernels for {device.arch}")
        results = _planned(made)
        notes = _notes(findings, exported, results, on_gpu)
        outcome = Outcome(
            str(path), str(out), device.name, device.arch, results, (*findings.left_alone, *rejected), None, notes
        )
        try:
            status.update("checking the exported file")
            if on_gpu:
                outcome = _on_gpu(file, exported, made, outcome, bench, status.update)
            else:
                outcome = _emulated(file, exported, made, outcome, status.update)
        except verify.VerificationError as error:
            message = f"dwconv: {out} was not written, because verification failed: {error}"
            console.print(message, style="red", markup=False, soft_wrap=True)
            return 1
    text = exported.text(describe.header(outcome))
    write_whole(out, text)
    describe.report(outcome, console)
    if json_path is not None:
        write_whole(json_path, describe.to_json(outcome))
    return 0


def _target(arch: str | None) -> tuple[DeviceSpec, bool]:
    """What to plan for, and whether this machine's GPU is of that kind."""
    if arch is not None and arch not in PRESETS:
        preset(arch)  # raises
    if not torch.cuda.is_available():
        return preset(arch or DEFAULT_ARCH), False
    here = device_spec(torch.cuda.current_device())
    if arch is None or arch == here.arch:
        return here, True
    return preset(arch), False


def _check_places(path: Path, out: Path, json_path: Path | None) -> None:
    for option, place in (("-o", out), ("--json", json_path)):
        if place is None:
            continue
        if place.is_dir():
            raise DepthwiseError(f"{option} {place} is a directory: give the path of a file")
        if not place.resolve().parent.is_dir():
            raise DepthwiseError(f"{option} {place} can't be written: there is no directory {place.resolve().parent}")
        if path.exists() and place.exists() and place.samefile(path):
            raise DepthwiseError(f"{option} {place} is the model file itself: give another path")


def _planned(made: tuple[Specialisation, ...]) -> tuple[LayerResult, ...]:
    """A result for each distinct problem, layers that pose the same one together; kernels are compiled on the way."""
    compiled = compile_many([s.plan for s in made])
    results = []
    for s, kernel in zip(made, compiled, strict=True):
        for problem in dict.fromkeys(use.problem for use in s.uses):
            uses = [use for use in s.uses if use.problem == problem]
            plan = uses[0].plan
            results.append(
                LayerResult(
                    layers=tuple(use.layer.layer.name for use in uses),
                    problem=problem,
                    kernel=s.name,
                    variant=plan.variant,
                    technique=REGISTRY[plan.variant].technique,
                    tile=plan.tile,
                    resources=kernel.resources,
                    predicted_seconds=plan.predicted_seconds,
                    least_seconds=roofline(problem, plan.device).least,
                    fma_seconds=roofline(problem, plan.device).fma,
                )
            )
    return tuple(results)


def _notes(findings: Findings, exported: Export, results: tuple[LayerResult, ...], on_gpu: bool) -> tuple[str, ...]:
    notes = []
    for kernel, spilled in {result.kernel: result.resources.spill_bytes for result in results}.items():
        if spilled:
            notes.append(f"{kernel} spills {spilled} bytes of registers, which a kernel should not: please report it")
    if findings.real_run:
        notes.append(f"the shapes come from a real run on the CPU, because of {findings.real_run}")
    if exported.twin.forbidden:
        lines = ", ".join(exported.twin.forbidden)
        notes.append(f"the model's own code has words that KernelBench's static check rejects: {lines}")
    if torch.cuda.is_available() and not on_gpu:
        notes.append("this machine's GPU is of another architecture, so kernels were verified under the emulator")
    return tuple(notes)


def _emulated(
    file: ModelFile, exported: Export, made: tuple[Specialisation, ...], outcome: Outcome, announce: verify.Announce
) -> Outcome:
    verify.load_twins(file, exported.text(""), outcome.out)
    by_name = {s.name: s for s in made}
    layers = []
    for number, result in enumerate(outcome.layers, 1):
        announce(f"running kernels under the emulator, {number} of {len(outcome.layers)}: {result.problem}")
        s = by_name[result.kernel]
        use = next(use for use in s.uses if use.problem == result.problem)
        layers.append(verify.emulate(s, result, use.layer))
    return replace(outcome, layers=tuple(layers))


def _on_gpu(
    file: ModelFile,
    exported: Export,
    made: tuple[Specialisation, ...],
    outcome: Outcome,
    bench: bool,
    announce: verify.Announce,
) -> Outcome:
    from . import timing

    announce("building the exported file's extension with nvcc (half a minute)")
    twins = verify.load_twins(file, exported.text(""), outcome.out)
    twins = verify.Twins(twins.original.cuda(), twins.new.cuda())
    model: ModelResult = verify.compare_models(file, twins, announce)
    layers = []
    for number, result in enumerate(outcome.layers, 1):
        announce(f"comparing kernels with float64, {number} of {len(outcome.layers)}: {result.problem}")
        layers.append(verify.check_on_gpu(result, twins))
        torch.cuda.empty_cache()
    if bench:
        announce("timing the original, torch.compile and ModelNew")
        model = timing.time_models(file, twins, model)
        for number, result in enumerate(layers):
            announce(f"timing layers, {number + 1} of {len(layers)}: {result.problem}")
            torch.cuda.empty_cache()
            layers[number] = timing.time_layer(result, twins)
    return replace(outcome, layers=tuple(layers), model=model)
