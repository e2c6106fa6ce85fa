// sparse_nhwc.cuh: depthwise convolution of 16-bit elements on sparse tensor cores, channels last
//   y[n,i,j,c] = b[c] + sum_{u,v} w[c,u,v] * x[n, i*SH - PT + u, j*SW - PL + v*DW, c]     float32 sum
//   x [N,H,W,C]   w [C,KH,KW]   b [C] or null   y [N,OH,OW,C]     offsets in elements, 64-bit
//   A block marches down kChannels channels of a strip of columns, of `slots` images side by side. A warp has kPairs
//   pairs of channels, the matrices of their filters and their sums in registers. It multiplies 8 * kTiles groups of
//   kGroup neighbouring outputs with the matrices of all filter rows at once, and adds the products with filter row u
//   to the output row that lies u rows above. In a step all threads copy the rows of a later step to shared memory,
//   store what was finished in the step before, and multiply kRows rows; one barrier a step. kTurned: what is called a
//   row here is a column in memory; that serves tall filters.
//   shared memory: x [kStages][kRows][slots][width][kChannels]; results [2][rows of a step][groups][kPitch][kChannels],
//   before
//     the march filters, spread; steps
//   grid.x = chunks of kChannels channels * strips of columns * parts of all output rows, chunk fastest
//   least DRAM traffic: x + w + y, once each; rows around a part's ends and columns between strips come from L2
#pragma once
#include "sparse_rows.cuh"

namespace dwconv {

// The taps of a warp's channels, all on their way before the first is waited for; each lane has some.
template <class C>
struct SparseTaps {
    using R = SparseRows<C>;
    using B = SparseBand<C>;
    using T = typename C::Element;
    static constexpr int kTaps = C::kFilterH * C::kFilterW, kEach = ceil_div(kTaps, 32), kOwn = 2 * C::kPairs;
    T taps[kOwn][kEach];
    float bias[kOwn];
    ChannelValues<float> values[kOwn];

    __device__ __forceinline__ SparseTaps(const Tensors<T>& tensors, const Sizes& sizes, int first_channel) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int o = 0; o < kOwn; ++o) {
            const int of = smaller(first_channel + warp * kOwn + o, static_cast<int>(sizes.out_channels) - 1);
            const T* filter = tensors.w + static_cast<long long>(of) * kTaps;
#pragma unroll
            for (int k = 0; k < kEach; ++k) taps[o][k] = load_one(filter + smaller(32 * k + lane, kTaps - 1));
            bias[o] = C::kHasBias ? static_cast<float>(load_one(tensors.b + of)) : 0.0f;
            values[o] = channel_values<C>(tensors, of);
        }
    }

    // Spreads them over the warp's part of shared memory.
    __device__ __forceinline__ void spread(T* rows) const {
        const int lane = threadIdx.x % 32;
        for (int at = lane; at < kOwn * B::kFilterElements / 8; at += 32)
            reinterpret_cast<uint4*>(rows)[at] = uint4{0, 0, 0, 0};
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
            const int tap = 32 * k + lane, u = R::tap_row(tap), v = R::tap_column(tap);
#pragma unroll
            for (int o = 0; o < kOwn; ++o)
                if (tap < kTaps) spread_tap<C>(rows + o * B::kFilterElements, u, v, taps[o][k]);
        }
        __syncwarp();
    }
};

// What a warp keeps of its channels for the whole march, and the sums of the rows in the making.
template <class C>
struct SparseMarch {
    using R = SparseRows<C>;
    using B = SparseBand<C>;
    using T = typename C::Element;
    static constexpr int kOwn = 2 * C::kPairs;
    int channel;                // of the chunk, the warp's first one
    int offsets[C::kTiles][2];  // of this lane's first pixel of each tile, and of the fourth one after it, in bytes
    int into[2];                // of this lane's outputs in the results' first tile, in bytes
    unsigned zero;
    float bias[kOwn];
    ChannelValues<float> values[kOwn];
    uint4 bands[C::kPairs][C::kFilterH][B::kSteps];
    float sums[C::kPairs][C::kTiles][R::kLive][4];  // [channel of the pair][neighbouring groups]
    float check[2] = {0, 0};                        // NaN as soon as a sum was not finite

    // `filters`: shared memory for the filters of all warps.
    __device__ __forceinline__ SparseMarch(const SparseTaps<C>& taps, const SparseTiling& tiling, T* filters) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        channel = warp * kOwn;
        zero = unknown_zero();
        const int groups = static_cast<int>(tiling.slot_groups.divisor);
        const int last = groups * static_cast<int>(tiling.slots) - 1;
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile) {
            const int group = smaller(R::group_of(8 * tile + lane / 4), last);  // beyond: the last one again
            const int slot = static_cast<int>(tiling.slot_groups.quotient(group));
            const int pixel =
                slot * static_cast<int>(tiling.width) + (group - slot * groups) * (C::kGroup * C::kStrideW) + lane % 4;
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                offsets[tile][odd] = R::place(pixel + 4 * odd, channel / 8) + channel % 8 * 2;
                keep(offsets[tile][odd]);
            }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            into[e] = R::place(R::group_of(lane % 4 * 2 + e) * C::kPitch + lane / 4, channel / 8) + channel % 8 * 2;
            keep(into[e]);
        }
        T* const rows = filters + channel * B::kFilterElements;
        taps.spread(rows);
#pragma unroll
        for (int o = 0; o < kOwn; ++o) {
            bias[o] = taps.bias[o];
            values[o] = taps.values[o];
        }
#pragma unroll
        for (int p = 0; p < C::kPairs; ++p)
#pragma unroll
            for (int u = 0; u < C::kFilterH; ++u)
#pragma unroll
                for (int step = 0; step < B::kSteps; ++step)
                    bands[p][u][step] = sparse_band<C>(rows + 2 * p * B::kFilterElements, u, step);
    }

    // After a unit's last step. Rare, so it shall not become a selection for every register.
    __device__ __forceinline__ void begin() {
#ifndef DWCONV_EMULATOR
        asm volatile("" ::: "memory");
#endif
#pragma unroll
        for (int p = 0; p < C::kPairs; ++p)
#pragma unroll
            for (int tile = 0; tile < C::kTiles; ++tile)
#pragma unroll
                for (int k = 0; k < R::kLive; ++k)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[p][tile][k][e] = bias[2 * p + e / 2];
    }

    // What the warp reads of an input row: words of a pair of channels, of the lane's four pixels for each product.
    using Pixels = unsigned[C::kTiles][B::kSteps][C::kPairs][4];
    __device__ __forceinline__ void load(Pixels& pixels, const unsigned char* row) const {
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile)
#pragma unroll
            for (int step = 0; step < B::kSteps; ++step)
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    // Where no tap of a group reaches, A has zeros, and any pixel will do.
                    const bool is_read = 16 * step + 4 * s < B::kReach;
                    const int of = is_read ? s : s - 1;
                    const auto loaded = *reinterpret_cast<const typename Word<4 * C::kPairs>::Type*>(
                        row + (offsets[tile][of % 2] + (16 * step + of / 2 * 8) * R::kPixel));
#pragma unroll
                    for (int p = 0; p < C::kPairs; ++p) {
                        const unsigned word = reinterpret_cast<const unsigned*>(&loaded)[p];
                        pixels[tile][step][p][s] = is_read ? word ^ zero : word + zero;
                    }
                }
    }

    // Adds an input row to the output rows that read it: filter rows phase, phase + kStrideH, ...; the phase, known
    // when this is compiled, is (row + kPadTop) mod kStrideH. sums[..][0] is the lowest output row. At phase 0 a new
    // one begins, and every sum takes the place of the one above: as the product writes it there, that costs nothing.
    __device__ __forceinline__ void add(int phase, const Pixels& pixels) {
#pragma unroll
        for (int k = R::kLive - 1; k >= 0; --k)
#pragma unroll
            for (int p = 0; p < C::kPairs; ++p)
#pragma unroll
                for (int tile = 0; tile < C::kTiles; ++tile) {
                    const int u = phase + k * C::kStrideH;
                    if (u >= C::kFilterH) continue;
                    auto& own = sums[p][tile];
                    float begun[4] = {bias[2 * p], bias[2 * p], bias[2 * p + 1], bias[2 * p + 1]};
                    multiply_sparse<T>(own[k], bands[p][u][0], pixels[tile][0][p],
                                       phase > 0 ? own[k]
                                       : k > 0   ? own[larger(k - 1, 0)]
                                                 : begun);
#pragma unroll
                    for (int step = 1; step < B::kSteps; ++step)
                        multiply_sparse<T>(own[k], bands[p][u][step], pixels[tile][step][p], own[k]);
                }
    }

    // Puts the k-th output row that a step completes into the results; also one that doesn't exist, as that costs less
    // than a branch. `j` and `of` are the strip's first column and the chunk's first channel.
    __device__ __forceinline__ void put(const Tensors<T>& tensors, const Sizes& sizes, const SparseTiling& tiling,
                                        const SparseStep& step, int k, int j, int of, unsigned char* row) {
        constexpr int kTop = R::kLive - 1;
        if (C::kHasResidual && !(step.rows & 256u << k)) return;
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const auto residual = residual_of(tensors, sizes, tiling, step.image, step.row + k, j, of, tile, e);
                float out[kOwn];
#pragma unroll
                for (int o = 0; o < kOwn; ++o) {
                    const float sum = sums[o / 2][tile][kTop][o % 2 * 2 + e];
                    check[e] = fmaf(sum, 0.0f, check[e]);
                    out[o] = finished<C>(sum, values[o], residual.element[o]);
                }
                *reinterpret_cast<Vector<T, kOwn>*>(row + (into[e] + 8 * tile * C::kPitch * R::kPixel)) =
                    rounded<T, kOwn>(out);
            }
    }

    // Whether one of the lane's outputs exists, that of a tile's group e; its column, its image and its pixel in y.
    __device__ __forceinline__ bool find(const Sizes& sizes, const SparseTiling& tiling, int image, int i, int j,
                                         int tile, int e, int& column, long long& of_image, long long& pixel) const {
        const int output = threadIdx.x % 32 / 4, number = R::group_of(8 * tile + threadIdx.x % 4 * 2 + e);
        const int slot = static_cast<int>(tiling.slot_groups.quotient(number));
        column = j + (number - slot * static_cast<int>(tiling.slot_groups.divisor)) * C::kGroup + output;
        of_image = image + slot;
        pixel = of_image * sizes.out_h * sizes.out_w * sizes.out_channels + i * static_cast<long long>(tiling.y_row) +
                column * static_cast<long long>(tiling.y_column);
        return output < C::kGroup && slot < static_cast<int>(tiling.slots) && column < sizes.out_w;
    }

    __device__ __forceinline__ Vector<T, kOwn> residual_of(const Tensors<T>& tensors, const Sizes& sizes,
                                                           const SparseTiling& tiling, int image, int i, int j, int of,
                                                           int tile, int e) const {
        Vector<T, kOwn> residual = {};
        if constexpr (C::kHasResidual) {
            int column;
            long long of_image, pixel;
            if (find(sizes, tiling, image, i, j, tile, e, column, of_image, pixel) && of + channel < sizes.out_channels)
                residual = load_vector<kOwn>(tensors.residual + pixel + (of + channel));
        }
        return residual;
    }

    // Computes those of the lane's outputs of a step again, product by product, that are NaN in y: zeros of A times an
    // Inf or NaN are NaN where the filter doesn't reach, too.
    __device__ __forceinline__ void repair(const Tensors<T>& tensors, const Sizes& sizes, const SparseTiling& tiling,
                                           const SparseStep& step, int j, int of) const {
#pragma unroll 1
        for (int number = 0; number < R::kOutputs * C::kTiles * 2 * kOwn; ++number) {
            const int k = number / (C::kTiles * 2 * kOwn), group = number / kOwn % (C::kTiles * 2);
            const int own = of + channel + number % kOwn;
            int column;
            long long of_image, pixel;
            if (!(step.rows & 256u << k) || own >= sizes.out_channels ||
                !find(sizes, tiling, step.image, step.row + k, j, group / 2, group % 2, column, of_image, pixel))
                continue;
            const float made = static_cast<float>(tensors.y[pixel + own]);
            if (made == made) continue;
            tensors.y[pixel + own] = exact(tensors, sizes, of_image, step.row + k, column, pixel, own);
        }
    }

    __device__ __forceinline__ T exact(const Tensors<T>& tensors, const Sizes& sizes, long long image, int i,
                                       int column, long long pixel, int own) const {
        const T* filter = tensors.w + static_cast<long long>(own) * (C::kFilterH * C::kFilterW);
        const T* x = tensors.x + image * sizes.x_image + own;
        float sum = C::kHasBias ? static_cast<float>(load_one(tensors.b + own)) : 0.0f;
#pragma unroll 1
        for (int tap = 0; tap < C::kFilterH * C::kFilterW; ++tap) {
            const int row = i * C::kStrideH - C::kPadTop + R::tap_row(tap);
            const int at = column * C::kStrideW - C::kPadLeft + R::tap_column(tap) * C::kDilationW;
            if (row >= 0 && row < sizes.in_h && at >= 0 && at < sizes.in_w)
                sum += static_cast<float>(load_one(filter + tap)) *
                       static_cast<float>(load_one(x + row * sizes.x_row + at * sizes.x_column));
        }
        T added = {};
        if constexpr (C::kHasResidual) added = load_one(tensors.residual + pixel + own);
        return static_cast<T>(finished<C>(sum, channel_values<C>(tensors, own), added));
    }
};

template <class C>
__device__ __forceinline__ void sparse_nhwc(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const SparseTiling& tiling) {
    using R = SparseRows<C>;
    using T = typename C::Element;
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

    const SparseTaps<C> taps(tensors, sizes, first_channel);
    const SparseSteps<C> steps(position, end_position, sizes, tiling);
    const SparseFetch<C> fetch(tensors.x, sizes, tiling, first_channel, first_column);
    const long long x_row = 2 * sizes.x_row, out_row = 2 * static_cast<long long>(tiling.y_row);
#pragma unroll 1
    for (int k = 0; k < steps.kAhead; ++k) fetch.copy(steps.copies(k), x_row, stages + k * stage_bytes, row_bytes);
    steps.write(lines);
    clear_beside<C>(stages, sizes, tiling, first_channel, first_column);
    SparseMarch<C> march(taps, tiling, reinterpret_cast<T*>(results));
    march.begin();
    const SparseStores<C> stores(tensors.y, sizes, tiling, first_channel, first_column);
    const auto store = [&](unsigned exist, long long first, const unsigned char* from) {
#pragma unroll
        for (int k = 0; k < R::kOutputs; ++k)
            if (exist & 256u << k) stores.store(from + k * R::kResults, first + k * out_row);
    };
    int stage = 0, free = steps.kAhead * stage_bytes, put = 0;  // stages to read and to fill; results to fill
    unsigned made = 0;                                          // what the step before made, and where it belongs
    long long made_to = 0;
#pragma unroll 1
    for (int at = 0; at != steps.count; ++at) {
        wait_for_copies<C::kStages - 2>();
        __syncthreads();  // the rows are there for the products, and the results of the step before for the stores
        const SparseStep now = SparseStep::read(lines + at);
        typename SparseMarch<C>::Pixels pixels;
        march.load(pixels, stages + stage);
        fetch.copy(now, x_row, stages + free, row_bytes);
        free = stage;
        store(made, made_to, results + (kStepResults - put));
#pragma unroll
        for (int d = 0; d < C::kRows; ++d) {
            march.add(d % C::kStrideH, pixels);
            if (d + 1 < C::kRows) march.load(pixels, stages + (stage + (d + 1) * row_bytes));
            const int k = (d - R::kFirst) / C::kStrideH;
            if (d % C::kStrideH == R::kFirst)
                march.put(tensors, sizes, tiling, now, k, first_column, first_channel,
                          results + (put + k * R::kResults));
        }
        stage = stage + stage_bytes == static_cast<int>(tiling.results) ? 0 : stage + stage_bytes;
        put = kStepResults - put;
        made = now.rows;
        made_to = now.to;
        if (now.begins) march.begin();
    }
    __syncthreads();
    store(made, made_to, results + (kStepResults - put));
    const float check = march.check[0] + march.check[1];
    __syncthreads();
    if (check == 0.0f) return;
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
#define DWCONV_PITCH 10
#define DWCONV_CACHED 1
#define DWCONV_STEPS 1
#define DWCONV_LEAD 1
#define DWCONV_STAGES 4
#define DWCONV_ROWS 1
#define DWCONV_LOADS 1
#define DWCONV_STORES 1
#define DWCONV_TURNED 0
#endif

struct Config : ProblemConfig {
    static constexpr int kWarps = DWCONV_WARPS, kThreads = 32 * kWarps, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kPairs = DWCONV_PAIRS, kTiles = DWCONV_TILES, kChannels = 2 * kPairs * kWarps;
    static constexpr int kGroup = DWCONV_GROUP, kApart = DWCONV_APART, kPitch = DWCONV_PITCH;
    static constexpr bool kCached = DWCONV_CACHED;
    static constexpr int kSteps = DWCONV_STEPS, kLead = DWCONV_LEAD;
    static constexpr int kStages = DWCONV_STAGES, kRows = DWCONV_ROWS;
    static constexpr int kLoads = DWCONV_LOADS, kStores = DWCONV_STORES;
    static constexpr bool kTurned = DWCONV_TURNED;
};

using Tiling = dwconv::SparseTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::sparse_nhwc<Config>(tensors, sizes, tiling);
}
