// taps_planes_nchw_sums.cuh: products of columns of x and of g on tensor cores, summed over images
//   For one channel, a row r of x, a row j of g, and up to sixteen images k:
//     A[m, k] = x[k, r, m];  B[k, n] = g[k, j, n];  C[m, n] = sum over k of A * B
//   C is added to the sums of the distance r - S * j + P = u * D, a row u of taps. All products that a tap has are in
//   it, and no other ones: dw[u, v] = sum over n of C[S * n - P + v * D, n], over columns that exist. Columns of
//   matrices that don't exist hold what lies behind the row; it stays in rows and columns of C that nobody reads.
//   Sums are float32, products exact.
#pragma once
#include "bands.cuh"
#include "taps_planes_nchw_stages.cuh"

namespace dwconv {

// C += A * B where A has eight columns: half of multiply_matrices.
#ifdef DWCONV_EMULATOR
template <class T>
__device__ __forceinline__ void multiply_eights(float (&c)[4], const unsigned (&a)[2], const unsigned (&b)[1]) {
    const unsigned whole[4] = {a[0], a[1], 0, 0};
    multiply_matrices<T>(c, whole, make_uint2(b[0], 0));
}
#else
template <class T>
__device__ __forceinline__ void multiply_eights(float (&c)[4], const unsigned (&a)[2], const unsigned (&b)[1]);
template <>
__device__ __forceinline__ void multiply_eights<Half>(float (&c)[4], const unsigned (&a)[2], const unsigned (&b)[1]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
template <>
__device__ __forceinline__ void multiply_eights<BFloat16>(float (&c)[4], const unsigned (&a)[2],
                                                          const unsigned (&b)[1]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
#endif
template <class T>
__device__ __forceinline__ void multiply_eights(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    multiply_matrices<T>(c, a, make_uint2(b[0], b[1]));
}

template <class C, int Tile>
struct TapsPlanesSums {
    using W = TapsPlanes<C, Tile>;
    using Element = typename C::Element;
    static constexpr int kEights = W::kEights;
    float sums[C::kOwn][W::kDistances][W::kXBlocks][W::kGBlocks][4];
    float bias[C::kOwn][W::kBias ? W::kGBlocks : 1][4];  // each row holds all sums of g
    unsigned x_from, g_from;                             // the lane's place in a stage, in bytes

    // `x_before`, `g_before`: bytes of a stage before the warp's planes.
    __device__ __forceinline__ TapsPlanesSums(unsigned x_before, unsigned g_before) {
        const unsigned lane = threadIdx.x % 32, image = lane % 4, i = lane / 4;
        unsigned of_x = 2 * i;
        if (W::kXWords) of_x = W::kXRows == 2 ? i / 4 * W::kXRowBytes + i % 4 * 4 : 4 * i;
        x_from = x_before + image * W::kXPitch + of_x;
        keep(x_from);
        g_from = W::kGAt + g_before + image * W::kGPitch + (W::kGWords ? 4 : 2) * i;
        keep(g_from);
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
#pragma unroll
            for (int distance = 0; distance < W::kDistances; ++distance)
#pragma unroll
                for (int of_x = 0; of_x < W::kXBlocks; ++of_x)
#pragma unroll
                    for (int of_g = 0; of_g < W::kGBlocks; ++of_g)
#pragma unroll
                        for (int e = 0; e < 4; ++e) sums[o][distance][of_x][of_g][e] = 0;
#pragma unroll
            for (int of_g = 0; of_g < (W::kBias ? W::kGBlocks : 1); ++of_g)
#pragma unroll
                for (int e = 0; e < 4; ++e) bias[o][of_g][e] = 0;
        }
    }

    // Elements of two images side by side, the second one `apart` bytes behind the first.
    __device__ __forceinline__ static unsigned two_of_one(const unsigned char* from, int apart) {
        return *reinterpret_cast<const unsigned short*>(from) |
               static_cast<unsigned>(*reinterpret_cast<const unsigned short*>(from + apart)) << 16;
    }
    // The same of two neighbouring columns.
    __device__ __forceinline__ static void two_of_two(unsigned& first, unsigned& second, const unsigned char* from,
                                                      int apart) {
        const unsigned one = *reinterpret_cast<const unsigned*>(from);
        const unsigned other = *reinterpret_cast<const unsigned*>(from + apart);
#ifdef DWCONV_EMULATOR
        first = (one & 0xffffu) | other << 16;
        second = one >> 16 | (other & 0xffff0000u);
#else
        first = __byte_perm(one, other, 0x5410);  // compilers need three instructions for the above
        second = __byte_perm(one, other, 0x7632);
#endif
    }

    // Columns of x of a row, or of it and the next one. `from`: the lane's place in the stage.
    __device__ __forceinline__ static void read_x(unsigned (&a)[W::kXBlocks][2 * kEights], const unsigned char* from,
                                                  int o, int row) {
        constexpr int kApart = 4 * W::kXPitch;
#pragma unroll
        for (int block = 0; block < W::kXBlocks; ++block)
#pragma unroll
            for (int eight = 0; eight < kEights; ++eight) {
                const unsigned char* const at =
                    from + (eight * 2 * kApart + o * W::kXPlaneBytes + row * W::kXRowBytes + 32 * block);
                unsigned &first = a[block][2 * eight], &second = a[block][2 * eight + 1];
                if (W::kXWords) {
                    two_of_two(first, second, at, kApart);
                } else {
                    first = two_of_one(at, kApart);
                    second = 0;
                    if (W::kXRows == 1)
                        second = two_of_one(at + 16, kApart);
                    else if (row + 1 < C::kHeight)
                        second = two_of_one(at + W::kXRowBytes, kApart);
                }
            }
    }

    // A row of g, which is added to the bias, too.
    __device__ __forceinline__ void read_g(unsigned (&b)[W::kGBlocks][kEights], const unsigned char* from, int o,
                                           int row) {
        constexpr int kApart = 4 * W::kGPitch;
#pragma unroll
        for (int eight = 0; eight < kEights; ++eight) {
            const unsigned char* const at = from + (eight * 2 * kApart + o * W::kGPlaneBytes + row * W::kGRowBytes);
#pragma unroll
            for (int block = 0; block < W::kGBlocks; block += W::kGWords ? 2 : 1) {
                if constexpr (W::kGWords)
                    two_of_two(b[block][eight], b[block + 1][eight], at + 16 * block, kApart);
                else
                    b[block][eight] = two_of_one(at + 16 * block, kApart);
            }
        }
        if constexpr (W::kBias) {
            const unsigned two = rounded_pair<Element>(1.0f, 1.0f);
            unsigned ones[2 * kEights];
#pragma unroll
            for (int k = 0; k < 2 * kEights; ++k) ones[k] = two;
#pragma unroll
            for (int block = 0; block < W::kGBlocks; ++block) multiply_eights<Element>(bias[o][block], ones, b[block]);
        }
    }

    // The row of x from which on row j of g is needed.
    __device__ __forceinline__ static constexpr int needed_from(int j) {
        const int least = larger(0, W::kStepA * j - W::kBefore - (W::kXRows - 1));
        return up(least, W::kXRows);
    }

    // Adds all products of a stage, `stage` bytes behind the start of shared memory.
    __device__ __forceinline__ void add(unsigned stage) {
        unsigned x_at = stage + x_from, g_at = stage + g_from;
        keep(x_at);
        keep(g_at);
        const unsigned char* const in_x = shared_memory<unsigned char>() + x_at;
        const unsigned char* const in_g = shared_memory<unsigned char>() + g_at;
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
            unsigned g[C::kOutHeight][W::kGBlocks][kEights];
#pragma unroll
            for (int row = 0; row <= W::kLastRow; row += W::kXRows) {
                unsigned x[W::kXBlocks][2 * kEights];
                read_x(x, in_x, o / C::kMultiplier, row);
#pragma unroll
                for (int j = 0; j < C::kOutHeight; ++j) {
                    if (needed_from(j) == row) read_g(g[j], in_g, o, j);
                    const int distance = row - W::kStepA * j + W::kBefore;
                    if (!W::is_distance(distance)) continue;
#pragma unroll
                    for (int of_g = 0; of_g < W::kGBlocks; ++of_g)
#pragma unroll
                        for (int of_x = 0; of_x < W::kXBlocks; ++of_x)
                            if (W::blocks_meet(of_x, of_g))
                                multiply_eights<Element>(sums[o][distance - W::kFirstDistance][of_x][of_g], x[of_x],
                                                         g[j][of_g]);
                }
            }
            if constexpr (W::kBias) {
#pragma unroll
                for (int j = 0; j < C::kOutHeight; ++j)
                    if (needed_from(j) > W::kLastRow) read_g(g[j], in_g, o, j);
            }
        }
    }

    // Writes the sums of row u of taps to [kWidth][kPitch] floats, by columns of x and of g.
    static constexpr int kPitch = C::kOutWidth | 1, kMatrix = C::kWidth * kPitch;
    template <int Row, bool Adds>
    __device__ __forceinline__ void spread(float* matrix, int o, int distance) const {
        const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
        for (int of_x = 0; of_x < W::kXBlocks; ++of_x)
#pragma unroll
            for (int of_g = 0; of_g < W::kGBlocks; ++of_g)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int column = W::x_column(of_x, e / 2, lane / 4);
                    const int g_column = W::g_column(of_g, lane % 4 * 2 + e % 2);
                    if (!W::blocks_meet(of_x, of_g) || W::x_row(e / 2, lane / 4) != Row || column >= C::kWidth ||
                        g_column >= C::kOutWidth)
                        continue;
                    float& to = matrix[column * kPitch + g_column];
                    const float sum =
                        W::is_distance(distance)
                            ? sums[o][W::is_distance(distance) ? distance - W::kFirstDistance : 0][of_x][of_g][e]
                            : 0.0f;
                    to = Adds ? to + sum : sum;
                }
    }

    // Passes the sums of the warp's channels to found(index, sum): index = tap * channels of the block + channel; the
    // bias is behind the last tap. `scratch` has room for all sums of the block, then for kSlab rows of taps of each
    // warp.
    template <class Found>
    __device__ __forceinline__ void finish(float* scratch, const Found& found) const {
        constexpr int kTapRows = C::kOwn * C::kTapsA;  // of all channels
        const int lane = static_cast<int>(threadIdx.x % 32), channel = static_cast<int>(threadIdx.x / 32) * C::kOwn;
        float* const totals = scratch + channel;
        float* const own = scratch + W::kCount + threadIdx.x / 32 * (C::kSlab * kMatrix);
#pragma unroll
        for (int first = 0; first < kTapRows; first += C::kSlab) {
            const int end = smaller(first + C::kSlab, kTapRows);
            __syncwarp();
#pragma unroll
            for (int row = first; row < end; ++row)
                spread<0, false>(own + (row - first) * kMatrix, row / C::kTapsA, row % C::kTapsA * W::kApartA);
            __syncwarp();
            if constexpr (W::kXRows == 2) {
#pragma unroll
                for (int row = first; row < end; ++row)
                    if (W::is_distance(row % C::kTapsA * W::kApartA - 1))
                        spread<1, true>(own + (row - first) * kMatrix, row / C::kTapsA,
                                        row % C::kTapsA * W::kApartA - 1);
                __syncwarp();
            }
#pragma unroll 1
            for (int index = lane; index < (end - first) * C::kTapsB; index += 32) {
                const int of_slab = index / C::kTapsB, v = index - of_slab * C::kTapsB;
                const int o = (first + of_slab) / C::kTapsA, u = first + of_slab - o * C::kTapsA;
                const float* const from = own + of_slab * kMatrix;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < C::kOutWidth; ++n) {
                    const int column = n * W::kStepB - W::kPadB + v * W::kDilationB;
                    if (static_cast<unsigned>(column) < static_cast<unsigned>(C::kWidth))
                        sum += from[column * kPitch + n];
                }
                totals[(u * C::kTapsB + v) * W::kBlockChannels + o] = sum;
            }
        }
        if constexpr (C::kHasBias) {
            float of_lane = 0;
            if constexpr (W::kBias) {
#pragma unroll
                for (int o = 0; o < C::kOwn; ++o) {
                    float sum = 0;
#pragma unroll
                    for (int block = 0; block < W::kGBlocks; ++block)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            if (W::g_column(block, lane % 4 * 2 + e) < C::kOutWidth) sum += bias[o][block][e];
                    sum = sum_of_four(sum);
                    if (lane == o) of_lane = sum;
                }
            }
            if (lane < C::kOwn) totals[C::kTapsA * C::kTapsB * W::kBlockChannels + lane] = of_lane;
        }
        find_totals<W>(scratch, found);
    }
};

}  // namespace dwconv
