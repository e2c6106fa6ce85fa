// wide_nhwc.cuh: depthwise convolution, channels last, for filters of many taps: rows stream through shared memory
//   y[n,i,j,c] = b[c] + sum_{u,v} w[c,u,v] * x[n, i*SH - PT + u*DH, j*SW - PL + v*DW, c/M]     float32 sum
//   x [N,H,W,C]   w [C*M,KH,KW]   b [C*M] or null   y [N,OH,OW,C*M]     offsets in elements, 64-bit
//   A thread makes kColumns neighbouring columns of one channel, so that neighbouring lanes are neighbouring channels.
//   A block works on kChannels channels, `groups` groups of columns and `slots` images. It takes unit after unit (a
//   strip of rows and columns of `slots` images), of a unit row after row, and has kStages - 1 stages of rows in
//   flight.
//   kMarch: the filter is in registers. Each input row is added to all output rows that read it, and the sums move on
//     by one output row as they are added to. Otherwise: sums of kRows output rows stay where they are, and the filter
//     is read from shared memory, kTaps taps of a row at a time, each of them for kColumns products.
//   shared memory: x [kStages][kStageRows][slots][columns][channels] as in memory, the filter ([KH][KW/4][kChannels][4]
//     as Sum, for the march [kChannels][KH*KW] as in memory), and outputs of each warp [kColumns][32] on their way out
//   grid.x = chunks of kChannels channels * parts of the units
//   least DRAM traffic: x + w + y, once each; halos between units come from L2
#pragma once
#include "wide_nhwc_rows.cuh"

namespace dwconv {

// ---- arithmetic ----

// The march: adds one input row, of which `window` is what the thread reads, to all output rows that read it.
// Phase = (row + kPadTop) mod kStrideH: filter rows Phase, Phase + kStrideH, ... read the row; sums[0] belongs to the
// lowest output row. At phase 0 a new output row begins, and every sum takes the place of the one above: as the first
// multiply-add writes it there, that costs nothing. (Leaving out the sums of rows that aren't the unit's takes 35
// registers more: 0.50 instead of 0.56 at 56x56x96, 0.54 instead of 0.51 at 7x7x768, float16; H200, 2026-11.)
template <class C, int Phase, class Sum>
__device__ __forceinline__ void march_row(const Sum* window, const Sum (&taps)[C::kFilterH * C::kFilterW], Sum bias,
                                          Sum (&sums)[WideNhwc<C>::kLive][C::kColumns]) {
#pragma unroll
    for (int k = WideNhwc<C>::kLive - 1; k >= 0; --k) {
        const int u = Phase + k * C::kStrideH;
        if (u >= C::kFilterH) continue;
        Sum row[C::kColumns];
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t) row[t] = Phase > 0 ? sums[k][t] : k > 0 ? sums[k - 1][t] : bias;
#pragma unroll
        for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t)
                row[t] += taps[u * C::kFilterW + v] * window[t * C::kStrideW + v * C::kDilationW];
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t) sums[k][t] = row[t];
    }
}

template <class C, int Phase, class Sum>
__device__ __forceinline__ void march_phases(int phase, const Sum* window, const Sum (&taps)[C::kFilterH * C::kFilterW],
                                             Sum bias, Sum (&sums)[WideNhwc<C>::kLive][C::kColumns]) {
    if constexpr (Phase + 1 < C::kStrideH)
        if (phase != Phase) return march_phases<C, Phase + 1>(phase, window, taps, bias, sums);
    march_row<C, Phase>(window, taps, bias, sums);
}

template <class C, class Sum>
__device__ __forceinline__ void move_up(Sum (&sums)[WideNhwc<C>::kLive][C::kColumns]) {
#pragma unroll
    for (int k = WideNhwc<C>::kLive - 1; k > 0; --k)
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t) sums[k][t] = sums[k - 1][t];
}

// Reads the columns of the thread's channel that so many taps of a row need.
template <class C, int Taps, class Sum>
__device__ __forceinline__ void read_window(const typename C::Element* at, Sum* window) {
#pragma unroll
    for (int k = 0; k <= (C::kColumns - 1) * C::kStrideW + (Taps - 1) * C::kDilationW; ++k) {
        bool needed = false;
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t) needed |= is_tap(k - t * C::kStrideW, C::kDilationW, Taps);
        if (needed) window[k] = static_cast<Sum>(at[k * WideNhwc<C>::kStaged]);
    }
}

// Adds Taps taps of each filter row to the output rows that read the input row. `below` is the input row's distance
// from the first that output row 0 reads, `at` the first column that the taps read, `filter` the first tap in row 0.
template <class C, int Taps, class Sum>
__device__ __forceinline__ void add_taps(const typename C::Element* at, const Sum* filter, int below,
                                         Sum (&sums)[C::kRows][C::kColumns]) {
    using W = WideNhwc<C>;
    Sum window[(C::kColumns - 1) * C::kStrideW + (Taps - 1) * C::kDilationW + 1];
    read_window<C, Taps>(at, window);
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
        const int from_first = below - i * C::kStrideH;  // = u * kDilationH
        if (!is_tap(from_first, C::kDilationH, C::kFilterH)) continue;
        const Sum* row = filter + from_first / C::kDilationH * (W::kFilterRow * C::kChannels);
        Sum taps[ceil_div(Taps, W::kPack) * W::kPack];
#pragma unroll
        for (int v = 0; v < Taps; v += W::kPack) {
            const auto pack = *reinterpret_cast<const Vector<Sum, W::kPack>*>(row + v * C::kChannels);
#pragma unroll
            for (int e = 0; e < W::kPack; ++e) taps[v + e] = pack.element[e];
        }
#pragma unroll
        for (int v = 0; v < Taps; ++v)
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t) sums[i][t] += taps[v] * window[t * C::kStrideW + v * C::kDilationW];
    }
}

// Adds one input row to the output rows that read it, kTaps columns of the filter at a time; those that reach the
// image nowhere are left out. `column` is the first column that the thread reads, in the image.
template <class C, class Sum>
__device__ __forceinline__ void add_row(const typename C::Element* at, const Sum* filter, int below, int column,
                                        int in_w, Sum (&sums)[C::kRows][C::kColumns]) {
    using W = WideNhwc<C>;
    constexpr int kTaps = smaller(C::kTaps, C::kFilterW), kRest = C::kFilterW % kTaps;
    const auto reaches = [&](int v, int taps) {
        const int first = column + v * C::kDilationW;
        return first < in_w && first + (C::kColumns - 1) * C::kStrideW + (taps - 1) * C::kDilationW >= 0;
    };
#pragma unroll 1
    for (int v = 0; v + kTaps <= C::kFilterW; v += kTaps)
        if (reaches(v, kTaps))
            add_taps<C, kTaps>(at + v * C::kDilationW * W::kStaged, filter + v * C::kChannels, below, sums);
    if constexpr (kRest > 0) {
        constexpr int v = C::kFilterW - kRest;
        if (reaches(v, kRest))
            add_taps<C, kRest>(at + v * C::kDilationW * W::kStaged, filter + v * C::kChannels, below, sums);
    }
}

// ---- the block ----

// Brings the filters of the block's channels to shared memory: as they are for the march, which reads them once.
template <class C>
__device__ __forceinline__ void share_filter(const typename C::Element* w, typename C::Element* filter,
                                             unsigned count) {
    constexpr unsigned kVector = 16 / sizeof(typename C::Element);
    const unsigned vectors = reinterpret_cast<unsigned long long>(w) % 16 == 0 ? count / kVector : 0;
    for (unsigned k = threadIdx.x; k < vectors; k += blockDim.x)
        row_piece<16>(filter + k * kVector, w + k * kVector, true);
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
        filter[place] = static_cast<Sum>(load_one(w + k));
    }
}

// Stores a row of outputs, the first `count` of them; `to` holds the addresses of the first one. Where all outputs of
// a warp are vectors, they go through the warp's part of shared memory, `mine`, and `to` is where the lane's first
// vector goes: one store instead of up to eight.
template <class C, class Sum>
__device__ __forceinline__ void store_row(const Tensors<typename C::Element>& to, typename C::Element* mine, int pitch,
                                          int count, const Sum (&sums)[C::kColumns], const ChannelValues<Sum>& values) {
    using Element = typename C::Element;
    if constexpr (WideNhwc<C>::kShareOut) {
        constexpr int kVector = 16 / sizeof(Element), kPieces = 32 / kVector;
        const int lane = static_cast<int>(threadIdx.x % 32);
        __syncwarp();
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
            mine[t * 32 + lane] = static_cast<Element>(finished<C>(sums[t], values, Element()));
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
            if (t < count) store_outputs<C, 1, 0>(to, t * pitch, &sums[t], &values);
    }
}

template <class C>
__device__ __forceinline__ void wide_nhwc(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                          const WideNhwcTiling& tiling) {
    using W = WideNhwc<C>;
    using Element = typename C::Element;
    using Sum = typename W::Sum;
    const unsigned part = tiling.chunks.quotient(blockIdx.x);
    const unsigned first_channel = (blockIdx.x - part * tiling.chunks.divisor) * C::kChannels;
    const unsigned lane = threadIdx.x % C::kChannels, across = threadIdx.x / C::kChannels;
    const unsigned slot = across / tiling.groups, group = across - slot * tiling.groups;
    const unsigned channel = first_channel + lane;
    const bool has_channel = channel < sizes.out_channels;

    constexpr unsigned kAlign = 16 / sizeof(Element);
    const unsigned slot_elements = tiling.columns * W::kStaged;
    const unsigned row_elements = (tiling.slots * slot_elements + kAlign - 1) / kAlign * kAlign;
    constexpr unsigned kStageRows = C::kStageRows;
    Element* const stages = shared_memory<Element>();
    Element* const filter_bits = stages + C::kStages * kStageRows * row_elements;
    Sum* const filter = reinterpret_cast<Sum*>(filter_bits);

    // The first rows are on their way before anything else.
    WideNhwcCopies<C> copies;
    {
        const unsigned of_slot = threadIdx.x - slot * tiling.groups * C::kChannels;
        copies.step = static_cast<int>(tiling.groups) * C::kChannels / W::kPieces;
        copies.column = static_cast<int>(of_slot / W::kPieces);
        // Threads beyond whole columns copy nothing.
        copies.span = copies.column < copies.step ? static_cast<int>(tiling.columns) - copies.column : 0;
        const unsigned piece = of_slot % W::kPieces * W::kLoad;
        copies.channel = static_cast<int>(first_channel / C::kMultiplier + piece);
        copies.place = slot * slot_elements + copies.column * W::kStaged + piece;
        copies.row_step = sizes.x_row;
        copies.row_place = row_elements;
        copies.column_step = copies.step * static_cast<int>(sizes.x_column);
        copies.slot = slot;
        copies.number = part * tiling.part_units;
        copies.end_number = min(copies.number + tiling.part_units, tiling.units);
    }
    unsigned number = copies.number;
    const unsigned end_number = copies.end_number;
    const Element* const w = tensors.w + static_cast<long long>(first_channel) * W::kTaps;
    const unsigned filter_count =
        min(static_cast<unsigned>(sizes.out_channels) - first_channel, static_cast<unsigned>(C::kChannels)) * W::kTaps;
    if constexpr (C::kMarch) share_filter<C>(w, filter_bits, filter_count);  // belongs to the first group of copies
    copies.open(tensors, sizes, tiling);
#pragma unroll 1
    for (unsigned k = 0; k < C::kStages - 1; ++k)
        copies.copy(stages + k * (kStageRows * row_elements), tensors, sizes, tiling);
    if constexpr (!C::kMarch) sort_filter<C>(w, filter, filter_count);

    Sum bias = Sum(0);
    ChannelValues<Sum> values = {Sum(1), Sum(0)};
    if (has_channel) {
        if constexpr (C::kHasBias) bias = static_cast<Sum>(load_one(tensors.b + channel));
        values = channel_values<C>(tensors, channel);
    }
    Sum taps[C::kMarch ? W::kTaps : 1];
    if constexpr (C::kMarch) {
        wait_for_rows<C::kStages - 2>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < W::kTaps; ++k) taps[k] = static_cast<Sum>(filter_bits[lane * W::kTaps + k]);
    }

    // Where the thread reads the columns of its outputs: in a stage, and in the image.
    const int strip_columns = static_cast<int>(tiling.groups) * C::kColumns * C::kStrideW;
    const int own = static_cast<int>(group) * C::kColumns * C::kStrideW;
    const int read =
        static_cast<int>(slot * slot_elements) + (own - static_cast<int>(tiling.skipped)) * W::kStaged +
        static_cast<int>(W::kWhole ? lane / C::kMultiplier : channel / C::kMultiplier - first_channel / C::kMultiplier);

    // What the thread stores: its own outputs, or vectors of its warp's.
    constexpr unsigned kVector = 16 / sizeof(Element), kPieces = 32 / kVector, kWarpOut = 32 * C::kColumns;
    const unsigned lane_column = W::kShareOut ? threadIdx.x % 32 / kPieces : 0;
    const unsigned stored_channel =
        W::kShareOut ? first_channel + lane / 32 * 32 + threadIdx.x % kPieces * kVector : channel;
    const bool stores_channel = stored_channel < sizes.out_channels;
    Element* const mine =
        W::kShareOut ? reinterpret_cast<Element*>(reinterpret_cast<unsigned char*>(filter_bits) + W::kFilterBytes) +
                           threadIdx.x / 32 * kWarpOut
                     : nullptr;
    unsigned stage = 0, next_stage = C::kStages - 1;

#pragma unroll 1
    for (; number < end_number; ++number) {
        const WideNhwcUnit unit = wide_nhwc_unit<C>(number, sizes, tiling);
        const unsigned image = unit.image_group * tiling.slots + slot;
        const int column =
            (unit.column_strip * static_cast<int>(tiling.groups) + static_cast<int>(group)) * C::kColumns;
        const int count = stores_channel && image < tiling.images ? static_cast<int>(sizes.out_w) - column : 0;
        const int image_column = unit.column_strip * strip_columns - C::kPadLeft + own;
        const int pitch = static_cast<int>(sizes.out_channels), row_pitch = static_cast<int>(sizes.out_w) * pitch;
        const long long out = (image * sizes.out_h + unit.out_first) * row_pitch +
                              static_cast<long long>(column + lane_column) * pitch + stored_channel;
        Tensors<Element> to = tensors;
        to.y += out;
        if constexpr (C::kHasResidual) to.residual += out;
        const auto store = [&](const Sum(&row)[C::kColumns]) {
            store_row<C>(to, mine, pitch, count, row, values);
            to.y += row_pitch;
            if constexpr (C::kHasResidual) to.residual += row_pitch;
        };

        constexpr int kSums = C::kMarch ? W::kLive : C::kRows;
        Sum sums[kSums][C::kColumns];
        // An output row of the march is complete when its last filter row has been added.
        const auto store_if_done = [&](int row, int phase) {
            const int since = row + C::kPadTop - (C::kFilterH - 1) - unit.out_first * C::kStrideH;
            if (since < 0 || phase != (C::kFilterH - 1) % C::kStrideH) return;
            store(sums[kSums - 1]);
        };
#pragma unroll
        for (int k = 0; k < kSums; ++k)
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t) sums[k][t] = bias;

        int row = unit.first;
#pragma unroll 1
        while (row < unit.end) {
            wait_for_rows<C::kStages - 2>();
            __syncthreads();  // the rows are there for all, and nobody reads the stage any more that is filled now
            copies.copy(stages + next_stage * (kStageRows * row_elements), tensors, sizes, tiling);
            const Element* at = stages + stage * (kStageRows * row_elements) + read;
            next_stage = stage;
            stage = stage + 1 == C::kStages ? 0 : stage + 1;
            const int stage_end = min(row + C::kStageRows, unit.end);
#pragma unroll 1
            do {
                if constexpr (C::kMarch) {
                    Sum window[(C::kColumns - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW + 1];
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
                    for (int t = 0; t < C::kColumns; ++t) sums[k][t] = sums[k + 1][t];
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
#define DWCONV_COLUMNS 7
#define DWCONV_ROWS 1
#define DWCONV_TAPS 8
#define DWCONV_STAGES 4
#define DWCONV_STAGE_ROWS 1
#define DWCONV_LOAD_BYTES 16
#define DWCONV_STORE_BYTES 16
#define DWCONV_COPIES 2
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr bool kMarch = DWCONV_MARCH;
    static constexpr int kChannels = DWCONV_CHANNELS;
    static constexpr int kColumns = DWCONV_COLUMNS, kRows = DWCONV_ROWS, kTaps = DWCONV_TAPS;
    static constexpr int kCopies = DWCONV_COPIES, kStoreBytes = DWCONV_STORE_BYTES;
    static constexpr int kStages = DWCONV_STAGES, kStageRows = DWCONV_STAGE_ROWS, kLoadBytes = DWCONV_LOAD_BYTES;
};

using Tiling = dwconv::WideNhwcTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::wide_nhwc<Config>(tensors, sizes, tiling);
}
