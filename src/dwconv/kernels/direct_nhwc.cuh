// direct_nhwc.cuh: depthwise convolution, channels last, small filters: tiles with their halo wait in shared memory
//   y[n,i,j,c] = b[c] + sum_{u,v} w[c,u,v] * x[n, i*SH - PT + u*DH, j*SW - PL + v*DW, c/M]     sums as in Accumulator
//   x [N,H,W,C]   w [C*M,KH,KW]   b [C*M] or null   y [N,OH,OW,C*M]     offsets in elements, 64-bit
//   A thread makes kRows x kColumns outputs of kVector neighbouring channels. kChunk/kVector threads are neighbours in
//   channels; so many of them stand side by side, one above the other, and image by image in a tile. A block takes
//   tile after tile of the same kChunk channels; while it computes one, copies of the next kStages - 1 are under way.
//   grid.x = chunks * workers, chunk fastest
//   least DRAM traffic: x + w + y, once each; halos between tiles come from L2
#pragma once
#include "nhwc_tiles.cuh"

namespace dwconv {

// What follows from the compiled constants.
template <class C>
struct NhwcTile {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    static constexpr int kTaps = C::kFilterH * C::kFilterW;
    static constexpr int kLanes = C::kChunk / C::kVector;                                            // of one pixel
    static constexpr int kInVector = C::kVector < C::kMultiplier ? 1 : C::kVector / C::kMultiplier;  // channels read
    static constexpr int kInChunk = C::kChunk / C::kMultiplier;
    static constexpr int kSpan = (C::kColumns - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW + 1;
    static constexpr int kWindowRows = (C::kRows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1;
    static constexpr int kFilterPitch =
        ceil_div(C::kChunk, 4) * 4 + 4;  // + 4: channels of one tap meet few bank conflicts
    static constexpr int kFilterBytes = ceil_div(kTaps * kFilterPitch * static_cast<int>(sizeof(Sum)), 16) * 16;

    __host__ __device__ static constexpr bool reads_row(int r) {
        for (int i = 0; i < C::kRows; ++i)
            if (is_tap(r - i * C::kStrideH, C::kDilationH, C::kFilterH)) return true;
        return false;
    }
    __host__ __device__ static constexpr bool reads_column(int k) {
        for (int o = 0; o < C::kColumns; ++o)
            if (is_tap(k - o * C::kStrideW, C::kDilationW, C::kFilterW)) return true;
        return false;
    }
};

// The filter of the block's channels, [tap][channel], in the type of the sums; zeros beyond the last channel.
template <class C, class Sum>
__device__ __forceinline__ void stage_filter(const typename C::Element* w, const Sizes& sizes, int channel,
                                             Sum* filter) {
    using Tile = NhwcTile<C>;
    const int there = smaller(C::kChunk, static_cast<int>(sizes.out_channels) - channel) * Tile::kTaps;
    const typename C::Element* from = w + static_cast<long long>(channel) * Tile::kTaps;
    for (int e = threadIdx.x; e < C::kChunk * Tile::kTaps; e += C::kThreads)
        filter[e % Tile::kTaps * Tile::kFilterPitch + e / Tile::kTaps] =
            e < there ? static_cast<Sum>(load_one(from + tap_at<C>(e))) : Sum(0);
}

template <class C, class Sum>
__device__ __forceinline__ void load_taps(const Sum* filter, Sum (&taps)[C::kVector]) {
    constexpr int kWidth = smaller(C::kVector, 16 / static_cast<int>(sizeof(Sum)));
#pragma unroll
    for (int k = 0; k < C::kVector; k += kWidth) {
        const Vector<Sum, kWidth> values = *reinterpret_cast<const Vector<Sum, kWidth>*>(filter + k);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) taps[k + e] = values.element[e];
    }
}

// What a thread keeps from tile to tile.
template <class C>
struct NhwcChannels {
    using Sum = typename NhwcTile<C>::Sum;
    Sum bias[C::kVector];
    ChannelValues<Sum> values[C::kVector];
    Sum taps[C::kKeepFilter ? NhwcTile<C>::kTaps : 1][C::kVector];
};

// Sums and stores a thread's outputs: one input row after the other, each input converted once.
template <class C, class Sum>
__device__ __forceinline__ void compute_tile(const Tensors<typename C::Element>& tensors,
                                             const typename C::Element* window, int pitch, const Sum* filter,
                                             const NhwcChannels<C>& channels, unsigned row_step, unsigned column_step,
                                             int rows, int columns) {
    using Tile = NhwcTile<C>;
    using T = typename C::Element;
    Sum sums[C::kRows][C::kColumns][C::kVector];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
        for (int o = 0; o < C::kColumns; ++o)
#pragma unroll
            for (int k = 0; k < C::kVector; ++k) sums[i][o][k] = channels.bias[k];
#pragma unroll
    for (int r = 0; r < Tile::kWindowRows; ++r) {
        if (!Tile::reads_row(r)) continue;
        Sum x[Tile::kSpan][Tile::kInVector];
#pragma unroll
        for (int k = 0; k < Tile::kSpan; ++k) {
            if (!Tile::reads_column(k)) continue;
            const auto pixel =
                *reinterpret_cast<const Vector<T, Tile::kInVector>*>(window + r * pitch + k * Tile::kInChunk);
#pragma unroll
            for (int e = 0; e < Tile::kInVector; ++e) x[k][e] = static_cast<Sum>(pixel.element[e]);
        }
#pragma unroll
        for (int u = 0; u < C::kFilterH; ++u) {
#pragma unroll
            for (int v = 0; v < C::kFilterW; ++v) {
                Sum taps[C::kVector];
                if constexpr (C::kKeepFilter) {
#pragma unroll
                    for (int k = 0; k < C::kVector; ++k) taps[k] = channels.taps[u * C::kFilterW + v][k];
                } else {
                    load_taps<C>(filter + (u * C::kFilterW + v) * Tile::kFilterPitch, taps);
                }
#pragma unroll
                for (int i = 0; i < C::kRows; ++i) {
                    if (r - i * C::kStrideH != u * C::kDilationH) continue;
#pragma unroll
                    for (int o = 0; o < C::kColumns; ++o)
#pragma unroll
                        for (int k = 0; k < C::kVector; ++k)
                            sums[i][o][k] += taps[k] * x[o * C::kStrideW + v * C::kDilationW][k / C::kMultiplier];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) {
            if (r != i * C::kStrideH + (C::kFilterH - 1) * C::kDilationH || i >= rows) continue;
#pragma unroll
            for (int o = 0; o < C::kColumns; ++o)
                if (o < columns)
                    store_outputs<C, C::kVector, 1>(tensors, i * row_step + o * column_step, sums[i][o],
                                                    channels.values);
        }
    }
}

template <class C>
__device__ __forceinline__ void direct_nhwc(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const NhwcTiling& tiling) {
    using Tile = NhwcTile<C>;
    using T = typename C::Element;
    using Sum = typename Tile::Sum;
    static_assert(C::kChunk % C::kVector == 0, "kVector must divide kChunk: a thread owns whole vectors");
    static_assert(C::kChunk % C::kMultiplier == 0, "kMultiplier must divide kChunk: a chunk has whole input channels");
    static_assert(C::kVector == 1 || C::kVector % C::kMultiplier == 0,
                  "kVector must hold whole input channels, or one output");
    static_assert(Tile::kInChunk % C::kCopy == 0, "kCopy must divide the input channels of a chunk");

    unsigned char* memory = shared_memory<unsigned char>();
    Sum* filter = reinterpret_cast<Sum*>(memory);
    T* stages = reinterpret_cast<T*>(memory + Tile::kFilterBytes);
    const int in_columns = tiling.in_columns.divisor, in_rows = tiling.in_rows.divisor;
    const int stage_elements =
        ceil_div(in_columns * in_rows * static_cast<int>(tiling.images) * Tile::kInChunk, 16) * 16;
    const unsigned worker = tiling.chunks.quotient(blockIdx.x);
    const int first_channel = (blockIdx.x - worker * tiling.chunks.divisor) * C::kChunk;

    // The first copies are under way before the filter is fetched.
    const unsigned first_tile = worker * tiling.first;
    const unsigned end =
        C::kLoop ? static_cast<unsigned>(smaller(tiling.tiles, first_tile + tiling.each * tiling.step)) : 0;
#pragma unroll
    for (int s = 0; s < larger(1, C::kStages - 1); ++s) {
        const unsigned tile = first_tile + s * tiling.step;
        if (s == 0 || tile < end)
            copy_tile<C>(tensors.x, sizes, tiling, nhwc_place<C>(tiling, tile), first_channel / C::kMultiplier,
                         stages + s * stage_elements);
        if (C::kStages > 1) end_of_copies();
    }
    stage_filter<C>(tensors.w, sizes, first_channel, filter);

    const int lane = threadIdx.x % Tile::kLanes;
    const unsigned spot = threadIdx.x / Tile::kLanes;
    const unsigned spot_row = tiling.column_groups.quotient(spot);
    const unsigned image = tiling.row_groups.quotient(spot_row);
    const int column = (spot - spot_row * tiling.column_groups.divisor) * C::kColumns;
    const int row = (spot_row - image * tiling.row_groups.divisor) * C::kRows;
    const int channel = first_channel + lane * C::kVector;
    const int out_channels = static_cast<int>(sizes.out_channels);
    const bool works = image < tiling.images && channel < out_channels;
    const int pitch = in_columns * Tile::kInChunk;
    const int window = (static_cast<int>(image) * in_rows + row * C::kStrideH) * pitch +
                       column * (C::kStrideW * Tile::kInChunk) + lane * C::kVector / C::kMultiplier;
    const Sum* taps = filter + lane * C::kVector;
    const int out_h = static_cast<int>(sizes.out_h), out_w = static_cast<int>(sizes.out_w);
    NhwcChannels<C> channels;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < C::kVector; ++k) {
        channels.bias[k] = C::kHasBias && works ? static_cast<Sum>(load_one(tensors.b + channel + k)) : Sum(0);
        channels.values[k] = channel_values<C>(tensors, works ? channel + k : 0);
    }
    if constexpr (C::kKeepFilter) {
#pragma unroll
        for (int u = 0; u < Tile::kTaps; ++u) load_taps<C>(taps + u * Tile::kFilterPitch, channels.taps[u]);
    }

    int stage = 0;
#pragma unroll 1
    for (unsigned tile = first_tile; tile < tiling.tiles;) {
        const NhwcPlace place = nhwc_place<C>(tiling, tile);
        if constexpr (C::kStages == 1) {
            if (tile != first_tile)
                copy_tile<C>(tensors.x, sizes, tiling, place, first_channel / C::kMultiplier, stages);
        } else {
            const unsigned ahead = tile + (C::kStages - 1) * tiling.step;
            const int free = stage == 0 ? C::kStages - 1 : stage - 1;
            if (ahead < end)
                copy_tile<C>(tensors.x, sizes, tiling, nhwc_place<C>(tiling, ahead), first_channel / C::kMultiplier,
                             stages + free * stage_elements);
        }
        end_of_copies();
        wait_for_copies<C::kStages - 1>();
        __syncthreads();
        const int rows = out_h - place.row - row, columns = out_w - place.column - column;
        if (works && rows > 0 && columns > 0 && place.image + image < tiling.batch) {
            const long long pixel = (static_cast<long long>(place.image + image) * out_h + (place.row + row)) * out_w +
                                    place.column + column;
            Tensors<T> from_here = tensors;
            from_here.y += pixel * out_channels + channel;
            if constexpr (C::kHasResidual) from_here.residual += pixel * out_channels + channel;
            compute_tile<C>(from_here, stages + stage * stage_elements + window, pitch, taps, channels,
                            out_w * out_channels, out_channels, rows, columns);
        }
        if constexpr (!C::kLoop) return;
        tile += tiling.step;
        if (tile >= end) return;
        stage = stage == C::kStages - 1 ? 0 : stage + 1;
        __syncthreads();
    }
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 256
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_CHUNK 32
#define DWCONV_VECTOR 4
#define DWCONV_COPY 4
#define DWCONV_ROWS 4
#define DWCONV_COLUMNS 4
#define DWCONV_STAGES 1
#define DWCONV_LOOP 0
#define DWCONV_KEEP_FILTER 1
#define DWCONV_MANY_IMAGES 0
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kChunk = DWCONV_CHUNK, kVector = DWCONV_VECTOR, kCopy = DWCONV_COPY;
    static constexpr int kRows = DWCONV_ROWS, kColumns = DWCONV_COLUMNS;
    static constexpr int kPixel = kChunk / kMultiplier;
    static constexpr int kStages = DWCONV_STAGES;
    static constexpr bool kLoop = DWCONV_LOOP;
    static constexpr bool kKeepFilter = DWCONV_KEEP_FILTER, kManyImages = DWCONV_MANY_IMAGES;
};

using Tiling = dwconv::NhwcTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::direct_nhwc<Config>(tensors, sizes, tiling);
}
