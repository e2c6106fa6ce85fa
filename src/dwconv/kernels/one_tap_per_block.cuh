// one_tap_per_block.cuh: the gradients of filters and bias of every depthwise convolution, as the formula says it
//   dw[c*M + j, u] = sum over images n and outputs p of g[n, c*M + j, p] * x[n, c, p*S - P + u*D]
//   x [N,C,in]   g [N,C*M,out]   dw [C*M,KD,KH,KW]   db [C*M] or null     offsets in elements, 64-bit
//   A block makes one sum: its warps take rows of outputs in turn, lanes columns, and all add up by a tree.
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
    Sum sum = 0;       // of up to kNear rows
    double total = 0;  // of all before: long sums of float32 would round more than PyTorch's
    // A warp takes every kWarps-th row of outputs, its lanes every 32nd column.
    constexpr int kWarps = C::kThreads / 32;
    constexpr int kNear = 16;
    int rows = 0;
    long long image = 0, plane = 0, row = threadIdx.x / 32;
    for (;; row += kWarps) {
#pragma unroll 1
        for (; row >= sizes.out_h; row -= sizes.out_h)
            if (++plane == sizes.out_d) {
                plane = 0;
                ++image;
            }
        if (image >= tiling.images) break;
        if (++rows % kNear == 0) {
            total += sum;
            sum = 0;
        }
        const long long d = plane * C::kStrideD - C::kPadFront + static_cast<long long>(t) * C::kDilationD;
        const long long i = row * C::kStrideH - C::kPadTop + static_cast<long long>(u) * C::kDilationH;
        const bool meets = d >= 0 && d < sizes.in_d && i >= 0 && i < sizes.in_h;
        if (!is_bias && !meets) continue;
        const T* const g_line =
            g + image * outputs * sizes.out_channels + (plane * sizes.out_h + row) * sizes.out_w * column_step;
        const T* const x_line = x + image * sizes.x_image + d * sizes.x_depth + i * sizes.x_row;
#pragma unroll 1
        for (long long column = threadIdx.x % 32; column < sizes.out_w; column += 32) {
            const Sum factor = static_cast<Sum>(load_one(g_line + column * column_step));
            const long long j = column * C::kStrideW - C::kPadLeft + static_cast<long long>(v) * C::kDilationW;
            if (is_bias)
                sum += factor;
            else if (j >= 0 && j < sizes.in_w)
                sum += factor * static_cast<Sum>(load_one(x_line + j * sizes.x_column));
        }
    }
    double* const sums = shared_memory<double>();
    sums[threadIdx.x] = total + sum;
#pragma unroll
    for (int half = C::kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x != 0) return;
    if (is_bias)
        tensors.db[channel] = static_cast<T>(static_cast<Sum>(sums[0]));
    else
        tensors.dw[channel * kTaps + tap] = static_cast<T>(static_cast<Sum>(sums[0]));
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

extern "C" __global__ void __launch_bounds__(Config::kThreads, 4)
    dwconv_kernel(const dwconv::FilterGradients<Config::Element> tensors, const dwconv::Sizes sizes,
                  const Tiling tiling) {
    dwconv::one_tap_per_block<Config>(tensors, sizes, tiling);
}
