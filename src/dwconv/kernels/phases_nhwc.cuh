// phases_nhwc.cuh: the gradient of x of a strided depthwise convolution, channels last
//   dx[n,i,j,c] = sum over m, u, v with i = p*SH - PT + u*DH and j = q*SW - PL + v*DW of w[c*M+m,u,v] * g[n,p,q,c*M+m]
//   g [N,H,W,C*M]   w [C*M,KH,KW]   dx [N,OH,OW,C]     g stands for x in Tensors and Sizes, dx for y; offsets 64-bit
//   A thread takes kRows x kColumns places of g and makes the (kRows*SH) x (kColumns*SW) pixels of dx that begin there,
//   kVector channels of each (phases.cuh). A block takes kChunk channels of column_groups * row_groups threads' tiles,
//   one beside and above the other, of one image or several (nhwc_tiles.cuh, whose tiles are of places of g here).
//   Places of g wait in registers: all are loaded before the first use; or, staged (where the stride is 1), a block's
//   in shared memory, from where they come row by row.
//   grid.x = ceil(C / kChunk) * tiles
//   least DRAM traffic: g + w + dx, once each; halo pixels of g between blocks come from L2
#pragma once
#include "nhwc_tiles.cuh"
#include "phases.cuh"

namespace dwconv {

// What copy_tile and nhwc_place are told: g as a convolution with a stride of 1 reads it.
template <class C>
struct PhaseCopies {
    using Element = typename C::Element;
    static constexpr int kThreads = C::kThreads, kRows = C::kRows, kColumns = C::kColumns;
    static constexpr int kMultiplier = 1, kChunk = C::kChunk * C::kMultiplier, kPixel = kChunk, kCopy = C::kCopy;
    static constexpr int kStrideH = 1, kStrideW = 1;
    static constexpr int kPadTop = -RowPhases<C>::kFirst, kPadLeft = -ColumnPhases<C>::kFirst;
    static constexpr bool kManyImages = C::kManyImages;
};

// Neighbouring channels of one pixel of g, as they lie in memory; they are converted when they are used.
template <class T, int Count, int Load>
struct Channels {
    static constexpr int kBytes = Load * static_cast<int>(sizeof(T));
    static constexpr bool kSingle = kBytes == 2;  // one element in each word
    unsigned words[kSingle ? Count : Count * sizeof(T) / 4];

    template <bool Shared>
    __device__ __forceinline__ void load(const T* address, bool inside) {
#pragma unroll
        for (int k = 0; k < Count; k += Load) {
            if constexpr (kSingle) {
                words[k] = 0;
                if (inside) {
                    const auto* from = reinterpret_cast<const unsigned short*>(address + k);
                    words[k] = Shared ? *from : load_one(from);
                }
            } else {
                constexpr int kWords = kBytes / 4;
                using Piece = Vector<unsigned, kWords>;
                Piece piece = {};
                if (inside) {
                    const auto* from = reinterpret_cast<const unsigned*>(address + k);
                    if constexpr (Shared)
                        piece = *reinterpret_cast<const Piece*>(from);
                    else
                        piece = load_vector<kWords>(from);
                }
#pragma unroll
                for (int e = 0; e < kWords; ++e) words[k * sizeof(T) / 4 + e] = piece.element[e];
            }
        }
#ifndef DWCONV_EMULATOR  // a conversion right behind its load would wait for it before the next load
        if constexpr (sizeof(T) == 2)
#pragma unroll
            for (unsigned& word : words) asm("" : "+r"(word));
#endif
    }

    template <class Sum>
    __device__ __forceinline__ Sum channel(int k) const {
        if constexpr (sizeof(T) == 2) {
            return read_element<T>(words[kSingle ? k : k / 2], !kSingle && k % 2);
        } else {
            union {
                unsigned bits[sizeof(T) / 4];
                T element;
            } both;
#pragma unroll
            for (int e = 0; e < static_cast<int>(sizeof(T) / 4); ++e) both.bits[e] = words[k * sizeof(T) / 4 + e];
            return static_cast<Sum>(both.element);
        }
    }
};

template <class C>
struct PhasesNhwc {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    using Rows = RowPhases<C>;
    using Columns = ColumnPhases<C>;
    static constexpr int kLanes = C::kChunk / C::kVector;
    static constexpr int kTaps = C::kFilterH * C::kFilterW;
    static constexpr int kFilterPitch = ceil_div(C::kChunk, 4) * 4 + 4;  // [m, tap][channel]
    static constexpr int kFilterBytes =
        ceil_div(C::kMultiplier * kTaps * kFilterPitch * static_cast<int>(sizeof(Sum)), 16) * 16;
    static constexpr int kWindowRows = C::kRows + Rows::kSpan - 1;
    static constexpr int kWindowColumns = C::kColumns + Columns::kSpan - 1;
    static constexpr int kSlots = C::kThreads / kLanes;  // threads of one channel group
    using Pixel = Channels<T, C::kVector * C::kMultiplier, C::kLoad>;
    using Window = Pixel[kWindowRows][kWindowColumns];
};

// The filters of a chunk of channels, in the type of sums, tap by tap.
template <class C, class Sum>
__device__ __forceinline__ void stage_chunk(const typename C::Element* w, int first_channel, int channels,
                                            Sum* filter) {
    using Tile = PhasesNhwc<C>;
    constexpr int kEach = C::kMultiplier * Tile::kTaps;
    const typename C::Element* from = w + static_cast<long long>(first_channel) * kEach;
    const int here = smaller(C::kChunk, channels - first_channel) * kEach;
    for (int k = threadIdx.x; k < C::kChunk * kEach; k += C::kThreads) {
        const int channel = k / kEach, number = k - channel * kEach;
        filter[number * Tile::kFilterPitch + channel] =
            k < here ? static_cast<Sum>(load_one(from + tap_at<C>(k))) : Sum(0);
    }
}

// Reads a tap of kVector channels.
template <class C, class Sum>
__device__ __forceinline__ void read_tap(const Sum* filter, int number, Sum (&taps)[C::kVector]) {
    constexpr int kWidth = smaller(C::kVector, 16 / static_cast<int>(sizeof(Sum)));
#pragma unroll
    for (int k = 0; k < C::kVector; k += kWidth) {
        const auto some =
            *reinterpret_cast<const Vector<Sum, kWidth>*>(filter + number * PhasesNhwc<C>::kFilterPitch + k);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) taps[k + e] = some.element[e];
    }
}

// Makes and stores a thread's pixels where there is one phase: a row of g is read from shared memory and used for all
// rows of dx that it reaches, so that only the sums of unfinished rows and one row of g are in registers.
template <class C, class Sum>
__device__ __forceinline__ void march(const typename C::Element* line, int pitch, const Sum* filter,
                                      typename C::Element* y, unsigned row_step, unsigned column_step, int rows,
                                      int columns) {
    using Tile = PhasesNhwc<C>;
    using Rows = typename Tile::Rows;
    using Columns = typename Tile::Columns;
    constexpr int kNumbers = C::kMultiplier * Tile::kTaps;
    constexpr bool kKept = kNumbers * C::kVector <= 40;  // taps that stay in registers
    Sum kept[kKept ? kNumbers : 1][C::kVector];
    if constexpr (kKept)
#pragma unroll
        for (int number = 0; number < kNumbers; ++number) read_tap<C>(filter, number, kept[number]);
    Sum sums[C::kRows][C::kColumns][C::kVector];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
        for (int j = 0; j < C::kColumns; ++j)
#pragma unroll
            for (int k = 0; k < C::kVector; ++k) sums[i][j][k] = Sum(0);
#pragma unroll
    for (int a = 0; a < Tile::kWindowRows; ++a, line += pitch) {
        typename Tile::Pixel pixels[Tile::kWindowColumns];
#pragma unroll
        for (int b = 0; b < Tile::kWindowColumns; ++b)
            if (Rows::reads(a, C::kRows) && Columns::reads(b, C::kColumns))
                pixels[b].template load<true>(line + b * (C::kChunk * C::kMultiplier), true);
#pragma unroll
        for (int number = 0; number < kNumbers; ++number) {
            const int m = number / Tile::kTaps, u = number % Tile::kTaps / C::kFilterW, v = number % C::kFilterW;
            const int i = a - (Rows::offset(u) - Rows::kFirst);
            if (i < 0 || i >= C::kRows) continue;
            Sum taps[C::kVector];
            if constexpr (kKept) {
#pragma unroll
                for (int k = 0; k < C::kVector; ++k) taps[k] = kept[number][k];
            } else {
                read_tap<C>(filter, number, taps);
            }
#pragma unroll
            for (int j = 0; j < C::kColumns; ++j)
#pragma unroll
                for (int k = 0; k < C::kVector; ++k)
                    sums[i][j][k] += taps[k] * pixels[j + Columns::offset(v) - Columns::kFirst].template channel<Sum>(
                                                   k * C::kMultiplier + m);
        }
        const int done = a - (Rows::kSpan - 1);
        if (done < 0 || done >= rows) continue;
#pragma unroll
        for (int j = 0; j < C::kColumns; ++j)
            if (j < columns)
                store_vector(y + (done * row_step + j * column_step),
                             rounded<typename C::Element, C::kVector>(sums[done][j]));
    }
}

// Makes and stores a thread's pixels, phase by phase: a tap is read once for all places.
template <class C, class Sum>
__device__ __forceinline__ void make_pixels(const typename PhasesNhwc<C>::Window& window, const Sum* filter,
                                            typename C::Element* y, unsigned row_step, unsigned column_step, int rows,
                                            int columns) {
    using Tile = PhasesNhwc<C>;
    using Rows = typename Tile::Rows;
    using Columns = typename Tile::Columns;
#pragma unroll
    for (int phase = 0; phase < C::kStrideH * C::kStrideW; ++phase) {
        Sum sums[C::kRows][C::kColumns][C::kVector];
#pragma unroll
        for (int i = 0; i < C::kRows; ++i)
#pragma unroll
            for (int j = 0; j < C::kColumns; ++j)
#pragma unroll
                for (int k = 0; k < C::kVector; ++k) sums[i][j][k] = Sum(0);
#pragma unroll
        for (int number = 0; number < C::kMultiplier * Tile::kTaps; ++number) {
            const int m = number / Tile::kTaps, u = number % Tile::kTaps / C::kFilterW, v = number % C::kFilterW;
            if (Rows::remainder(u) != phase / C::kStrideW || Columns::remainder(v) != phase % C::kStrideW) continue;
            Sum taps[C::kVector];
            read_tap<C>(filter, number, taps);
#pragma unroll
            for (int i = 0; i < C::kRows; ++i)
#pragma unroll
                for (int j = 0; j < C::kColumns; ++j)
#pragma unroll
                    for (int k = 0; k < C::kVector; ++k)
                        sums[i][j][k] +=
                            taps[k] *
                            window[i + Rows::offset(u) - Rows::kFirst][j + Columns::offset(v) - Columns::kFirst]
                                .template channel<Sum>(k * C::kMultiplier + m);
        }
#pragma unroll
        for (int i = 0; i < C::kRows; ++i)
#pragma unroll
            for (int j = 0; j < C::kColumns; ++j) {
                const int row = i * C::kStrideH + phase / C::kStrideW, column = j * C::kStrideW + phase % C::kStrideW;
                if (row < rows && column < columns)
                    store_vector(y + (row * row_step + column * column_step),
                                 rounded<typename C::Element, C::kVector>(sums[i][j]));
            }
    }
}

template <class C>
__device__ __forceinline__ void phases_nhwc(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const NhwcTiling& tiling) {
    using Tile = PhasesNhwc<C>;
    using T = typename C::Element;
    using Sum = typename Tile::Sum;
    static_assert(C::kChunk % C::kVector == 0, "kVector must divide kChunk: a thread owns whole vectors");
    static_assert(C::kVector * C::kMultiplier % C::kLoad == 0, "kLoad must divide a thread's channels of g");
    static_assert(!C::kStaged || C::kStrideH * C::kStrideW == 1, "kStaged asks for one phase: march makes no more");

    unsigned char* memory = shared_memory<unsigned char>();
    Sum* filter = reinterpret_cast<Sum*>(memory);
    T* stage = reinterpret_cast<T*>(memory + Tile::kFilterBytes);
    const unsigned number = tiling.chunks.quotient(blockIdx.x);
    const int first_channel = (blockIdx.x - number * tiling.chunks.divisor) * C::kChunk;
    const int channels = static_cast<int>(sizes.out_channels);
    const NhwcPlace place = nhwc_place<PhaseCopies<C>>(tiling, number);
    if constexpr (C::kStaged) {
        Sizes g_sizes = sizes;
        g_sizes.out_channels *= C::kMultiplier;
        copy_tile<PhaseCopies<C>>(tensors.x, g_sizes, tiling, place, first_channel * C::kMultiplier, stage);
        end_of_copies();
    }

    const int lane = threadIdx.x % Tile::kLanes;
    const unsigned spot = threadIdx.x / Tile::kLanes;
    const unsigned spot_row = tiling.column_groups.quotient(spot);
    const unsigned image_here = tiling.row_groups.quotient(spot_row);
    const int column = (spot - spot_row * tiling.column_groups.divisor) * C::kColumns;  // of g, in the block's tile
    const int row = (spot_row - image_here * tiling.row_groups.divisor) * C::kRows;
    const int channel = first_channel + lane * C::kVector;
    const unsigned image = place.image + image_here;
    const int out_row = (place.row + row) * C::kStrideH, out_column = (place.column + column) * C::kStrideW;
    const int rows = static_cast<int>(sizes.out_h) - out_row, columns = static_cast<int>(sizes.out_w) - out_column;
    const bool works =
        image_here < tiling.images && image < tiling.batch && channel < channels && rows > 0 && columns > 0;

    typename Tile::Window window;
    if constexpr (!C::kStaged) {
        const int in_row = place.row + row + Tile::Rows::kFirst,
                  in_column = place.column + column + Tile::Columns::kFirst;
        const T* line = tensors.x + image * sizes.x_image + in_row * sizes.x_row + in_column * sizes.x_column +
                        channel * C::kMultiplier;
        const unsigned in_h = works ? static_cast<unsigned>(sizes.in_h) : 0, in_w = static_cast<unsigned>(sizes.in_w);
        const int pixel = static_cast<int>(sizes.x_column);
#pragma unroll
        for (int a = 0; a < Tile::kWindowRows; ++a, line += sizes.x_row) {
            if (!Tile::Rows::reads(a, C::kRows)) continue;
#pragma unroll
            for (int b = 0; b < Tile::kWindowColumns; ++b)
                if (Tile::Columns::reads(b, C::kColumns))
                    window[a][b].template load<false>(
                        line + b * pixel,
                        static_cast<unsigned>(in_row + a) < in_h && static_cast<unsigned>(in_column + b) < in_w);
        }
    }
    stage_chunk<C>(tensors.w, first_channel, channels, filter);
    wait_for_copies<0>();
    __syncthreads();
    if (!works) return;
    T* y = tensors.y + ((image * sizes.out_h + out_row) * sizes.out_w + out_column) * channels + channel;
    unsigned row_step = static_cast<unsigned>(sizes.out_w) * channels;
#ifndef DWCONV_EMULATOR  // the compiler would factor pixels out of the offsets of each store, in 64 bits
    asm("" : "+r"(row_step));
#endif
    filter += lane * C::kVector;
    if constexpr (C::kStaged) {
        const int in_columns = tiling.in_columns.divisor, in_rows = tiling.in_rows.divisor;
        const int pitch = in_columns * (C::kChunk * C::kMultiplier);
        const T* line = stage + (static_cast<int>(image_here) * in_rows + row) * pitch +
                        column * (C::kChunk * C::kMultiplier) + lane * (C::kVector * C::kMultiplier);
        march<C>(line, pitch, filter, y, row_step, channels, rows, columns);
    } else {
        make_pixels<C>(window, filter, y, row_step, channels, rows, columns);
    }
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 256
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_CHUNK 32
#define DWCONV_VECTOR 4
#define DWCONV_LOAD 4
#define DWCONV_COPY 4
#define DWCONV_ROWS 2
#define DWCONV_COLUMNS 2
#define DWCONV_STAGED 0
#define DWCONV_MANY_IMAGES 0
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kChunk = DWCONV_CHUNK, kVector = DWCONV_VECTOR;
    static constexpr int kLoad = DWCONV_LOAD;  // elements of g that a thread loads with one instruction,
    static constexpr int kCopy = DWCONV_COPY;  // or copies
    static constexpr int kRows = DWCONV_ROWS, kColumns = DWCONV_COLUMNS;
    static constexpr bool kStaged = DWCONV_STAGED, kManyImages = DWCONV_MANY_IMAGES;
};

using Tiling = dwconv::NhwcTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::phases_nhwc<Config>(tensors, sizes, tiling);
}
