// volume_tiles.cuh: tiles of input planes in shared memory, for the kernels of volumes.cuh
#pragma once
#include "copies.cuh"
#include "epilogue.cuh"

namespace dwconv {

struct VolumeTiling {
    FastDivisor tiles_x, tiles_y;  // tiles of a plane
    FastDivisor length;            // output planes of a tile, of one residue of depth
    FastDivisor channels;          // channels first: output channels; channels last: chunks of them
    FastDivisor lanes_x, lanes_y;  // channels first: lanes beside and below one another; channels last: lanes_y alone
    unsigned volumes;              // channels first: output volumes of a block
    unsigned tile_rows;            // rows of one volume's tile of input, halo and all
    unsigned tile_columns;         // columns of it that are read; others stay zero
    unsigned vectors;              // of the tile of input, all volumes
    unsigned warps;                // tensor cores: of a volume
    unsigned table;                // entries of the table: vectors, rounded up to whole batches of all threads
    unsigned threads;              // of the block
    unsigned share;                // output planes of tiles that a block makes, one after the other
    unsigned total;                // of them in all
};

template <class C>
struct Volume {
    using Element = typename C::Element;
    using Sum = typename Accumulator<Element>::Type;
    // tiles are used as they arrive; channels-first 16-bit ones otherwise as float32, so that a window is 16-byte loads
    static constexpr bool kDirect = C::kMatrix || C::kChannelsLast || sizeof(Element) == sizeof(Sum);
    static constexpr int kDilationD = C::kFilterD == 1 ? 1 : C::kDilationD;
    // Where every output plane takes its own input planes, a period is the filter's depth, else the stride: after so
    // many steps, the next output begins.
    static constexpr int kPeriod = C::kReload ? C::kFilterD : C::kStrideD;
    static constexpr int kAges = ceil_div(C::kFilterD, kPeriod);
    static constexpr int kResidues =
        C::kReload || C::kStrideD > 1 ? 1 : kDilationD;  // classes of planes that never meet
    static_assert(C::kReload || C::kStrideD == 1 || kDilationD == 1, "kReload is needed for a dilated, strided depth");
    static_assert(!C::kHeldTaps || kPeriod == 1, "kHeldTaps needs taps that are known at compile time in every step");
    static constexpr int kSpan = (C::kColumns - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW + 1;
    static constexpr int kInRows = (C::kRows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1;
    // Taps in shared memory, of a lane's channels: [part of a period][u][age][v], rows [age][v] rounded up to 16 bytes.
    // Neighbouring lanes' taps start in different banks.
    static constexpr int kTapRow = ceil_div(C::kFilterW * kAges, 4) * 4;
    static constexpr int kTapVector = 16 / static_cast<int>(sizeof(Sum));
    static constexpr int kTapPitch =
        (kPeriod * C::kFilterH * kTapRow * C::kVector / kTapVector / 2 * 2 + 1) * kTapVector;
    static constexpr int kTaps = C::kFilterD * C::kFilterH * C::kFilterW;
    static constexpr int kTapRows = C::kFilterD * C::kFilterH;
    static constexpr int kShift = ceil_div(C::kPadLeft, C::kColumnAlign) * C::kColumnAlign;
    static constexpr int kOffset = kShift - C::kPadLeft;  // columns of the tile left of the first window
    static constexpr int kLanes = C::kChannelsLast ? C::kChunk * C::kMultiplier / C::kVector : 1;
    static constexpr bool kPaired = C::kMatrix && C::kChannelsLast;  // volume_pairs.cuh
    static constexpr int kSteps = kPaired ? ceil_div(3 * C::kStrideW + (C::kFilterW - 1) * C::kDilationW + 1, 8) : 1;
    // Elements from pixel to pixel of a tile, channels last: of pairs, an odd number, so that they lie in different
    // banks.
    static constexpr int kPixel = kPaired ? C::kChunk / 4 * 4 + 2 : C::kChunk;
    // A lane's sums are those of kRows x kColumns outputs of kVector channels, or its four of each of kRows products.
    static constexpr int kSumColumns = C::kMatrix ? 1 : C::kColumns, kSumVector = C::kMatrix ? 4 : C::kVector;
    static constexpr int kLaneChannels = kPaired ? 2 : C::kVector;
    static constexpr bool kRotates = C::kRotate && kPeriod == 1;
    // Whether planes that don't exist come only before and behind those that do, and the first output has one that
    // does: steps are those of planes then, and what is in the making behind the last one is stored as it is.
    static constexpr bool kEnds =
        !C::kMatrix && !kRotates && !C::kReload && C::kPadFront <= (C::kFilterD - 1) * kDilationD;
    static constexpr int kUnroll = kRotates ? kAges : 1;
    static_assert(C::kPitch % C::kLoadVector == 0, "kLoadVector must divide kPitch: rows are whole vectors");

    // Does some output of a lane read column k of its window?
    static __host__ __device__ constexpr bool reads(int k) {
        for (int o = 0; o < C::kColumns; ++o)
            if (is_tap(k - o * C::kStrideW, C::kDilationW, C::kFilterW)) return true;
        return false;
    }
    // Where tap t, u, v stands in a lane's.
    static __host__ __device__ constexpr int tap_place(int t, int u, int v) {
        return (t % kPeriod * C::kFilterH + u) * kTapRow + t / kPeriod * C::kFilterW + v;
    }
    // The places of a quad of columns that are read: how many, and the last.
    static __host__ __device__ constexpr int used(int quad) {
        int count = 0;
        for (int e = 0; e < 4; ++e) count += reads(4 * quad + e - kOffset % 4) ? 1 : 0;
        return count;
    }

    Sum sums[kAges][C::kRows][kSumColumns][kSumVector];
    Sum held[C::kHeldTaps && !C::kMatrix ? kTapRows : 1][C::kFilterW][C::kVector];
    // With kMatrix, channels first (volume_matrix.cuh), kRows is the number of a warp's products, 16 groups of 8
    // columns each; a lane has two of the groups: where its elements of them are in a tile and in a plane of y (-1:
    // nowhere); whether the second of a pair of outputs exists; its part of the filter's bands.
    int groups[C::kMatrix ? C::kRows : 1][2], places[C::kMatrix ? C::kRows : 1][2];
    int first_group;
    unsigned seconds;
    uint2 bands[C::kMatrix && C::kHeldTaps ? kTapRows * kSteps : 1];
    const uint2* filter;
    // Channels last (volume_pairs.cuh): the lane's words of the filter, and its first place in the tile of outputs.
    const unsigned* words[2 * kSteps];
    int out_word;
};

// Where the sums of an age stand, in the phase of a rotation.
template <class C>
__device__ __forceinline__ constexpr int slot_of(int age, int phase) {
    return Volume<C>::kRotates ? (phase - age + Volume<C>::kAges) % Volume<C>::kAges : age;
}

// The filters of `lanes` lanes in shared memory; channel_of says whose filter is whose, none if negative.
template <class C, class Sum, class Channels>
__device__ __forceinline__ void share_taps(const Tensors<typename C::Element>& tensors, const VolumeTiling& tiling,
                                           int lanes, Sum* taps, const Channels& channel_of) {
    using V = Volume<C>;
    for (int at = threadIdx.x; at < lanes * V::kTapPitch; at += tiling.threads) taps[at] = Sum(0);
    __syncthreads();
#pragma unroll 8  // so that loads don't wait for one another
    for (int at = threadIdx.x; at < lanes * C::kVector * V::kTaps; at += tiling.threads) {
        const int tap = at % V::kTaps, lane = at / V::kTaps / C::kVector, e = at / V::kTaps % C::kVector;
        const int v = tap % C::kFilterW, u = tap / C::kFilterW % C::kFilterH, t = tap / (C::kFilterW * C::kFilterH);
        const long long channel = channel_of(lane * C::kVector + e);
        if (channel >= 0)
            taps[lane * V::kTapPitch + V::tap_place(t, u, v) * C::kVector + e] =
                static_cast<Sum>(load_one(tensors.w + channel * V::kTaps + tap_at<C>(tap)));
    }
}

constexpr int kNowhere = -2147483647 - 1;  // offset of a vector that is not in the image; others may be negative too

// Copies the vector at `offset` of a plane, unless that is nowhere.
template <int Width, class T>
__device__ __forceinline__ void copy_to_shared(T* to, const T* plane, int offset) {
#ifdef DWCONV_ASYNC_COPIES
    constexpr int kBytes = Width * sizeof(T);
    if constexpr (kBytes >= 4) {
        const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
        if constexpr (kBytes == 16)
            asm volatile(
                "{.reg .pred p; setp.ne.s32 p, %2, -2147483648; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(
                    address),
                "l"(plane + offset), "r"(offset)
                : "memory");
        else
            asm volatile(
                "{.reg .pred p; setp.ne.s32 p, %2, -2147483648; @p cp.async.ca.shared.global [%0], [%1], %3;}" ::"r"(
                    address),
                "l"(plane + offset), "r"(offset), "n"(kBytes)
                : "memory");
        return;
    }
#endif
    if (offset != kNowhere) store_vector(to, load_vector<Width>(plane + offset));
}

// ---- the block ----

// Where a block and a lane work.
struct VolumePlace {
    int row, column;            // the lane's first output
    int tile_row, tile_column;  // the tile's first output
    long long image, channel;   // of the lane's outputs; channels last: the first of its channels
    int first, end;             // the stretch of depth: outputs first..end-1 of a residue
    int residue;
    int first_channel;  // channels last: of the block
    bool inside;        // whether the lane has outputs
    int rows, columns;  // that are inside of y
};

// Elements from one tile to the next in shared memory: each starts at a multiple of 16 bytes.
template <class C>
__device__ __forceinline__ int tile_elements(const VolumeTiling& tiling) {
    return static_cast<int>(tiling.vectors * C::kLoadVector + 7) / 8 * 8;
}

// Offsets of the tile's vectors in a plane of x, -1 where they are outside of the image; zeros into those.
template <class C, class Sum>
__device__ __forceinline__ void make_table(int* table, typename C::Element* slots, Sum* tiles, const Sizes& sizes,
                                           const VolumeTiling& tiling, const VolumePlace& place, long long first_plane,
                                           int first_channel) {
    using V = Volume<C>;
    constexpr int kWidth = C::kLoadVector, kRowVectors = C::kPitch / kWidth;
    const int top = place.tile_row * C::kStrideH - C::kPadTop, left = place.tile_column * C::kStrideW - V::kShift;
    const int elements = tile_elements<C>(tiling);
    const int in_w = static_cast<int>(sizes.in_w);
    for (int at = threadIdx.x; at < static_cast<int>(tiling.table); at += tiling.threads) {
        if (at >= static_cast<int>(tiling.vectors)) {  // the last batch of copies may not be full
            table[at] = kNowhere;
            continue;
        }
        int row = at / kRowVectors;
        const int element = at % kRowVectors * kWidth;
        long long offset = 0;
        bool exists = true;
        if constexpr (C::kChannelsLast) {
            if constexpr (C::kLinear) {
                const int column = left * C::kChunk + element;
                exists = column >= 0 && column < in_w * C::kChunk;
                offset = column;
            } else {
                const int column = left + element / V::kPixel, channel = element % V::kPixel;
                exists = column >= 0 && column < in_w && column < left + static_cast<int>(tiling.tile_columns) &&
                         channel < C::kChunk &&
                         first_channel + channel < static_cast<int>(sizes.out_channels / C::kMultiplier);
                offset = column * sizes.x_column + channel;
            }
        } else {
            const int volume = row / static_cast<int>(tiling.tile_rows);
            row -= volume * static_cast<int>(tiling.tile_rows);
            const int column = left + element;
            exists = column >= 0 && column < in_w && element < static_cast<int>(tiling.tile_columns) &&
                     first_plane + volume < sizes.planes;
            offset = column;
            if (volume > 0) {  // from the first volume's image and channel to this one's
                const unsigned from = static_cast<unsigned>(first_plane), to = from + volume;
                const int image_from = tiling.channels.quotient(from), image_to = tiling.channels.quotient(to);
                const int channel_from = (from - image_from * tiling.channels.divisor) / C::kMultiplier;
                const int channel_to = (to - image_to * tiling.channels.divisor) / C::kMultiplier;
                offset += (image_to - image_from) * sizes.x_image + (channel_to - channel_from) * sizes.x_channel;
            }
        }
        row += top;
        exists = exists && row >= 0 && row < static_cast<int>(sizes.in_h);
        table[at] = exists ? static_cast<int>(offset + row * sizes.x_row) : kNowhere;
        if (exists) continue;
        if constexpr (V::kDirect) {
#pragma unroll
            for (int stage = 0; stage < C::kStages; ++stage)
#pragma unroll
                for (int e = 0; e < kWidth; ++e)
                    slots[stage * elements + at * kWidth + e] = static_cast<typename C::Element>(Sum(0));
        } else {
#pragma unroll
            for (int e = 0; e < kWidth; ++e) tiles[at * kWidth + e] = tiles[elements + at * kWidth + e] = Sum(0);
        }
    }
}

// Offsets of the vectors that this thread fetches together, from the table.
template <class C>
__device__ __forceinline__ void read_table(const int* table, unsigned first, const VolumeTiling& tiling,
                                           int (&offset)[C::kBatch]) {
#pragma unroll
    for (int i = 0; i < C::kBatch; ++i) offset[i] = table[first + i * tiling.threads];
}

// Starts to fetch the tile of a plane. Every thread fetches the vectors that it made the table of; `only` are their
// offsets where they are one batch.
template <class C>
__device__ __forceinline__ void fetch(const int* table, const typename C::Element* plane, typename C::Element* slot,
                                      const VolumeTiling& tiling, const int (&only)[C::kBatch]) {
    if constexpr (C::kOneBatch) {
#pragma unroll
        for (int i = 0; i < C::kBatch; ++i)
            copy_to_shared<C::kLoadVector>(slot + (threadIdx.x + i * tiling.threads) * C::kLoadVector, plane, only[i]);
    } else {
#pragma unroll 1
        for (unsigned first = threadIdx.x; first < tiling.vectors; first += C::kBatch * tiling.threads) {
            int offset[C::kBatch];
            read_table<C>(table, first, tiling, offset);
#pragma unroll
            for (int i = 0; i < C::kBatch; ++i)
                copy_to_shared<C::kLoadVector>(slot + (first + i * tiling.threads) * C::kLoadVector, plane, offset[i]);
        }
    }
}

// Converts what this thread has fetched.
template <class C, class Sum>
__device__ __forceinline__ void convert(const int* table, const typename C::Element* slot, Sum* tile,
                                        const VolumeTiling& tiling) {
    constexpr int kWidth = C::kLoadVector, kStore = smaller(kWidth, 16 / static_cast<int>(sizeof(Sum)));
    using From = Vector<typename C::Element, kWidth>;
#pragma unroll 1
    for (unsigned first = threadIdx.x; first < tiling.vectors; first += C::kBatch * tiling.threads) {
        int offset[C::kBatch];
        read_table<C>(table, first, tiling, offset);
        From from[C::kBatch];
#pragma unroll
        for (int i = 0; i < C::kBatch; ++i)
            if (offset[i] != kNowhere)
                from[i] = *reinterpret_cast<const From*>(slot + (first + i * tiling.threads) * kWidth);
#pragma unroll
        for (int i = 0; i < C::kBatch; ++i) {
            if (offset[i] == kNowhere) continue;
#pragma unroll
            for (int part = 0; part < kWidth; part += kStore) {
                Vector<Sum, kStore> to;
#pragma unroll
                for (int e = 0; e < kStore; ++e) to.element[e] = static_cast<Sum>(from[i].element[part + e]);
                store_vector(tile + (first + i * tiling.threads) * kWidth + part, to);
            }
        }
    }
}

}  // namespace dwconv
