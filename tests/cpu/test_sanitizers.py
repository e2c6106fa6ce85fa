"""Edge tests again, under AddressSanitizer and UBSan, in processes of their own; and proof that these do notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dwconv import env
from dwconv.emulator import build
from dwconv.variants import REGISTRY

TESTS = Path(__file__).parents[1]

# kernels of sanitized.py, and what must stand in the report that stops them
REPORTS = {
    "reads one element beyond": "heap-buffer-overflow",
    "reads one element before": "heap-buffer-overflow",
    "writes one element beyond": "heap-buffer-overflow",
    "shared memory one element too small": "to the right of 124-byte region|after 124-byte region",
    "array in registers": "out of bounds for type 'float",
    "misaligned store": "misaligned address",
    "signed overflow": "signed integer overflow",
    "shift by 32": "shift exponent 32 is too large",
} | {
    f"{name}, {variant}": "heap-buffer-overflow" for variant in REGISTRY for name in ("larger input", "smaller output")
}


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with AddressSanitizer before everything else, so that torch allocates between its red zones."""
    libasan = build.sanitizer_library()
    if not os.path.isabs(libasan):
        pytest.fail(f"{env.read('DWCONV_CXX')} has no libasan.so: install it (Debian and Ubuntu: libasan of that g++)")
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env=os.environ
        | {
            "LD_PRELOAD": libasan,
            "ASAN_OPTIONS": "detect_leaks=0",
            "DWCONV_EMULATOR_SANITIZE": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("file", ["test_edges.py", "test_gradient_edges.py"])
def test_edge_tests_pass_under_the_sanitizers(file):
    # -s: the sanitizers write their report and end the process, which would lose what pytest has captured
    result = sanitized("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(TESTS / "cpu" / file))
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.fixture(scope="module")
def outcomes():
    result = sanitized(str(TESTS / "sanitized.py"))
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads(result.stdout)


def test_every_case_is_looked_at(outcomes):
    assert set(outcomes) == {*REPORTS, "right", "after an error"}


@pytest.mark.parametrize("case", ["right", "after an error"])
def test_right_kernels_pass(outcomes, case):
    assert outcomes[case] == [0, ""]


@pytest.mark.parametrize("case", REPORTS)
def test_mistakes_are_stopped(outcomes, case):
    status, report = outcomes[case]
    assert status != 0
    assert any(words in report for words in REPORTS[case].split("|")), report
