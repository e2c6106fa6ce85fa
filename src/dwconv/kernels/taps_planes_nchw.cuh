// taps_planes_nchw.cuh: gradients of filters and bias of 16-bit elements, channels first, of small planes, on tensor
// cores (sm_80 and newer)
//   dw[c,u,v] = sum over images n and outputs (i, j) of g[n,c,i,j] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]
//   db[c]     = sum over images n and outputs (i, j) of g[n,c,i,j]                                      float32 sums
//   x [N,C,H,W], images dense  g [N,C*M,OH,OW]   dw [C*M,KH,KW]   db [C*M] or null       64-bit offsets in elements
//   H, W, OH and OW are compiled in. A warp has kOwn channels and stages of its own, each whole planes of kImages
//   images: copies don't know of rows. A row of x, a row of g and sixteen images make a product of matrices, of columns
//   by columns; dw are the diagonals (taps_planes_nchw_sums.cuh). Padding is neither stored nor multiplied.
//   Filters of more rows than registers can hold are cut into tiles of taps, each with code and blocks of its own.
//   Then the last block of a group of channels adds up what its blocks have found, in one order; of many blocks, the
//   last one of each few neighbours adds up those before.
//   grid.x = tiles of taps * groups of channels * parts of the images, in this order
//   shared memory: stages [kWarps][kStages] (W::kStageBytes), then gates (kBulk); at the end, sums in the stages' place
//   least DRAM traffic: x + g, once each; all for more tiles of taps, and pieces that two warps share, come from L2
#pragma once
#include "taps_planes_nchw_sums.cuh"

namespace dwconv {

template <class C, int Tile>
__device__ __forceinline__ void taps_planes_nchw(const FilterGradients<typename C::Element>& tensors,
                                                 const Sizes& sizes, const LinesTiling& tiling) {
    using W = TapsPlanes<C, Tile>;
    const LinesPlace<W> place(sizes, tiling);
    if constexpr (Tile + 1 < W::kTapTilesA) {
        if (place.tap_tile != Tile) {
            taps_planes_nchw<C, Tile + 1>(tensors, sizes, tiling);
            return;
        }
    }
    using Element = typename C::Element;
    unsigned image = tiling.rows.quotient(place.first) * C::kImages;  // the next one to copy
    const unsigned end = tiling.rows.quotient(place.end) * C::kImages;
    const unsigned warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // tells compilers that it is uniform
    const long long channel = static_cast<long long>(place.group) * W::kBlockChannels + warp * C::kOwn;

    constexpr unsigned kStagesBytes = C::kStages * W::kStageBytes;
    const unsigned begin = warp * kStagesBytes, last = begin + kStagesBytes - W::kStageBytes;
    auto copies = [&] {
        if constexpr (C::kBulk)
            return PlaneStretches<W>(tensors, sizes, place, channel, image);
        else
            return PlanePieces<W>(tensors, sizes, place, channel, image);
    }();
    const auto copy = [&](unsigned stage) {
        copies.copy(stage, static_cast<int>(min(tiling.images, end)) - static_cast<int>(image), sizes, place);
        image += C::kImages;
    };

    TapsPlanesSums<C, Tile> taps(copies.x.before, copies.g.before);
    if (channel < sizes.out_channels) {
        const unsigned first = image;
#pragma unroll 1
        for (int k = 0; k < C::kStages - 1; ++k) copy(begin + k * W::kStageBytes);
        unsigned stage = begin, filled = last;
#pragma unroll 1
        for (unsigned at = first; at < end; at += C::kImages) {
            copies.wait_until_full();
            copy(filled);
            taps.add(stage);
            filled = stage;
            stage = stage == last ? begin : stage + W::kStageBytes;
        }
    }
    copies.wait_for_all();
    __syncthreads();
    finish_lines<W>(tensors, sizes, tiling, place, taps);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#undef DWCONV_ELEMENT
#define DWCONV_ELEMENT dwconv::Half
#define DWCONV_HEIGHT 7
#define DWCONV_WIDTH 7
#define DWCONV_OUT_HEIGHT 7
#define DWCONV_OUT_WIDTH 7
#define DWCONV_TAPS_A 3
#define DWCONV_IMAGES 16
#define DWCONV_OWN 4
#define DWCONV_WARPS 8
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_STAGES 2
#define DWCONV_SLAB 3
#define DWCONV_BULK 0
#define DWCONV_EVICT_FIRST 0
#define DWCONV_REPAIR 1
#endif

struct Config : ProblemConfig {
    static constexpr int kHeight = DWCONV_HEIGHT, kWidth = DWCONV_WIDTH;  // of planes of x, and of g
    static constexpr int kOutHeight = DWCONV_OUT_HEIGHT, kOutWidth = DWCONV_OUT_WIDTH;
    static constexpr int kImages = DWCONV_IMAGES;  // of a stage
    static constexpr int kOwn = DWCONV_OWN;        // channels of a warp
    static constexpr int kWarps = DWCONV_WARPS, kMinBlocks = DWCONV_MIN_BLOCKS, kStages = DWCONV_STAGES;
    static constexpr int kSlab = DWCONV_SLAB;  // rows of taps of a warp's channels that are in shared memory at the end
    static constexpr bool kBulk = DWCONV_BULK;               // a lane sends whole stretches; else all lanes copy pieces
    static constexpr bool kEvictFirst = DWCONV_EVICT_FIRST;  // what kBulk sends leaves L2 before all else
    static constexpr bool kRepair = DWCONV_REPAIR;  // sums that aren't finite are computed again; off: for tests
    static constexpr int kTapsA = DWCONV_TAPS_A, kTapsB = kFilterW;  // of a tile
    // What taps_lines.cuh asks for: the march goes down the rows, planes are those of images.
    static constexpr bool kTurned = false, kVolume = false;
};

using Tiling = dwconv::LinesTiling;

extern "C" __global__ void __launch_bounds__(32 * Config::kWarps, Config::kMinBlocks)
    dwconv_kernel(const dwconv::FilterGradients<Config::Element> tensors, const dwconv::Sizes sizes,
                  const Tiling tiling) {
    dwconv::taps_planes_nchw<Config, 0>(tensors, sizes, tiling);
}
