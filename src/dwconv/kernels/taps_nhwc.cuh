// taps_nhwc.cuh: gradients of filters and bias, channels last: rows of x and g stream through shared memory
//   dw[c,t,u,v] = sum over images n and outputs (d, i, j) of
//                 g[n, d, i, j, c] * x[n, d*SD - PF + t*DD, i*SH - PT + u*DH, j*SW - PL + v*DW, c/M]
//   db[c]       = sum over images n and outputs (d, i, j) of g[n, d, i, j, c]                    float32 sums
//   x [N,D,H,W,C]   g [N,OD,OH,OW,C*M]   dw [C*M,KD,KH,KW]   db [C*M] or null     offsets in elements, 64-bit
//   A lane owns kVector neighbouring channels, and sums of kTapsD x kTapsA x kTapsB taps of each. kLanes lanes are a
//   tile, which marches down kColumns neighbouring columns of outputs: the rows of g that are met again stay in
//   registers, each row of x is read once. A warp has its own stages of rows in shared memory, kStages - 1 of them in
//   flight: warps don't wait for each other. Then the block adds up its tiles, and the last block the blocks, in one
//   order; of many blocks, the last one of each few neighbours adds up those before.
//   grid: see taps_lines.cuh, of groups of kChunks chunks of channels
//   shared memory: stages [kWarps][kStages] (W::kStage); then sums [kSlab][threads]; behind both, gates of boxes
//   least DRAM traffic: x + g, once each; halos between tiles come from L1 or L2, and all for more tiles of taps
#pragma once
#include "taps_nhwc_boxes.cuh"
#include "taps_nhwc_copies.cuh"
#include "taps_nhwc_sums.cuh"

namespace dwconv {

// Calls sums.step<phase>(arguments...): the phase says which registers a step's row of g goes to. (One step behind the
// other, as take_all_steps has them, was slower here: ptxas took lanes of a warp for being apart.)
template <int Phases, int Phase = 0, class Sums, class... Arguments>
__device__ __forceinline__ void step_in_phase(int phase, Sums& sums, const Arguments&... arguments) {
    if constexpr (Phase + 1 < Phases) {
        if (phase != Phase) {
            step_in_phase<Phases, Phase + 1>(phase, sums, arguments...);
            return;
        }
    }
    sums.template step<Phase>(arguments...);
}

// maps: of kBoxes, else nothing.
template <class C, class... Maps>
__device__ __forceinline__ void taps_nhwc(const FilterGradients<typename C::Element>& tensors, const Sizes& sizes,
                                          const LinesTiling& tiling, const Maps&... maps) {
    using W = TapsNhwc<C>;
    using Element = typename C::Element;
    constexpr unsigned kStageBytes = W::kStage * sizeof(Element);
    const TapsPlace<C> place(sizes, tiling);
    const bool has_channels =
        (static_cast<long long>(place.group) * C::kChunks + place.chunk) * W::kChannels < sizes.out_channels;
    unsigned position = has_channels ? place.first : place.end;

    Element* const stages = shared_memory<Element>() + threadIdx.x / 32 * (C::kStages * W::kStage);
    auto copies = [&] {
        if constexpr (C::kBoxes)
            return TapsBoxes<C>(maps..., sizes, place, tiling, stages,
                                shared_memory<unsigned char>() + W::kGatesAt + threadIdx.x / 32 * (8 * C::kStages),
                                position);
        else
            return TapsCopies<C>(tensors, sizes, place, tiling, stages, position);
    }();
#pragma unroll 1
    for (int k = 0; k < C::kStages - 1; ++k) copies.copy(k * kStageBytes, tensors, sizes);

    // What the lane reads: bytes from the start of shared memory to its channels in g, and in x.
    const unsigned channels = place.tile % W::kTiles * W::kChannels + threadIdx.x % 32 % C::kLanes * C::kVector;
    const unsigned warp_stages = threadIdx.x / 32 * (C::kStages * kStageBytes);
    unsigned g_own = warp_stages + channels * static_cast<unsigned>(sizeof(Element));
    keep(g_own);
    unsigned x_own = g_own;
    if constexpr (C::kMultiplier > 1) {
        x_own = warp_stages + channels / C::kMultiplier * static_cast<unsigned>(sizeof(Element));
        keep(x_own);
    }
    x_own += W::kGElements * static_cast<unsigned>(sizeof(Element));
    TapsSums<C> taps;
    LinesSegment<W> segment;
    unsigned stage = 0, next_stage = (C::kStages - 1) * kStageBytes;  // in bytes
#pragma unroll 1
    while (segment.find(position, place, sizes, tiling, place.warp_tile)) {
        taps.begin();
        int phase = 0;
#pragma unroll 1
        for (int step = segment.first; step < segment.last; step += C::kStageSteps) {
            copies.wait_until_full();
            copies.copy(next_stage, tensors, sizes);
            const unsigned char* const shared = shared_memory<unsigned char>() + stage;
            const auto* g_at = reinterpret_cast<const Element*>(shared + g_own);
            const auto* x_at = reinterpret_cast<const Element*>(shared + x_own);
            if constexpr (W::kFlat) {
                taps.steps(g_at, x_at);
            } else {
                const int end = C::kStageSteps == 1 ? step + 1 : smaller(step + C::kStageSteps, segment.last);
#pragma unroll 1
                for (int number = step; number < end; ++number) {
                    step_in_phase<W::kLive>(phase, taps, g_at, x_at, number, segment, place);
                    phase = phase + 1 == W::kLive ? 0 : phase + 1;
                    g_at += C::kColumns * W::kPitch;
                    x_at += W::kRows * W::kKept * W::kXPitch;
                }
            }
            next_stage = stage;
            stage = stage + kStageBytes == C::kStages * kStageBytes ? 0 : stage + kStageBytes;
        }
    }
    copies.wait_for_all();

    finish_lines<W>(tensors, sizes, tiling, place, taps);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#undef DWCONV_CHANNELS_LAST
#define DWCONV_CHANNELS_LAST 1
#define DWCONV_TURNED 0
#define DWCONV_TAPS_D 1
#define DWCONV_TAPS_A 3
#define DWCONV_TAPS_B 3
#define DWCONV_COLUMNS 7
#define DWCONV_LANES 32
#define DWCONV_VECTOR 1
#define DWCONV_WARPS 8
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_CHUNKS 1
#define DWCONV_STAGES 4
#define DWCONV_STAGE_STEPS 1
#define DWCONV_G_BYTES 16
#define DWCONV_X_BYTES 16
#define DWCONV_CACHED 1
#define DWCONV_BOXES 0
#define DWCONV_EVICT_FIRST 0
#define DWCONV_WIDTH 0
#define DWCONV_SLAB 9
#define DWCONV_REPAIR 1
#define DWCONV_VOLUME 0
#endif

struct Config : ProblemConfig {
    static constexpr bool kTurned = DWCONV_TURNED;
    static constexpr int kTapsD = DWCONV_TAPS_D, kTapsA = DWCONV_TAPS_A, kTapsB = DWCONV_TAPS_B;
    static constexpr int kColumns = DWCONV_COLUMNS;
    static constexpr int kLanes = DWCONV_LANES, kVector = DWCONV_VECTOR;
    static constexpr int kWarps = DWCONV_WARPS, kMinBlocks = DWCONV_MIN_BLOCKS, kChunks = DWCONV_CHUNKS;
    static constexpr int kStages = DWCONV_STAGES, kStageSteps = DWCONV_STAGE_STEPS;
    static constexpr int kGBytes = DWCONV_G_BYTES, kXBytes = DWCONV_X_BYTES;
    static constexpr bool kCached = DWCONV_CACHED;
    static constexpr bool kBoxes = DWCONV_BOXES;             // rows come by one copy each, of maps
    static constexpr bool kEvictFirst = DWCONV_EVICT_FIRST;  // such rows leave L2 before all else
    static constexpr int kWidth = DWCONV_WIDTH, kSlab = DWCONV_SLAB;
    static constexpr bool kVolume = DWCONV_VOLUME;  // x has a depth
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
    dwconv::taps_nhwc<Config>(tensors, sizes, tiling DWCONV_GIVEN_MAPS);
}
