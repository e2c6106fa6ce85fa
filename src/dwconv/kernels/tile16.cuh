// tile16.cuh: depthwise convolution, channels first: square output tiles in a three-dimensional grid
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]     float32 sum
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   One block makes 16x16 outputs of one (image, channel) pair, a thread each.
//   grid = (column tiles, row tiles, planes), y and z folded to at most 65535: blocks step on by the grid's size
//   least DRAM traffic: x + w + y, once each; every input is read KH*KW times from L1
#pragma once
#include "epilogue.cuh"

namespace dwconv {

struct Tile16Tiling {
    unsigned row_tiles;  // of one plane
};

template <class C>
__device__ __forceinline__ void tile16(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                       const Tile16Tiling& tiling) {
    using Sum = typename Accumulator<typename C::Element>::Type;
    static_assert(C::kThreads == 256, "kThreads must be 256: a block is a tile of 16x16 outputs");
    const long long j = static_cast<long long>(blockIdx.x) * 16 + threadIdx.x;
    if (j >= sizes.out_w) return;
    for (long long plane = blockIdx.z; plane < sizes.planes; plane += gridDim.z) {
        const long long channel = plane % sizes.out_channels;
        const long long image = plane / sizes.out_channels;
        const typename C::Element* input =
            tensors.x + image * sizes.x_image + channel / C::kMultiplier * sizes.x_channel;
        const typename C::Element* filter = tensors.w + channel * (C::kFilterH * C::kFilterW);
        const Sum bias = C::kHasBias ? static_cast<Sum>(tensors.b[channel]) : Sum(0);
        const auto values = channel_values<C>(tensors, channel);
        for (long long tile = blockIdx.y; tile < tiling.row_tiles; tile += gridDim.y) {
            const long long i = tile * 16 + threadIdx.y;
            if (i >= sizes.out_h) break;
            Sum sum = bias;
            for (int u = 0; u < C::kFilterH; ++u) {
                const long long row = i * C::kStrideH - C::kPadTop + u * C::kDilationH;
                if (row < 0 || row >= sizes.in_h) continue;
                for (int v = 0; v < C::kFilterW; ++v) {
                    const long long column = j * C::kStrideW - C::kPadLeft + v * C::kDilationW;
                    if (column < 0 || column >= sizes.in_w) continue;
                    sum += static_cast<Sum>(filter[tap_at<C>(u * C::kFilterW + v)]) *
                           static_cast<Sum>(input[row * sizes.x_row + column]);
                }
            }
            store_outputs<C, 1, 0>(tensors, (plane * sizes.out_h + i) * sizes.out_w + j, &sum, &values);
        }
    }
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 256
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS;
};

using Tiling = dwconv::Tile16Tiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::tile16<Config>(tensors, sizes, tiling);
}
