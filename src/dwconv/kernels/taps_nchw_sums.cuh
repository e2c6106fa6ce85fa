// taps_nchw_sums.cuh: how the sums of many threads and blocks become one, in an order that is the same on every run;
// and sums anew, term by term, where one is not finite
#pragma once
#include "clusters.cuh"
#include "taps_nchw_stages.cuh"

namespace dwconv {

constexpr int kTermsAtOnce = 8;  // that one thread adds; their sums are added by the next

// Terms that stand in shared memory: so many lanes side by side, then as many of another image.
template <class Sum>
struct SumsOfLanes {
    const Sum* at;
    int lane, lanes, gap;

    __device__ __forceinline__ Sum next() {
        const Sum value = *at++;
        if (++lane == lanes) {
            lane = 0;
            at += gap;
        }
        return value;
    }
};

// Terms that stand in memory, one step apart.
template <class Sum>
struct SumsOfParts {
    const Sum* at;
    int step;

    __device__ __forceinline__ Sum next() {
        const Sum value = *at;
        at += step;
        return value;
    }
};

// totals[o] = the sum of all terms of o; terms_from(o, t) gives them from number t on. All threads call it.
// scratch: outputs * ceil(terms / kTermsAtOnce) elements
template <int Threads, class Sum, class TermsFrom>
__device__ __forceinline__ void add_up(int outputs, int terms, Sum* scratch, Sum* totals, const TermsFrom& terms_from) {
    const int stretches = ceil_div(terms, kTermsAtOnce);
#pragma unroll 1
    for (int number = static_cast<int>(threadIdx.x); number < outputs * stretches; number += Threads) {
        const int stretch = number / outputs, o = number - stretch * outputs;
        const int first = stretch * kTermsAtOnce;
        auto from = terms_from(o, first);
        Sum values[kTermsAtOnce];
#pragma unroll
        for (int k = 0; k < kTermsAtOnce; ++k) values[k] = first + k < terms ? from.next() : Sum(0);
        Sum sum = values[0];
#pragma unroll
        for (int k = 1; k < kTermsAtOnce; ++k) sum += values[k];
        scratch[number] = sum;
    }
    __syncthreads();
#pragma unroll 1
    for (int o = static_cast<int>(threadIdx.x); o < outputs; o += Threads) {
        Sum sum = scratch[o];
#pragma unroll 4
        for (int stretch = 1; stretch < stretches; ++stretch) sum += scratch[stretch * outputs + o];
        totals[o] = sum;
    }
    __syncthreads();
}

// Adds the sums of all parts to `totals`, those of one block, in the first block of a cluster, or the last one to
// arrive; false in the others. All threads call it. values: shared memory behind an element that nobody uses
template <class C, class Sum>
__device__ __forceinline__ bool add_parts(const FilterGradients<typename C::Element>& tensors, unsigned parts,
                                          unsigned part, unsigned of_grid, int outputs, Sum* totals, Sum* values) {
    if (parts == 1) return true;
#ifndef DWCONV_EMULATOR
    if constexpr (C::kCluster > 1) {
        meet_in_cluster();
        if (part == 0) {
#pragma unroll 1
            for (int o = static_cast<int>(threadIdx.x); o < outputs; o += C::kThreads) {
                Sum sum = totals[o];
#pragma unroll
                for (unsigned other = 1; other < C::kCluster; ++other) sum += load_of_block(totals + o, other);
                totals[o] = sum;
            }
        }
        meet_in_cluster();  // no block leaves while its sums are read
        return part == 0;
    }
#endif
    Sum* const partial = static_cast<Sum*>(tensors.partial) + static_cast<long long>(of_grid) * parts * outputs;
#pragma unroll 1
    for (int o = static_cast<int>(threadIdx.x); o < outputs; o += C::kThreads)
        partial[static_cast<long long>(part) * outputs + o] = totals[o];
    if (!arrives_last(tensors.arrivals + of_grid, parts, reinterpret_cast<int*>(values - 1))) return false;
    add_up<C::kThreads>(outputs, static_cast<int>(parts), values, totals, [&](int output, int term) {
        return SumsOfParts<Sum>{partial + (static_cast<long long>(term) * outputs + output), outputs};
    });
    return true;
}

template <class Sum>
__device__ __forceinline__ bool is_finite(Sum value) {
    return value - value == Sum(0);
}

// One sum, exactly as the formula has it: without products of padding. All threads call it; tap kTaps is the bias.
template <class C, class Sum>
__device__ __forceinline__ Sum sum_term_by_term(const FilterGradients<typename C::Element>& tensors, const Sizes& sizes,
                                                const TapsNchwTiling& tiling, int channel, int depth_tap, int tap,
                                                Sum* scratch) {
    constexpr int kTaps = C::kFilterH * C::kFilterW;
    const long long plane = sizes.out_h * sizes.out_w;
    const typename C::Element* const x = tensors.x + channel / C::kMultiplier * sizes.x_channel;
    Sum sum = 0;
    for (long long index = threadIdx.x; index < tiling.images * plane; index += C::kThreads) {
        const long long image = index / plane, of_plane = index - image * plane;
        const long long i = of_plane / sizes.out_w, j = of_plane - i * sizes.out_w;
        const TapsNchwPlanes<C, long long> planes(sizes, tiling, image, depth_tap);
        const Sum factor = static_cast<Sum>(load_one(tensors.g + (planes.in_g(sizes, channel) * plane + of_plane)));
        if (tap == kTaps) {
            sum += factor;
            continue;
        }
        const long long row = i * C::kStrideH - C::kPadTop + tap / C::kFilterW * C::kDilationH;
        const long long column = j * C::kStrideW - C::kPadLeft + tap % C::kFilterW * C::kDilationW;
        if (planes.x_exists() && row >= 0 && row < sizes.in_h && column >= 0 && column < sizes.in_w)
            sum += factor * static_cast<Sum>(load_one(x + (planes.in_x(sizes) + row * sizes.in_w + column)));
    }
    scratch[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (int k = 0; k < C::kThreads; ++k) sum += scratch[k];
    __syncthreads();
    return sum;
}

}  // namespace dwconv
