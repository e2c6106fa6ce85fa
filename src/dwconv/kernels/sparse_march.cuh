// sparse_march.cuh: what a warp of sparse_nhwc keeps of its channels, and what it does with an input row
#pragma once
#include "sparse_rows.cuh"

namespace dwconv {

// The taps of a warp's channels, all on their way before the first is waited for; each lane has some.
template <class C>
struct SparseTaps {
    using R = SparseRows<C>;
    using B = SparseBand<C>;
    using T = typename C::Element;
    static constexpr int kTaps = C::kFilterH * C::kFilterW, kEach = ceil_div(kTaps, 32), kOwn = B::kOwn;
    T taps[kOwn][kEach];
    T bias[kOwn];
    ChannelValues<float> values[kOwn];

    __device__ __forceinline__ SparseTaps(const Tensors<T>& tensors, const Sizes& sizes, int first_channel) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        // Of a warp's channels all exist, or none.
        const int first = smaller(first_channel + warp * kOwn, static_cast<int>(sizes.out_channels) - kOwn);
        const T* const own = tensors.w + (static_cast<long long>(first) * kTaps + lane);
#pragma unroll
        for (int k = 0; k < kEach; ++k)
#pragma unroll
            for (int o = 0; o < kOwn; ++o)
                if (32 * k + lane < kTaps) taps[o][k] = load_one(own + (o * kTaps + 32 * k));
#pragma unroll
        for (int o = 0; o < kOwn; ++o) {
            bias[o] = T();
            if constexpr (C::kHasBias) bias[o] = load_one(tensors.b + first + o);
            values[o] = channel_values<C>(tensors, first + o);
        }
    }

    // Spreads them over the warp's part of shared memory.
    __device__ __forceinline__ void spread(unsigned* words) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int at = 0; at < B::kWords / 4; at += 32)
            if (at + lane < B::kWords / 4) reinterpret_cast<uint4*>(words)[at + lane] = uint4{0, 0, 0, 0};
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
            const int tap = 32 * k + lane, number = tap_at<C>(tap);
            const int u = R::tap_row(number), v = R::tap_column(number);
#pragma unroll
            for (int o = 0; o < kOwn; ++o)
                if (tap < kTaps) spread_tap<C>(words, u, v, o, taps[o][k]);
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
    int channel;  // of the chunk, the warp's first one
    static constexpr int kOffsets = R::kPeriod / 4;
    int offsets[C::kTiles][kOffsets];  // of every fourth pixel from this lane's first one on, of each tile, in bytes
    int into[2];                       // of this lane's outputs in the results' first tile, in bytes
    unsigned zero;                     // see `another`
    float bias[kOwn];
    ChannelValues<float> values[kOwn];
    uint4 bands[C::kPairs][C::kFilterH][B::kSteps];
    float sums[C::kPairs][C::kTiles][R::kLive][4];  // [channel of the pair][neighbouring groups]
    float check[2] = {0, 0};                        // NaN as soon as a sum was not finite

    // `words`: shared memory for the filters of all warps.
    __device__ __forceinline__ SparseMarch(const SparseTaps<C>& taps, const SparseTiling& tiling, unsigned* words) {
        const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, octet = warp * kOwn / 8;
        const int of_octet = static_cast<int>(warp * kOwn % 8 * 2);
        channel = static_cast<int>(warp * kOwn);
        zero = unknown_zero();
        const unsigned groups = tiling.slot_groups.divisor, last = groups * tiling.slots.divisor - 1;
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile) {
            const unsigned group = min(R::group_of(8 * tile + lane / 4), last);  // beyond: the last one again
            const unsigned slot = tiling.slot_groups.quotient(group);
            const unsigned pixel = slot * tiling.width + (group - slot * groups) * (C::kGroup * C::kStrideW) + lane % 4;
#pragma unroll
            for (int k = 0; k < kOffsets; ++k) {
                offsets[tile][k] = R::X::place(pixel + 4 * k, octet) + of_octet;
                keep(offsets[tile][k]);
            }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            into[e] = R::Y::place(R::group_of(lane % 4 * 2 + e) * C::kPitch + lane / 4, octet) + of_octet;
            keep(into[e]);
        }
        taps.spread(words + warp * B::kWords);
#pragma unroll
        for (int step = 0; step < B::kSteps; ++step) read_bands<C>(bands, step, words + warp * B::kWords);
#pragma unroll
        for (int o = 0; o < kOwn; ++o) {
            bias[o] = static_cast<float>(taps.bias[o]);
            values[o] = taps.values[o];
        }
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
                    // Where no tap of a group reaches, A has zeros, and any pixel will do: the last one again.
                    const int of = smaller(s, ceil_div(B::kReach - 16 * step, 4) - 1);
                    const auto loaded = *reinterpret_cast<const typename Word<4 * C::kPairs>::Type*>(
                        row + (offsets[tile][of % kOffsets] + (16 * step + of / kOffsets * R::kPeriod) * R::X::kPixel));
#pragma unroll
                    for (int p = 0; p < C::kPairs; ++p)
                        pixels[tile][step][p][s] = another(reinterpret_cast<const unsigned*>(&loaded)[p], zero, s - of);
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

    // The same for row d of images that are taken as a whole, without sums that move.
    __device__ __forceinline__ void add_whole(int d, const Pixels& pixels) {
#pragma unroll
        for (int i = 0; i < R::kLive; ++i)
#pragma unroll
            for (int p = 0; p < C::kPairs; ++p)
#pragma unroll
                for (int tile = 0; tile < C::kTiles; ++tile) {
                    const int u = d + C::kPadTop - i * C::kStrideH;
                    if (u < 0 || u >= C::kFilterH) continue;
                    auto& own = sums[p][tile][i];
                    float begun[4] = {bias[2 * p], bias[2 * p], bias[2 * p + 1], bias[2 * p + 1]};
                    multiply_sparse<T>(own, bands[p][u][0], pixels[tile][0][p], u == 0 || d == 0 ? begun : own);
                }
    }

    // Puts the k-th output row that a step completes into the results; also one that doesn't exist, as that costs less
    // than a branch. `j` and `of` are the strip's first column and the chunk's first channel.
    __device__ __forceinline__ void put(const Tensors<T>& tensors, const Sizes& sizes, const SparseTiling& tiling,
                                        const SparseStep& step, int k, int j, int of, unsigned char* row) {
        const int of_row = C::kWhole ? k : R::kLive - 1;
        if (C::kHasResidual && !(step.made & 1u << k)) return;
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const auto residual = residual_of(tensors, sizes, tiling, step.image, step.row + k, j, of, tile, e);
                float out[kOwn];
#pragma unroll
                for (int o = 0; o < kOwn; ++o) {
                    const float sum = sums[o / 2][tile][of_row][o % 2 * 2 + e];
                    check[e] = fmaf(sum, 0.0f, check[e]);
                    out[o] = finished<C>(sum, values[o], residual.element[o]);
                }
                *reinterpret_cast<Vector<T, kOwn>*>(row + (into[e] + 8 * tile * C::kPitch * R::Y::kPixel)) =
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
        return output < C::kGroup && slot < static_cast<int>(tiling.slots.divisor) && column < sizes.out_w;
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
    // Inf or NaN are NaN where the filter doesn't reach, too, and an epilogue leaves a NaN what it is.
    __device__ __forceinline__ void repair(const Tensors<T>& tensors, const Sizes& sizes, const SparseTiling& tiling,
                                           const SparseStep& step, int j, int of) const {
#pragma unroll 1
        for (int number = 0; number < R::kOutputs * C::kTiles * 2 * kOwn; ++number) {
            const int k = number / (C::kTiles * 2 * kOwn), group = number / kOwn % (C::kTiles * 2);
            const int own = of + channel + number % kOwn;
            int column;
            long long of_image, pixel;
            if (!(step.made & 1u << k) || own >= sizes.out_channels ||
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
        const float start = C::kHasBias ? static_cast<float>(load_one(tensors.b + own)) : 0.0f;
        const float sum = exact_sum<C, C::kTurned>(x, filter, start, sizes, 0, i, column);
        T added = {};
        if constexpr (C::kHasResidual) added = load_one(tensors.residual + pixel + own);
        return static_cast<T>(finished<C>(sum, channel_values<C>(tensors, own), added));
    }
};

}  // namespace dwconv
