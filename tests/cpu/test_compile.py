"""From a plan to machine code: every default plan, on every architecture; memory, disk, compiler; what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from dwconv import DepthwiseError, nvrtc
from dwconv import compile as compile_module
from dwconv.cache import default_cache
from dwconv.choose import candidates, choose
from dwconv.compile import Resources, cache_key, compile_many, compile_plan, read_report
from dwconv.device import H200, PRESETS
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem, Epilogue
from dwconv.sources import kernel_source, without_includes
from dwconv.variants import REGISTRY
from problems import as_gradient


def problem(size, filter, padding=0, channels=32, **others):
    return DepthwiseProblem(8, channels, size, filter, padding=((padding, padding),) * len(size), **others)


LAST = {"layout": "channels_last"}
EVERYTHING = Epilogue("gelu", scale=True, shift=True, residual=True)
PROBLEMS = {
    "1x1": problem((56, 56), (1, 1)),
    "3x3": problem((512, 512), (3, 3)),
    "3x3-same": problem((112, 112), (3, 3), 1),
    "3x1": problem((512, 512), (3, 1)),
    "3x7": problem((128, 256), (3, 7)),
    "1x31": problem((64, 200), (1, 31), 15),
    "5x5-stride-2": problem((112, 112), (5, 5), 2, stride=(2, 2)),
    "3x3-stride-2x3": problem((57, 65), (3, 3), 1, stride=(2, 3)),
    "7x7": problem((56, 56), (7, 7), 3),
    "11x11": problem((64, 64), (11, 11), 5),
    "31x31": problem((56, 56), (31, 31), 15),
    "3x3-dilation-2": problem((64, 64), (3, 3), 2, dilation=(2, 2)),
    "3x3-dilation-1x3": problem((64, 64), (3, 3), 3, dilation=(1, 3)),
    "3x3-multiplier-3": problem((64, 64), (3, 3), 1, multiplier=3),
    "5x5-bias": problem((28, 28), (5, 5), 2, bias=True),
    "3x3-odd-width": problem((33, 67), (3, 3), 1, bias=True),
    "3x3-even-width": problem((33, 66), (3, 3)),
    "3x3-padding-4": problem((14, 14), (3, 3), 4),
    "3x3-unaligned": problem((64, 64), (3, 3), aligned=4),
    "3x3-7-wide": problem((7, 7), (3, 3), 1),
    "3x3-epilogue": problem((56, 56), (3, 3), 1, epilogue=EVERYTHING),
    # other dtypes
    "3x3-half": problem((112, 112), (3, 3), 1, dtype="float16"),
    "7x7-bfloat16": problem((56, 56), (7, 7), 3, dtype="bfloat16"),
    "31x31-half": problem((56, 56), (31, 31), 15, dtype="float16"),
    "3x3-7-wide-half": problem((7, 7), (3, 3), 1, dtype="float16"),
    "5x5-stride-2-half": problem((28, 28), (5, 5), 2, stride=(2, 2), dtype="float16"),
    "3x3-double": problem((57, 57), (3, 3), 1, dtype="float64"),
    "11x11-double": problem((64, 64), (11, 11), 5, dtype="float64"),
    # channels last
    "3x3-last": problem((112, 112), (3, 3), 1, **LAST),
    "3x3-last-half": problem((56, 56), (3, 3), 1, dtype="float16", **LAST),
    "3x3-last-odd-half": problem((56, 56), (3, 3), 1, channels=33, dtype="float16", **LAST),
    "5x5-stride-2-last-half": problem((28, 28), (5, 5), 2, stride=(2, 2), dtype="float16", **LAST),
    "7x7-last-bfloat16": problem((56, 56), (7, 7), 3, dtype="bfloat16", **LAST),
    "7x7-last": problem((56, 56), (7, 7), 3, **LAST),
    "31x31-last-half": problem((56, 56), (31, 31), 15, dtype="float16", **LAST),
    "3x3-last-double": problem((56, 56), (3, 3), 1, dtype="float64", **LAST),
    "3x3-last-epilogue-half": problem((14, 14), (3, 3), 1, dtype="float16", epilogue=EVERYTHING, **LAST),
    # one and three dimensions
    "4-causal-half": replace(problem((2048,), (4,), dtype="float16"), padding=((3, 0),)),
    "4-causal-last-half": replace(problem((2048,), (4,), dtype="float16", **LAST), padding=((3, 0),)),
    "9": problem((1000,), (9,), 4),
    "31-last": problem((1000,), (31,), 15, **LAST),
    "768-half": problem((768,), (768,), 384, dtype="float16"),
    "3x3x3": problem((8, 28, 28), (3, 3, 3), 1),
    "3x3x3-half": problem((8, 28, 28), (3, 3, 3), 1, dtype="float16"),
    "3x3x3-stride-2-half": problem((8, 28, 28), (3, 3, 3), 1, stride=(1, 2, 2), dtype="float16"),
    "3x3x3-last-half": problem((8, 28, 28), (3, 3, 3), 1, dtype="float16", **LAST),
    "5x5x5-last": problem((8, 14, 14), (5, 5, 5), 2, **LAST),
    "7x7x7": problem((16, 16, 16), (7, 7, 7), 3),
}

PLAN = choose(PROBLEMS["3x3"], H200, "one_per_thread")


def assert_sound(plans: list[Plan]) -> None:
    for plan, kernel in zip(plans, compile_many(plans), strict=True):
        what = f"{plan.variant} {plan.tile} on {plan.device.arch}"
        assert kernel.cubin.startswith(b"\x7fELF"), what
        assert kernel.resources.spill_bytes == kernel.resources.stack_bytes == 0, f"{what} spills: {kernel.resources}"
        assert 0 < kernel.resources.registers * plan.block[0] * plan.block[1] * plan.block[2] <= 65536, what


@pytest.mark.parametrize("variant", REGISTRY)
@pytest.mark.parametrize("arch", PRESETS)
def test_default_plans_compile_without_spills(arch, variant):
    """All problems on the H200's architecture, and each on one of the others."""
    others = [name for name in PRESETS if name != H200.arch]
    some = slice(None) if arch == H200.arch else slice(others.index(arch), None, len(others))
    posed = list(PROBLEMS.values())
    for direction in REGISTRY[variant].directions:
        if direction != "forward":
            posed = [as_gradient(each, direction) for each in posed]
    best = (candidates(each, PRESETS[arch], variant)[0] for each in posed[some])
    plans = [plan for plan in best if isinstance(plan, Plan)]
    assert plans or arch != H200.arch, "an architecture may lack a variant's instructions"
    assert_sound(plans)


@pytest.mark.parametrize("name", list(PROBLEMS)[::8])
def test_every_tile_compiles_without_spills(name):
    assert_sound([plan for plan in candidates(PROBLEMS[name], H200) if isinstance(plan, Plan)])


@pytest.fixture
def empty(set_variable, tmp_path):
    """An empty cache on disk, and none in memory."""
    set_variable("DWCONV_CACHE_DIR", str(tmp_path))
    return tmp_path


def entries(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_from_compiler_then_memory_then_disk(empty):
    built = compile_plan(PLAN)
    assert not built.from_cache
    assert compile_plan(PLAN) is built
    compile_module.forget()
    found = compile_plan(PLAN)
    assert found.from_cache
    assert (found.cubin, found.resources, found.entry) == (built.cubin, built.resources, "dwconv_kernel")
    assert len(entries(empty)) == 1


def test_a_kernel_compiled_elsewhere_needs_no_compiler(empty):
    elsewhere = replace(compile_plan(PLAN), entry="elsewhere")
    compile_module.forget()
    compile_module.remember(PLAN, elsewhere)
    assert compile_plan(PLAN) is elsewhere
    compile_module.forget()
    assert compile_plan(PLAN).entry == "dwconv_kernel"  # the disk has the other one


def test_compiling_twice_gives_the_same_bytes(set_variable):
    set_variable("DWCONV_CACHE_LIMIT", "0")
    first = compile_plan(PLAN).cubin
    compile_module.forget()
    again = compile_plan(PLAN)
    assert not again.from_cache
    assert again.cubin == first


def test_sizes_compile_nothing_new(empty):
    plans = [choose(problem((256 + 8 * i, 256 + 4 * i), (3, 3), 1), H200) for i in range(100)]
    compile_many(plans)
    assert len(entries(empty)) <= 4


def test_a_damaged_entry_is_compiled_again(empty):
    built = compile_plan(PLAN)
    (entry,) = entries(empty)
    whole = entry.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        entry.write_bytes(damaged)
        compile_module.forget()
        rebuilt = compile_plan(PLAN)
        assert not rebuilt.from_cache
        assert rebuilt.cubin == built.cubin
        assert entry.read_bytes() == whole


def test_a_sound_entry_of_other_content_is_compiled_again(empty):
    built = compile_plan(PLAN)
    (entry,) = entries(empty)
    for payload in (b"", b"no json\n", b"[1, 2]\n", b'{"unknown": 1}\n\x7fELF'):
        default_cache().put(entry.name, payload)
        compile_module.forget()
        rebuilt = compile_plan(PLAN)
        assert not rebuilt.from_cache
        assert rebuilt.cubin == built.cubin


def test_without_a_cache_folder_kernels_compile_all_the_same(set_variable, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    set_variable("DWCONV_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="DWCONV_CACHE_DIR"):
        assert compile_plan(PLAN).cubin


def test_a_changed_source_is_another_kernel(empty, monkeypatch):
    source = kernel_source(PLAN.variant)
    (name, text), *others = source.includes
    compile_plan(PLAN)
    for changed in (
        replace(source, text=source.text + "// changed\n"),
        replace(source, includes=((name, text + "// changed\n"), *others)),
    ):
        monkeypatch.setattr(compile_module, "kernel_source", lambda stem, changed=changed: changed)
        compile_module.forget()
        assert not compile_plan(PLAN).from_cache
    assert len(entries(empty)) == 3


def test_everything_that_decides_the_code_is_in_the_key():
    source = kernel_source("direct_nchw")
    keys = {
        cache_key(source, ["-DA=1"], "sm_90", "build"),
        cache_key(source, ["-DA=2"], "sm_90", "build"),
        cache_key(source, ["-DA=1", "-DB=1"], "sm_90", "build"),
        cache_key(source, ["-DA=1"], "sm_80", "build"),
        cache_key(source, ["-DA=1"], "sm_90", "other build"),
        cache_key(replace(source, stem="other"), ["-DA=1"], "sm_90", "build"),
        cache_key(replace(source, text=source.text + " "), ["-DA=1"], "sm_90", "build"),
        cache_key(replace(source, includes=()), ["-DA=1"], "sm_90", "build"),
    }
    assert len(keys) == 8


_PROCESS = """
from dwconv.choose import choose
from dwconv.compile import compile_plan
from dwconv.device import H200
from dwconv.problem import DepthwiseProblem, Epilogue
print(len(compile_plan(choose(DepthwiseProblem(8, 32, (512, 512), (3, 3)), H200, "one_per_thread")).cubin))
"""


def test_eight_processes_compile_at_once(empty):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", _PROCESS]
    workers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(8)]
    outputs = {worker.communicate(timeout=120)[0] for worker in workers}
    assert outputs == {f"{len(compile_plan(PLAN).cubin)}\n".encode()}
    assert len(entries(empty)) == 1


def test_a_kernel_from_disk_needs_no_compiler(empty):
    compile_plan(PLAN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = _PROCESS + "import sys; assert 'cuda.bindings' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)


def test_many_keeps_the_order(empty):
    plans = [choose(PROBLEMS[name], H200, "one_per_thread") for name in ("3x3", "7x7", "3x3", "1x1")]
    kernels = compile_many(plans)
    assert kernels == [compile_plan(plan) for plan in plans]
    assert kernels[0] is kernels[2]
    assert compile_many([]) == []


def test_an_error_shows_the_first_lines_of_the_log():
    broken = replace(PLAN, constants=(("ELEMENT", "no_such_type"), *(c for c in PLAN.constants if c[0] != "ELEMENT")))
    with pytest.raises(DepthwiseError, match=r'one_per_thread\.cuh.*sm_90(.|\n)*config\.cuh.*"no_such_type"') as caught:
        compile_plan(broken)
    assert len(str(caught.value).splitlines()) <= 8
    with pytest.raises(DepthwiseError, match="no_such_type"):
        compile_many([PLAN, broken])


@pytest.mark.parametrize("arch", ["sm_20", "sm_999", "hopper"])
def test_an_architecture_that_the_compiler_does_not_know(arch):
    unknown = replace(PLAN, device=replace(H200, arch=arch))
    with pytest.raises(DepthwiseError, match=f"doesn't know {arch}: it compiles for .*sm_90"):
        compile_plan(unknown)


def test_a_compiler_that_is_not_there(set_variable, empty, tmp_path):
    set_variable("DWCONV_NVRTC", "/nowhere/libnvrtc.so.13")
    with pytest.raises(DepthwiseError, match=r"/nowhere/libnvrtc\.so\.13 can't be read.*unset it"):
        compile_plan(PLAN)
    (tmp_path / "libnvrtc.so").write_text("no library")
    set_variable("DWCONV_NVRTC", str(tmp_path / "libnvrtc.so"))
    with pytest.raises(DepthwiseError, match=r"can't be loaded.*unset it"):
        compile_plan(PLAN)


def test_without_cuda_bindings_the_remedy_is_named(set_variable, empty, monkeypatch):
    set_variable("DWCONV_NVRTC", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DepthwiseError, match="pip install cuda-bindings nvidia-cuda-nvrtc"):
        compile_plan(PLAN)


def test_the_compiler_named_by_the_variable_is_taken(set_variable, empty):
    set_variable("DWCONV_NVRTC", None)
    expected = nvrtc.expected_build()
    assert expected == nvrtc.compiler().build
    library = nvrtc._loaded_library()
    set_variable("DWCONV_NVRTC", str(library))
    assert nvrtc.compiler().build == expected


def test_a_build_is_told_by_its_build_id(tmp_path):
    library = nvrtc._loaded_library()
    with library.open("rb") as file:
        start = file.read(4096)
    copy = tmp_path / "libnvrtc.so"
    copy.write_bytes(start)
    assert nvrtc.build_of(copy) == nvrtc.build_of(library)
    for damaged in (b"", start[:64], start[:100], b"\x7fELF\x02\x01" + b"\xff" * 4090):
        copy.write_bytes(damaged)
        nvrtc.build_of.cache_clear()
        assert str(copy) in nvrtc.build_of(copy)
    nvrtc.build_of.cache_clear()


def test_the_report_of_several_functions():
    log = """ptxas info    : Compiling entry function 'dwconv_kernel' for 'sm_90'
ptxas info    : Function properties for dwconv_kernel
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 69 registers, used 1 barriers, 16 bytes stack, 1024 bytes smem, 488 bytes cmem[0]
ptxas info    : Function properties for other
    8 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads"""
    assert read_report(log) == Resources(registers=69, stack_bytes=16, spill_bytes=16, shared_bytes=1024)
    assert read_report("") == Resources(0, 0, 0, 0)


def test_sources_split_at_the_border():
    for stem in REGISTRY:
        source = kernel_source(stem)
        assert source.template + without_includes(source.border) == without_includes(source.text)
        assert "DWCONV_" not in source.template.replace("DWCONV_EMULATOR", ""), "macros stand below the border"
        assert "#include" not in source.template
        assert 'extern "C" __global__' in source.border
        names = [name for name, _ in source.includes]
        assert names.index("elements.cuh") < names.index("common.cuh") < names.index("config.cuh"), "the included first"


def test_a_missing_kernel_file():
    with pytest.raises(DepthwiseError, match=r"kernels/nothing\.cuh can't be read"):
        kernel_source("nothing")
