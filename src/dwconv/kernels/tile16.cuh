// tile16.cuh: depthwise convolution, channels first: square output tiles in a three-dimensional grid
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]     float32 sum
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   One block makes 16x16 outputs of one (image, channel) pair, a thread each.
//   grid = (column tiles, row tiles, planes), y and z folded to at most 65535: blocks step on by the grid's size
//   least DRAM traffic: x + w + y, once each; every input is read KH*KW times from L1
#pragma once
#include "common.cuh"

namespace dwconv {

struct Tile16Tiling {
    unsigned row_tiles;  // of one plane
};

template <class C>
__device__ __forceinline__ void tile16(const typename C::Element* x, const typename C::Element* w,
                                       const typename C::Element* b, typename C::Element* y, const Sizes& sizes,
                                       const Tile16Tiling& tiling) {
    using Sum = typename Accumulator<typename C::Element>::Type;
    static_assert(C::kThreads == 256, "kThreads must be 256: a block is a tile of 16x16 outputs");
    const long long j = static_cast<long long>(blockIdx.x) * 16 + threadIdx.x;
    if (j >= sizes.out_w) return;
    for (long long plane = blockIdx.z; plane < sizes.planes; plane += gridDim.z) {
        const long long channel = plane % sizes.out_channels;
        const long long image = plane / sizes.out_channels;
        const typename C::Element* input = x + image * sizes.x_image + channel / C::kMultiplier * sizes.x_channel;
        const typename C::Element* filter = w + channel * (C::kFilterH * C::kFilterW);
        const Sum bias = C::kHasBias ? static_cast<Sum>(b[channel]) : Sum(0);
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
                    sum += static_cast<Sum>(filter[u * C::kFilterW + v]) *
                           static_cast<Sum>(input[row * sizes.x_row + column]);
                }
            }
            y[(plane * sizes.out_h + i) * sizes.out_w + j] = static_cast<typename C::Element>(sum);
        }
    }
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#ifndef DWCONV_CONSTANTS  // defaults that keep this file valid in an editor: 3x3 float32
#define DWCONV_ELEMENT float
#define DWCONV_FILTER_H 3
#define DWCONV_FILTER_W 3
#define DWCONV_STRIDE_H 1
#define DWCONV_STRIDE_W 1
#define DWCONV_PAD_TOP 1
#define DWCONV_PAD_LEFT 1
#define DWCONV_DILATION_H 1
#define DWCONV_DILATION_W 1
#define DWCONV_MULTIPLIER 1
#define DWCONV_HAS_BIAS 0
#define DWCONV_THREADS 256
#endif

struct Config {
    using Element = DWCONV_ELEMENT;
    static constexpr int kFilterH = DWCONV_FILTER_H, kFilterW = DWCONV_FILTER_W;
    static constexpr int kStrideH = DWCONV_STRIDE_H, kStrideW = DWCONV_STRIDE_W;
    static constexpr int kPadTop = DWCONV_PAD_TOP, kPadLeft = DWCONV_PAD_LEFT;
    static constexpr int kDilationH = DWCONV_DILATION_H, kDilationW = DWCONV_DILATION_W;
    static constexpr int kMultiplier = DWCONV_MULTIPLIER;
    static constexpr bool kHasBias = DWCONV_HAS_BIAS;
    static constexpr int kThreads = DWCONV_THREADS;
};

using Tiling = dwconv::Tile16Tiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads)
    dwconv_kernel(const Config::Element* x, const Config::Element* w, const Config::Element* b, Config::Element* y,
                  const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::tile16<Config>(x, w, b, y, sizes, tiling);
}
