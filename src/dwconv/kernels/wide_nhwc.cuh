// wide_nhwc.cuh: depthwise convolution, channels last, for filters of many taps: rows stream through shared memory
//   y[n,i,j,c] = b[c] + sum_{u,v} w[c,u,v] * x[n, i*SH - PT + u*DH, j*SW - PL + v*DW, c/M]     float32 sum
//   x [N,H,W,C]   w [C*M,KH,KW]   b [C*M] or null   y [N,OH,OW,C*M]     offsets in elements, 64-bit
//   A thread makes kColumns neighbouring columns of kVector channels (one but for the march), so that neighbouring
//   lanes are neighbouring channels. A block works on kChannels channels, `groups` groups of columns and `slots`
//   images. It takes unit after unit, of a unit row after row, with kStages - 1 stages of rows in flight.
//   kMarch: the filter is in registers. Each input row is added to all output rows that read it, and the sums move on
//     by one output row as they are added to. Otherwise: sums of kRows output rows stay where they are, and the filter
//     is read from shared memory, kTaps taps of a row at a time, each of them for kColumns products.
//   shared memory: x [kStages][kStageRows][slots][columns][channels] as in memory, the filter ([KH][KW/4][kChannels][4]
//     as Sum, for the march [kChannels][KH*KW] as in memory), and outputs of each warp [kColumns][32] on their way out
//   grid.x = chunks of kChannels channels * strips of columns * parts of all output rows, chunk fastest
//   least DRAM traffic: x + w + y, once each; halos between units come from L2
#pragma once
#include "wide_nhwc_sums.cuh"

namespace dwconv {

// Brings the filters of the block's channels to shared memory: as they are for the march, which reads them once.
template <class C>
__device__ __forceinline__ void share_filter(const typename C::Element* w, typename C::Element* filter,
                                             unsigned count) {
    constexpr unsigned kVector = 16 / sizeof(typename C::Element);
    const unsigned vectors = reinterpret_cast<unsigned long long>(w) % 16 == 0 ? count / kVector : 0;
    for (unsigned k = threadIdx.x; k < vectors; k += blockDim.x)
        copy_piece_or_zero<16, true>(filter + k * kVector, w + k * kVector, true);
#pragma unroll 8
    for (unsigned k = vectors * kVector + threadIdx.x; k < count; k += blockDim.x) filter[k] = load_one(w + k);
}

// Else sorted by tap, a channel's next taps beside each other, so that a thread reads several of them at once.
template <class C, class Sum>
__device__ __forceinline__ void sort_filter(const typename C::Element* w, Sum* filter, unsigned count) {
    using W = WideNhwc<C>;
#pragma unroll 8
    for (unsigned k = threadIdx.x; k < count; k += blockDim.x) {
        const unsigned c = k / W::kTaps, tap = k % W::kTaps, u = tap / C::kFilterW, v = tap % C::kFilterW;
        const unsigned place =
            (u * W::kFilterRow + v / W::kPack * W::kPack) * C::kChannels + c * W::kPack + v % W::kPack;
        filter[place] = static_cast<Sum>(load_one(w + tap_at<C>(k)));
    }
}

// Stores a row of outputs, the first `count` of them; `to` holds the addresses of the first one. Where all outputs of
// a warp are vectors, they go through the warp's part of shared memory, `mine`, and `to` is where the lane's first
// vector goes: one store instead of up to eight.
template <class C, class Sum>
__device__ __forceinline__ void store_row(const Tensors<typename C::Element>& to, typename C::Element* mine, int pitch,
                                          int count, const Sum (&sums)[C::kColumns][C::kVector],
                                          const ChannelValues<Sum> (&values)[C::kVector]) {
    using Element = typename C::Element;
    if constexpr (WideNhwc<C>::kShareOut) {
        constexpr int kVector = 16 / sizeof(Element), kPieces = 32 / kVector;
        const int lane = static_cast<int>(threadIdx.x % 32);
        __syncwarp();
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
            mine[t * 32 + lane] = static_cast<Element>(finished<C>(sums[t][0], values[0], Element()));
        __syncwarp();
#pragma unroll
        for (int k = 0; k < C::kColumns * kPieces; k += 32) {
            const int column = k / kPieces + lane / kPieces;
            if (column < smaller(count, C::kColumns))
                store_vector(to.y + k / kPieces * pitch,
                             *reinterpret_cast<const Vector<Element, kVector>*>(mine + (k + lane) * kVector));
        }
    } else {
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
            if (t < count) store_outputs<C, C::kVector, 1>(to, t * pitch, sums[t], values);
    }
}

template <class C>
__device__ __forceinline__ void wide_nhwc(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                          const WideNhwcTiling& tiling) {
    using W = WideNhwc<C>;
    using Element = typename C::Element;
    using Sum = typename W::Sum;
    constexpr unsigned kVector = C::kVector, kStageRows = C::kStageRows;
    const unsigned above = tiling.chunks.quotient(blockIdx.x);
    const unsigned first_channel = (blockIdx.x - above * tiling.chunks.divisor) * C::kChannels;
    const unsigned part = tiling.column_strips.quotient(above);
    const int strip = static_cast<int>(above - part * tiling.column_strips.divisor);
    const unsigned lane = threadIdx.x % W::kLanes, across = threadIdx.x / W::kLanes;
    const unsigned slot = across / tiling.groups, group = across - slot * tiling.groups;
    const unsigned channel = first_channel + lane * kVector;
    const bool has_channel = channel < sizes.out_channels;

    constexpr unsigned kAlign = 16 / sizeof(Element);
    const unsigned slot_elements = tiling.columns * W::kStaged;
    const unsigned row_elements = (tiling.slots * slot_elements + kAlign - 1) / kAlign * kAlign;
    unsigned char* const memory = shared_memory<unsigned char>();
    Element* const stages = reinterpret_cast<Element*>(memory + (C::kBulk ? kBarrierBytes : 0));
    Element* const filter_bits = stages + C::kStages * kStageRows * row_elements;
    Sum* const filter = reinterpret_cast<Sum*>(filter_bits);

    // The first rows are on their way before anything else.
    unsigned position = part * tiling.part_rows;
    const unsigned end_position = min(position + tiling.part_rows, tiling.rows);
    const int strip_columns = static_cast<int>(tiling.groups) * C::kColumns * C::kStrideW;
    const int tile_column = strip * strip_columns - C::kPadLeft + static_cast<int>(tiling.skipped);
    const Element* const w = tensors.w + static_cast<long long>(first_channel) * W::kTaps;
    const unsigned filter_count =
        min(static_cast<unsigned>(sizes.out_channels) - first_channel, static_cast<unsigned>(C::kChannels)) * W::kTaps;
    WideNhwcCopies<C> copies(sizes, tiling, position, end_position, slot, first_channel, tile_column, slot_elements,
                             row_elements, stages, memory);
    if constexpr (C::kMarch) share_filter<C>(w, filter_bits, filter_count);  // belongs to the first group of copies
    if constexpr (C::kBulk) end_of_copies();
    copies.open(tensors, sizes, tiling);
#pragma unroll 1
    for (unsigned k = 0; k < C::kStages - 1; ++k) copies.copy(k, tensors, sizes, tiling);
    if constexpr (!C::kMarch) sort_filter<C>(w, filter, filter_count);

    Sum bias[kVector];
    ChannelValues<Sum> values[kVector];
#pragma unroll
    for (unsigned e = 0; e < kVector; ++e) {
        bias[e] = C::kHasBias && has_channel ? static_cast<Sum>(load_one(tensors.b + channel + e)) : Sum(0);
        values[e] = channel_values<C>(tensors, has_channel ? channel + e : 0);
    }
    Sum taps[C::kMarch ? W::kTaps : 1][kVector];
    if constexpr (C::kMarch) {
        wait_for_copies<C::kBulk ? 0 : C::kStages - 2>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < W::kTaps; ++k)
#pragma unroll
            for (unsigned e = 0; e < kVector; ++e)
                taps[k][e] = static_cast<Sum>(filter_bits[(lane * kVector + e) * W::kTaps + tap_at<C>(k)]);
    }

    // Where the thread reads the columns of its outputs: in a stage, and in the image.
    const int own = static_cast<int>(group) * C::kColumns * C::kStrideW;
    const int image_column = strip * strip_columns - C::kPadLeft + own;
    const int read = static_cast<int>(slot * slot_elements) + (own - static_cast<int>(tiling.skipped)) * W::kStaged +
                     static_cast<int>(W::kWhole ? lane * kVector / C::kMultiplier
                                                : channel / C::kMultiplier - first_channel / C::kMultiplier);

    // What the thread stores: its own outputs, or vectors of its warp's.
    constexpr unsigned kStored = 16 / sizeof(Element), kPieces = 32 / kStored, kWarpOut = 32 * C::kColumns;
    const unsigned lane_column = W::kShareOut ? threadIdx.x % 32 / kPieces : 0;
    const unsigned stored_channel =
        W::kShareOut ? first_channel + lane / 32 * 32 + threadIdx.x % kPieces * kStored : channel;
    const int column = (strip * static_cast<int>(tiling.groups) + static_cast<int>(group)) * C::kColumns;
    const int pitch = static_cast<int>(sizes.out_channels), row_pitch = static_cast<int>(sizes.out_w) * pitch;
    Element* const mine =
        W::kShareOut ? reinterpret_cast<Element*>(reinterpret_cast<unsigned char*>(filter_bits) + W::kFilterBytes) +
                           threadIdx.x / 32 * kWarpOut
                     : nullptr;
    unsigned stage = 0, next_stage = C::kStages - 1;

#pragma unroll 1
    while (position < end_position) {
        const WideNhwcUnit unit = wide_nhwc_unit<C>(position, end_position, sizes, tiling);
        position += unit.out_end - unit.out_first;
        const unsigned image = unit.image_group * tiling.slots + slot;
        const int count =
            stored_channel < sizes.out_channels && image < tiling.images ? static_cast<int>(sizes.out_w) - column : 0;
        const int in_row = (column + static_cast<int>(lane_column)) * pitch + static_cast<int>(stored_channel);
        const long long out = (image * sizes.out_h + unit.out_first) * row_pitch + in_row;
        Tensors<Element> to = tensors;
        to.y += out;
        if constexpr (C::kHasResidual) to.residual += out;
        const auto store = [&](const Sum(&row)[C::kColumns][C::kVector]) {
            store_row<C>(to, mine, pitch, count, row, values);
            to.y += row_pitch;
            if constexpr (C::kHasResidual) to.residual += row_pitch;
        };

        constexpr int kSums = C::kMarch ? W::kLive : C::kRows;
        Sum sums[kSums][C::kColumns][C::kVector];
        // An output row of the march is complete when its last filter row has been added.
        const auto store_if_done = [&](int row, int phase) {
            const int since = row + C::kPadTop - (C::kFilterH - 1) - unit.out_first * C::kStrideH;
            if (since < 0 || phase != (C::kFilterH - 1) % C::kStrideH) return;
            store(sums[kSums - 1]);
        };
#pragma unroll
        for (int k = 0; k < kSums; ++k)
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t)
#pragma unroll
                for (int e = 0; e < C::kVector; ++e) sums[k][t][e] = bias[e];

        int row = unit.first;
#pragma unroll 1
        while (row < unit.end) {
            if constexpr (!C::kBulk) copies.wait(stage);
            __syncthreads();  // the rows are there for all, and nobody reads the stage any more that is filled now
            copies.copy(next_stage, tensors, sizes, tiling);
            if constexpr (C::kBulk) copies.wait(stage);
            const Element* at = stages + stage * (kStageRows * row_elements) + read;
            next_stage = stage;
            stage = stage + 1 == C::kStages ? 0 : stage + 1;
            const int stage_end = min(row + C::kStageRows, unit.end);
#pragma unroll 1
            do {
                if constexpr (C::kMarch) {
                    Sum window[(C::kColumns - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW + 1][C::kVector];
                    read_window<C, C::kFilterW>(at, window);
                    const int phase = C::kStrideH == 1 ? 0 : (row + C::kPadTop) % C::kStrideH;
                    march_phases<C, 0>(phase, window, taps, bias, sums);
                    store_if_done(row, phase);
                } else {
                    add_row<C>(at, filter + lane * W::kPack, row + C::kPadTop - unit.out_first * C::kStrideH,
                               image_column, static_cast<int>(sizes.in_w), sums);
                }
                at += row_elements;
            } while (++row < stage_end);
        }
        if constexpr (C::kMarch) {
            // Through the padding below the image, until the last sums are out.
            const int last = (unit.out_end - 1) * C::kStrideH - C::kPadTop + C::kFilterH - 1;
#pragma unroll 1
            for (; row <= last; ++row) {
                const int phase = C::kStrideH == 1 ? 0 : (row + C::kPadTop) % C::kStrideH;
                if (phase == 0) move_up<C>(sums);
                store_if_done(row, phase);
            }
        }
        if constexpr (!C::kMarch) {
            // Row by row through the same code; an unrolled one would hold the epilogue kRows times.
#pragma unroll 1
            for (int i = unit.out_first; i < unit.out_end; ++i) {
                store(sums[0]);
#pragma unroll
                for (int k = 0; k + 1 < C::kRows; ++k)
#pragma unroll
                    for (int t = 0; t < C::kColumns; ++t) sums[k][t][0] = sums[k + 1][t][0];
            }
        }
    }
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 256
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_MARCH 1
#define DWCONV_CHANNELS 32
#define DWCONV_VECTOR 1
#define DWCONV_BULK 0
#define DWCONV_CACHED 1
#define DWCONV_COLUMNS 7
#define DWCONV_ROWS 1
#define DWCONV_TAPS 8
#define DWCONV_STAGES 4
#define DWCONV_STAGE_ROWS 1
#define DWCONV_LOAD_BYTES 16
#define DWCONV_STORE_BYTES 16
#define DWCONV_COPIES 2
#define DWCONV_WIDTH 0
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr bool kMarch = DWCONV_MARCH;
    static constexpr bool kBulk = DWCONV_BULK, kCached = DWCONV_CACHED;
    static constexpr int kChannels = DWCONV_CHANNELS, kVector = DWCONV_VECTOR;
    static constexpr int kColumns = DWCONV_COLUMNS, kRows = DWCONV_ROWS, kTaps = DWCONV_TAPS;
    static constexpr int kCopies = DWCONV_COPIES, kStoreBytes = DWCONV_STORE_BYTES, kWidth = DWCONV_WIDTH;
    static constexpr int kStages = DWCONV_STAGES, kStageRows = DWCONV_STAGE_ROWS, kLoadBytes = DWCONV_LOAD_BYTES;
};

using Tiling = dwconv::WideNhwcTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::wide_nhwc<Config>(tensors, sizes, tiling);
}
