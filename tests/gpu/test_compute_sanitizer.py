"""compute-sanitizer finds nothing in any variant: memcheck, racecheck, initcheck."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN_EDGES = Path(__file__).parents[1] / "run_edges.py"


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_every_variant_is_clean(tool):
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=86", "--print-limit=5"]
    # cuda.bindings asks the driver for functions of other CUDA versions; that they are missing is no error
    command += ["--report-api-errors=no"] if tool == "memcheck" else []
    found = subprocess.run([*command, sys.executable, str(RUN_EDGES)], capture_output=True, text=True, timeout=500)
    report = found.stdout[-3000:] + found.stderr[-3000:]
    assert found.returncode == 0, report
    assert "problems ran" in found.stdout, report
    assert "ERROR SUMMARY: 0 errors" in found.stdout or "0 hazards displayed" in found.stdout, report
