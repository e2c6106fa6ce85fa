// wide_nhwc.cuh: depthwise convolution, channels last, for filters of many taps: rows stream through shared memory
//   y[n,i,j,c] = b[c] + sum_{u,v} w[c,u,v] * x[n, i*SH - PT + u*DH, j*SW - PL + v*DW, c/M]     float32 sum
//   x [N,H,W,C]   w [C*M,KH,KW]   b [C*M] or null   y [N,OH,OW,C*M]     offsets in elements, 64-bit
//   A thread makes kColumns neighbouring columns of kVector channels (one but for the march), so that neighbouring
//   lanes are neighbouring channels. A block works on kChannels channels, `groups` groups of columns and `slots`
//   images. It takes unit after unit, of a unit row after row, with kStages - 1 stages of rows in flight.
//   kMarch: the filter is in registers. Each input row is added to all output rows that read it, and the sums move on
//     by one output row as they are added to. Otherwise: sums of kRows output rows stay where they are, and the filter
//     is read from shared memory, kTaps taps of a row at a time, each of them for kColumns products.
//   kBoxes: rows of x come as boxes of a tensor; kOutBoxes: rows of y leave as such, too.
//   shared memory: gates of stages; x [kStages][kStageRows][slots][columns][channels] as in memory; outputs of each
//     warp on their way out, [kColumns][32] or as a box of y is; the filter ([KH][KW/4][kChannels][4] as Sum, for the
//     march [kChannels][KH*KW] as in memory)
//   grid.x = chunks of kChannels channels * strips of columns * parts of all output rows, chunk fastest
//   least DRAM traffic: x + w + y, once each; halos between units come from L2
#pragma once
#include "wide_nhwc_boxes.cuh"
#include "wide_nhwc_outputs.cuh"
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

// maps: of kBoxes, else nothing.
template <class C, class... Maps>
__device__ __forceinline__ void wide_nhwc(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                          const WideNhwcTiling& tiling, const Maps&... maps) {
    using W = WideNhwc<C>;
    using Element = typename C::Element;
    using Sum = typename W::Sum;
    constexpr unsigned kVector = C::kVector;
    const unsigned above = tiling.chunks.quotient(blockIdx.x);
    const unsigned first_channel = (blockIdx.x - above * tiling.chunks.divisor) * C::kChannels;
    const unsigned part = tiling.column_strips.quotient(above);
    const int strip = static_cast<int>(above - part * tiling.column_strips.divisor);
    const WideNhwcPlace<C> place(threadIdx.x, first_channel, strip, tiling);
    const unsigned lane = place.lane, slot = place.slot, channel = place.channel;
    const bool has_channel = channel < sizes.out_channels;

    constexpr unsigned kAlign = 16 / sizeof(Element);
    const unsigned slot_elements = tiling.columns * W::kStaged;
    const unsigned row_elements = (tiling.slots * slot_elements + kAlign - 1) / kAlign * kAlign;
    const unsigned stage_bytes = W::stage_bytes(row_elements * sizeof(Element));
    unsigned char* const memory = shared_memory<unsigned char>() + W::kGateBytes;
    Element* const outputs = reinterpret_cast<Element*>(memory + C::kStages * stage_bytes);
    Element* const filter_bits = outputs + (blockDim.x + 31) / 32 * W::kWarpOut;
    Sum* const filter = reinterpret_cast<Sum*>(filter_bits);

    // The first rows are on their way before anything else.
    unsigned position = part * tiling.part_rows;
    const unsigned end_position = min(position + tiling.part_rows, tiling.rows);
    const int strip_columns = static_cast<int>(tiling.groups) * C::kColumns * C::kStrideW;
    const int tile_column = strip * strip_columns - C::kPadLeft + static_cast<int>(tiling.skipped);
    const Element* const w = tensors.w + static_cast<long long>(first_channel) * W::kTaps;
    const unsigned filter_count =
        min(static_cast<unsigned>(sizes.out_channels) - first_channel, static_cast<unsigned>(C::kChannels)) * W::kTaps;
    auto copies = [&] {
        if constexpr (C::kBoxes > 0)
            return WideNhwcBoxes<C>(maps.x..., position, end_position, place, tile_column, row_elements);
        else
            return WideNhwcPieces<C>(sizes, tiling, position, end_position, place, tile_column, slot_elements,
                                     row_elements);
    }();
    if constexpr (C::kMarch) share_filter<C>(w, filter_bits, filter_count);  // belongs to the first group of copies
    if constexpr (C::kBoxes > 0) {
        copies.open(sizes, tiling);
#pragma unroll 1
        for (unsigned k = 0; k < C::kStages - 1; ++k) copies.template fill<true>(k, 0, maps.x..., sizes, tiling);
        end_of_copies();
    } else {
        copies.open(tensors, sizes, tiling);
#pragma unroll 1
        for (unsigned k = 0; k < C::kStages - 1; ++k) copies.copy(k, tensors, sizes, tiling);
    }
    if constexpr (!C::kMarch) sort_filter<C>(w, filter, filter_count);

    Sum bias[kVector];
    ChannelValues<Sum> values[kVector];
#pragma unroll
    for (unsigned e = 0; e < kVector; ++e) {
        bias[e] = C::kHasBias && has_channel ? static_cast<Sum>(load_one(tensors.b + channel + e)) : Sum(0);
        values[e] = channel_values<C>(tensors, has_channel ? channel + e : 0);
    }
    float taps[C::kMarch ? W::kTaps : 1][kVector];
    if constexpr (C::kMarch) wait_for_copies<(C::kBoxes > 0 ? 0 : C::kStages - 2)>();
    if constexpr (C::kMarch || C::kBoxes > 0) __syncthreads();  // the filter is there for all
    if constexpr (C::kMarch) {
#pragma unroll
        for (int k = 0; k < W::kTaps; ++k)
#pragma unroll
            for (unsigned e = 0; e < kVector; ++e)
                taps[k][e] = held(static_cast<float>(filter_bits[(lane * kVector + e) * W::kTaps + tap_at<C>(k)]));
    }

    // Where the thread reads the columns of its outputs: in a stage, and in the image.
    const int own = static_cast<int>(place.group) * C::kColumns * C::kStrideW;
    const int image_column = strip * strip_columns - C::kPadLeft + own;
    const int read = static_cast<int>(slot * slot_elements) + (own - static_cast<int>(tiling.skipped)) * W::kStaged +
                     static_cast<int>(W::kWhole ? lane * kVector / C::kMultiplier
                                                : channel / C::kMultiplier - first_channel / C::kMultiplier);
    auto out = [&] {
        if constexpr (C::kOutBoxes)
            return WideNhwcBoxOutputs<C>(maps.y..., tiling, place, values, outputs);
        else
            return WideNhwcOutputs<C>(tensors, sizes, tiling, place, values, outputs);
    }();
    unsigned stage = 0, next_stage = C::kStages - 1;

#pragma unroll 1
    while (position < end_position) {
        const WideNhwcUnit unit = wide_nhwc_unit<C>(position, end_position, sizes, tiling);
        position += unit.out_end - unit.out_first;
        out.begin(tensors, unit);

        constexpr int kSums = C::kMarch ? W::kLive : C::kRows;
        Sum sums[kSums][C::kColumns][C::kVector];
        // An output row of the march is complete when its last filter row has been added.
        const auto store_if_done = [&](int row, int phase) {
            const int since = row + C::kPadTop - (C::kFilterH - 1) - unit.out_first * C::kStrideH;
            if (since < 0 || phase != (C::kFilterH - 1) % C::kStrideH) return;
            out.store(sums[kSums - 1]);
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
            if constexpr (C::kBoxes > 0) {
                copies.gates.wait_until_full(stage);
                copies.template fill<false>(next_stage, stage, maps.x..., sizes, tiling);
            } else {
                copies.wait();
                __syncthreads();  // the rows are there for all, and nobody reads the stage any more that is filled now
                copies.copy(next_stage, tensors, sizes, tiling);
            }
            const Element* at = reinterpret_cast<const Element*>(memory + stage * stage_bytes) + read;
            if constexpr (C::kBoxes == 0) {
                next_stage = stage;
                stage = stage + 1 == C::kStages ? 0 : stage + 1;
            }
            const int stage_end = min(row + C::kStageRows, unit.end);
#pragma unroll 1
            do {
                if constexpr (C::kMarch) {
                    Sum window[(C::kColumns - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW + 1][C::kVector];
                    read_window<C, C::kFilterW>(at, window);
                    const int phase = static_cast<int>(static_cast<unsigned>(row + C::kPadTop) % C::kStrideH);
                    march_phases<C, 0>(phase, window, taps, bias, sums);
                    store_if_done(row, phase);
                } else {
                    add_row<C>(at, filter + lane * W::kPack, row + C::kPadTop - unit.out_first * C::kStrideH,
                               image_column, static_cast<int>(sizes.in_w), sums);
                }
                at += row_elements;
            } while (++row < stage_end);
            if constexpr (C::kBoxes > 0) {
                copies.gates.is_read(stage);
                next_stage = stage;
                stage = copies.gates.next(stage);
            }
        }
        if constexpr (C::kMarch && C::kOutBoxes) {
            // Rows below the image add nothing more: sums[k] belongs to output row newest - k.
            const int complete = row - 1 + C::kPadTop - (C::kFilterH - 1),
                      newest = (row - 1 + C::kPadTop) / C::kStrideH;
            const int next = complete < 0 ? unit.out_first : larger(unit.out_first, complete / C::kStrideH + 1);
#pragma unroll
            for (int k = kSums - 1; k >= 0; --k)
                if (newest - k >= next && newest - k < unit.out_end) out.store(sums[k]);
        } else if constexpr (C::kMarch) {
            // Through the padding below the image, until the last sums are out. Where lanes store, the code above takes
            // 40 registers more.
            const int last = (unit.out_end - 1) * C::kStrideH - C::kPadTop + C::kFilterH - 1;
#pragma unroll 1
            for (; row <= last; ++row) {
                const int phase = static_cast<int>(static_cast<unsigned>(row + C::kPadTop) % C::kStrideH);
                if (phase == 0) move_up<C>(sums);
                store_if_done(row, phase);
            }
        }
        if constexpr (!C::kMarch) {
            // Row by row through the same code; an unrolled one would hold the epilogue kRows times.
#pragma unroll 1
            for (int i = unit.out_first; i < unit.out_end; ++i) {
                out.store(sums[0]);
#pragma unroll
                for (int k = 0; k + 1 < C::kRows; ++k)
#pragma unroll
                    for (int t = 0; t < C::kColumns; ++t) sums[k][t][0] = sums[k + 1][t][0];
            }
        }
    }
    out.end();
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
#define DWCONV_BOXES 0
#define DWCONV_BOX_COLUMNS 0
#define DWCONV_OUT_BOXES 0
#define DWCONV_EVICT_FIRST 0
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
    static constexpr bool kCached = DWCONV_CACHED;
    static constexpr int kBoxes = DWCONV_BOXES;              // of columns side by side, that rows of x come as
    static constexpr int kBoxColumns = DWCONV_BOX_COLUMNS;   // of each
    static constexpr bool kOutBoxes = DWCONV_OUT_BOXES;      // rows of y leave as boxes, too
    static constexpr bool kEvictFirst = DWCONV_EVICT_FIRST;  // what boxes bring leaves L2 before all else
    static constexpr int kChannels = DWCONV_CHANNELS, kVector = DWCONV_VECTOR;
    static constexpr int kColumns = DWCONV_COLUMNS, kRows = DWCONV_ROWS, kTaps = DWCONV_TAPS;
    static constexpr int kCopies = DWCONV_COPIES, kStoreBytes = DWCONV_STORE_BYTES, kWidth = DWCONV_WIDTH;
    static constexpr int kStages = DWCONV_STAGES, kStageRows = DWCONV_STAGE_ROWS, kLoadBytes = DWCONV_LOAD_BYTES;
};

using Tiling = dwconv::WideNhwcTiling;

#if DWCONV_BOXES && DWCONV_OUT_BOXES
#define DWCONV_MAPS , const __grid_constant__ dwconv::ForwardMaps maps
#define DWCONV_GIVEN_MAPS , maps
#elif DWCONV_BOXES
#define DWCONV_MAPS , const __grid_constant__ dwconv::InputMap maps
#define DWCONV_GIVEN_MAPS , maps
#else
#define DWCONV_MAPS
#define DWCONV_GIVEN_MAPS
#endif

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes,
                  const Tiling tiling DWCONV_MAPS) {
    dwconv::wide_nhwc<Config>(tensors, sizes, tiling DWCONV_GIVEN_MAPS);
}
