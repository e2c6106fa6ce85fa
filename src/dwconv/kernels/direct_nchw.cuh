// direct_nchw.cuh: depthwise convolution, channels first, any filter: rows march through registers
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]     float32 sum
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   A group of `lanes` threads makes kRows output rows of one strip: lanes * kSlots * kVector columns.
//   grid.x = ceil(planes * column strips * row strips / groups in a block); row strips are neighbours in a block, so
//   that the halo rows between them meet in L1
//   least DRAM traffic: x + w + y, once each; halo rows between blocks come from L2
#pragma once
#include "common.cuh"

namespace dwconv {

struct DirectNchwTiling {
    FastDivisor row_strips;     // of one column strip
    FastDivisor column_strips;  // of one plane
    FastDivisor out_channels;   // of one image
    unsigned groups;            // planes * column strips * row strips
    unsigned log2_lanes;        // lanes in a group: 1 to 32, fewer for narrow images
};

// Which input columns one lane owns, which ones its outputs read, and who holds the difference.
//
//   A slot of a lane makes kVector neighbouring outputs and loads kOwn neighbouring inputs. Slots are interleaved over
//   the lanes (slot s of lane l stands at (s * lanes + l) * kOwn), so that a warp's loads and stores are contiguous.
//   Numbered from the first owned column, the outputs read columns kFirst ... kLast. Those outside 0 ... kOwn-1 belong
//   to other lanes and come by shuffle; those outside the whole strip are its halo, loaded by the lanes at its ends.
template <class C>
struct DirectColumns {
    static constexpr int kOwn = C::kVector * C::kStrideW;
    static constexpr int kFirst = -C::kPadLeft - C::kColumnShift;
    static constexpr int kLast = kFirst + (C::kVector - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW;
    static constexpr int kSpan = kLast - kFirst + 1;
    // Columns of the strip's halo, left and right of it; none where a strip is as wide as the image, whose rows end
    // there.
    static constexpr int kLeft = C::kWholeRows ? 0 : larger(0, -kFirst);
    static constexpr int kRight = C::kWholeRows ? 0 : larger(0, kLast - kOwn + 1);
    static constexpr int kLeftLanes = ceil_div(kLeft, kOwn);
    static constexpr int kRightLanes = ceil_div(kRight, kOwn);
    static constexpr int kLeftEach = smaller(kLeft, kOwn);  // halo columns that one lane loads
    static constexpr int kRightEach = smaller(kRight, kOwn);
    static constexpr int kHalo = larger(kLeftEach, kRightEach);

    __host__ __device__ static constexpr bool halo_comes_in(int width) {
        return C::kLoadVector % width == 0 && kLeftEach % width == 0 && kRightEach % width == 0;
    }
    static constexpr int kHaloVector = halo_comes_in(8) ? 8 : halo_comes_in(4) ? 4 : halo_comes_in(2) ? 2 : 1;

    // Does any output read column kFirst + k? (Not all are read where dilation or stride leave gaps.)
    __host__ __device__ static constexpr bool reads(int k) {
        for (int o = 0; o < C::kVector; ++o)
            for (int v = 0; v < C::kFilterW; ++v)
                if (o * C::kStrideW + v * C::kDilationW == k) return true;
        return false;
    }
};

// Which input rows the kRows output rows of a thread read, numbered from the first.
template <class C>
struct DirectRows {
    static constexpr int kCount = (C::kRows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1;

    __host__ __device__ static constexpr bool reads(int r) {
        for (int i = 0; i < C::kRows; ++i)
            for (int u = 0; u < C::kFilterH; ++u)
                if (i * C::kStrideH + u * C::kDilationH == r) return true;
        return false;
    }
};

// What a lane holds of one input row: its own columns, and its share of the strip's halo. The first lanes hold what a
// lane to the right of the strip would own, the last lanes what a lane to the left of it would.
template <class C>
struct DirectRow {
    typename C::Element own[C::kSlots][DirectColumns<C>::kOwn];
    typename C::Element halo[larger(1, DirectColumns<C>::kHalo)];
};

// The place of a thread: which plane, which rows and columns.
struct DirectPlace {
    long long image, channel;  // of the output
    int row, column;           // first output row and column of the lane, in slot 0
    int lanes, lane;           // lanes of the group, and this thread's number in it
    bool inside;               // false in groups past the last one: they take part in shuffles and store nothing
};

template <class C>
__device__ __forceinline__ DirectPlace direct_place(const DirectNchwTiling& tiling) {
    const unsigned group = (blockIdx.x * C::kThreads + threadIdx.x) >> tiling.log2_lanes;
    const unsigned column_strip = tiling.row_strips.quotient(group);
    const unsigned plane = tiling.column_strips.quotient(column_strip);
    const unsigned image = tiling.out_channels.quotient(plane);
    DirectPlace place;
    place.lanes = 1 << tiling.log2_lanes;
    place.lane = threadIdx.x & (place.lanes - 1);
    place.image = image;
    place.channel = plane - image * tiling.out_channels.divisor;
    place.row = (group - column_strip * tiling.row_strips.divisor) * C::kRows;
    place.column = (column_strip - plane * tiling.column_strips.divisor) * (place.lanes * C::kSlots * C::kVector) +
                   place.lane * C::kVector;
    place.inside = group < tiling.groups;
    return place;
}

// Reads Width columns, the first of them number `column` of a row, from `address`; zeros where they lie outside of the
// row (whole vectors do, as W is a multiple of Width).
template <int Width, class T>
__device__ __forceinline__ void load_columns(const T* address, bool row_inside, int column, int in_w, T* into) {
    Vector<T, Width> values = {};
    if (row_inside && static_cast<unsigned>(column) < static_cast<unsigned>(in_w)) values = load_vector<Width>(address);
#pragma unroll
    for (int k = 0; k < Width; ++k) into[k] = values.element[k];
}

// Reads a lane's share of a row; `address` is that of its first own column, which has number `first` in the row.
template <class C>
__device__ __forceinline__ void load_row(const typename C::Element* address, bool row_inside, const DirectPlace& place,
                                         int first, int in_w, DirectRow<C>& into) {
    using Columns = DirectColumns<C>;
    constexpr int kOwn = Columns::kOwn;
    const int slot = place.lanes * kOwn;
#pragma unroll
    for (int s = 0; s < C::kSlots; ++s)
#pragma unroll
        for (int k = 0; k < kOwn; k += C::kLoadVector)
            load_columns<C::kLoadVector>(address + s * slot + k, row_inside, first + s * slot + k, in_w,
                                         &into.own[s][k]);
    if constexpr (Columns::kHalo > 0) {
        const bool right = place.lane < Columns::kRightLanes;
        const bool left = place.lane >= place.lanes - Columns::kLeftLanes;
        const int away = right ? C::kSlots * slot : kOwn - Columns::kLeftEach - slot;
        const int each = right ? Columns::kRightEach : Columns::kLeftEach;
#pragma unroll
        for (int k = 0; k < Columns::kHalo; k += Columns::kHaloVector)
            load_columns<Columns::kHaloVector>(address + away + k, row_inside && (right || left) && k < each,
                                               first + away + k, in_w, &into.halo[k]);
    }
}

// Column `offset` of slot s, numbered from the lane's first own column; all lanes of the warp must call it.
template <class C>
__device__ __forceinline__ typename C::Element column_of(const DirectRow<C>& row, int s, int offset,
                                                         const DirectPlace& place) {
    using Columns = DirectColumns<C>;
    const int away = floor_div(offset, Columns::kOwn);  // lanes to the right
    const int k = offset - away * Columns::kOwn;
    if (away == 0) return row.own[s][k];
    // A lane that others reach by going round the end of the group hands out the neighbouring slot, or the halo.
    const bool round = away > 0 ? place.lane < away : place.lane >= place.lanes + away;
    const int neighbour = away > 0 ? s + 1 : s - 1;
    const bool in_strip = neighbour >= 0 && neighbour < C::kSlots;
    const int halo = away > 0 ? k : k - (Columns::kOwn - Columns::kLeftEach);
    const bool in_halo = halo >= 0 && halo < Columns::kHalo;
    const typename C::Element far = in_strip  ? row.own[in_strip ? neighbour : s][k]
                                    : in_halo ? row.halo[in_halo ? halo : 0]
                                              : typename C::Element(0);
    return __shfl_sync(0xffffffffu, round ? far : row.own[s][k], (place.lane + away) & (place.lanes - 1), place.lanes);
}

// Writes a lane's sums of one row; `address` is that of its first column in slot 0.
template <class C, class Sum>
__device__ __forceinline__ void store_row(typename C::Element* address, const DirectPlace& place, int out_w,
                                          const Sum (&sums)[C::kSlots][C::kVector]) {
    using T = typename C::Element;
    const int slot = place.lanes * C::kVector;
#pragma unroll
    for (int s = 0; s < C::kSlots; ++s)
#pragma unroll
        for (int o = 0; o < C::kVector; o += C::kStoreVector) {
            Vector<T, C::kStoreVector> values;
#pragma unroll
            for (int k = 0; k < C::kStoreVector; ++k) values.element[k] = static_cast<T>(sums[s][o + k]);
            if (place.column + s * slot + o < out_w) store_vector<C::kStoreVector>(address + s * slot + o, values);
        }
}

// All rows that the thread reads are loaded before the first use: bytes in flight are what the speed depends on.
template <class C, class Sum>
__device__ __forceinline__ void sum_from_registers(const typename C::Element* plane, const typename C::Element* w,
                                                   const Sizes& sizes, const DirectPlace& place,
                                                   Sum (&sums)[C::kRows][C::kSlots][C::kVector]) {
    using Columns = DirectColumns<C>;
    using Rows = DirectRows<C>;
    const int first_row = place.row * C::kStrideH - C::kPadTop;
    const unsigned in_h = place.inside ? static_cast<unsigned>(sizes.in_h) : 0;
    const int first = place.column * C::kStrideW + C::kColumnShift;
    const typename C::Element* line = plane + first_row * sizes.x_row + first;
    DirectRow<C> rows[Rows::kCount];
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
                if (below < 0 || below % C::kDilationH != 0 || below / C::kDilationH >= C::kFilterH) continue;
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
                                               const Sizes& sizes, const DirectPlace& place,
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
    using Columns = DirectColumns<C>;
    using Sum = typename Accumulator<typename C::Element>::Type;
    static_assert(C::kThreads % 32 == 0, "kThreads must be whole warps: all lanes take part in shuffles");
    static_assert(Columns::kOwn % C::kLoadVector == 0, "kLoadVector must divide the columns a lane owns");
    static_assert(C::kVector % C::kStoreVector == 0, "kStoreVector must divide kVector");
    static_assert(!C::kWholeWindow || Columns::kLeftLanes + Columns::kRightLanes <= 32,
                  "the halo is loaded by distinct lanes: use wider vectors");

    const DirectPlace place = direct_place<C>(tiling);
    const typename C::Element* plane =
        x + place.image * sizes.x_image + place.channel / C::kMultiplier * sizes.x_channel;
    const typename C::Element* taps = w + place.channel * (C::kFilterH * C::kFilterW);
    const Sum bias = C::kHasBias ? static_cast<Sum>(__ldg(b + place.channel)) : Sum(0);
    Sum sums[C::kRows][C::kSlots][C::kVector];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
        for (int s = 0; s < C::kSlots; ++s)
#pragma unroll
            for (int o = 0; o < C::kVector; ++o) sums[i][s][o] = bias;
    if constexpr (C::kWholeWindow)
        sum_from_registers<C>(plane, taps, sizes, place, sums);
    else
        sum_tap_by_tap<C>(plane, taps, sizes, place, sums);

    if (!place.inside) return;
    const long long plane_rows = (place.image * sizes.out_channels + place.channel) * sizes.out_h;
    typename C::Element* out = y + (plane_rows + place.row) * sizes.out_w + place.column;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i, out += sizes.out_w)
        if (place.row + i < sizes.out_h) store_row<C>(out, place, static_cast<int>(sizes.out_w), sums[i]);
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
