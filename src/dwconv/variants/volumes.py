"""Blocks that march along depth: the geometry of kernels/volumes.cuh, from the side of the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..device import DeviceSpec
from ..plan import Plan, Rejection, fast_divisor, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from ..roofline import LAUNCH_SECONDS
from .base import GRID_X_LIMIT
from .strips import divided, up, widest

MAX_REGISTERS = 168  # sums, taps and windows of a thread, as `March.registers` estimates them
SMALL_BYTES = 12_000_000  # problems up to here have too few blocks to hide the latency of a march
MANY_WARPS = 24  # that a multiprocessor shall hold then
STEP_SECONDS = 0.45e-6  # of a march that has the multiprocessor for itself (H200, 2026-11)
BEFORE_SUMS_SECONDS, BEFORE_MATRICES_SECONDS = 2.3e-6, 3.5e-6  # its first step (H200, 2026-11)
SPREAD = 4  # blocks for each multiprocessor that small volumes are spread over, before several of them share a block
HELD_TAPS = 27  # 32-bit registers of taps that a thread may hold for the whole march
FILLED = 1.2  # columns of eights over those of the image, at most, where a lane has eight
LITTLE = 0.06  # of all products: what may be added to sums of no output, in place of a second path through the code


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A lane makes `rows` × `columns` outputs of `vector` channels in every plane.

    Attributes:
        threads: of a block, at most.
        stages: planes of input in shared memory.
        held: the whole filter stays in registers; else it is read from shared memory, row by row.
        reload: every output plane reads all of its input planes again; else each is read once.
        rotate: the march is unrolled by the planes in the making, so that sums need not be moved.
        spots_x: channels last: groups of lanes beside one another.
        load_vector: elements that one copy moves; 0 leaves it to the alignment.
        min_blocks: blocks that a multiprocessor shall hold.
        batch: copies that a thread issues together.
        matrix: tensor cores sum the products of 16-bit elements; a warp has `rows` products of 16 groups of 8 columns.
        unroll: the filter's rows are unrolled even where they are read from shared memory.
        resident: blocks of a multiprocessor among which all planes are shared out; 0 gives a block whole marches, or
            parts of them where the problem is small.
        cubes: channels last: sparse tensor cores make cubes of 2×2×2 outputs; a warp has `columns` products beside one
            another, of four columns and eight rows each.
    """

    rows: int
    columns: int = 4
    vector: int = 1
    threads: int = 256
    stages: int = 3
    held: bool = False
    reload: bool = False
    rotate: bool = False
    spots_x: int = 1
    load_vector: int = 0
    min_blocks: int = 1
    batch: int = 4
    matrix: bool = False
    unroll: bool = False
    resident: int = 0
    cubes: bool = False

    def __str__(self) -> str:
        channels = f" × {self.vector} channels" if self.vector > 1 else ""
        outputs = f"{self.rows} rows × {self.columns} columns{channels} a lane"
        if self.matrix:
            outputs = f"{self.rows} products of 128 outputs a warp on tensor cores"
        if self.cubes:
            outputs = f"cubes of outputs on sparse tensor cores, {self.columns} products a warp"
            return f"{outputs}, two planes a step, {self.stages} steps in shared memory"
        filter = "filter in registers" if self.held else "filter in shared memory"
        planes = "planes read again for every output" if self.reload else "planes read once"
        return f"{outputs}, {self.threads} threads, {self.stages} planes in shared memory, {filter}, {planes}"


@dataclass(frozen=True, slots=True)
class March:
    """Twin of `Volume` in the kernels: what a tile's march along depth takes.

    Attributes:
        period: steps from one output's first tap to the next one's.
        ages: output planes in the making at a time.
        residues: classes of planes that never meet in a window.
    """

    period: int
    ages: int
    residues: int

    @classmethod
    def of(cls, problem: DepthwiseProblem, reload: bool) -> March:
        taps, stride = problem.filter[0], problem.stride[0]
        dilation = 1 if taps == 1 else problem.dilation[0]
        period = taps if reload else stride
        return cls(period, -(-taps // period), 1 if reload or stride > 1 else dilation)


def needs_reload(problem: DepthwiseProblem) -> bool:
    """Whether planes can't, or needn't, be shared by output planes."""
    taps, stride = problem.filter[0], problem.stride[0]
    return taps <= stride or (stride > 1 and problem.dilation[0] > 1)


def fits_eights(problem: DepthwiseProblem) -> bool:
    """Whether lanes take rows of eight outputs: of float32, where windows overlap, and eights fill the rows."""
    width = problem.out_size[2]
    return problem.dtype == "float32" and problem.stride[2] == 1 and up(width, 8) <= FILLED * width


def span(problem: DepthwiseProblem, columns: int) -> int:
    """Columns of x that `columns` neighbouring outputs reach over."""
    return (columns - 1) * problem.stride[2] + (problem.filter[2] - 1) * problem.dilation[2] + 1


def without_matrices(problem: DepthwiseProblem, device: DeviceSpec) -> str | None:
    """Why tensor cores can't sum the products."""
    if problem.element_bytes != 2:
        return f"tensor cores take 16-bit elements, not {problem.dtype}"
    if device.sm < 80:
        return f"{device.arch} has no tensor cores for products of 16×8×16"
    return None


def rows_of(problem: DepthwiseProblem, rows: int) -> int:
    """Rows of x that `rows` neighbouring outputs reach over."""
    return (rows - 1) * problem.stride[1] + (problem.filter[1] - 1) * problem.dilation[1] + 1


def registers(problem: DepthwiseProblem, tile: Tile) -> int:
    """Estimate of a thread's registers."""
    words = 2 if problem.dtype == "float64" else 1
    march = March.of(problem, tile.reload)
    if tile.matrix and problem.layout == "channels_last":
        steps = pair_steps(problem)
        bands = 2 * steps * (problem.filter[0] * problem.filter[1] if tile.held else 2)
        return tile.rows * (4 * march.ages + 8) + bands + 40
    if tile.matrix:
        bands = 2 * problem.filter[0] * problem.filter[1] if tile.held else 2
        return tile.rows * (4 * march.ages + 8) + bands + 40
    window = span(problem, tile.columns) * (1 if tile.held else tile.rows)
    taps = problem.taps if tile.held else problem.filter[2]
    return words * tile.vector * (march.ages * tile.rows * tile.columns + window + taps) + 30


def too_large(problem: DepthwiseProblem) -> str | None:
    """Why places of a plane can't be numbered in 31 bits."""
    _, _, _, row, column = problem.plane_strides
    channels = problem.channels if problem.layout == "channels_last" else 0
    ends = (sum(problem.padding[i]) + problem.size[i] for i in (1, 2))
    height, width = (end + 2**10 for end in ends)
    if height * row + width * column + channels >= 2**31 or height * problem.out_size[2] >= 2**31:
        return "a plane of x reaches over 2³¹ elements or more, so that its places can't be numbered in 31 bits"
    if problem.size[0] + sum(problem.padding[0]) >= 2**30:
        return f"a depth of {problem.size[0]} is too long to be numbered in 31 bits"
    return None


def rejected_tile(problem: DepthwiseProblem, tile: Tile) -> str | None:
    """Why a tile can't serve the problem in any geometry."""
    if reason := too_large(problem):
        return reason
    if needs_reload(problem) and not tile.reload:
        return "no plane is shared by output planes of this stride and dilation, so that each reads its own"
    march = March.of(problem, tile.reload)
    if tile.held and march.period > 1:
        return "a filter in registers needs a stride of 1 along depth"
    words = 2 if problem.dtype == "float64" else 1
    if tile.held and not tile.matrix and problem.taps * tile.vector * words > HELD_TAPS * 2:
        return f"the filter's {problem.taps} taps don't fit in registers beside the sums"
    needed = registers(problem, tile)
    if needed > MAX_REGISTERS:
        return f"needs about {needed} registers a thread; {MAX_REGISTERS} is the most"
    return None


def shared_bytes(problem: DepthwiseProblem, tile: Tile, elements: int, table: int, taps: int) -> int:
    """Shared memory of a block: stages of x, float32 tiles of 16-bit ones, the filter, the table of vectors."""
    elements = -(-elements // 8) * 8  # every tile starts at a multiple of 16 bytes
    converted = 2 * problem.sum_bytes if problem.element_bytes == 2 and problem.layout == "channels_first" else 0
    return (
        elements * (tile.stages * problem.element_bytes + converted)
        + (0 if tile.held else taps * problem.sum_bytes)
        + 4 * table
    )


def shares(
    problem: DepthwiseProblem, tile: Tile, device: DeviceSpec, tiles: int, threads: int, vector: int
) -> tuple[int, int, int, int]:
    """(blocks, length, share, total): planes of a tile and residue, of a block, and of all tiles."""
    march = March.of(problem, tile.reload)
    length = -(-problem.out_size[0] // march.residues)
    total = tiles * march.residues * length
    share = length
    if tile.resident:
        blocks = device.multiprocessors * tile.resident
        share = max(-(-total // blocks), min(length, max(1, 2 * (march.ages - 1))))
    elif problem.least_bytes < SMALL_BYTES and vector > 1:
        # A march's latency is the time: shorter ones, as many as there is room for. But with copies of single elements,
        # it is rather what comes before the march (8 × 192 × (8, 7, 7), float32, H200: 0.54 with whole marches, 0.38
        # with short ones).
        wanted = device.multiprocessors * MANY_WARPS // divided(threads, 32)
        share = min(length, max(2, divided(total, max(1, wanted))))
    return -(-total // share) if total else 1, length, share, total


def beside_outputs(problem: DepthwiseProblem, march: March, share: int) -> float:
    """Products that belong to no output where each plane is added to all sums in the making, over those that do: at the
    ends of a march of `share` output planes.
    """
    (before, after), length = problem.padding[0], -(-problem.out_size[0] // march.residues)
    missing = 0
    for padding in (before, after):
        outputs = march.ages - 1 - (padding // march.residues if share >= length else 0)
        missing += max(0, outputs) * (outputs + 1) // 2
    return missing / (max(1, share) * march.ages)


def most_volumes(planes: int, device: DeviceSpec) -> int:
    """Small volumes of a block, at most: few, where there are few of them, since a block first makes its table."""
    return max(1, planes // (SPREAD * device.multiprocessors))


def batch_of(vectors: int, tile: Tile, threads: int) -> int:
    """Copies that a thread issues together: all that it makes of a tile, if these are few."""
    own = -(-vectors // threads)
    return own if own <= tile.batch else tile.batch


def copies(vectors: int, tile: Tile, threads: int) -> dict[str, int]:
    """The constants that say how a thread copies its vectors."""
    batch = batch_of(vectors, tile, threads)
    return {"BATCH": batch, "ONE_BATCH": int(vectors <= batch * threads)}


def table_entries(vectors: int, tile: Tile, threads: int) -> int:
    """Entries of the table of vectors: whole batches of copies of all threads."""
    batch = batch_of(vectors, tile, threads) * threads
    return -(-vectors // batch) * batch


def lane_taps(problem: DepthwiseProblem, tile: Tile) -> int:
    """Twin of `Volume::kTapPitch`: sums' elements that the filters of a lane take in shared memory."""
    march = March.of(problem, tile.reload)
    row = divided(problem.filter[2] * march.ages, 4) * 4
    vector = 16 // problem.sum_bytes
    return (march.period * problem.filter[1] * row * tile.vector // vector // 2 * 2 + 1) * vector


def numbered(groups: int, planes: int) -> str | None:
    """Why blocks or planes can't be numbered."""
    if groups <= GRID_X_LIMIT and planes <= GRID_X_LIMIT:
        return None
    return f"{max(groups, planes)} blocks or planes can't be numbered in 31 bits"


def vector_limit(problem: DepthwiseProblem) -> int:
    """Elements of a copy, as far as the address of x's planes allows."""
    image, channel, depth, row, _ = problem.plane_strides
    strides = (image, depth, row) if problem.layout == "channels_last" else (image, channel, depth, row)
    return widest(16 // problem.element_bytes, problem.aligned // problem.element_bytes, *strides)


def march_seconds(
    problem: DepthwiseProblem, device: DeviceSpec, tile: Tile, blocks: int, threads: int, share: int, plane: float
) -> float:
    """Predicted time: instruction issue, DRAM and the latency of a march, as a cube norm.

    A warp issues `plane` instructions for every plane that it takes in, at 0.7 of what a multiprocessor can issue when
    it holds 12 warps or more, a share of it with fewer; 0.9 of a copy's rate is left of DRAM's. A march takes a while
    before its first step and for each of its steps, also if it is the only one (H200, 2026-11: within 20 % of the
    measured tiles that `tiles` prefers).

    Args:
        blocks, threads: of the grid, of a block.
        share: output planes that a block makes.
        plane: instructions of a warp for one plane of input.
    """
    march = March.of(problem, tile.reload)
    steps = march.period * (share - 1) + problem.filter[0]
    latency = (BEFORE_MATRICES_SECONDS if tile.matrix else BEFORE_SUMS_SECONDS) + steps * STEP_SECONDS
    # Where taps are read as they are needed, the first and the last planes are added only to outputs that read them.
    skips = not tile.held and not (tile.matrix and problem.layout == "channels_first")
    added = march.period * share if skips else steps
    warps = blocks * divided(threads, 32)
    held = min(12.0, warps / device.multiprocessors)  # by a multiprocessor
    rate = 4 * device.clock * device.multiprocessors * 0.7 * max(held, 4.0) / 12
    issue = warps * added * plane / rate
    dram = problem.least_bytes / (0.9 * device.dram_gbs * 1e9)
    return float(LAUNCH_SECONDS + (issue**3 + dram**3 + latency**3) ** (1 / 3))


def sum_instructions(problem: DepthwiseProblem, tile: Tile, loads: int, stores: int, own_vectors: float) -> float:
    """Instructions of a warp for one plane of input, where multiply-adds sum the products.

    Args:
        loads: shared loads of windows and taps.
        stores: of a finished plane.
        own_vectors: of the tile of input, per thread.
    """
    march = March.of(problem, tile.reload)
    sums = tile.rows * tile.columns * tile.vector
    multiply_adds = sums * divided(problem.taps, march.period) * (2 if problem.element_bytes == 8 else 1)
    converts = 0.0
    if problem.element_bytes == 2:
        converts = 20 * own_vectors if problem.layout == "channels_first" else loads * tile.vector
    return multiply_adds + loads + converts + 5 * own_vectors + (5 * stores + sums) / march.period + 90


def matrix_instructions(problem: DepthwiseProblem, tile: Tile, own_vectors: float) -> float:
    """Instructions of a warp for one plane of input, where tensor cores sum the products."""
    march = March.of(problem, tile.reload)
    product = problem.filter[1] * (4 + march.ages)  # four loads of x, a product for every age
    # 1.6: what is issued waits for what it needs more often than multiply-adds do
    return 1.6 * (tile.rows * (product + 14 / march.period) + 5 * own_vectors + 90)


def pair_steps(problem: DepthwiseProblem) -> int:
    """Twin of `Volume::kSteps`: products of a filter row for four neighbouring outputs, channels last."""
    return divided(span(problem, 4), 8)


def pair_instructions(problem: DepthwiseProblem, tile: Tile, own_vectors: float) -> float:
    """As matrix_instructions, channels last."""
    march = March.of(problem, tile.reload)
    bands = 0 if tile.held else 2 * march.ages
    product = tile.rows * (4 + march.ages) + bands
    return 1.6 * (
        problem.filter[1] * pair_steps(problem) * product + 28 * tile.rows / march.period + 5 * own_vectors + 90
    )


def first_legal(stem: str, plans: list[tuple[Tile, Plan | Rejection]]) -> Iterator[Plan | Rejection]:
    """The first legal plan, and why not the others. Sizes don't choose among tiles, which leaves few kernels."""
    chosen = next((plan for _, plan in plans if isinstance(plan, Plan)), None)
    for tile, plan in plans:
        if isinstance(plan, Plan) and plan is not chosen:
            yield Rejection(stem, str(tile), "an earlier tile is faster as measured; one serves all sizes")
        else:
            yield plan


def make_plan(
    stem: str,
    problem: DepthwiseProblem,
    device: DeviceSpec,
    tile: Tile,
    constants: Mapping[str, int],
    *,
    share: int,
    blocks: int,
    threads: int,
    shared: int,
    tiling: tuple[int, ...],
    words: str,
    seconds: float,
) -> Plan:
    """A plan with the constants that both kernels share."""
    everything = tile.held or beside_outputs(problem, March.of(problem, tile.reload), share) <= LITTLE
    all_constants = problem_constants(problem) | {
        "ALL": int(everything and not tile.matrix and not tile.cubes),
        "THREADS": tile.threads,
        "MIN_BLOCKS": tile.min_blocks,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "STAGES": tile.stages,
        "HELD_TAPS": int(tile.held),
        "RELOAD": int(tile.reload),
        "ROTATE": int(tile.rotate),
        "UNROLL_ROWS": problem.filter[1] if tile.unroll else 1,
        **constants,
    }
    return Plan(
        problem=problem,
        device=device,
        variant=stem,
        constants=tuple(sorted(all_constants.items())),
        grid=(max(1, blocks), 1, 1),
        block=(threads, 1, 1),
        shared_bytes=shared,
        sizes=problem_sizes(problem),
        tiling=tiling,
        tile=words,
        predicted_seconds=seconds,
    )


def divisors(*values: int) -> Iterator[int]:
    """The fields of one `dwconv::FastDivisor` after another."""
    for value in values:
        yield from fast_divisor(value)
