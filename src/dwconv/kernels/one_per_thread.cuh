// one_per_thread.cuh: depthwise convolution, channels first: the first version that people write
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]     float32 sum
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   One thread makes one output: its number in y is the thread's number in the grid. grid.x = ceil(outputs / kThreads)
//   least DRAM traffic: x + w + y, once each; every input is read KH*KW times from L1
#pragma once
#include "common.cuh"

namespace dwconv {

struct OnePerThreadTiling {
    unsigned blocks;  // of the grid; threads step by the grid's size where there are more outputs than threads
};

template <class C>
__device__ __forceinline__ void one_per_thread(const typename C::Element* x, const typename C::Element* w,
                                               const typename C::Element* b, typename C::Element* y, const Sizes& sizes,
                                               const OnePerThreadTiling& tiling) {
    using Sum = typename Accumulator<typename C::Element>::Type;
    const long long outputs = sizes.planes * sizes.out_h * sizes.out_w;
    const long long step = static_cast<long long>(tiling.blocks) * C::kThreads;
    for (long long index = static_cast<long long>(blockIdx.x) * C::kThreads + threadIdx.x; index < outputs;
         index += step) {
        const long long j = index % sizes.out_w;
        const long long i = index / sizes.out_w % sizes.out_h;
        const long long plane = index / sizes.out_w / sizes.out_h;
        const long long channel = plane % sizes.out_channels;
        const long long image = plane / sizes.out_channels;
        const typename C::Element* input = x + image * sizes.x_image + channel / C::kMultiplier * sizes.x_channel;
        const typename C::Element* filter = w + channel * (C::kFilterH * C::kFilterW);
        Sum sum = C::kHasBias ? static_cast<Sum>(b[channel]) : Sum(0);
        for (int u = 0; u < C::kFilterH; ++u) {
            const long long row = i * C::kStrideH - C::kPadTop + u * C::kDilationH;
            if (row < 0 || row >= sizes.in_h) continue;
            for (int v = 0; v < C::kFilterW; ++v) {
                const long long column = j * C::kStrideW - C::kPadLeft + v * C::kDilationW;
                if (column < 0 || column >= sizes.in_w) continue;
                sum +=
                    static_cast<Sum>(filter[u * C::kFilterW + v]) * static_cast<Sum>(input[row * sizes.x_row + column]);
            }
        }
        y[index] = static_cast<typename C::Element>(sum);
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

using Tiling = dwconv::OnePerThreadTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads)
    dwconv_kernel(const Config::Element* x, const Config::Element* w, const Config::Element* b, Config::Element* y,
                  const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::one_per_thread<Config>(x, w, b, y, sizes, tiling);
}
