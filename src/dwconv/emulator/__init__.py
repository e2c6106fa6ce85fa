"""The CUDA kernels on the CPU: g++ compiles the same .cuh files, a fiber runs each CUDA thread (docs/emulator.md)."""

from .build import build_many
from .context import Emulation, active, emulated
from .launch import EmulationError, run, run_filter_gradient

__all__ = ["Emulation", "EmulationError", "active", "build_many", "emulated", "run", "run_filter_gradient"]
