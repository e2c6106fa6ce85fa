"""compute-sanitizer finds nothing in any variant: memcheck, racecheck, initcheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN_EDGES = Path(__file__).parents[1] / "run_edges.py"
TOOLS = ["memcheck", "racecheck", "initcheck"]


@pytest.fixture(scope="module")
def running():
    """All tools at once, since each needs little of the GPU."""
    processes = {}
    for tool in TOOLS:
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=86", "--print-limit=5"]
        command += ["--num-cuda-barriers=128"]  # of a block: a gate for each of four stages of sixteen warps
        # cuda.bindings asks the driver for functions of other CUDA versions; that they are missing is no error
        command += ["--report-api-errors=no"] if tool == "memcheck" else []
        processes[tool] = subprocess.Popen(
            [*command, sys.executable, str(RUN_EDGES)],
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every tensor is an allocation of its own
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", TOOLS)
def test_every_variant_is_clean(tool, running):
    stdout, stderr = running[tool].communicate(timeout=500)
    report = stdout[-3000:] + stderr[-3000:]
    assert running[tool].returncode == 0, report
    assert "problems ran" in stdout, report
    assert "ERROR SUMMARY: 0 errors" in stdout or "0 hazards displayed" in stdout, report
