"""NVIDIA's run-time compiler, through cuda.bindings: which one it is, and one compilation."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from . import env
from .errors import DepthwiseError

_INSTALL = "install it with `pip install cuda-bindings nvidia-cuda-nvrtc`, or name its file in DWCONV_NVRTC"
_LOG_LINES = 6  # of a failed compilation that the error shows
_LOADING = Lock()


@dataclass(frozen=True, slots=True)
class Compiler:
    """The loaded compiler.

    Attributes:
        api: the module cuda.bindings.nvrtc.
        version: "13.0".
        build: what tells this build of it from every other, as `expected_build` does.
    """

    api: Any
    version: str
    build: str


def expected_build() -> str:
    """The build of the compiler that `compiler()` is expected to load, without loading it.

    Loading takes some 50 ms, a kernel from the disk cache needs none of it; so a cache key is made of this first.
    """
    path = _expected_library()
    return build_of(path) if path is not None else compiler().build


@cache
def _expected_library() -> Path | None:
    """The library that DWCONV_NVRTC names or pip has installed; None where only cuda.bindings knows where to look."""
    named = env.read("DWCONV_NVRTC")
    if named:
        return Path(named)
    for folder in dict.fromkeys(sys.path):
        for found in sorted((Path(folder) / "nvidia").glob("*/lib/libnvrtc.so.[0-9]*")):
            return found
    return None


@cache
def build_of(library: Path) -> str:
    """The GNU build id of a library; its path, size and time of change where it has none."""
    try:
        with library.open("rb") as file:
            found = _build_id(file.read(4096))
            status = library.stat()
    except OSError as error:
        raise DepthwiseError(
            f"the compiler {library} can't be read ({error.strerror}): name another file in DWCONV_NVRTC, or unset it"
        ) from error
    return found or f"{library.resolve()} {status.st_size} {status.st_mtime_ns}"


def _build_id(start: bytes) -> str | None:
    """The note of type 3 (NT_GNU_BUILD_ID) of a 64-bit little-endian ELF file, if it stands in these first bytes."""
    if len(start) < 64 or start[:6] != b"\x7fELF\x02\x01":
        return None
    (headers,) = struct.unpack_from("<Q", start, 32)
    header_bytes, count = struct.unpack_from("<HH", start, 54)
    for at in range(headers, min(headers + header_bytes * count, len(start) - 56 + 1), header_bytes):
        segment, _, note, _, _, bytes_left = struct.unpack_from("<IIQQQQ", start, at)
        while segment == 4 and bytes_left >= 12 and note + 12 <= len(start):
            name_bytes, id_bytes, kind = struct.unpack_from("<III", start, note)
            name_end = note + 12 + name_bytes
            id_start = note + 12 + (name_bytes + 3) // 4 * 4
            if kind == 3 and start[note + 12 : name_end] == b"GNU\0" and id_start + id_bytes <= len(start):
                return start[id_start : id_start + id_bytes].hex()
            step = id_start + (id_bytes + 3) // 4 * 4 - note
            note, bytes_left = note + step, bytes_left - step
    return None


def compiler() -> Compiler:
    """The compiler, loaded at the first call.

    Raises:
        DepthwiseError: it is not installed, or can't be loaded.
    """
    with _LOADING:
        return _load()


@cache
def _load() -> Compiler:
    named = env.read("DWCONV_NVRTC")
    try:
        if named:
            import ctypes

            ctypes.CDLL(named, mode=ctypes.RTLD_GLOBAL)  # cuda.bindings takes the one that is loaded already
        from cuda.bindings import nvrtc as api

        status, major, minor = api.nvrtcVersion()
        path = _loaded_library()
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        if named:
            raise DepthwiseError(
                f"DWCONV_NVRTC={named} can't be loaded ({reason}): name another file, or unset it"
            ) from error
        raise DepthwiseError(f"the compiler NVRTC can't be found ({reason}): {_INSTALL}") from error
    if named and path is not None and not path.samefile(named):
        raise DepthwiseError(
            f"DWCONV_NVRTC={named} is not what the installed cuda-bindings works with, which is like {path}: name a "
            "libnvrtc.so of the same CUDA major version, or unset it"
        )
    if status != api.nvrtcResult.NVRTC_SUCCESS:
        raise DepthwiseError(f"the compiler NVRTC doesn't answer ({status.name}): {_INSTALL}")
    version = f"{major}.{minor}"
    return Compiler(api, version, build_of(path) if path is not None else f"NVRTC {version}")


def _loaded_library() -> Path | None:
    """The file that cuda.bindings has loaded."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:  # cuda-bindings 12.9.0 and 12.9.1 looked for it by themselves
        return _expected_library()
    return Path(load_nvidia_dynamic_lib("nvrtc").abs_path)


def forget() -> None:
    """Makes the next call look for the compiler again: for tests."""
    for found in (_expected_library, build_of, _load):
        found.cache_clear()


def compile_cubin(
    name: str, text: str, includes: Sequence[tuple[str, str]], arch: str, options: Sequence[str]
) -> tuple[bytes, str]:
    """Compiles one kernel file to a cubin; also returns the log, which holds the resource report if asked for.

    Raises:
        DepthwiseError: the compiler is missing, doesn't know the architecture, or refuses the source.
    """
    nvrtc = compiler()
    api = nvrtc.api

    def answer(call: tuple[Any, ...]) -> Any:
        status, *values = call
        if status != api.nvrtcResult.NVRTC_SUCCESS:
            raise DepthwiseError(f"NVRTC {nvrtc.version} failed on {name} ({status.name}): {_INSTALL}")
        return values[0] if values else None

    program = answer(
        api.nvrtcCreateProgram(
            text.encode(),
            name.encode(),
            len(includes),
            [included.encode() for _, included in includes],
            [include.encode() for include, _ in includes],
        )
    )
    try:
        arguments = [f"--gpu-architecture={arch}".encode(), *(option.encode() for option in options)]
        (status,) = api.nvrtcCompileProgram(program, len(arguments), arguments)
        written = bytearray(answer(api.nvrtcGetProgramLogSize(program)))
        answer(api.nvrtcGetProgramLog(program, written))
        log = written.rstrip(b"\0").decode(errors="replace")
        if status != api.nvrtcResult.NVRTC_SUCCESS:
            _refuse_unknown(arch, nvrtc)
            raise DepthwiseError(
                f"{name} doesn't compile for {arch} (NVRTC {nvrtc.version}, {status.name}):\n{_first_errors(log)}"
            )
        cubin = bytearray(answer(api.nvrtcGetCUBINSize(program)))
        answer(api.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin), log
    finally:
        api.nvrtcDestroyProgram(program)


def _refuse_unknown(arch: str, nvrtc: Compiler) -> None:
    _, known = nvrtc.api.nvrtcGetSupportedArchs()
    number = re.sub(r"\D", "", arch)
    if number not in map(str, known):
        raise DepthwiseError(
            f"NVRTC {nvrtc.version} doesn't know {arch}: it compiles for {', '.join(f'sm_{sm}' for sm in known)}; "
            "install another version of nvidia-cuda-nvrtc, or name another libnvrtc.so in DWCONV_NVRTC"
        )


def _first_errors(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if "error" in line), 0)
    return "\n".join(lines[start : start + _LOG_LINES])
