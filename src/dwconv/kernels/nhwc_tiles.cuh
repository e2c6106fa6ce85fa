// nhwc_tiles.cuh: tiles of channels-last images with their halo in shared memory: what such kernels share
//   A block works on kChunk output channels. A tile is images * row_groups * kRows rows * column_groups * kColumns
//   columns of them; of x it holds, image by image, in_rows lines of in_columns pixels of kPixel elements each.
//   Tiles are numbered column fastest, then row, then image. Copies run ahead of their use (cp.async, sm_80 and newer).
#pragma once
#include "copies.cuh"
#include "epilogue.cuh"

namespace dwconv {

struct NhwcTiling {
    FastDivisor chunks;         // of kChunk output channels
    FastDivisor column_tiles;   // of one image
    FastDivisor row_tiles;      // of one image
    FastDivisor column_groups;  // threads side by side in a tile
    FastDivisor row_groups;     // threads one above the other
    FastDivisor in_columns;     // of a tile with its halo
    FastDivisor in_rows;
    unsigned images;         // that a tile holds; 1 unless it covers whole images
    unsigned batch;          // N
    unsigned tiles;          // of one chunk
    unsigned first, step;    // a block takes tile first * (its number), and on by steps,
    unsigned each;           // so many of them
    unsigned lines_at_once;  // of a tile, that the block copies
};

// Where a tile stands: its first image, output row and output column.
struct NhwcPlace {
    unsigned image;
    int row, column;
};

template <class C>
__device__ __forceinline__ NhwcPlace nhwc_place(const NhwcTiling& tiling, unsigned tile) {
    const unsigned line = tiling.column_tiles.quotient(tile);
    const unsigned image = tiling.row_tiles.quotient(line);
    NhwcPlace place;
    place.column = (tile - line * tiling.column_tiles.divisor) * (tiling.column_groups.divisor * C::kColumns);
    place.row = (line - image * tiling.row_tiles.divisor) * (tiling.row_groups.divisor * C::kRows);
    place.image = image * tiling.images;
    return place;
}

// Starts the copies of a tile with its halo. A thread copies the same channels of the same column, line after line;
// lines of all images of the tile follow each other.
template <class C>
__device__ __forceinline__ void copy_tile(const typename C::Element* x, const Sizes& sizes, const NhwcTiling& tiling,
                                          const NhwcPlace& place, int in_channel, typename C::Element* stage) {
    constexpr int kCopies = C::kChunk / C::kMultiplier / C::kCopy;  // of one pixel
    constexpr int kSlots = C::kThreads / kCopies;                   // pixels that the block copies at a time
    static_assert(kSlots > 0, "kThreads must be as many as copy one pixel");
    const int in_columns = tiling.in_columns.divisor, in_rows = tiling.in_rows.divisor;
    const int at_once = tiling.lines_at_once;
    const int slot = threadIdx.x / kCopies;
    constexpr int kBytes = C::kCopy * static_cast<int>(sizeof(typename C::Element));
    const int channel = threadIdx.x % kCopies * C::kCopy;
    const int first_line = at_once == 1 ? 0 : static_cast<int>(tiling.in_columns.quotient(slot));
    if (slot >= kSlots || first_line >= at_once) return;
    const bool works = in_channel + channel < static_cast<int>(sizes.out_channels) / C::kMultiplier;
    const int lines = in_rows * static_cast<int>(tiling.images);
    const int first_row = place.row * C::kStrideH - C::kPadTop;
    const typename C::Element* images = x + place.image * sizes.x_image + (in_channel + channel);
    const long long step = at_once * sizes.x_row;
    for (int in_column = slot - first_line * in_columns; in_column < in_columns; in_column += kSlots) {
        const int column = place.column * C::kStrideW - C::kPadLeft + in_column;
        const bool inside = works && static_cast<unsigned>(column) < static_cast<unsigned>(sizes.in_w);
        const unsigned in_h = inside ? static_cast<unsigned>(sizes.in_h) : 0;
        const typename C::Element* from = images + column * sizes.x_column;
        typename C::Element* to = stage + (first_line * in_columns + in_column) * C::kPixel + channel;
        int row = first_row + first_line;
        if constexpr (!C::kManyImages) from += row * sizes.x_row;
#pragma unroll 4
        for (int line = first_line; line < lines; line += at_once) {
            if constexpr (C::kManyImages) {
                const unsigned image = tiling.in_rows.quotient(line);
                row = first_row + line - static_cast<int>(image) * in_rows;
                copy_piece_or_zero<kBytes, true>(
                    to, from + (image * sizes.x_image + row * sizes.x_row),
                    static_cast<unsigned>(row) < in_h && place.image + image < tiling.batch);
            } else {
                copy_piece_or_zero<kBytes, true>(to, from, static_cast<unsigned>(row) < in_h);
                row += at_once;
                from += step;
            }
            to += at_once * in_columns * C::kPixel;
        }
    }
}

}  // namespace dwconv
