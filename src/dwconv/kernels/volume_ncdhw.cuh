// volume_ncdhw.cuh: 3-D depthwise convolution, channels first: blocks march along depth, planes wait in shared memory
//   y[n,c,h,i,j] = b[c] + sum_{t,u,v} w[c,t,u,v] * x[n, c/M, h*SD - PF + t*DD, i*SH - PT + u*DH, j*SW - PL + v*DW]
//   x [N,C,D,H,W]   w [C*M,KD,KH,KW]   b [C*M] or null   y [N,C*M,OD,OH,OW]     offsets in elements
//   A lane makes kRows x kColumns outputs of each plane; lanes_x * lanes_y of them make a tile of one output volume,
//   and a block makes the tiles of `volumes` of them at a time. shared memory: kStages tiles of x (and two of float32
//   for 16-bit ones), the filters, offsets of the tile's vectors grid.x = blocks that take equal shares of all planes
//   of all tiles (and residues of depth), one after the other least DRAM traffic: x + w + y, once each; halos between
//   tiles and between segments come from L2
#pragma once
#include "volumes.cuh"

namespace dwconv {

template <class C>
__device__ __forceinline__ void volume_ncdhw(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                             const VolumeTiling& tiling) {
    using V = Volume<C>;
    using T = typename C::Element;
    using Sum = typename V::Sum;
    static_assert(C::kVector == 1, "kVector must be 1: the channels of a lane are one");
    static_assert(C::kColumns % 4 == 0, "kColumns must be a multiple of 4: windows start at 16 bytes");
    static_assert(C::kPitch % 4 == 0, "kPitch must be a multiple of 4: windows start at 16 bytes");

    unsigned rest;
    const auto next = [&rest](const FastDivisor& size) {
        const unsigned quotient = size.quotient(rest), digit = rest - quotient * size.divisor;
        rest = quotient;
        return static_cast<int>(digit);
    };
    rest = threadIdx.x;
    const int lane_x = next(tiling.lanes_x), lane_y = next(tiling.lanes_y);
    const unsigned warp = threadIdx.x / 32, volume = C::kMatrix ? warp / tiling.warps : rest;
    const int elements = tile_elements<C>(tiling);
    T* slots = shared_memory<T>();
    Sum* tiles = reinterpret_cast<Sum*>(slots + C::kStages * elements);
    Sum* taps = tiles + (V::kDirect ? 0 : 2 * elements);
    constexpr int kBlockTaps = C::kMatrix ? V::kTapRows * 64 : C::kHeldTaps ? 0 : V::kTapPitch;
    int* table = reinterpret_cast<int*>(taps + tiling.volumes * kBlockTaps);

    unsigned piece = blockIdx.x * tiling.share;
    const unsigned end = piece + tiling.share < tiling.total ? piece + tiling.share : tiling.total;
#pragma unroll 1
    while (piece < end) {  // the planes that are the block's share, tile by tile
        rest = piece;
        const int first = next(tiling.length), tile_x = next(tiling.tiles_x), tile_y = next(tiling.tiles_y);
        const int residue = rest % V::kResidues;
        const long long first_plane = static_cast<long long>(rest / V::kResidues) * tiling.volumes;

        VolumePlace place;
        // A lane of a tensor core's product has outputs all over the tile; its places count from the plane's start.
        place.tile_row = tile_y * static_cast<int>(tiling.lanes_y.divisor) * (C::kMatrix ? 1 : C::kRows);
        place.tile_column = tile_x * static_cast<int>(tiling.lanes_x.divisor) * (C::kMatrix ? 8 : C::kColumns);
        place.row = C::kMatrix ? 0 : place.tile_row + lane_y * C::kRows;
        place.column = C::kMatrix ? 0 : place.tile_column + lane_x * C::kColumns;
        place.residue = residue;
        place.first_channel = 0;
        place.first = first;
        place.end = smaller(static_cast<int>(tiling.length.divisor), first + static_cast<int>(end - piece));
        piece += place.end - first;
        // The last residues may have an output less.
        place.end = smaller(place.end, ceil_div(static_cast<int>(sizes.out_d) - residue, V::kResidues));
        if (place.first >= place.end) continue;  // as all of the block
        const long long plane = first_plane + volume;
        const bool works = volume < tiling.volumes && plane < sizes.planes;
        place.inside = works && place.row < sizes.out_h && place.column < sizes.out_w;
        place.image = works ? tiling.channels.quotient(static_cast<unsigned>(plane)) : 0;
        place.channel = works ? plane - place.image * sizes.out_channels : 0;

        const long long image = tiling.channels.quotient(static_cast<unsigned>(first_plane));
        const long long channel = first_plane - image * sizes.out_channels;
        make_table<C>(table, slots, tiles, sizes, tiling, place, first_plane, 0);
        Volume<C> own;
        if constexpr (C::kMatrix) {
            // bands of the filters' rows: [volume][u][t][lane]
            uint2* bands = reinterpret_cast<uint2*>(taps);
#pragma unroll smaller(9, V::kTapRows)  // so that loads don't wait for one another
            for (unsigned at = threadIdx.x; at < tiling.volumes * V::kTapRows * 32; at += tiling.threads) {
                const unsigned row = at / 32 % V::kTapRows, u = row / C::kFilterD, t = row % C::kFilterD;
                const unsigned of = static_cast<unsigned>(first_plane) + at / 32 / V::kTapRows;
                const unsigned c = of - tiling.channels.quotient(of) * tiling.channels.divisor;
                const T* filter = tensors.w + static_cast<long long>(c) * V::kTaps;
                const int first = static_cast<int>(t * C::kFilterH + u) * C::kFilterW;
                bands[at] = of < sizes.planes ? volume_band<C>(filter, first, at % 32) : make_uint2(0, 0);
            }
            __syncthreads();
            own.filter = bands + volume * V::kTapRows * 32 + threadIdx.x % 32;
            const int first_group = (warp % tiling.warps * C::kRows * 16) + threadIdx.x % 32 / 4;
            place_groups<C>(own, place, sizes, tiling, volume, first_group);
        } else if constexpr (C::kHeldTaps) {
            const T* filter = tensors.w + place.channel * V::kTaps;
#pragma unroll
            for (int tap = 0; tap < V::kTaps; ++tap)
                own.held[tap / C::kFilterW][tap % C::kFilterW][0] = static_cast<Sum>(load_one(filter + tap_at<C>(tap)));
        } else {
            share_taps<C>(tensors, tiling, tiling.volumes, taps, [&](int own_volume) {
                const long long of = first_plane + own_volume;
                const long long c = of - tiling.channels.quotient(static_cast<unsigned>(of)) * sizes.out_channels;
                return of < sizes.planes ? c : -1;
            });
        }
        place.rows = place.inside ? smaller(C::kRows, static_cast<int>(sizes.out_h) - place.row) : 0;
        place.columns = static_cast<int>(sizes.out_w) - place.column;
        // Lanes without outputs compute on the tile's first window.
        const int row =
            place.inside ? static_cast<int>(volume * tiling.tile_rows) + lane_y * C::kRows * C::kStrideH : 0;
        const int column = (place.inside ? lane_x * C::kColumns * C::kStrideW : 0) + V::kOffset / 4 * 4;
        march<C>(tensors, sizes, tiling, place,
                 tensors.x + image * sizes.x_image + channel / C::kMultiplier * sizes.x_channel, slots, tiles, table,
                 nullptr, taps + (place.inside ? volume * V::kTapPitch : 0), row * C::kPitch + column, own);
    }
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 256
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_ROWS 4
#define DWCONV_COLUMNS 4
#define DWCONV_PITCH 72
#define DWCONV_STAGES 3
#define DWCONV_LOAD_VECTOR 4
#define DWCONV_STORE_VECTOR 4
#define DWCONV_BATCH 4
#define DWCONV_ONE_BATCH 0
#define DWCONV_MATRIX 0
#define DWCONV_HELD_TAPS 0
#define DWCONV_ALL 0
#define DWCONV_RELOAD 0
#define DWCONV_ROTATE 0
#define DWCONV_UNROLL_ROWS 1
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kRows = DWCONV_ROWS, kColumns = DWCONV_COLUMNS, kVector = 1;
    static constexpr int kPitch = DWCONV_PITCH, kStages = DWCONV_STAGES, kBatch = DWCONV_BATCH;
    static constexpr bool kOneBatch = DWCONV_ONE_BATCH;
    static constexpr int kLoadVector = DWCONV_LOAD_VECTOR, kStoreVector = DWCONV_STORE_VECTOR;
    static constexpr int kColumnAlign = DWCONV_LOAD_VECTOR;
    static constexpr bool kHeldTaps = DWCONV_HELD_TAPS, kReload = DWCONV_RELOAD, kRotate = DWCONV_ROTATE;
    static constexpr int kUnrollRows = DWCONV_UNROLL_ROWS;
    static constexpr bool kAll = DWCONV_ALL;  // planes are added to all sums, also to those of no output
    static constexpr bool kLinear = false, kMatrix = DWCONV_MATRIX;
    static constexpr int kChunk = 1;
};

using Tiling = dwconv::VolumeTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::volume_ncdhw<Config>(tensors, sizes, tiling);
}
