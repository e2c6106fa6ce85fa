"""`dwconv bench --host`: what a call costs on the host, and what the first call of a problem costs.

Run as a program, `python -m dwconv.bench.host`, this file times first calls in its own process and prints JSON: the
parent starts it with an empty cache folder, then again with the folder that it filled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import DepthwiseError
from .report import condition_lines, duration
from .results import Conditions, write_whole
from .run import conditions_here
from .timing import Timing, require_gpu

SMALL = (1, 8, 16, 16)  # N, C, H, W: the GPU is done before the host has launched the next call
BATCHES = 25
CALLS = 200
PROCESSES = 3
_PACKAGES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class FirstCalls:
    """Time from a call to its result on the GPU, in seconds; medians over fresh processes.

    Attributes:
        cache: "empty", or "disk": the kernels lie in the disk cache.
        first: the first call in the process, of a 3×3 filter; loads the compiler where it is needed.
        next: the first call of another problem after that: 3×7, whose kernel takes longest to compile in KernelBench.
        again: a call of a problem that was called before.
    """

    cache: str
    first: float
    next: float
    again: float


@dataclass(frozen=True, slots=True)
class HostReport:
    """Host time of a call, in seconds, by contender; and first calls."""

    conditions: Conditions
    calls: dict[str, Timing]
    first_calls: tuple[FirstCalls, ...]


def measure_host(
    contenders: Mapping[str, Callable[[], object]],
    *,
    batches: int = BATCHES,
    calls: int = CALLS,
    synchronize: Callable[[], object] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Host time of one call of each contender, from batches of calls that are timed without waiting for the GPU.

    Batches of all contenders take turns. The GPU's queue must not fill up, or the host waits for it: keep the work of
    a call below its launch.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        for _ in range(calls):
            run()
    for _ in range(batches):
        for name, run in contenders.items():
            synchronize()
            began = now()
            for _ in range(calls):
                run()
            samples[name].append((now() - began) / calls)
    synchronize()
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def small_calls(torch: Any) -> dict[str, Callable[[], object]]:
    """Calls of one small convolution: functions and modules, without and with a gradient to come."""
    import dwconv

    channels = SMALL[1]
    x = torch.randn(SMALL, device="cuda")
    ours = dwconv.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False).to("cuda")
    theirs = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False).to("cuda")
    weight = ours.weight.detach()
    eager = torch.nn.functional.conv2d
    return {
        "F.conv2d": lambda: eager(x, weight, None, 1, 1, 1, channels),
        "dwconv.conv2d": lambda: dwconv.conv2d(x, weight, None, 1, 1, 1),
        "nn.Conv2d, recording gradients": lambda: theirs(x),
        "dwconv.Conv2d, recording gradients": lambda: ours(x),
    }


def first_calls() -> dict[str, float]:
    """Times first calls in this process. The context exists and the library is imported; nothing is compiled yet."""
    torch = require_gpu()
    from dwconv import conv2d

    def call(height: int, width: int) -> float:
        x = torch.ones(16, 64, 128, 128, device="cuda")
        weight = torch.ones(64, 1, height, width, device="cuda")
        torch.cuda.synchronize()
        began = time.perf_counter()
        conv2d(x, weight)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    return {"first": call(3, 3), "next": call(3, 7), "again": call(3, 7)}


def first_calls_in_processes(processes: int = PROCESSES) -> tuple[FirstCalls, ...]:
    """First calls in fresh processes, with an empty cache and from the disk cache."""
    found: dict[str, list[dict[str, float]]] = {"empty": [], "disk": []}
    for _ in range(processes):
        with tempfile.TemporaryDirectory(prefix="dwconv-cache-") as folder:
            for cache in ("empty", "disk"):
                found[cache].append(_in_process(folder))
    return tuple(
        FirstCalls(cache, *(Timing.of(run[key] for run in runs).median for key in ("first", "next", "again")))
        for cache, runs in found.items()
    )


def _in_process(cache_folder: str) -> dict[str, float]:
    path = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"DWCONV_CACHE_DIR": cache_folder, "PYTHONPATH": path}
    command = [sys.executable, "-m", "dwconv.bench.host"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DepthwiseError(f"the process that times first calls failed: {last[0]}")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def run_host(console: Console, command: str, json_path: Path | None = None) -> int:
    """Measures, prints, and writes JSON if asked to.

    Raises:
        DepthwiseError: there is no GPU, or a process failed.
    """
    torch = require_gpu()
    with Console(stderr=True).status("timing first calls in fresh processes"):
        firsts = first_calls_in_processes()
    with Console(stderr=True).status("timing calls of a small convolution"):
        calls = measure_host(small_calls(torch), synchronize=torch.cuda.synchronize)
    report = HostReport(conditions_here(torch, BATCHES, command, l2="warm"), calls, firsts)
    print_host(report, console)
    if json_path is not None:
        write_whole(json_path, json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
    return 0


def print_host(report: HostReport, console: Console) -> None:
    """Two tables: host time of a call, and first calls."""
    shape = "×".join(map(str, SMALL))
    for line in condition_lines(report.conditions):
        console.print(Text(line, style="dim"))
    table = Table("call", title=f"host time of a call, {shape} float32, 3×3", title_justify="left")
    for column in ("over F.conv2d", "median", "spread"):
        table.add_column(column, justify="right")
    eager = report.calls["F.conv2d"].median
    for name, timing in report.calls.items():
        table.add_row(name, f"{timing.median / eager:.2f}", duration(timing.median), f"{timing.spread:.1%}")
    console.print(table)
    table = Table("cache", title="first call of a problem, until its result is there", title_justify="left")
    for column in ("first in the process", "another problem", "called before"):
        table.add_column(column, justify="right")
    for row in report.first_calls:
        table.add_row(row.cache, duration(row.first), duration(row.next), duration(row.again))
    console.print(table)


if __name__ == "__main__":
    print(json.dumps(first_calls()))
