// direct_nchw.cuh: depthwise convolution, channels first, any filter: a tile's rows wait in registers
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]     float32 sum
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   A thread makes kRows x (kSlots * kVector) outputs: kVector neighbouring columns in each slot. `lanes` threads make
//   one strip of columns; slots are interleaved over them, so that loads and stores of neighbours are contiguous.
//   grid.x = ceil(planes * column strips * row strips * lanes / kThreads); threads are numbered by lane fastest, then
//   by row strip, so that the halo rows between row strips meet in L1; then by column strip and plane
//   least DRAM traffic: x + w + y, once each; halo columns come from L1, halo rows between blocks from L2
#pragma once
#include "epilogue.cuh"
#include "warp_rows.cuh"

namespace dwconv {

struct DirectNchwTiling {
    FastDivisor lanes;          // of one strip
    FastDivisor row_strips;     // of one column strip
    FastDivisor column_strips;  // of one plane
    FastDivisor out_channels;   // of one image
    unsigned strips;            // planes * column strips * row strips
};

// The place of a thread: its plane, and the first of its outputs.
struct DirectNchwPlace {
    long long image, channel;  // of the output
    int row, column;           // column: in slot 0
    int slot_columns;          // output columns from one slot to the next
};

// Which input rows the kRows output rows of a thread read, numbered from the first.
template <class C>
struct ReadRows {
    static constexpr int kCount = (C::kRows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1;

    __host__ __device__ static constexpr bool reads(int r) {
        for (int i = 0; i < C::kRows; ++i)
            if (is_tap(r - i * C::kStrideH, C::kDilationH, C::kFilterH)) return true;
        return false;
    }
};

// Stores one finished output row of one slot; `at` is the offset in y of its first output, which has number `column`.
template <class C, class Sum>
__device__ __forceinline__ void store_slot(const Tensors<typename C::Element>& tensors, long long at, int column,
                                           int out_w, const ChannelValues<Sum>& values, const Sum (&sums)[C::kVector]) {
    if constexpr (C::kWarpStores) {
        store_warp_row<C>(tensors, at, column, out_w, values, sums);
    } else {
#pragma unroll
        for (int o = 0; o < C::kVector; o += C::kStoreVector)
            if (column + o < out_w) store_outputs<C, C::kStoreVector, 0>(tensors, at + o, &sums[o], &values);
    }
}

// All rows that the thread reads, or kAhead, are loaded before the first use: bytes in flight are what the speed
// depends on.
template <class C>
__device__ __forceinline__ void make_from_registers(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                                    const DirectNchwPlace& place, const typename C::Element* plane,
                                                    const typename C::Element* w, long long at) {
    using Columns = ReadColumns<C>;
    using Rows = ReadRows<C>;
    using Sum = typename Accumulator<typename C::Element>::Type;
    const int in_w = static_cast<int>(sizes.in_w), out_w = static_cast<int>(sizes.out_w);
    const unsigned in_h = static_cast<unsigned>(sizes.in_h);
    const int out_h = static_cast<int>(sizes.out_h);
    const int first_row = place.row * C::kStrideH - C::kPadTop, first = place.column * C::kStrideW;
    const int slot = place.slot_columns * C::kStrideW;
    const typename C::Element* line = plane + first_row * sizes.x_row + first;
    typename Selected<C::kWarpLoads, WarpRow<C>, SlotRow<C>>::Type rows[Rows::kCount][C::kSlots];
    constexpr int kAhead = C::kAhead > 0 ? smaller(C::kAhead, Rows::kCount) : Rows::kCount;
    const auto load_row = [&](int r) {
        if (Rows::reads(r))
#pragma unroll
            for (int s = 0; s < C::kSlots; ++s)
                rows[r][s].load(line + s * slot, static_cast<unsigned>(first_row + r) < in_h, first + s * slot, in_w);
        line += sizes.x_row;
    };
#pragma unroll
    for (int r = 0; r < kAhead; ++r) load_row(r);

    Sum filter[C::kFilterH][C::kFilterW];
#pragma unroll
    for (int u = 0; u < C::kFilterH; ++u)
#pragma unroll
        for (int v = 0; v < C::kFilterW; ++v)
            filter[u][v] = static_cast<Sum>(load_one(w + tap_at<C>(u * C::kFilterW + v)));

    const Sum bias = C::kHasBias ? static_cast<Sum>(load_one(tensors.b + place.channel)) : Sum(0);
    const auto values = channel_values<C>(tensors, place.channel);
    Sum sums[C::kRows][C::kSlots][C::kVector];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
        for (int s = 0; s < C::kSlots; ++s)
#pragma unroll
            for (int o = 0; o < C::kVector; ++o) sums[i][s][o] = bias;

#pragma unroll
    for (int r = 0; r < Rows::kCount; ++r) {
        if (r + kAhead < Rows::kCount) load_row(r + kAhead);
        if (!Rows::reads(r)) continue;
#pragma unroll
        for (int s = 0; s < C::kSlots; ++s) {
            if constexpr (C::kWarpLoads) rows[r][s].settle();
            Sum window[Columns::kSpan];
#pragma unroll
            for (int k = 0; k < Columns::kSpan; ++k)
                if (Columns::reads(k)) window[k] = rows[r][s].template column<Sum>(k);
            // Either column by column, or output row by output row, tap by tap: what the compiler makes of them
            // differs.
            constexpr int kSteps = C::kByColumn ? Columns::kSpan : 1;
#pragma unroll
            for (int k = 0; k < kSteps; ++k)
#pragma unroll
                for (int i = 0; i < C::kRows; ++i) {
                    const int below = r - i * C::kStrideH;  // = u * kDilationH where output row i reads this row
                    if (!is_tap(below, C::kDilationH, C::kFilterH)) continue;
                    const auto& taps = filter[below / C::kDilationH];
                    if constexpr (C::kByColumn) {
#pragma unroll
                        for (int o = 0; o < C::kVector; ++o)
                            if (is_tap(k - o * C::kStrideW, C::kDilationW, C::kFilterW))
                                sums[i][s][o] += taps[(k - o * C::kStrideW) / C::kDilationW] * window[k];
                    } else {
#pragma unroll
                        for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
                            for (int o = 0; o < C::kVector; ++o)
                                sums[i][s][o] += taps[v] * window[o * C::kStrideW + v * C::kDilationW];
                    }
                    if (k == kSteps - 1 && below == (C::kFilterH - 1) * C::kDilationH && place.row + i < out_h)
                        store_slot<C>(tensors,
                                      at + i * sizes.out_w + s * place.slot_columns,  // no later row is missing
                                      place.column + s * place.slot_columns, out_w, values, sums[i][s]);
                }
        }
    }
}

// Filters too large for that: a tap at a time, straight from L1.
template <class C>
__device__ __forceinline__ void make_tap_by_tap(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                                const DirectNchwPlace& place, const typename C::Element* plane,
                                                const typename C::Element* w, long long at) {
    using Sum = typename Accumulator<typename C::Element>::Type;
    static_assert(C::kVector == 1, "kVector must be 1 tap by tap: neighbouring lanes read neighbouring columns");
    const int in_h = static_cast<int>(sizes.in_h), in_w = static_cast<int>(sizes.in_w);
    const int first_row = place.row * C::kStrideH - C::kPadTop;
    const int first_column = place.column * C::kStrideW - C::kPadLeft;
    const Sum bias = C::kHasBias ? static_cast<Sum>(load_one(tensors.b + place.channel)) : Sum(0);
    Sum sums[C::kRows][C::kSlots][1];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
        for (int s = 0; s < C::kSlots; ++s) sums[i][s][0] = bias;
#pragma unroll 1
    for (int u = 0; u < C::kFilterH; ++u)
#pragma unroll 4
        for (int v = 0; v < C::kFilterW; ++v) {
            const Sum tap = static_cast<Sum>(load_one(w + tap_at<C>(u * C::kFilterW + v)));
#pragma unroll
            for (int i = 0; i < C::kRows; ++i) {
                const int row = first_row + i * C::kStrideH + u * C::kDilationH;
                if (static_cast<unsigned>(row) >= static_cast<unsigned>(in_h)) continue;
                const typename C::Element* line = plane + row * sizes.x_row;
#pragma unroll
                for (int s = 0; s < C::kSlots; ++s) {
                    const int column = first_column + s * (place.slot_columns * C::kStrideW) + v * C::kDilationW;
                    if (static_cast<unsigned>(column) < static_cast<unsigned>(in_w))
                        sums[i][s][0] += tap * static_cast<Sum>(load_one(line + column));
                }
            }
        }
    const auto values = channel_values<C>(tensors, place.channel);
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
        if (place.row + i < sizes.out_h)
#pragma unroll
            for (int s = 0; s < C::kSlots; ++s)
                store_slot<C>(tensors, at + i * sizes.out_w + s * place.slot_columns,
                              place.column + s * place.slot_columns, static_cast<int>(sizes.out_w), values, sums[i][s]);
}

template <class C>
__device__ __forceinline__ void direct_nchw(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const DirectNchwTiling& tiling) {
    static_assert(C::kVector * C::kStrideW % C::kLoadVector == 0, "kLoadVector must divide the columns between lanes");
    static_assert(C::kVector % C::kStoreVector == 0, "kStoreVector must divide kVector");
    static_assert(!(C::kWarpLoads || C::kWarpStores) || (C::kSlots == 1 && C::kWholeWindow),
                  "warps trade what all rows of a tile are loaded for");

    const unsigned thread = blockIdx.x * C::kThreads + threadIdx.x;
    const unsigned strip = tiling.lanes.quotient(thread);
    if (strip >= tiling.strips) return;
    const unsigned lanes = tiling.lanes.divisor, lane = thread - strip * lanes;
    const unsigned column_strip = tiling.row_strips.quotient(strip);
    const unsigned plane = tiling.column_strips.quotient(column_strip);
    const unsigned image = tiling.out_channels.quotient(plane);
    const unsigned strip_columns = lanes * (C::kSlots * C::kVector);
    DirectNchwPlace place;
    place.image = image;
    place.channel = plane - image * tiling.out_channels.divisor;
    place.row = (strip - column_strip * tiling.row_strips.divisor) * C::kRows;
    place.column = (column_strip - plane * tiling.column_strips.divisor) * strip_columns + lane * C::kVector;
    place.slot_columns = lanes * C::kVector;

    const typename C::Element* x =
        tensors.x + place.image * sizes.x_image + place.channel / C::kMultiplier * sizes.x_channel;
    const typename C::Element* w = tensors.w + place.channel * (C::kFilterH * C::kFilterW);
    const long long at = (plane * sizes.out_h + place.row) * sizes.out_w + place.column;
    if constexpr (C::kWholeWindow)
        make_from_registers<C>(tensors, sizes, place, x, w, at);
    else
        make_tap_by_tap<C>(tensors, sizes, place, x, w, at);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 256
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_SLOTS 1
#define DWCONV_VECTOR 4
#define DWCONV_ROWS 4
#define DWCONV_LOAD_VECTOR 4
#define DWCONV_STORE_VECTOR 4
#define DWCONV_WHOLE_WINDOW 1
#define DWCONV_BY_COLUMN 0
#define DWCONV_AHEAD 0
#define DWCONV_WARP_LOADS 0
#define DWCONV_WARP_STORES 0
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kSlots = DWCONV_SLOTS, kVector = DWCONV_VECTOR;
    static constexpr int kRows = DWCONV_ROWS;
    static constexpr int kLoadVector = DWCONV_LOAD_VECTOR, kStoreVector = DWCONV_STORE_VECTOR;
    static constexpr bool kWholeWindow = DWCONV_WHOLE_WINDOW, kByColumn = DWCONV_BY_COLUMN;
    static constexpr int kAhead = DWCONV_AHEAD;  // rows loaded before the first use; 0: all
    static constexpr bool kWarpLoads = DWCONV_WARP_LOADS, kWarpStores = DWCONV_WARP_STORES;  // of strips of 32 lanes
};

using Tiling = dwconv::DirectNchwTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::direct_nchw<Config>(tensors, sizes, tiling);
}
