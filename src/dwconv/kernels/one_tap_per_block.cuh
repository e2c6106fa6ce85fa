// one_tap_per_block.cuh: the gradients of filters and bias of every depthwise convolution, as the formula says it
//   dw[c*M + j, u] = sum over images n and outputs p of g[n, c*M + j, p] * x[n, c, p*S - P + u*D]
//   x [N,C,in]   g [N,C*M,out]   dw [C*M,KD,KH,KW]   db [C*M] or null     offsets in elements, 64-bit
//   A block makes one sum: its threads take every kThreads-th product, and add up by a tree.
//   grid.x = C*M * (taps + 1 where db is wanted)
//   least DRAM traffic: x + g, once each; here they are read once a tap, from L2 where they fit
#pragma once
#include "filter_gradients.cuh"

namespace dwconv {

struct OneTapPerBlockTiling {
    unsigned images;
};

template <class C>
__device__ __forceinline__ void one_tap_per_block(const FilterGradients<typename C::Element>& tensors,
                                                  const Sizes& sizes, const OneTapPerBlockTiling& tiling) {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    constexpr int kTaps = C::kFilterD * C::kFilterH * C::kFilterW, kSums = kTaps + (C::kHasBias ? 1 : 0);
    const long long channel = blockIdx.x / kSums;
    const int tap = static_cast<int>(blockIdx.x - channel * kSums);
    const bool is_bias = tap == kTaps;
    const int t = tap / (C::kFilterH * C::kFilterW), u = tap / C::kFilterW % C::kFilterH, v = tap % C::kFilterW;

    // Of g, dense in its layout.
    const long long column_step = C::kChannelsLast ? sizes.out_channels : 1;
    const long long outputs = sizes.out_d * sizes.out_h * sizes.out_w;
    const long long channel_step = C::kChannelsLast ? 1 : outputs;
    const T* const x = tensors.x + channel / C::kMultiplier * sizes.x_channel;
    const T* const g = tensors.g + channel * channel_step;
    Sum sum = 0;
    for (long long index = threadIdx.x; index < tiling.images * outputs; index += C::kThreads) {
        const long long image = index / outputs, of_image = index - image * outputs;
        const long long row_of_all = of_image / sizes.out_w, column = of_image - row_of_all * sizes.out_w;
        const long long plane = row_of_all / sizes.out_h, row = row_of_all - plane * sizes.out_h;
        const Sum factor =
            static_cast<Sum>(load_one(g + image * outputs * sizes.out_channels + of_image * column_step));
        if (is_bias) {
            sum += factor;
            continue;
        }
        const long long d = plane * C::kStrideD - C::kPadFront + static_cast<long long>(t) * C::kDilationD;
        const long long i = row * C::kStrideH - C::kPadTop + static_cast<long long>(u) * C::kDilationH;
        const long long j = column * C::kStrideW - C::kPadLeft + static_cast<long long>(v) * C::kDilationW;
        if (d < 0 || d >= sizes.in_d || i < 0 || i >= sizes.in_h || j < 0 || j >= sizes.in_w) continue;
        sum += factor * static_cast<Sum>(load_one(x + image * sizes.x_image + d * sizes.x_depth + i * sizes.x_row +
                                                  j * sizes.x_column));
    }
    Sum* const sums = shared_memory<Sum>();
    sums[threadIdx.x] = sum;
#pragma unroll
    for (int half = C::kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x != 0) return;
    if (is_bias)
        tensors.db[channel] = static_cast<T>(sums[0]);
    else
        tensors.dw[channel * kTaps + tap] = static_cast<T>(sums[0]);
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

using Tiling = dwconv::OneTapPerBlockTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads) dwconv_kernel(
    const dwconv::FilterGradients<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::one_tap_per_block<Config>(tensors, sizes, tiling);
}
