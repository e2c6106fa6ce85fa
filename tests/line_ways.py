"""Ways through taps_matrix_nchw and taps_sparse_nhwc that the tiles worth timing need not take, mistakes in their
kernels, and numbers that plans and kernels must agree on.
"""

from __future__ import annotations

from box_tiles import SPARSE as SPARSE_BOXES
from dwconv.plan import Plan
from dwconv.variants.taps_lines import LinesVariant
from dwconv.variants.taps_lines_tiles import Cut, Tile
from dwconv.variants.taps_matrix_nchw import TapsMatrixNchw
from dwconv.variants.taps_sparse_nhwc import TapsSparseNhwc
from line_problems import problem

MATRIX, SPARSE = TapsMatrixNchw(), TapsSparseNhwc()
BOTH: tuple[LinesVariant, ...] = (MATRIX, SPARSE)
FIRST, LAST = "channels_first", "channels_last"

WAYS = {
    MATRIX: {
        "rows of taps": (problem(FIRST, 2, 4, (7, 7), 13, padding=6), Tile(False, (3, 13), 1, 2, 2, warps=2)),
        "rows and columns of taps": (
            problem(FIRST, 1, 4, (9, 20), 31, padding=15, dtype="bfloat16", bias=True),
            Tile(False, (2, 8), 3, 1, 2, warps=2),
        ),
        "lines, the last ones incomplete": (
            problem(FIRST, 9, 3, (4, 4), 3, padding=1, dtype="bfloat16"),
            Tile(False, (3, 3), 1, 7, 1, warps=2, stages=2),
        ),
        "two sets, channels that don't exist": (
            problem(FIRST, 3, 5, (6, 56), 3, padding=1),
            Tile(False, (3, 3), 7, 3, 2, warps=2, stages=3),
        ),
        "dilated windows of four matrices": (
            problem(FIRST, 1, 3, (9, 60), (2, 7), stride=(1, 2), padding=(0, 9), dilation=(3, 6), bias=True),
            Tile(False, (2, 7), 4, 1, 1, warps=2),
        ),
        "a multiplier of three": (
            problem(FIRST, 2, 5, (6, 9), 3, padding=1, multiplier=3, dtype="bfloat16"),
            Tile(False, (3, 3), 2, 2, 1, warps=4),
        ),
        "two channels of x, two outputs each": (
            problem(FIRST, 2, 5, (6, 8), (3, 5), padding=(1, 2), multiplier=2, bias=True),
            Tile(False, (3, 5), 1, 2, 4, warps=2),
        ),
        "many parts": (
            problem(FIRST, 1, 4, (250, 5), (1, 25), padding=(0, 12)),
            Tile(False, (1, 25), 1, 1, 4, warps=1),
        ),
        "one part": (problem(FIRST, 1, 2, (3, 3), 3, padding=1, bias=True), Tile(False, (3, 3), 1, 1, 1, warps=2)),
        "a view": (
            problem(FIRST, 2, 3, (7, 8), 3, padding=1, x_strides=(1600, 400, 20, 1)),
            Tile(False, (3, 3), 1, 2, 1, warps=2),
        ),
    },
    SPARSE: {
        **SPARSE_BOXES,
        "along rows": (
            problem(LAST, 1, 16, (15, 20), (2, 7), stride=(1, 2), padding=(1, 3), dtype="bfloat16", bias=True),
            Tile(True, (7, 2), 2, 2, 2, warps=4, stages=3),
        ),
        "rows of taps": (problem(LAST, 2, 16, (7, 7), 13, padding=6), Tile(False, (3, 13), 1, 2, 2, warps=4)),
        "rows and columns of taps": (
            problem(LAST, 1, 8, (9, 20), 31, padding=15, dtype="bfloat16", bias=True),
            Tile(False, (2, 9), 3, 1, 2, warps=4, cached=False),
        ),
        "pairs of lines, the last ones incomplete": (
            problem(LAST, 9, 8, (4, 4), 3, padding=1, dtype="bfloat16"),
            Tile(False, (3, 3), 1, 7, 2, warps=4),
        ),
        "lines, the last ones incomplete": (
            problem(LAST, 3, 8, (5, 20), 3, padding=1),
            Tile(False, (3, 3), 2, 4, 2, warps=4, stages=2),
        ),
        "two sets, of four channels": (
            problem(LAST, 9, 8, (6, 14), 3, padding=1),
            Tile(False, (3, 3), 2, 9, 4, warps=2),
        ),
        "eight channels, channels that don't exist": (
            problem(LAST, 2, 20, (8, 8), 3, padding=1, dtype="bfloat16", bias=True),
            Tile(False, (3, 3), 1, 2, 8, warps=2, stages=2),
        ),
        "many parts": (problem(LAST, 1, 8, (250, 5), (1, 25), padding=(0, 12)), Tile(False, (1, 25), 1, 1, 2, warps=4)),
        "one part": (problem(LAST, 1, 8, (3, 3), 3, padding=1, bias=True), Tile(False, (3, 3), 1, 1, 2, warps=4)),
        "a view": (
            problem(LAST, 2, 8, (7, 8), 3, padding=1, x_strides=(9 * 9 * 24, 1, 9 * 24, 24)),
            Tile(False, (3, 3), 1, 2, 2, warps=4),
        ),
    },
}

# Values of constants that the ways and the edges take.
TAKEN = {
    MATRIX: {
        "OWN": {1, 2, 4},
        "X_BYTES": {2, 4, 8},
        "G_BYTES": {2, 4, 8},
        "VOLUME": {0, 1},
        "LEAD": {0, 1, 2, 3},
    },
    SPARSE: {
        "TURNED": {0, 1},
        "OWN": {2, 4, 8},
        "X_BYTES": {4, 8, 16},
        "G_BYTES": {4, 8, 16},
        "CACHED": {0, 1},
        "BOXES": {0, 1},
        "EVICT_FIRST": {0, 1},
        "VOLUME": {0, 1},
    },
}

_OF_BOTH = {
    "the second column of another diagonal": ("((m + Stride) & 7)", "m"),
    "words of the chunk before": ("Stride * (2 * q + column) - m + 7", "Stride * (2 * q + column) - m"),
    "rows of g of the segment before": ("segment.has(number - back)", "segment.has(segment.first)"),
    "a column of x too far": ("tap_b * W::kApartB * W::kSpreadB - W::kLead", "tap_b * W::kApartB * W::kSpreadB + 1"),
    "a stage that isn't cleared": ("= uint4{0, 0, 0, 0};", "= uint4{0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};"),
    "a part left out": (
        "unsigned part = first_part; part < end_part",
        "unsigned part = first_part + 1; part < end_part",
    ),
}

# What is wrong: (in the kernel, instead)
MUTANTS = {
    MATRIX: _OF_BOTH
    | {
        "windows that begin at the lead": ("at = position - W::kLead", "at = position"),
        "the row of g of another step": (
            "g[o][(Phase + W::kLive - back) % W::kLive]",
            "g[o][(Phase + back) % W::kLive]",
        ),
        "other groups in the matrix": ("lane % 8 + lane / 16 * 8", "lane % 8 + lane / 8 % 2 * 8"),
    },
    SPARSE: _OF_BOTH
    | {
        "the row of g of another step": (
            "g[p][(Phase + W::kLive - back) % W::kLive]",
            "g[p][(Phase + back) % W::kLive]",
        ),
        "the other channel's words": ("[channel / 2], channel % 2)", "[channel / 2], 1 - channel % 2)"),
        "the windows of other outputs": ("W::word_of(1, c)", "W::word_of(0, c)"),
    },
}


def sums_bytes(plan: Plan, tile: Tile) -> int:
    """What the sums of a block take of shared memory."""
    return 4 * (tile.taps[0] * tile.taps[1] + plan.problem.bias) * (tile.channels + 4)


def numbers_of(variant: LinesVariant, tile: Tile, one: Cut, plan: Plan) -> dict[str, int]:
    """Expressions in the kernel's W, and what they must be for a plan."""
    of_both = {
        "W::kCount": one.count,
        "W::kLive": one.live,
        "W::kRows": one.rows,
        "W::kTapTilesA * W::kTapTilesB * Config::kFilterD": one.march.tap_tiles,
    }
    if not tile.boxes:
        of_both |= {"W::XPieces::kCopies": one.layout.x_pieces, "W::GPieces::kCopies": one.layout.g_pieces}
    else:
        columns = [each.box[1] for each in plan.maps]
        of_both |= {"W::kXBoxColumns": columns[0], "W::kGBoxColumns": columns[1]}
    if variant is MATRIX:
        return of_both | {
            "W::kStageBytes * Config::kWarps": one.layout.stage_bytes,
            "W::kSets * W::kMatrices * Config::kOwn": one.layout.products,
        }
    return of_both | {
        "W::kStageBytes": one.layout.stage_bytes,
        "W::kGatesAt + dwconv::StageGates<Config::kStages, W::kThreads>::kBytes": plan.shared_bytes,
        "W::kSumsBytes": sums_bytes(plan, tile),
        "W::kSets * W::kChunks * Config::kOwn / 2": one.layout.products,
    }
