// wide_nchw.cuh: depthwise convolution, channels first, filters too large for registers: planes in shared memory
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]     float32 sum
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   One axis of the image is `along` (columns, or rows where kTransposed), the other `across`. A lane makes kAlong
//   neighbouring outputs along, in kAcross places across. It takes its input lines one after the other: the line comes
//   from shared memory 4 elements at a time and is multiplied by up to kChunk taps that wait in registers.
//   kHalves: a line belongs to two lanes, the second of which makes its half from the line's end.
//   A block makes a band of `images` x `channels` planes. Shared memory, in sums' type: the number of the next task;
//   the filters, their lines padded to an odd number of 16 bytes; the input of the band. Where lanes own short whole
//   lines, one tile each, their outputs take the input's place before they leave; else warps take tasks of 32 tiles
//   until none is left, and each has a buffer that the outputs of its task leave from.
//   grid.x = image groups * channel groups * bands across * bands along
//   least DRAM traffic: x + w + y, once each; halos between bands come from L2
#pragma once
#include "wide_staging.cuh"

namespace dwconv {

// Adds the products of neighbouring elements of a line, the first of which is element c of the window, with Count taps,
// the first of which is tap First; where lines are cut, the window is that of the chunk, and First 0.
template <class C, int First, int Count, int Elements, class Sum>
__device__ __forceinline__ void add_products(const Sum (&element)[Elements], int c, const Sum* tap,
                                             Sum (&sums)[C::kAlong]) {
    using Axes = WideAxes<C>;
#pragma unroll
    for (int e = 0; e < Elements; ++e)
#pragma unroll
        for (int v = 0; v < Count; ++v) {
            const int distance = c + e + (Axes::kWhole ? Axes::kPad : -Axes::kShift) - (First + v) * Axes::kDilation;
            if (c + e < Axes::span(Count) && is_tap(distance, Axes::kStride, C::kAlong))
                sums[distance / Axes::kStride] += tap[v] * element[e];
        }
}

// Adds one chunk of Count taps of one line to the outputs: window[kShift] is what the first output's first tap reads,
// or window[0] the line's first element where a lane owns whole lines.
template <class C, int First, int Count, class Sum>
__device__ __forceinline__ void add_taps(const Sum* window, const Sum* taps, Sum (&sums)[C::kAlong]) {
    using Axes = WideAxes<C>;
    Sum tap[ceil_div(Count, 4) * 4];
#pragma unroll
    for (int v = 0; v < Count; v += 4) load_shared<4>(taps + v, tap + v);
#pragma unroll
    for (int c = 0; c < Axes::span(Count); c += Axes::kRead) {
        Sum read[Axes::kRead];
        load_shared<Axes::kRead>(window + c, read);
        add_products<C, First, Count>(read, c, tap, sums);
    }
}

// Adds one line of the input to the outputs of one line that reads it with these taps.
//   start = index of the element that the first output's first tap reads, staged at window[kShift] unless lines are
//   whole
template <class C, class Sum>
__device__ __forceinline__ void add_line(const Sum* window, const Sum* taps, int start, int length,
                                         Sum (&sums)[C::kAlong]) {
    using Axes = WideAxes<C>;
    if constexpr (Axes::kTaps <= C::kChunk) {
        add_taps<C, 0, Axes::kTaps>(window, taps, sums);
    } else {
        constexpr int kStep = C::kChunk * Axes::kDilation;
        const int first = larger(0, ceil_div(-(start + Axes::kReach), kStep));  // what lies before it is padding
        const int last = start < length ? ceil_div(length - start, kStep) : 0;
        window += first * kStep;
        taps += first * C::kChunk;
#pragma unroll 1
        for (int chunk = first; chunk < smaller(last, Axes::kFull); ++chunk) {
            add_taps<C, 0, C::kChunk>(window, taps, sums);
            window += kStep;
            taps += C::kChunk;
        }
        if constexpr (Axes::kRest > 0)
            if (first <= Axes::kFull && last > Axes::kFull) add_taps<C, 0, Axes::kRest>(window, taps, sums);
    }
}

// Stores the band's outputs, Width elements a move.
template <class C, int Width, class Sum>
__device__ __forceinline__ void store_band(const Tensors<typename C::Element>& tensors, const Sum* staged,
                                           const WideBand& band, const Sizes& sizes, const WideNchwTiling& tiling) {
    using Axes = WideAxes<C>;
    const int width = static_cast<int>(sizes.out_w), pitch = static_cast<int>(tiling.out_pitch);
    const int row = C::kTransposed ? band.along : band.across, column = C::kTransposed ? band.across : band.along;
    int rows = C::kTransposed ? band.out_along : band.out_across;
    int columns = C::kTransposed ? band.out_across : band.out_along;
    if (tiling.out_merged) {
        columns = rows * width;
        rows = 1;
    }
    const unsigned plane = static_cast<unsigned>(columns);
    if (tiling.channels_merged) columns *= band.channels;
    const unsigned count = tiling.images.divisor * (tiling.channels_merged ? 1 : tiling.channels) *
                           tiling.out_rows.divisor * tiling.out_moves.divisor * Axes::kNearRows;
    constexpr int kPiece = C::kTransposed ? 1 : smaller(Width, Axes::kWrite);
#pragma unroll 1
    for (unsigned at = threadIdx.x; at < count; at += blockDim.x) {
        const WidePlace place = wide_place<C, Width>(at, tiling.out_rows, tiling.out_moves, band, sizes, tiling);
        if (!place.exists || place.row >= rows) continue;
        const Sum* from = staged + place.near_image * tiling.out_image + place.near_channel * tiling.out_channel +
                          (C::kTransposed ? place.column * pitch + place.row : place.row * pitch + place.column);
        ChannelValues<Sum> values[Width];
        values[0] = channel_values<C>(tensors, place.channel);
#pragma unroll
        for (int e = 1; e < Width; ++e) values[e] = values[0];
        const long long line = (place.image * sizes.out_channels + place.channel) * sizes.out_h + row + place.row;
        const long long first = line * width + column;
#pragma unroll 1
        for (int c = place.column; c < columns; c += place.step) {
            Sum sums[Width];
#pragma unroll
            for (int e = 0; e < Width; e += kPiece)
                load_shared<kPiece>(from + e * (C::kTransposed ? pitch : 1), sums + e);
            if constexpr (C::kHasScale || C::kHasShift)
                if (tiling.channels_merged)
#pragma unroll
                    for (int e = 0; e < Width; ++e)
                        values[e] = channel_values<C>(tensors, place.channel + (c + e) / plane);
            store_outputs<C, Width, 1>(tensors, first + c, sums, values);
            from += place.step * (C::kTransposed ? pitch : 1);
        }
    }
}

// Adds the taps from First on of the filter's lines `first` to `last`, one chunk of all lines after the other: the code
// of one line's taps would be too long for the instruction cache.
template <class C, int First, class Sum>
__device__ __forceinline__ void sum_chunks(const Sum* input, const Sum* filter, int first, int last, int pitch,
                                           Sum (&sums)[C::kAlong]) {
    using Axes = WideAxes<C>;
    constexpr int kCount = smaller(C::kChunk, Axes::kTaps - First);
#pragma unroll 1
    for (int u = first; u < last; ++u)
        add_taps<C, First, kCount>(input + u * Axes::kAcrossDilation * pitch, filter + u * Axes::kTapPitch + First,
                                   sums);
    if constexpr (First + kCount < Axes::kTaps) sum_chunks<C, First + kCount>(input, filter, first, last, pitch, sums);
}

// What a lane makes: kAcross lines of kAlong outputs. Places are those of the plane.
struct WideTile {
    unsigned near_image, near_channel;  // numbers in the block
    unsigned image, channel;            // output channel
    int across, along;
    bool exists;
};

// Neighbouring lanes have images of one channel, whose taps are the same; then come tiles across, along, across.
template <class C>
__device__ __forceinline__ WideTile wide_tile(unsigned index, const WideBand& band, const Sizes& sizes,
                                              const WideNchwTiling& tiling) {
    unsigned rest = index;
    const auto next = [&rest](const FastDivisor& count) {
        const unsigned quotient = count.quotient(rest), digit = rest - quotient * count.divisor;
        rest = quotient;
        return digit;
    };
    const auto next_near = [&] {  // a power of two
        const unsigned digit = rest & (tiling.near_tiles - 1);
        rest /= tiling.near_tiles;
        return digit;
    };
    // Columns are neighbours in memory: where lanes own columns, neighbouring ones come first.
    unsigned near_tile = C::kTransposed ? next_near() : 0;
    const unsigned image = next(tiling.images);
    if (!C::kTransposed) near_tile = next_near();
    WideTile tile;
    tile.along = band.along + static_cast<int>(next(tiling.along_tiles)) * C::kAlong;
    rest = rest * tiling.near_tiles + near_tile;
    int across = static_cast<int>(next(tiling.across_tiles));
    if (tiling.folded) across = across % 2 ? tiling.across_tiles.divisor - 1 - across / 2 : across / 2;
    tile.across = band.across + across * C::kAcross;
    tile.near_image = image;
    tile.near_channel = rest;
    tile.image = band.first_image + image;
    tile.channel = band.first_channel + rest;
    tile.exists = rest < tiling.channels && tile.channel < sizes.out_channels && tile.image < tiling.batch &&
                  tile.across < band.across + band.out_across;
    return tile;
}

// The sums of a tile, line by line of the input that is staged.
template <class C, class Sum>
__device__ __forceinline__ void sum_tile(const Tensors<typename C::Element>& tensors, const Sum* filters,
                                         const Sum* staged, const WideTile& tile, const WideBand& band,
                                         const Sizes& sizes, const WideNchwTiling& tiling,
                                         Sum (&sums)[C::kAcross][C::kAlong]) {
    using Axes = WideAxes<C>;
    Sum bias = Sum(0);
    if constexpr (C::kHasBias)
        if (tile.exists) bias = static_cast<Sum>(load_one(tensors.b + tile.channel));
#pragma unroll
    for (int i = 0; i < C::kAcross; ++i)
#pragma unroll
        for (int o = 0; o < C::kAlong; ++o) sums[i][o] = bias;
    if (!tile.exists) return;

    const bool mirrored = C::kHalves && tile.along > 0;
    const Sum* filter = filters + (tile.near_channel * Axes::kCopies + mirrored) * (Axes::kLines * Axes::kTapPitch);
    const int pitch = static_cast<int>(tiling.in_pitch);
    const int length = static_cast<int>(C::kTransposed ? sizes.in_h : sizes.in_w);
    const int lines = band.in_across + band.in_lines;
    const int start = tile.along * Axes::kStride - Axes::kPad;
    const int top = tile.across * Axes::kAcrossStride - Axes::kAcrossPad;
    // Where line 0 of the image would be, and in it what the first output's first tap reads.
    const Sum* input = staged +
                       static_cast<int>(tile.near_image * tiling.in_image + tile.near_channel * tiling.in_channel +
                                        mirrored * tiling.in_mirror) -
                       band.in_across * pitch;
    if constexpr (!Axes::kWhole) input += start - Axes::kShift - band.in_along;
    if constexpr (C::kAcross == 1) {
        const int first = larger(0, ceil_div(-top, Axes::kAcrossDilation));
        const int last = smaller(Axes::kLines, ceil_div(lines - top, Axes::kAcrossDilation));
        if constexpr (Axes::kWhole && Axes::kTaps > C::kChunk) {
            sum_chunks<C, 0>(input + top * pitch, filter, first, last, pitch, sums[0]);
        } else {
#pragma unroll 1
            for (int u = first; u < last; ++u)
                add_line<C>(input + (top + u * Axes::kAcrossDilation) * pitch, filter + u * Axes::kTapPitch, start,
                            length, sums[0]);
        }
    } else {
        constexpr int kHeight = (C::kAcross - 1) * Axes::kAcrossStride + (Axes::kLines - 1) * Axes::kAcrossDilation + 1;
        constexpr int kElements = ceil_div(Axes::span(Axes::kTaps), Axes::kRead) * Axes::kRead;
#pragma unroll 1
        for (int r = larger(top, 0); r < smaller(top + kHeight, lines); ++r) {
            Sum line[kElements];
#pragma unroll
            for (int c = 0; c < kElements; c += Axes::kRead) load_shared<Axes::kRead>(input + r * pitch + c, line + c);
#pragma unroll
            for (int i = 0; i < C::kAcross; ++i) {
                const int below = r - top - i * Axes::kAcrossStride;
                if (!is_tap(below, Axes::kAcrossDilation, Axes::kLines)) continue;
                const Sum* taps = filter + below / Axes::kAcrossDilation * Axes::kTapPitch;
                Sum tap[ceil_div(Axes::kTaps, 4) * 4];
#pragma unroll
                for (int v = 0; v < Axes::kTaps; v += 4) load_shared<4>(taps + v, tap + v);
                add_products<C, 0, Axes::kTaps>(line, 0, tap, sums[i]);
            }
        }
    }
}

// Stores one line of each lane's tile, or a part of it: the warp puts the lines into its buffer, one a lane, and takes
// them out along memory, Width elements a move.
//   first = the line's first output in y, count = outputs of it that exist
template <class C, int Width, class Sum>
__device__ __forceinline__ void store_lines(const Tensors<typename C::Element>& tensors, const Sum* buffer,
                                            long long first, int count, unsigned channel, int out_width) {
    using Axes = WideAxes<C>;
    const int lane = threadIdx.x % 32;
    if constexpr (C::kTransposed) {  // Width neighbouring lanes' columns are neighbours in memory
        constexpr int kLanes = 32 / Width;
        const int line = lane % kLanes * Width;
        const long long start = shuffled(first, line, 32);
        const auto values = channel_values<C>(tensors, shuffled(channel, line, 32));
        count = shuffled(count, line, 32);
#pragma unroll 1
        for (int o = lane / kLanes; o < count; o += Width) {
            Sum sums[Width];
#pragma unroll
            for (int e = 0; e < Width; ++e) sums[e] = buffer[(line + e) * Axes::kBufferPitch + o];
            store_outputs<C, Width, 0>(tensors, start + static_cast<long long>(o) * out_width, sums, &values);
        }
    } else {
        constexpr int kMoves = Axes::kPass / Width, kPiece = smaller(Width, Axes::kWrite);
#pragma unroll 1
        for (int at = lane; at < 32 * kMoves; at += 32) {
            const int line = at / kMoves, column = (at - line * kMoves) * Width;
            const long long place = shuffled(first, line, 32) + column;
            const unsigned line_channel = shuffled(channel, line, 32);
            if (shuffled(count, line, 32) <= column) continue;
            Sum sums[Width];
#pragma unroll
            for (int e = 0; e < Width; e += kPiece)
                load_shared<kPiece>(buffer + line * Axes::kBufferPitch + column + e, sums + e);
            const auto values = channel_values<C>(tensors, line_channel);
            store_outputs<C, Width, 0>(tensors, place, sums, &values);
        }
    }
}

template <class C, class Sum>
__device__ __forceinline__ void store_tile(const Tensors<typename C::Element>& tensors, Sum* buffer,
                                           const WideTile& tile, const Sizes& sizes, const WideNchwTiling& tiling,
                                           const Sum (&sums)[C::kAcross][C::kAlong]) {
    using Axes = WideAxes<C>;
    const int out_width = static_cast<int>(sizes.out_w);
    const int length = static_cast<int>(C::kTransposed ? sizes.out_h : sizes.out_w);
    const int lines = static_cast<int>(C::kTransposed ? sizes.out_w : sizes.out_h);
    const long long plane = (tile.image * sizes.out_channels + tile.channel) * sizes.out_h * sizes.out_w;
    Sum* own = buffer + threadIdx.x % 32 * Axes::kBufferPitch;
#pragma unroll
    for (int i = 0; i < C::kAcross; ++i)
#pragma unroll
        for (int part = 0; part < C::kAlong; part += Axes::kPass) {
            __syncwarp();  // the line before has left
#pragma unroll
            for (int o = 0; o < Axes::kPass; o += Axes::kWrite) store_shared<Axes::kWrite>(own + o, &sums[i][part + o]);
            __syncwarp();
            const int along = tile.along + part, across = tile.across + i;
            const long long first = plane + (C::kTransposed ? static_cast<long long>(along) * out_width + across
                                                            : static_cast<long long>(across) * out_width + along);
            const int count = tile.exists && across < lines ? smaller(Axes::kPass, length - along) : 0;
            if (tiling.out_wide)
                store_lines<C, Axes::kMove>(tensors, buffer, first, count, tile.channel, out_width);
            else
                store_lines<C, 1>(tensors, buffer, first, count, tile.channel, out_width);
        }
}

template <class C>
__device__ __forceinline__ void wide_nchw(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                          const WideNchwTiling& tiling) {
    using Axes = WideAxes<C>;
    using Sum = typename Accumulator<typename C::Element>::Type;
    const WideBand band = wide_band<C>(sizes, tiling);
    unsigned* next_task = shared_memory<unsigned>();
    Sum* filters = shared_memory<Sum>() + 16 / sizeof(Sum);
    Sum* staged = filters + tiling.channels * (Axes::kCopies * Axes::kLines * Axes::kTapPitch);
    FilterStage<C, Sum> taps;
    taps.load(tensors.w, band);
    if (tiling.in_wide)
        stage_input<C, Axes::kMove>(tensors.x, staged, band, sizes, tiling);
    else
        stage_input<C, 1>(tensors.x, staged, band, sizes, tiling);
    taps.store(filters);
    if (threadIdx.x == 0) *next_task = 0;
    __syncthreads();

    Sum sums[C::kAcross][C::kAlong];
    if constexpr (C::kQueued) {
        // A warp takes one task after the other, the longest first, so that none waits for those with more to sum.
        Sum* buffer = staged + tiling.channels * tiling.in_channel + threadIdx.x / 32 * (32 * Axes::kBufferPitch);
        for (;;) {
            unsigned task = 0;
            if (threadIdx.x % 32 == 0) task = atomicAdd(next_task, 1u);
            task = shuffled(task, 0, 32);
            if (task >= tiling.tasks) break;
            const WideTile tile = wide_tile<C>((tiling.tasks - 1 - task) * 32 + threadIdx.x % 32, band, sizes, tiling);
            sum_tile<C>(tensors, filters, staged, tile, band, sizes, tiling, sums);
            store_tile<C>(tensors, buffer, tile, sizes, tiling, sums);
        }
    } else {
        const WideTile tile = wide_tile<C>(threadIdx.x, band, sizes, tiling);
        sum_tile<C>(tensors, filters, staged, tile, band, sizes, tiling, sums);
        __syncthreads();  // all lanes have read their input
        if (tile.exists) {
            Sum* into = staged + tile.near_image * tiling.out_image + tile.near_channel * tiling.out_channel +
                        (tile.across - band.across) * tiling.out_pitch + (tile.along - band.along);
            const int step = C::kHalves && tile.along > 0 ? -1 : 1;
            if (step < 0) into += C::kAlong - 1;
#pragma unroll
            for (int i = 0; i < C::kAcross; ++i)
#pragma unroll
                for (int o = 0; o < C::kAlong; o += C::kHalves ? 1 : Axes::kWrite)
                    if (tile.across + i < band.across + band.out_across)
                        store_shared<C::kHalves ? 1 : Axes::kWrite>(into + i * tiling.out_pitch + o * step,
                                                                    &sums[i][o]);
        }
        __syncthreads();
        if (tiling.out_wide)
            store_band<C, Axes::kMove>(tensors, staged, band, sizes, tiling);
        else
            store_band<C, 1>(tensors, staged, band, sizes, tiling);
    }
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 128
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_ALONG 28
#define DWCONV_ACROSS 1
#define DWCONV_CHUNK 32
#define DWCONV_IN_ALONG 0
#define DWCONV_HALVES 0
#define DWCONV_TRANSPOSED 0
#define DWCONV_QUEUED 1
#define DWCONV_CHANNELS 1
#define DWCONV_SHARED_BUDGET 76800
#define DWCONV_SHARED_LIMIT 232448
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kAlong = DWCONV_ALONG, kAcross = DWCONV_ACROSS, kChunk = DWCONV_CHUNK;
    static constexpr int kInAlong = DWCONV_IN_ALONG;
    static constexpr bool kHalves = DWCONV_HALVES;
    static constexpr bool kTransposed = DWCONV_TRANSPOSED, kQueued = DWCONV_QUEUED;
    static constexpr int kChannels = DWCONV_CHANNELS;  // for the launch, as these
    static constexpr int kSharedBudget = DWCONV_SHARED_BUDGET, kSharedLimit = DWCONV_SHARED_LIMIT;  // for the launch
};

using Tiling = dwconv::WideNchwTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::wide_nchw<Config>(tensors, sizes, tiling);
}
