// taps_nhwc_sums.cuh: the multiply-adds of taps_nhwc, and how the sums of a block's tiles become one
#pragma once
#include "taps_nhwc_rows.cuh"

namespace dwconv {

template <class T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

// A lane's channels of a column in shared memory.
template <class C, int Width, class Sum>
__device__ __forceinline__ void read_channels(const typename C::Element* at, Sum (&values)[Width]) {
    union {
        typename Word<Width * sizeof(typename C::Element)>::Type bits;
        Vector<typename C::Element, Width> vector;
    } both;
    both.bits = *reinterpret_cast<const decltype(both.bits)*>(at);
    if constexpr (Width == 2 && kIsBFloat16<typename C::Element>) {
        read_pair<typename C::Element>(both.bits, values[0], values[1]);
    } else {
#pragma unroll
        for (int e = 0; e < Width; ++e) values[e] = static_cast<Sum>(both.vector.element[e]);
    }
}

// What a lane adds up: rows of g in a ring, and its sums: those of the tile's taps, then that of the bias.
template <class C>
struct TapsSums {
    using W = TapsNhwc<C>;
    using Element = typename C::Element;
    using Sum = typename W::Sum;
    Sum g[W::kLive][C::kColumns][C::kVector];
    Sum sums[W::kSums][C::kVector];

    __device__ __forceinline__ TapsSums() {
#pragma unroll
        for (int k = 0; k < W::kSums; ++k)
#pragma unroll
            for (int e = 0; e < C::kVector; ++e) sums[k][e] = 0;
    }

    __device__ __forceinline__ void begin() {
        if constexpr (W::kFlat) {
#pragma unroll
            for (int k = 0; k < W::kLive; ++k)
#pragma unroll
                for (int e = 0; e < C::kVector; ++e) g[k][0][e] = 0;
        }
    }

    template <int Slot>
    __device__ __forceinline__ void take_row(const Element* at) {
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t) read_channels<C, C::kVector>(at + t * W::kPitch, g[Slot][t]);
        if constexpr (C::kHasBias) {
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t)
#pragma unroll
                for (int e = 0; e < C::kVector; ++e) sums[W::kSums - 1][e] += g[Slot][t][e];
        }
    }

    // Adds the products of a row of x with the row of g in a slot, which meet in row `tap` of the tile: rows of later
    // taps of the depth stand behind those of earlier ones.
    __device__ __forceinline__ void add(const Sum (&window)[W::kWindow][C::kVector],
                                        const Sum (&row)[C::kColumns][C::kVector], int tap) {
#pragma unroll
        for (int column = 0; column < W::kWindow; ++column) {
            if (!W::has_column(column)) continue;
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t) {
                const int v = column - t * W::kStrideB;
                if (v < 0 || v >= C::kTapsB) continue;
#pragma unroll
                for (int e = 0; e < C::kVector; ++e) sums[tap * C::kTapsB + v][e] += window[column][e] * row[t][e];
            }
        }
    }

    // One step: the row of g goes to slot Phase; each row of x meets the rows of g that the segment has.
    template <int Phase>
    __device__ __forceinline__ void step(const Element* g_at, const Element* x_at, int number,
                                         const LinesSegment<W>& segment, const TapsPlace<C>& place) {
        if (number < segment.end) take_row<Phase>(g_at);
        const int row = segment.base + number * W::kReach;
#pragma unroll
        for (int e = 0; e < W::kRows; ++e) {
            if (!place.has_row(row + e * W::kApartA)) continue;
#pragma unroll
            for (int d = 0; d < C::kTapsD; ++d) {
                if (C::kVolume && !(segment.planes & 1u << d)) continue;
                Sum window[W::kWindow][C::kVector];
#pragma unroll
                for (int column = 0; column < W::kWindow; ++column)
                    if (W::has_column(column))
                        read_channels<C, C::kVector>(
                            x_at + ((d * W::kStageRows + e) * W::kKept + column - W::kSkipped) * W::kXPitch,
                            window[column]);
#pragma unroll
                for (int back = 0; back < W::kLive; ++back) {
                    const int tap = e + back * W::kStrideA;
                    if (tap >= C::kTapsA) continue;
                    if (W::kFilterA % C::kTapsA != 0 && place.tap_a + tap >= W::kFilterA) continue;
                    if (segment.has(number - back))
                        add(window, g[(Phase + W::kLive - back) % W::kLive], d * C::kTapsA + tap);
                }
            }
        }
    }

    // All steps of a stage: rows that don't exist are zeros.
    template <int Step = 0>
    __device__ __forceinline__ void steps(const Element* g_at, const Element* x_at) {
        if constexpr (Step < C::kStageSteps) {
            constexpr int kPhase = Step % W::kLive;
            take_row<kPhase>(g_at + Step * W::kPitch);
#pragma unroll
            for (int e = 0; e < W::kRows; ++e) {
                Sum window[1][C::kVector];
                read_channels<C, C::kVector>(x_at + (Step * W::kRows + e) * W::kXPitch, window[0]);
#pragma unroll
                for (int back = 0; back < W::kLive; ++back)
                    if (e + back * W::kStrideA < C::kTapsA)
                        add(window, g[(kPhase + W::kLive - back) % W::kLive], e + back * W::kStrideA);
            }
            steps<Step + 1>(g_at, x_at);
        }
    }

    // Adds up the sums of the block's tiles, kSlab values of a thread at a time, and passes each to found(index, sum).
    template <class Found>
    __device__ __forceinline__ void finish(Sum* scratch, const Found& found) const {
        constexpr int kLanes = C::kChunks * C::kLanes;
#pragma unroll
        for (int first = 0; first < W::kValues; first += C::kSlab) {
            __syncthreads();
#pragma unroll
            for (int k = first; k < smaller(first + C::kSlab, W::kValues); ++k)
                scratch[(k - first) * W::kThreads + threadIdx.x] = sums[k / C::kVector][k % C::kVector];
            __syncthreads();
            const int count = smaller(C::kSlab, W::kValues - first) * kLanes;
#pragma unroll 1
            for (int index = static_cast<int>(threadIdx.x); index < count; index += W::kThreads) {
                const int value = index / kLanes, lane = index % kLanes;
                const Sum* from = scratch + value * W::kThreads + lane / C::kLanes * 32 + lane % C::kLanes;
                Sum sum = 0;
#pragma unroll
                for (int line = 0; line < W::kLines; ++line)
                    sum += from[line / W::kTiles * (C::kChunks * 32) + line % W::kTiles * C::kLanes];
                found(first * kLanes + index, sum);
            }
        }
    }
};

}  // namespace dwconv
