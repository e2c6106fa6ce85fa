// staged_nchw.cuh: depthwise convolution, channels first: planes pass through shared memory, zero-padded
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW], then the epilogue
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   A block makes one item: item_planes whole planes, or a range of rows (and columns) of one plane.
//   kStretch: what an item reads is one stretch of memory, fetched 16 bytes at a time whatever its rows' alignment;
//   else its rows are fetched one by one (strided x, ranges of columns).
//   A thread makes one tile of kRows x kColumns outputs, its window from shared memory, its taps in registers.
//   kStageOutputs: results leave through shared memory as well, as one stretch of memory.
//   shared memory: the filters of the item's output planes, in the type in which products are summed; then its input:
//   rows `pitch` elements apart, planes `plane_pitch`, with zeros between them where the padding is
//   grid.x = groups of item_planes input planes * row_items * column_items
//   least DRAM traffic: x + w + y, once each; halo rows and columns between items come from L2
#pragma once
#include "staged_whole.cuh"

namespace dwconv {

// Four neighbouring elements of a window, as sums.
template <class T, class Sum>
__device__ __forceinline__ void load_quad(const T* address, Sum* into) {
    constexpr int kWidth = smaller(4, 16 / sizeof(T));
#pragma unroll
    for (int k = 0; k < 4; k += kWidth) {
        const Vector<T, kWidth> values = *reinterpret_cast<const Vector<T, kWidth>*>(address + k);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) into[k + e] = static_cast<Sum>(values.element[e]);
    }
}

// Taps of one plane: where they are, in shared memory or not, and those of small filters in registers beforehand.
template <class C>
struct StagedTaps {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    static constexpr bool kHeld = !C::kShareFilters && C::kTapRows == C::kFilterH;
    const Sum* shared;
    const T* memory;
    T held[kHeld ? C::kFilterH * C::kFilterW : 1];

    __device__ __forceinline__ void hold() {
        if constexpr (kHeld) {
#pragma unroll
            for (int k = 0; k < C::kFilterH * C::kFilterW; ++k) held[k] = load_one(memory + tap_at<C>(k));
        }
    }
    __device__ __forceinline__ Sum tap(int k) const {
        if constexpr (C::kShareFilters) return shared[tap_at<C>(k)];
        if constexpr (kHeld) return static_cast<Sum>(held[k]);
        return static_cast<Sum>(load_one(memory + tap_at<C>(k)));
    }
};

// Adds the products of Count filter rows. window: the first input row they read; taps: the first filter row.
template <class C, int Count, class Sum>
__device__ __forceinline__ void add_filter_rows(const typename C::Element* window, int pitch, int first_row, int in_h,
                                                const StagedTaps<C>& taps, int first_tap,
                                                Sum (&sums)[C::kRows][C::kColumns]) {
    using Window = StagedWindow<C>;
    Sum tap[Count][C::kFilterW];
#pragma unroll
    for (int u = 0; u < Count; ++u)
#pragma unroll
        for (int v = 0; v < C::kFilterW; ++v) tap[u][v] = taps.tap(first_tap + u * C::kFilterW + v);
#pragma unroll
    for (int r = 0; r < (C::kRows - 1) * C::kStrideH + (Count - 1) * C::kDilationH + 1; ++r) {
        bool is_read = false;
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) is_read = is_read || is_tap(r - i * C::kStrideH, C::kDilationH, Count);
        if (!is_read) continue;
        if constexpr (C::kSkipRows) {  // a row of padding adds nothing; left out if it is one for the whole warp
            if (!__any_sync(0xffffffffu, static_cast<unsigned>(first_row + r) < static_cast<unsigned>(in_h))) continue;
        }
        Sum row[4 * Window::kQuads];
#pragma unroll
        for (int q = 0; q < Window::kQuads; ++q)
            if (Window::reads(q)) load_quad(window + r * pitch + 4 * q, row + 4 * q);
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) {
            const int below = r - i * C::kStrideH;  // = u * kDilationH where output row i reads this row
            if (!is_tap(below, C::kDilationH, Count)) continue;
#pragma unroll
            for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
                for (int o = 0; o < C::kColumns; ++o)
                    sums[i][o] +=
                        tap[below / C::kDilationH][v] * row[Window::kShift + o * C::kStrideW + v * C::kDilationW];
        }
    }
}

// The sums of a tile. Filters of many rows are taken kTapRows rows at a time, so that they fit in registers.
template <class C, class Sum>
__device__ __forceinline__ void sum_tile(const typename C::Element* window, int pitch, int first_row, int in_h,
                                         const StagedTaps<C>& taps, Sum (&sums)[C::kRows][C::kColumns]) {
    constexpr int kChunks = C::kFilterH / C::kTapRows, kRest = C::kFilterH % C::kTapRows;
    if constexpr (kChunks == 1) {
        add_filter_rows<C, C::kTapRows>(window, pitch, first_row, in_h, taps, 0, sums);
    } else {
#pragma unroll 1
        for (int chunk = 0; chunk < kChunks; ++chunk)
            add_filter_rows<C, C::kTapRows>(window + chunk * (C::kTapRows * C::kDilationH) * pitch, pitch,
                                            first_row + chunk * (C::kTapRows * C::kDilationH), in_h, taps,
                                            chunk * (C::kTapRows * C::kFilterW), sums);
    }
    constexpr int kDone = kChunks * C::kTapRows;
    if constexpr (kRest > 0)
        add_filter_rows<C, kRest>(window + kDone * C::kDilationH * pitch, pitch, first_row + kDone * C::kDilationH,
                                  in_h, taps, kDone * C::kFilterW, sums);
}

// What waits in shared memory for the stores: results, or where a residual comes on top, sums that aren't rounded yet.
template <class T, bool HasResidual>
struct StagedResult {
    using Type = T;
};
template <class T>
struct StagedResult<T, true> {
    using Type = typename Accumulator<T>::Type;
};

// Stores the item's results, `count` elements of y from `first` on, and adds the residual.
template <class C, class Result>
__device__ __forceinline__ void store_stretch(const Tensors<typename C::Element>& tensors, long long first, int count,
                                              const Result* results) {
    using T = typename C::Element;
    using Stretch = StagedStretch<T>;
    const Stretch stretch(tensors.y + first, count);
    const auto complete = [&](int at) {
        if constexpr (C::kHasResidual)
            return static_cast<T>(results[at] + static_cast<Result>(load_one(tensors.residual + first + at)));
        else
            return results[at];
    };
#pragma unroll 2
    for (int unit = threadIdx.x; unit < stretch.vectors; unit += C::kThreads) {
        const int at = stretch.first_of(unit);
        T* const to = tensors.y + first + at;
        if constexpr (C::kHasResidual) {
            Vector<T, Stretch::kVector> values;
#pragma unroll
            for (int k = 0; k < Stretch::kVector; ++k) values.element[k] = complete(at + k);
            store_vector(to, values);
        } else {
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(results + at);
        }
    }
    stretch.each_single([&](int at) { tensors.y[first + at] = complete(at); });
}

// Stores kStoreVector neighbouring outputs, from offset `at` of y on.
template <class C, class Sum>
__device__ __forceinline__ void store_tile_part(const Tensors<typename C::Element>& tensors, long long at,
                                                const Sum* sums, const ChannelValues<Sum>& values) {
    using T = typename C::Element;
    constexpr int kWidth = C::kStoreVector, kBytes = kWidth * sizeof(T);
    Vector<T, kWidth> residual = {};
    if constexpr (C::kHasResidual) residual = load_vector<kWidth>(tensors.residual + at);
    Sum out[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out[k] = finished<C>(sums[k], values, residual.element[k]);
    const Vector<T, kWidth> done = rounded<T, kWidth>(out);
#ifndef DWCONV_EMULATOR  // the compiler takes predicated stores of vectors apart
    if constexpr (kBytes >= 8) {
        union {
            Vector<T, kWidth> vector;
            typename Word<kBytes>::Type bits;
        } both = {done};
        if constexpr (kBytes == 16)
            asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(tensors.y + at), "r"(both.bits.x),
                         "r"(both.bits.y), "r"(both.bits.z), "r"(both.bits.w)
                         : "memory");
        else
            asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(tensors.y + at), "r"(both.bits.x), "r"(both.bits.y)
                         : "memory");
        return;
    }
#endif
    store_vector(tensors.y + at, done);
}

template <class C>
__device__ __forceinline__ void staged_item_sums(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                                 const StagedNchwTiling& tiling) {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    using Result = typename StagedResult<T, C::kHasResidual>::Type;
    using Input = StagedInput<C, C::kStretch>;
    static_assert(C::kColumns * C::kStrideW % 4 == 0, "windows are read 16 bytes or more at a time");
    static_assert(C::kColumns % C::kStoreVector == 0, "kStoreVector must divide the columns of a tile");

    constexpr bool kFewTaps = C::kFilterH * C::kFilterW <= 9;
    static_assert(C::kThreads >= 32, "single elements are less than 16 bytes: a warp takes care of them");
    const StagedItem item = staged_item<C>(sizes, tiling);
    T* image = reinterpret_cast<T*>(shared_memory<Sum>() + tiling.filter_elements);
    const unsigned out_plane = item.plane * C::kMultiplier, out_planes = item.planes * C::kMultiplier;
    const Input input(tensors.x, sizes, tiling, item);
    const int units = input.units(), thread = threadIdx.x;
    typename Input::Held held[C::kLoads];
#pragma unroll
    for (int k = 0; k < C::kLoads; ++k)
        if (thread + k * C::kThreads < units) held[k] = input.load(thread + k * C::kThreads);

    // While these are on their way. Tiles: columns first, then planes, then rows. Lanes without a tile of their own
    // compute another one's.
    const int row_tiles = (item.rows + C::kRows - 1) / C::kRows;
    const int tiles = tiling.column_tiles.divisor * tiling.tile_planes.divisor * row_tiles;
    const bool works = thread / 32 * 32 < tiles;
    const int tile = smaller(thread, tiles - 1);
    const int across = tiling.column_tiles.quotient(tile), row_tile = tiling.tile_planes.quotient(across);
    unsigned plane = across - row_tile * tiling.tile_planes.divisor;
    const bool inside = thread < tiles && plane < out_planes;
    if (plane >= out_planes) plane = 0;
    const int row = row_tile * C::kRows;
    const int column = (tile - across * static_cast<int>(tiling.column_tiles.divisor)) * C::kColumns;
    const unsigned channel =
        out_plane + plane - tiling.out_channels.quotient(out_plane + plane) * tiling.out_channels.divisor;
    StagedTaps<C> taps;
    taps.memory = tensors.w + static_cast<long long>(channel) * (C::kFilterH * C::kFilterW);
    if constexpr (kFewTaps) taps.hold();
    if constexpr (C::kShareFilters)
        taps.shared = share_filters<C>(tensors.w, shared_memory<Sum>(), out_plane, out_planes, tiling) +
                      plane * (C::kFilterH * C::kFilterW);
#pragma unroll 1
    for (int at = thread; at < static_cast<int>(tiling.image_vectors); at += C::kThreads)
        reinterpret_cast<uint4*>(image)[at] = uint4{0, 0, 0, 0};
    __syncthreads();
#pragma unroll
    for (int k = 0; k < C::kLoads; ++k)
        if (thread + k * C::kThreads < units) input.store(thread + k * C::kThreads, held[k], image);
#pragma unroll 1
    for (int unit = thread + C::kLoads * C::kThreads; unit < units; unit += C::kThreads)  // of large items
        input.store(unit, input.load(unit), image);
    input.store_singles(image);
    if constexpr (!kFewTaps) taps.hold();  // not before: the registers of the input are free now
    __syncthreads();

    Sum sums[C::kRows][C::kColumns];
    ChannelValues<Sum> values = {Sum(1), Sum(0)};
    if (works) {
        const Sum bias = C::kHasBias ? static_cast<Sum>(load_one(tensors.b + channel)) : Sum(0);
        values = channel_values<C>(tensors, channel);
#pragma unroll
        for (int i = 0; i < C::kRows; ++i)
#pragma unroll
            for (int o = 0; o < C::kColumns; ++o) sums[i][o] = bias;
        const T* window = image + plane / C::kMultiplier * tiling.plane_pitch +
                          row * C::kStrideH * static_cast<int>(tiling.pitch) + column * C::kStrideW;
        sum_tile<C>(window, tiling.pitch, item.top + row * C::kStrideH, static_cast<int>(sizes.in_h), taps, sums);
    }

    const int out_w = static_cast<int>(sizes.out_w);
    const long long first_output = static_cast<long long>(out_plane) * tiling.out_plane + item.row * out_w;
    if constexpr (C::kStageOutputs) {
        Result* results = reinterpret_cast<Result*>(image) + staged_head(tensors.y + first_output);  // aligned as y is
        __syncthreads();  // the image has been read
        Result* into = results + (plane * item.rows + row) * out_w + column;
        const int rows = works && inside ? item.rows - row : 0, columns = out_w - column;
#pragma unroll
        for (int i = 0; i < C::kRows; ++i, into += out_w)
#pragma unroll
            for (int o = 0; o < C::kColumns; o += C::kStoreVector) {
                if (i >= rows || o >= columns) continue;
                Sum done[C::kStoreVector];
#pragma unroll
                for (int k = 0; k < C::kStoreVector; ++k)
                    done[k] = finished<WithoutResidual<C>>(sums[i][o + k], values, T{});
                *reinterpret_cast<Vector<Result, C::kStoreVector>*>(into + o) = rounded<Result, C::kStoreVector>(done);
            }
        __syncthreads();
        store_stretch<C>(tensors, first_output, static_cast<int>(out_planes) * item.rows * out_w, results);
    } else if (works && inside) {
        long long at =
            first_output + static_cast<long long>(plane) * tiling.out_plane + (row * out_w + item.column + column);
        const int rows = item.rows - row, columns = item.columns - column;
#pragma unroll
        for (int i = 0; i < C::kRows; ++i, at += out_w)
#pragma unroll
            for (int o = 0; o < C::kColumns; o += C::kStoreVector)
                if (i < rows && o < columns) store_tile_part<C>(tensors, at + o, &sums[i][o], values);
    }
}

template <class C>
__device__ __forceinline__ void staged_nchw(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const StagedNchwTiling& tiling) {
    if constexpr (C::kWhole > 0)
        staged_whole<C>(tensors, sizes, tiling);
    else if constexpr (C::kMarch)
        staged_march<C>(tensors, sizes, tiling);
    else
        staged_item_sums<C>(tensors, sizes, tiling);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 256
#define DWCONV_MIN_BLOCKS 4
#define DWCONV_ROWS 7
#define DWCONV_COLUMNS 4
#define DWCONV_TAP_ROWS 3
#define DWCONV_LOADS 8
#define DWCONV_GRANULE 4
#define DWCONV_STORE_VECTOR 4
#define DWCONV_STRETCH 1
#define DWCONV_STAGE_OUTPUTS 0
#define DWCONV_SKIP_ROWS 0
#define DWCONV_SHARE_FILTERS 1
#define DWCONV_MARCH 0
#define DWCONV_STAGES 2
#define DWCONV_EVEN 0
#define DWCONV_WHOLE 0
#define DWCONV_WHOLE_LANES 1
#define DWCONV_IN_PLACE 0
#define DWCONV_AHEAD 0
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kRows = DWCONV_ROWS, kColumns = DWCONV_COLUMNS, kTapRows = DWCONV_TAP_ROWS;
    static constexpr int kLoads = DWCONV_LOADS, kGranule = DWCONV_GRANULE, kStoreVector = DWCONV_STORE_VECTOR;
    static constexpr bool kStretch = DWCONV_STRETCH, kStageOutputs = DWCONV_STAGE_OUTPUTS;
    static constexpr bool kSkipRows = DWCONV_SKIP_ROWS, kShareFilters = DWCONV_SHARE_FILTERS;
    // The marches: rows through a ring, and whole planes of kWhole columns.
    static constexpr bool kMarch = DWCONV_MARCH, kEven = DWCONV_EVEN, kInPlace = DWCONV_IN_PLACE;
    static constexpr int kAhead = DWCONV_AHEAD;  // blocks of the grid, at most, whose warps fetch an item ahead; or 0
    static constexpr int kStages = DWCONV_STAGES, kWhole = DWCONV_WHOLE, kWholeLanes = DWCONV_WHOLE_LANES;
    static constexpr int kSharedBudget = DWCONV_SHARED_BUDGET, kSharedLimit = DWCONV_SHARED_LIMIT;  // bytes; the host's
};

using Tiling = dwconv::StagedNchwTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::staged_nchw<Config>(tensors, sizes, tiling);
}
