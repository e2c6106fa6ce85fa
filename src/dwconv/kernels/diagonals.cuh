// diagonals.cuh: sums over diagonals of products of matrices, in the registers of a warp
//   A product C is chunks of 8 x 8 floats, one below the other. Lane 4 * m + q has C[8 * c + m, 2 * q] and
//   C[8 * c + m, 2 * q + 1] of each chunk c. Wanted is, of each position p, the sum over n of C[p + Stride * n, n].
//   Of eight positions, every word of row m and column n of a chunk belongs to that one which is m - Stride * n modulo
//   8, and one chunk has it. So a lane picks a word for each of its columns, and lanes exchange them three times: of
//   two columns, of two lanes, of four. Each time a lane keeps half of what it has, so four sums take seven shuffles.
#pragma once
#include "common.cuh"

namespace dwconv {

template <int Stride>
class Diagonals {
    static constexpr int kFurthest = (7 * Stride + 7) / 8;
    int further_[2];  // chunks from that of a position's first column to that of the lane's columns
    int next_column_, next_lane_, second_lane_;

    __device__ __forceinline__ static float exchanged(float first, float second, bool keeps_second, int from) {
        return (keeps_second ? second : first) + __shfl_sync(0xffffffffu, keeps_second ? first : second, from);
    }
    // word(chunk, column): of the lane; chunks that don't exist belong to positions that nobody wants.
    template <int Chunks, class Word>
    __device__ __forceinline__ float of_columns(int eight, const Word& word) const {
        float words[2];
#pragma unroll
        for (int column = 0; column < 2; ++column) {
            words[column] = word(smaller(eight, Chunks - 1), column);
#pragma unroll
            for (int k = 1; k <= kFurthest; ++k)
                if (eight + k < Chunks && further_[column] >= k) words[column] = word(eight + k, column);
        }
        return words[0] + __shfl_sync(0xffffffffu, words[1], next_column_);
    }

public:
    const int lane, position;  // modulo 8: whose sum the lane gets, of number lane % 4 of four

    __device__ __forceinline__ Diagonals()
        : lane(static_cast<int>(threadIdx.x % 32)), position((lane / 4 - 2 * Stride * (lane % 4)) & 7) {
        const int m = lane / 4, q = lane % 4;
#pragma unroll
        for (int column = 0; column < 2; ++column) further_[column] = (Stride * (2 * q + column) - m + 7) / 8;
        next_column_ = ((m + Stride) & 7) * 4 + q;
        next_lane_ = ((q % 2 ? m - 2 * Stride : m + 2 * Stride) & 7) * 4 + (q ^ 1);
        second_lane_ = ((m + 4 * Stride) & 7) * 4 + (q ^ 2);
    }

    // Sums of Eights * Products: number k is of product k % Products and of eight positions, those from 8 * (First + k
    // / Products) on. found(product, position, sum) gets one of each lane; word(product, chunk, column) are the lane's
    // words. All lanes call it.
    template <int Products, int Chunks, int First, int Eights, class Word, class Found>
    __device__ __forceinline__ void add(const Word& word, const Found& found) const {
        constexpr int kCount = Products * Eights;
#pragma unroll
        for (int first = 0; first < kCount; first += 4) {
            float sums[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int k = smaller(first + i, kCount - 1);
                sums[i] = of_columns<Chunks>(First + k / Products,
                                             [&](int chunk, int column) { return word(k % Products, chunk, column); });
            }
            const float below = exchanged(sums[0], sums[1], lane % 2, next_lane_);
            const float above = exchanged(sums[2], sums[3], lane % 2, next_lane_);
            const float sum = exchanged(below, above, lane % 4 / 2, second_lane_);
            const int k = first + lane % 4;
            if (k < kCount) found(k % Products, 8 * (First + k / Products) + position, sum);
        }
    }
};

}  // namespace dwconv
