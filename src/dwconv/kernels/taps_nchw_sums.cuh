// taps_nchw_sums.cuh: how the sums of many threads and blocks become one, in an order that is the same on every run,
// and are stored; sums anew, term by term, where one is not finite
#pragma once
#include "clusters.cuh"
#include "taps_nchw_stages.cuh"

namespace dwconv {

// What sum number `output` of a block is: a tap of the filter of one of its planes; behind the last tap, the bias.
template <class C>
struct TapsNchwTotal {
    static constexpr int kTileTaps = C::kTapRows * C::kTapColumns, kSums = kTileTaps + (C::kHasBias ? 1 : 0);
    int plane, tap;  // no tap: -1

    __device__ __forceinline__ TapsNchwTotal(const TapsNchwTiling& tiling, int output, int depth_tap) {
        const int quantity = output / kSums, k = output - quantity * kSums;
        plane = static_cast<int>(tiling.tap_tiles.quotient(quantity));
        const int tap_tile = quantity - plane * static_cast<int>(tiling.tap_tiles.divisor);
        const int tile_row = static_cast<int>(tiling.tap_tile_columns.quotient(tap_tile));
        const int tile_column = tap_tile - tile_row * static_cast<int>(tiling.tap_tile_columns.divisor);
        const int u = tile_row * C::kTapRows + k / C::kTapColumns;
        const int v = tile_column * C::kTapColumns + k % C::kTapColumns;
        if (k == kTileTaps)
            tap = tap_tile + depth_tap == 0 ? C::kFilterH * C::kFilterW : -1;
        else
            tap = u < C::kFilterH && v < C::kFilterW ? u * C::kFilterW + v : -1;
    }
    __device__ __forceinline__ bool exists(int channels) const { return plane < channels * C::kMultiplier && tap >= 0; }
};

template <class C>
__device__ __forceinline__ int sums_of_block(const TapsNchwTiling& tiling) {
    return static_cast<int>(tiling.planes.divisor * tiling.tap_tiles.divisor) * TapsNchwTotal<C>::kSums;
}

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

// Sums of the block: totals[q * kSums + k] is sum k of plane and tap tile q. All threads call it, with sums of their
// own. values: kAtOnce of each thread, and scratch behind them
template <class C, class Sum>
__device__ __forceinline__ void add_threads(const TapsNchwTiling& tiling,
                                            const Sum (&sums)[C::kTapRows][C::kTapColumns], Sum bias, Sum* totals,
                                            Sum* values) {
    constexpr int kTileTaps = TapsNchwTotal<C>::kTileTaps, kSums = TapsNchwTotal<C>::kSums;
    const int planes = static_cast<int>(tiling.planes.divisor), images = static_cast<int>(tiling.group_images);
    const int quantities = planes * static_cast<int>(tiling.tap_tiles.divisor);
    const int lanes = static_cast<int>(tiling.lanes.divisor);
    // Threads that add up different sums read different banks: the values of a sum take an odd number of words.
    constexpr int kAtOnce = C::kAtOnce, kPitch = C::kThreads + 1;
#pragma unroll
    for (int from = 0; from < kSums; from += kAtOnce) {
        const int count = smaller(kAtOnce, kSums - from);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int number = from + k;
            const int tap = smaller(number, kTileTaps - 1);
            if (number < kSums)
                values[k * kPitch + static_cast<int>(threadIdx.x)] =
                    number == tap ? sums[tap / C::kTapColumns][tap % C::kTapColumns] : bias;
        }
        __syncthreads();
        Sum* const scratch = values + kAtOnce * kPitch;
        add_up<C::kThreads>(quantities * count, images * lanes, scratch, scratch, [&](int output, int term) {
            const int q = output / count, image = static_cast<int>(tiling.lanes.quotient(term));
            const int lane = term - image * lanes;
            const int plane = static_cast<int>(tiling.tap_tiles.quotient(q));
            const int tap_tile = q - plane * static_cast<int>(tiling.tap_tiles.divisor);
            const int above = (tap_tile * images + image) * planes + plane;
            return SumsOfLanes<Sum>{values + (output - q * count) * kPitch + above * lanes + lane, lane, lanes,
                                    (planes - 1) * lanes};
        });
#pragma unroll 1
        for (int o = static_cast<int>(threadIdx.x); o < quantities * count; o += C::kThreads)
            totals[o / count * kSums + from + o % count] = scratch[o];
    }
    __syncthreads();
}

// Adds the sums of all parts to `totals`, those of one block, in the first block of a cluster, or the last one to
// arrive; false in the others. All threads call it. values: shared memory behind an element that nobody uses
template <class C, class Sum>
__device__ __forceinline__ bool add_parts(const FilterGradients<typename C::Element>& tensors,
                                          const TapsNchwTiling& tiling, unsigned part, unsigned of_grid, Sum* totals,
                                          Sum* values) {
    const unsigned parts = tiling.parts.divisor;
    if (parts == 1) return true;
    const int outputs = sums_of_block<C>(tiling);
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

// Stores what `totals` has of the planes and taps that exist. A sum that isn't finite may have got a product of padding
// with an Inf or NaN: it is made again without them. All threads call it.
template <class C, class Sum>
__device__ __forceinline__ void store_totals(const FilterGradients<typename C::Element>& tensors, const Sizes& sizes,
                                             const TapsNchwTiling& tiling, int channel, int channels, int depth_tap,
                                             Sum* totals, Sum* scratch) {
    using T = typename C::Element;
    constexpr int kTaps = C::kFilterH * C::kFilterW;
    const int outputs = sums_of_block<C>(tiling);
    bool finite = true;
#pragma unroll 1
    for (int o = static_cast<int>(threadIdx.x); o < outputs; o += C::kThreads) finite = finite && is_finite(totals[o]);
    if (!__syncthreads_and(finite)) {
#pragma unroll 1
        for (int o = 0; o < outputs; ++o) {
            const TapsNchwTotal<C> total(tiling, o, depth_tap);
            if (!total.exists(channels) || is_finite(totals[o])) continue;
            const Sum sum = sum_term_by_term<C>(tensors, sizes, tiling, channel * C::kMultiplier + total.plane,
                                                depth_tap, total.tap, scratch);
            if (threadIdx.x == 0) totals[o] = sum;
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int o = static_cast<int>(threadIdx.x); o < outputs; o += C::kThreads) {
        const TapsNchwTotal<C> total(tiling, o, depth_tap);
        if (!total.exists(channels)) continue;
        const int out_channel = channel * C::kMultiplier + total.plane;
        if (total.tap == kTaps)
            tensors.db[out_channel] = static_cast<T>(totals[o]);
        else
            tensors.dw[(static_cast<long long>(out_channel) * C::kFilterD + depth_tap) * kTaps + total.tap] =
                static_cast<T>(totals[o]);
    }
}

}  // namespace dwconv
