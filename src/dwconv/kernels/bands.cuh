// bands.cuh: products of 16-bit elements on tensor cores: a filter row as a banded matrix
//   For one channel and one filter row, eight neighbouring outputs are a product of a matrix and a band:
//     A[i, k] = x[row(i), SW * column(i) + k - PL - s],   B[k, n] = w[(k - SW*n - s) / DW] (zero where that is no tap),
//     C[i, n] = y[row(i), column(i) + n]
//   so an m16n8k16 does 16 columns of a filter row for 16 groups of eight outputs, wherever they are. s makes the
//   rows of A start where shared memory is aligned. Sums are float32, products exact.
//   Zeros of the band times an Inf or NaN are NaN, also where the filter doesn't reach: sums that are not finite are
//   to be computed again, product by product (exact_sum).
#pragma once
#include "epilogue.cuh"

namespace dwconv {

#ifdef DWCONV_EMULATOR
// C += A * B from the lanes' fragments, whose layout is the instruction's.
template <class T>
__device__ __forceinline__ void multiply_matrices(float (&c)[4], const unsigned (&a)[4], const uint2& b) {
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
            for (int half = 0; half < 2; ++half) c[i] += element(rows[i / 2], half) * element(columns[i % 2], half);
    }
}

// A's fragments from shared memory: this lane's row is that of group lane % 16, its columns 8 * (lane / 16) onwards;
// `offset` counts bytes from `memory` on and is a multiple of 16.
__device__ __forceinline__ void load_matrices(unsigned (&a)[4], const void* memory, int offset) {
    const unsigned lane = threadIdx.x % 32;
    for (unsigned m = 0; m < 4; ++m) {
        const int row = __shfl_sync(0xffffffffu, offset, m * 8 + lane / 4);
        a[m] = *reinterpret_cast<const unsigned*>(static_cast<const unsigned char*>(memory) + row + lane % 4 * 4);
    }
}
#else
template <class T>
__device__ __forceinline__ void multiply_matrices(float (&c)[4], const unsigned (&a)[4], const uint2& b);
template <>
__device__ __forceinline__ void multiply_matrices<Half>(float (&c)[4], const unsigned (&a)[4], const uint2& b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
template <>
__device__ __forceinline__ void multiply_matrices<BFloat16>(float (&c)[4], const unsigned (&a)[4], const uint2& b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ void load_matrices(unsigned (&a)[4], const void* memory, int offset) {
    const unsigned row = static_cast<unsigned>(__cvta_generic_to_shared(memory)) + offset;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(row)
                 : "memory");
}
#endif

// The bands of a filter. C::kLead: columns of shared memory in front of the input's first one.
template <class C>
struct Band {
    static constexpr int kShift = C::kLead - C::kPadLeft;                                            // s
    static constexpr int kReach = 7 * C::kStrideW + kShift + (C::kFilterW - 1) * C::kDilationW + 1;  // columns of A
    static constexpr int kSteps = ceil_div(kReach, 16);  // products that a filter row takes
    // A filter row in shared memory: tap v at kOrigin + v * DW, zeros around. Row k of column n is at k + SW * (7 - n).
    static constexpr int kOrigin = 7 * C::kStrideW + kShift;
    static constexpr int kPitch = ceil_div(16 * kSteps + 7 * C::kStrideW, 8) * 8;
    static constexpr int kFilterElements = C::kFilterH * kPitch;
    static_assert(kShift >= 0, "kLead must cover the padding: a row of A starts at its first group");
};

// Spreads the taps of one filter over a warp's `rows` of shared memory, with zeros around.
template <class C>
__device__ __forceinline__ void spread_filter(const typename C::Element* filter, typename C::Element* rows) {
    using B = Band<C>;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int at = lane; at < B::kFilterElements / 8; at += 32) reinterpret_cast<uint4*>(rows)[at] = uint4{0, 0, 0, 0};
    __syncwarp();
#pragma unroll
    for (int tap = lane; tap < C::kFilterH * C::kFilterW; tap += 32)
        rows[tap / C::kFilterW * B::kPitch + B::kOrigin + tap % C::kFilterW * C::kDilationW] =
            load_one(filter + tap_at<C>(tap));
    __syncwarp();
}

// A lane's part of the band of filter row u, for columns 16 * step onwards of A.
template <class C>
__device__ __forceinline__ uint2 band_of(const typename C::Element* rows, int u, int step) {
    const unsigned lane = threadIdx.x % 32;
    const typename C::Element* at =
        rows + u * Band<C>::kPitch + 16 * step + lane % 4 * 2 + C::kStrideW * (7 - lane / 4);
    const auto pair = [at](int k) { return at[k].bits | static_cast<unsigned>(at[k + 1].bits) << 16; };
    return make_uint2(pair(0), pair(8));
}

// One sum, product by product, from x itself: `x` is the start of its plane or volume, `filter` of its taps. Turned:
// what C calls a row is a column in memory, of x and of the filter.
template <class C, bool Turned = false>
__device__ __forceinline__ float exact_sum(const typename C::Element* x, const typename C::Element* filter, float sum,
                                           const Sizes& sizes, int depth, int row, int column) {
#pragma unroll 1
    for (int tap = 0; tap < C::kFilterD * C::kFilterH * C::kFilterW; ++tap) {
        const int t = tap / (C::kFilterH * C::kFilterW);
        const int u = Turned ? tap % C::kFilterH : tap / C::kFilterW % C::kFilterH;
        const int v = Turned ? tap / C::kFilterH % C::kFilterW : tap % C::kFilterW;
        const int d = depth * C::kStrideD - C::kPadFront + t * C::kDilationD;
        const int i = row * C::kStrideH - C::kPadTop + u * C::kDilationH;
        const int j = column * C::kStrideW - C::kPadLeft + v * C::kDilationW;
        if (d < 0 || d >= sizes.in_d || i < 0 || i >= sizes.in_h || j < 0 || j >= sizes.in_w) continue;
        const long long at = d * sizes.x_depth + i * sizes.x_row + j * sizes.x_column;
        sum += static_cast<float>(load_one(filter + tap_at<C>(tap))) * static_cast<float>(load_one(x + at));
    }
    return sum;
}

// The sums of kTiles * 16 groups of eight outputs, each kRows rows high. offsets: where in shared memory, in bytes,
// this lane's row of A is for the first input row of each tile (see load_matrices); row_bytes: from row to row.
template <class C>
__device__ __forceinline__ void sum_groups(float (&sums)[C::kTiles][C::kRows][4], const void* image,
                                           const int (&offsets)[C::kTiles], int row_bytes,
                                           const uint2 (&bands)[C::kFilterH][Band<C>::kSteps]) {
#pragma unroll
    for (int r = 0; r < (C::kRows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1; ++r) {
        bool is_read = false;
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) is_read = is_read || is_tap(r - i * C::kStrideH, C::kDilationH, C::kFilterH);
        if (!is_read) continue;
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile)
#pragma unroll
            for (int step = 0; step < Band<C>::kSteps; ++step) {
                unsigned a[4];
                load_matrices(a, image, offsets[tile] + r * row_bytes + 32 * step);
#pragma unroll
                for (int i = 0; i < C::kRows; ++i) {
                    const int below = r - i * C::kStrideH;  // = u * kDilationH where output row i reads this row
                    if (is_tap(below, C::kDilationH, C::kFilterH))
                        multiply_matrices<typename C::Element>(sums[tile][i], a, bands[below / C::kDilationH][step]);
                }
            }
    }
}

}  // namespace dwconv
