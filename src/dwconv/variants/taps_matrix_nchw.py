"""taps_matrix_nchw: gradients of filters in 16 bits, channels first: rows of x and g as matrices on tensor cores."""

from __future__ import annotations

from collections.abc import Iterator

from ..device import DeviceSpec
from ..problem import DepthwiseProblem
from .march import axes
from .strips import divided, widest
from .taps_lines import LinesVariant
from .taps_lines_cost import Costs
from .taps_lines_tiles import Layout, Tile, across_axis, line_shapes, narrow, tap_rows, with_residents

MOST_REGISTERS = 140  # of a thread for sums, rows of g and fragments
OTHER_REGISTERS = 40  # of a thread, beside those
PIECE_REGISTERS, WAITING_REGISTERS = 2, 4  # for a copy; for one of two bytes, which the thread waits for
SET = 16  # groups of eight outputs that a product takes
MOST_STAGES = 8


class TapsMatrixNchw(LinesVariant):
    stem = "taps_matrix_nchw"
    layouts = ("channels_first",)
    # Fitted to 1378 tiles of 44 problems (H200, 2026-11).
    costs = Costs(
        product=1.43,
        piece=5.9,
        step=83.0,
        segment=59.0,
        idle_warps=4.4,
        tensor_clocks=4.9,
        copy_clocks=6.5,
        l2_bytes=56.0,
        wait=0.04,
        narrow=0.295,
        past_narrow=0.15,
        past=0.1,
        thrash=0.21,
        start=5.3e-6,
        parts=2.2e-6,
        round=0.57e-6,
    )
    technique = (
        "rows of x are matrices of overlapping windows, rows of y's gradient matrices of groups of outputs; tensor "
        "cores multiply them for each row of taps, each warp those of channels of its own"
    )

    @staticmethod
    def elements(problem: DepthwiseProblem, tile: Tile) -> tuple[int, int]:
        """Neighbouring columns that one copy of x, and of g, moves."""
        image, channel, row, _ = problem.plane_strides
        apart = (*((row,) if problem.size[0] > 1 else ()), *((channel,) if problem.channels > 1 else ()))
        taps = (tile.taps[1] * problem.dilation[1],) if tile.taps[1] < problem.filter[1] else ()
        of_x = (problem.size[1], *apart, *taps, *((image,) if problem.batch > 1 else ()))
        return widest(4, problem.aligned // 2, *of_x), widest(4, problem.aligned // 2, problem.out_size[1])

    def layout(self, problem: DepthwiseProblem, tile: Tile) -> Layout | str:
        m = problem.multiplier
        if tile.own % m and m % tile.own:
            return f"{tile.own} channels of a warp and {m} outputs of a channel don't divide each other"
        along, across = axes(problem, tile.turned)[0], across_axis(problem, tile.turned)
        x_elements, g_elements = self.elements(problem, tile)
        lead = -across.padding % x_elements
        window = 7 * across.stride + (tile.taps[1] - 1) * problem.dilation[1] + 1 + lead
        matrices, sets = divided(window, 16), divided(tile.groups * tile.lines, SET)
        line_chunks = divided(window + 8 * (tile.groups - 1) * across.stride, 8)
        chunk_rows = max(tile.groups + (2 * matrices - 1) // across.stride, divided(line_chunks, across.stride))
        planes = min(across.stride - 1, 2 * matrices - 1)
        reached = (planes * chunk_rows + (2 * matrices - 1) // across.stride) * tile.lines
        g_chunks = SET * sets
        x_chunks = max(g_chunks + reached, across.stride * chunk_rows * tile.lines)
        is_narrow = narrow(problem, tile, across.padding + lead, line_chunks)
        x_positions = min(across.size, 8 * line_chunks - across.padding - lead) if is_narrow else 8 * line_chunks
        g_positions = across.out if is_narrow else 8 * tile.groups
        x_own = max(1, tile.own // m)

        def pieces(positions: int, channels: int, elements: int) -> int:
            chunks = divided(divided(positions, elements), 8 // elements)
            return divided(tile.lines * chunks * (8 // elements) * channels, 32)

        rows, live = min(along.stride, tile.taps[0]), divided(tile.taps[0], along.stride)
        x_pieces, g_pieces = pieces(x_positions, x_own, x_elements), pieces(g_positions, tile.own, g_elements)
        registers = tile.own * (4 * tile.taps[0] * matrices + 2 * live * sets + 4 * matrices + 4 * problem.bias)
        registers += 8 * tile.own * (sets - 1)  # else 10 of 12 tiles of two sets didn't fit (sm_90, NVRTC 13.0)
        return Layout(
            lead=lead,
            width=across.size if is_narrow else 0,
            x_bytes=2 * x_elements,
            g_bytes=2 * g_elements,
            x_pieces=x_pieces,
            g_pieces=g_pieces,
            stage_bytes=16 * tile.warps * (rows * x_own * x_chunks + tile.own * g_chunks),
            gate_bytes=0,
            flying_bytes=2 * tile.lines * tile.warps * (rows * x_positions * x_own + g_positions * tile.own),
            together_bytes=128 * g_positions / (g_positions + 64),
            products=tile.own * matrices * sets,
            loads=(tile.own * matrices * sets, tile.own * sets / 2),
            wavefronts=(4 * x_own * matrices * sets, 2 * tile.own * sets),
            registers=registers
            + sum(
                pieces * (WAITING_REGISTERS if elements == 1 else PIECE_REGISTERS)
                for pieces, elements in ((x_pieces, x_elements), (g_pieces, g_elements))
            ),
        )

    def tiles(self, problem: DepthwiseProblem, device: DeviceSpec) -> Iterator[Tile]:
        m, dilation = problem.multiplier, problem.dilation[1]
        across = across_axis(problem, False)
        columns = [across.filter] if across.filter <= 64 else []
        columns += [taps for taps in (9, 24, 40) if taps < across.filter]
        for taps_b in columns:
            if taps_b < across.filter and taps_b * dilation % 4:
                taps_b = taps_b // 4 * 4
            for groups, lines in line_shapes(across.out, SET):
                all_lines = problem.batch * divided(across.out, 8 * groups)
                # Two sets a step win where lines are long, or filters wide, and lose up to a third elsewhere (H200).
                twice = ((2, 2), (1, 2)) if across.out > 64 or taps_b > 8 else ()
                for own, sets in ((4, 1), (2, 1), (1, 1), *twice):
                    fitting = max(1, min(sets * lines, all_lines))
                    if (own % m and m % own) or fitting <= (sets - 1) * lines:
                        continue
                    for taps_a in self._tap_rows(problem, taps_b, groups, fitting, own):
                        for warps in (8, 4, 12, 6, 2):
                            if warps * own > problem.out_channels and warps > 2:
                                continue
                            tile = Tile(False, (taps_a, taps_b), groups, fitting, own, warps)
                            one = self.layout(problem, tile)
                            if not isinstance(one, str):
                                yield from with_residents(
                                    device,
                                    tile,
                                    one.registers + OTHER_REGISTERS,
                                    one.stage_bytes + one.gate_bytes,
                                    MOST_STAGES,
                                )

    def _tap_rows(self, problem: DepthwiseProblem, taps_b: int, groups: int, lines: int, own: int) -> list[int]:
        """Rows of taps of a tile that fit in registers."""
        filter_a = problem.filter[0]

        def fits(rows: int) -> bool:
            one = self.layout(problem, Tile(False, (rows, taps_b), groups, lines, own))
            return not isinstance(one, str) and one.registers <= MOST_REGISTERS

        most = max((rows for rows in range(1, min(filter_a, 32) + 1) if fits(rows)), default=0)
        return tap_rows(filter_a, most) if most else []
