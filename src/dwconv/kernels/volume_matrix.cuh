// volume_matrix.cuh: a plane's products of 16-bit elements on tensor cores, for the kernels of volumes.cuh
//   For one channel and one filter row, eight neighbouring outputs are a banded product: with
//     A[i, k] = x[row, 8i + k - s - PL],   B[k, j] = w[k - j - s] (zero outside of the filter),   C[i, j] = y[row, 8i +
//     j]
//   one m16n8k16 does a filter row for 16 groups of eight outputs, wherever they are. s in {0, 1} makes k even where
//   x is, so that a lane reads A from shared memory as words, without conversion.
//   Zeros of the band times an Inf or NaN are NaN, also where the filter doesn't reach: sums that are not finite are
//   computed again, product by product.
#pragma once
#include "bands.cuh"
#include "volume_tiles.cuh"

namespace dwconv {

template <class C>
struct VolumeBand {
    static constexpr int kShift = Volume<C>::kOffset % 2;  // s
    static_assert(!C::kMatrix || C::kStrideW == 1,
                  "kMatrix needs a stride of 1 along columns: the band is one of taps");
    static_assert(!C::kMatrix || 7 + kShift + (C::kFilterW - 1) * C::kDilationW < 16,
                  "kMatrix: a filter row is 16 columns");
};

// A lane's part of the band of a filter row, whose first tap is number `first`: taps k - n - s for k = 2t, 2t + 1 and
// 2t + 8, 2t + 9 of column n.
template <class C>
__device__ __forceinline__ uint2 volume_band(const typename C::Element* filter, int first, unsigned lane) {
    unsigned words[2] = {0, 0};
    const int n = lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int distance = static_cast<int>(lane % 4) * 2 + i / 2 * 8 + i % 2 - n - VolumeBand<C>::kShift;
        if (is_tap(distance, C::kDilationW, C::kFilterW))
            words[i / 2] |= static_cast<unsigned>(load_one(filter + tap_at<C>(first + distance / C::kDilationW)).bits)
                            << (i % 2 * 16);
    }
    return make_uint2(words[0], words[1]);
}

// Adds a plane to the outputs of the ages from `youngest` to `oldest`, or to those of all ages; as add_plane.
template <class C, bool All>
__device__ __forceinline__ void add_matrices(Volume<C>& own, const typename C::Element* tile, int part, int phase,
                                             int youngest, int oldest) {
    using V = Volume<C>;
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(tile);
    const auto word = [](const unsigned char* at) { return *reinterpret_cast<const unsigned*>(at); };
#pragma unroll C::kHeldTaps ? C::kFilterH : 1
    for (int u = 0; u < C::kFilterH; ++u) {
        unsigned a[C::kRows][4];
#pragma unroll
        for (int m = 0; m < C::kRows; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[m][i] = word(bytes + own.groups[m][i % 2] + 2 * (u * C::kDilationH * C::kPitch + i / 2 * 8));
#pragma unroll
        for (int age = 0; age < V::kAges; ++age) {
            if (!All && (age < youngest || age > oldest)) continue;
            uint2 band;
            if constexpr (C::kHeldTaps)
                band = own.bands[age * C::kFilterH + u];
            else
                band = own.filter[(u * C::kFilterD + part + V::kPeriod * age) * 32];
#pragma unroll
            for (int m = 0; m < C::kRows; ++m)
                multiply_matrices<typename C::Element>(own.sums[slot_of<C>(age, phase)][m][0], a[m], band);
        }
    }
}

// Where the groups of a lane are, in the tile and in y; and the bands of its volume's filter, from shared memory.
template <class C>
__device__ __forceinline__ void place_groups(Volume<C>& own, const VolumePlace& place, const Sizes& sizes,
                                             const VolumeTiling& tiling, int volume, int first_group) {
    const int pair = threadIdx.x % 4 * 2, out_w = static_cast<int>(sizes.out_w);
    own.first_group = first_group;
    own.seconds = 0;
#pragma unroll
    for (int m = 0; m < C::kRows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned group = first_group + m * 16 + half * 8;
            const int row = tiling.lanes_x.quotient(group), column = (group - row * tiling.lanes_x.divisor) * 8;
            const bool exists = place.inside && row < static_cast<int>(tiling.lanes_y.divisor);
            // In bytes. Groups that don't exist compute on the tile's first one.
            const int in_row = volume * static_cast<int>(tiling.tile_rows) + row * C::kStrideH;
            own.groups[m][half] =
                2 * (pair + Volume<C>::kOffset - VolumeBand<C>::kShift + (exists ? in_row * C::kPitch + column : 0));
#ifndef DWCONV_EMULATOR
            asm("" : "+r"(own.groups[m][half]));  // else it is computed again in every step
#endif
            const int out_row = place.tile_row + row, out_column = place.tile_column + column + pair;
            own.places[m][half] =
                exists && out_row < sizes.out_h && out_column < out_w ? out_row * out_w + out_column : -1;
            if (out_column + 1 < out_w) own.seconds |= 1u << (2 * m + half);
        }
    if constexpr (C::kHeldTaps) {
#pragma unroll
        for (int age = 0; age < Volume<C>::kAges; ++age)
#pragma unroll
            for (int u = 0; u < C::kFilterH; ++u)
                own.bands[age * C::kFilterH + u] = own.filter[(u * C::kFilterD + age) * 32];
    }
}

// Stores the outputs of a finished plane, `depth`; tensors.y is its start, x that of its volume.
template <class C>
__device__ __forceinline__ void store_matrices(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                               const VolumeTiling& tiling, const VolumePlace& place,
                                               const Volume<C>& own, const typename C::Element* x, int depth,
                                               float bias, const float (&sums)[C::kRows][1][4],
                                               const ChannelValues<float>& values) {
    float checks[2] = {0, 0};  // not finite as soon as a sum is not, or where sums are very large
#pragma unroll
    for (int m = 0; m < C::kRows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int to = own.places[m][half];
            const float pair[2] = {sums[m][0][2 * half], sums[m][0][2 * half + 1]};
            checks[half] = fmaf(pair[0], pair[1], checks[half]);
            if constexpr (C::kStoreVector == 2) {
                if (to >= 0) store_outputs<C, 2, 0>(tensors, to, pair, &values);
            } else {
                if (to >= 0) store_outputs<C, 1, 0>(tensors, to, pair, &values);
                if (to >= 0 && own.seconds >> (2 * m + half) & 1)
                    store_outputs<C, 1, 0>(tensors, to + 1, pair + 1, &values);
            }
        }
    if ((checks[0] + checks[1]) * 0.0f == 0.0f) return;
    unsigned wrong = 0;  // sums that are not finite, by their number
#pragma unroll
    for (int m = 0; m < C::kRows; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (own.places[m][e / 2] >= 0 && (e % 2 == 0 || own.seconds >> (2 * m + e / 2) & 1) &&
                !(sums[m][0][e] * 0.0f == 0.0f))
                wrong |= 1u << (4 * m + e);
#pragma unroll 1
    while (wrong != 0) {
        const int number = __ffs(static_cast<int>(wrong)) - 1;
        wrong &= wrong - 1;
        const unsigned group = own.first_group + number / 2 * 8;
        const int row = tiling.lanes_x.quotient(group);
        const int column = (group - row * tiling.lanes_x.divisor) * 8 + threadIdx.x % 4 * 2 + number % 2;
        const int out_row = place.tile_row + row, out_column = place.tile_column + column;
        const float sum =
            exact_sum<C>(x, tensors.w + place.channel * Volume<C>::kTaps, bias, sizes, depth, out_row, out_column);
        store_outputs<C, 1, 0>(tensors, static_cast<long long>(out_row) * sizes.out_w + out_column, &sum, &values);
    }
}

}  // namespace dwconv
