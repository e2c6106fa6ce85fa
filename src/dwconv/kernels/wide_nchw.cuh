// wide_nchw.cuh: depthwise convolution, channels first, filters too large for registers: one input row at a time
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]     float32 sum
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   A group of `lanes` threads makes kRows output rows of one strip: lanes * kSlots * kVector columns. It takes the
//   input rows from top to bottom, kAhead in flight, and adds each to all output rows that read it.
//   shared memory: the filters of the planes that a block works on, rows padded to 16 bytes, kTaps elements a plane
//   grid.x = ceil(planes * column strips * row strips / groups in a block)
//   least DRAM traffic: x + w + y, once each; halo rows between groups come from L1 and L2
#pragma once
#include "strips.cuh"

namespace dwconv {

struct WideNchwTiling {
    StripTiling strips;
    unsigned block_planes;  // planes that the groups of one block belong to, at most
};

template <class C>
struct WideFilter {
    static constexpr int kRow = ceil_div(C::kFilterW, 4) * 4;  // elements of a padded row
    static constexpr int kTaps = C::kFilterH * kRow;
    static constexpr int kChunk = smaller(C::kFilterW, 16);  // taps of a row that are in registers at a time
};

// Copies the filters of the block's planes to shared memory, zeros into the padding, and waits for it.
template <class C, class Sum>
__device__ __forceinline__ void share_filters(const typename C::Element* w, Sum* filters, unsigned first_plane,
                                              const Sizes& sizes, const WideNchwTiling& tiling) {
    using Filter = WideFilter<C>;
    for (unsigned at = threadIdx.x; at < tiling.block_planes * Filter::kTaps; at += C::kThreads) {
        const unsigned plane = first_plane + at / Filter::kTaps;
        const unsigned u = at % Filter::kTaps / Filter::kRow, v = at % Filter::kRow;
        const FastDivisor& channels = tiling.strips.out_channels;
        const long long channel = plane - channels.quotient(plane) * channels.divisor;
        const bool exists = v < C::kFilterW && plane < sizes.planes;
        filters[at] = exists ? static_cast<Sum>(__ldg(w + (channel * C::kFilterH + u) * C::kFilterW + v)) : Sum(0);
    }
    __syncthreads();
}

// Adds input row r (from the first that the group reads) to the output rows that read it.
template <class C, class Sum>
__device__ __forceinline__ void add_row(const StripRow<C>& row, int r, const StripPlace& place, const Sum* filter,
                                        Sum (&sums)[C::kRows][C::kSlots][C::kVector]) {
    using Columns = StripColumns<C>;
    using Filter = WideFilter<C>;
    constexpr int kSpan = (C::kVector - 1) * C::kStrideW + (Filter::kChunk - 1) * C::kDilationW + 1;
#pragma unroll
    for (int first = 0; first < C::kFilterW; first += Filter::kChunk) {
        const int count = smaller(Filter::kChunk, C::kFilterW - first);
        Sum window[C::kSlots][kSpan];
#pragma unroll
        for (int s = 0; s < C::kSlots; ++s)
#pragma unroll
            for (int k = 0; k < kSpan; ++k)
                if (first * C::kDilationW + k < Columns::kSpan && Columns::reads(first * C::kDilationW + k))
                    window[s][k] =
                        static_cast<Sum>(column_of<C>(row, s, Columns::kFirst + first * C::kDilationW + k, place));
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) {
            const int below = r - i * C::kStrideH;  // = u * kDilationH where output row i reads this row
            if (!is_tap(below, C::kDilationH, C::kFilterH)) continue;
            const Sum* taps = filter + below / C::kDilationH * Filter::kRow + first;
            Sum tap[ceil_div(Filter::kChunk, 4) * 4];
#pragma unroll
            for (int v = 0; v < count; v += 4) load_shared_4(taps + v, tap + v);
#pragma unroll
            for (int v = 0; v < count; ++v)
#pragma unroll
                for (int s = 0; s < C::kSlots; ++s)
#pragma unroll
                    for (int o = 0; o < C::kVector; ++o)
                        sums[i][s][o] += tap[v] * window[s][o * C::kStrideW + v * C::kDilationW];
        }
    }
}

template <class C>
__device__ __forceinline__ void wide_nchw(const typename C::Element* x, const typename C::Element* w,
                                          const typename C::Element* b, typename C::Element* y, const Sizes& sizes,
                                          const WideNchwTiling& tiling) {
    using Columns = StripColumns<C>;
    using Sum = typename Accumulator<typename C::Element>::Type;
    constexpr int kInputRows = (C::kRows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1;
    static_assert(C::kThreads % 32 == 0, "kThreads must be whole warps: all lanes take part in shuffles");
    static_assert(Columns::kOwn % C::kLoadVector == 0, "kLoadVector must divide the columns a lane owns");
    static_assert(C::kVector % C::kStoreVector == 0, "kStoreVector must divide kVector");
    static_assert(C::kSlots == 1 || !C::kWholeRows, "kSlots must be 1 for whole rows: shuffles may reach past a group");

    const StripPlace place = strip_place<C>(tiling.strips);
    const unsigned first_group = (blockIdx.x * C::kThreads) >> tiling.strips.log2_lanes;
    const unsigned first_plane = tiling.strips.column_strips.quotient(tiling.strips.row_strips.quotient(first_group));
    Sum* filters = shared_memory<Sum>();
    share_filters<C>(w, filters, first_plane, sizes, tiling);
    const Sum* filter = filters + (place.plane - first_plane) * WideFilter<C>::kTaps;

    Sum sums[C::kRows][C::kSlots][C::kVector];
    start_sums<C>(b, place, sums);

    const int first_row = place.row * C::kStrideH - C::kPadTop;
    const int first = place.column * C::kStrideW + C::kColumnShift;
    const int in_w = static_cast<int>(sizes.in_w);
    const unsigned in_h = place.inside ? static_cast<unsigned>(sizes.in_h) : 0;
    const typename C::Element* line =
        x + place.image * sizes.x_image + place.channel / C::kMultiplier * sizes.x_channel + first;
    const auto is_inside = [&](int r) { return r < kInputRows && static_cast<unsigned>(first_row + r) < in_h; };
    StripRow<C> ahead[C::kAhead];
#pragma unroll
    for (int r = 0; r < C::kAhead; ++r)
        load_row<C>(line + (first_row + r) * sizes.x_row, is_inside(r), place, first, in_w, ahead[r]);
#pragma unroll 1
    for (int r = 0; r < kInputRows; ++r) {
        const StripRow<C> row = ahead[0];
#pragma unroll
        for (int k = 0; k + 1 < C::kAhead; ++k) ahead[k] = ahead[k + 1];
        const int next = r + C::kAhead;
        load_row<C>(line + (first_row + next) * sizes.x_row, is_inside(next), place, first, in_w, ahead[C::kAhead - 1]);
        // Rows of padding add nothing; a warp leaves them out if they are so for all of its groups.
        if (__any_sync(0xffffffffu, is_inside(r))) add_row<C>(row, r, place, filter, sums);
    }

    store_sums<C>(y, sizes, place, sums);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#ifndef DWCONV_CONSTANTS  // defaults that keep this file valid in an editor: 7x7 float32, aligned rows
#define DWCONV_ELEMENT float
#define DWCONV_FILTER_H 7
#define DWCONV_FILTER_W 7
#define DWCONV_STRIDE_H 1
#define DWCONV_STRIDE_W 1
#define DWCONV_PAD_TOP 3
#define DWCONV_PAD_LEFT 3
#define DWCONV_DILATION_H 1
#define DWCONV_DILATION_W 1
#define DWCONV_MULTIPLIER 1
#define DWCONV_HAS_BIAS 0
#define DWCONV_THREADS 128
#define DWCONV_SLOTS 1
#define DWCONV_VECTOR 4
#define DWCONV_ROWS 7
#define DWCONV_AHEAD 3
#define DWCONV_LOAD_VECTOR 4
#define DWCONV_STORE_VECTOR 4
#define DWCONV_COLUMN_SHIFT 0
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
    static constexpr int kThreads = DWCONV_THREADS;
    static constexpr int kSlots = DWCONV_SLOTS, kVector = DWCONV_VECTOR;
    static constexpr int kRows = DWCONV_ROWS, kAhead = DWCONV_AHEAD;
    static constexpr int kLoadVector = DWCONV_LOAD_VECTOR, kStoreVector = DWCONV_STORE_VECTOR;
    static constexpr int kColumnShift = DWCONV_COLUMN_SHIFT;
    static constexpr bool kWholeRows = DWCONV_WHOLE_ROWS;
};

using Tiling = dwconv::WideNchwTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, 1)
    dwconv_kernel(const Config::Element* x, const Config::Element* w, const Config::Element* b, Config::Element* y,
                  const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::wide_nchw<Config>(x, w, b, y, sizes, tiling);
}
