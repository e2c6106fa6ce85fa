"""From a plan to machine code: from memory, else from the disk cache, else by NVRTC."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

from . import nvrtc
from .cache import FORMAT, default_cache
from .plan import Constants, Plan
from .sources import KernelSource, kernel_source

ENTRY = "dwconv_kernel"
KernelId = tuple[str, Constants, str]

# Without --no-cache, NVRTC takes known code from the driver's cache on disk, and reports no resources.
_OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--no-cache")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a thread or block of a kernel takes, as ptxas reports it.

    Attributes:
        registers: 32-bit registers of a thread; 0 where the compiler's report names none.
        stack_bytes: local memory of a thread.
        spill_bytes: bytes of spill stores and spill loads in the machine code; a kernel that has any is a defect.
        shared_bytes: static shared memory of a block; the plan's dynamic shared memory comes on top.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """Machine code for one architecture.

    Attributes:
        cubin: the code, as the driver loads it.
        seconds: what getting it took, from the disk or by compiling.
        from_cache: whether it came from the disk.
        constants: the plan's, or with MIN_BLOCKS 1 where the plan's would have spilled (`relaxed`).
        entry: the name of the kernel in it.
    """

    cubin: bytes
    resources: Resources
    constants: Constants
    seconds: float
    from_cache: bool
    entry: str = ENTRY


_kernels: dict[KernelId, CompiledKernel] = {}


def compile_plan(plan: Plan) -> CompiledKernel:
    """The machine code of a plan. Plans that share a `kernel_id` share it, so later calls cost one look-up.

    Raises:
        DepthwiseError: NVRTC is missing, doesn't know the architecture, or refuses the source.
    """
    kernel_id = plan.kernel_id
    kernel = _kernels.get(kernel_id)
    if kernel is None:
        kernel = _kernels[kernel_id] = _obtain(kernel_id)
    return kernel


def compile_first(plans: Iterable[Plan]) -> tuple[Plan, CompiledKernel]:
    """The first plan whose kernel doesn't spill registers, and its kernel; the first one's where all do.

    Variants estimate registers, ptxas decides: its word is final for the problem and compiler at hand.

    Raises:
        DepthwiseError: as `compile_plan`.
    """
    spilled: tuple[Plan, CompiledKernel] | None = None
    for plan in plans:
        kernel = compile_plan(plan)
        if not kernel.resources.spill_bytes:
            return plan, kernel
        spilled = spilled or (plan, kernel)
    assert spilled is not None, "plans must not be empty"
    return spilled


def compiled_plan(plan: Plan) -> Plan:
    """The plan as it was compiled: with the constants of its machine code, which may be `relaxed`."""
    return replace(plan, constants=compile_plan(plan).constants)


def compile_many(plans: Iterable[Plan]) -> list[CompiledKernel]:
    """`compile_plan` of each plan, in their order; several at once, since NVRTC releases the interpreter's lock.

    Raises:
        DepthwiseError: as `compile_plan`, for the first plan that fails.
    """
    plans = list(plans)
    distinct = {plan.kernel_id: plan for plan in plans}
    if len(distinct) > 1:
        with ThreadPoolExecutor(min(len(distinct), os.cpu_count() or 1), "dwconv-compile") as pool:
            for _ in pool.map(compile_plan, distinct.values()):
                continue
    return [compile_plan(plan) for plan in plans]


def remember(plan: Plan, kernel: CompiledKernel) -> None:
    """Makes a kernel that was compiled elsewhere that of a plan, in this process: for measurements."""
    _kernels[plan.kernel_id] = kernel


def forget() -> None:
    """Empties the memory of compiled kernels: for tests and measurements."""
    _kernels.clear()


def defines(constants: Constants) -> tuple[str, ...]:
    """A plan's constants as compiler options.

    >>> defines((("FILTER_H", 3),))
    ('-DDWCONV_CONSTANTS', '-DDWCONV_FILTER_H=3')
    """
    return ("-DDWCONV_CONSTANTS", *(f"-DDWCONV_{name}={value}" for name, value in constants))


def cache_key(source: KernelSource, options: Iterable[str], arch: str, build: str) -> str:
    """The name of a kernel on disk: a hash of everything that decides its machine code, and of the format."""
    parts = [f"format {FORMAT}", build, arch, *options, source.stem, source.text]
    for name, text in source.includes:
        parts += [name, text]
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _obtain(kernel_id: KernelId) -> CompiledKernel:
    started = time.perf_counter()
    stem, constants, arch = kernel_id
    source = kernel_source(stem)
    options = (*_OPTIONS, *defines(constants))
    store = default_cache()

    expected = nvrtc.expected_build()
    key = cache_key(source, options, arch, expected)
    entry = store.get(key)
    if entry is None and (loaded := nvrtc.compiler().build) != expected:
        key = cache_key(source, options, arch, loaded)
        entry = store.get(key)
    if entry is not None and (found := _unpack(entry)) is not None:
        resources, constants, cubin = found
        return CompiledKernel(cubin, resources, constants, time.perf_counter() - started, from_cache=True)

    fewer = relaxed(constants)
    with ThreadPoolExecutor(1, "dwconv-relaxed") as pool:
        # Beside each other, since together they take hardly longer than one.
        spare = pool.submit(_obtain, (stem, fewer, arch)) if fewer != constants else None
        cubin, log = nvrtc.compile_cubin(f"{stem}.cuh", source.text, source.includes, arch, options)
        resources = read_report(log)
        if resources.spill_bytes and spare is not None:
            kernel = spare.result()
            cubin, resources, constants = kernel.cubin, kernel.resources, kernel.constants
    store.put(key, _pack(resources, constants, cubin))
    return CompiledKernel(cubin, resources, constants, time.perf_counter() - started, from_cache=False)


def relaxed(constants: Constants) -> Constants:
    """The same kernel with as many registers as ptxas likes.

    MIN_BLOCKS, the blocks that a multiprocessor shall hold, limits them; whether ptxas gets by without spilling can't
    be told beforehand. It is a wish therefore: where it makes a kernel spill, it is dropped.
    """
    return tuple((name, 1 if name == "MIN_BLOCKS" else value) for name, value in constants)


def read_report(log: str) -> Resources:
    """Reads what `--ptxas-options=-v` has written; numbers of several functions: the largest, spills summed.

    >>> read_report("8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\\nUsed 40 registers")
    Resources(registers=40, stack_bytes=8, spill_bytes=16, shared_bytes=0)
    """

    def numbers(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, log)]

    return Resources(
        registers=max(numbers(r"Used (\d+) registers"), default=0),
        stack_bytes=max(numbers(r"(\d+) bytes stack frame"), default=0),
        spill_bytes=sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
        shared_bytes=max(numbers(r"(\d+) bytes smem"), default=0),
    )


def _pack(resources: Resources, constants: Constants, cubin: bytes) -> bytes:
    return json.dumps({"resources": asdict(resources), "constants": constants}).encode() + b"\n" + cubin


def _unpack(entry: bytes) -> tuple[Resources, Constants, bytes] | None:
    head, _, cubin = entry.partition(b"\n")
    try:
        values = json.loads(head)
        constants = tuple((str(name), value) for name, value in values["constants"])
        return Resources(**values["resources"]), constants, cubin
    except (ValueError, TypeError, KeyError):  # not ours, though its checksum is right: build it again
        return None
