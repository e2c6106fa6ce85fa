"""How the last blocks of a gradient of filters share their additions: the plan of `finish_parts`."""

from __future__ import annotations

from .strips import divided

AHEAD = 8  # parts whose loads are in flight, at least: kPartsAhead of taps_lines.cuh


def rounds(vectors: int, threads: int, parts: int) -> int:
    """How often a block of `threads` that adds up `parts`, of so many 16-byte vectors of sums, waits for loads.

    >>> rounds(vectors=64, threads=256, parts=132)
    5
    """
    slices = min(threads // vectors, parts) if vectors < threads else 1
    return divided(divided(parts, slices), AHEAD) * divided(vectors, threads)


def gathered(vectors: int, threads: int, parts: int) -> tuple[int, int]:
    """Parts that a block adds up before the last one adds up what such blocks found, and rounds of both.

    >>> rounds(600, 288, 132), gathered(600, 288, 132)
    (51, (8, 15))
    """
    at_once = rounds(vectors, threads, parts)
    if at_once <= 6:
        return parts, at_once
    slices = max(1, threads // vectors)
    sizes = [size for k in (1, 2, 3, 4) if 1 < (size := AHEAD * slices * k) < parts]

    def both(size: int) -> int:
        found = rounds(vectors, threads, size) + rounds(vectors, threads, divided(parts, size))
        return found + 3  # to find the last block once more

    best = min(sizes, key=both, default=parts)
    return (best, both(best)) if best < parts and both(best) < at_once else (parts, at_once)
