// taps_sparse_nhwc.cuh: gradients of filters and bias of 16-bit elements, channels last, on tensor cores (sm_80 and
// newer)
//   dw[c,t,u,v] = sum over images n and outputs (d, i, j) of
//                 g[n, d, i, j, c] * x[n, d*SD - PF + t*DD, i*SH - PT + u*DH, j*SW - PL + v*DW, c]
//   db[c]       = sum over images n and outputs (d, i, j) of g[n, d, i, j, c]                    float32 sums
//   x [N,D,H,W,C]   g [N,OD,OH,OW,C]   dw [C,KD,KH,KW]   db [C] or null     64-bit offsets in elements
//   A block has kWarps * kOwn channels; rows of them stream through shared memory, kStages - 1 in flight, and each warp
//   multiplies its own channels; warps may be a step apart. One sparse m16n8k32 makes products of a row of taps and 128
//   outputs of two channels (taps_sparse_nhwc_sums.cuh). Then the last block of a group of channels adds up what its
//   blocks have found, in one order; of many blocks, the last one of each few neighbours adds up those before.
//   grid: see taps_lines.cuh
//   shared memory: stages [kStages] (W::kStageBytes), then gates; at the end, sums in the stages' place
//   least DRAM traffic: x + g, once each; halos between tiles come from L1 or L2, and all for more tiles of taps
#pragma once
#include "taps_sparse_nhwc_boxes.cuh"
#include "taps_sparse_nhwc_sums.cuh"

namespace dwconv {

// A block's march: what it fills stages with, and what it reads them for.
template <class C, class Copies>
struct SparseMarch {
    using W = TapsSparse<C>;
    const FilterGradients<typename C::Element>& tensors;
    const Sizes& sizes;
    const LinesPlace<W>& place;
    unsigned char* const stages;
    SparseGates<C>& gates;
    Copies& copies;
    TapsSparseSums<C> taps;
    LinesSegment<W> segment;
    unsigned stage = 0, before = C::kStages - 1;  // which is filled when the one behind it has been read

    __device__ __forceinline__ SparseMarch(const FilterGradients<typename C::Element>& tensors_, const Sizes& sizes_,
                                           const LinesPlace<W>& place_, unsigned char* stages_, SparseGates<C>& gates_,
                                           Copies& copies_)
        : tensors(tensors_), sizes(sizes_), place(place_), stages(stages_), gates(gates_), copies(copies_) {}

    __device__ __forceinline__ void fill(unsigned number) {
        if constexpr (C::kBoxes) {
            copies.send(stages + number * W::kStageBytes, gates.gate(number), sizes);
        } else {
            copies.copy(number * W::kStageBytes, tensors, sizes);
            gates.is_filled(number);
        }
    }

    // Step `number` of the segment, whose row of g goes to slot Phase.
    template <int Phase>
    __device__ __forceinline__ void step(int number) {
        gates.wait_until_full(stage);
        taps.read(stage * W::kStageBytes);
        if constexpr (W::kReadAtOnce) gates.is_read(stage);
        if (copies.has_turn()) gates.wait_until_empty(before, before > stage);
        fill(before);
        taps.template step<Phase>(stage * W::kStageBytes, number, segment, place);
        if constexpr (!W::kReadAtOnce) gates.is_read(stage);
        before = stage;
        stage = gates.next(stage);
    }
};

// maps: of kBoxes, else nothing.
template <class C, class... Maps>
__device__ __forceinline__ void taps_sparse_nhwc(const FilterGradients<typename C::Element>& tensors,
                                                 const Sizes& sizes, const LinesTiling& tiling, const Maps&... maps) {
    using W = TapsSparse<C>;
    const LinesPlace<W> place(sizes, tiling);

    unsigned char* const stages = shared_memory<unsigned char>();
    SparseGates<C> gates(stages + W::kGatesAt);
    auto copies = [&] {
        if constexpr (C::kBoxes)
            return TapsSparseBoxes<C>(maps..., sizes, place, tiling);
        else
            return LinesCopies<W>(tensors, sizes, place, tiling, stages);
    }();
    SparseMarch<C, decltype(copies)> march(tensors, sizes, place, stages, gates, copies);
#pragma unroll 1
    for (unsigned k = 0; k < C::kStages; ++k) {
        if constexpr (!C::kBoxes) {
            // What no copy fills, beyond the image and behind the last line, must be zero.
#pragma unroll 1
            for (unsigned at = threadIdx.x * 16; at < W::kStageBytes; at += 16 * W::kThreads)
                *reinterpret_cast<uint4*>(stages + k * W::kStageBytes + at) = uint4{0, 0, 0, 0};
            __syncthreads();
        }
        if (k == C::kStages - 1) break;  // which is filled when the first one is read
        march.fill(k);
    }
    if constexpr (C::kBoxes && C::kWidth > 0) {
        clear_beside_boxes<C>(stages);
        __syncthreads();
    }

    unsigned position = place.first;
#pragma unroll 1
    while (march.segment.find(position, place, sizes, tiling))
        take_all_steps<W::kLive>(march, march.segment.first, march.segment.last);
    wait_for_copies<0>();
    __syncthreads();
    finish_lines<W>(tensors, sizes, tiling, place, march.taps);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#undef DWCONV_ELEMENT
#define DWCONV_ELEMENT dwconv::Half
#undef DWCONV_CHANNELS_LAST
#define DWCONV_CHANNELS_LAST 1
#define DWCONV_TURNED 0
#define DWCONV_TAPS_A 3
#define DWCONV_TAPS_B 3
#define DWCONV_GROUPS 7
#define DWCONV_LINES 2
#define DWCONV_OWN 4
#define DWCONV_WARPS 8
#define DWCONV_MIN_BLOCKS 2
#define DWCONV_STAGES 4
#define DWCONV_G_BYTES 16
#define DWCONV_X_BYTES 16
#define DWCONV_CACHED 1
#define DWCONV_BOXES 0
#define DWCONV_EVICT_FIRST 0
#define DWCONV_WIDTH 0
#define DWCONV_OUT_WIDTH 0
#define DWCONV_REPAIR 1
#define DWCONV_VOLUME 0
#endif

struct Config : ProblemConfig {
    static constexpr bool kTurned = DWCONV_TURNED;
    static constexpr int kTapsA = DWCONV_TAPS_A, kTapsB = DWCONV_TAPS_B;  // of a tile
    static constexpr int kGroups = DWCONV_GROUPS, kLines = DWCONV_LINES;  // of eight outputs, of a line; of a step
    static constexpr int kOwn = DWCONV_OWN;                               // channels of a warp
    static constexpr int kWarps = DWCONV_WARPS, kMinBlocks = DWCONV_MIN_BLOCKS, kStages = DWCONV_STAGES;
    static constexpr int kGBytes = DWCONV_G_BYTES, kXBytes = DWCONV_X_BYTES;   // of a copy
    static constexpr bool kCached = DWCONV_CACHED;                             // copies go through L1
    static constexpr bool kBoxes = DWCONV_BOXES;                               // lines come by one copy each, of maps
    static constexpr bool kEvictFirst = DWCONV_EVICT_FIRST;                    // such lines leave L2 before all else
    static constexpr int kWidth = DWCONV_WIDTH, kOutWidth = DWCONV_OUT_WIDTH;  // of images one line wide
    static constexpr bool kVolume = DWCONV_VOLUME;                             // x has a depth
    static constexpr bool kRepair = DWCONV_REPAIR;  // sums that aren't finite are computed again; off: for tests
};

using Tiling = dwconv::LinesTiling;

#if DWCONV_BOXES
#define DWCONV_MAPS , const __grid_constant__ dwconv::GradientMaps maps
#define DWCONV_GIVEN_MAPS , maps
#else
#define DWCONV_MAPS
#define DWCONV_GIVEN_MAPS
#endif

extern "C" __global__ void __launch_bounds__(32 * Config::kWarps, Config::kMinBlocks)
    dwconv_kernel(const dwconv::FilterGradients<Config::Element> tensors, const dwconv::Sizes sizes,
                  const Tiling tiling DWCONV_MAPS) {
    dwconv::taps_sparse_nhwc<Config>(tensors, sizes, tiling DWCONV_GIVEN_MAPS);
}
