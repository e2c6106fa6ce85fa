// direct_nchw.cuh: depthwise convolution, channels first, any filter: a tile's rows wait in registers
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]     float32 sum
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   A group of `lanes` threads makes kRows output rows of one strip: lanes * kSlots * kVector columns.
//   grid.x = ceil(planes * column strips * row strips / groups in a block); row strips are neighbours in a block, so
//   that the halo rows between them meet in L1
//   least DRAM traffic: x + w + y, once each; halo rows between blocks come from L2
#pragma once
#include "strips.cuh"

namespace dwconv {

struct DirectNchwTiling {
    StripTiling strips;
};

// Which input rows the kRows output rows of a thread read, numbered from the first.
template <class C>
struct WindowRows {
    static constexpr int kCount = (C::kRows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1;

    __host__ __device__ static constexpr bool reads(int r) {
        for (int i = 0; i < C::kRows; ++i)
            if (is_tap(r - i * C::kStrideH, C::kDilationH, C::kFilterH)) return true;
        return false;
    }
};

// All rows that the thread reads are loaded before the first use: bytes in flight are what the speed depends on.
template <class C, class Sum>
__device__ __forceinline__ void sum_from_registers(const typename C::Element* plane, const typename C::Element* w,
                                                   const Sizes& sizes, const StripPlace& place,
                                                   Sum (&sums)[C::kRows][C::kSlots][C::kVector]) {
    using Columns = StripColumns<C>;
    using Rows = WindowRows<C>;
    const int first_row = place.row * C::kStrideH - C::kPadTop;
    const unsigned in_h = place.inside ? static_cast<unsigned>(sizes.in_h) : 0;
    const int first = place.column * C::kStrideW + C::kColumnShift;
    const typename C::Element* line = plane + first_row * sizes.x_row + first;
    StripRow<C> rows[Rows::kCount];
#pragma unroll
    for (int r = 0; r < Rows::kCount; ++r, line += sizes.x_row)
        if (Rows::reads(r))
            load_row<C>(line, static_cast<unsigned>(first_row + r) < in_h, place, first, static_cast<int>(sizes.in_w),
                        rows[r]);

    Sum filter[C::kFilterH][C::kFilterW];
#pragma unroll
    for (int u = 0; u < C::kFilterH; ++u)
#pragma unroll
        for (int v = 0; v < C::kFilterW; ++v) filter[u][v] = static_cast<Sum>(__ldg(w + u * C::kFilterW + v));

#pragma unroll
    for (int r = 0; r < Rows::kCount; ++r) {
        if (!Rows::reads(r)) continue;
#pragma unroll
        for (int s = 0; s < C::kSlots; ++s) {
            Sum window[Columns::kSpan];
#pragma unroll
            for (int k = 0; k < Columns::kSpan; ++k)
                if (Columns::reads(k))
                    window[k] = static_cast<Sum>(column_of<C>(rows[r], s, Columns::kFirst + k, place));
#pragma unroll
            for (int i = 0; i < C::kRows; ++i) {
                const int below = r - i * C::kStrideH;  // = u * kDilationH where output row i reads this row
                if (!is_tap(below, C::kDilationH, C::kFilterH)) continue;
#pragma unroll
                for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
                    for (int o = 0; o < C::kVector; ++o)
                        sums[i][s][o] += filter[below / C::kDilationH][v] * window[o * C::kStrideW + v * C::kDilationW];
            }
        }
    }
}

// Filters too large for that: a tap at a time, straight from L1.
template <class C, class Sum>
__device__ __forceinline__ void sum_tap_by_tap(const typename C::Element* plane, const typename C::Element* w,
                                               const Sizes& sizes, const StripPlace& place,
                                               Sum (&sums)[C::kRows][C::kSlots][C::kVector]) {
    static_assert(C::kVector == 1, "kVector must be 1 tap by tap: neighbouring lanes read neighbouring columns");
    if (!place.inside) return;
    const int in_h = static_cast<int>(sizes.in_h), in_w = static_cast<int>(sizes.in_w);
    const int first_row = place.row * C::kStrideH - C::kPadTop;
    const int first_column = place.column * C::kStrideW - C::kPadLeft;
#pragma unroll 1
    for (int u = 0; u < C::kFilterH; ++u)
#pragma unroll 4
        for (int v = 0; v < C::kFilterW; ++v) {
            const Sum tap = static_cast<Sum>(__ldg(w + u * C::kFilterW + v));
#pragma unroll
            for (int i = 0; i < C::kRows; ++i) {
                const int row = first_row + i * C::kStrideH + u * C::kDilationH;
                if (static_cast<unsigned>(row) >= static_cast<unsigned>(in_h)) continue;
                const typename C::Element* line = plane + row * sizes.x_row;
#pragma unroll
                for (int s = 0; s < C::kSlots; ++s) {
                    const int column = first_column + s * (place.lanes * C::kStrideW) + v * C::kDilationW;
                    if (static_cast<unsigned>(column) < static_cast<unsigned>(in_w))
                        sums[i][s][0] += tap * static_cast<Sum>(__ldg(line + column));
                }
            }
        }
}

template <class C>
__device__ __forceinline__ void direct_nchw(const typename C::Element* x, const typename C::Element* w,
                                            const typename C::Element* b, typename C::Element* y, const Sizes& sizes,
                                            const DirectNchwTiling& tiling) {
    using Columns = StripColumns<C>;
    using Sum = typename Accumulator<typename C::Element>::Type;
    static_assert(C::kThreads % 32 == 0, "kThreads must be whole warps: all lanes take part in shuffles");
    static_assert(Columns::kOwn % C::kLoadVector == 0, "kLoadVector must divide the columns a lane owns");
    static_assert(C::kVector % C::kStoreVector == 0, "kStoreVector must divide kVector");
    static_assert(!C::kWholeWindow || Columns::kLeftLanes + Columns::kRightLanes <= 32,
                  "the halo is loaded by distinct lanes: use wider vectors");

    const StripPlace place = strip_place<C>(tiling.strips);
    const typename C::Element* plane =
        x + place.image * sizes.x_image + place.channel / C::kMultiplier * sizes.x_channel;
    const typename C::Element* taps = w + place.channel * (C::kFilterH * C::kFilterW);
    Sum sums[C::kRows][C::kSlots][C::kVector];
    start_sums<C>(b, place, sums);
    if constexpr (C::kWholeWindow)
        sum_from_registers<C>(plane, taps, sizes, place, sums);
    else
        sum_tap_by_tap<C>(plane, taps, sizes, place, sums);

    store_sums<C>(y, sizes, place, sums);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#ifndef DWCONV_CONSTANTS  // defaults that keep this file valid in an editor: 3x3 float32, aligned rows
#define DWCONV_ELEMENT float
#define DWCONV_FILTER_H 3
#define DWCONV_FILTER_W 3
#define DWCONV_STRIDE_H 1
#define DWCONV_STRIDE_W 1
#define DWCONV_PAD_TOP 1
#define DWCONV_PAD_LEFT 1
#define DWCONV_DILATION_H 1
#define DWCONV_DILATION_W 1
#define DWCONV_MULTIPLIER 1
#define DWCONV_HAS_BIAS 0
#define DWCONV_THREADS 256
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_SLOTS 1
#define DWCONV_VECTOR 4
#define DWCONV_ROWS 4
#define DWCONV_LOAD_VECTOR 4
#define DWCONV_STORE_VECTOR 4
#define DWCONV_COLUMN_SHIFT 0
#define DWCONV_WHOLE_WINDOW 1
#define DWCONV_WHOLE_ROWS 0
#endif

struct Config {
    using Element = DWCONV_ELEMENT;
    static constexpr int kFilterH = DWCONV_FILTER_H, kFilterW = DWCONV_FILTER_W;
    static constexpr int kStrideH = DWCONV_STRIDE_H, kStrideW = DWCONV_STRIDE_W;
    static constexpr int kPadTop = DWCONV_PAD_TOP, kPadLeft = DWCONV_PAD_LEFT;
    static constexpr int kDilationH = DWCONV_DILATION_H, kDilationW = DWCONV_DILATION_W;
    static constexpr int kMultiplier = DWCONV_MULTIPLIER;
    static constexpr bool kHasBias = DWCONV_HAS_BIAS;
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kSlots = DWCONV_SLOTS, kVector = DWCONV_VECTOR;
    static constexpr int kRows = DWCONV_ROWS;
    static constexpr int kLoadVector = DWCONV_LOAD_VECTOR, kStoreVector = DWCONV_STORE_VECTOR;
    static constexpr int kColumnShift = DWCONV_COLUMN_SHIFT;
    static constexpr bool kWholeWindow = DWCONV_WHOLE_WINDOW, kWholeRows = DWCONV_WHOLE_ROWS;
};

using Tiling = dwconv::DirectNchwTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const Config::Element* x, const Config::Element* w, const Config::Element* b, Config::Element* y,
                  const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::direct_nchw<Config>(x, w, b, y, sizes, tiling);
}
