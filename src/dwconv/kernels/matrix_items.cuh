// matrix_items.cuh: what a block of the matrix kernels works on, and the way from its products to its results
//   An item is the outputs [row, row + rows) x [column, column + columns) of some neighbouring channels of some
//   neighbouring images. Its input lies in shared memory as zero-padded planes of 16-bit elements, channel by channel,
//   image by image. A group is eight outputs of a row and those of the kRows - 1 rows below; groups of one channel,
//   wherever they are, are multiplied by its bands 16 at a time.
//   A block takes an equal share of all items. Those of one group of images after the other come first: whatever
//   doesn't depend on the image is found once for them. All groups of images and of channels are full: the last ones
//   start earlier, and make some outputs again.
#pragma once
#include "bands.cuh"
#include "staged_planes.cuh"

namespace dwconv {

struct MatrixTiling {
    FastDivisor image_groups, column_items, row_items;  // groups of images; items side by side, below one another
    ShortDivisor groups, bands;        // of an item's plane: side by side; of kRows rows, below one another
    ShortDivisor warps;                // that a channel's groups take
    ShortDivisor units;                // that fetch the part of one image
    ShortDivisor line_units, lines;    // in_w, or units that fetch a row; rows that are fetched of a plane, at most
    ShortDivisor result_units;         // that store the part of one image
    unsigned images, channels;         // of an item; channels of x
    unsigned share, total;             // items of a block, items
    unsigned item_rows, item_columns;  // outputs of an item in each plane
    unsigned in_plane, out_plane;      // elements of x and y in a plane
    unsigned pitch, plane_pitch;       // elements of shared memory from row to row, from plane to plane
    unsigned plane_gap;                // from one channel's row `lines` to the next one's row 0
    unsigned result_image;             // elements of the results from image to image
    unsigned filter_elements, image_elements;  // of shared memory, multiples of 8
    unsigned threads;                          // of a block
    unsigned last_image;                       // the first one of the last group
    unsigned longer;                           // slices: blocks that take one more than their share, the first ones
    unsigned whole;                            // slices: groups that a block takes before its share, of whole slices
};

struct MatrixItem {
    int channel;  // of x, the first one
    int row, rows, column, columns;
    int top, in_row, in_rows;   // the input row that row 0 of shared memory stands for; the rows to fetch
    unsigned group, end_group;  // of images
};

// The items from `number` on, up to `end`, that differ only in their images.
template <class C>
__device__ __forceinline__ MatrixItem matrix_item(unsigned number, unsigned end, const Sizes& sizes,
                                                  const MatrixTiling& tiling) {
    MatrixItem item;
    unsigned rest = number;
    const auto next = [&rest](const FastDivisor& size) {
        const unsigned quotient = size.quotient(rest), digit = rest - quotient * size.divisor;
        rest = quotient;
        return static_cast<int>(digit);
    };
    item.group = next(tiling.image_groups);
    item.end_group = tiling.image_groups.divisor - item.group < end - number ? tiling.image_groups.divisor
                                                                             : item.group + (end - number);
    item.column = next(tiling.column_items) * static_cast<int>(tiling.item_columns);
    item.row = next(tiling.row_items) * static_cast<int>(tiling.item_rows);
    const int channels = static_cast<int>(sizes.out_channels) / C::kMultiplier;
    item.channel = smaller(static_cast<int>(rest * tiling.channels), channels - static_cast<int>(tiling.channels));
    item.rows = smaller(static_cast<int>(tiling.item_rows), static_cast<int>(sizes.out_h) - item.row);
    item.columns = smaller(static_cast<int>(tiling.item_columns), static_cast<int>(sizes.out_w) - item.column);
    item.top = item.row * C::kStrideH - C::kPadTop;
    item.in_row = larger(item.top, 0);
    int last = static_cast<int>(sizes.in_h);
    if (tiling.row_items.divisor > 1)  // else every row is fetched: planes are neighbours in memory
        last = smaller(last, item.top + (item.rows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1);
    item.in_rows = larger(last - item.in_row, 0);
    return item;
}

// The first image of a group.
__device__ __forceinline__ int first_image(unsigned group, const MatrixTiling& tiling) {
    const unsigned first = group * tiling.images;
    return static_cast<int>(first < tiling.last_image ? first : tiling.last_image);
}

// Where a group's outputs go.
struct GroupPlace {
    long long at;       // of its first one in y, from the first image of the item on
    int into;           // and in the results
    int rows, columns;  // that exist from there on
    int image;          // of the item
};

// A value of the lane that the place of group `lane` was computed in.
__device__ __forceinline__ GroupPlace place_of(const GroupPlace& own, int lane) {
    GroupPlace place;
    const unsigned low = __shfl_sync(0xffffffffu, static_cast<unsigned>(own.at), lane);
    const unsigned high = __shfl_sync(0xffffffffu, static_cast<unsigned>(own.at >> 32), lane);
    place.at = static_cast<long long>(static_cast<unsigned long long>(high) << 32 | low);
    place.into = __shfl_sync(0xffffffffu, own.into, lane);
    place.rows = __shfl_sync(0xffffffffu, own.rows, lane);
    place.columns = __shfl_sync(0xffffffffu, own.columns, lane);
    place.image = __shfl_sync(0xffffffffu, own.image, lane);
    return place;
}

// What a warp knows of a channel: its bands, and what comes on top of the sums.
template <class C>
struct ChannelBands {
    int channel, out_channel;  // of x, of y; both of the item
    float bias;
    ChannelValues<float> values;
    uint2 bands[C::kFilterH][Band<C>::kSteps];

    __device__ __forceinline__ ChannelBands(const Tensors<typename C::Element>& tensors, const MatrixItem& item,
                                            int out_channel)
        : channel(out_channel / C::kMultiplier), out_channel(out_channel) {
        const long long of = static_cast<long long>(item.channel) * C::kMultiplier + out_channel;
        bias = C::kHasBias ? static_cast<float>(load_one(tensors.b + of)) : 0.0f;
        values = channel_values<C>(tensors, of);
    }
};

// The products of a warp: kTiles * 16 groups of one channel, the same for every group of images.
template <class C>
struct MatrixProducts {
    using T = typename C::Element;
    const MatrixItem& item;
    const MatrixTiling& tiling;
    int out_channel, channel;                    // that places are of: of y, of x; both of the item
    int first;                                   // of its groups
    int offsets[C::kTiles];                      // of this lane's row of A in shared memory, in bytes
    int into[C::kTiles][2], rows[C::kTiles][2];  // of the outputs of this lane: where they go; how many there are
    long long at[C::kTiles][2];
    bool second[C::kTiles][2];  // whether the second of two columns exists

    // part: of the channel's groups, kTiles * 16 of them.
    __device__ __forceinline__ MatrixProducts(const Sizes& sizes, const MatrixItem& item, const MatrixTiling& tiling,
                                              int out_channel, int part)
        : item(item), tiling(tiling), out_channel(out_channel), channel(out_channel / C::kMultiplier) {
        const int lane = threadIdx.x % 32;
        first = part * (C::kTiles * 16);
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile) {
            const GroupPlace own = place(sizes, first + tile * 16 + lane % 16, offsets[tile]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const GroupPlace found = place_of(own, lane / 4 + 8 * half);
                into[tile][half] = found.into + lane % 4 * 2;
                at[tile][half] = found.at;
                rows[tile][half] = lane % 4 * 2 < found.columns ? found.rows : 0;
                second[tile][half] = lane % 4 * 2 + 1 < found.columns;
                keep(into[tile][half]);
                keep(rows[tile][half]);
            }
            keep(offsets[tile]);
        }
    }

    // Where the outputs of a group go, and the offset of its row of A; groups that don't exist compute on the first.
    __device__ __forceinline__ GroupPlace place(const Sizes& sizes, int number, int& offset) const {
        const int above = tiling.groups.quotient(number), image = tiling.bands.quotient(above);
        const bool exists = image < static_cast<int>(tiling.images);
        const int band = exists ? above - image * static_cast<int>(tiling.bands.divisor) : 0;
        const int columns = exists ? (number - above * static_cast<int>(tiling.groups.divisor)) * 8 : 0;
        const int plane = channel * static_cast<int>(tiling.images) + (exists ? image : 0);
        offset = 2 * (plane * static_cast<int>(tiling.plane_pitch) +
                      band * (C::kRows * C::kStrideH) * static_cast<int>(tiling.pitch) + columns * C::kStrideW +
                      static_cast<int>(threadIdx.x % 32 / 16 * 8));
        const int first_row = band * C::kRows, out_w = static_cast<int>(sizes.out_w);
        const int row = item.row + first_row, column = item.column + columns;
        const long long first_channel = static_cast<long long>(item.channel) * C::kMultiplier;
        GroupPlace found;
        found.image = exists ? image : 0;
        found.rows = exists ? item.rows - first_row : 0;
        found.columns = item.columns - columns;
        found.at =
            (found.image * sizes.out_channels + first_channel + out_channel) * tiling.out_plane + row * out_w + column;
        found.into = found.image * static_cast<int>(tiling.result_image) +
                     (out_channel * item.rows + first_row) * out_w + columns;
        return found;
    }

    // Puts Width neighbouring outputs of a group into the results, `to` of them, or where none are staged into y.
    // `column`: from this lane's first one on. `base`: where the item's first image starts in y, `from` the group.
    template <int Width>
    __device__ __forceinline__ void put(const Tensors<T>& tensors, const Sizes& sizes, T* results, long long base,
                                        long long from, int to, int row, int column, const float* sums,
                                        const ChannelValues<float>& values) const {
        const int in_row = static_cast<int>(threadIdx.x % 4 * 2) + column, out_w = static_cast<int>(sizes.out_w);
        if constexpr (!C::kStageOutputs) {
            store_outputs<C, Width, 0>(tensors, base + from + (row * out_w + in_row), sums, &values);
        } else {
            T residual[Width] = {};
            if constexpr (C::kHasResidual) {
                const long long first = base + from + (row * out_w + in_row);
#pragma unroll
                for (int k = 0; k < Width; ++k) residual[k] = load_one(tensors.residual + first + k);
            }
            float out[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) out[k] = finished<C>(sums[k], values, residual[k]);
            *reinterpret_cast<Vector<T, Width>*>(results + to + row * out_w + column) = rounded<T, Width>(out);
        }
    }

    // The sums of the item's images from `image` on, and their way into the results.
    __device__ __forceinline__ void multiply(const Tensors<T>& tensors, const Sizes& sizes, long long image,
                                             const ChannelBands<C>& own, const T* planes, T* results) const {
        float sums[C::kTiles][C::kRows][4];
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < C::kRows; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[tile][i][e] = own.bias;
        sum_groups<C>(sums, planes, offsets, 2 * static_cast<int>(tiling.pitch), own.bands);
        const long long base = image * sizes.out_channels * tiling.out_plane;
        float check = 0;  // NaN as soon as a sum is not finite
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const long long from = at[tile][half];
                const int to = into[tile][half];
#pragma unroll
                for (int i = 0; i < C::kRows; ++i) {
                    const float both[2] = {sums[tile][i][2 * half], sums[tile][i][2 * half + 1]};
                    check = fmaf(both[0], 0.0f, fmaf(both[1], 0.0f, check));
                    if (i >= rows[tile][half]) continue;
                    if constexpr (C::kStoreVector == 2) {
                        put<2>(tensors, sizes, results, base, from, to, i, 0, both, own.values);
                    } else {
                        put<1>(tensors, sizes, results, base, from, to, i, 0, both, own.values);
                        if (second[tile][half])
                            put<1>(tensors, sizes, results, base, from, to, i, 1, both + 1, own.values);
                    }
                }
            }
        if (!__any_sync(0xffffffffu, !(check == 0.0f))) return;
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile)
            put_exact(tensors, sizes, image, own, results, base, sums[tile], first + 16 * tile);
    }

    // Computes those sums of a tile again that are not finite.
    __device__ __forceinline__ void put_exact(const Tensors<T>& tensors, const Sizes& sizes, long long image,
                                              const ChannelBands<C>& taps, T* results, long long base,
                                              const float (&sums)[C::kRows][4], int number) const {
        unsigned wrong = 0;  // their numbers
#pragma unroll
        for (int i = 0; i < C::kRows; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (!(sums[i][e] * 0.0f == 0.0f)) wrong |= 1u << (4 * i + e);
        const int lane = threadIdx.x % 32;
        int unused;
        const GroupPlace own = place(sizes, number + lane % 16, unused);
        const GroupPlace upper = place_of(own, lane / 4), lower = place_of(own, lane / 4 + 8);
        const T* filter = tensors.w + (static_cast<long long>(item.channel) * C::kMultiplier + taps.out_channel) *
                                          (C::kFilterH * C::kFilterW);
#pragma unroll 1
        while (wrong != 0) {
            const int bit = __ffs(static_cast<int>(wrong)) - 1, i = bit / 4, column = bit % 2;
            wrong &= wrong - 1;
            const GroupPlace place = bit / 2 % 2 == 0 ? upper : lower;
            const int in_group = lane % 4 * 2 + column;
            if (i >= place.rows || in_group >= place.columns) continue;
            // its row and column in y, from those that exist behind it
            const T* x =
                tensors.x + (image + place.image) * sizes.x_image + (item.channel + taps.channel) * sizes.x_channel;
            const float sum = exact_sum<C>(x, filter, taps.bias, sizes, 0, item.row + item.rows - place.rows + i,
                                           item.column + item.columns - place.columns + in_group);
            put<1>(tensors, sizes, results, base, place.at, place.into + lane % 4 * 2, i, column, &sum, taps.values);
        }
    }
};

}  // namespace dwconv
