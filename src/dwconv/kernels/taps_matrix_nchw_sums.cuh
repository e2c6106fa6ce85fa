// taps_matrix_nchw_sums.cuh: products of rows of x and g on tensor cores, and how sums of taps come of them
//   For one channel, sixteen groups k of eight outputs, and row u of taps:
//     A[m, k] = x[S * 8 * k + m], the windows of the groups;  B[k, n] = g[8 * k + n];  C[m, n] = sum over k of A * B
//   so that dw[u, v] gets the sum over n of C[S * n + v, n]: a product adds all of a row of x to a row of taps.
//   Sums are float32, products exact. Chunks of 16 bytes are columns of A and rows of B as they lie (ldmatrix.trans).
#pragma once
#include "bands.cuh"
#include "taps_matrix_nchw_stages.cuh"

namespace dwconv {

// Fragments of Count 8x8 matrices, transposed: lane 8 * i + r says where row r of matrix i is, in bytes.
template <int Count>
__device__ __forceinline__ void load_transposed(unsigned (&fragments)[Count], unsigned offset) {
    static_assert(Count == 2 || Count == 4, "ldmatrix loads two or four matrices here");
#ifdef DWCONV_EMULATOR
    const unsigned char* const memory = shared_memory<unsigned char>();
    const unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < Count; ++i) {
        fragments[i] = 0;
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned row = __shfl_sync(0xffffffffu, offset, 8 * i + lane % 4 * 2 + half);
            fragments[i] |= static_cast<unsigned>(*reinterpret_cast<const unsigned short*>(memory + row + lane / 4 * 2))
                            << 16 * half;
        }
    }
#else
    const unsigned row = static_cast<unsigned>(__cvta_generic_to_shared(shared_memory<unsigned char>())) + offset;
    if constexpr (Count == 4)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                     : "r"(row)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(fragments[0]), "=r"(fragments[1])
                     : "r"(row)
                     : "memory");
#endif
}

// What a warp adds up, of each of its kOwn channels: rows of g in a ring, a matrix C for each row of taps, and one
// whose rows are all the sums of g.
template <class C>
struct TapsMatrixSums {
    using W = TapsMatrix<C>;
    using Element = typename C::Element;
    uint2 g[C::kOwn][W::kLive][W::kSets];
    uint2 row[C::kOwn][W::kSets];           // of g, as it was read
    unsigned x[W::kXOwn][W::kMatrices][4];  // windows of sixteen groups
    float sums[C::kOwn][C::kTapsA][W::kMatrices][4];
    float bias[C::kOwn][C::kHasBias ? 4 : 1];
    unsigned x_from[W::kMatrices], g_from;  // where the lane's rows of A and B are in a stage, in bytes

    __device__ __forceinline__ TapsMatrixSums() {
        const unsigned lane = threadIdx.x % 32;
        const unsigned group = lane % 8 + lane / 16 * 8;
#pragma unroll
        for (int i = 0; i < W::kMatrices; ++i) {
            x_from[i] = 16 * (group + (lane / 8 % 2 ? W::chunk_at(2 * i + 1) : W::chunk_at(2 * i)));
            keep(x_from[i]);
        }
        g_from = W::kGAt + 16 * (lane % 16);
        if (C::kOwn % 2 == 0) g_from += lane / 16 * W::kGChannelBytes;
        keep(g_from);
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
#pragma unroll
            for (int u = 0; u < C::kTapsA; ++u)
#pragma unroll
                for (int i = 0; i < W::kMatrices; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[o][u][i][e] = 0;
#pragma unroll
            for (int e = 0; e < (C::kHasBias ? 4 : 1); ++e) bias[o][e] = 0;
        }
    }

    __device__ __forceinline__ void read_windows(unsigned stage, int e, int set) {
#pragma unroll
        for (int o = 0; o < W::kXOwn; ++o)
#pragma unroll
            for (int i = 0; i < W::kMatrices; ++i)
                load_transposed<4>(x[o][i], stage + x_from[i] + e * W::kXRowBytes + o * W::kXChannelBytes + set * 256);
    }

    // Reads the row of g of a stage, and the first windows of x, so that copies can be started meanwhile.
    __device__ __forceinline__ void read(unsigned stage) {
#pragma unroll
        for (int set = 0; set < W::kSets; ++set) {
            if constexpr (C::kOwn % 2 == 0) {
#pragma unroll
                for (int o = 0; o < C::kOwn; o += 2) {
                    unsigned found[4];
                    load_transposed<4>(found, stage + g_from + o * W::kGChannelBytes + set * 256);
                    row[o][set] = make_uint2(found[0], found[1]);
                    row[o + 1][set] = make_uint2(found[2], found[3]);
                }
            } else {
#pragma unroll
                for (int o = 0; o < C::kOwn; ++o) {
                    unsigned found[2];
                    load_transposed<2>(found, stage + g_from + o * W::kGChannelBytes + set * 256);
                    row[o][set] = make_uint2(found[0], found[1]);
                }
            }
        }
        read_windows(stage, 0, 0);
    }

    template <int Slot>
    __device__ __forceinline__ void take_row() {
        const unsigned ones = rounded_pair<Element>(1.0f, 1.0f);
        const unsigned all_ones[4] = {ones, ones, ones, ones};
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o)
#pragma unroll
            for (int set = 0; set < W::kSets; ++set) {
                g[o][Slot][set] = row[o][set];
                if constexpr (C::kHasBias) multiply_matrices<Element>(bias[o], all_ones, g[o][Slot][set]);
            }
    }

    // One step: the row of g goes to slot Phase; each row of x meets the rows of g that the segment has.
    template <int Phase>
    __device__ __forceinline__ void step(unsigned stage, int number, const LinesSegment<W>& segment,
                                         const LinesPlace<W>& place) {
        if (number < segment.end) take_row<Phase>();
        const int first = segment.base + number * W::kReach;
#pragma unroll
        for (int e = 0; e < W::kRows; ++e) {
            if (!place.has_row(first + e * W::kApartA)) continue;
#pragma unroll
            for (int set = 0; set < W::kSets; ++set) {
                if (e + set > 0) read_windows(stage, e, set);
#pragma unroll
                for (int back = 0; back < W::kLive; ++back) {
                    const int tap = e + back * W::kStrideA;
                    if (tap >= C::kTapsA) continue;
                    if (W::kFilterA % C::kTapsA != 0 && place.tap_a + tap >= W::kFilterA) continue;
                    if (!segment.has(number - back)) continue;
#pragma unroll
                    for (int o = 0; o < C::kOwn; ++o)
#pragma unroll
                        for (int i = 0; i < W::kMatrices; ++i)
                            multiply_matrices<Element>(sums[o][tap][i], x[o / C::kMultiplier][i],
                                                       g[o][(Phase + W::kLive - back) % W::kLive][set]);
                }
            }
        }
    }

    // See finish_lines.
    template <class Found>
    __device__ __forceinline__ void finish(float* totals, const Found& found) const {
        finish_diagonals<W, 2 * W::kMatrices>(
            totals, [&](int o, int u, int chunk, int column) { return sums[o][u][chunk / 2][chunk % 2 * 2 + column]; },
            [&](int o) { return bias[o][0] + bias[o][1]; }, found);
    }
};

}  // namespace dwconv
