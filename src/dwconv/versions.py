"""Versions of what dwconv stands on, for `dwconv env` and for the conditions of a benchmark."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from . import env
from .errors import DepthwiseError
from .version import __version__

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
ABSENT = "not found"


def commit() -> str:
    """The commit of the source tree that this package runs from; "" if it isn't under git."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():
        return ""
    return _first_line("git", "-C", str(tree), "rev-parse", "HEAD")


def driver_release() -> str:
    """The release of the NVIDIA driver, such as "580.95.05"; "" where none is loaded."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER_FILE.read_text())
    except OSError:
        return ""
    return found.group(0) if found else ""


def package(name: str) -> str:
    """The version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT


def host_compiler() -> str:
    """The C++ compiler that the emulator builds with, and its version."""
    command = env.read("DWCONV_CXX")
    if shutil.which(command) is None:
        return f"{command}: {ABSENT}"
    return _first_line(command, "--version") or f"{command}: --version failed"


def nvrtc() -> str:
    """The version of the runtime compiler, or why it can't be loaded."""
    from .nvrtc import compiler

    try:
        found = compiler()
    except DepthwiseError as error:
        return str(error)
    return f"{found.version} (build {found.build[:12]})"


def driver() -> str:
    """The driver's release and the CUDA version it supports."""
    from .launch import driver_version

    release = driver_release()
    try:
        major, minor = driver_version()
    except (DepthwiseError, RuntimeError) as error:  # RuntimeError: there is no libcuda.so
        return f"{release} ({error})" if release else ABSENT
    return f"{release or 'release unknown'}, supports CUDA {major}.{minor}"


def devices() -> list[str]:
    """One line for each GPU that torch finds."""
    import torch

    if not torch.cuda.is_available():
        return []
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB, "
            f"L2 {properties.L2_cache_size >> 20} MiB"
        )
    return lines


def versions() -> dict[str, str]:
    """Everything but the devices, by name."""
    return {
        "dwconv": __version__ + (f" ({commit()[:12]})" if commit() else ""),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": _torch_version(),
        "cuda-bindings": package("cuda-bindings"),
        "NVRTC": nvrtc(),
        "driver": driver(),
        "emulator's compiler": host_compiler(),
    }


def _torch_version() -> str:
    try:
        import torch
    except ImportError:
        return ABSENT
    return f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.splitlines()[0] if done.stdout else ""
