"""Exported files: the judges' rules, the rewritten model, the CUDA and C++ sources, their launches beside the plans."""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dwconv.choose import candidates
from dwconv.device import H200
from dwconv.errors import DepthwiseError
from dwconv.optimize import cuda_source
from dwconv.optimize.launches import has_launch, host_text, launch_texts
from dwconv.optimize.model_file import load
from dwconv.optimize.model_source import twin_source
from dwconv.optimize.specialise import best_exportable
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem
from dwconv.sources import kernel_source, without_includes
from dwconv.variants import REGISTRY
from model_files import EXAMPLE_FILES, ZOO, exported, load_both, write
from problems import EDGE_PROBLEMS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # a layer of the zoo


@pytest.fixture(params=[*EXAMPLE_FILES, ZOO], ids=lambda p: p.stem if isinstance(p, Path) else "zoo")
def path(request, tmp_path):
    return request.param if isinstance(request.param, Path) else write(tmp_path, request.param)


# ---- the judges' rules ----

REJECTED = [
    r"\btry\s*:",
    r"\bexcept\b",
    r"\bpass\b",
    r"\bthreading\b",
    r"\bmultiprocessing\b",
    r"\bconcurrent\b",
    r"class\s+\w+\s*\([^)]*\bTensor\b",
    r"_make_(wrapper_)?subclass",
    r"__file__",
    r"sm_\d+a\b",
]


def without_comments(text: str) -> str:
    return "\n".join(re.split(r"#|//", line)[0] for line in text.splitlines())


def test_static_check(path):
    text = exported(path)[1].text("# header")
    code = without_comments(text)
    assert [pattern for pattern in REJECTED if re.search(pattern, code)] == []
    assert "__global__" in code
    assert "load_inline" in code


def test_runs_in_the_references_namespace(path):
    _, export = exported(path)
    both = load_both(path, export.text("# header"))
    assert both.after["__name__"] == "builtins"
    for name in ("get_inputs", "get_init_inputs"):
        assert both.before[name].__code__.co_code == both.after[name].__code__.co_code
        assert both.before[name].__code__.co_consts == both.after[name].__code__.co_consts
    for name, value in both.before.items():
        if name != "__doc__" and isinstance(value, (int, float, str, tuple, list)):
            assert both.after[name] == value, name
    added = set(both.after) - set(both.before)
    assert all(re.match(r"(DEPTHWISE_|Depthwise|use_depthwise_|ModelNew$|torch$)", name) for name in added), added
    assert both.after["Model"] is both.before["Model"]


def test_same_weights_and_results(path):
    _, export = exported(path)
    both = load_both(path, export.text("# header"))
    models = []
    for name in ("Model", "ModelNew"):
        torch.manual_seed(42)
        models.append(both.after[name](*both.after["get_init_inputs"]()))
    original, new = models
    assert list(original.state_dict()) == list(new.state_dict())
    for key, value in original.state_dict().items():
        assert torch.equal(value, new.state_dict()[key]), key
    assert any(type(layer).__name__ == "DepthwiseConv2d" for layer in new.modules())
    channels = next(layer for layer in original.modules() if isinstance(layer, torch.nn.Conv2d)).in_channels
    x = torch.rand(2, channels, 18, 20)
    for model in models:
        torch.manual_seed(0)
        model.eval()
    assert torch.equal(original(x), new(x))


def test_only_the_model_changes(path):
    """Comments and formatting survive: the twin's text is the original's, but for a few lines."""
    file, export = exported(path)
    twin = (export.twin.before + export.twin.model).splitlines()
    original = file.source.splitlines()
    changed = [line for line in original if line not in twin]
    assert all(re.search(r"\bModel\b|\bpass\b|\bexcept\b", line) for line in changed), changed
    assert len(twin) <= len(original) + 1


def test_clashing_names_are_avoided(tmp_path):
    text = ZOO.replace("class Empty", "def use_depthwise_kernels(): ...\n\n\nDEPTHWISE_CPP = 3\n\n\nclass Empty")
    path = write(tmp_path, text)
    both = load_both(path, exported(path)[1].text("# header"))
    assert both.after["DEPTHWISE_CPP"] == 3
    assert both.after["use_depthwise_kernels"]() is None
    assert "DEPTHWISE_CPP_2" in both.after
    torch.manual_seed(0)
    assert type(both.after["ModelNew"](6).plain).__name__ == "DepthwiseConv2d"


def test_header_comes_before_a_future_import(tmp_path):
    path = write(tmp_path, ZOO)
    text = exported(path)[1].text("# header")
    assert text.startswith("# header\n")
    ast.parse(text)


# ---- the rewritten constructor ----

PARTS = """
import torch
from torch import nn


{model}


def get_inputs():
    return [torch.rand(1, 4, 12, 12)]


def get_init_inputs():
    return [{arguments}]
"""
BASE = """class Base(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, groups=channels)

    def forward(self, x):
        return self.conv(x)


"""
MODELS = {
    "early return": """class Model(nn.Module):
    def __init__(self, channels, twice=False):
        super(Model, self).__init__()
        self.conv = nn.Conv2d(channels, channels, 3, groups=channels)
        if not twice:
            return
        self.second = nn.Conv2d(channels, channels, 3, groups=channels)
        def inner():
            return 3

    def forward(self, x):
        return self.conv(x)""",
    "ends in return": """class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, groups=channels)
        return None

    def forward(self, x):
        return self.conv(x)""",
    "no constructor": BASE + "class Model(Base):\n    '''Documented.'''\n\n    extra = 1",
    "no constructor, decorated method": BASE
    + "class Model(Base):\n    @property\n    def extra(self):\n        return 1",
    "empty class": BASE + "class Model(Base):\n    pass",
    "one line": BASE + "class Model(Base): pass",
    "one-line constructor": BASE + "class Model(Base):\n    def __init__(self, channels): super().__init__(channels)",
    "tabs": "class Model(nn.Module):\n\tdef __init__(this, channels):\n\t\tsuper().__init__()\n"
    "\t\tthis.conv = nn.Conv2d(channels, channels, 3, groups=channels)\n\n"
    "\tdef forward(self, x):\n\t\treturn self.conv(x)",
    "not ASCII": """class Model(nn.Module):
    def __init__(self, channels):
        π = "×××"; super(Model, self).__init__()  # Model × π
        self.conv = nn.Conv2d(channels, channels, 3, groups=channels); self.name = (
            "é" "Model")

    def forward(self, x):
        '''Model(x)'''
        return self.conv(x)""",
    "nested end": """class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for _ in range(1):
            if channels:
                self.conv = nn.Conv2d(
                    channels, channels, 3, groups=channels
                )  # here

        # the end

    def forward(self, x):
        return self.conv(x)""",
}


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_of_constructor(name, tmp_path):
    path = write(tmp_path, PARTS.format(model=MODELS[name], arguments="4"))
    text = exported(path)[1].text("# header")
    assert not re.search(r"\bpass\b", without_comments(text))
    both = load_both(path, text)
    model = both.after["ModelNew"](*both.after["get_init_inputs"]())
    assert type(model.conv).__name__ == "DepthwiseConv2d"
    assert type(both.after["Model"](4).conv) is torch.nn.Conv2d


def test_code_after_the_class_uses_the_new_name(tmp_path):
    text = PARTS.format(model=MODELS["ends in return"], arguments="4") + "\nmade = Model(4)\n"
    path = write(tmp_path, text)
    both = load_both(path, exported(path)[1].text(""))
    assert type(both.after["made"]).__name__ == "ModelNew"


def test_a_file_with_model_new_is_refused(tmp_path):
    path = write(tmp_path, ZOO + "\nModelNew = Model\n")
    with pytest.raises(DepthwiseError, match="already uses the name ModelNew"):
        twin_source(load(path), "switch")


def test_words_that_stay_forbidden_are_named(tmp_path):
    path = write(tmp_path, ZOO + "\ntry:\n    size = 3\nexcept ValueError:\n    size = 4\n")
    assert [line.split(": ", 1)[1] for line in exported(path)[1].twin.forbidden] == ["try:", "except"]


# ---- the sources ----


def test_name_follows_the_content(tmp_path):
    first = exported(write(tmp_path, ZOO))[1].extension
    second = exported(write(tmp_path, ZOO.replace("(3, 5), padding=(1, 2)", "(3, 7), padding=(1, 3)")))[1].extension
    again = exported(write(tmp_path, ZOO))[1].extension
    assert first.name == again.name != second.name
    assert first.name in first.cpp
    assert first.name in first.cuda


def test_constants_of_every_kernel_are_the_plans(path):
    from dwconv.optimize.find import find_layers
    from dwconv.optimize.specialise import specialise

    file, export = exported(path)
    made, _ = specialise(find_layers(file).found, H200)
    for s in made:
        config = re.search(rf"struct {s.camel}Config \{{(.*?)\n\}};", export.extension.cuda, re.DOTALL)
        assert config, s.name
        members = dict(re.findall(r"\b(k\w+|Element) = (-?\w+)", config.group(1)))
        for name, value in s.plan.constants:
            member = "Element" if name == "ELEMENT" else "k" + "".join(w.capitalize() for w in name.split("_"))
            assert members[member] in (str(value), {0: "false", 1: "true"}.get(value)), (s.name, name)
        assert "DWCONV_" not in config.group(1)


NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_nvcc_compiles_the_kernels(path, tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text(exported(path)[1].extension.cuda, encoding="utf-8")
    command = [str(NVCC), "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas=-v", "-c", "-o", "/dev/null", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"([1-9]\d*) bytes spill", result.stderr) == []


def cuda_include() -> str | None:
    roots = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", str(Path(NVCC).resolve().parents[1]) if NVCC else ""]
    return next((f"{root}/include" for root in roots if Path(root, "include/cuda_runtime_api.h").is_file()), None)


@pytest.mark.skipif(cuda_include() is None or shutil.which("g++") is None, reason="needs CUDA's headers and g++")
def test_gcc_accepts_the_operator(tmp_path):
    """One file with several configurations, with and without a bias, against PyTorch's own headers."""
    source = tmp_path / "operator.cpp"
    source.write_text(exported(write(tmp_path, ZOO))[1].extension.cpp, encoding="utf-8")
    include = Path(torch.__file__).parent / "include"
    folders = [include, include / "torch/csrc/api/include", str(cuda_include())]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wno-attributes", "-Werror", str(source)]
    command += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *(f"-isystem{folder}" for folder in folders)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- launches: C++ beside Python ----

# What launches need of CUDA: templates of kernels are only parsed, except for the constants in them.
STUBS = """
#include <cmath>
#include <cstdio>
#define DWCONV_EMULATOR
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static dim3 blockIdx, threadIdx, gridDim, blockDim;
inline float __uint_as_float(unsigned) { return 0; }
inline unsigned __float_as_uint(float) { return 0; }
inline void __syncthreads() {}
inline void __syncwarp() {}
inline bool __any_sync(unsigned, bool any) { return any; }
template <class T> T __shfl_sync(unsigned, T value, int, int = 32) { return value; }
template <class T> T __shfl_xor_sync(unsigned, T value, unsigned) { return value; }
enum { cudaSuccess, cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel> int cudaFuncSetAttribute(Kernel*, int, int) { return cudaSuccess; }
inline int cudaGetLastError() { return cudaSuccess; }
namespace dwconv {
inline float half_to_float(unsigned short) { return 0; }
inline unsigned short float_to_half(float) { return 0; }
template <class T> T* shared_memory();
}
"""
# What random problems hardly meet: strips of a warp, lines whose halves mirror each other.
RARE = {
    "direct_nchw": DepthwiseProblem(2, 6, (20, 510), (3, 3), padding=((1, 1), (1, 1)), dtype="float16"),
    "wide_nchw": DepthwiseProblem(4, 6, (56, 40), (51, 5), padding=((25, 25), (2, 2))),
}
LAUNCHED = [stem for stem in REGISTRY if has_launch(stem)]


def random_problem(rng: random.Random) -> DepthwiseProblem:
    while True:
        try:
            return DepthwiseProblem(
                batch=rng.choice([0, 1, 2, 7, 64]),
                channels=rng.choice([1, 3, 8, 64, 1280]),
                size=(rng.randint(1, 300), rng.choice([rng.randint(1, 600), 4 * rng.randint(1, 150)])),
                filter=(rng.randint(1, 7), rng.choice([1, 2, 3, 5, 7, 11, 31])),
                stride=(rng.randint(1, 3), rng.randint(1, 3)),
                padding=((rng.randint(0, 4),) * 2, (rng.randint(0, 4),) * 2),
                dilation=(rng.randint(1, 3), rng.randint(1, 2)),
                multiplier=rng.choice([1, 1, 2, 3]),
                bias=rng.random() < 0.5,
            )
        except DepthwiseError:
            continue


def test_launches_are_those_of_variants():
    for name in os.listdir(Path(cuda_source.__file__).parent / "host"):
        assert "_launch(const Sizes& sizes" not in host_text(name) or Path(name).stem in LAUNCHED, name
    for stem in LAUNCHED:
        assert f"{stem}_launch(const Sizes& sizes, const void*" in host_text(f"{stem}.cuh")


def test_every_problem_of_a_layer_has_a_kernel_that_can_be_exported():
    """Also where the fastest variant has no launch in C++."""
    for problem in EDGE_PROBLEMS:
        assert has_launch(best_exportable(problem, H200).variant)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("stem", LAUNCHED)
def test_launches_are_the_plans(stem, tmp_path):
    rng = random.Random(stem)
    plans = REGISTRY[stem].every_plan(RARE[stem], H200) if stem in RARE else []
    while len(plans) < 60:
        legal = [plan for plan in candidates(random_problem(rng), H200, stem) if isinstance(plan, Plan)]
        plans += rng.sample(legal, min(len(legal), 2))
    source = kernel_source(stem)
    parts = [STUBS, *(without_includes(text) for name, text in source.includes if name != "config.cuh")]
    parts.append(source.template)
    parts += [text.replace("#include <cuda_runtime.h>", "") for text in launch_texts([stem])]
    calls = []
    for number, plan in enumerate(plans):
        parts.append(f"struct Config{number} {{\n{cuda_source.config_members(stem, plan.constants)}\n}};")
        calls.append(f"    show({stem}_launch<Config{number}>({{{', '.join(map(str, plan.sizes))}}}, nullptr));")
    parts.append(
        """
using namespace dwconv;
template <class L> void show(const L& launch) {
    const unsigned* words = reinterpret_cast<const unsigned*>(&launch.tiling);
    for (unsigned i = 0; i < sizeof(launch.tiling) / sizeof(unsigned); ++i) std::printf("%u ", words[i]);
    std::printf("%u %u %u %u %u %u %u %d\\n", launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x,
                launch.block.y, launch.block.z, launch.shared_bytes, launch.possible);
}
int main() {
"""
        + "\n".join(calls)
        + "\n}"
    )
    program, binary = tmp_path / "launches.cpp", tmp_path / "launches"
    program.write_text("\n".join(parts), encoding="utf-8")
    command = ["g++", "-std=c++17", "-w", "-fpermissive", "-o", str(binary), str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[:4000]
    shown = subprocess.run([binary], capture_output=True, text=True, check=True).stdout.splitlines()
    for line, plan in zip(shown, plans, strict=True):
        wanted = [*plan.tiling, *plan.grid, *plan.block, plan.shared_bytes, 1]
        assert list(map(int, line.split())) == wanted, plan
