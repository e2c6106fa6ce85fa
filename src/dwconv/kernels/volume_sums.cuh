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

// The taps of a filter row [age][v], from shared memory.
template <class C, class Sum>
__device__ __forceinline__ void load_taps(const Sum* row, Sum (&tap)[Volume<C>::kTapRow][C::kVector]) {
    using V = Volume<C>;
    constexpr int kWidth = 16 / static_cast<int>(sizeof(Sum));
    Sum all[V::kTapRow * C::kVector];
#pragma unroll
    for (int at = 0; at < V::kTapRow * C::kVector; at += kWidth) {
        const auto some = *reinterpret_cast<const Vector<Sum, kWidth>*>(row + at);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) all[at + e] = some.element[e];
    }
#pragma unroll
    for (int at = 0; at < V::kTapRow; ++at)
#pragma unroll
        for (int e = 0; e < C::kVector; ++e) tap[at][e] = all[at * C::kVector + e];
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
            Sum row[V::kSpan][C::kVector];
            load_window<C>(window + r * C::kPitch, row);
#pragma unroll
            for (int i = 0; i < C::kRows; ++i) {
                const int below = r - i * C::kStrideH;
                if (!is_tap(below, C::kDilationH, C::kFilterH)) continue;
#pragma unroll
                for (int age = 0; age < V::kAges; ++age)
#pragma unroll
                    for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
                        for (int o = 0; o < C::kColumns; ++o)
#pragma unroll
                            for (int e = 0; e < C::kVector; ++e)
                                own.sums[slot_of<C>(age, phase)][i][o][e] +=
                                    own.held[age * C::kFilterH + below / C::kDilationH][v][e] *
                                    row[o * C::kStrideW + v * C::kDilationW][e];
            }
        }
    } else {
#pragma unroll All ? C::kUnrollRows : 1
        for (int u = 0; u < C::kFilterH; ++u) {
            const Sum* row_taps = taps + (part * C::kFilterH + u) * (V::kTapRow * C::kVector);
            if constexpr (All) {
                Sum tap[V::kTapRow][C::kVector], rows[C::kRows][V::kSpan][C::kVector];
                load_taps<C>(row_taps, tap);
#pragma unroll
                for (int i = 0; i < C::kRows; ++i)
                    load_window<C>(window + (i * C::kStrideH + u * C::kDilationH) * C::kPitch, rows[i]);
                // The order decides how many operands an instruction has from the one before instead of from registers,
                // of which two can be read in a cycle: these two were the best of 80 orders (docs/variants).
                const auto add = [&](int i, int o, int v, int age) {
#pragma unroll
                    for (int e = 0; e < C::kVector; ++e)
                        own.sums[slot_of<C>(age, phase)][i][o][e] +=
                            tap[age * C::kFilterW + v][e] * rows[i][o * C::kStrideW + v * C::kDilationW][e];
                };
#pragma unroll
                for (int i = 0; i < C::kRows; ++i) {
                    if constexpr (C::kChannelsLast) {
#pragma unroll
                        for (int o = 0; o < C::kColumns; ++o)
#pragma unroll
                            for (int age = V::kAges - 1; age >= 0; --age)
#pragma unroll
                                for (int v = 0; v < C::kFilterW; ++v) add(i, o, v, age);
                    } else {
#pragma unroll
                        for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
                            for (int age = V::kAges - 1; age >= 0; --age)
#pragma unroll
                                for (int o = 0; o < C::kColumns; ++o)
                                    add(i, (age + v + i) % 2 ? C::kColumns - 1 - o : o, v, age);
                    }
                }
            } else {
                Sum rows[C::kRows][V::kSpan][C::kVector];
#pragma unroll
                for (int i = 0; i < C::kRows; ++i)
                    load_window<C>(window + (i * C::kStrideH + u * C::kDilationH) * C::kPitch, rows[i]);
#pragma unroll
                for (int age = 0; age < V::kAges; ++age) {
                    if (age < youngest || age > oldest) continue;
#pragma unroll
                    for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
                        for (int e = 0; e < C::kVector; ++e) {
                            const Sum tap = row_taps[(age * C::kFilterW + v) * C::kVector + e];
#pragma unroll
                            for (int i = 0; i < C::kRows; ++i)
#pragma unroll
                                for (int o = 0; o < C::kColumns; ++o)
                                    own.sums[slot_of<C>(age, phase)][i][o][e] +=
                                        tap * rows[i][o * C::kStrideW + v * C::kDilationW][e];
                        }
                }
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
