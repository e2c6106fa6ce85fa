"""How blocks of wide_nhwc share a multiprocessor: clocks of rounds of them, and what each of them makes."""

from __future__ import annotations

from ..device import DeviceSpec
from .strips import divided

MOST_UNITS = 64  # of a block
BEFORE_UNITS = 0.15  # units' time that a block takes before its first one (51×5 in float32: 0.11; H200, 2026-11)


def clocks_for_all(warps: float) -> float:
    """Clocks in which a multiprocessor issues an instruction of each of so many warps; it has four schedulers."""
    return (max(warps, 4.0) + 2.5) / (4 * 0.88)


def clocks_of_blocks(blocks: int, resident: int, warps: int) -> float:
    """Clocks in which a multiprocessor issues an instruction of each warp of its blocks, `resident` at a time."""
    full, rest = divmod(blocks, resident)
    return full * clocks_for_all(resident * warps) + (clocks_for_all(rest * warps) if rest else 0.0)


def units_of_block(device: DeviceSpec, units: int, columns: int, resident: int, warps: int) -> int:
    """Units that a block of so many warps makes one after the other, of `units` in each of so many columns of blocks:
    those with which the multiprocessor that gets most of them is done first.
    """

    def time(each: int) -> float:
        blocks = divided(columns * divided(units, each), device.multiprocessors)
        return clocks_of_blocks(blocks, resident, warps) * (each + BEFORE_UNITS)

    most = min(MOST_UNITS, divided(units * columns, device.multiprocessors))
    return min(range(1, max(1, most) + 1), key=time)
