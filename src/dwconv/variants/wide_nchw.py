"""wide_nchw: planes in shared memory, the filter's taps in registers a line at a time; for filters of any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, legal, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS, roofline
from .base import GRID_X_LIMIT, Variant
from .wide_bands import CHUNK, Axis, Band, Tile, band_of

# Outputs of a line that lanes own whole: blocks of 128 threads that a multiprocessor shall hold (H200, 2026-11).
WHOLE = {7: 0, 8: 0, 14: 0, 16: 0, 28: 6, 32: 5, 56: 1}
WHOLE_TAPS = 64  # of a line, at most, where lanes own whole lines: all of them are in registers
LONG_CODE = 1900  # products of a line that don't fit in the instruction cache: warps must be at the same place of it
FEW_LINES = 16  # of a filter: blocks are short, and staging and storing count
CUT = (16, 28)  # outputs of a lane where lines are cut; the first alone for sequences and float64
LONGEST = 2**31 - 2**20  # elements of a padded line, and lines: positions are numbered in 31 bits


class WideNchw(Variant):
    stem = "wide_nchw"
    technique = (
        "planes of several images lie in shared memory; each lane makes a stretch of a row or column, and takes one "
        "line of input after the other, times a line of the filter's taps in registers; lines of padding are left out"
    )

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        for tile in tiles(problem, device):
            yield self.plan(problem, device, tile)

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        return legal(self.plan(problem, device, tile) for tile in every_tile(problem, device))

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""
        longest = max(problem.lifted(2).size + problem.out_size) + max(map(sum, problem.padding))
        if longest > LONGEST:
            reason = f"a padded row or column of {longest} elements is too long to be numbered in 31 bits"
            return Rejection(self.stem, str(tile), reason)
        band = band_of(problem, tile)
        limit = device.shared_bytes - 1024
        if band.shared_bytes > limit:
            reason = f"the input of a block takes {band.shared_bytes} bytes of shared memory; {limit} fit"
            return Rejection(self.stem, str(tile), reason)
        if tile.halves and band.bands[0] > 1:
            return Rejection(self.stem, str(tile), "both halves of a line must be of one block")
        if band.blocks > GRID_X_LIMIT:
            return Rejection(self.stem, str(tile), f"{band.blocks} blocks are more than a grid has")
        constants = problem_constants(problem) | {
            "THREADS": tile.threads,
            "MIN_BLOCKS": tile.min_blocks,
            "ALONG": tile.along,
            "ACROSS": tile.across,
            "CHUNK": tile.chunk,
            "IN_ALONG": tile.in_along,
            "HALVES": int(tile.halves),
            "TRANSPOSED": int(tile.transposed),
            "QUEUED": int(tile.queued),
            "CHANNELS": tile.channels,
            "SHARED_BUDGET": tile.budget,
            "SHARED_LIMIT": limit,
        }
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(max(1, band.blocks), 1, 1),
            block=(32 * band.warps, 1, 1),
            shared_bytes=band.shared_bytes,
            sizes=problem_sizes(problem),
            tiling=band.tiling,
            tile=f"{tile}, {band.images} images × {band.channels} channels a block",
            predicted_seconds=band_seconds(band, device),
        )


def tiles(problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Tile]:
    """The tiles that come into question, few enough that many sizes of image share kernels."""
    for transposed in (False, True):
        along, across = (Axis.of(problem, i) for i in ((0, 1) if transposed else (1, 0)))
        if transposed and along.taps <= across.taps:
            continue  # the longer lines are read more often
        if whole := whole_tile(problem, device, along, across, transposed):
            yield whole
            if products(whole, along) > LONG_CODE and mirrored(along):
                yield replace(whole, along=along.out // 2, min_blocks=3, halves=True)
        few_lines = 1 < across.taps <= FEW_LINES
        most = 16 if problem.element_bytes == 8 else CHUNK
        chunks = -(-along.taps // most) if along.dilation == 1 else 1  # equal ones
        chunk = min(most, -(-along.taps // (4 * chunks)) * 4)
        budget = _part(device, 8 if few_lines else 3 if along.taps > chunk or across.taps > 1 else 6)
        for outputs in CUT[:1] if problem.element_bytes == 8 or across.taps == 1 else CUT:
            if few_lines:
                yield Tile(outputs, 1, 0, transposed, chunk, threads=512, budget=budget, queued=False)
            else:
                yield Tile(outputs, 1, 0, transposed, chunk, budget=budget)


def whole_tile(
    problem: DepthwiseProblem, device: DeviceSpec, along: Axis, across: Axis, transposed: bool
) -> Tile | None:
    """The tile whose lanes own whole lines, where there is one for the length of lines."""
    double = problem.element_bytes == 8
    if along.out not in WHOLE or along.size > 2 * along.out or along.taps > (24 if double else WHOLE_TAPS):
        return None
    if along.out > (14 if double else 28 if across.taps <= FEW_LINES and along.taps < 32 else 56):
        return None
    chunk = -(-along.taps // 4) * 4
    tile = Tile(along.out, 1, along.size, transposed, chunk, budget=_part(device, 3))
    if along.out <= 16:
        channels = 4 if problem.size[0] * problem.size[1] % 4 else 1
        lines = 1 if double else 2
        return replace(tile, across=lines, threads=512, min_blocks=2, queued=False, channels=channels)
    if products(tile, along) > LONG_CODE:
        return replace(tile, threads=256, min_blocks=2, budget=_part(device, 4), queued=False)
    if across.taps <= FEW_LINES:
        return replace(tile, threads=512, budget=_part(device, 4), queued=False)
    return replace(tile, min_blocks=WHOLE[along.out])


def mirrored(axis: Axis) -> bool:
    """Whether the second half of a line's outputs is the first one's mirror image."""
    same = axis.out == axis.size and 2 * axis.pad == (axis.taps - 1) * axis.dilation
    return same and axis.stride == 1 and axis.out % 2 == 0


def _part(device: DeviceSpec, parts: int) -> int:
    """Bytes of a block's shared memory so that as many blocks fit on a multiprocessor, 16 KiB or more."""
    return max(16 * 1024, device.shared_bytes // parts - 1024)


def every_tile(problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Tile]:
    """Tiles of every kind: those of `tiles`, more lines a lane, halves of lines, less shared memory, fewer taps."""
    found = dict.fromkeys(tiles(problem, device))
    for tile in list(found):
        taps = problem.filter[0 if tile.transposed else 1]
        if tile.in_along or taps <= tile.chunk:
            found[replace(tile, across=3 if tile.along < 28 else 2, budget=8 * 1024, threads=64)] = None
        along = Axis.of(problem, 0 if tile.transposed else 1)
        if tile.in_along and mirrored(along):
            found[replace(tile, along=along.out // 2, across=1, queued=False, halves=True, threads=512)] = None
        if not tile.in_along:
            found[replace(tile, chunk=8, budget=4 * 1024, threads=64)] = None
            found[replace(tile, along=12, transposed=not tile.transposed, chunk=16)] = None
    yield from found


def products(tile: Tile, along: Axis) -> int:
    """Multiply-adds of a line of filter and one of outputs, as compiled."""
    if not tile.in_along:
        return tile.along * along.taps
    taps = [v * along.dilation - along.pad for v in range(along.taps)]
    return sum(0 <= o * along.stride + tap < along.size for o in range(tile.along) for tap in taps)


def band_seconds(band: Band, device: DeviceSpec) -> float:
    """Predicted time: 3.55 warp instructions a clock, or those of the longest warp where blocks are few; latencies.

    A lane takes a slot for each product of a line that is not padding and for every 4 taps, 10 for every 4 elements it
    reads (5 where lines are one), and 27 for every element that is staged or stored, which covers what waits for it.
    Fitted to 58 tiles of 20 problems in float32 and float16 (H200, 2026-11): root mean square error 14 %.
    """
    problem, tile = band.problem, band.tile
    along, across = band.along, band.across
    chunks: float = -(-along.taps // tile.chunk)
    elements = (tile.in_along or (tile.along - 1) * along.stride + (along.taps - 1) * along.dilation + 1) / 4
    pairs: float = products(tile, along)
    if not tile.in_along and chunks > 1:
        part = min(1.0, inside(along) + 0.5 * (tile.along + tile.chunk) / along.taps)
        pairs, chunks, elements = pairs * part, chunks * part, chunks * part * (tile.along + tile.chunk) / 4
    read = 5 if across.taps == 1 else 10
    line = tile.across * (pairs + along.taps / 4) + read * elements + 5 * chunks
    if pairs > LONG_CODE:
        line *= 1.25
    lines = across.taps * inside(across) + (tile.across - 1) * 0.5
    planes = problem.batch * problem.out_channels * band.bands[0] * band.bands[1]
    moved = 27 * (band.in_lines * band.in_extent / (band.along_tiles * band.across_tiles) + tile.along * tile.across)
    lane = lines * line + moved + 100
    warps = planes * band.along_tiles * band.across_tiles / 32
    issue = warps * lane / (3.55 * device.multiprocessors)
    # A warp alone issues about 0.6 instructions a clock.
    rounds = -(-band.blocks // (device.multiprocessors * 8))
    longest = rounds * -(-band.tasks // max(1, band.warps)) * lane / 0.6
    copy = roofline(problem, device).copy - LAUNCH_SECONDS
    return LAUNCH_SECONDS + 5.4e-6 + max(issue / device.clock, longest / device.clock, 1.1 * copy)


def inside(axis: Axis) -> float:
    """The share of an axis' products that are not with padding."""
    total = 0
    for v in range(0, axis.taps, max(1, axis.taps // 64)):
        offset = v * axis.dilation - axis.pad
        first = max(0, -(offset // axis.stride))
        last = min(axis.out - 1, (axis.size - 1 - offset) // axis.stride)
        total += max(0, last - first + 1)
    return total / (axis.out * len(range(0, axis.taps, max(1, axis.taps // 64))))
