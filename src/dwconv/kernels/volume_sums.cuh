// volume_sums.cuh: a plane's products, summed by multiply-adds, for the kernels of volumes.cuh
#pragma once
#include "volume_tiles.cuh"

namespace dwconv {

// One row of a lane's window, as far as it is read.
template <class C, class T, class Sum>
__device__ __forceinline__ void load_window(const T* row, Sum (&window)[Volume<C>::kSpan][C::kVector]) {
    using V = Volume<C>;
    if constexpr (C::kChannelsLast) {
#pragma unroll
        for (int k = 0; k < V::kSpan; ++k)
            if (V::reads(k)) {
                const auto both = *reinterpret_cast<const Vector<T, C::kVector>*>(row + k * C::kChunk);
#pragma unroll
                for (int e = 0; e < C::kVector; ++e) window[k][e] = static_cast<Sum>(both.element[e]);
            }
    } else {
        constexpr int kSkip = V::kOffset % 4;
#pragma unroll
        for (int quad = 0; quad < ceil_div(kSkip + V::kSpan, 4); ++quad) {
            if (V::used(quad) == 0) continue;
            Sum four[4];
            if (V::used(quad) > 1) load_shared_4(row + 4 * quad, four);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int k = 4 * quad + e - kSkip;
                if (k >= 0 && k < V::kSpan && V::reads(k))
                    window[k][0] = V::used(quad) > 1 ? four[e] : row[4 * quad + e];
            }
        }
    }
}

// One row of the filter.
template <class C, class Sum>
__device__ __forceinline__ void load_taps(const Sum* row, Sum (&tap)[C::kFilterW][C::kVector]) {
    if constexpr (C::kChannelsLast) {
#pragma unroll
        for (int v = 0; v < C::kFilterW; ++v) {
            const auto both = *reinterpret_cast<const Vector<Sum, C::kVector>*>(row + v * Volume<C>::kTapStep);
#pragma unroll
            for (int e = 0; e < C::kVector; ++e) tap[v][e] = both.element[e];
        }
    } else {
#pragma unroll
        for (int v = 0; v < C::kFilterW; v += 4) {
            Sum four[4];
            if (C::kFilterW - v > 1)
                load_shared_4(row + v, four);
            else
                four[0] = row[v];
#pragma unroll
            for (int e = 0; e < 4 && v + e < C::kFilterW; ++e) tap[v + e][0] = four[e];
        }
    }
}

// Adds kMany rows of windows, each to its sums.
template <class C, int kMany, class Sum>
__device__ __forceinline__ void add_rows(const Sum (&windows)[kMany][Volume<C>::kSpan][C::kVector],
                                         const Sum (&tap)[C::kFilterW][C::kVector],
                                         Sum (*sums)[C::kColumns][C::kVector]) {
#pragma unroll
    for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
        for (int i = 0; i < kMany; ++i)  // inside, so that neighbouring instructions share their tap
#pragma unroll
            for (int o = 0; o < C::kColumns; ++o)
#pragma unroll
                for (int e = 0; e < C::kVector; ++e)
                    sums[i][o][e] += tap[v][e] * windows[i][o * C::kStrideW + v * C::kDilationW][e];
}

// Adds a plane to the outputs of the ages from `youngest` to `oldest`: tap t = part + kPeriod * age. All: to those of
// all ages, as it is but at the ends of a stretch of depth, and where a strided filter has no such tap.
template <class C, bool All, class T, class Sum>
__device__ __forceinline__ void add_plane(Volume<C>& own, const T* window, const Sum* taps, int part, int phase,
                                          int youngest, int oldest) {
    using V = Volume<C>;
    if constexpr (C::kHeldTaps) {
#pragma unroll
        for (int r = 0; r < V::kInRows; ++r) {
            bool is_read = false;
            for (int i = 0; i < C::kRows; ++i) is_read |= is_tap(r - i * C::kStrideH, C::kDilationH, C::kFilterH);
            if (!is_read) continue;
            Sum row[1][V::kSpan][C::kVector];
            load_window<C>(window + r * C::kPitch, row[0]);
#pragma unroll
            for (int i = 0; i < C::kRows; ++i) {
                const int below = r - i * C::kStrideH;
                if (!is_tap(below, C::kDilationH, C::kFilterH)) continue;
#pragma unroll
                for (int age = 0; age < V::kAges; ++age)
                    add_rows<C, 1>(row, own.held[age * C::kFilterH + below / C::kDilationH],
                                   &own.sums[slot_of<C>(age, phase)][i]);
            }
        }
    } else {
#pragma unroll All ? C::kUnrollRows : 1
        for (int u = 0; u < C::kFilterH; ++u) {
            Sum rows[C::kRows][V::kSpan][C::kVector];
#pragma unroll
            for (int i = 0; i < C::kRows; ++i)
                load_window<C>(window + (i * C::kStrideH + u * C::kDilationH) * C::kPitch, rows[i]);
#pragma unroll
            for (int age = 0; age < V::kAges; ++age) {
                if (!All && (age < youngest || age > oldest)) continue;
                Sum tap[C::kFilterW][C::kVector];
                load_taps<C>(taps + (u * C::kFilterD + part + V::kPeriod * age) * V::kTapRow * V::kTapStep, tap);
                add_rows<C, C::kRows>(rows, tap, own.sums[slot_of<C>(age, phase)]);
            }
        }
    }
}

// Stores a finished plane of a lane's outputs; the first is at tensors.y.
template <class C, class Sum>
__device__ __forceinline__ void store_plane(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const VolumePlace& place,
                                            const Sum (&sums)[C::kRows][C::kColumns][C::kVector],
                                            const ChannelValues<Sum> (&values)[C::kVector]) {
    long long at = 0;
    const long long next_row = C::kChannelsLast ? sizes.out_w * sizes.out_channels : sizes.out_w;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
        if (i < place.rows) {
            if constexpr (C::kChannelsLast) {
                long long column = at;
#pragma unroll
                for (int o = 0; o < C::kColumns; ++o, column += sizes.out_channels)
                    if (o < place.columns) store_outputs<C, C::kVector, 1>(tensors, column, sums[i][o], values);
            } else {
#pragma unroll
                for (int o = 0; o < C::kColumns; o += C::kStoreVector)
                    if (C::kStoreVector == C::kColumns || o < place.columns)
                        store_outputs<C, C::kStoreVector, 0>(tensors, at + o, &sums[i][o][0], values);
            }
        }
        at += next_row;
    }
}

}  // namespace dwconv
