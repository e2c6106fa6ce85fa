"""Groups of lanes that own strips of columns: the geometry of kernels/strips.cuh, from the side of the host."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import fast_divisor
from ..problem import DepthwiseProblem
from .base import GRID_X_LIMIT


@dataclass(frozen=True, slots=True)
class Columns:
    """Twin of `StripColumns` in the kernels: the columns a lane owns, and the halo it needs from others."""

    own: int
    shift: int
    left: int
    right: int

    @property
    def halo_lanes(self) -> int:
        """Lanes that load halo columns; each loads as many as a lane owns, or fewer."""
        return -(-self.left // self.own) - (-self.right // self.own)

    @property
    def halo_registers(self) -> int:
        return max(min(self.left, self.own), min(self.right, self.own))

    @property
    def span(self) -> int:
        """Columns that the outputs of one slot read."""
        return self.own + self.left + self.right


def place_columns(problem: DepthwiseProblem, vector: int, load_vector: int) -> Columns:
    """Chooses the first owned column so that fewest columns come from other lanes, then so that fewest lanes load halo.

    The shift from output column * stride to the first owned column must be a multiple of the load vector.
    """
    span = columns_at(problem, vector, 0).span
    pad_left = problem.padding[1][0]
    start = -(-pad_left // load_vector) * load_vector
    shifts = range(-start, -pad_left + span + vector * problem.stride[1], load_vector)
    found = (columns_at(problem, vector, shift) for shift in shifts)
    return min(found, key=lambda c: (c.left + c.right, c.halo_lanes))


def columns_at(problem: DepthwiseProblem, vector: int, shift: int) -> Columns:
    """The columns of a lane whose first owned column stands `shift` right of its first output column times stride."""
    stride, own = problem.stride[1], vector * problem.stride[1]
    reach = (vector - 1) * stride + (problem.filter[1] - 1) * problem.dilation[1] + 1
    first = -problem.padding[1][0] - shift
    return Columns(own, shift, max(0, -first), max(0, first + reach - own))


def window_rows(problem: DepthwiseProblem, rows: int) -> int:
    """Input rows that `rows` neighbouring output rows reach over."""
    return (rows - 1) * problem.stride[0] + (problem.filter[0] - 1) * problem.dilation[0] + 1


def lanes_of(width: int, lane_outputs: int, least: int, whole_rows: bool) -> int:
    """Lanes in a group, a power of two from `least` to 32: as many as a row needs, or few idle ones and few halos.

    >>> lanes_of(510, 8, least=1, whole_rows=False), lanes_of(56, 8, least=1, whole_rows=True)
    (32, 8)
    """

    def cost(lanes: int) -> float:
        strip = lanes * lane_outputs
        strips = -(-width // strip)
        return strips * (strip + 4) if not whole_rows or strips == 1 else float("inf")

    return min((lanes for lanes in (32, 16, 8, 4, 2, 1) if lanes >= least), key=cost)


def vector_limits(problem: DepthwiseProblem) -> tuple[int, int]:
    """Elements that one load and one store may move: 4, 2 or 1, as addresses of rows allow.

    Stores of strided problems, a half of the traffic or less, are kept to 2, which leaves fewer kernels to compile.
    """

    def limit(*strides: int) -> int:
        elements = problem.aligned // problem.element_bytes
        return next(v for v in (4, 2, 1) if v <= elements and all(stride % v == 0 for stride in strides))

    x_image, x_channel, x_row, _ = problem.plane_strides
    load = limit(problem.size[1], x_image, x_channel, x_row)
    strided = problem.stride[1] > 1
    return load, min(limit(problem.out_size[1]), 2 if strided and load > 1 else 1 if strided else 2 * load)


def too_long(problem: DepthwiseProblem) -> str | None:
    """Why rows and columns can't be numbered in 31 bits, with room for the last strip to reach past them."""
    longest = max(*problem.size, *problem.out_size) + max(problem.padding[0] + problem.padding[1])
    if longest < 2**31 - 2**16:
        return None
    return f"a padded row or column of {longest} elements is too long to be numbered in 31 bits"


@dataclass(frozen=True, slots=True)
class Strips:
    """How a problem is cut: every plane into column strips, each of them into row strips; a group makes one."""

    lanes: int
    row_strips: int
    column_strips: int
    planes: int
    out_channels: int

    @classmethod
    def of(cls, problem: DepthwiseProblem, lanes: int, columns: int, rows: int) -> Strips:
        """Strips of `lanes` lanes, `columns` output columns and `rows` output rows."""
        return cls(
            lanes=lanes,
            row_strips=-(-problem.out_size[0] // rows),
            column_strips=-(-problem.out_size[1] // columns),
            planes=problem.batch * problem.out_channels,
            out_channels=problem.out_channels,
        )

    @property
    def groups(self) -> int:
        return self.planes * self.row_strips * self.column_strips

    @property
    def threads(self) -> int:
        return self.groups * self.lanes

    @property
    def tiling(self) -> tuple[int, ...]:
        """The fields of `dwconv::StripTiling`."""
        return (
            *fast_divisor(self.row_strips),
            *fast_divisor(self.column_strips),
            *fast_divisor(self.out_channels),
            self.groups,
            self.lanes.bit_length() - 1,
        )

    def too_many(self, threads: int) -> str | None:
        """Why the threads of blocks of so many can't be numbered."""
        if self.threads <= GRID_X_LIMIT - threads:
            return None
        return f"{self.threads} threads can't be numbered in 31 bits"

    def blocks(self, threads: int) -> int:
        """Blocks of so many threads; at least one."""
        return max(1, -(-self.threads // threads))

    def block_planes(self, threads: int) -> int:
        """Planes that the groups of one block belong to, at most."""
        groups, of_plane = threads // self.lanes, self.row_strips * self.column_strips
        return min(groups, -(-(groups - 1) // of_plane) + 1)
