"""Bands of planes: how wide_nchw cuts a problem into blocks; the geometry of kernels/wide_staging.cuh on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..plan import fast_divisor
from ..problem import DepthwiseProblem

THREADS = 128  # of a block whose warps take tasks of 32 tiles until none is left
MOST_TILES = 2048  # of a block
CHUNK = 32  # taps in registers at a time
GROUP, NEAR_ROWS = 4, 8  # twins of kGroup and kNearRows in the kernel
MOST_IMAGES = 32  # of a block
MANY_BLOCKS = 256  # images of a block aren't doubled where that leaves fewer blocks


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices. A lane makes `along` neighbouring outputs in each of `across` lines.

    Attributes:
        in_along: elements of the whole input line that belongs to a lane; 0: lines are cut into tiles.
        halves: such a line belongs to two lanes, the second of which makes its half from the line's end.
        transposed: lines are columns of the image, not rows.
        chunk: taps of a line that are in registers at a time.
        queued: warps take tasks of 32 tiles one after the other, and store each; else every lane makes one tile, and
            the block stores all.
        threads: of a block, at most.
        min_blocks: blocks that a multiprocessor must hold, which limits a thread's registers; 1 leaves that to ptxas.
        budget: bytes of shared memory that a block of several images may take.
        channels: of a block, at least: more than one makes moves wide where planes alone don't start at multiples of
            16 bytes.
    """

    along: int
    across: int = 1
    in_along: int = 0
    transposed: bool = False
    chunk: int = CHUNK
    threads: int = THREADS
    min_blocks: int = 1
    budget: int = 75 * 1024
    channels: int = 1
    queued: bool = True
    halves: bool = False

    def __str__(self) -> str:
        lines = "columns" if self.transposed else "rows"
        whole = "halves of " if self.halves else "whole " if self.in_along else ""
        return f"{self.across} × {self.along} outputs a lane, {whole}{lines}, {self.chunk} taps in registers"


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the problem, along or across."""

    size: int
    out: int
    taps: int
    stride: int
    dilation: int
    pad: int

    @classmethod
    def of(cls, problem: DepthwiseProblem, i: int) -> Axis:
        return cls(
            problem.size[i],
            problem.out_size[i],
            problem.filter[i],
            problem.stride[i],
            problem.dilation[i],
            problem.padding[i][0],
        )

    def window(self, outputs: int) -> int:
        """Elements that so many neighbouring outputs reach over."""
        return (outputs - 1) * self.stride + (self.taps - 1) * self.dilation + 1


@dataclass(frozen=True, slots=True)
class Band:
    """What a block makes: `tiles` of a lane's outputs along and across, of `images` times `channels` planes.

    Twin of optimize/host/wide_nchw.cuh.
    """

    problem: DepthwiseProblem
    tile: Tile
    along_tiles: int
    across_tiles: int
    images: int = 1
    channels: int = 1
    queued: bool = True

    @property
    def along(self) -> Axis:
        return Axis.of(self.problem, 0 if self.tile.transposed else 1)

    @property
    def across(self) -> Axis:
        return Axis.of(self.problem, 1 if self.tile.transposed else 0)

    @property
    def tiles(self) -> int:
        """Tiles of a block, at most."""
        return self.images * self.channels * self.along_tiles * self.across_tiles

    @property
    def tasks(self) -> int:
        return -(-self.tiles // 32)

    @property
    def warps(self) -> int:
        return min(self.tasks, self.tile.threads // 32) if self.tile.queued else self.tasks

    @property
    def bands(self) -> tuple[int, int]:
        """Bands of a plane, along and across."""
        return (
            -(-self.along.out // (self.along_tiles * self.tile.along)),
            -(-self.across.out // (self.across_tiles * self.tile.across)),
        )

    @property
    def in_extent(self) -> int:
        """Elements of a line that are staged; twin of kReach, kMargin and kShift in the kernel."""
        along, tile = self.along, self.tile
        if tile.in_along:
            return tile.in_along
        reach = (tile.along - 1) * along.stride + (tile.chunk - 1) * along.dilation
        margin = along.pad if along.pad <= reach else along.pad - (along.pad - reach) // 4 * 4
        extent = min(along.window(self.along_tiles * tile.along), along.size + margin + reach)
        return -(-(extent + -along.pad % 4) // 4) * 4

    @property
    def in_lines(self) -> int:
        """Lines staged, at most."""
        across = self.across
        outputs = self.across_tiles * self.tile.across
        if self.bands[1] == 1:
            return max(0, min(across.size, across.window(across.out) - across.pad))
        return min(across.size, across.window(outputs))

    @property
    def flat(self) -> bool:
        """Do lines stand in shared memory as in memory, one behind the other?"""
        return self.tile.in_along > 0 and not self.tile.transposed and not self.tile.halves

    @property
    def copies(self) -> int:
        """Of lines and taps in shared memory: as they are; for halves of lines mirrored, too."""
        return 2 if self.tile.halves else 1

    @property
    def channels_merged(self) -> bool:
        """Are the planes of the block's channels one stretch, in memory as in shared memory?"""
        problem, flat = self.problem, self.flat and not self.tile.queued
        height, width = problem.size
        dense = problem.plane_strides[1:3] == (height * width, width) and problem.multiplier == 1
        return self.channels > 1 and flat and dense and self.bands[1] == 1 and self.in_lines == height

    @property
    def pitches(self) -> tuple[int, int, int, int, int, int]:
        """Elements of shared memory: of a line, from one channel and one image to the next; of input, of output.

        Odd multiples of what one shared load takes, so that neighbouring lanes reach other banks.
        """
        tile = self.tile
        flat = self.flat
        read, write = _piece(tile.in_along or 4), _piece(tile.along)
        in_pitch = tile.in_along if flat else _odd(self.in_extent, read)
        out_pitch = tile.along if flat else _odd(self.along_tiles * tile.along, write)
        in_plane, out_plane = self.in_lines * in_pitch, self.across_tiles * tile.across * out_pitch
        if self.channels_merged:
            out_plane = self.across.out * out_pitch
            in_image, out_image = _odd(self.channels * in_plane, read), _odd(self.channels * out_plane, write)
            return in_pitch, in_plane, in_image, out_pitch, out_plane, out_image
        in_plane, out_plane = _odd(in_plane, read) * self.copies, _odd(out_plane, write)
        return in_pitch, self.images * in_plane, in_plane, out_pitch, self.images * out_plane, out_plane

    @property
    def shared_elements(self) -> int:
        tap_pitch = _odd(self.along.taps, 4)
        _, in_channel, in_image, _, out_channel, out_image = self.pitches
        inputs, outputs = self.channels * in_channel, self.channels * out_channel
        if self.channels_merged:
            inputs, outputs = self.images * in_image, self.images * out_image
        filters = self.channels * self.across.taps * tap_pitch * self.copies
        if not self.tile.queued:
            return filters + max(inputs, outputs)
        along = self.tile.along
        line = along // 2 if along > 32 else along  # twin of kPass
        buffers = self.warps * 32 * _odd(line, _piece(along))
        return filters + inputs + buffers

    @property
    def shared_bytes(self) -> int:
        return 16 + self.shared_elements * self.problem.sum_bytes

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of images, of channels."""
        return -(-self.problem.batch // self.images), -(-self.problem.out_channels // self.channels)

    @property
    def blocks(self) -> int:
        return self.groups[0] * self.groups[1] * self.bands[0] * self.bands[1]

    @property
    def near_tiles(self) -> int:
        """Tiles across that are neighbouring lanes: a power of two, at most 8, with the images where lanes own rows."""
        near, images = 1, 1 if self.tile.transposed else self.images
        while near * 2 * images <= 8 and self.across_tiles % (near * 2) == 0:
            near *= 2
        return near

    @property
    def folded(self) -> bool:
        """Tiles at both ends, which read equally many lines, are neighbours where the padding is even."""
        across = self.across
        after = across.window(across.out) - across.pad - across.size
        return self.bands[1] == 1 and across.taps > 8 and abs(after - across.pad) <= 1

    @property
    def merged(self) -> tuple[bool, bool]:
        """Are rows of input, of output, one stretch, in memory as in shared memory?"""
        tile, problem, flat = self.tile, self.problem, self.flat
        dense = problem.size[0] == 1 or problem.plane_strides[2] == problem.size[1]
        return flat and dense, flat and not tile.queued

    @property
    def wide(self) -> tuple[bool, bool]:
        """Whether input, output moves 16 bytes at a time, or 4 elements."""
        problem, tile = self.problem, self.tile
        move = _move(problem)
        aligned = problem.aligned % (move * problem.element_bytes) == 0
        image, channel, row, _ = problem.plane_strides
        width, out_width = problem.size[1], problem.out_size[1]
        one_band = self.bands[1] == 1
        wide_in = image % move == 0 and (channel % move == 0 or self.channels_merged)
        if self.channels_merged and problem.out_channels % self.channels:
            return False, False  # the last group would end between two moves
        if self.merged[0]:
            planes = self.channels if self.channels_merged else 1
            wide_in &= width % move == 0 or (one_band and planes * self.in_lines * width % move == 0)
        else:
            wide_in &= width % move == 0 and row % move == 0
        if tile.queued:
            wide_out = out_width % move == 0
            if tile.transposed:  # lanes whose columns are moved together must be neighbours
                starts = 0 if one_band else self.across_tiles
                near = self.near_tiles % move == 0 and not self.folded and tile.across == 1
                wide_out &= near and starts % move == 0
        elif self.merged[1] and one_band:
            planes = self.channels if self.channels_merged else 1
            wide_out = planes * problem.out_size[0] * out_width % move == 0
        else:
            starts = self.across_tiles * tile.across if tile.transposed and not one_band else 0
            wide_out = out_width % move == 0 and starts % move == 0
        return aligned and wide_in, aligned and wide_out

    @property
    def rows_and_moves(self) -> tuple[int, int, int, int]:
        """Rows of a band as they stand in memory, and moves of each, in groups: of input, of output."""
        tile, problem = self.tile, self.problem
        move_in, move_out = (_move(problem) if wide else 1 for wide in self.wide)
        in_rows, in_columns = self.in_lines, self.in_extent
        out_rows, out_columns = self.across_tiles * tile.across, self.along_tiles * tile.along
        if tile.transposed:
            in_rows, in_columns, out_rows, out_columns = in_columns, in_rows, out_columns, out_rows
        if self.merged[0]:
            in_rows, in_columns = 1, in_rows * in_columns
        if self.merged[1]:
            out_rows, out_columns = 1, out_rows * out_columns
        if self.channels_merged:
            in_columns, out_columns = self.channels * in_columns, self.channels * self.across.out * tile.along
        near = NEAR_ROWS if tile.transposed else 1
        in_columns += move_in - 1 if tile.transposed else 0  # moves start at multiples of their size
        return (
            max(1, -(-in_rows // near)),
            max(1, -(-in_columns // (GROUP * move_in))),
            -(-out_rows // near),
            -(-out_columns // (GROUP * move_out)),
        )

    @property
    def tiling(self) -> tuple[int, ...]:
        """The fields of `dwconv::WideNchwTiling`."""
        return (
            *fast_divisor(self.bands[0]),
            *fast_divisor(self.bands[1]),
            *fast_divisor(self.groups[1]),
            *fast_divisor(self.images),
            self.channels,
            self.problem.batch,
            *fast_divisor(self.along_tiles),
            *fast_divisor(self.across_tiles),
            self.near_tiles,
            self.tasks,
            int(self.folded),
            *self.pitches,
            self.in_extent,
            *(field for count in self.rows_and_moves for field in fast_divisor(count)),
            *map(int, self.merged),
            int(self.channels_merged),
            *map(int, self.wide),
            self.pitches[2] // self.copies if self.copies > 1 else 0,
        )


def _piece(count: int) -> int:
    """The largest power of two up to 4 that divides a count."""
    return 4 if count % 4 == 0 else 2 if count % 2 == 0 else 1


def _odd(count: int, piece: int) -> int:
    """The next odd multiple of a piece."""
    return piece * (-(-count // piece) | 1)


def _move(problem: DepthwiseProblem) -> int:
    """Elements of one move, of at most 16 bytes; twin of kMove in the kernel."""
    return 2 if problem.element_bytes > 4 else 4


def band_of(problem: DepthwiseProblem, tile: Tile) -> Band:
    """Cuts planes until one band fits into a block's budget, then fills the block with images."""
    along, across = (Axis.of(problem, i) for i in ((0, 1) if tile.transposed else (1, 0)))
    along_tiles, across_tiles = -(-along.out // tile.along), -(-across.out // tile.across)
    band = Band(problem, tile, along_tiles, across_tiles)
    most = MOST_TILES if tile.queued else tile.threads
    while along_tiles * across_tiles > 1 and (band.tiles > most or band.shared_bytes > tile.budget):
        length, height = along_tiles * tile.along * along.stride, across_tiles * tile.across * across.stride
        if across_tiles == 1 or (along_tiles > 1 and length > height):
            along_tiles = -(-along_tiles // 2)
        else:
            across_tiles = -(-across_tiles // 2)
        band = Band(problem, tile, along_tiles, across_tiles)
    bands = band.bands
    along_tiles, across_tiles = -(-along.out // tile.along), -(-across.out // tile.across)
    along_tiles, across_tiles = -(-along_tiles // bands[0]), -(-across_tiles // bands[1])  # equal bands
    band = Band(problem, tile, along_tiles, across_tiles, channels=min(tile.channels, problem.out_channels))

    wanted = 16 if along.taps > tile.chunk else 8  # lanes of equal work beside each other
    while 2 * band.images <= min(problem.batch, MOST_IMAGES) and (band.images < wanted or band.tiles < 192):
        more = replace(band, images=2 * band.images)
        if more.tiles > most or more.shared_bytes > tile.budget or more.blocks < MANY_BLOCKS:
            break
        band = more
    band = replace(band, images=max(1, -(-problem.batch // max(1, band.groups[0]))))
    while 2 * band.channels <= problem.out_channels and 2 * band.tiles <= 64:
        more = replace(band, channels=2 * band.channels)
        if more.shared_bytes > tile.budget:
            break
        band = more
    return band
