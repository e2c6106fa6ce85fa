"""matrix_nchw: filter rows as banded matrices on tensor cores; 16 bits, channels first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..device import DeviceSpec
from ..plan import Plan, Rejection, legal, problem_constants, problem_sizes
from ..problem import DepthwiseProblem
from .base import Variant
from .matrix_items import (
    MAX_BANDS,
    UNITS,
    Geometry,
    Tile,
    blocks_of_registers,
    count_of,
    fetched_rows,
    filter_pitch,
    geometries,
    item_divisors,
    item_seconds,
    lead_of,
    resident_blocks,
    result_pitch,
    shares,
    steps,
)
from .matrix_slices import slice_plans
from .strips import divided, short_divisor, too_long, up, widest, window_columns

MAX_HELD = 36  # registers of a thread for input in flight and its places
ROW = 7  # elements of a row that is fetched as a whole, at most
NARROW = 32  # columns from which on images are left to other variants that would ask for a kernel of their own


def widths(problem: DepthwiseProblem) -> tuple[int, int]:
    """Elements that stand together at an aligned address in a row of x (up to 8), and in a row of y (up to 2)."""
    most = problem.aligned // problem.element_bytes
    image, channel, row, _ = problem.plane_strides
    strides = (image, channel, row) if problem.x_strides else (row,)

    def limit(at_most: int, *numbers: int) -> int:
        return next(v for v in (8, 4, 2, 1) if v <= min(at_most, most) and all(n % v == 0 for n in numbers))

    load, store = limit(8, problem.size[1], *strides), limit(2, problem.out_size[1])
    return load, store


def takes_rows(problem: DepthwiseProblem) -> bool:
    """Whether rows are fetched as the few words that hold them."""
    return problem.size[1] <= ROW and problem.aligned >= 4 and is_dense(problem) and problem.plane_strides[0] % 2 == 0


def is_dense(problem: DepthwiseProblem) -> bool:
    """Whether the planes of an image are one stretch of memory."""
    _, channel, row, _ = problem.plane_strides
    height, width = problem.size
    return channel == height * width and (row == width or height == 1)


def granules(problem: DepthwiseProblem) -> tuple[int, ...]:
    """Elements that may go to shared memory together, most first."""
    return (4,) if takes_rows(problem) else tuple(g for g in (8, 4, 2, 1) if g <= widths(problem)[0])


def tile_for(problem: DepthwiseProblem) -> Tile:
    """The tile of choice: the more rows, the fewer rows of A a product, as long as its input fits in registers."""
    out_h, strides = problem.out_size[0], problem.stride[0] * problem.stride[1]
    if out_h == 1:
        return Tile(rows=1, tiles=4)
    if strides > 1:
        return Tile(rows=4 if strides == 2 else 2 if strides == 4 else 1)
    if out_h < 9 or (out_h <= 24 and up(out_h, 7) > 1.1 * up(out_h, 4)):
        return Tile(rows=4)
    return Tile(rows=7)


class MatrixNchw(Variant):
    stem = "matrix_nchw"
    dtypes = ("float16", "bfloat16")
    technique = (
        "each block fetches its input as it lies into zero-padded shared memory; tensor cores multiply groups of eight "
        "outputs by each filter row as a banded matrix, with float32 sums"
    )

    def tiles(self, problem: DepthwiseProblem) -> Iterator[Tile]:
        """The tile of choice, and others to tune with."""
        tile = tile_for(problem)
        yield tile
        yield replace(tile, stage=not tile.stage)
        yield Tile(rows=4)
        yield Tile(rows=2, tiles=2)

    def candidates(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Plan | Rejection]:
        if max(problem.stride) > 1:
            yield Rejection(self.stem, "", "with strides, rows of A meet in the same banks of shared memory: slower")
        else:
            yield self.plan(problem, device, tile_for(problem))
        yield from slice_plans(self.stem, problem, device)

    def every_plan(self, problem: DepthwiseProblem, device: DeviceSpec) -> list[Plan]:
        """The plans of all legal tiles: for tests and for tuning."""
        plans = [self.plan(problem, device, tile) for tile in self.tiles(problem)]
        plans += slice_plans(self.stem, problem, device)
        return legal(plans)

    def plan(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Plan | Rejection:
        """The plan of one tile, or why it is not legal."""

        def rejected(reason: str) -> Rejection:
            return Rejection(self.stem, str(tile), reason)

        if reason := too_long(problem):
            return rejected(reason)
        if device.sm < 80:
            return rejected(f"{device.arch} has no tensor cores for products of 16×8×16")
        lead, _ = lead_of(problem, granules(problem))
        if problem.size[1] >= NARROW and (problem.size[1] % 4 or problem.out_size[1] % 2):
            return rejected(f"rows of {NARROW} columns and more must be a multiple of 4 long, those of y of 2")
        if (bands := problem.filter[0] * steps(problem, lead)) > MAX_BANDS:
            return rejected(f"the filter's {bands} bands don't fit in registers; {MAX_BANDS} do")
        if max(math.prod(problem.size), math.prod(problem.out_size)) >= 2**31:
            return rejected("a plane's elements can't be numbered in 31 bits")
        if problem.size[1] == 0 or problem.size[0] == 0:
            return rejected("there is no input")
        if found := self.cuts(problem, device, tile):
            return min(found, key=lambda plan: plan.predicted_seconds)
        return rejected(
            f"no item fits in the {device.shared_bytes - 1024} bytes of shared memory of a block and in the registers "
            "of its threads"
        )

    def cuts(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> list[Plan]:
        """The plans of all ways to cut a problem that `plan` takes into items; one kernel, or two, serves them."""
        store = widths(problem)[1]
        lead, granule = lead_of(problem, granules(problem))
        plans = (
            self._plan(problem, device, tile, geometry, lead, granule, store)
            for geometry in geometries(problem, tile, lead)
        )
        return [plan for plan in plans if plan is not None and plan.shared_bytes < device.shared_bytes - 1024]

    def _plan(
        self,
        problem: DepthwiseProblem,
        device: DeviceSpec,
        tile: Tile,
        geometry: Geometry,
        lead: int,
        granule: int,
        store: int,
    ) -> Plan | None:
        """The plan of one cut; None if its parts can't be numbered in 16 bits, or its blocks in 31."""
        (in_h, in_w), (out_h, out_w) = problem.size, problem.out_size
        one_column = geometry.column_items == 1
        image = problem.plane_strides[0]
        stretch = is_dense(problem) and one_column
        in_rows = fetched_rows(problem, tile, geometry)
        item_rows = min(geometry.bands * tile.rows, out_h)
        item_columns = min(8 * geometry.groups, out_w)
        out_channels = geometry.channels * problem.multiplier
        rowwise = takes_rows(problem)
        if rowwise:
            unit, line_units, units = in_w, 1, geometry.channels * in_rows
            count = units
        elif stretch:
            rows = in_h if geometry.row_items == 1 else 1
            unit = widest(
                min(8, problem.aligned // 2), in_w * rows * geometry.channels, in_h * in_w * problem.channels, image
            )
            unit = max(granule, unit) if in_w >= unit - 1 else granule  # a unit may reach over two rows, not three
            line_units, count = in_w, geometry.channels * in_rows * in_w
            units = divided(count, unit)
        else:
            reach = lead + window_columns(problem, item_columns)
            unit, line_units = granule, divided(min(in_w, reach) + granule - 1, granule)
            units = geometry.channels * in_rows * line_units
            count = units
        staged = tile.stage and one_column and (geometry.row_items == 1 or out_channels == 1)
        out_image = problem.out_channels * out_h * out_w
        starts = out_channels * out_h * out_w if geometry.row_items == 1 else item_rows * out_w
        planes_out = out_h * out_w * (out_channels if geometry.row_items == 1 else 1)
        store_unit = widest(min(8, problem.aligned // 2), starts, planes_out, out_image) if staged else 1
        if in_w >= NARROW:
            store_unit = min(unit, store_unit)  # fewer kernels
        result_units = divided(out_channels * item_rows * out_w, store_unit)
        result_image = 0
        if staged:
            result_image = up(out_channels * item_rows * out_w, 8)
            if geometry.images > 1:
                result_image = result_pitch(problem, tile, geometry, result_image)
        warps = geometry.block_warps(problem)
        if max(geometry.images * max(units, result_units), count, geometry.warps * 16 * tile.tiles) >= 2**16:
            return None
        if max(in_rows, line_units, geometry.groups) >= 2**15 or geometry.items >= 2**31:
            return None
        loads = count_of(geometry.images * units, 32 * warps, UNITS)
        stores = count_of(geometry.images * result_units if staged else 1, 32 * warps, UNITS)
        if loads is None or stores is None:
            return None
        places = 2 if geometry.images == 1 or rowwise else 3
        held_registers = loads * (divided(unit, 2) + places) + (2 * stores if geometry.images > 1 else 0)
        if held_registers > MAX_HELD:
            return None
        if geometry.images > 1 and in_w >= NARROW:
            return None
        if geometry.images * max(image, out_image) >= 2**31:
            return None
        of_registers = blocks_of_registers(problem, tile, lead, held_registers, warps)
        filters = up(warps * problem.filter[0] * filter_pitch(problem, lead), 8)
        planes = geometry.channels * geometry.images
        # the last group's row of A may reach over the last row
        image_elements = up(planes * geometry.plane_pitch + 16 * steps(problem, lead), 8)
        results = geometry.images * result_image if staged else 0
        shared = 2 * (filters + image_elements + results)
        constants = problem_constants(problem) | {
            "THREADS": 32 * up(warps, 4),
            "MIN_BLOCKS": of_registers,
            "ROWS": tile.rows,
            "TILES": tile.tiles,
            "LOADS": loads,
            "STORES": stores if geometry.images > 1 else UNITS[0],
            "LEAD": lead,
            "GRANULE": granule,
            "UNIT": unit,
            "STORE_VECTOR": store,
            "STORE_UNIT": store_unit,
            "ONE_IMAGE": int(geometry.images == 1),
            "INPUT": 2 if rowwise else int(stretch),
            "STAGE_OUTPUTS": int(staged),
            "SLICE": 0,
            "STAGES": 1,
        }
        vectors = geometry.images * units / (32 * warps)
        pieces = 2 if rowwise else divided(unit, granule)
        resident = resident_blocks(device, 32 * warps, of_registers, shared)
        blocks, share, image_groups = shares(geometry, resident * device.multiprocessors)
        stored = geometry.images * result_units / (32 * warps)
        puts = 2 * tile.tiles * tile.rows * (3 - store)
        words = vectors * unit * 2 / 4
        extra = (
            (1.5 if geometry.images > 1 else 1.0) * vectors * (6 + 2 * pieces)
            + puts * 5
            + (stored * 5 if staged else 0)
        )
        wavefronts = words * (1.2 if granule > 1 else 2)
        wavefronts += (
            puts * 1.5 + stored * store_unit / 2 if staged else puts * 8
        )  # else groups lie in lines of their own
        return Plan(
            problem=problem,
            device=device,
            variant=self.stem,
            constants=tuple(sorted(constants.items())),
            grid=(blocks, 1, 1),
            block=(32 * warps, 1, 1),
            shared_bytes=shared,
            sizes=problem_sizes(problem),
            tiling=(
                *item_divisors(geometry, image_groups),
                *short_divisor(units),
                *short_divisor(line_units),
                *short_divisor(in_rows),
                *short_divisor(max(1, result_units)),
                geometry.images,
                geometry.channels,
                share,
                geometry.items // geometry.image_groups * image_groups,
                item_rows,
                item_columns,
                in_h * in_w,
                out_h * out_w,
                geometry.pitch,
                geometry.plane_pitch,
                geometry.images * geometry.plane_pitch - in_rows * geometry.pitch,
                result_image,
                filters,
                image_elements,
                32 * warps,
                max(0, problem.batch - geometry.images),
                0,
                0,
            ),
            tile=f"{tile}; {share} × {geometry.images} images × {geometry.channels} channels",
            predicted_seconds=item_seconds(
                problem,
                device,
                tile,
                geometry,
                lead,
                resident=resident,
                blocks=blocks,
                share=share,
                warps=warps,
                extra_instructions=extra,
                extra_wavefronts=wavefronts,
            ),
        )
