"""The command line: what it prints, its errors and exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dwconv import env, optimize
from dwconv.bench import suites
from dwconv.cli import main
from dwconv.device import PRESETS
from dwconv.errors import DepthwiseError
from dwconv.problem import DTYPE_BYTES
from dwconv.version import __version__

EXPLAIN = ["explain", "--input", "16,64,512,512", "--kernel", "3"]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")


def dwconv(*arguments: str, width: int = 120) -> tuple[int, str]:
    """Runs a command in this process: its exit code and what it printed, uncoloured."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    code = main(arguments, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120"}
    command = [sys.executable, "-m", "dwconv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


def explained(*arguments: str) -> dict[str, Any]:
    code, text = dwconv("explain", *arguments, "--json")
    assert code == 0
    content: dict[str, Any] = json.loads(text)
    return content


# ---- explain


def test_explain_prints_problem_limits_candidates_and_choice() -> None:
    code, text = dwconv(*EXPLAIN)
    assert code == 0
    assert "16×64×512×512 float32 channels_first, filter 3×3" in text
    assert "504.6 µs: 2.14 GB at least" in text
    assert "set by memory" in text
    for variant in ("direct_nchw", "one_per_thread", "tile16"):
        assert variant in text
    assert "registers a thread, no spills" in text
    assert "FILTER_H=3" in text


def test_explain_json_holds_the_figures() -> None:
    content = explained("--input", "2,8,30,41", "--kernel", "3,7", "--stride", "2,1", "--padding", "1,3", "--bias")
    problem = content["problem"]
    assert (problem["filter"], problem["stride"], problem["padding"]) == ([3, 7], [2, 1], [[1, 1], [3, 3]])
    assert problem["out_size"] == [15, 41]
    assert problem["bias"] is True
    assert content["roofline"]["least"] == max(content["roofline"]["copy"], content["roofline"]["fma"])
    assert content["resources"]["registers"] > 0
    assert content["resources"]["spill_bytes"] == 0
    predicted = [c["predicted_seconds"] for c in content["candidates"] if "predicted_seconds" in c]
    assert predicted == sorted(predicted)
    assert predicted[0] == content["chosen"]["predicted_seconds"]


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("same", [[1, 2], [3, 3]]),
        ("valid", [[0, 0], [0, 0]]),
        ("2", [[2, 2], [2, 2]]),
        ("1:0", [[1, 0], [1, 0]]),
        ("1:0,2", [[1, 0], [2, 2]]),
    ],
)
def test_explain_reads_padding(padding: str, expected: list[list[int]]) -> None:
    content = explained("--input", "1,2,30,30", "--kernel", "4,7", "--padding", padding)
    assert content["problem"]["padding"] == expected


@pytest.mark.parametrize("arch", PRESETS)
def test_explain_knows_every_architecture(arch: str) -> None:
    content = explained("--input", "4,8,20,20", "--kernel", "3", "--arch", arch)
    assert content["device"]["arch"] == arch
    assert content["resources"]["spill_bytes"] == 0


def test_explain_of_one_variant() -> None:
    content = explained("--input", "4,8,20,20", "--kernel", "5", "--variant", "tile16", "--multiplier", "2")
    assert {candidate["variant"] for candidate in content["candidates"]} == {"tile16"}
    assert content["problem"]["multiplier"] == 2


def test_explain_of_a_problem_that_no_kernel_takes_gives_the_reasons() -> None:
    arguments = ("--input", "4,8,20,20", "--kernel", "3", "--layout", "channels_last", "--variant", "tile16")
    code, text = dwconv("explain", *arguments)
    assert code == 0
    assert "takes channels_first memory, not channels_last" in text
    assert "No kernel takes this problem" in text


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("layout", suites.LAYOUTS)
@pytest.mark.parametrize(("size", "taps"), [("300", "4"), ("20,24", "3"), ("6,14,14", "3,3,3")])
def test_explain_of_every_dtype_layout_and_dimension(dtype: str, layout: str, size: str, taps: str) -> None:
    content = explained("--input", f"4,16,{size}", "--kernel", taps, "--dtype", dtype, "--layout", layout)
    assert (content["problem"]["dtype"], content["problem"]["layout"]) == (dtype, layout)
    assert content["chosen"]["constants"]["CHANNELS_LAST"] == (layout == "channels_last")
    assert content["resources"]["spill_bytes"] == 0


def test_explain_of_an_epilogue() -> None:
    arguments = ("--activation", "silu", "--scale", "--shift", "--residual", "--dtype", "bfloat16")
    content = explained("--input", "4,8,20,20", "--kernel", "3", *arguments)
    assert content["problem"]["epilogue"] == {"activation": "silu", "scale": True, "shift": True, "residual": True}
    constants = content["chosen"]["constants"]
    assert (constants["ACTIVATION"], constants["HAS_SCALE"], constants["HAS_RESIDUAL"]) == (3, 1, 1)
    code, text = dwconv("explain", "--input", "4,8,20,20", "--kernel", "3", "--activation", "relu", "--residual")
    assert code == 0
    assert "filter 3×3, relu, residual" in text


def test_explain_needs_no_torch() -> None:
    program = (
        "import sys\nfrom dwconv.cli import main\n"
        f"code = main({EXPLAIN!r})\nassert code == 0\nassert 'torch' not in sys.modules, 'torch was imported'"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "required: COMMAND"),
        (["explian"], "invalid choice: 'explian'"),
        (["explain", "--kernel", "3"], "--input"),
        (["explain", "--input", "16x64", "--kernel", "3"], "--input '16x64' is not understood: give whole numbers"),
        (["explain", "--input", "16,64", "--kernel", "3"], "--input 16,64 has 2 numbers"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3,3,3"], "--kernel=(3, 3, 3) doesn't fit"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3", "--padding", "half"], "--padding 'half' is not understood"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3", "--padding", "1,2,3"], "--padding 1,2,3 doesn't fit 2"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3", "--padding", "same", "--stride", "2"], "needs stride 1"),
        (["explain", "--input", "1,2,8,8", "--kernel", "9"], "use more padding or a smaller filter"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3", "--stride", "0"], "stride=(0, 0) is not possible"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3", "--arch", "sm_60"], "arch='sm_60' is unknown"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3", "--dtype", "int8"], "dtype='int8' is not a floating type"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3", "--activation", "elu"], "activation='elu' is unknown"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3", "--variant", "fft"], "variant='fft' is unknown"),
        (["explain", "--input", "1,2,8,8", "--kernel", "3", "--multiplier", "1,2"], "must be one number"),
        (["bench"], "one of the arguments --suite --host --merge is required"),
        (["bench", "--suite", "kernelbench", "--shard", "2"], "--shard 2 is not understood: give part and number"),
        (["bench", "--suite", "kernelbench", "--shard", "a/b"], "--shard 'a,b' is not understood"),
        (["bench", "--suite", "kernelbench", "--shard", "3/2"], "--shard 3/2 is no part of the suite"),
        (["bench", "--merge", "nowhere.json"], "nowhere.json can't be read"),
        (["bench", "--suite", "kernelbench", "--case", "resnet"], "no case's name contains resnet"),
        (["bench", "--suite", "kernelbench", "--rounds", "0"], "--rounds 0 takes no samples"),
    ],
)
def test_a_bad_request_gets_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.startswith("dwconv: ")
    assert printed.err.count("\n") == 1


@needs_no_gpu
@pytest.mark.parametrize("what", [["--suite", "kernelbench"], ["--host"]])
def test_bench_without_a_gpu_says_so(what: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *what]) == 2
    assert "timing needs a GPU" in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(DepthwiseError):
        main(["--debug", "explain", "--input", "16,64", "--kernel", "3"])
    with pytest.raises(DepthwiseError):
        main(["explain", "--input", "16,64", "--kernel", "3", "--debug"])


def test_an_error_has_no_traceback_in_a_real_process() -> None:
    done = in_process("explain", "--input", "1,2,8,8", "--kernel", "99")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "smaller filter" in done.stderr


def test_interruption_exits_as_shells_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(optimize, "run", interrupted)
    assert main(["optimize", "model.py"]) == 130


# ---- the other commands


def test_version_and_help() -> None:
    version, usage = in_process("--version"), in_process("--help")
    assert (version.returncode, version.stdout) == (0, f"dwconv {__version__}\n")
    assert usage.returncode == 0
    assert all(command in usage.stdout for command in ("optimize", "explain", "bench", "env"))


def test_optimize_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*arguments: Any, **options: Any) -> int:
        seen.append((arguments, options))
        return 1

    monkeypatch.setattr(optimize, "run", record)
    code, _ = dwconv("optimize", "model.py", "-o", "out.py", "--arch", "sm_80", "--no-bench", "--json", "figures.json")
    ((arguments, options),) = seen
    assert code == 1
    assert arguments == (Path("model.py"),)
    del options["console"]
    assert options == {"out": Path("out.py"), "arch": "sm_80", "bench": False, "json_path": Path("figures.json")}


def test_env_lists_versions_cache_and_every_variable() -> None:
    code, text = dwconv("env", width=160)
    assert code == 0
    for word in ("dwconv", "python", "torch", "cuda-bindings", "NVRTC", "driver", "kernel cache", *env.VARIABLES):
        assert word in text


def test_env_json() -> None:
    code, text = dwconv("env", "--json")
    content = json.loads(text)
    assert code == 0
    assert set(content["variables"]) == set(env.VARIABLES)
    assert content["cache"]["entries"] >= 0
    assert content["cache"]["limit"] > 0


def test_bench_lists_its_cases() -> None:
    code, text = dwconv("bench", "--suite", "models", "--list")
    assert code == 0
    assert [line.split(":")[0] for line in text.splitlines()] == [case.name for case in suites.load_suite("models")]
