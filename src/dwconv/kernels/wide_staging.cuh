// wide_staging.cuh: bands of planes, and how they and their filters come to shared memory; for wide_nchw.cuh
#pragma once
#include "epilogue.cuh"

namespace dwconv {

struct WideNchwTiling {
    FastDivisor along_bands, across_bands, channel_groups;  // of the grid
    FastDivisor images;                                     // of a block
    unsigned channels, batch;
    FastDivisor along_tiles, across_tiles;  // of a band: of kAlong and kAcross outputs
    unsigned near_tiles;                    // tiles across that are neighbouring lanes, a power of two
    unsigned tasks;                         // of 32 tiles
    unsigned folded;                        // tiles across come as first, last, second, last but one, ...
    // of shared memory, in elements: of a line, from one channel, one image to the next
    unsigned in_pitch, in_channel, in_image, out_pitch, out_channel, out_image;
    unsigned in_extent;                                  // elements along that are staged; 0: as the image has
    FastDivisor in_rows, in_moves, out_rows, out_moves;  // kNearRows rows as they stand in memory; kGroup moves of each
    unsigned in_merged, out_merged;                      // the rows of a plane are one stretch of memory
    unsigned channels_merged;                            // and the planes of all channels, too
    unsigned in_wide, out_wide;                          // kMove elements a move, instead of one
    unsigned in_mirror;                                  // kHalves: from an image to the one with mirrored lines
};

// The problem, seen along and across; the sizes of what a lane keeps.
template <class C>
struct WideAxes {
    static constexpr int kTaps = C::kTransposed ? C::kFilterH : C::kFilterW;
    static constexpr int kStride = C::kTransposed ? C::kStrideH : C::kStrideW;
    static constexpr int kDilation = C::kTransposed ? C::kDilationH : C::kDilationW;
    static constexpr int kPad = C::kTransposed ? C::kPadTop : C::kPadLeft;
    static constexpr int kLines = C::kTransposed ? C::kFilterW : C::kFilterH;  // of the filter
    static constexpr int kAcrossStride = C::kTransposed ? C::kStrideW : C::kStrideH;
    static constexpr int kAcrossDilation = C::kTransposed ? C::kDilationW : C::kDilationH;
    static constexpr int kAcrossPad = C::kTransposed ? C::kPadLeft : C::kPadTop;

    // A lane owns whole lines, so that padding needs no memory; or halves of them, where halves mirror each other: the
    // second ones are made of mirrored lines and taps by the code of the first.
    static constexpr bool kWhole = C::kInAlong > 0;
    static constexpr int kCopies = C::kHalves ? 2 : 1;  // of lines and taps: as they are, mirrored
    static constexpr int kFull = kTaps / C::kChunk, kRest = kTaps % C::kChunk;  // chunks of taps; taps of the last
    static constexpr int kTapPitch = 4 * (ceil_div(kTaps, 4) | 1);
    // Elements of a line that come with one shared load.
    static constexpr int kRead = !kWhole || C::kInAlong % 4 == 0 ? 4 : C::kInAlong % 2 == 0 ? 2 : 1;
    static constexpr int kWrite = C::kAlong % 4 == 0 ? 4 : C::kAlong % 2 == 0 ? 2 : 1;
    static constexpr int kPass = C::kAlong > 32 ? C::kAlong / 2 : C::kAlong;  // outputs of a line in a warp's buffer
    static constexpr int kBufferPitch = kWrite * (ceil_div(kPass, kWrite) | 1);
    // Elements of global memory in one move, at most 16 bytes.
    static constexpr int kMove = sizeof(typename C::Element) > 4 ? 2 : 4;

    // Chunks that lie in the padding are left out, so no more than this is read of it.
    static constexpr int kReach = (C::kAlong - 1) * kStride + (C::kChunk - 1) * kDilation;
    static constexpr int kMargin = kPad <= kReach ? kPad : kPad - (kPad - kReach) / 4 * 4;
    // Cut lines are staged from a multiple of 4 elements on; windows start so many elements behind one.
    static constexpr int kShift = kWhole ? 0 : (4 - kPad % 4) % 4;

    // Elements that a lane reads of a line for so many taps.
    __host__ __device__ static constexpr int span(int taps) {
        const int reach = (C::kAlong - 1) * kStride + (taps - 1) * kDilation + 1;
        return !kWhole ? kShift + reach : C::kHalves ? smaller(C::kInAlong, reach - kPad) : C::kInAlong;
    }

    static constexpr int kGroup = 4;  // moves that share their arithmetic: neighbours' are between
    static constexpr int kNearRows = C::kTransposed ? 8 : 1;  // rows of neighbouring threads: their banks differ

    static_assert(kWhole || C::kAlong % 4 == 0, "kAlong must be a multiple of 4: windows start at 16 bytes");
    static_assert(kTaps <= C::kChunk || C::kChunk % 4 == 0, "kChunk must be a multiple of 4, as kAlong");
    static_assert(!C::kHalves || (kStride == 1 && 2 * kPad == (kTaps - 1) * kDilation && C::kInAlong == 2 * C::kAlong),
                  "halves of a line mirror each other if as much padding stands before it as behind it");
    static_assert(!C::kHalves || (!C::kQueued && kTaps <= C::kChunk),
                  "halves are made of all taps, and stored together");
    static_assert(C::kAcross == 1 || kTaps <= C::kChunk, "kChunk must hold all taps of a line for several lines");
};

// Count elements of shared memory, a power of two, by as few instructions as there can be; the address must be a
// multiple of their size, of 16 bytes at most.
template <int Count, class T>
__device__ __forceinline__ void load_shared(const T* address, T* into) {
    constexpr int kWidth = smaller(Count, 16 / sizeof(T));
#pragma unroll
    for (int k = 0; k < Count; k += kWidth) {
        const auto values = *reinterpret_cast<const Vector<T, kWidth>*>(address + k);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) into[k + e] = values.element[e];
    }
}
template <int Count, class T>
__device__ __forceinline__ void store_shared(T* address, const T* from) {
    constexpr int kWidth = smaller(Count, 16 / sizeof(T));
#pragma unroll
    for (int k = 0; k < Count; k += kWidth) {
        Vector<T, kWidth> values;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) values.element[e] = from[k + e];
        *reinterpret_cast<Vector<T, kWidth>*>(address + k) = values;
    }
}

// What a block works on.
struct WideBand {
    unsigned first_image, first_channel;
    int channels;                       // that exist
    int across, along;                  // its first output
    int out_across, out_along;          // its outputs, at most
    int in_across, in_lines, in_along;  // input staged: first line, lines, first element of each
};

template <class C>
__device__ __forceinline__ WideBand wide_band(const Sizes& sizes, const WideNchwTiling& tiling) {
    using Axes = WideAxes<C>;
    WideBand band;
    unsigned rest = blockIdx.x;
    const auto next = [&rest](const FastDivisor& count) {
        const unsigned quotient = count.quotient(rest), digit = rest - quotient * count.divisor;
        rest = quotient;
        return digit;
    };
    const int most_along = tiling.along_tiles.divisor * C::kAlong,
              most_across = tiling.across_tiles.divisor * C::kAcross;
    band.along = next(tiling.along_bands) * most_along;
    band.across = next(tiling.across_bands) * most_across;
    band.first_channel = next(tiling.channel_groups) * tiling.channels;
    band.first_image = rest * tiling.images.divisor;
    band.channels = smaller(tiling.channels, static_cast<int>(sizes.out_channels - band.first_channel));

    band.out_along = smaller(most_along, static_cast<int>(C::kTransposed ? sizes.out_h : sizes.out_w) - band.along);
    band.out_across = smaller(most_across, static_cast<int>(C::kTransposed ? sizes.out_w : sizes.out_h) - band.across);
    const int lines = static_cast<int>(C::kTransposed ? sizes.in_w : sizes.in_h);
    const int top = band.across * Axes::kAcrossStride - Axes::kAcrossPad;
    const int reach = (band.out_across - 1) * Axes::kAcrossStride + (Axes::kLines - 1) * Axes::kAcrossDilation + 1;
    band.in_across = larger(top, 0);
    band.in_lines = larger(smaller(top + reach, lines) - band.in_across, 0);
    band.in_along = Axes::kWhole ? 0 : larger(band.along * Axes::kStride - Axes::kPad, -Axes::kMargin) - Axes::kShift;
    return band;
}

// The filters of the block's channels, on their way to shared memory: the first elements wait in registers.
template <class C, class Sum>
struct FilterStage {
    using Axes = WideAxes<C>;
    using T = typename C::Element;
    static constexpr int kHeld = 4, kTaps = C::kFilterH * C::kFilterW;
    const T* from;
    unsigned count;
    T held[kHeld];

    __device__ __forceinline__ void load(const T* w, const WideBand& band) {
        count = static_cast<unsigned>(band.channels * kTaps);
        from = w + static_cast<long long>(band.first_channel) * kTaps;
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            const unsigned at = threadIdx.x + k * blockDim.x;
            if (at < count) held[k] = load_one(from + at);
        }
    }
    __device__ __forceinline__ static void put(Sum* filters, unsigned number, T value) {
        const unsigned at = tap_at<C>(number);
        const unsigned row = at / C::kFilterW, column = at - row * C::kFilterW;
        const unsigned channel = at / kTaps, u = row - channel * C::kFilterH;
        const unsigned line = channel * (Axes::kCopies * Axes::kLines) + (C::kTransposed ? column : u);
        const unsigned tap = C::kTransposed ? u : column;
        filters[line * Axes::kTapPitch + tap] = static_cast<Sum>(value);
        if constexpr (C::kHalves)
            filters[(line + Axes::kLines) * Axes::kTapPitch + (Axes::kTaps - 1 - tap)] = static_cast<Sum>(value);
    }
    __device__ __forceinline__ void store(Sum* filters) const {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            const unsigned at = threadIdx.x + k * blockDim.x;
            if (at < count) put(filters, at, held[k]);
        }
#pragma unroll 1
        for (unsigned at = threadIdx.x + kHeld * blockDim.x; at < count; at += blockDim.x)
            put(filters, at, load_one(from + at));
    }
};

// Where kGroup moves of Width elements of a band are: `line` and first `column` in the band's part of an image.
struct WidePlace {
    unsigned near_image, near_channel;  // numbers in the block
    unsigned image, channel;            // output channel
    int row, column, step;              // step: columns from one move to the next
    bool exists;
};

template <class C, int Width>
__device__ __forceinline__ WidePlace wide_place(unsigned at, const FastDivisor& rows, const FastDivisor& moves,
                                                const WideBand& band, const Sizes& sizes,
                                                const WideNchwTiling& tiling) {
    constexpr unsigned kNear = WideAxes<C>::kNearRows;
    WidePlace place;
    const unsigned rest = at / kNear, line = moves.quotient(rest);
    const unsigned plane = rows.quotient(line);
    place.row = static_cast<int>((line - plane * rows.divisor) * kNear + at % kNear);
    place.column = static_cast<int>(rest - line * moves.divisor) * Width;
    place.step = static_cast<int>(moves.divisor) * Width;
    place.near_channel = tiling.images.quotient(plane);
    place.near_image = plane - place.near_channel * tiling.images.divisor;
    place.channel = band.first_channel + place.near_channel;
    place.image = band.first_image + place.near_image;
    place.exists = place.near_channel < (tiling.channels_merged ? 1 : tiling.channels) && place.image < tiling.batch &&
                   place.channel < sizes.out_channels;
    return place;
}

// Copies the band's input to shared memory, zeros where the image ends; Width elements a move.
template <class C, int Width, class Sum>
__device__ __forceinline__ void stage_input(const typename C::Element* x, Sum* staged, const WideBand& band,
                                            const Sizes& sizes, const WideNchwTiling& tiling) {
    using Axes = WideAxes<C>;
    constexpr int kBatch = 2, kGroup = Axes::kGroup, kPiece = smaller(Width, Axes::kRead);
    int height = static_cast<int>(sizes.in_h), width = static_cast<int>(sizes.in_w);
    const int extent = static_cast<int>(tiling.in_extent), pitch = static_cast<int>(tiling.in_pitch);
    int row = C::kTransposed ? band.in_along : band.in_across, rows = C::kTransposed ? extent : band.in_lines;
    int column = C::kTransposed ? band.in_across : band.in_along, columns = C::kTransposed ? band.in_lines : extent;
    if (tiling.in_merged) {
        x += row * sizes.x_row;
        columns = width = rows * width;
        row = column = 0;
        rows = height = 1;
    }
    if (tiling.channels_merged) columns = width = width * band.channels;
    // Moves start at multiples of their size; only columns that are lines can begin between two.
    const int before = C::kTransposed && Width > 1 ? column % Width : 0;

    const unsigned count = tiling.images.divisor * (tiling.channels_merged ? 1 : tiling.channels) *
                           tiling.in_rows.divisor * tiling.in_moves.divisor * Axes::kNearRows;
#pragma unroll 1
    for (unsigned start = threadIdx.x; start < count; start += kBatch * blockDim.x) {
        Vector<typename C::Element, Width> moved[kBatch][kGroup];
        int into[kBatch], mirrored[kBatch], from[kBatch], step = 0;  // in shared memory; in the line
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const WidePlace place =
                wide_place<C, Width>(start + k * blockDim.x, tiling.in_rows, tiling.in_moves, band, sizes, tiling);
            const int c = place.column - before;
            const bool exists = place.exists && place.row < rows;
            const bool readable = exists && static_cast<unsigned>(row + place.row) < static_cast<unsigned>(height);
            from[k] = exists ? c : columns;
            step = place.step;
            into[k] = static_cast<int>(place.near_image * tiling.in_image + place.near_channel * tiling.in_channel) +
                      (C::kTransposed ? c * pitch + place.row : place.row * pitch + c);
            mirrored[k] =
                into[k] + static_cast<int>(tiling.in_mirror) + extent - 1 - 2 * (C::kTransposed ? place.row : c);
            const typename C::Element* line = x + place.image * sizes.x_image +
                                              place.channel / C::kMultiplier * sizes.x_channel +
                                              (row + place.row) * sizes.x_row + (column + c);
#pragma unroll
            for (int g = 0; g < kGroup; ++g) {
                moved[k][g] = {};
                if (readable && static_cast<unsigned>(column + c + g * step) < static_cast<unsigned>(width))
                    moved[k][g] = load_vector<Width>(line + g * step);
            }
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
#pragma unroll
            for (int g = 0; g < kGroup; ++g) {
                const int c = from[k] + g * step;
                if (c >= columns) continue;
                Sum sums[Width];
#pragma unroll
                for (int e = 0; e < Width; ++e) sums[e] = static_cast<Sum>(moved[k][g].element[e]);
                if constexpr (C::kTransposed) {
#pragma unroll
                    for (int e = 0; e < Width; ++e)
                        if (Width == 1 || static_cast<unsigned>(c + e) < static_cast<unsigned>(columns)) {
                            staged[into[k] + (g * step + e) * pitch] = sums[e];
                            if constexpr (C::kHalves) staged[mirrored[k] + (g * step + e) * pitch] = sums[e];
                        }
                } else {
                    if constexpr (C::kHalves)
#pragma unroll
                        for (int e = 0; e < Width; ++e) staged[mirrored[k] - (g * step + e)] = sums[e];
#pragma unroll
                    for (int e = 0; e < Width; e += kPiece)
                        store_shared<kPiece>(staged + into[k] + g * step + e, sums + e);
                }
            }
    }
}

}  // namespace dwconv
