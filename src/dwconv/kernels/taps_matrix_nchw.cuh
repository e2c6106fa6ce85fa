// taps_matrix_nchw.cuh: gradients of filters and bias of 16-bit elements, channels first, on tensor cores (sm_80 and
// newer)
//   dw[c,t,u,v] = sum over images n and outputs (d, i, j) of
//                 g[n, c, d, i, j] * x[n, c/M, d*SD - PF + t*DD, i*SH - PT + u*DH, j*SW - PL + v*DW]
//   db[c]       = sum over images n and outputs (d, i, j) of g[n, c, d, i, j]                    float32 sums
//   x [N,C,D,H,W], dense rows  g [N,C*M,OD,OH,OW]   dw [C*M,KD,KH,KW]   db [C*M] or null   64-bit offsets in elements
//   A warp has kOwn channels and stages of its own: rows stream through them, kStages - 1 in flight, and warps don't
//   wait for each other. One m16n8k16 makes the products of a row of taps and 128 outputs (taps_matrix_nchw_sums.cuh).
//   Then the last block of a group of channels adds up what its blocks have found, in one order; of many blocks, the
//   last one of each few neighbours adds up those before.
//   grid: see taps_lines.cuh; shared memory: stages [kWarps][kStages] (W::kStageBytes)
//   least DRAM traffic: x + g, once each; halos between tiles come from L1 or L2, and all for more tiles of taps
#pragma once
#include "taps_matrix_nchw_sums.cuh"

namespace dwconv {

// A warp's march: stages that it fills, and reads.
template <class C>
struct MatrixMarch {
    using W = TapsMatrix<C>;
    const FilterGradients<typename C::Element>& tensors;
    const Sizes& sizes;
    const LinesPlace<W>& place;
    LinesCopies<W>& copies;
    const unsigned begin, last;  // its first stage and its last one, in bytes
    unsigned stage, filled;
    TapsMatrixSums<C> taps;
    LinesSegment<W> segment;

    __device__ __forceinline__ MatrixMarch(const FilterGradients<typename C::Element>& tensors_, const Sizes& sizes_,
                                           const LinesPlace<W>& place_, LinesCopies<W>& copies_, unsigned begin_)
        : tensors(tensors_),
          sizes(sizes_),
          place(place_),
          copies(copies_),
          begin(begin_),
          last(begin_ + (C::kStages - 1) * W::kStageBytes),
          stage(begin),
          filled(last) {}

    // Step `number` of the segment, whose row of g goes to slot Phase.
    template <int Phase>
    __device__ __forceinline__ void step(int number) {
        wait_for_copies<C::kStages - 2>();
        __syncwarp();  // the stage is there for all lanes, and none reads the one any more that is filled now
        taps.read(stage);
        copies.copy(filled - begin, tensors, sizes);
        taps.template step<Phase>(stage, number, segment, place);
        filled = stage;
        stage = stage == last ? begin : stage + W::kStageBytes;
    }
};

template <class C>
__device__ __forceinline__ void taps_matrix_nchw(const FilterGradients<typename C::Element>& tensors,
                                                 const Sizes& sizes, const LinesTiling& tiling) {
    using W = TapsMatrix<C>;
    const LinesPlace<W> place(sizes, tiling);
    const unsigned warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // tells compilers that it is uniform
    constexpr unsigned kStagesBytes = C::kStages * W::kStageBytes;
    const unsigned begin = warp * kStagesBytes;

    // What no copy fills, beyond the image and behind the last line, must be zero.
    unsigned char* const stages = shared_memory<unsigned char>() + begin;
#pragma unroll 1
    for (unsigned at = threadIdx.x % 32 * 16; at < kStagesBytes; at += 32 * 16)
        *reinterpret_cast<uint4*>(stages + at) = uint4{0, 0, 0, 0};
    __syncwarp();
    LinesCopies<W> copies(tensors, sizes, place, tiling, stages);
#pragma unroll 1
    for (int k = 0; k < C::kStages - 1; ++k) copies.copy(k * W::kStageBytes, tensors, sizes);

    MatrixMarch<C> march(tensors, sizes, place, copies, begin);
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
#define DWCONV_TURNED 0
#define DWCONV_TAPS_A 3
#define DWCONV_TAPS_B 3
#define DWCONV_GROUPS 7
#define DWCONV_LINES 2
#define DWCONV_LEAD 3
#define DWCONV_OWN 2
#define DWCONV_WARPS 8
#define DWCONV_MIN_BLOCKS 2
#define DWCONV_STAGES 4
#define DWCONV_G_BYTES 8
#define DWCONV_X_BYTES 8
#define DWCONV_CACHED 1
#define DWCONV_WIDTH 0
#define DWCONV_OUT_WIDTH 0
#define DWCONV_REPAIR 1
#define DWCONV_VOLUME 0
#endif

struct Config : ProblemConfig {
    static constexpr bool kTurned = DWCONV_TURNED;
    static constexpr int kTapsA = DWCONV_TAPS_A, kTapsB = DWCONV_TAPS_B;  // of a tile
    static constexpr int kGroups = DWCONV_GROUPS, kLines = DWCONV_LINES;  // of eight outputs, of a line; of a step
    static constexpr int kLead = DWCONV_LEAD;                             // positions before a window, for alignment
    static constexpr int kOwn = DWCONV_OWN;                               // channels of a warp
    static constexpr int kWarps = DWCONV_WARPS, kMinBlocks = DWCONV_MIN_BLOCKS, kStages = DWCONV_STAGES;
    static constexpr int kGBytes = DWCONV_G_BYTES, kXBytes = DWCONV_X_BYTES;   // of a copy
    static constexpr bool kCached = DWCONV_CACHED;                             // copies go through L1
    static constexpr int kWidth = DWCONV_WIDTH, kOutWidth = DWCONV_OUT_WIDTH;  // of images one line wide
    static constexpr bool kVolume = DWCONV_VOLUME;                             // x has a depth
    static constexpr bool kRepair = DWCONV_REPAIR;  // sums that aren't finite are computed again; off: for tests
};

using Tiling = dwconv::LinesTiling;

extern "C" __global__ void __launch_bounds__(32 * Config::kWarps, Config::kMinBlocks)
    dwconv_kernel(const dwconv::FilterGradients<Config::Element> tensors, const dwconv::Sizes sizes,
                  const Tiling tiling) {
    dwconv::taps_matrix_nchw<Config>(tensors, sizes, tiling);
}
