"""How channels-last images are cut into tiles: what variants on `kernels/nhwc_tiles.cuh` share."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import fast_divisor


@dataclass(frozen=True, slots=True)
class Cut:
    """How images are cut: threads side by side and one above the other in a tile, and images of a tile."""

    column_groups: int
    row_groups: int
    images: int
    column_tiles: int
    row_tiles: int
    in_columns: int
    in_rows: int
    tiles: int

    @property
    def pixels(self) -> int:
        """Pixels of what is read, in a tile with its halo."""
        return self.in_columns * self.in_rows * self.images


def tiling_of(
    one: Cut, batch: int, chunks: int, slots: int, first: int = 1, step: int = 1, each: int = 1
) -> tuple[int, ...]:
    """The fields of `dwconv::NhwcTiling`, in their order. slots: pixels that a block copies at a time."""
    divisors = (chunks, one.column_tiles, one.row_tiles, one.column_groups, one.row_groups, one.in_columns, one.in_rows)
    return (
        *(field for divisor in divisors for field in fast_divisor(divisor)),
        one.images,
        batch,
        one.tiles,
        first,
        step,
        each,
        max(1, slots // one.in_columns),
    )
