// taps_nchw.cuh: the gradients of filters and bias, channels first: tiles of g in registers, x and g by way of shared
// memory
//   dw[c*M + j, t, u, v] = sum over images n and outputs d, p, q of
//                          g[n, c*M + j, d, p, q] * x[n, c, d*SD - PF + t*DD, p*SH - PT + u*DH, q*SW - PL + v*DW]
//   db[c*M + j]          = sum over images n and outputs d, p, q of g[n, c*M + j, d, p, q]          float32 sums
//   x [N,C,D,H,W], dense rows  g [N,C*M,OD,OH,OW]   dw [C*M,KD,KH,KW]   db [C*M] or null   64-bit offsets in elements
//   A block sums one part of the images and bands of rows for a group of channels. In each stage it has planes, or
//   bands of their rows, in shared memory while the next ones arrive, which one warp sends (kBulk) or all threads
//   copy; a thread has a tile of kRows x kColumns outputs of one plane and kTapRows x kTapColumns taps, whose sums stay
//   in its registers until the end.
//   Planes of volumes count as images, anew for each tap t of the depth: each of g meets one of x, or none.
//   grid.x = groups of channels * parts * KD; the last block of a group and t adds up its parts, or, where they are
//   kCluster blocks of a cluster, the first one
//   least DRAM traffic: x + g, once each; rows between bands come from L2, as x and g do for all but one of KD taps
#pragma once
#include "taps_nchw_stages.cuh"
#include "taps_nchw_sums.cuh"
#include "taps_nchw_tile.cuh"

namespace dwconv {

// What a thread works on in every stage.
template <class C>
struct TapsNchwPlace {
    int image, plane, tap_tile, row_lane, column_tile;
    int tap_row, tap_column;

    __device__ __forceinline__ explicit TapsNchwPlace(const TapsNchwTiling& tiling) {
        const unsigned above = tiling.lanes.quotient(threadIdx.x), lane = threadIdx.x - above * tiling.lanes.divisor;
        row_lane = static_cast<int>(tiling.column_lanes.quotient(lane));
        column_tile = static_cast<int>(lane) - row_lane * static_cast<int>(tiling.column_lanes.divisor);
        const unsigned images = tiling.planes.quotient(above);
        plane = static_cast<int>(above - images * tiling.planes.divisor);
        tap_tile = static_cast<int>(images / tiling.group_images);
        image = static_cast<int>(images) - tap_tile * static_cast<int>(tiling.group_images);
        tap_row = static_cast<int>(tiling.tap_tile_columns.quotient(tap_tile));
        tap_column = (tap_tile - tap_row * static_cast<int>(tiling.tap_tile_columns.divisor)) * C::kTapColumns;
        tap_row *= C::kTapRows;
    }
};

// So many taps of a thread are summed for each tile alone, then added to those of other tiles: chains of half as many
// additions have smaller errors. More taps would need too many registers.
constexpr int kTapsApart = 12;

// Adds the products of all tiles that the thread has in one stage.
template <class C, class Sum>
__device__ __forceinline__ void add_stage(const typename C::Element* elements, const Sizes& sizes,
                                          const TapsNchwTiling& tiling, const TapsNchwNote& stage,
                                          const TapsNchwPlace<C>& place, Sum (&sums)[C::kTapRows][C::kTapColumns],
                                          Sum& bias) {
    using Window = TapsNchwWindow<C>;
    if (place.image >= stage.images) return;
    const int nominal_column = stage.nominal_column + place.column_tile * C::kColumns;
    const int column = smaller(nominal_column, static_cast<int>(sizes.out_w) - C::kColumns);
    const int first_column = column * C::kStrideW - C::kPadLeft + place.tap_column * C::kDilationW;
    if (nominal_column >= static_cast<int>(sizes.out_w)) return;
    if (Window::kTapTilesW && (first_column + Window::kWidth <= 0 || first_column >= static_cast<int>(sizes.in_w)) &&
        !(C::kHasBias && place.tap_tile == 0))
        return;
    const TapsNchwMasks<C> masks(first_column, static_cast<int>(sizes.in_w));
    const int x = stage.x + place.image * static_cast<int>(tiling.x.image) +
                  place.plane / C::kMultiplier * static_cast<int>(tiling.x.plane) + first_column;
    const int g = stage.g + place.image * static_cast<int>(tiling.g.image) +
                  place.plane * static_cast<int>(tiling.g.plane) + column;
    const int x_pitch = static_cast<int>(tiling.x.row), g_pitch = static_cast<int>(tiling.g.row);
    const int end =
        smaller(stage.nominal_row + static_cast<int>(tiling.band_row_tiles) * C::kRows, static_cast<int>(sizes.out_h));
#pragma unroll 1
    for (int nominal_row = stage.nominal_row + place.row_lane * C::kRows; nominal_row < end;
         nominal_row += static_cast<int>(tiling.row_lanes) * C::kRows) {
        const int row = smaller(nominal_row, static_cast<int>(sizes.out_h) - C::kRows);
        const int first_row = row * C::kStrideH - C::kPadTop + place.tap_row * C::kDilationH;
        const int x_row = x + first_row * x_pitch, g_row = g + row * g_pitch;
        const auto add = [&](Sum(&into)[C::kTapRows][C::kTapColumns], Sum& into_bias) {
            add_tile<C>(elements, x_row, x_pitch, first_row, static_cast<int>(sizes.in_h), masks, g_row, g_pitch,
                        nominal_row - row, nominal_column - column, into, into_bias);
        };
        if constexpr (C::kTapRows * C::kTapColumns <= kTapsApart) {
            Sum of_tile[C::kTapRows][C::kTapColumns] = {}, bias_of_tile = 0;
            add(of_tile, bias_of_tile);
#pragma unroll
            for (int k = 0; k < C::kTapRows * C::kTapColumns; ++k) (&sums[0][0])[k] += (&of_tile[0][0])[k];
            bias += bias_of_tile;
        } else {
            add(sums, bias);
        }
    }
}

template <class C>
__device__ __forceinline__ void taps_nchw(const FilterGradients<typename C::Element>& tensors, const Sizes& sizes,
                                          const TapsNchwTiling& tiling) {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    static_assert(C::kColumns % C::kReadG == 0, "kReadG must divide kColumns: a row of a tile is read in whole pieces");
    static_assert(C::kColumns * C::kStrideW % C::kReadX == 0, "kReadX must divide the columns between tiles");

    // Taps of the depth are neighbours in the grid: they read the same planes at about the same time.
    const unsigned above = blockIdx.x / C::kFilterD;
    const int depth_tap = static_cast<int>(blockIdx.x - above * C::kFilterD);
    const unsigned group = tiling.parts.quotient(above), part = above - group * tiling.parts.divisor;
    const int all_channels = static_cast<int>(sizes.out_channels) / C::kMultiplier;
    const int channel = static_cast<int>(group * tiling.group_channels);
    const int channels = smaller(static_cast<int>(tiling.group_channels), all_channels - channel);
    const TapsNchwPlace<C> place(tiling);
    const bool takes_part =
        place.tap_tile < static_cast<int>(tiling.tap_tiles.divisor) && place.plane < channels * C::kMultiplier;

    Sum sums[C::kTapRows][C::kTapColumns], bias = 0;
#pragma unroll
    for (int k = 0; k < C::kTapRows * C::kTapColumns; ++k) (&sums[0][0])[k] = 0;

    const unsigned first = part * tiling.part_units;
    const unsigned last = min(first + tiling.part_units, tiling.units);
    using Stages = BulkStages<C::kStages, C::kReaders, C::kEvictFirst>;
    unsigned char* const shared = shared_memory<unsigned char>();
    TapsNchwNote* const notes = reinterpret_cast<TapsNchwNote*>(shared + Stages::kBytes);
    constexpr int kHeadBytes = Stages::kBytes + C::kStages * static_cast<int>(sizeof(TapsNchwNote));
    T* const elements = reinterpret_cast<T*>(shared + ceil_div(kHeadBytes, C::kAlign) * C::kAlign);
    // Fills a stage from the first unit on, from this one, that adds anything, and says which one it was.
    const auto fill = [&](unsigned unit, unsigned which, const Stages* stages) {
        unit = next_unit<C>(unit, last, sizes, tiling, depth_tap);
        TapsNchwNote note{};
        if (unit < last)
            note = copy_stage<C>(tensors, sizes, tiling, channel, channels, depth_tap, unit,
                                 elements + which * tiling.stage_elements, stages);
        if (threadIdx.x % C::kFillers == 0) notes[which] = note;
        return unit;
    };
    const auto read = [&](const TapsNchwNote& note, unsigned which) {
        if (takes_part) add_stage<C>(elements + which * tiling.stage_elements, sizes, tiling, note, place, sums, bias);
    };
    if constexpr (C::kBulk) {
        Stages stages(shared);
        if (threadIdx.x >= C::kReaders) {
#pragma unroll 1
            for (unsigned unit = min(first, last); unit <= last; ++unit, stages.next()) {
                stages.wait_until_empty();
                unit = fill(unit, stages.stage(), &stages);
                stages.sent();
            }
        } else {
#pragma unroll 1
            for (bool ended = false; !ended; stages.next()) {
                stages.wait_until_full();
                const TapsNchwNote note = notes[stages.stage()];
                ended = note.images == 0;
                if (ended) continue;
                read(note, stages.stage());
                stages.is_read();
            }
        }
    } else {
        // Two stages: one is read while the next one arrives. The first copies are those of the loop, too: code that
        // runs once has to be fetched from afar.
        unsigned unit = first;
        bool ended = false;
#pragma unroll 1
        for (int number = -2; !ended; ++number) {
            const unsigned which = number & 1;
            if (number >= 0) {
                wait_for_copies<1>();
                __syncthreads();
                const TapsNchwNote note = notes[which];
                ended = note.images == 0;
                if (!ended) read(note, which);
                __syncthreads();  // none reads the stage any more
            }
            unit = fill(unit, which, nullptr) + 1;
            end_of_copies();
        }
    }

    Sum* const totals = reinterpret_cast<Sum*>(elements);
    Sum* const values = totals + tiling.scratch;
    add_threads<C>(tiling, sums, bias, totals, values);
    if (!add_parts<C>(tensors, tiling, part, group * C::kFilterD + depth_tap, totals, values)) return;
    store_totals<C>(tensors, sizes, tiling, channel, channels, depth_tap, totals, values);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#define DWCONV_THREADS 128
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_ROWS 7
#define DWCONV_COLUMNS 7
#define DWCONV_TAP_ROWS 3
#define DWCONV_TAP_COLUMNS 3
#define DWCONV_READ_X 1
#define DWCONV_READ_G 1
#define DWCONV_EVEN_ROWS 0
#define DWCONV_EVEN_COLUMNS 0
#define DWCONV_WHOLE_HEIGHT 0
#define DWCONV_WHOLE_WIDTH 0
#define DWCONV_BOTTOM_REACH 1
#define DWCONV_RIGHT_REACH 1
#define DWCONV_AT_ONCE 9
#define DWCONV_CACHED 0
#define DWCONV_VOLUME 0
#define DWCONV_BULK 1
#define DWCONV_STAGES 2
#define DWCONV_CLUSTER 1
#define DWCONV_EVICT_FIRST 0
#define DWCONV_ALIGN 32
#endif

struct Config : ProblemConfig {
    static constexpr bool kBulk = DWCONV_BULK;  // a warp of its own sends lines to stages
    static constexpr int kReaders = DWCONV_THREADS, kThreads = kReaders + (kBulk ? 32 : 0);
    static constexpr int kFillers = kBulk ? 32 : kThreads;  // threads that fill a stage
    static constexpr int kMinBlocks = DWCONV_MIN_BLOCKS, kStages = DWCONV_STAGES;
    static constexpr int kCluster = DWCONV_CLUSTER;                       // parts that are a cluster, or 1
    static constexpr int kRows = DWCONV_ROWS, kColumns = DWCONV_COLUMNS;  // outputs of a tile
    static constexpr int kTapRows = DWCONV_TAP_ROWS, kTapColumns = DWCONV_TAP_COLUMNS;  // of a tile
    static constexpr int kReadX = DWCONV_READ_X, kReadG = DWCONV_READ_G;  // elements of one read of shared memory
    static constexpr bool kEvenRows = DWCONV_EVEN_ROWS, kEvenColumns = DWCONV_EVEN_COLUMNS;  // tiles don't overlap
    static constexpr bool kWholeHeight = DWCONV_WHOLE_HEIGHT,
                          kWholeWidth = DWCONV_WHOLE_WIDTH;  // and are as large as g
    // Rows and columns of padding at the far ends that outputs reach.
    static constexpr int kBottomReach = DWCONV_BOTTOM_REACH, kRightReach = DWCONV_RIGHT_REACH;
    static constexpr int kAtOnce = DWCONV_AT_ONCE;           // sums of a thread that are added up at once
    static constexpr int kAlign = DWCONV_ALIGN;              // bytes modulo which lines stand as in memory
    static constexpr bool kCached = DWCONV_CACHED;           // copies go through L1
    static constexpr bool kEvictFirst = DWCONV_EVICT_FIRST;  // what kBulk sends leaves L2 before all else
    static constexpr bool kVolume = DWCONV_VOLUME;  // x has a depth: its planes are images, as many times as taps of it
};

using Tiling = dwconv::TapsNchwTiling;

#if DWCONV_CLUSTER > 1 && !defined(DWCONV_EMULATOR)
#define DWCONV_OF_CLUSTER __cluster_dims__(DWCONV_CLUSTER, 1, 1)
#else
#define DWCONV_OF_CLUSTER
#endif

extern "C" __global__ void DWCONV_OF_CLUSTER __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::FilterGradients<Config::Element> tensors, const dwconv::Sizes sizes,
                  const Tiling tiling) {
    dwconv::taps_nchw<Config>(tensors, sizes, tiling);
}
