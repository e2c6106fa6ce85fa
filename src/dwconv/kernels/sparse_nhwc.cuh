// sparse_nhwc.cuh: depthwise convolution of 16-bit elements on sparse tensor cores, channels last
//   y[n,i,j,c] = b[c] + sum_{u,v} w[c,u,v] * x[n, i*SH - PT + u, j*SW - PL + v*DW, c]     float32 sum
//   x [N,H,W,C]   w [C,KH,KW]   b [C] or null   y [N,OH,OW,C]     offsets in elements, 64-bit
//   A block marches down kChannels channels of a strip of columns, of `slots` images side by side. A warp has kPairs
//   pairs of channels, the matrices of their filters and their sums in registers. It multiplies 8 * kTiles groups of
//   kGroup neighbouring outputs with the matrices of all filter rows at once, and adds the products with filter row u
//   to the output row that lies u rows above. In a step all threads copy the rows of a later step to shared memory,
//   store what was finished in the step before, and multiply kRows rows; one barrier a step. kTurned: what is called a
//   row here is a column in memory; that serves tall filters.
//   kWhole: a step takes all rows of small images.
//   kBoxes: the copy engine brings all rows of a step, of kXChannels channels.
//   shared memory: x [kStages][kRows][slots][width][kXChannels]; results [2][kOutputs][groups][kPitch]
//     [kChannels], and filters, spread, before the march; gates; steps
//   grid.x = chunks of kChannels channels * strips of columns * parts of all output rows, chunk fastest
//   least DRAM traffic: x + w + y, once each; rows around a part's ends and columns between strips come from L2
#pragma once
#include "sparse_boxes.cuh"
#include "sparse_march.cuh"

namespace dwconv {

// Rows of x come by the copies of all threads, or as boxes.
template <class C>
using SparseArrivals = typename Selected<C::kBoxes, SparseBoxes<C>, SparseFetch<C>>::Type;

// `map`: of x, if it comes as boxes.
template <class C, class... Map>
__device__ __forceinline__ void sparse_nhwc(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const SparseTiling& tiling, const Map&... map) {
    using R = SparseRows<C>;
    const unsigned above = tiling.chunks.quotient(blockIdx.x);
    const int first_channel = static_cast<int>(blockIdx.x - above * tiling.chunks.divisor) * C::kChannels;
    const unsigned part = tiling.column_strips.quotient(above);
    const int first_column =
        static_cast<int>(above - part * tiling.column_strips.divisor) * static_cast<int>(tiling.stored_columns.divisor);
    const unsigned position = part * tiling.part_rows;
    const unsigned end_position = min(position + tiling.part_rows, tiling.rows);

    // Of shared memory, in bytes: a row as it arrives, all of a step, and results.
    const int row_bytes = static_cast<int>(tiling.row_bytes), stage_bytes = C::kRows * row_bytes;
    constexpr int kStepResults = R::kOutputs * R::kResults;
    unsigned char* const stages = shared_memory<unsigned char>();
    unsigned char* const results = stages + tiling.results;
    SparseStep* const lines = reinterpret_cast<SparseStep*>(results + tiling.table);

    SparseArrivals<C>::prefetch(map...);
    const SparseTaps<C> taps(tensors, sizes, first_channel);
    SparseSteps<C> steps(position, end_position, sizes, tiling);
    const SparsePlace place = {first_channel, first_column, results + tiling.table - C::kGateBytes};
    SparseArrivals<C> arrivals(tensors.x, sizes, tiling, place, map...);
    int copied = 0;
#pragma unroll 1
    for (; copied < steps.early(); ++copied)
        arrivals.copy_early(steps.early_reads(copied), stages + copied * stage_bytes, copied);
    steps.number_all();
    steps.write(lines);
    if (copied < steps.kAhead) {  // the first unit is short
        __syncthreads();
#pragma unroll 1
        for (; copied < steps.kAhead; ++copied)
            arrivals.copy_early(SparseStep::read(lines + copied), stages + copied * stage_bytes, copied);
    }
    arrivals.clear_beside(stages, sizes, tiling);
    const SparseStores<C> stores(tensors.y, sizes, tiling, place);
    SparseMarch<C> march(taps, tiling, reinterpret_cast<unsigned*>(results));
    march.begin();
    int stage = 0, free = steps.kAhead, put = 0;  // stages to read and to fill; results to fill
    SparseStep before = {};                       // the step before: what it made, and where that belongs
    arrivals.open();
#pragma unroll 1
    for (int at = 0; at != steps.count; ++at) {
        arrivals.meet(stage);  // the rows are there for the products, the results of the step before for y
        const SparseStep now = SparseStep::read(lines + at);
        const unsigned char* const rows = stages + stage * stage_bytes;
        typename SparseMarch<C>::Pixels pixels;
        march.load(pixels, rows);
        arrivals.copy(lines + at + steps.kAhead, stages + free * stage_bytes, free);
#pragma unroll
        for (int d = 0; d < C::kRows; ++d) {
            // The rows of the step before that are stored beside this row's products.
            constexpr int kEach = ceil_div(R::kOutputs, C::kRows);
            typename SparseStores<C>::Words words[kEach];
#pragma unroll
            for (int k = 0; k < kEach; ++k)
                if (d * kEach + k < R::kOutputs)
                    stores.read(words[k], results + (kStepResults - put + (d * kEach + k) * R::kResults));
            const auto finish = [&](int k) {
                march.put(tensors, sizes, tiling, now, k, first_column, first_channel,
                          results + (put + k * R::kResults));
            };
            if constexpr (C::kWhole)
                march.add_whole(d, pixels);
            else
                march.add(d % C::kStrideH, pixels);
#pragma unroll
            for (int k = 0; k < kEach; ++k)
                if (d * kEach + k < R::kOutputs) stores.store(words[k], before, d * kEach + k);
            if (d + 1 < C::kRows) march.load(pixels, rows + (d + 1) * row_bytes);
            if constexpr (C::kWhole) {
#pragma unroll
                for (int k = 0; k < R::kOutputs; ++k)
                    if (d == R::completing(k)) finish(k);
            } else if (d % C::kStrideH == R::kFirst) {
                finish((d - R::kFirst) / C::kStrideH);
            }
        }
        free = stage;
        stage = stage + 1 == C::kStages ? 0 : stage + 1;
        put = kStepResults - put;
        before = now;
        if (!C::kWhole && (now.made & SparseStep::kBegins)) march.begin();
    }
    __syncthreads();
    stores.end(before, results + (kStepResults - put));
    const float check = march.check[0] + march.check[1];
    __syncthreads();
    // Channels that don't exist were never copied.
    if (check == 0.0f || first_channel + march.channel >= sizes.out_channels) return;
#pragma unroll 1
    for (int at = 0; at != steps.count; ++at)
        march.repair(tensors, sizes, tiling, SparseStep::read(lines + at), first_column, first_channel);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#undef DWCONV_ELEMENT
#define DWCONV_ELEMENT dwconv::Half
#define DWCONV_WARPS 8
#define DWCONV_MIN_BLOCKS 2
#define DWCONV_PAIRS 2
#define DWCONV_TILES 1
#define DWCONV_GROUP 7
#define DWCONV_APART 4
#define DWCONV_FOLDED 0
#define DWCONV_PITCH 10
#define DWCONV_CACHED 1
#define DWCONV_WHOLE 0
#define DWCONV_OUT_ROWS 0
#define DWCONV_COLUMNS 0
#define DWCONV_STEPS 1
#define DWCONV_LEAD 1
#define DWCONV_STAGES 4
#define DWCONV_ROWS 1
#define DWCONV_LOADS 1
#define DWCONV_STORES 1
#define DWCONV_TURNED 0
#define DWCONV_BOXES 0
#define DWCONV_X_CHANNELS 32
#endif

struct Config : ProblemConfig {
    static constexpr int kWarps = DWCONV_WARPS, kThreads = 32 * kWarps, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kPairs = DWCONV_PAIRS, kTiles = DWCONV_TILES, kChannels = 2 * kPairs * kWarps;
    static constexpr int kGroup = DWCONV_GROUP, kApart = DWCONV_APART, kPitch = DWCONV_PITCH;
    static constexpr bool kCached = DWCONV_CACHED, kFolded = DWCONV_FOLDED;
    static constexpr int kSteps = DWCONV_STEPS, kLead = DWCONV_LEAD;
    static constexpr int kStages = DWCONV_STAGES, kRows = DWCONV_ROWS;
    static constexpr int kLoads = DWCONV_LOADS, kStores = DWCONV_STORES;
    static constexpr bool kTurned = DWCONV_TURNED, kWhole = DWCONV_WHOLE;
    static constexpr bool kBoxes = DWCONV_BOXES;  // rows come as boxes, of so many channels
    static constexpr int kXChannels = DWCONV_X_CHANNELS;
    static constexpr int kGateBytes = kBoxes ? 64 : 0;                           // of shared memory
    static constexpr int kOutRows = DWCONV_OUT_ROWS, kColumns = DWCONV_COLUMNS;  // of an image that is taken as a whole
};

using Tiling = dwconv::SparseTiling;

#if DWCONV_BOXES
#define DWCONV_MAP , const __grid_constant__ dwconv::TensorMap map
#define DWCONV_GIVEN_MAP , map
#else
#define DWCONV_MAP
#define DWCONV_GIVEN_MAP
#endif

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes,
                  const Tiling tiling DWCONV_MAP) {
    dwconv::sparse_nhwc<Config>(tensors, sizes, tiling DWCONV_GIVEN_MAP);
}
