// volume_matrix.cuh: a plane's products of 16-bit elements on tensor cores, for the kernels of volumes.cuh
//   For one channel and one filter row, eight neighbouring outputs are a banded product: with
//     A[i, k] = x[row, 8i + k - s - PL],   B[k, j] = w[k - j - s] (zero outside of the filter),   C[i, j] = y[row, 8i +
//     j]
//   one m16n8k16 does a filter row for 16 groups of eight outputs, wherever they are. s in {0, 1} makes k even where
//   x is, so that a lane reads A from shared memory as words, without conversion.
//   Zeros of the band times an Inf or NaN are NaN, also where the filter doesn't reach: sums that are not finite are
//   computed again, product by product.
#pragma once
#include "volume_tiles.cuh"

namespace dwconv {

template <class C>
struct Band {
    static constexpr int kShift = Volume<C>::kOffset % 2;  // s
    static_assert(!C::kMatrix || C::kStrideW == 1,
                  "kMatrix needs a stride of 1 along columns: the band is one of taps");
    static_assert(!C::kMatrix || 7 + kShift + (C::kFilterW - 1) * C::kDilationW < 16,
                  "kMatrix: a filter row is 16 columns");
};

#ifdef DWCONV_EMULATOR
// C += A * B from the lanes' fragments, whose layout is the instruction's.
template <class T>
__device__ __forceinline__ void multiply_matrices(float (&c)[4][1], const unsigned (&a)[4], const uint2& b) {
    const unsigned lane = threadIdx.x % 32;
    const auto element = [](unsigned word, int half) {
        T value;
        value.bits = static_cast<unsigned short>(word >> 16 * half);
        return static_cast<float>(value);
    };
    for (unsigned pair = 0; pair < 8; ++pair) {  // of columns of A and rows of B
        unsigned rows[2], columns[2];
        for (int i = 0; i < 2; ++i) {
            const unsigned upper = __shfl_sync(0xffffffffu, a[i], lane / 4 * 4 + pair % 4);
            const unsigned lower = __shfl_sync(0xffffffffu, a[2 + i], lane / 4 * 4 + pair % 4);
            rows[i] = pair < 4 ? upper : lower;
            const unsigned first = __shfl_sync(0xffffffffu, b.x, (lane % 4 * 2 + i) * 4 + pair % 4);
            const unsigned second = __shfl_sync(0xffffffffu, b.y, (lane % 4 * 2 + i) * 4 + pair % 4);
            columns[i] = pair < 4 ? first : second;
        }
        for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half) c[i][0] += element(rows[i / 2], half) * element(columns[i % 2], half);
    }
}
#else
template <class T>
__device__ __forceinline__ void multiply_matrices(float (&c)[4][1], const unsigned (&a)[4], const uint2& b);
template <>
__device__ __forceinline__ void multiply_matrices<Half>(float (&c)[4][1], const unsigned (&a)[4], const uint2& b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0][0]), "+f"(c[1][0]), "+f"(c[2][0]), "+f"(c[3][0])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
template <>
__device__ __forceinline__ void multiply_matrices<BFloat16>(float (&c)[4][1], const unsigned (&a)[4], const uint2& b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0][0]), "+f"(c[1][0]), "+f"(c[2][0]), "+f"(c[3][0])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
#endif

// A lane's part of the band of a filter row: taps k - n - s for k = 2t, 2t + 1 and 2t + 8, 2t + 9 of column n.
template <class C>
__device__ __forceinline__ uint2 band_of(const typename C::Element* row, unsigned lane) {
    unsigned words[2] = {0, 0};
    const int n = lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int distance = static_cast<int>(lane % 4) * 2 + i / 2 * 8 + i % 2 - n - Band<C>::kShift;
        if (is_tap(distance, C::kDilationW, C::kFilterW))
            words[i / 2] |= static_cast<unsigned>(load_one(row + distance / C::kDilationW).bits) << (i % 2 * 16);
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
                multiply_matrices<typename C::Element>(own.sums[slot_of<C>(age, phase)][m], a[m], band);
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
                2 * (pair + Volume<C>::kOffset - Band<C>::kShift + (exists ? in_row * C::kPitch + column : 0));
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

// One sum, product by product, from x itself.
template <class C>
__device__ __forceinline__ float exact_sum(const typename C::Element* x, const typename C::Element* filter, float sum,
                                           const Sizes& sizes, int depth, int row, int column) {
#pragma unroll 1
    for (int tap = 0; tap < Volume<C>::kTaps; ++tap) {
        const int t = tap / (C::kFilterH * C::kFilterW), u = tap / C::kFilterW % C::kFilterH, v = tap % C::kFilterW;
        const int d = depth * C::kStrideD - C::kPadFront + t * C::kDilationD;
        const int i = row * C::kStrideH - C::kPadTop + u * C::kDilationH;
        const int j = column * C::kStrideW - C::kPadLeft + v * C::kDilationW;
        if (d < 0 || d >= sizes.in_d || i < 0 || i >= sizes.in_h || j < 0 || j >= sizes.in_w) continue;
        const long long at = d * sizes.x_depth + i * sizes.x_row + j * sizes.x_column;
        sum += static_cast<float>(load_one(filter + tap)) * static_cast<float>(load_one(x + at));
    }
    return sum;
}

// Stores the outputs of a finished plane, `depth`; tensors.y is its start, x that of its volume.
template <class C>
__device__ __forceinline__ void store_matrices(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                               const VolumeTiling& tiling, const VolumePlace& place,
                                               const Volume<C>& own, const typename C::Element* x, int depth,
                                               float bias, const float (&sums)[C::kRows][4][1],
                                               const ChannelValues<float>& values) {
    float checks[2] = {0, 0};  // NaN as soon as a sum is not finite
#pragma unroll
    for (int m = 0; m < C::kRows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int to = own.places[m][half];
            const float pair[2] = {sums[m][2 * half][0], sums[m][2 * half + 1][0]};
            checks[0] = fmaf(pair[0], 0.0f, checks[0]);
            checks[1] = fmaf(pair[1], 0.0f, checks[1]);
            if constexpr (C::kStoreVector == 2) {
                if (to >= 0) store_outputs<C, 2, 0>(tensors, to, pair, &values);
            } else {
                if (to >= 0) store_outputs<C, 1, 0>(tensors, to, pair, &values);
                if (to >= 0 && own.seconds >> (2 * m + half) & 1)
                    store_outputs<C, 1, 0>(tensors, to + 1, pair + 1, &values);
            }
        }
    if (checks[0] + checks[1] == 0.0f) return;
    unsigned wrong = 0;  // sums that are not finite, by their number
#pragma unroll
    for (int m = 0; m < C::kRows; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (own.places[m][e / 2] >= 0 && (e % 2 == 0 || own.seconds >> (2 * m + e / 2) & 1) &&
                !(sums[m][e][0] * 0.0f == 0.0f))
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
