// one_input_per_thread.cuh: the gradient of x of every depthwise convolution, as the formula says it
//   dx[n,c,q] = sum over j and taps u with p = (q + P - u*D) / S an integer of w[c*M + j, u] * g[n, c*M + j, p]
//   g [N,C*M,in]   w [C*M,KD,KH,KW]   dx [N,C,out]     g stands for x in Tensors and Sizes, dx for y; offsets 64-bit
//   One thread makes one element: its number in dx is the thread's number in the grid.
//   grid.x = ceil(elements / kThreads)
//   least DRAM traffic: g + w + dx, once each; every element of g is read once a tap from L1
#pragma once
#include "common.cuh"

namespace dwconv {

struct OneInputPerThreadTiling {
    unsigned blocks;  // of the grid; threads step by the grid's size where there are more elements than threads
};

// The element of g along one dimension that this tap multiplies for element `at` of dx; negative: there is none.
template <int Stride, int Pad, int Dilation>
__device__ __forceinline__ long long multiplied(long long at, int tap, long long size) {
    const long long distance = at + Pad - static_cast<long long>(tap) * Dilation;
    return distance < 0 || distance % Stride != 0 || distance / Stride >= size ? -1 : distance / Stride;
}

template <class C>
__device__ __forceinline__ void one_input_per_thread(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                                     const OneInputPerThreadTiling& tiling) {
    using Sum = typename Accumulator<typename C::Element>::Type;
    const long long elements = sizes.planes * sizes.out_d * sizes.out_h * sizes.out_w;
    const long long step = static_cast<long long>(tiling.blocks) * C::kThreads;
    for (long long index = static_cast<long long>(blockIdx.x) * C::kThreads + threadIdx.x; index < elements;
         index += step) {
        long long rest = index, channel = 0;
        const auto next = [&rest](long long size) {
            const long long digit = rest % size;
            rest /= size;
            return digit;
        };
        if (C::kChannelsLast) channel = next(sizes.out_channels);
        const long long j = next(sizes.out_w), i = next(sizes.out_h), h = next(sizes.out_d);
        if (!C::kChannelsLast) channel = next(sizes.out_channels);

        Sum sum = 0;
        for (int m = 0; m < C::kMultiplier; ++m) {
            const long long of = channel * C::kMultiplier + m;
            const typename C::Element* g = tensors.x + rest * sizes.x_image + of * sizes.x_channel;
            const typename C::Element* filter = tensors.w + of * (C::kFilterD * C::kFilterH * C::kFilterW);
            for (int t = 0; t < C::kFilterD; ++t) {
                const long long plane = multiplied<C::kStrideD, C::kPadFront, C::kDilationD>(h, t, sizes.in_d);
                if (plane < 0) continue;
                for (int u = 0; u < C::kFilterH; ++u) {
                    const long long row = multiplied<C::kStrideH, C::kPadTop, C::kDilationH>(i, u, sizes.in_h);
                    if (row < 0) continue;
                    for (int v = 0; v < C::kFilterW; ++v) {
                        const long long column = multiplied<C::kStrideW, C::kPadLeft, C::kDilationW>(j, v, sizes.in_w);
                        if (column < 0) continue;
                        const long long at = plane * sizes.x_depth + row * sizes.x_row + column * sizes.x_column;
                        sum +=
                            static_cast<Sum>(filter[(t * C::kFilterH + u) * C::kFilterW + v]) * static_cast<Sum>(g[at]);
                    }
                }
            }
        }
        tensors.y[index] = static_cast<typename C::Element>(sum);
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

using Tiling = dwconv::OneInputPerThreadTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::one_input_per_thread<Config>(tensors, sizes, tiling);
}
