"""Kernels as shared objects for the CPU: the same .cuh files, compiled by g++ after the emulator's header."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from .. import env
from ..cache import default_cache
from ..errors import DepthwiseError
from ..plan import Constants, Plan
from ..sources import kernel_source, without_includes

_FORMAT = "dwconv-emulator-2"
_HEADERS = ("cuda_emulator.h", "fibers.h", "switch.h")
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-pthread")
# A vector load reads floats as uint4, and a multiply-add is contracted (from -O2 on), both as in CUDA.
_KERNEL_FLAGS = ("-w", "-fno-strict-aliasing", "-ffp-contract=fast", "-fno-math-errno")
_SANITIZED = ("-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_UNROLL = re.compile(r"^([ \t]*)#[ \t]*pragma[ \t]+unroll(?:[ \t]+(\d+))?[ \t]*$", re.MULTILINE)
_WHOLLY = 1024  # iterations that `#pragma unroll` alone unrolls


def sanitizing() -> bool:
    """Whether kernels are built with AddressSanitizer and UBSan."""
    return env.read("DWCONV_EMULATOR_SANITIZE") not in ("", "0")


def kernel_text(stem: str) -> str:
    """A kernel file and what it includes, as one text; #line keeps the lines of messages those of the files."""
    source = kernel_source(stem)
    files = (*source.includes, (f"{stem}.cuh", source.text))
    return "".join(f'#line 1 "{name}"\n{_blank_includes(text)}\n' for name, text in files)


def library(plan: Plan) -> ctypes.CDLL:
    """The loaded shared object of a plan's kernel: from memory, the cache on disk, or g++.

    Raises:
        DepthwiseError: there is no compiler, or it rejects the kernel.
    """
    return _library_of(plan.variant, plan.constants)


def build_many(plans: Iterable[Plan]) -> None:
    """Builds the kernels of many plans, as many at a time as there are emulator threads."""
    kernels = dict.fromkeys((plan.variant, plan.constants) for plan in plans)
    with ThreadPoolExecutor(max(1, env.read_integer("DWCONV_EMULATOR_THREADS"))) as pool:
        list(pool.map(lambda kernel: _library_of(*kernel), kernels))


def forget() -> None:
    """Makes everything read the environment and the cache again: for tests."""
    for cached in (_library_of, _runtime, _compiler_version, sanitizer_library):
        cached.cache_clear()


@functools.cache
def _library_of(stem: str, constants: Constants) -> ctypes.CDLL:
    return load(kernel_text(stem), constants, stem)


def load(text: str, constants: Constants, name: str) -> ctypes.CDLL:
    """Compiles a kernel's text with the entry `dwconv_kernel`, unless the cache holds it, and loads it.

    Raises:
        DepthwiseError: there is no compiler, or it rejects the text.
    """
    sanitize = sanitizing()
    if sanitize and not _sanitizer_loaded():
        raise DepthwiseError(
            "DWCONV_EMULATOR_SANITIZE=1 needs AddressSanitizer in the process from its start: run Python with "
            f"LD_PRELOAD={sanitizer_library()} and ASAN_OPTIONS=detect_leaks=0"
        )
    unit = f'#include "cuda_emulator.h"\n{_for_gcc(text)}\nDWCONV_EMULATOR_EXPORT(dwconv_kernel)\n'
    defines = [f"-DDWCONV_{constant}={value}" for constant, value in constants]
    if constants:
        defines.insert(0, "-DDWCONV_CONSTANTS")
    level = min(env.read_integer("DWCONV_EMULATOR_OPTIMIZE"), 1 if sanitize else 3)
    flags = (*_FLAGS, *_KERNEL_FLAGS, *_machine_flags(), f"-O{level}", *(_SANITIZED if sanitize else ()), *defines)
    runtime = _runtime(sanitize)
    payload = _built(unit, ("-shared", *flags), name, inputs=(str(runtime),))
    return _open(payload, name, keep=sanitize)


@functools.cache
def _runtime(sanitize: bool) -> Path:
    """The scheduler, as an object file that every kernel is linked with."""
    flags = (*_FLAGS, "-O2", "-c", *(("-DDWCONV_EMULATOR_ASAN", "-fno-omit-frame-pointer") if sanitize else ()))
    payload = _built(_file("runtime.cpp"), flags, "the emulator's runtime")
    path = _folder() / f"runtime-{int(sanitize)}.o"
    path.write_bytes(payload)
    return path


_compile_locks: dict[str, threading.Lock] = {}
_folder_lock = threading.Lock()


def _built(text: str, flags: tuple[str, ...], name: str, inputs: tuple[str, ...] = ()) -> bytes:
    """What the compiler makes of a text; the cache's key is all that decides it."""
    content = (_FORMAT, _compiler_version(), text, *map(_file, _HEADERS), _file("runtime.cpp"), *flags)
    key = "emulator-" + hashlib.sha256("\0".join(content).encode()).hexdigest()
    with _compile_locks.setdefault(key, threading.Lock()):
        payload = default_cache().get(key)
        if payload is None:
            payload = _compile(text, flags, name, inputs)
            default_cache().put(key, payload)
    return payload


def _compile(text: str, flags: tuple[str, ...], name: str, inputs: tuple[str, ...]) -> bytes:
    headers = _folder()
    descriptor, output = tempfile.mkstemp(dir=headers, suffix=".out")
    os.close(descriptor)
    command = [_compiler(), *flags, f"-I{headers}", *inputs, "-x", "c++", "-", "-lm", "-o", output]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # libasan slows g++ down
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=environment)
    try:
        if result.returncode != 0:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise DepthwiseError(
                f"{env.read('DWCONV_CXX')} can't compile {name} for the emulator: correct the kernel, or set "
                "DWCONV_CXX to g++ 9 or newer. It says:\n" + "\n".join(errors[:8])
            )
        return Path(output).read_bytes()
    finally:
        Path(output).unlink()


def _open(payload: bytes, name: str, keep: bool) -> ctypes.CDLL:
    """Loads a shared object. Its file may go at once, except that sanitizers read lines and names from it."""
    descriptor, path = tempfile.mkstemp(dir=_folder(), prefix=f"{re.sub(r'[^A-Za-z0-9_]', '_', name)}-", suffix=".so")
    with open(descriptor, "wb") as file:
        file.write(payload)
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise DepthwiseError(
            f"the emulator can't load a kernel that it built ({error}): set TMPDIR to a folder that allows programs"
        ) from error
    finally:
        if not keep:
            os.unlink(path)


@functools.cache
def _own_folder() -> tuple[Path, object]:
    """This process's folder for headers, objects and what is being loaded; it goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="dwconv-emulator-", ignore_cleanup_errors=True)
    for name in _HEADERS:
        (Path(folder.name) / name).write_text(_file(name), encoding="utf-8")
    return Path(folder.name), folder


def _folder() -> Path:
    with _folder_lock:
        return _own_folder()[0]


@functools.cache
def _file(name: str) -> str:
    return (resources.files("dwconv") / "emulator" / name).read_text(encoding="utf-8")


def _for_gcc(text: str) -> str:
    """`#pragma unroll` in g++'s words: it decides whether tables computed at compile time stay loops."""
    return _UNROLL.sub(lambda found: f"{found[1]}#pragma GCC unroll {found[2] or _WHOLLY}", text)


def _blank_includes(text: str) -> str:
    """The text without its own includes, with as many lines as before."""
    shortened = without_includes(text)
    return "\n" * (text.count("\n") - shortened.count("\n")) + shortened


def _compiler() -> str:
    wanted = env.read("DWCONV_CXX")
    found = shutil.which(wanted)
    if found is None:
        raise DepthwiseError(
            f"the emulator compiles kernels with {wanted!r}, which is not on the PATH: install g++ (on Debian and "
            "Ubuntu, apt install g++), or set DWCONV_CXX to a C++ compiler"
        )
    return found


@functools.cache
def _compiler_version() -> str:
    return _ask_compiler("--version")


def _ask_compiler(option: str) -> str:
    result = subprocess.run([_compiler(), option], capture_output=True, text=True, check=False)
    return result.stdout.strip()


@functools.cache
def sanitizer_library() -> str:
    """The path of the compiler's AddressSanitizer, for LD_PRELOAD."""
    return _ask_compiler("-print-file-name=libasan.so")


def _sanitizer_loaded() -> bool:
    return hasattr(ctypes.CDLL(None), "__asan_init")


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """Fused multiply-adds, which every other processor of interest has without asking."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    have = set(found[1].split()) if found else set()
    return ("-mavx2", "-mfma") if {"avx2", "fma"} <= have else ()
