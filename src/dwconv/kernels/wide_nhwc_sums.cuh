// wide_nhwc_sums.cuh: what wide_nhwc adds to a thread's sums for one input row
//   The march (march_row) adds a row to all output rows that read it, with the filter in registers, and moves the sums
//   up; otherwise (add_row) sums stay where they are, and the filter is read from shared memory.
#pragma once
#include "wide_nhwc_rows.cuh"

namespace dwconv {

// May a column of x exist, the k-th from the first that a thread reads? Of images that one thread spans, it is known.
template <class C>
__host__ __device__ constexpr bool may_exist(int k) {
    return C::kWidth == 0 || (k >= C::kPadLeft && k < C::kPadLeft + C::kWidth);
}

// The march: adds one input row, of which `window` is what the thread reads, to all output rows that read it.
// Phase = (row + kPadTop) mod kStrideH: filter rows Phase, Phase + kStrideH, ... read the row; sums[0] belongs to the
// lowest output row. At phase 0 a new output row begins, and every sum takes the place of the one above: as the first
// multiply-add writes it there, that costs nothing. (Leaving out the sums of rows that aren't the unit's takes 35
// registers more: 0.50 instead of 0.56 at 56x56x96, 0.54 instead of 0.51 at 7x7x768, float16; H200, 2026-11.)
template <class C, int Phase, class Sum>
__device__ __forceinline__ void march_row(const Sum (*window)[C::kVector],
                                          const Sum (&taps)[C::kFilterH * C::kFilterW][C::kVector],
                                          const Sum (&bias)[C::kVector],
                                          Sum (&sums)[WideNhwc<C>::kLive][C::kColumns][C::kVector]) {
#pragma unroll
    for (int k = WideNhwc<C>::kLive - 1; k >= 0; --k) {
        const int u = Phase + k * C::kStrideH;
        if (u >= C::kFilterH) continue;
        Sum row[C::kColumns][C::kVector];
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
#pragma unroll
            for (int e = 0; e < C::kVector; ++e)
                row[t][e] = Phase > 0 ? sums[k][t][e] : k > 0 ? sums[k - 1][t][e] : bias[e];
#pragma unroll
        for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t)
#pragma unroll
                for (int e = 0; e < C::kVector && may_exist<C>(t * C::kStrideW + v * C::kDilationW); ++e)
                    row[t][e] += taps[u * C::kFilterW + v][e] * window[t * C::kStrideW + v * C::kDilationW][e];
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
#pragma unroll
            for (int e = 0; e < C::kVector; ++e) sums[k][t][e] = row[t][e];
    }
}

template <class C, int Phase, class Sum>
__device__ __forceinline__ void march_phases(int phase, const Sum (*window)[C::kVector],
                                             const Sum (&taps)[C::kFilterH * C::kFilterW][C::kVector],
                                             const Sum (&bias)[C::kVector],
                                             Sum (&sums)[WideNhwc<C>::kLive][C::kColumns][C::kVector]) {
    if constexpr (Phase + 1 < C::kStrideH)
        if (phase != Phase) return march_phases<C, Phase + 1>(phase, window, taps, bias, sums);
    march_row<C, Phase>(window, taps, bias, sums);
}

template <class C, class Sum>
__device__ __forceinline__ void move_up(Sum (&sums)[WideNhwc<C>::kLive][C::kColumns][C::kVector]) {
#pragma unroll
    for (int k = WideNhwc<C>::kLive - 1; k > 0; --k)
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
#pragma unroll
            for (int e = 0; e < C::kVector; ++e) sums[k][t][e] = sums[k - 1][t][e];
}

// Reads the columns of the thread's channels that so many taps of a row need.
template <class C, int Taps, class Sum>
__device__ __forceinline__ void read_window(const typename C::Element* at, Sum (*window)[C::kVector]) {
#pragma unroll
    for (int k = 0; k <= (C::kColumns - 1) * C::kStrideW + (Taps - 1) * C::kDilationW; ++k) {
        bool needed = false;
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t) needed |= is_tap(k - t * C::kStrideW, C::kDilationW, Taps);
        if (!needed || !may_exist<C>(k)) continue;
        const typename C::Element* const pixel = at + k * WideNhwc<C>::kStaged;
        if constexpr (sizeof(typename C::Element) == 2 && C::kVector > 1) {
            const auto pairs = *reinterpret_cast<const Vector<unsigned, C::kVector / 2>*>(pixel);
#pragma unroll
            for (int e = 0; e < C::kVector; e += 2)
                read_pair<typename C::Element>(pairs.element[e / 2], window[k][e], window[k][e + 1]);
        } else {
            const auto elements = *reinterpret_cast<const Vector<typename C::Element, C::kVector>*>(pixel);
#pragma unroll
            for (int e = 0; e < C::kVector; ++e) window[k][e] = static_cast<Sum>(elements.element[e]);
        }
    }
}

// Adds Taps taps of each filter row to the output rows that read the input row. `below` is the input row's distance
// from the first that output row 0 reads, `at` the first column that the taps read, `filter` the first tap in row 0.
// Whole: all of the output rows read it.
template <class C, int Taps, bool Whole, class Sum>
__device__ __forceinline__ void add_taps(const typename C::Element* at, const Sum* filter, int below,
                                         Sum (&sums)[C::kRows][C::kColumns][1]) {
    using W = WideNhwc<C>;
    Sum window[(C::kColumns - 1) * C::kStrideW + (Taps - 1) * C::kDilationW + 1][1];
    read_window<C, Taps>(at, window);
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
        const int from_first = below - i * C::kStrideH;  // = u * kDilationH
        if (!Whole && !is_tap(from_first, C::kDilationH, C::kFilterH)) continue;
        const Sum* row = filter + from_first / C::kDilationH * (W::kFilterRow * C::kChannels);
        Sum taps[ceil_div(Taps, W::kPack) * W::kPack];
#pragma unroll
        for (int v = 0; v < Taps; v += W::kPack) {
            const auto pack = *reinterpret_cast<const Vector<Sum, W::kPack>*>(row + v * C::kChannels);
#pragma unroll
            for (int e = 0; e < W::kPack; ++e) taps[v + e] = pack.element[e];
        }
#pragma unroll
        for (int v = 0; v < Taps; ++v)
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t)
                if (may_exist<C>(t * C::kStrideW + v * C::kDilationW))
                    sums[i][t][0] += taps[v] * window[t * C::kStrideW + v * C::kDilationW][0];
    }
}

// The same, of taps from `v` on, if they reach the image anywhere. Most rows are read by all of a thread's output rows:
// then nothing is looked at for each of these, where code for that still fits in the instruction cache (13×13 0.76
// instead of 0.66, but 31×31, of two lengths of taps, 0.69 instead of 0.71; H200, 2026-11).
template <class C, int Taps, class Sum>
__device__ __forceinline__ void add_taps_from(int v, const typename C::Element* at, const Sum* filter, int below,
                                              int column, int in_w, Sum (&sums)[C::kRows][C::kColumns][1]) {
    const int first = column + v * C::kDilationW;
    if (first >= in_w || first + (C::kColumns - 1) * C::kStrideW + (Taps - 1) * C::kDilationW < 0) return;
    at += v * C::kDilationW * WideNhwc<C>::kStaged;
    filter += v * C::kChannels;
    constexpr bool kOneLength = C::kFilterW <= C::kTaps;
    if (kOneLength && C::kDilationH == 1 && below >= (C::kRows - 1) * C::kStrideH && below < C::kFilterH)
        add_taps<C, Taps, true>(at, filter, below, sums);
    else
        add_taps<C, Taps, false>(at, filter, below, sums);
}

// Adds one input row to the output rows that read it, kTaps columns of the filter at a time. `column` is the first
// column that the thread reads, in the image.
template <class C, class Sum>
__device__ __forceinline__ void add_row(const typename C::Element* at, const Sum* filter, int below, int column,
                                        int in_w, Sum (&sums)[C::kRows][C::kColumns][1]) {
    constexpr int kTaps = smaller(C::kTaps, C::kFilterW), kRest = C::kFilterW % kTaps;
#pragma unroll 1
    for (int v = 0; v + kTaps <= C::kFilterW; v += kTaps)
        add_taps_from<C, kTaps>(v, at, filter, below, column, in_w, sums);
    if constexpr (kRest > 0) add_taps_from<C, kRest>(C::kFilterW - kRest, at, filter, below, column, in_w, sums);
}

}  // namespace dwconv
