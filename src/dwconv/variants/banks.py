"""Banks of shared memory: choosing a pitch by counting who meets in the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TypeVar

Choice = TypeVar("Choice")


def with_fewest_conflicts(choices: Iterable[Choice], conflicts: Callable[[Choice], int], least: int) -> Choice:
    """The first choice with the fewest conflicts. `least`: as few as there can be, which ends the search.

    >>> with_fewest_conflicts([8, 9, 10, 11], lambda pitch: pitch % 3, least=0)
    9
    """
    remaining = iter(choices)
    best = next(remaining)
    fewest = conflicts(best)
    for choice in remaining:
        if fewest <= least:
            break
        if (found := conflicts(choice)) < fewest:
            best, fewest = choice, found
    return best


@lru_cache(maxsize=1 << 14)
def banked(offsets: tuple[int, ...], width: int) -> int:
    """Clocks in which shared memory reads `width` bytes for each lane of a warp, from these offsets in bytes.

    >>> banked(tuple(range(0, 128, 4)), 4), banked(tuple(range(0, 256, 8)), 4)
    (1, 2)
    """
    at_once = 32 * 4 // max(4, width)
    clocks = 0
    for first in range(0, len(offsets), at_once):
        words = {at // 4 for at in offsets[first : first + at_once]}
        for more in range(4, width, 4):
            words |= {(at + more) // 4 for at in offsets[first : first + at_once]}
        banks = [word % 32 for word in words]
        clocks += max(map(banks.count, set(banks)))
    return clocks
