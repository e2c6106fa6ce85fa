// volume_ndhwc.cuh: 3-D depthwise convolution, channels last: blocks march along depth, planes wait in shared memory
//   y[n,h,i,j,c] = b[c] + sum_{t,u,v} w[c,t,u,v] * x[n, h*SD - PF + t*DD, i*SH - PT + u*DH, j*SW - PL + v*DW, c/M]
//   x [N,D,H,W,C]   w [C*M,KD,KH,KW]   b [C*M] or null   y [N,OD,OH,OW,C*M]     offsets in elements
//   A lane makes kRows x kColumns outputs of kVector neighbouring channels of each plane; on tensor cores
//   (volume_pairs.cuh), a warp makes kRows products; on sparse ones, cubes of outputs (volume_cubes.cuh). The lanes of
//   a chunk of kChunk input channels are neighbours; kSpotsX * lanes_y such groups make a tile. shared memory: kStages
//   tiles of x (and two of float32 for 16-bit ones), the filters, offsets of the tile's vectors grid.x = blocks that
//   take equal shares of all planes of all tiles (and residues of depth), one after the other least DRAM traffic: x + w
//   + y, once each; halos between tiles and between segments come from L2
#pragma once
#include "volume_cubes.cuh"
#include "volumes.cuh"

namespace dwconv {

template <class C>
__device__ __forceinline__ void volume_ndhwc(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                             const VolumeTiling& tiling) {
    using V = Volume<C>;
    using T = typename C::Element;
    using Sum = typename V::Sum;
    constexpr int kOutChunk = C::kChunk * C::kMultiplier;
    static_assert(C::kVector == 1 || C::kMultiplier == 1, "the channels of a lane must be neighbours in x, too");
    static_assert(kOutChunk % C::kVector == 0, "kVector must divide the channels of a chunk");
    static_assert(C::kMatrix || C::kPitch % C::kChunk == 0, "rows of a tile are whole columns");

    unsigned rest;
    const auto next = [&rest](const FastDivisor& size) {
        const unsigned quotient = size.quotient(rest), digit = rest - quotient * size.divisor;
        rest = quotient;
        return static_cast<int>(digit);
    };
    // Tensor cores: a warp has a pair of channels; there is one spot, and a lane's outputs are all over it.
    const int lane = C::kMatrix ? threadIdx.x / 32 : threadIdx.x % V::kLanes;
    const int spot = C::kMatrix ? 0 : threadIdx.x / V::kLanes;
    const int spot_x = spot % C::kSpotsX, spot_y = spot / C::kSpotsX;
    const int elements = tile_elements<C>(tiling);
    T* slots = shared_memory<T>();
    Sum* tiles = reinterpret_cast<Sum*>(slots + C::kStages * elements);
    Sum* taps = tiles + (V::kDirect ? 0 : 2 * elements);
    constexpr int kBlockTaps = C::kMatrix     ? Pairs<C>::kPairs * Pairs<C>::kWords
                               : C::kHeldTaps ? 0
                                              : V::kLanes * V::kTapPitch;
    int* table = reinterpret_cast<int*>(taps + kBlockTaps);
    // Tensor cores: a table of outputs follows, and the outputs.
    unsigned* outputs = reinterpret_cast<unsigned*>(table + tiling.table + tiling.volumes * (C::kChunk / 2));

    unsigned piece = blockIdx.x * tiling.share;
    const unsigned end = piece + tiling.share < tiling.total ? piece + tiling.share : tiling.total;
#pragma unroll 1
    while (piece < end) {  // the planes that are the block's share, tile by tile
        rest = piece;
        const int first = next(tiling.length), chunk = next(tiling.channels);
        const int tile_x = next(tiling.tiles_x), tile_y = next(tiling.tiles_y);
        const int residue = rest % V::kResidues;
        rest /= V::kResidues;

        VolumePlace place;
        place.image = rest;
        place.tile_row = tile_y * static_cast<int>(tiling.lanes_y.divisor) * (C::kMatrix ? 1 : C::kRows);
        place.tile_column =
            tile_x * (C::kMatrix ? static_cast<int>(tiling.lanes_x.divisor) * 4 : C::kSpotsX * C::kColumns);
        place.row = C::kMatrix ? 0 : place.tile_row + spot_y * C::kRows;
        place.column = C::kMatrix ? 0 : place.tile_column + spot_x * C::kColumns;
        place.residue = residue;
        place.first_channel = chunk * kOutChunk;
        place.first = first;
        place.end = smaller(static_cast<int>(tiling.length.divisor), first + static_cast<int>(end - piece));
        piece += place.end - first;
        // The last residues may have an output less.
        place.end = smaller(place.end, ceil_div(static_cast<int>(sizes.out_d) - residue, V::kResidues));
        if (place.first >= place.end) continue;  // as all of the block
        place.channel = static_cast<long long>(chunk) * kOutChunk + lane * V::kLaneChannels;
        place.inside = C::kMatrix ? place.channel < sizes.out_channels
                                  : spot_y < static_cast<int>(tiling.lanes_y.divisor) && place.row < sizes.out_h &&
                                        place.column < sizes.out_w && place.channel < sizes.out_channels;
        if (!place.inside) place.channel = 0;

        make_table<C>(table, slots, tiles, sizes, tiling, place, 0, chunk * C::kChunk);
        Volume<C> own;
        if constexpr (C::kMatrix) {
            unsigned* words = reinterpret_cast<unsigned*>(taps);
            share_pairs<C>(tensors, sizes, tiling, static_cast<long long>(chunk) * kOutChunk, words);
            make_out_table<C>(table + tiling.table, sizes, tiling, place, chunk * kOutChunk);
            __syncthreads();
            place_pairs<C>(own, tiling, lane, words);
        } else if constexpr (C::kHeldTaps) {
            const T* filter = tensors.w + place.channel * V::kTaps;
#pragma unroll
            for (int tap = 0; tap < V::kTaps; ++tap)
#pragma unroll
                for (int e = 0; e < C::kVector; ++e)
                    own.held[tap / C::kFilterW][tap % C::kFilterW][e] =
                        static_cast<Sum>(load_one(filter + e * V::kTaps + tap_at<C>(tap)));
        } else {
            share_taps<C>(tensors, tiling, V::kLanes, taps, [&](int own_channel) {
                const long long c = static_cast<long long>(chunk) * kOutChunk + own_channel;
                return c < sizes.out_channels ? c : -1;
            });
        }
        place.rows = place.inside ? smaller(C::kRows, static_cast<int>(sizes.out_h) - place.row) : 0;
        place.columns = static_cast<int>(sizes.out_w) - place.column;
        // Lanes without outputs compute on the tile's first window.
        const int row = place.inside ? spot_y * C::kRows * C::kStrideH : 0;
        const int column = (place.inside ? spot_x * C::kColumns * C::kStrideW : 0) + V::kOffset;
        const int channel = lane * C::kVector / C::kMultiplier;
        march<C>(tensors, sizes, tiling, place,
                 tensors.x + place.image * sizes.x_image + static_cast<long long>(chunk) * C::kChunk, slots, tiles,
                 table, outputs, taps + (C::kMatrix ? 0 : lane * V::kTapPitch),
                 row * C::kPitch + column * C::kChunk + channel, own);
    }
}

template <class C>
__device__ __forceinline__ void volume_tile(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const VolumeTiling& tiling) {
    if constexpr (C::kCubes)
        volume_cubes<C>(tensors, sizes, tiling);
    else
        volume_ndhwc<C>(tensors, sizes, tiling);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 256
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_ROWS 2
#define DWCONV_COLUMNS 8
#define DWCONV_VECTOR 1
#define DWCONV_CHUNK 32
#define DWCONV_SPOTS_X 2
#define DWCONV_PITCH 576
#define DWCONV_STAGES 3
#define DWCONV_LOAD_VECTOR 4
#define DWCONV_STORE_VECTOR 1
#define DWCONV_LINEAR 0
#define DWCONV_MATRIX 0
#define DWCONV_CUBES 0
#define DWCONV_PLANE 0
#define DWCONV_COLUMN_ALIGN 1
#define DWCONV_BATCH 4
#define DWCONV_ONE_BATCH 0
#define DWCONV_HELD_TAPS 0
#define DWCONV_ALL 0
#define DWCONV_RELOAD 0
#define DWCONV_ROTATE 0
#define DWCONV_UNROLL_ROWS 1
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kRows = DWCONV_ROWS, kColumns = DWCONV_COLUMNS, kVector = DWCONV_VECTOR;
    static constexpr int kChunk = DWCONV_CHUNK, kSpotsX = DWCONV_SPOTS_X;
    static constexpr int kPitch = DWCONV_PITCH, kStages = DWCONV_STAGES, kBatch = DWCONV_BATCH;
    static constexpr bool kOneBatch = DWCONV_ONE_BATCH;
    static constexpr int kLoadVector = DWCONV_LOAD_VECTOR, kStoreVector = DWCONV_STORE_VECTOR;
    static constexpr bool kLinear = DWCONV_LINEAR, kMatrix = DWCONV_MATRIX, kCubes = DWCONV_CUBES;
    static constexpr int kColumnAlign = DWCONV_COLUMN_ALIGN, kPlane = DWCONV_PLANE;
    static constexpr bool kHeldTaps = DWCONV_HELD_TAPS, kReload = DWCONV_RELOAD, kRotate = DWCONV_ROTATE;
    static constexpr int kUnrollRows = DWCONV_UNROLL_ROWS;
    static constexpr bool kAll = DWCONV_ALL;  // planes are added to all sums, also to those of no output
};

using Tiling = dwconv::VolumeTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::volume_tile<Config>(tensors, sizes, tiling);
}
