// phases_nchw.cuh: the gradient of x of a strided depthwise convolution, channels first
//   dx[n,c,i,j] = sum over m, u, v with i = p*SH - PT + u*DH and j = q*SW - PL + v*DW of w[c*M+m,u,v] * g[n,c*M+m,p,q]
//   g [N,C*M,H,W]   w [C*M,KH,KW]   dx [N,C,OH,OW]     g stands for x in Tensors and Sizes, dx for y; offsets 64-bit
//   A thread takes kRows x kVector places of g and makes the (kRows*SH) x (kVector*SW) elements of dx that begin there
//   (phases.cuh); `lanes` threads make one strip of rows.
//   From registers: grid.x = ceil(planes * column strips * row strips * lanes / kThreads), threads numbered by lane
//   fastest, then by row strip; what a thread reads comes from L1, what it makes leaves row by row.
//   Staged: grid.x = ceil(planes / planes of a block) * bands. A block's part of g, whole planes or a band of rows, is
//   one stretch of memory and waits in shared memory; its part of dx is another one, and leaves from there.
//   least DRAM traffic: g + w + dx, once each; staged bands read the halo rows of g once more, from L2
#pragma once
#include "copies.cuh"
#include "phases.cuh"
#include "row_cells.cuh"

namespace dwconv {

struct PhasesNchwTiling {
    FastDivisor lanes;          // of one strip of columns
    FastDivisor row_strips;     // of one column strip, or of one band
    FastDivisor column_strips;  // of one plane; staged: 1
    FastDivisor channels;       // of dx, of one image
    FastDivisor bands;          // staged: of one plane
    FastDivisor planes_each;    // staged: planes of dx of one block; 1 if there are several bands
    unsigned strips;            // from registers: planes * column strips * row strips
    unsigned planes;            // N * C
    unsigned out_stage;         // staged: bytes of shared memory in front of dx
};

// What SlotRow is told: a row of g as a convolution with a stride of 1 reads it.
template <class C>
struct PhaseColumns {
    using Element = typename C::Element;
    static constexpr int kVector = C::kVector, kLoadVector = C::kLoadVector;
    static constexpr int kStrideW = 1, kDilationW = 1;
    static constexpr int kPadLeft = -ColumnPhases<C>::kFirst, kFilterW = ColumnPhases<C>::kSpan;
};

// Where a thread's tile stands. g: at row 0, column `column` of its first plane; y: at the tile's first element.
template <class C>
struct PhaseTile {
    using T = typename C::Element;
    const T *g, *w;
    T* y;
    long long g_channel, g_row;  // strides, in elements
    int row, column;             // of g
    int in_h, in_w;              // of g
    int rows, columns;           // of dx from the tile's first on
    int out_w;
};

// The taps that meet kTogether planes of g.
template <class C>
struct PhaseTaps {
    using Sum = typename Accumulator<typename C::Element>::Type;
    static constexpr int kCount = C::kTogether * C::kFilterH * C::kFilterW;
    Sum tap[kCount];

    __device__ __forceinline__ void load(const typename C::Element* w) {
#pragma unroll
        for (int t = 0; t < kCount; ++t) tap[t] = static_cast<Sum>(load_one(w + tap_at<C>(t)));
    }
};

// Makes a tile. Everything that it reads of kTogether planes of g is loaded before the first use. Shared: g waits in
// shared memory, and the first taps were loaded meanwhile.
template <class C, bool Shared>
__device__ __forceinline__ void make_phases(const PhaseTile<C>& tile, PhaseTaps<C>& filter) {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    using Rows = RowPhases<C>;
    using Columns = ColumnPhases<C>;
    constexpr int kTaps = C::kFilterH * C::kFilterW;
    constexpr int kWindowRows = C::kRows + Rows::kSpan - 1;
    constexpr int kWidth = C::kVector * C::kStrideW;
    static_assert(C::kMultiplier % C::kTogether == 0, "kTogether must divide the multiplier");
    static_assert(kWidth % C::kStoreVector == 0, "kStoreVector must divide the columns that a thread makes");
    static_assert(C::kVector % C::kLoadVector == 0, "kLoadVector must divide kVector: cells lie between lanes");

    Sum sums[C::kRows * C::kStrideH][kWidth];
#pragma unroll
    for (int i = 0; i < C::kRows * C::kStrideH; ++i)
#pragma unroll
        for (int o = 0; o < kWidth; ++o) sums[i][o] = Sum(0);
#pragma unroll 1
    for (int m = 0; m < C::kMultiplier; m += C::kTogether) {
        SlotRow<PhaseColumns<C>, Shared> rows[C::kTogether][kWindowRows];
#pragma unroll
        for (int q = 0; q < C::kTogether; ++q) {
            const T* line = tile.g + (m + q) * tile.g_channel + (tile.row + Rows::kFirst) * tile.g_row;
#pragma unroll
            for (int k = 0; k < kWindowRows; ++k, line += tile.g_row)
                if (Rows::reads(k, C::kRows))
                    rows[q][k].load(
                        line, static_cast<unsigned>(tile.row + Rows::kFirst + k) < static_cast<unsigned>(tile.in_h),
                        tile.column, tile.in_w);
        }
        if (!Shared || m > 0) filter.load(tile.w + m * kTaps);
#pragma unroll
        for (int i = 0; i < C::kRows * C::kStrideH; ++i) {
#pragma unroll
            for (int q = 0; q < C::kTogether; ++q)
#pragma unroll
                for (int u = 0; u < C::kFilterH; ++u) {
                    if (Rows::remainder(u) != i % C::kStrideH) continue;
                    const auto& line = rows[q][i / C::kStrideH + Rows::offset(u) - Rows::kFirst];
#pragma unroll
                    for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
                        for (int o = 0; o < C::kVector; ++o)
                            sums[i][o * C::kStrideW + Columns::remainder(v)] +=
                                filter.tap[q * kTaps + u * C::kFilterW + v] *
                                line.template column<Sum>(o + Columns::offset(v) - Columns::kFirst);
                }
            if (m + C::kTogether < C::kMultiplier || i >= tile.rows) continue;
#pragma unroll
            for (int o = 0; o < kWidth; o += C::kStoreVector)
                if (o < tile.columns)
                    store_vector(tile.y + i * tile.out_w + o, rounded<T, C::kStoreVector>(&sums[i][o]));
        }
    }
}

template <class C>
__device__ __forceinline__ void phases_from_registers(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                                      const PhasesNchwTiling& tiling) {
    const unsigned thread = blockIdx.x * C::kThreads + threadIdx.x;
    const unsigned strip = tiling.lanes.quotient(thread);
    if (strip >= tiling.strips) return;
    const unsigned lanes = tiling.lanes.divisor;
    const unsigned column_strip = tiling.row_strips.quotient(strip);
    const unsigned plane = tiling.column_strips.quotient(column_strip);
    const unsigned image = tiling.channels.quotient(plane);
    const unsigned channel = (plane - image * tiling.channels.divisor) * C::kMultiplier;
    const unsigned lane = (column_strip - plane * tiling.column_strips.divisor) * lanes + (thread - strip * lanes);
    PhaseTile<C> tile;
    tile.row = (strip - column_strip * tiling.row_strips.divisor) * C::kRows;
    tile.column = lane * C::kVector;
    const int row = tile.row * C::kStrideH, column = tile.column * C::kStrideW;  // of dx
    tile.g = tensors.x + image * sizes.x_image + channel * sizes.x_channel + tile.column;
    tile.g_channel = sizes.x_channel;
    tile.g_row = sizes.x_row;
    tile.w = tensors.w + static_cast<long long>(channel) * (C::kFilterH * C::kFilterW);
    tile.y = tensors.y + (plane * sizes.out_h + row) * sizes.out_w + column;
    tile.in_h = static_cast<int>(sizes.in_h);
    tile.in_w = static_cast<int>(sizes.in_w);
    tile.out_w = static_cast<int>(sizes.out_w);
    tile.rows = static_cast<int>(sizes.out_h) - row;
    tile.columns = tile.out_w - column;
    PhaseTaps<C> filter;
    make_phases<C, false>(tile, filter);
}

// Copies a stretch of memory to shared memory: elements from ... from + count - 1 of x to stage + from % kCopy and on,
// so that vectors lie in both at the same multiples.
template <class C>
__device__ __forceinline__ void copy_stretch(const typename C::Element* x, long long from, int count,
                                             typename C::Element* stage) {
    using T = typename C::Element;
    const int lead = static_cast<unsigned>(from) % C::kCopy, end = lead + count;
    const T* begin = x + (from - lead);
#pragma unroll 2
    for (int k = threadIdx.x * C::kCopy; k < end; k += C::kThreads * C::kCopy) {
        if (k + C::kCopy <= end)
            copy_piece<C::kCopy* static_cast<int>(sizeof(T))>(stage + k, begin + k);
        else
#pragma unroll 1
            for (int e = k; e < end; ++e) stage[e] = load_one(begin + e);
    }
}

// The way back: elements to ... to + count - 1 of y, from stage + to % kCopy and on.
template <class C>
__device__ __forceinline__ void store_stretch(typename C::Element* y, long long to, int count,
                                              const typename C::Element* stage) {
    using T = typename C::Element;
    using Piece = Vector<T, C::kCopy>;
    const int lead = static_cast<unsigned>(to) % C::kCopy, end = lead + count;
    T* begin = y + (to - lead);
#pragma unroll 2
    for (int k = threadIdx.x * C::kCopy; k < end; k += C::kThreads * C::kCopy) {
        if (k >= lead && k + C::kCopy <= end)
            store_vector(begin + k, *reinterpret_cast<const Piece*>(stage + k));
        else
#pragma unroll 1
            for (int e = larger(k, lead); e < smaller(k + C::kCopy, end); ++e) begin[e] = stage[e];
    }
}

template <class C>
__device__ __forceinline__ void phases_staged(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                              const PhasesNchwTiling& tiling) {
    using T = typename C::Element;
    using Rows = RowPhases<C>;
    unsigned char* memory = shared_memory<unsigned char>();
    T* g_stage = reinterpret_cast<T*>(memory);
    T* y_stage = reinterpret_cast<T*>(memory + tiling.out_stage);
    const unsigned group = tiling.bands.quotient(blockIdx.x), band = blockIdx.x - group * tiling.bands.divisor;
    const unsigned first_plane = group * tiling.planes_each.divisor;
    const int planes = smaller(tiling.planes_each.divisor, tiling.planes - first_plane);
    const int in_h = static_cast<int>(sizes.in_h), in_w = static_cast<int>(sizes.in_w);
    const int out_h = static_cast<int>(sizes.out_h), out_w = static_cast<int>(sizes.out_w);
    const int band_rows = tiling.row_strips.divisor * C::kRows, first_row = band * band_rows;

    // A band's rows of g, or all of whole planes.
    int from_row = 0, rows = in_h, out_rows = out_h;
    if (tiling.bands.divisor > 1) {
        from_row = smaller(in_h, larger(0, first_row + Rows::kFirst));
        rows = larger(0, smaller(in_h, first_row + band_rows + Rows::kLast) - from_row);
        out_rows = smaller(band_rows * C::kStrideH, out_h - first_row * C::kStrideH);
    }
    const long long from = (static_cast<long long>(first_plane) * C::kMultiplier * in_h + from_row) * in_w;
    const long long to = (static_cast<long long>(first_plane) * out_h + first_row * C::kStrideH) * out_w;
    const int lead = static_cast<unsigned>(from) % C::kCopy, out_lead = static_cast<unsigned>(to) % C::kCopy;
    copy_stretch<C>(tensors.x, from, planes * C::kMultiplier * rows * in_w, g_stage);
    end_of_copies();

    PhaseTile<C> tile;
    tile.g_channel = in_h * in_w;
    tile.g_row = in_w;
    tile.in_h = in_h;
    tile.in_w = in_w;
    tile.out_w = out_w;
    const int lanes = tiling.lanes.divisor, strips = tiling.row_strips.divisor;
    const int items = lanes * strips * (C::kByPlane ? static_cast<int>(tiling.planes_each.divisor) : planes);
    PhaseTaps<C> filter;
    bool arrived = false;
#pragma unroll 1
    for (int item = threadIdx.x; item < items || !arrived; item += C::kThreads) {
        // by plane: planes fastest, then lanes, then strips; else lanes fastest, then strips, then planes
        const int rest = (C::kByPlane ? tiling.planes_each : tiling.lanes).quotient(item);
        const int digit = item - rest * (C::kByPlane ? tiling.planes_each : tiling.lanes).divisor;
        const int last = (C::kByPlane ? tiling.lanes : tiling.row_strips).quotient(rest);
        const int middle = rest - last * (C::kByPlane ? lanes : strips);
        const int plane = C::kByPlane ? digit : last, strip = C::kByPlane ? last : middle;
        const bool works = item < items && plane < planes;
        tile.row = first_row + strip * C::kRows;
        tile.column = (C::kByPlane ? middle : digit) * C::kVector;
        const int row = strip * (C::kRows * C::kStrideH), column = tile.column * C::kStrideW;  // of dx
        const unsigned image = tiling.channels.quotient(first_plane + plane);
        const unsigned channel = (first_plane + plane - image * tiling.channels.divisor) * C::kMultiplier;
        tile.g = g_stage + lead + ((plane * C::kMultiplier * in_h - from_row) * in_w + tile.column);
        tile.w = tensors.w + static_cast<long long>(channel) * (C::kFilterH * C::kFilterW);
        tile.y = y_stage + out_lead + ((plane * out_h + row) * out_w + column);
        tile.rows = out_rows - row;
        tile.columns = out_w - column;
        if (works) filter.load(tile.w);
        if (!arrived) {  // the first taps come while the copies do
            wait_for_copies<0>();
            __syncthreads();
            arrived = true;
        }
        if (works) make_phases<C, true>(tile, filter);
    }
    __syncthreads();
    store_stretch<C>(tensors.y, to, (tiling.bands.divisor > 1 ? out_rows : planes * out_h) * out_w, y_stage);
}

template <class C>
__device__ __forceinline__ void phases_nchw(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const PhasesNchwTiling& tiling) {
    if constexpr (C::kStaged)
        phases_staged<C>(tensors, sizes, tiling);
    else
        phases_from_registers<C>(tensors, sizes, tiling);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 128
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_ROWS 4
#define DWCONV_VECTOR 2
#define DWCONV_LOAD_VECTOR 2
#define DWCONV_STORE_VECTOR 2
#define DWCONV_TOGETHER 1
#define DWCONV_STAGED 0
#define DWCONV_BY_PLANE 0
#define DWCONV_COPY 4
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kRows = DWCONV_ROWS, kVector = DWCONV_VECTOR;
    static constexpr int kLoadVector = DWCONV_LOAD_VECTOR, kStoreVector = DWCONV_STORE_VECTOR;
    static constexpr int kTogether = DWCONV_TOGETHER;  // planes of g whose window is loaded at a time
    static constexpr bool kStaged = DWCONV_STAGED, kByPlane = DWCONV_BY_PLANE;
    static constexpr int kCopy = DWCONV_COPY;  // staged: elements that one copy moves
};

using Tiling = dwconv::PhasesNchwTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::phases_nchw<Config>(tensors, sizes, tiling);
}
