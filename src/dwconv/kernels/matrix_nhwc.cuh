// matrix_nhwc.cuh: depthwise convolution of 16-bit elements on tensor cores, channels last
//   y[n,i,j,c] = b[c] + sum_{u,v} w[c,u,v] * x[n, i*SH - PT + u, j*SW - PL + v*DW, c]     float32 sum
//   x [N,H,W,C]   w [C,KH,KW]   b [C] or null   y [N,OH,OW,C]     offsets in elements, 64-bit
//   A block marches down kChannels channels of a strip of columns, of `slots` images side by side. Its kHelpers last
//   warps copy rows of x to shared memory as they lie, turn those of the next step into rows of each channel (ldmatrix
//   .trans), and store what was finished in the step before. The others have kOwn channels each, their bands and sums
//   in registers: they multiply 16 groups of eight outputs by the bands of all filter rows at once, and add the
//   products with filter row u to the output row that lies u rows above. All meet at one barrier a step. kTurned: what
//   is called a row here is a column in memory; that serves tall filters. shared memory: x [kStages][slots][units * 8
//   pixels][kPixel]; rows of channels [2][kChannels][plane_pitch];
//     results [2][16 groups][8 pixels][kPixel]; before the march, where the last two lie: filters, spread; steps
//   grid.x = chunks of kChannels channels * strips of columns * parts of all output rows, chunk fastest
//   least DRAM traffic: x + w + y, once each; rows around a part's ends and columns between strips come from L2
#pragma once
#include "matrix_rows.cuh"

namespace dwconv {

// How a thread turns its part of a row of pixels into rows of channels, eight pixels by eight channels at a time.
template <class C>
struct MatrixTurns {
    using R = MatrixRows<C>;
    using T = typename C::Element;
    // A load takes four matrices: up to four octets of channels of one unit of eight pixels, or of several units.
    static constexpr int kOctets = C::kChannels / 8;
    static constexpr int kDepth = kOctets % 4 == 0 ? 4 : kOctets % 3 == 0 ? 3 : kOctets % 2 == 0 ? 2 : 1;
    static constexpr int kSets = kOctets / kDepth;                        // loads that a unit's octets take
    static constexpr int kEach = kSets == 1 ? larger(1, 4 / kDepth) : 1;  // units of a load
    int from[C::kTurns];         // of this lane's row of pixels, in bytes of a row of a stage; negative: no turn
    int into[C::kTurns][kEach];  // of the lane's pair of pixels in the channel of its first octet, in bytes
    int octet_pitch;             // in bytes

    __device__ __forceinline__ explicit MatrixTurns(const MatrixMarchTiling& tiling)
        : octet_pitch(16 * static_cast<int>(tiling.plane_pitch)) {
        const int lane = threadIdx.x % 32, warp = helper_thread<C>() / 32, matrix = lane / 8;
        const int units = static_cast<int>(tiling.slots * tiling.units);
        // Where there are fewer than four matrices, the last one repeats.
        const int ahead = smaller(matrix / kDepth, kEach - 1);
        const int of_set = kEach == 1 ? smaller(matrix, kDepth - 1) : matrix % kDepth;
#pragma unroll
        for (int k = 0; k < C::kTurns; ++k) {
            const int number = k * C::kHelpers + warp, first = number / kSets * kEach, octet = number % kSets * kDepth;
            const int unit = smaller(first + ahead, units - 1);
            from[k] = first < units ? 2 * ((unit * 8 + lane % 8) * R::kPixel + (octet + of_set) * 8) : -1;
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
                const int slot = (first + e) / static_cast<int>(tiling.units);
                const int of_slot = first + e - slot * static_cast<int>(tiling.units);
                into[k][e] = first + e < units ? 2 * ((octet * 8 + lane / 4) * static_cast<int>(tiling.plane_pitch) +
                                                      slot * static_cast<int>(tiling.plane_slot) +
                                                      unit_place<C>(of_slot, tiling) + lane % 4 * 2)
                                               : -1;
                keep(into[k][e]);
            }
            keep(from[k]);
        }
        keep(octet_pitch);
    }

    using Words = unsigned[C::kTurns][4];

    __device__ __forceinline__ void load(Words& words, const unsigned char* row) const {
#pragma unroll
        for (int k = 0; k < C::kTurns; ++k)
            if (from[k] >= 0) load_transposed(words[k], row, from[k]);  // the same for all lanes
    }

    __device__ __forceinline__ void store(const Words& words, unsigned char* planes) const {
#pragma unroll
        for (int k = 0; k < C::kTurns; ++k) {
            if (from[k] < 0) continue;
#pragma unroll
            for (int e = 0; e < kEach; ++e)
                if (e == 0 || into[k][e] >= 0)
#pragma unroll
                    for (int octet = 0; octet < kDepth; ++octet)
                        *reinterpret_cast<unsigned*>(planes + (into[k][e] + octet * octet_pitch)) =
                            words[k][e * kDepth + octet];
        }
    }
};

// What a warp keeps of its channels for the whole march, and the sums of the rows in the making.
template <class C>
struct MatrixMarch {
    using R = MatrixRows<C>;
    using B = Band<C>;
    using T = typename C::Element;
    int channel;             // of the chunk, the warp's first one
    int offsets[B::kSteps];  // of this lane's row of A in its first channel, in bytes, for each product of a row
    int into;                // of this lane's first output in the results, in bytes
    float bias[C::kOwn];
    ChannelValues<float> values[C::kOwn];
    uint2 bands[C::kOwn][C::kFilterH][B::kSteps];
    float sums[C::kOwn][R::kLive][4];

    __device__ __forceinline__ MatrixMarch(const Tensors<T>& tensors, const Sizes& sizes,
                                           const MatrixMarchTiling& tiling, int first_channel, T* filters) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        channel = warp * C::kOwn;
        const int groups = static_cast<int>(tiling.groups);
        const int mine = smaller(lane % 16, groups * static_cast<int>(tiling.slots) - 1);  // beyond: the last one again
#pragma unroll
        for (int step = 0; step < B::kSteps; ++step) {
            const int unit = 2 * step + lane / 16;  // from the group's first one on
            offsets[step] = 2 * (channel * static_cast<int>(tiling.plane_pitch) +
                                 mine / groups * static_cast<int>(tiling.plane_slot) + mine % groups * 8 +
                                 unit_place<C>(unit, tiling));
            keep(offsets[step]);
        }
        into = 2 *
               (lane / 4 * R::kGroup + lane % 4 * 2 * R::kPixel + turned_word(channel / 2, lane / 4) * 2 + channel % 2);
        keep(into);
        // All taps are on their way before the first is waited for.
        constexpr int kTaps = C::kFilterH * C::kFilterW, kEach = ceil_div(kTaps, 32);
        T taps[C::kOwn][kEach];
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
            const int of = smaller(first_channel + channel + o, static_cast<int>(sizes.out_channels) - 1);
            const T* filter = tensors.w + static_cast<long long>(of) * kTaps;
#pragma unroll
            for (int k = 0; k < kEach; ++k) taps[o][k] = load_one(filter + smaller(32 * k + lane, kTaps - 1));
            bias[o] = C::kHasBias ? static_cast<float>(load_one(tensors.b + of)) : 0.0f;
            values[o] = channel_values<C>(tensors, of);
        }
        T* const rows = filters + channel * B::kFilterElements;
        for (int at = lane; at < C::kOwn * B::kFilterElements / 8; at += 32)
            reinterpret_cast<uint4*>(rows)[at] = uint4{0, 0, 0, 0};
        __syncwarp();
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o)
#pragma unroll
            for (int k = 0; k < kEach; ++k)
                if (const int tap = 32 * k + lane; tap < kTaps)
                    rows[o * B::kFilterElements + R::tap_row(tap) * B::kPitch + B::kOrigin +
                         R::tap_column(tap) * C::kDilationW] = taps[o][k];
        __syncwarp();
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o)
#pragma unroll
            for (int u = 0; u < C::kFilterH; ++u)
#pragma unroll
                for (int step = 0; step < B::kSteps; ++step)
                    bands[o][u][step] = band_of<C>(rows + o * B::kFilterElements, u, step);
    }

    // After a unit's last step. Rare, so it shall not become a selection for every register.
    __device__ __forceinline__ void begin() {
#ifndef DWCONV_EMULATOR
        asm volatile("" ::: "memory");
#endif
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o)
#pragma unroll
            for (int k = 0; k < R::kLive; ++k)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[o][k][e] = bias[o];
    }

    // The rows of A of an input row, for all products and channels.
    using Rows = unsigned[C::kOwn][B::kSteps][4];
    __device__ __forceinline__ void load(Rows& a, const unsigned char* planes, int plane_bytes) const {
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o)
#pragma unroll
            for (int step = 0; step < B::kSteps; ++step)
                load_matrices(a[o][step], planes, offsets[step] + o * plane_bytes);
    }

    // Adds an input row to the output rows that read it: filter rows phase, phase + kStrideH, ...; the phase, known
    // when this is compiled, is (row + kPadTop) mod kStrideH. sums[0] is the lowest output row. At phase 0 a new one
    // begins, and every sum takes the place of the one above: as the product writes it there, that costs nothing.
    __device__ __forceinline__ void add(int phase, const Rows& a) {
#pragma unroll
        for (int k = R::kLive - 1; k >= 0; --k)
#pragma unroll
            for (int o = 0; o < C::kOwn; ++o) {
                const int u = phase + k * C::kStrideH;
                if (u >= C::kFilterH) continue;
                float row[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) row[e] = phase > 0 ? sums[o][k][e] : k > 0 ? sums[o][k - 1][e] : bias[o];
#pragma unroll
                for (int step = 0; step < B::kSteps; ++step) multiply_matrices<T>(row, a[o][step], bands[o][u][step]);
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[o][k][e] = row[e];
            }
    }

    // Puts the k-th output row that a step completes into the results. `j` and `of` are the strip's first column and
    // the chunk's first channel.
    __device__ __forceinline__ void put(const Tensors<T>& tensors, const Sizes& sizes, const MatrixMarchTiling& tiling,
                                        const MatrixStep& step, int k, int j, int of, unsigned char* row) const {
        T* const results = reinterpret_cast<T*>(row + into);
        constexpr int kTop = R::kLive - 1;
        float check = 0;  // NaN as soon as a sum is not finite
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const auto residual = residual_of(tensors, sizes, tiling, step.image, step.row + k, j, of, half, e);
                float out[C::kOwn];
#pragma unroll
                for (int o = 0; o < C::kOwn; ++o) {
                    const float sum = sums[o][kTop][2 * half + e];
                    check = fmaf(sum, 0.0f, check);
                    out[o] = finished<C>(sum, values[o], residual.element[o]);
                }
                *reinterpret_cast<Vector<T, C::kOwn>*>(results + (8 * half * R::kGroup + e * R::kPixel)) =
                    rounded<T, C::kOwn>(out);
            }
        if (check == 0.0f) return;
        unsigned wrong = 0;  // numbers of sums that are not finite
#pragma unroll
        for (int number = 0; number < 4 * C::kOwn; ++number)
            if (!(sums[number / 4][kTop][number % 4] * 0.0f == 0.0f)) wrong |= 1u << number;
#pragma unroll 1
        for (; wrong != 0; wrong &= wrong - 1) {
            const int number = __ffs(static_cast<int>(wrong)) - 1, o = number / 4, half = number / 2 % 2;
            put_exact(tensors, sizes, tiling, step.image, step.row + k, j, of, half, number % 2, o,
                      results + (8 * half * R::kGroup + number % 2 * R::kPixel));
        }
    }

    // Whether one of the lane's outputs exists; its column, its image and its pixel in y.
    __device__ __forceinline__ bool find(const Sizes& sizes, const MatrixMarchTiling& tiling, int image, int i, int j,
                                         int half, int e, int& column, long long& of_image, long long& pixel) const {
        const int number = static_cast<int>(threadIdx.x % 32 / 4) + 8 * half;
        const int slot = number / static_cast<int>(tiling.groups);
        column = j + (number - slot * static_cast<int>(tiling.groups)) * 8 + static_cast<int>(threadIdx.x % 4 * 2) + e;
        of_image = image + slot;
        pixel = of_image * sizes.out_h * sizes.out_w * sizes.out_channels + i * static_cast<long long>(tiling.y_row) +
                column * static_cast<long long>(tiling.y_column);
        return slot < static_cast<int>(tiling.slots) && column < sizes.out_w;
    }

    __device__ __forceinline__ Vector<T, C::kOwn> residual_of(const Tensors<T>& tensors, const Sizes& sizes,
                                                              const MatrixMarchTiling& tiling, int image, int i, int j,
                                                              int of, int half, int e) const {
        Vector<T, C::kOwn> residual = {};
        if constexpr (C::kHasResidual) {
            int column;
            long long of_image, pixel;
            if (find(sizes, tiling, image, i, j, half, e, column, of_image, pixel) && of + channel < sizes.out_channels)
                residual = load_vector<C::kOwn>(tensors.residual + pixel + (of + channel));
        }
        return residual;
    }

    // Computes one output again, product by product: channel `o` of the warp.
    __device__ __forceinline__ void put_exact(const Tensors<T>& tensors, const Sizes& sizes,
                                              const MatrixMarchTiling& tiling, int image, int i, int j, int of,
                                              int half, int e, int o, T* result) const {
        int column;
        long long of_image, pixel;
        const int own = of + channel + o;
        if (!find(sizes, tiling, image, i, j, half, e, column, of_image, pixel) || own >= sizes.out_channels) return;
        const T* filter = tensors.w + static_cast<long long>(own) * (C::kFilterH * C::kFilterW);
        const T* x = tensors.x + of_image * sizes.x_image + own;
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
        result[o] = static_cast<T>(finished<C>(sum, channel_values<C>(tensors, own), added));
    }
};

template <class C>
__device__ __forceinline__ void matrix_nhwc(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const MatrixMarchTiling& tiling) {
    using R = MatrixRows<C>;
    using T = typename C::Element;
    const unsigned above = tiling.chunks.quotient(blockIdx.x);
    const int first_channel = static_cast<int>(blockIdx.x - above * tiling.chunks.divisor) * C::kChannels;
    const unsigned part = tiling.column_strips.quotient(above);
    const int first_column =
        static_cast<int>(above - part * tiling.column_strips.divisor) * static_cast<int>(tiling.groups) * 8;
    const unsigned position = part * tiling.part_rows;
    const unsigned end_position = min(position + tiling.part_rows, tiling.rows);

    // Of shared memory, in bytes: a row, and all of a step, as they arrive, as rows of channels, and as results.
    const int row_bytes = static_cast<int>(tiling.slots * tiling.units) * 16 * R::kPixel;
    const int plane_bytes = 2 * static_cast<int>(tiling.plane_pitch), planes_bytes = C::kChannels * plane_bytes;
    const int stage_bytes = C::kRows * row_bytes, turned_bytes = C::kRows * planes_bytes;
    constexpr int kResults = 2 * R::kResults, kStepResults = R::kOutputs * kResults;
    unsigned char* const stages = shared_memory<unsigned char>();
    unsigned char* const planes = stages + C::kStages * stage_bytes;
    unsigned char* const results = planes + 2 * turned_bytes;
    MatrixStep* line = reinterpret_cast<MatrixStep*>(planes + 2 * tiling.step_place);

    const MatrixSteps<C> steps(position, end_position, sizes, tiling);
    if (static_cast<int>(threadIdx.x) < 32 * C::kWarps) {
        MatrixMarch<C> march(tensors, sizes, tiling, first_channel, reinterpret_cast<T*>(planes));
        clear_beside<C>(stages, sizes, tiling, first_channel, first_column);
        march.begin();
        const MatrixStep* const end = ++line + steps.count;
        int from = 0, put = 0;  // rows of channels and results of the step at hand
        meet();                 // filters are read: rows of channels take their place
        meet();
#pragma unroll 1
        for (; line != end; ++line) {
            meet();
            const unsigned made = line->rows;
#pragma unroll
            for (int d = 0; d < C::kRows; ++d) {
                typename MatrixMarch<C>::Rows a;
                march.load(a, planes + (from + d * planes_bytes), plane_bytes);
                march.add(d % C::kStrideH, a);
                const int k = (d - R::kFirst) / C::kStrideH;
                if (d % C::kStrideH == R::kFirst && (made & 256u << k))
                    march.put(tensors, sizes, tiling, *line, k, first_column, first_channel,
                              results + (put + k * kResults));
            }
            from = turned_bytes - from;
            put = kStepResults - put;
            if (line->begins) march.begin();
        }
        meet();
    } else {
        const MatrixFetch<C> fetch(tensors.x, sizes, tiling, first_channel, first_column);
        const long long x_row = 2 * sizes.x_row, out_row = 2 * static_cast<long long>(tiling.y_row);
#pragma unroll 1
        for (int k = 0; k < C::kStages; ++k)
            fetch.copy(steps.line(k - C::kStages), x_row, stages + k * stage_bytes, row_bytes);
        steps.write(line);
        const MatrixTurns<C> turns(tiling);
        const MatrixStores<C> stores(tensors.y, sizes, tiling, first_channel, first_column);
        const MatrixStep* const end = ++line + steps.count;
        int stage = 0, to = 0, left = 0;  // of the step that comes next: its rows as they arrive, and turned; results
        const auto turn = [&]() {
#pragma unroll
            for (int d = 0; d < C::kRows; ++d) {
                typename MatrixTurns<C>::Words words;
                turns.load(words, stages + (stage + d * row_bytes));
                turns.store(words, planes + (to + d * planes_bytes));
            }
            to = turned_bytes - to;
        };
        const auto store = [&](const MatrixStep& made) {
            const unsigned exist = made.rows;
            const long long first = made.to;
            left = kStepResults - left;
#pragma unroll
            for (int k = 0; k < R::kOutputs; ++k)
                if (exist & 256u << k) stores.store(results + (left + k * kResults), first + k * out_row);
        };
        meet();
        wait_for_copies<C::kStages - 1>();
        meet();
        turn();
#pragma unroll 1
        for (; line != end; ++line) {
            wait_for_copies<C::kStages - 2>();
            meet();  // what was turned is there for the products, and the results of the step before for the stores
            fetch.copy(*line, x_row, stages + stage, row_bytes);
            stage = stage + stage_bytes == C::kStages * stage_bytes ? 0 : stage + stage_bytes;
            turn();
            store(line[-1]);
        }
        meet();
        store(line[-1]);
    }
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#undef DWCONV_ELEMENT
#define DWCONV_ELEMENT dwconv::Half
#define DWCONV_WARPS 12
#define DWCONV_HELPERS 4
#define DWCONV_MIN_BLOCKS 1
#define DWCONV_OWN 2
#define DWCONV_STAGES 3
#define DWCONV_ROWS 2
#define DWCONV_LOADS 1
#define DWCONV_STORES 1
#define DWCONV_TURNS 1
#define DWCONV_TURNED 0
#endif

struct Config : ProblemConfig {
    static constexpr int kWarps = DWCONV_WARPS, kHelpers = DWCONV_HELPERS;
    static constexpr int kThreads = 32 * (kWarps + kHelpers), kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kOwn = DWCONV_OWN, kChannels = kWarps * kOwn, kStages = DWCONV_STAGES, kRows = DWCONV_ROWS;
    static constexpr int kLoads = DWCONV_LOADS, kStores = DWCONV_STORES, kTurns = DWCONV_TURNS;
    static constexpr int kLead = kPadLeft;
    static constexpr bool kTurned = DWCONV_TURNED;
};

using Tiling = dwconv::MatrixMarchTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::matrix_nhwc<Config>(tensors, sizes, tiling);
}
