// taps_sparse_nhwc_sums.cuh: products of rows of x and g on sparse tensor cores, and how sums of taps come of them
//   Pixels stay as they lie in channels-last memory, pairs of neighbouring channels in a word. For two channels h, the
//   sixteen groups k of eight outputs of a set, row u of taps, and chunk c of the groups' windows:
//     A[(h, m), (k, h')] = x[S * 8 * k + 8 * c + m, h] where h' = h, else 0;   B[(k, h'), n] = g[8 * k + n, h']
//     C[(h, m), n] = sum over k of x[S * 8 * k + 8 * c + m, h] * g[8 * k + n, h]
//   so that dw[u, v] of channel h gets the sum over n of C[(h, S * n + v - 8 * c), n]: a product adds all of a chunk of
//   x's windows to a row of taps of two channels. Half of A is zeros by its shape, as sparse matrices have them; its
//   words are the halves of two words of x. Sums are float32, products exact.
#pragma once
#include "sparse_bands.cuh"
#include "taps_sparse_nhwc_stages.cuh"

namespace dwconv {

// The lower halves of two words, or the upper ones; by one instruction, where compilers take two.
__device__ __forceinline__ unsigned halves(unsigned first, unsigned second, int upper) {
#ifdef DWCONV_EMULATOR
    return upper ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
#else
    unsigned found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(first), "r"(second), "r"(upper ? 0x7632 : 0x5410));
    return found;
#endif
}

// What a warp adds up, of each pair of its kOwn channels: rows of g in a ring, a matrix C for each row of taps and
// chunk of windows, and one whose rows are all the sums of g.
template <class C>
struct TapsSparseSums {
    using W = TapsSparse<C>;
    using Element = typename C::Element;
    static constexpr int kWarpPairs = C::kOwn / 2, kXPairs = kWarpPairs / C::kMultiplier;
    unsigned g[kWarpPairs][W::kLive][W::kSets][4];
    float sums[kWarpPairs][C::kTapsA][W::kChunks][4];
    float bias[kWarpPairs][C::kHasBias ? 4 : 1];
    unsigned row[W::kSets][4][kWarpPairs];  // of g, as it was read
    unsigned x[2][W::kWords][kXPairs];      // windows of pairs of groups lane % 4, and 4 + lane % 4
    unsigned x_from, g_from;                // where the lane's first words are in a stage, in bytes
    unsigned pattern = kPairsOfChannels ^ unknown_zero();

    // ptxas would set a pattern that it knows again before each product.
    __device__ __forceinline__ TapsSparseSums() {
        const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
        x_from = W::x_from(lane, warp * (2 * kXPairs));
        g_from = W::g_from(lane, warp * (2 * kWarpPairs));
        keep(x_from);
        keep(g_from);
#pragma unroll
        for (int p = 0; p < kWarpPairs; ++p) {
#pragma unroll
            for (int u = 0; u < C::kTapsA; ++u)
#pragma unroll
                for (int c = 0; c < W::kChunks; ++c)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[p][u][c][e] = 0;
#pragma unroll
            for (int e = 0; e < (C::kHasBias ? 4 : 1); ++e) bias[p][e] = 0;
        }
    }

    // The words of Pairs pairs of channels at a place in shared memory.
    template <int Pairs>
    __device__ __forceinline__ static void read_pairs(const unsigned char* at, unsigned (&words)[Pairs]) {
        const auto read = *reinterpret_cast<const Vector<unsigned, Pairs>*>(at);
#pragma unroll
        for (int p = 0; p < Pairs; ++p) words[p] = read.element[p];
    }
    __device__ __forceinline__ void read_windows(const unsigned char* from, int e, int set) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int w = 0; w < W::kWords; ++w) read_pairs(from + W::x_words(e, w, 8 * set + 4 * i), x[i][w]);
    }

    __device__ __forceinline__ void read_row(unsigned stage) {
        const unsigned char* const from = shared_memory<unsigned char>() + (stage + g_from);
#pragma unroll
        for (int set = 0; set < W::kSets; ++set)
#pragma unroll
            for (int i = 0; i < 4; ++i) read_pairs(from + W::g_words(8 * set + 2 * i), row[set][i]);
    }

    // Reads the first windows of x of a stage, and its row of g, so that copies can be started meanwhile.
    __device__ __forceinline__ void read(unsigned stage) {
        if constexpr (W::kRowAhead) read_row(stage);
        read_windows(shared_memory<unsigned char>() + (stage + x_from), 0, 0);
    }

    template <int Slot>
    __device__ __forceinline__ void take_row() {
#pragma unroll
        for (int p = 0; p < kWarpPairs; ++p)
#pragma unroll
            for (int set = 0; set < W::kSets; ++set) {
#pragma unroll
                for (int i = 0; i < 4; ++i) g[p][Slot][set][i] = row[set][i][p];
                if constexpr (C::kHasBias) {
                    const unsigned ones = rounded_pair<Element>(1.0f, 1.0f);
                    multiply_sparse<Element>(bias[p], uint4{ones, ones, ones, ones}, g[p][Slot][set], bias[p], pattern);
                }
            }
    }

    // One step: the row of g goes to slot Phase; each row of x meets the rows of g that the segment has.
    template <int Phase>
    __device__ __forceinline__ void step(unsigned stage, int number, const LinesSegment<W>& segment,
                                         const LinesPlace<W>& place) {
        if (number < segment.end) {
            if constexpr (!W::kRowAhead) read_row(stage);
            take_row<Phase>();
        }
        const unsigned char* const from = shared_memory<unsigned char>() + (stage + x_from);
        const int first = segment.base + number * W::kReach;
#pragma unroll
        for (int e = 0; e < W::kRows; ++e) {
            if (!place.has_row(first + e * W::kApartA)) continue;
#pragma unroll
            for (int set = 0; set < W::kSets; ++set) {
                if (e + set > 0) read_windows(from, e, set);
#pragma unroll
                for (int p = 0; p < kWarpPairs; ++p)
#pragma unroll
                    for (int c = 0; c < W::kChunks; ++c) {
                        unsigned a[4];
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int channel = (2 * p + i % 2) / C::kMultiplier;
                            a[i] = halves(x[i / 2][W::word_of(0, c)][channel / 2],
                                          x[i / 2][W::word_of(1, c)][channel / 2], channel % 2);
                        }
#pragma unroll
                        for (int back = 0; back < W::kLive; ++back) {
                            const int tap = e + back * W::kStrideA;
                            if (tap >= C::kTapsA) continue;
                            if (W::kFilterA % C::kTapsA != 0 && place.tap_a + tap >= W::kFilterA) continue;
                            if (segment.has(number - back))
                                multiply_sparse<Element>(sums[p][tap][c], uint4{a[0], a[1], a[2], a[3]},
                                                         g[p][(Phase + W::kLive - back) % W::kLive][set],
                                                         sums[p][tap][c], pattern);
                        }
                    }
            }
        }
    }

    // See finish_lines.
    template <class Found>
    __device__ __forceinline__ void finish(float* totals, const Found& found) const {
        finish_diagonals<W, W::kChunks>(
            totals, [&](int o, int u, int chunk, int column) { return sums[o / 2][u][chunk][o % 2 * 2 + column]; },
            [&](int o) { return bias[o / 2][o % 2 * 2] + bias[o / 2][o % 2 * 2 + 1]; }, found);
    }
};

}  // namespace dwconv
