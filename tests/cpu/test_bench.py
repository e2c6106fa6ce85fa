"""The benchmark's logic, with a fake clock: statistics, interleaving, suites, ratios, JSON and Markdown."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dwconv.bench import classes, host, report, results, suites
from dwconv.bench.results import CaseResult, Conditions, Missing, Report
from dwconv.bench.run import Settings, check, merge, run, run_case
from dwconv.bench.timing import LEAST_ROUNDS, CudaClock, Timing, copy_contender, measure, require_gpu
from dwconv.device import H200
from dwconv.errors import DepthwiseError
from dwconv.problem import DepthwiseProblem

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")
PROBLEM = DepthwiseProblem(2, 3, (8, 9), (3, 3), padding=((1, 1), (1, 1)), bias=True)


class FakeClock:
    """Time that only contenders and flushes advance."""

    def __init__(self) -> None:
        self.time = 0.0
        self.log: list[str] = []

    def takes(self, name: str, *seconds: float) -> Callable[[], object]:
        """A contender that takes these times, one after another, and then the last of them again."""
        left = list(seconds)

        def call() -> None:
            self.log.append(name)
            self.time += left.pop(0) if len(left) > 1 else left[0]

        return call

    def flush(self) -> None:
        self.log.append("flush")
        self.time += 100.0

    def mark(self) -> float:
        return self.time

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def now(self) -> float:
        return self.time


class SteadyClock(FakeClock):
    """Every call takes a second, so that run_case can be tested with real contenders."""

    def mark(self) -> float:
        self.time += 1.0
        return self.time


def timing(seconds: float) -> Timing:
    return Timing(seconds, seconds * 0.99, seconds * 1.01, seconds * 0.98, 25)


def conditions() -> Conditions:
    return Conditions(
        device="NVIDIA H200",
        driver="580.0, supports CUDA 13.0",
        cuda="13.0",
        torch="2.11.0",
        dwconv="0.1.0",
        commit="0123456789abcdef",
        date="2026-11-21T08:00:00+00:00",
        rounds=25,
        command="dwconv bench --suite kernelbench",
    )


def case(name: str = "82", problem: DepthwiseProblem = PROBLEM, share: float = 0.5) -> CaseResult:
    timings = {"copy": timing(1e-3), "eager": timing(5e-3), "dwconv": timing(1.25e-3)}
    checks = {"eager": (1e-6, 0.25), "dwconv": (2e-6, share)}
    missing = [Missing("tile16", "takes float32, not float16")]
    return results.case_result(name, problem, timings, 0.5e-3, checks, {"dwconv": "4 rows"}, missing)


# ---- timing


def test_timing_takes_median_and_interpolated_quartiles() -> None:
    found = Timing.of([4.0, 1.0, 2.0, 3.0])
    assert found == Timing(median=2.5, low=1.75, high=3.25, least=1.0, samples=4)
    assert found.spread == pytest.approx(0.6)


def test_timing_of_one_sample_has_no_spread() -> None:
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 2.0, 1)


def test_timing_of_nothing_is_an_error() -> None:
    with pytest.raises(DepthwiseError, match="no samples"):
        Timing.of([])


def test_measure_counts_neither_warmup_nor_flush() -> None:
    clock = FakeClock()
    found = measure({"ours": clock.takes("ours", 0.5, 0.4, 1.0, 2.0, 3.0)}, rounds=3, warmup=2, clock=clock)
    assert found["ours"] == Timing.of([1.0, 2.0, 3.0])


def test_measure_flushes_before_each_call_and_turns_the_order() -> None:
    clock = FakeClock()
    measure({"a": clock.takes("a", 1.0), "b": clock.takes("b", 1.0)}, rounds=2, warmup=1, clock=clock)
    first, second = ["flush", "a", "flush", "b"], ["flush", "b", "flush", "a"]
    assert [entry for entry in clock.log if entry != "synchronize"] == ["a", "b", *first, *second]
    assert clock.log[2:4] == ["b", "synchronize"], "rounds begin when all is warm"


def test_measure_stops_at_its_limit_but_not_before_the_least_rounds() -> None:
    clock = FakeClock()
    found = measure({"slow": clock.takes("slow", 10.0)}, rounds=25, limit_seconds=1.0, clock=clock)
    assert found["slow"].samples == LEAST_ROUNDS


def test_measure_warms_slow_contenders_up_once() -> None:
    clock = FakeClock()
    measure({"slow": clock.takes("slow", 10.0), "fast": clock.takes("fast", 0.01)}, rounds=1, warmup=3, clock=clock)
    before_the_first_round = clock.log[: clock.log.index("flush")]
    assert (before_the_first_round.count("slow"), before_the_first_round.count("fast")) == (1, 3)


def test_measure_reports_progress_after_every_round() -> None:
    clock = FakeClock()
    seen: list[tuple[int, int]] = []
    measure({"a": clock.takes("a", 1.0)}, rounds=3, clock=clock, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_measure_refuses_nothing_to_time() -> None:
    with pytest.raises(DepthwiseError, match="nothing to time"):
        measure({}, clock=FakeClock())
    with pytest.raises(DepthwiseError, match="rounds=0"):
        measure({"a": lambda: None}, rounds=0, clock=FakeClock())


@needs_no_gpu
@pytest.mark.parametrize("call", [require_gpu, CudaClock, lambda: measure({"a": lambda: None})])
def test_timing_without_a_gpu_says_so(call: Callable[[], object]) -> None:
    with pytest.raises(DepthwiseError, match="timing needs a GPU"):
        call()


@pytest.mark.parametrize(("total", "half"), [(0, 16), (31, 16), (32, 16), (33, 32), (2_139_072, 1_069_536)])
def test_copy_contender_moves_half_in_and_half_out(total: int, half: int) -> None:
    copied = copy_contender(total, "cpu")()
    assert isinstance(copied, torch.Tensor)
    assert copied.numel() * copied.element_size() == half


def test_measure_host_divides_batches_by_calls() -> None:
    clock = FakeClock()
    calls = {"a": clock.takes("a", 2.0), "b": clock.takes("b", 3.0)}
    found = host.measure_host(calls, batches=4, calls=5, now=clock.now)
    assert (found["a"].median, found["b"].median, found["a"].samples) == (2.0, 3.0, 4)


def test_host_report_puts_ratios_before_times() -> None:
    calls = {"F.conv2d": timing(8e-6), "dwconv.conv2d": timing(10e-6)}
    firsts = (host.FirstCalls("empty", 0.12, 0.06, 1e-4), host.FirstCalls("disk", 0.004, 0.002, 1e-4))
    console = Console(file=io.StringIO(), width=140, color_system=None)
    host.print_host(host.HostReport(conditions(), calls, firsts), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "NVIDIA H200" in text
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert ["dwconv.conv2d", "1.25", "10.0 µs", "2.0%"] in lines
    assert ["disk", "4.000 ms", "2.000 ms", "100.0 µs"] in lines


# ---- suites


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_case_is_a_valid_problem_in_every_form(suite: str) -> None:
    cases = suites.load_suite(suite)
    problems = list(suites.select(cases, directions=suites.DIRECTIONS))
    assert len(problems) == sum(len(c.dtypes) * len(c.layouts) * len(c.directions) for c in cases)
    assert all(problem.least_bytes > 0 and min(problem.out_size) > 0 for _, problem in problems)


def test_causal_cases_pad_only_before() -> None:
    (problem,) = [p for _, p in suites.select(suites.load_suite("models"), ["mamba"], ["float32"], ["channels_first"])]
    assert problem.padding == ((3, 0),)
    assert problem.out_size == problem.size


def test_kernelbench_82_is_the_problem_of_the_table() -> None:
    (problem,) = [
        p for _, p in suites.select(suites.load_suite("kernelbench"), ["82"], ["float32"], ["channels_first"])
    ]
    assert problem == DepthwiseProblem(16, 64, (512, 512), (3, 3))


def test_choices_that_leave_nothing_are_errors() -> None:
    cases = suites.load_suite("kernelbench")
    with pytest.raises(DepthwiseError, match="no case's name contains resnet"):
        list(suites.select(cases, ["resnet"]))
    with pytest.raises(DepthwiseError, match="dtype='int8' is unknown"):
        list(suites.select(cases, dtypes=["int8"]))
    with pytest.raises(DepthwiseError, match="suite='nets' is unknown"):
        suites.load_suite("nets")


# ---- results


def test_attainment_is_the_larger_yardstick_over_the_time() -> None:
    assert results.attainment(1.0, 0.5, 2.0) == 0.5
    assert results.attainment(0.5, 3.0, 2.0) == 1.5  # tensor cores can beat the FMA time


def test_rows_hold_the_ratios() -> None:
    row = case().row("dwconv")
    assert row is not None
    assert row.attainment == pytest.approx(0.8)
    assert row.over_eager == pytest.approx(4.0)
    assert row.over_copy == pytest.approx(0.8)
    assert row.within_bound


def test_means_are_geometric_within_classes_and_over_all() -> None:
    large = DepthwiseProblem(16, 64, (512, 512), (3, 3))
    slower = dataclasses.replace(case("84", large))
    rows = tuple(dataclasses.replace(row, attainment=row.attainment / 4) for row in slower.rows)
    found = Report(conditions(), (case(), dataclasses.replace(slower, rows=rows))).means()
    ours = {mean.problem_class: mean for mean in found if mean.contender == "dwconv"}
    assert list(ours) == ["filters up to 5×5, 64 MB or more", "filters up to 5×5, less than 64 MB", "all"]
    assert ours["all"].attainment == pytest.approx(0.4)
    assert ours["all"].least_attainment == pytest.approx(0.2)
    assert ours["all"].over_eager == pytest.approx(4.0)
    assert ours["all"].cases == 2
    assert (ours["all"].target, ours["all"].below, ours["all"].slower) == (0.82, 1, 0)
    assert [mean.below for mean in ours.values()] == [1, 0, 1]


def test_the_faster_one_of_eager_and_compile_is_what_counts() -> None:
    timings = {"copy": timing(1e-3), "eager": timing(5e-3), "compile": timing(1.1e-3), "dwconv": timing(1.2e-3)}
    slow = results.case_result("slow", PROBLEM, timings, 0.5e-3, {}, {"dwconv": "4 rows"})
    ours = slow.row("dwconv")
    assert ours is not None
    assert slow.over_fastest(ours) == pytest.approx(1.1 / 1.2)
    found = Report(conditions(), (case(), slow))
    assert found.short == ((slow, ours),), "it reaches its target, 0.75, and is slower than torch.compile"
    (mean,) = [mean for mean in found.means() if mean.contender == "dwconv"]
    assert (mean.slower, mean.below) == (1, 0)
    assert mean.over_fastest == pytest.approx(math.sqrt(4.0 * 1.1 / 1.2))
    assert "| slow, float32 channels_first | filters up to 5×5, less than 64 MB | 0.833 | 0.75 | 0.92 | 4 rows |" in (
        report.markdown(found)
    )


@pytest.mark.parametrize(
    ("size", "taps", "expected"),
    [
        ((512, 512), (5, 5), "filters up to 5×5, 64 MB or more"),
        ((56, 56), (3, 3), "filters up to 5×5, less than 64 MB"),
        ((56, 56), (7, 7), "7×7, float32"),
        ((56, 56), (51, 5), "13×13 to 51×51"),
        ((1000,), (31,), "1-D, 4 to 31 taps"),
        ((1000,), (768,), "1-D, more taps"),
        ((16, 16, 16), (3, 3, 3), "3-D"),
    ],
)
def test_problem_classes(size: tuple[int, ...], taps: tuple[int, ...], expected: str) -> None:
    problem = DepthwiseProblem(16, 64, size, taps)
    assert classes.problem_class(problem) == expected
    half = classes.problem_class(dataclasses.replace(problem, dtype="float16"))
    assert half == {"7×7, float32": "7×7, 16 bits"}.get(expected, half)
    assert half in classes.TARGETS


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_case_has_a_class_with_a_target(suite: str) -> None:
    for name, problem in suites.select(suites.load_suite(suite)):
        found = classes.problem_class(problem)
        assert found in classes.TARGETS, name


def test_json_round_trip() -> None:
    uneven = DepthwiseProblem(1, 2, (9,), (4,), padding=((3, 0),), dtype="float16")
    wrong = case("broken", uneven, share=math.inf)
    written = Report(conditions(), (case(), wrong))
    text = results.to_json(written)
    assert results.from_json(text) == written
    content = json.loads(text)
    assert content["cases"][0]["problem"]["least_bytes"] == PROBLEM.least_bytes
    assert content["cases"][1]["rows"][1]["error_share"] == "inf"


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"format": 0}', '{"format": 1, "conditions": {}, "cases": []}'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(DepthwiseError):
        results.from_json(text)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    results.write_whole(target, "one")
    results.write_whole(target, "two")
    assert target.read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(DepthwiseError, match="can't be written"):
        results.write_whole(tmp_path / "absent" / "report.json", "three")


# ---- report


def rendered(width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    report.print_report(Report(conditions(), (case(), case("84", share=2.0))), console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_terminal_report_names_conditions_ratios_and_what_is_wrong() -> None:
    text = rendered()
    assert "NVIDIA H200, driver 580.0, supports CUDA 13.0, torch 2.11.0" in text
    assert "cold L2, 25 interleaved rounds" in text
    assert "$ dwconv bench --suite kernelbench" in text
    (line,) = [line for line in text.splitlines() if "dwconv" in line and "0.50" in line]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == [
        "dwconv", "0.800", "4.00", "4.00", "0.800", "1.250 ms", "2.0%", "0.50",
    ]  # fmt: skip
    assert "WRONG: dwconv on 84" in text
    assert "no figure for tile16 (2 cases, the first 82): takes float32, not float16" in text


def test_markdown_tables_are_rectangular() -> None:
    text = report.markdown(Report(conditions(), (case("a|b"), case("84"))))
    for heading, columns in (("## Geometric means by class", report.MEAN_COLUMNS), ("## Cases", report.CASE_COLUMNS)):
        lines = text.split(heading)[1].strip().split("\n\n")[0].splitlines()
        assert lines[0] == "| " + " | ".join(columns) + " |"
        assert {line.replace("\\|", "").count("|") for line in lines} == {len(columns) + 1}
    assert "| 82" not in text
    assert "a\\|b, float32 channels_first | dwconv | 0.800 | 4.00 |" in text
    assert "2.14" not in text
    assert "copy 1.000 ms" in text


def test_noise_is_remarked() -> None:
    noisy = dataclasses.replace(case().rows[0], timing=Timing(1.0, 0.9, 1.1, 0.8, 25))
    lines = list(report.remarks(Report(conditions(), (dataclasses.replace(case(), rows=(noisy,)),))))
    assert lines[0].startswith("1 of 1 figures spread by more than 5%")


# ---- a whole case, on the CPU

EVERY_FORM = [
    PROBLEM,
    dataclasses.replace(PROBLEM, dtype="bfloat16", layout="channels_last"),
    DepthwiseProblem(2, 3, (20,), (4,), padding=((3, 0),)),
    DepthwiseProblem(2, 3, (20,), (4,), padding=((0, 2),), layout="channels_last"),
    DepthwiseProblem(2, 3, (4, 5, 6), (3, 3, 3), multiplier=2, layout="channels_last"),
    DepthwiseProblem(2, 3, (4, 5, 6), (3, 3, 3), dtype="float64"),
]


@pytest.mark.parametrize("problem", EVERY_FORM, ids=str)
def test_run_case_checks_and_times_what_pytorch_computes(problem: DepthwiseProblem) -> None:
    found = run_case("case", problem, ["eager"], device="cpu", spec=H200, rounds=3, clock=SteadyClock())
    (row,) = found.rows
    assert row.contender == "eager"
    assert row.timing == Timing(1.0, 1.0, 1.0, 1.0, 3)
    assert row.error_share is not None
    assert row.error_share <= 1
    assert (row.over_eager, row.over_copy) == (1.0, 1.0)


def test_run_case_lists_what_no_kernel_takes() -> None:
    problem = dataclasses.replace(PROBLEM, layout="channels_last")
    names = ["eager", "tile16"]
    found = run_case("case", problem, names, device="cpu", spec=H200, rounds=1, clock=SteadyClock())
    assert [row.contender for row in found.rows] == ["eager"]
    assert [missing.contender for missing in found.missing] == ["tile16"]
    assert found.missing[0].reason == "takes channels_first memory, not channels_last"


@pytest.mark.parametrize("problem", EVERY_FORM, ids=str)
def test_run_case_times_dwconv_in_every_form(problem: DepthwiseProblem) -> None:
    """On the CPU conv1d, conv2d and conv3d run PyTorch's convolution; what is timed on a GPU is called the same way."""
    found = run_case("case", problem, ["eager", "dwconv"], device="cpu", spec=H200, rounds=1, clock=SteadyClock())
    assert [row.contender for row in found.rows] == ["eager", "dwconv"]
    assert not found.missing
    assert found.rows[1].note


# ---- a suite in parts


def written(path: Path, *cases: CaseResult, **others: Any) -> Path:
    path.write_text(results.to_json(Report(dataclasses.replace(conditions(), **others), cases)), encoding="utf-8")
    return path


def suite_cases(suite: str, names: list[str]) -> list[CaseResult]:
    return [case(name, problem) for name, problem in suites.select(suites.load_suite(suite), names, ["float16"])]


def test_parts_are_merged_in_the_order_of_the_suite(tmp_path: Path) -> None:
    whole = suite_cases("kernelbench", ["8"])
    assert len(whole) == 10
    parts = [written(tmp_path / f"{i}.json", *whole[i::3], command=f"dwconv bench --shard {i + 1}/3") for i in range(3)]
    console = Console(file=io.StringIO(), width=140)
    out, markdown = tmp_path / "all.json", tmp_path / "all.md"
    assert merge([parts[2], parts[0], parts[1]], out, markdown, console) == 0
    found = results.from_json(out.read_text(encoding="utf-8"))
    assert found.cases == tuple(whole)
    assert found.conditions.command.count("--shard") == 3
    assert markdown.read_text(encoding="utf-8").startswith("# dwconv bench: kernelbench on NVIDIA H200\n")


def test_a_case_measured_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    first, second = suite_cases("kernelbench", ["82"])
    wrong = dataclasses.replace(second, rows=case("82", second.problem, share=2.0).rows)
    parts = [written(tmp_path / "a.json", first, wrong), written(tmp_path / "b.json", second, commit="f" * 40)]
    console = Console(file=io.StringIO(), width=140)
    out = tmp_path / "all.json"
    assert merge(parts, out, None, console) == 0
    found = results.from_json(out.read_text(encoding="utf-8"))
    assert found.cases == (first, second)
    assert found.conditions.commit == "0123456789abcdef, " + "f" * 40
    assert "(0123456789ab, ffffffffffff)" in report.condition_lines(found.conditions)[0]
    assert merge(parts[::-1], out, None, console) == 1, "the wrong one is the last"


def test_what_can_not_be_merged(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    one = written(tmp_path / "a.json", case())
    with pytest.raises(DepthwiseError, match=r"different device .NVIDIA H200 and NVIDIA H100. can't be merged"):
        merge([one, written(tmp_path / "b.json", case(), device="NVIDIA H100")], None, None, console)
    with pytest.raises(DepthwiseError, match=r"c\.json can't be read"):
        merge([one, tmp_path / "c.json"], None, None, console)


def test_reports_of_the_first_version_can_be_read() -> None:
    """They name neither layout of x nor epilogue, and other classes."""
    content = json.loads(results.to_json(Report(conditions(), (case(),))))
    del content["cases"][0]["problem"]["epilogue"]
    content["cases"][0]["problem_class"] = "filters up to 25 taps, less than 64 MB"
    assert results.from_json(json.dumps(content)) == Report(conditions(), (case(),))


@pytest.mark.parametrize("direction", ["grad_input", "grad_weight"])
def test_run_case_times_pytorchs_gradients(direction: Any) -> None:
    problem = dataclasses.replace(PROBLEM, direction=direction)
    found = run_case("case", problem, ["eager", "compile"], device="cpu", spec=H200, rounds=1, clock=SteadyClock())
    share = found.rows[0].error_share
    assert share is not None
    assert share <= 1
    assert [missing.contender for missing in found.missing] == ["compile"]


@pytest.mark.parametrize("damage", [math.nan, 1.0])
def test_check_finds_a_wrong_or_unwritten_output(damage: float) -> None:
    from dwconv.bench import baselines

    tensors = baselines.make_tensors(PROBLEM, "cpu")
    y = torch.empty(PROBLEM.y_shape)

    def compute() -> torch.Tensor:
        y.copy_(baselines.pytorch_convolution(PROBLEM)(tensors.x, tensors.weight, tensors.bias))
        y[1, 2, 7, 8] = damage
        return y

    found = check(PROBLEM, tensors, baselines.Contender("ours", compute, y=y))
    assert found is not None
    assert found[1] > 1


def test_inputs_have_the_layout_asked_for() -> None:
    from dwconv.bench.baselines import make_tensors

    for size in ((8,), (8, 9), (4, 5, 6)):
        problem = DepthwiseProblem(2, 3, size, (1,) * len(size), layout="channels_last", dtype="float16")
        x = make_tensors(problem, "cpu").x
        assert tuple(x.shape) == problem.x_shape
        assert x.stride(1) == 1
        assert x.dtype == torch.float16


@needs_no_gpu
def test_run_refuses_bad_requests_before_it_looks_for_a_gpu() -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(DepthwiseError, match="--rounds 0"):
        run(Settings("kernelbench", rounds=0), console, "")
    with pytest.raises(DepthwiseError, match="--shard 4/3 is no part of the suite"):
        run(Settings("kernelbench", shard=(4, 3)), console, "")
    with pytest.raises(DepthwiseError, match="timing needs a GPU"):
        run(Settings("kernelbench"), console, "")
