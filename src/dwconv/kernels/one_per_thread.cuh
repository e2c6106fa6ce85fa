// one_per_thread.cuh: depthwise convolution of every dtype, layout and dimension: the first version that people write
//   y[n,c,h,i,j] = b[c] + sum_{t,u,v} w[c,t,u,v] * x[n, c/M, h*SD - PF + t*DD, i*SH - PT + u*DH, j*SW - PL + v*DW]
//   x [N,C,D,H,W]   w [C*M,KD,KH,KW]   b [C*M] or null   y [N,C*M,OD,OH,OW]     offsets in elements, 64-bit
//   One thread makes one output: its number in y is the thread's number in the grid. grid.x = ceil(outputs / kThreads)
//   least DRAM traffic: x + w + y, once each; every input is read once a tap from L1
#pragma once
#include "epilogue.cuh"

namespace dwconv {

struct OnePerThreadTiling {
    unsigned blocks;  // of the grid; threads step by the grid's size where there are more outputs than threads
};

template <class C>
__device__ __forceinline__ void one_per_thread(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                               const OnePerThreadTiling& tiling) {
    using Sum = typename Accumulator<typename C::Element>::Type;
    const long long outputs = sizes.planes * sizes.out_d * sizes.out_h * sizes.out_w;
    const long long step = static_cast<long long>(tiling.blocks) * C::kThreads;
    for (long long index = static_cast<long long>(blockIdx.x) * C::kThreads + threadIdx.x; index < outputs;
         index += step) {
        // The place of the output: columns are neighbours in channels-first memory, channels in channels-last memory.
        long long rest = index, channel = 0;
        const auto next = [&rest](long long size) {
            const long long digit = rest % size;
            rest /= size;
            return digit;
        };
        if (C::kChannelsLast) channel = next(sizes.out_channels);
        const long long j = next(sizes.out_w), i = next(sizes.out_h), h = next(sizes.out_d);
        if (!C::kChannelsLast) channel = next(sizes.out_channels);
        const long long image = rest;

        const typename C::Element* input =
            tensors.x + image * sizes.x_image + channel / C::kMultiplier * sizes.x_channel;
        const typename C::Element* filter = tensors.w + channel * (C::kFilterD * C::kFilterH * C::kFilterW);
        Sum sum = C::kHasBias ? static_cast<Sum>(tensors.b[channel]) : Sum(0);
        for (int t = 0; t < C::kFilterD; ++t) {
            const long long plane = h * C::kStrideD - C::kPadFront + static_cast<long long>(t) * C::kDilationD;
            if (plane < 0 || plane >= sizes.in_d) continue;
            for (int u = 0; u < C::kFilterH; ++u) {
                const long long row = i * C::kStrideH - C::kPadTop + static_cast<long long>(u) * C::kDilationH;
                if (row < 0 || row >= sizes.in_h) continue;
                for (int v = 0; v < C::kFilterW; ++v) {
                    const long long column = j * C::kStrideW - C::kPadLeft + static_cast<long long>(v) * C::kDilationW;
                    if (column < 0 || column >= sizes.in_w) continue;
                    const long long at = plane * sizes.x_depth + row * sizes.x_row + column * sizes.x_column;
                    sum += static_cast<Sum>(filter[tap_at<C>((t * C::kFilterH + u) * C::kFilterW + v)]) *
                           static_cast<Sum>(input[at]);
                }
            }
        }
        const auto values = channel_values<C>(tensors, channel);
        store_outputs<C, 1, 0>(tensors, index, &sum, &values);
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

using Tiling = dwconv::OnePerThreadTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::one_per_thread<Config>(tensors, sizes, tiling);
}
