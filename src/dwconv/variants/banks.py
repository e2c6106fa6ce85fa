"""Banks of shared memory: choosing a pitch by counting who meets in the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
