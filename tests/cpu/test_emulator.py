"""The emulator keeps CUDA's promises, and turns what CUDA leaves undefined into poison or a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from dwconv import DepthwiseError, emulator, reference
from dwconv.choose import choose
from dwconv.device import H200
from dwconv.emulator import EmulationError, build
from dwconv.problem import DepthwiseProblem
from dwconv.sources import kernel_source, without_includes
from emulated_kernels import run_kernel
from problems import make_inputs

ORDERS = (None, 0, 1, 2, 3)
in_any_order = pytest.mark.parametrize("order_seed", ORDERS)


@pytest.fixture(params=["assembly", "ucontext"])
def stack_switch(request, monkeypatch):
    """Both ways of leaving one stack for another."""
    if request.param == "ucontext":
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DDWCONV_EMULATOR_UCONTEXT"))
    build.forget()
    yield request.param
    monkeypatch.undo()
    build.forget()


def floats(count, value=float("nan")):
    return torch.full((count,), value)


def ints(count, value=-7):
    return torch.full((count,), value, dtype=torch.int32)


# ---- threads and blocks ----


@in_any_order
def test_every_thread_of_every_block_runs_once(order_seed):
    grid, block = (3, 2, 5), (4, 3, 2)
    seen = ints(720, 0)
    body = """
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    a[block * 24 + thread] += 1 + block;
    """
    run_kernel(body, seen, grid=grid, block=block, order_seed=order_seed)
    assert seen.tolist() == [1 + i // 24 for i in range(720)]


@in_any_order
def test_barriers_hold_threads_together(stack_switch, order_seed):
    body = """
    float* s = dwconv::shared_memory<float>();
    for (int round = 0; round < 3; ++round) {
        s[t] = a[t];
        __syncthreads();
        a[t] = s[(t + 37) % 96] + 1;
        __syncthreads();
    }
    """
    a = torch.arange(96.0)
    run_kernel(body, a, block=96, shared_bytes=96 * 4, order_seed=order_seed)
    assert a.tolist() == [(i + 3 * 37) % 96 + 3.0 for i in range(96)]


def test_a_missing_barrier_reads_poison():
    body = "float* s = dwconv::shared_memory<float>(); s[t] = a[t]; a[t] = s[(t + 1) % 64];"
    a = torch.arange(64.0)
    run_kernel(body, a, block=64, shared_bytes=256)
    assert a.isnan().any()


def test_a_missing_second_barrier_changes_the_result():
    body = """
    float* s = dwconv::shared_memory<float>();
    s[t] = t;
    __syncthreads();
    a[t] = s[(t + 1) % 64];
    SECOND
    s[t] = -1;
    """
    right, wrong = floats(64), floats(64)
    run_kernel(body.replace("SECOND", "__syncthreads();"), right, block=64, shared_bytes=256)
    run_kernel(body.replace("SECOND", ""), wrong, block=64, shared_bytes=256)
    assert right.tolist() == [(i + 1) % 64 for i in range(64)]
    assert -1 in wrong.tolist()


def test_shared_memory_is_poisoned_for_every_block():
    body = "float* s = dwconv::shared_memory<float>(); a[blockIdx.x * 32 + t] = s[t]; s[t] = 1;"
    a = floats(128, 0.0)
    run_kernel(body, a, grid=4, shared_bytes=128)
    assert a.isnan().all()


def test_threads_that_have_returned_do_not_hold_a_barrier():
    body = "if (t >= 40) return; __syncthreads(); a[t] = t;"
    a = floats(64, -1.0)
    run_kernel(body, a, block=64)
    assert a.tolist() == [*range(40), *[-1.0] * 24]


@in_any_order
def test_barriers_that_count(order_seed):
    body = """
    a[t] = __syncthreads_count(t % 3 == 0);
    b[t] = __syncthreads_and(t < 50) + 2 * __syncthreads_or(t == 49) + 4 * __syncthreads_and(1);
    """
    a, b = ints(50), ints(50)
    run_kernel(body, a, b, block=50, order_seed=order_seed)
    assert a.tolist() == [17] * 50
    assert b.tolist() == [7] * 50


def test_different_barriers_do_not_meet():
    body = "if (t < 8)\n  __syncthreads();\nelse\n  __syncthreads();\n"
    with pytest.raises(
        EmulationError, match=r"different barriers: thread \(0,0,0\) at line 2, thread \(8,0,0\) at line"
    ):
        run_kernel(body)


# ---- warps ----

SHUFFLES = {
    "__shfl_sync": lambda lane, by, first, last: first + by % (last - first + 1),
    "__shfl_up_sync": lambda lane, by, first, last: lane - by if lane - by >= first else lane,
    "__shfl_down_sync": lambda lane, by, first, last: lane + by if lane + by <= last else lane,
    "__shfl_xor_sync": lambda lane, by, first, last: lane ^ by if lane ^ by <= last else lane,
}


@pytest.mark.parametrize("width", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffles(name, width, stack_switch):
    body = f"for (int by = 0; by < 32; ++by) a[by * 64 + t] = {name}(0xffffffffu, 100.0f + t, by, {width});"
    for order_seed in (None, 1):
        a = floats(32 * 64)
        run_kernel(body, a, block=64, order_seed=order_seed)
        for by in range(32):
            for t in range(64):
                first = t % 32 // width * width
                source = SHUFFLES[name](t % 32, by, first, first + width - 1)
                assert a[by * 64 + t] == 100 + t // 32 * 32 + source, (by, t)


def test_shuffles_move_two_four_and_eight_bytes():
    body = """
    a[t] = __shfl_xor_sync(~0u, 1e300 * t, 1);
    b[t] = __shfl_xor_sync(~0u, (long long)t << 40, 1);
    b[t] += __shfl_xor_sync(~0u, (unsigned short)(40000 + t), 1);
    """
    a, b = torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.int64)
    run_kernel(body, a, b)
    assert a.tolist() == [1e300 * (t ^ 1) for t in range(32)]
    assert b.tolist() == [((t ^ 1) << 40) + 40000 + (t ^ 1) for t in range(32)]


def test_parts_of_a_warp_meet_by_themselves():
    body = """
    const unsigned mask = t < 16 ? 0x0000ffffu : 0xffff0000u;
    float value = t;
    for (int round = 0; round < (t < 16 ? 4 : 1); ++round) value = __shfl_xor_sync(mask, value, 1, 16) + 1;
    a[t] = value;
    """
    a = floats(32)
    run_kernel(body, a)
    assert a.tolist() == [t + 4.0 if t < 16 else (t ^ 1) + 1.0 for t in range(32)]


def test_a_lane_that_takes_no_part_gives_poison():
    body = "if (t < 8) { a[t] = __shfl_down_sync(0xffu, 1.0f, 4); b[t] = __shfl_sync(0xffu, 5, 8 + t); }"
    a, b = floats(8, 0.0), ints(8)
    run_kernel(body, a, b)
    assert a[:4].tolist() == [1.0] * 4
    assert a[4:].isnan().all()
    assert b.tolist() == [-1] * 8


@in_any_order
def test_votes(order_seed):
    body = """
    a[t] = __ballot_sync(0xffffffffu, t % 5 == 0);
    b[t] = __all_sync(0xffffffffu, t < 32) + 2 * __any_sync(0xffffffffu, t == 31) + 4 * __any_sync(~0u, t == 32);
    __syncwarp();
    """
    a, b = ints(32), ints(32)
    run_kernel(body, a, b, order_seed=order_seed)
    assert a.tolist() == [sum(1 << t for t in range(0, 32, 5))] * 32
    assert b.tolist() == [3] * 32


# a kernel's body, and the end of the sentence it gets
MISTAKES = {
    "if (t != 5) __shfl_sync(~0u, t, 0);": (
        "in warp 0: lanes 0xffffffdf in __shfl_sync with mask 0xffffffff at line 1; lanes 0x00000020 have returned"
    ),
    "if (t < 4)\n  __syncwarp();\nelse\n  __syncthreads();": (
        "lanes 0x0000000f in __syncwarp with mask 0xffffffff at line 2; lanes 0xfffffff0 at the barrier at line 4; "
        "all lanes of a mask must make the same call"
    ),
    "if (t < 16)\n  __any_sync(~0u, 1);\nelse\n  __all_sync(~0u, 1);": "lanes 0x0000ffff in __any_sync",
    "if (t < 16)\n  __syncwarp();\nelse\n  __syncwarp();": (
        "at line 2; lanes 0xffff0000 in __syncwarp with mask 0xffffffff at line 4"
    ),
    "__shfl_sync(t < 16 ? ~0u : 0xffff0000u, t, 0);": "threads wait for each other for ever",
    "if (t == 3) __ballot_sync(0x7u, 1);": (
        "block (0,0,0), thread (3,0,0): lane 3 calls __ballot_sync with mask 0x00000007, which doesn't name it"
    ),
    "__shfl_sync(~0u, t, 0, 12);": "width 12: it must be a power of two up to 32",
    "dwconv::shared_memory<float>()[t] = 0;": "the plan gives it none: set shared_bytes",
    "if (t == 9) __trap();": "thread (9,0,0): the kernel called __trap()",
    "__ldg(reinterpret_cast<const uint4*>(a + 1));": "__ldg of 16 bytes at",
    "volatile char local[300000]; for (int i = 0; i < 300000; ++i) local[i] = t;": "overflowed its stack",
}


@pytest.mark.parametrize("body", MISTAKES, ids=range(len(MISTAKES)))
@pytest.mark.parametrize("order_seed", [None, 1])
def test_mistakes_get_a_sentence(body, order_seed):
    with pytest.raises(EmulationError) as error:
        run_kernel(body, floats(64), order_seed=order_seed)
    assert MISTAKES[body] in str(error.value)
    a = floats(32)
    run_kernel("a[t] = t;", a)  # the process goes on as if nothing had happened
    assert a.tolist() == list(range(32))


def test_a_mask_must_not_name_lanes_beyond_the_block():
    with pytest.raises(EmulationError, match="its last warp holds 0x000000ff"):
        run_kernel("__syncwarp();", block=40)


# ---- memory and arithmetic ----


def test_atomics_over_blocks():
    body = "atomicAdd(a, 1); atomicAdd(b, 0.5f); atomicAdd(c, 0.25); atomicAdd((unsigned*)a + 1, 2u);"
    a, b, c = ints(2, 0), floats(1, 0.0), torch.zeros(1, dtype=torch.float64)
    run_kernel(body, a, b, c, grid=1000, block=64)
    assert (a.tolist(), b.item(), c.item()) == ([64000, 128000], 32000.0, 16000.0)


def test_arithmetic():
    body = """
    a[0] = fmaf(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f);
    a[1] = min(3, max(1, 2)) + fminf(0.5f, fmaxf(0.25f, 0.125f));
    a[2] = __popc(0xf0u) + __clz(1) + __ffs(8) + __umulhi(1u << 31, 6u);
    const float4 v = __ldg(reinterpret_cast<const float4*>(a) + 1);
    a[3] = v.x + v.w;
    """
    a = torch.tensor([0, 0, 0, 0, 1.5, 0, 0, 2.0])
    run_kernel(body, a, block=1)
    assert a[:4].tolist() == [2.0**-11 + 2.0**-24, 2.25, 4 + 31 + 4 + 3, 3.5]


# ---- launches and builds ----


def test_limits_of_a_launch():
    for arguments, match in (
        ({"block": 1025}, "1024 is the most"),
        ({"block": (1, 1, 65)}, "64 in z"),
        ({"grid": (1, 65536, 1)}, "65535 in y and z"),
        ({"grid": 0}, "at least 1"),
        ({"shared_bytes": 228 * 1024}, "may take up to"),
    ):
        with pytest.raises(EmulationError, match=match):
            run_kernel("", **arguments)


PROBLEM = DepthwiseProblem(2, 3, (17, 23), (3, 3), padding=((1, 1), (1, 1)))


def tensors(problem=PROBLEM):
    return torch.randn(problem.x_shape), torch.randn(problem.weight_shape), None, torch.empty(problem.y_shape)


def test_arguments_must_be_those_of_the_kernel():
    plan = choose(PROBLEM, H200, "one_per_thread")
    with pytest.raises(EmulationError, match="the kernel takes arguments of"):
        emulator.run(replace(plan, sizes=plan.sizes[:-1]), *tensors())


def test_tensors_must_be_those_of_the_plan():
    plan = choose(PROBLEM, H200)
    x, weight, bias, y = tensors()
    for wrong, match in (
        ((x[:1], weight, bias, y), "x is"),
        ((x, weight.double(), bias, y), "weight is"),
        ((x, weight, torch.zeros(3), y), "without a bias"),
        ((x.transpose(2, 3).contiguous().transpose(2, 3), weight, bias, y), "x has strides"),
        ((x, weight, bias, y.transpose(2, 3).contiguous().transpose(2, 3)), "y has strides"),
        ((torch.randn(x.numel() + 1)[1:].view(x.shape), weight, bias, y), "not a multiple of 16"),
    ):
        with pytest.raises(ValueError, match=match):
            emulator.run(plan, *wrong)


def test_progress_ends_with_all_blocks():
    plan = choose(PROBLEM, H200, "one_per_thread")
    told = []
    emulator.run(plan, *tensors(), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (plan.grid[0], plan.grid[0])


@pytest.mark.parametrize("level", ["2", "3"])
def test_kernels_may_be_optimized(set_variable, level):
    """Tests take kernels as they are; users get optimized ones, whose multiply-adds round once where the CPU can."""
    set_variable("DWCONV_EMULATOR_OPTIMIZE", level)
    problem = DepthwiseProblem(2, 3, (9, 33), (3, 3), padding=((1, 1), (1, 1)))
    x, weight, _ = make_inputs(problem)
    for variant in ("direct_nchw", "wide_nchw", "one_per_thread"):
        y = torch.full(problem.y_shape, torch.nan)
        emulator.run(choose(problem, H200, variant), x, weight, None, y)
        assert reference.describe_mismatch(y, *reference.forward(x, weight, None, problem)) is None
    a, b = torch.tensor([1 + 2.0**-12] * 32), torch.tensor([-(1 + 2.0**-11)] * 32)
    run_kernel("b[t] = a[t] * a[t] + b[t];", a, b)
    assert set(b.tolist()) == {2.0**-24 if build._machine_flags() else 0.0}


def test_os_threads_share_the_blocks(set_variable):
    inputs = tensors()
    results = []
    for threads in ("1", "5"):
        set_variable("DWCONV_EMULATOR_THREADS", threads)
        inputs[3].fill_(float("nan"))
        emulator.run(choose(PROBLEM, H200), *inputs)
        results.append(inputs[3].clone())
    assert torch.equal(*results)
    assert reference.describe_mismatch(results[0], *reference.forward(*inputs[:3], PROBLEM)) is None


def test_python_threads_may_emulate_at_once():
    inputs = [tensors() for _ in range(8)]
    plan = choose(PROBLEM, H200)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: emulator.run(plan, *each), inputs))
    for x, weight, bias, y in inputs:
        assert reference.describe_mismatch(y, *reference.forward(x, weight, bias, PROBLEM)) is None


def test_a_kernel_that_does_not_compile():
    with pytest.raises(DepthwiseError, match=r"can't compile a test's kernel(.|\n)*kernel:1:.*no_such_name"):
        run_kernel("no_such_name();")
    with pytest.raises(DepthwiseError, match="static __shared__ is not emulated"):
        run_kernel("__shared__ float s[32];")


def test_no_compiler(set_variable):
    set_variable("DWCONV_CXX", "no-such-compiler")
    build.forget()
    with pytest.raises(DepthwiseError, match="'no-such-compiler', which is not on the PATH: install g"):
        run_kernel("")
    build.forget()


def test_sanitized_kernels_need_the_sanitizer_from_the_start(set_variable):
    if build.sanitizing():
        pytest.skip("it is there")
    set_variable("DWCONV_EMULATOR_SANITIZE", "1")
    with pytest.raises(DepthwiseError, match=r"run Python with LD_PRELOAD=.*libasan"):
        run_kernel("")


def test_a_second_process_finds_the_kernel_in_the_cache(monkeypatch):
    run_kernel("a[t] = 41 + t;", a := floats(32))
    build.forget()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    run_kernel("a[t] = 41 + t;", a)
    with pytest.raises(pytest.fail.Exception):
        run_kernel("a[t] = 42 + t;", a)


def test_threads_that_want_the_same_kernel_compile_it_once(monkeypatch):
    compiled = []
    compile_ = build._compile
    monkeypatch.setattr(build, "_compile", lambda *args: (compiled.append(args[2]), compile_(*args))[1])
    body = "a[t] = 1234 * t;"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: run_kernel(body, floats(32)), range(8)))
    assert len(compiled) == 1


def test_many_processes_at_once(tmp_path):
    program = (
        "import torch; from emulated_kernels import run_kernel; a = torch.zeros(32); "
        "run_kernel('a[t] = 77 * t;', a); assert a[31] == 77 * 31"
    )
    environment = os.environ | {"DWCONV_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4


# ---- emulated() ----


def test_emulated_nests_and_holds_for_its_thread():
    assert emulator.active() is None
    seen = []
    with emulator.emulated(variant="tile16", order_seed=3) as outer:
        assert emulator.active() is outer
        assert (outer.variant, outer.arch, outer.order_seed) == ("tile16", "sm_90", 3)
        with emulator.emulated(arch="sm_80") as inner:
            assert emulator.active() is inner
        assert emulator.active() is outer
        thread = threading.Thread(target=lambda: seen.append(emulator.active()))
        thread.start()
        thread.join()
    assert emulator.active() is None
    assert seen == [None]


def test_a_box_begins_at_a_multiple_of_16_bytes():
    """On a GPU it is an illegal instruction."""
    texts = dict(kernel_source("wide_nhwc").includes)
    needed = list(texts)[: list(texts).index("tensor_copies.cuh") + 1]
    before = "\n".join(without_includes(texts[name]) for name in needed)
    x = torch.arange(64, dtype=torch.float32)
    words = (x.data_ptr(), 64, 1, 1, 1, 256, 256, 256, 8, 1, 1, 1, 4, 0)
    fields = "".join(f"map.words[{k}] = {word}ull; " for k, word in enumerate(words))
    kernel = f"""
        dwconv::TensorMap map = {{}}; {fields}
        if (t == 0) dwconv::send_box<false>(0, dwconv::shared_memory<float>(), map, FIRST, 0, 0, 0);
        a[t] = dwconv::shared_memory<float>()[t];"""
    found = torch.zeros(8)
    run_kernel(kernel.replace("FIRST", "-4"), found, block=8, shared_bytes=128, before=before)
    assert found.tolist() == [0, 0, 0, 0, 0, 1, 2, 3]
    with pytest.raises(EmulationError, match="begins at element -3 of a line, which is no multiple of 16 bytes"):
        run_kernel(kernel.replace("FIRST", "-3"), found, block=8, shared_bytes=128, before=before)
