"""taps_sparse_nhwc: gradients of filters in 16 bits, channels last: pairs of channels on sparse tensor cores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .boxes import Maps, gradient_maps
from .march import axes
from .streams import LINE, MOST_SIZES
from .strips import divided, planar, up, widest
from .taps_lines import LinesVariant
from .taps_lines_cost import Costs
from .taps_lines_tiles import Layout, Tile, across_axis, line_shapes, narrow, tap_rows, with_residents

MOST_REGISTERS = 214  # of a thread for sums, rows of g and fragments
OTHER_REGISTERS = 34  # of a thread, beside those
MORE_REGISTERS = 10  # where a step has several rows of x, or sets, or classes, or lines of one group
PIECE_REGISTERS = 2
NARROW_REGISTERS = 12  # of eight channels of a warp, where images are one line wide: 3×3 spilled 16 bytes
SET = 16  # groups of eight outputs that a product takes
MOST_STAGES = 8


def box_chunks(problem: DepthwiseProblem, tile: Tile) -> tuple[int, int]:
    """Chunks of eight positions of a line that lanes read, of x and of g: also those of pairs that don't exist.

    problem: planar.
    """
    stride = across_axis(problem, tile.turned).stride
    chunks = divided(7 * stride + tile.taps[1], 8)
    if tile.groups == 1:
        return chunks, 1
    sets = divided(divided(tile.groups, 2) * tile.lines, 8)
    of_line = divided(8 * sets, tile.lines)
    return (of_line - 1) * 2 * stride + stride + chunks, 2 * of_line


def line_chunks(problem: DepthwiseProblem, tile: Tile) -> int:
    """Chunks of eight positions of a line of a planar problem's x."""
    stride = across_axis(problem, tile.turned).stride
    return divided((8 * tile.groups - 1) * stride + tile.taps[1], 8)


def one_line_wide(problem: DepthwiseProblem, tile: Tile) -> bool:
    """See `narrow`; problem: planar."""
    return narrow(problem, tile, across_axis(problem, tile.turned).padding, line_chunks(problem, tile))


def box_columns(problem: DepthwiseProblem, tile: Tile) -> tuple[int, int]:
    """Columns of a line that a box brings, of x and of g: those that exist, of images one line wide.

    problem: planar.
    """
    across, (in_x, in_g) = across_axis(problem, tile.turned), box_chunks(problem, tile)
    if not one_line_wide(problem, tile):
        return 8 * in_x, 8 * in_g
    step = max(1, LINE // (2 * tile.channels // problem.multiplier))  # boxes begin at multiples of 128 bytes
    return min(across.padding + across.size, 8 * in_x) - across.padding // step * step, across.out


def box_bytes(chunks: int, shifts: int, channels: int) -> int:
    """Bytes of a row of all lines, of so many chunks, shifted by so many pixels in all."""
    pixel = 2 * channels
    return up(8 * chunks * pixel + (shifts * pixel if pixel >= 64 else 0), 1024)


class TapsSparseNhwc(LinesVariant):
    stem = "taps_sparse_nhwc"
    layouts = ("channels_last",)
    # Fitted to 1,161 tiles of 48 problems, a third of them with boxes (H200, 2026-11).
    costs = Costs(
        product=6.39,
        piece=10.1,
        step=21.6,
        segment=136.0,
        idle_warps=6.62,
        tensor_clocks=2.69,
        copy_clocks=9.36,
        l2_bytes=51.5,
        wait=1.03,
        narrow=0.0609,
        past_narrow=0.483,
        past=0.0321,
        thrash=0.381,
        start=8.9e-6,
        parts=0.0,
        round=0.14e-6,
        box=6.36,
        engine=2.2,
        apart=0.073,
        together=39.3e3,
    )
    technique = (
        "rows of x are matrices of overlapping windows of two channels, sparse by their shape, and rows of y's "
        "gradient matrices of groups of outputs; tensor cores multiply them for each row of taps"
    )

    def layout(self, problem: DepthwiseProblem, tile: Tile) -> Layout | str:
        m = problem.multiplier
        if tile.own % (2 * m):
            return f"{tile.own} channels of a warp are no whole pairs of x's, {m} outputs each"
        along, across = axes(problem, tile.turned)[0], across_axis(problem, tile.turned)
        image, _, row, column = problem.plane_strides
        images = (image,) if problem.batch > 1 else ()
        x_channels = tile.channels // m
        x_elements = widest(8, problem.aligned // 2, problem.channels, x_channels, row, column, *images)
        g_elements = widest(8, problem.aligned // 2, problem.out_channels, tile.channels)
        if min(x_elements, g_elements) == 1:
            return "pairs of channels aren't words in memory: their number is odd, or x begins between them"
        window = 7 * across.stride + tile.taps[1]
        chunks = divided(window, 8)
        pairs = divided(tile.lines, 2) if tile.groups == 1 else divided(tile.groups, 2) * tile.lines
        sets = divided(pairs, 8)
        of_line = line_chunks(problem, tile)
        if tile.groups == 1:
            words, planes, plane_lines = 2 * chunks, 2 * of_line, divided(tile.lines, 2)
            rows_of = [1] * planes
        else:
            words, planes, plane_lines = across.stride + chunks, 2 * across.stride, tile.lines
            rows_of = [divided(of_line - plane, planes) for plane in range(planes)]
        plane_at = [sum(rows_of[:plane]) * plane_lines for plane in range(planes + 1)]
        reached = [plane_at[w % planes] + w // planes * plane_lines + 8 * sets for w in range(words)]
        x_chunks = max(plane_at[-1], *reached)
        is_narrow = one_line_wide(problem, tile)
        x_positions = min(across.size, 8 * of_line - across.padding) if is_narrow else 8 * of_line
        g_positions = across.out if is_narrow else 8 * tile.groups

        def chunk_bytes(channels: int) -> int:
            return up(8 * up(2 * channels, 32, 16), 128, 32)

        boxes = box_chunks(problem, tile)

        def pieces(positions: int, channels: int, elements: int) -> int:
            return divided(tile.lines * positions * channels // elements, 32 * tile.warps)

        rows, live = min(along.stride, tile.taps[0]), divided(tile.taps[0], along.stride)
        own_pairs, x_pairs = tile.own // 2, tile.own // 2 // m
        stage_bytes = rows * x_chunks * chunk_bytes(x_channels)
        stage_bytes += 2 * up(8 * sets * chunk_bytes(tile.channels), 128, 64)
        if tile.boxes:  # pixels that all lines are shifted by: kXShift and kGShift of the kernel
            of_x, of_g = (1, 2) if tile.groups == 1 else (2, 4)
            x_shifts, g_shifts = of_x * tile.lines, of_g * tile.lines
            stage_bytes = rows * box_bytes(tile.lines * boxes[0], x_shifts, x_channels)
            stage_bytes += box_bytes(tile.lines * boxes[1], g_shifts, tile.channels)
        registers = own_pairs * (4 * tile.taps[0] * chunks + 4 * live * sets + 4 * problem.bias)
        groups_of_channels = divided(problem.out_channels, tile.channels)
        x_pieces = pieces(x_positions, x_channels, x_elements)
        g_pieces = pieces(g_positions, tile.channels, g_elements)
        if tile.boxes:
            x_pieces = g_pieces = 0
        return Layout(
            lead=0,
            width=across.size if is_narrow else 0,
            x_bytes=2 * x_elements,
            g_bytes=2 * g_elements,
            x_pieces=x_pieces,
            g_pieces=g_pieces,
            stage_bytes=stage_bytes,
            gate_bytes=16,
            flying_bytes=2 * tile.lines * (rows * x_positions * x_channels + g_positions * tile.channels),
            together_bytes=2 * (tile.channels if groups_of_channels > 1 else tile.channels * g_positions),
            products=own_pairs * chunks * sets,
            loads=(sets * (2 * words + 4 * own_pairs * chunks), 4 * sets),
            wavefronts=(8 * sets * words, 16 * sets),
            registers=registers
            + own_pairs * 4 * sets
            + 2 * words * x_pairs
            + 4
            + PIECE_REGISTERS * (x_pieces + g_pieces),
            box_columns=box_columns(problem, tile) if tile.boxes else (0, 0),
        )

    def maps(self, problem: DepthwiseProblem, device: DeviceSpec, tile: Tile) -> Maps | None:
        planes = planar(problem)
        chunks = box_chunks(planes, tile)
        one_line = across_axis(planes, tile.turned).out <= 8 * tile.groups
        pairs = divided(tile.groups, 2) * tile.lines
        whole = tile.lines % SET == 0 if tile.groups == 1 else pairs >= 8 or one_line
        if tile.lines & (tile.lines - 1) or not whole or not (one_line or tile.groups == chunks[1]):
            return None  # boxes would have other lines' outputs in them, or lanes would read what isn't there
        if problem.least_bytes > MOST_SIZES * device.l2_bytes:
            return None  # lanes' copies were faster: 138 µs, not 153, of 3×7 on 128 × 256 (H200, 2026-11)
        of_x, of_g = box_columns(planes, tile)
        x_box = (tile.channels // problem.multiplier, of_x)
        return gradient_maps(problem, device, tile.turned, x_box, (tile.channels, of_g), swizzled=True)

    @staticmethod
    def _more(problem: DepthwiseProblem, tile: Tile) -> int:
        """Registers of a thread beside those that the layout says: what ptxas needs so that nothing spills (sm_90)."""
        along, across = axes(problem, tile.turned)
        more = min(along.stride, tile.taps[0]) > 1 or tile.lines * up(tile.groups, 2) > SET
        more = more or along.classes * across.classes > 1 or tile.groups == 1
        beside = NARROW_REGISTERS if tile.own == 8 and one_line_wide(problem, tile) else 0
        return OTHER_REGISTERS + (MORE_REGISTERS if more else 0) + beside

    def tiles(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Tile]:
        m = problem.multiplier
        if m > 4:
            return
        for turned in (False, True):
            along, across = axes(problem, turned)[0], across_axis(problem, turned)
            width = divided(across.out, across.classes)
            if turned and (along.out == 1 or up(width, 8) > 1.2 * width or along.filter <= across.filter):
                continue
            columns = [across.filter] if across.filter <= 64 else []
            columns += [taps for taps in (9, 25, 41) if taps < across.filter]
            for taps_b in columns:
                for groups, lines in line_shapes(width, SET):
                    if 1 < groups < SET - 1 and groups % 2:
                        lines = max(1, SET // (groups + 1))
                    all_lines = problem.batch * across.classes * divided(width, 8 * groups)
                    for own, sets in ((8, 1), (4, 1), (4, 2), (2, 1), (2, 2)):
                        fitting = max(1, min(sets * lines, all_lines))
                        if own == 8 and groups == SET and across.padding > 0:
                            continue  # spills a register or two (sm_90)
                        if own % (2 * m) or fitting <= (sets - 1) * lines:
                            continue
                        for taps_a in self._tap_rows(problem, turned, taps_b, groups, fitting, own):
                            for warps in (8, 6, 4, 5, 3) if own == 8 else (16, 12, 8, 6, 4, 9, 10, 5, 3):
                                tile = Tile(turned, (taps_a, taps_b), groups, fitting, own, warps)
                                if warps * own > up(problem.out_channels, 8 * m) or warps * own % (8 * m):
                                    continue
                                one = self.layout(problem, tile)
                                if isinstance(one, str) or one.x_pieces * min(along.stride, taps_a) + one.g_pieces > 16:
                                    continue
                                for each in with_residents(
                                    device,
                                    tile,
                                    one.registers + self._more(problem, tile),
                                    one.stage_bytes + one.gate_bytes,
                                    MOST_STAGES,
                                ):
                                    yield each
                                    if min(one.x_bytes, one.g_bytes) == 16:
                                        yield replace(each, cached=False)

    def _tap_rows(
        self, problem: DepthwiseProblem, turned: bool, taps_b: int, groups: int, lines: int, own: int
    ) -> list[int]:
        """Rows of taps of a tile that fit in registers."""
        filter_a = axes(problem, turned)[0].filter

        def fits(rows: int) -> bool:
            one = self.layout(problem, Tile(turned, (rows, taps_b), groups, lines, own))
            return not isinstance(one, str) and one.registers <= MOST_REGISTERS

        most = max((rows for rows in range(1, min(filter_a, 32) + 1) if fits(rows)), default=0)
        return tap_rows(filter_a, most) if most else []
