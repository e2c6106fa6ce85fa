// sparse_bands.cuh: products of 16-bit elements on sparse tensor cores: a filter row of two channels as one matrix
//   Pixels stay as they lie in channels-last memory, pairs of neighbouring channels in a word. For two channels h, one
//   filter row, and groups n of neighbouring outputs o:
//     A[(h, o), (p, h')] = w[h, (p - SW*o - s) / DW] where h' = h and that is a tap, else 0
//     B[(p, h'), n]      = x[row(n), SW * column(n) + p - PL - s, h']
//     C[(h, o), n]       = y[row(n), column(n) + o, h]
//   Half of A is zeros by its shape: of four neighbouring columns (two pixels of two channels) each row has two. So an
//   m16n8k32 for sparse matrices takes them: 16 pixels of a filter row for 8 groups of up to eight outputs of two
//   channels. Sums are float32, products exact.
//   Zeros of A times an Inf or NaN are NaN, also where the filter doesn't reach: sums that are not finite are to be
//   computed again, product by product.
#pragma once
#include "bands.cuh"

namespace dwconv {

#ifdef DWCONV_EMULATOR
constexpr unsigned kPairsOfChannels = 0;  // nothing looks at it

// D = C + A * B from the lanes' fragments, whose layout is the instruction's. Element s of a row of A, without the
// zeros, belongs to columns 2 * s (rows 0 to 7) and 2 * s + 1 (rows 8 to 15).
template <class T>
__device__ __forceinline__ void multiply_sparse(float (&d)[4], const uint4& a, const unsigned (&b)[4],
                                                const float (&c)[4], unsigned = kPairsOfChannels) {
    float sums[4] = {c[0], c[1], c[2], c[3]};
    const unsigned lane = threadIdx.x % 32;
    const auto element = [](unsigned word, int half) {
        T value;
        value.bits = static_cast<unsigned short>(word >> 16 * half);
        return static_cast<float>(value);
    };
    for (unsigned s = 0; s < 16; ++s) {
        const unsigned from = lane / 4 * 4 + s % 8 / 2;
        const unsigned upper = __shfl_sync(0xffffffffu, s < 8 ? a.x : a.z, from);
        const unsigned lower = __shfl_sync(0xffffffffu, s < 8 ? a.y : a.w, from);
        for (unsigned e = 0; e < 2; ++e) {
            const unsigned pixel = __shfl_sync(0xffffffffu, b[s / 4], (lane % 4 * 2 + e) * 4 + s % 4);
            sums[e] += element(upper, s % 2) * element(pixel, 0);
            sums[2 + e] += element(lower, s % 2) * element(pixel, 1);
        }
    }
    for (int e = 0; e < 4; ++e) d[e] = sums[e];
}
#else
// Of every four columns, rows 0 to 7 have the first and the third, rows 8 to 15 the second and the fourth.
constexpr unsigned kPairsOfChannels = 0xdddd8888u;

#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define DWCONV_SPARSE "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define DWCONV_SPARSE "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
#define DWCONV_SPARSE_OPERANDS "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%12,%13,%14,%15}, %16, 0x0;"

// `pattern` is kPairsOfChannels, in a register that compilers needn't set for each product again.
template <class T>
__device__ __forceinline__ void multiply_sparse(float (&d)[4], const uint4& a, const unsigned (&b)[4],
                                                const float (&c)[4], unsigned pattern = kPairsOfChannels);
template <>
__device__ __forceinline__ void multiply_sparse<Half>(float (&d)[4], const uint4& a, const unsigned (&b)[4],
                                                      const float (&c)[4], unsigned pattern) {
    asm(DWCONV_SPARSE "f16.f16.f32 " DWCONV_SPARSE_OPERANDS
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]), "r"(pattern));
}
template <>
__device__ __forceinline__ void multiply_sparse<BFloat16>(float (&d)[4], const uint4& a, const unsigned (&b)[4],
                                                          const float (&c)[4], unsigned pattern) {
    asm(DWCONV_SPARSE "bf16.bf16.f32 " DWCONV_SPARSE_OPERANDS
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]), "r"(pattern));
}
#endif

// A zero that the compiler doesn't know to be one.
__device__ __forceinline__ unsigned unknown_zero() {
    unsigned zero = 0;
#ifndef DWCONV_EMULATOR
    asm volatile("mov.u32 %0, %%nsmid; shr.u32 %0, %0, 31;" : "=r"(zero));
#endif
    return zero;
}

// The same word in a register of its own, where the product wants it: ptxas would rather copy it again for each
// product. `number` tells copies of a word apart.
__device__ __forceinline__ unsigned another(unsigned word, unsigned zero, int number) {
    return number == 0 ? word ^ zero : number == 1 ? word + zero : number == 2 ? word - zero : word | zero;
}

// The matrices of a filter. C::kGroup: outputs of a group; C::kLead: pixels of shared memory in front of the input's
// first one.
template <class C>
struct SparseBand {
    static constexpr int kShift = C::kLead - C::kPadLeft;            // s; negative where the padding isn't kept
    static constexpr int kSteps = C::kSteps;                         // products that a filter row takes, 16 pixels each
    static constexpr int kLast = (C::kFilterW - 1) * C::kDilationW;  // where the last tap is, in pixels from the first
    // Pixels that taps of a group reach: where images are taken as a whole, all of a row; padding isn't kept then.
    static constexpr int kReach = C::kWhole ? C::kColumns : (C::kGroup - 1) * C::kStrideW + kShift + kLast + 1;
    static_assert(kReach <= 16 * kSteps, "a row's products read all pixels that the taps reach");
    // A warp's filters in shared memory, as the words that A consists of: of two neighbouring pixels i and i + 1,
    // counted from the first tap, those of all channels and filter rows are an entry, i + 1 its number. All that reach
    // no tap are the entry kZero. Entries are an odd number of pairs of words apart, so that they begin in different
    // banks.
    static constexpr int kOwn = 2 * C::kPairs, kZero = kLast + 2;
    static constexpr int kEntry = C::kFilterH * kOwn + (C::kFilterH * kOwn / 2 % 2 == 0 ? 2 : 0);  // words
    static constexpr int kWords = ceil_div((kZero + 1) * kEntry, 4) * 4;                           // of a warp
};

// Writes a tap of the warp's o-th channel where it belongs in the words.
template <class C>
__device__ __forceinline__ void spread_tap(unsigned* words, int u, int v, int o, typename C::Element tap) {
    using B = SparseBand<C>;
    auto* const halves =
        reinterpret_cast<typename C::Element*>(words + v * C::kDilationW * B::kEntry + u * B::kOwn + o);
    halves[1] = tap;
    halves[2 * B::kEntry] = tap;
}

// A lane's part of A of all channels and filter rows, for pixels 16 * step onwards.
template <class C>
__device__ __forceinline__ void read_bands(uint4 (&bands)[C::kPairs][C::kFilterH][C::kSteps], int step,
                                           const unsigned* words) {
    using B = SparseBand<C>;
    const int lane = threadIdx.x % 32, column = 2 * (lane % 4) - C::kStrideW * smaller(lane / 4, C::kGroup - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int first = 16 * step + 8 * half;
        const int beyond = first + 2 * (lane % 4) - B::kReach;  // the image's columns, if it is taken as a whole
        const unsigned number = C::kWhole && beyond >= 0 ? B::kZero : first + column - B::kShift + 1;
        const uint2* const entry =
            reinterpret_cast<const uint2*>(words + min(number, static_cast<unsigned>(B::kZero)) * B::kEntry);
        const unsigned mask = beyond == -1 ? 0xffffu : 0xffffffffu;
#pragma unroll
        for (int u = 0; u < C::kFilterH; ++u)
#pragma unroll
            for (int p = 0; p < C::kPairs; ++p) {
                uint2 pair = first >= B::kReach ? uint2{0, 0} : entry[u * C::kPairs + p];
                if (C::kWhole && B::kReach % 2 != 0 && first < B::kReach && first + 8 > B::kReach) {
                    pair = {pair.x & mask, pair.y & mask};
                    keep(pair.x);
                    keep(pair.y);
                }
                (half == 0 ? bands[p][u][step].x : bands[p][u][step].z) = pair.x;
                (half == 0 ? bands[p][u][step].y : bands[p][u][step].w) = pair.y;
            }
    }
}

}  // namespace dwconv
