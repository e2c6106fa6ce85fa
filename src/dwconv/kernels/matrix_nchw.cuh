// matrix_nchw.cuh: depthwise convolution of 16-bit elements on tensor cores, channels first
//   y[n,c,i,j] = b[c] + sum_{u,v} w[c,u,v] * x[n, c/M, i*SH - PT + u*DH, j*SW - PL + v*DW]     float32 sum
//   x [N,C,H,W]   w [C*M,KH,KW]   b [C*M] or null   y [N,C*M,OH,OW]     offsets in elements, 64-bit
//   A block fetches an item's input as it lies into zero-padded planes of shared memory; a warp multiplies 16 groups of
//   outputs of a channel by the bands of its filter; results leave through shared memory; then come the next images.
//   grid.x = equal shares of all items
//   least DRAM traffic: x + w + y, once each; halo rows between items of one plane come from L2
#pragma once
#include "matrix_slices.cuh"

namespace dwconv {

// How a thread fetches its part of an item's input: where its units are in memory and go to in shared memory, the same
// for every group of images. kInput = 1: as one stretch of each image; units are kUnit elements of it.
template <class C, int Way>
struct MatrixInput {
    using T = typename C::Element;
    using Held = Vector<T, C::kUnit>;
    // A unit goes to shared memory as words, or pairs of them, each to its row. Lanes whose words would meet in one
    // bank begin with different ones.
    static constexpr int kWords = C::kUnit / 2, kPart = larger(1, C::kGranule / 2), kParts = kWords / kPart;
    static constexpr bool kPlaced = kParts <= 2 && C::kGranule > 1;  // the addresses of both parts are kept
    const T* first;
    const MatrixTiling& tiling;
    int units;  // of the item
    int from[C::kLoads];
    // Where a unit goes to (kPlaced: its two parts); where the elements of the next row do, and how many come before.
    int into[C::kLoads], next[C::kLoads], left[C::kLoads];

    __device__ __forceinline__ MatrixInput(const T* x, const Sizes& sizes, const MatrixTiling& tiling,
                                           const MatrixItem& item)
        : first(x + (item.channel * sizes.x_channel + static_cast<long long>(item.in_row) * tiling.line_units.divisor)),
          tiling(tiling) {
        const int width = tiling.line_units.divisor;
        const int count = static_cast<int>(tiling.channels) * item.in_rows * width / C::kUnit;  // units of an image
        const int lead = (item.in_row - item.top) * static_cast<int>(tiling.pitch) + C::kLead;
        units = C::kOneImage ? count : static_cast<int>(tiling.images * tiling.units.divisor);
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k) {
            const int unit = static_cast<int>(threadIdx.x + k * tiling.threads);
            const int image = C::kOneImage ? 0 : tiling.units.quotient(unit);
            const int at = (unit - image * static_cast<int>(tiling.units.divisor)) * C::kUnit;
            const int line = tiling.line_units.quotient(at), channel = tiling.lines.quotient(line);
            const int gap = static_cast<int>(tiling.pitch) - width;
            const bool is_last = line + 1 == (channel + 1) * static_cast<int>(tiling.lines.divisor);
            from[k] = image * static_cast<int>(sizes.x_image) + at;
            into[k] = lead + image * static_cast<int>(tiling.plane_pitch) + at + line * gap +
                      channel * static_cast<int>(tiling.plane_gap);
            next[k] = into[k] + gap + (is_last ? static_cast<int>(tiling.plane_gap) : 0);
            left[k] = (line + 1) * width - at;
            if (kPlaced && kParts == 2) {
                const int lower = into[k], upper = (C::kGranule < left[k] ? into[k] : next[k]) + C::kGranule;
                into[k] = turn() ? upper : lower;
                next[k] = turn() ? lower : upper;
            }
            if (!C::kOneImage) keep(from[k]);
            keep(into[k]);
            keep(next[k]);
            if (!kPlaced) keep(left[k]);
        }
    }

    __device__ __forceinline__ static int turn() {
        return static_cast<int>(threadIdx.x % 32 / (32 / larger(kWords, 1))) % larger(kParts, 1);
    }
    __device__ __forceinline__ bool exists(int k) const {
        return static_cast<int>(threadIdx.x + k * tiling.threads) < units;
    }
    __device__ __forceinline__ void load(Held (&held)[C::kLoads], long long image) const {
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k)
            if (exists(k)) held[k] = load_vector<C::kUnit>(first + image + from[k]);
    }
    __device__ __forceinline__ void store(const Held (&held)[C::kLoads], T* planes) const {
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k) {
            if (!exists(k)) continue;
            if constexpr (kWords == 0) {
                planes[into[k]] = held[k].element[0];
            } else {
                Vector<unsigned, larger(kWords, 1)> words = *reinterpret_cast<const decltype(words)*>(&held[k]);
                const int first_part = turn();
#pragma unroll
                for (int by = kParts / 2; by > 0; by /= 2) {  // turned around by first_part
                    const auto before = words;
#pragma unroll
                    for (int w = 0; w < kWords; ++w)
                        words.element[w] =
                            first_part & by ? before.element[(w + by * kPart) % kWords] : before.element[w];
                }
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    const Vector<unsigned, kPart> values =
                        *reinterpret_cast<const Vector<unsigned, kPart>*>(&words.element[part * kPart]);
                    if constexpr (kPlaced) {
                        *reinterpret_cast<Vector<unsigned, kPart>*>(planes + (part == 0 ? into[k] : next[k])) = values;
                    } else {
                        const int e = (part + first_part) % kParts * (2 * kPart);
                        if constexpr (C::kGranule == 1) {
                            T pair[2];
                            pair[0].bits = static_cast<unsigned short>(values.element[0]);
                            pair[1].bits = static_cast<unsigned short>(values.element[0] >> 16);
                            planes[(e < left[k] ? into[k] : next[k]) + e] = pair[0];
                            planes[(e + 1 < left[k] ? into[k] : next[k]) + e + 1] = pair[1];
                        } else {
                            *reinterpret_cast<Vector<unsigned, kPart>*>(planes + (e < left[k] ? into[k] : next[k]) +
                                                                        e) = values;
                        }
                    }
                }
            }
        }
    }
};

// kInput = 2: as rows of up to seven elements. A unit is a row, read as the aligned words that hold it.
template <class C>
struct MatrixInput<C, 2> {
    using T = typename C::Element;
    static constexpr int kWords = ceil_div(C::kUnit, 2);
    static_assert(C::kUnit <= 7, "a row and the element in front of it are four words");
    static_assert(C::kInput != 2 || C::kLead % 4 == 0, "rows are stored 8 bytes at a time");
    struct Held {
        unsigned words[kWords];
    };
    const T* x;
    const MatrixTiling& tiling;
    int units;
    int from[C::kLoads], into[C::kLoads];

    __device__ __forceinline__ MatrixInput(const T* x, const Sizes& sizes, const MatrixTiling& tiling,
                                           const MatrixItem& item)
        : x(x + item.channel * sizes.x_channel / 2 * 2), tiling(tiling) {
        units = static_cast<int>(tiling.images * tiling.units.divisor);
        const int odd = static_cast<int>(item.channel * sizes.x_channel % 2);
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k) {
            const int unit = static_cast<int>(threadIdx.x + k * tiling.threads);
            const int image = tiling.units.quotient(unit);
            const int line = unit - image * static_cast<int>(tiling.units.divisor);
            const int channel = tiling.lines.quotient(line);
            const int row = line - channel * static_cast<int>(tiling.lines.divisor);
            from[k] = image * static_cast<int>(sizes.x_image) + channel * static_cast<int>(tiling.in_plane) +
                      (item.in_row + row) * C::kUnit + odd;
            into[k] = (channel * static_cast<int>(tiling.images) + image) * static_cast<int>(tiling.plane_pitch) +
                      (item.in_row - item.top + row) * static_cast<int>(tiling.pitch) + C::kLead;
            keep(from[k]);
            keep(into[k]);
        }
    }
    __device__ __forceinline__ bool exists(int k) const {
        return static_cast<int>(threadIdx.x + k * tiling.threads) < units;
    }
    __device__ __forceinline__ void load(Held (&held)[C::kLoads], long long image) const {
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k) {
            if (!exists(k)) continue;
            const unsigned* words = reinterpret_cast<const unsigned*>(x + image + (from[k] & ~1));
#pragma unroll
            for (int w = 0; w < kWords; ++w) held[k].words[w] = load_one(words + w);
        }
    }
    __device__ __forceinline__ void store(const Held (&held)[C::kLoads], T* planes) const {
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k) {
            if (!exists(k)) continue;
            const int shift = 16 * (from[k] & 1);
            Vector<unsigned, 4> row = {};
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
                const unsigned long long upper = w + 1 < kWords ? held[k].words[w + 1] : 0;
                row.element[w] = static_cast<unsigned>((upper << 32 | held[k].words[w]) >> shift);
            }
            if (C::kUnit % 2 == 1) row.element[kWords - 1] &= 0xffffu;
#pragma unroll
            for (int w = 0; w < kWords; w += 2)
                *reinterpret_cast<uint2*>(planes + into[k] + 2 * w) = uint2{row.element[w], row.element[w + 1]};
        }
    }
};

// kInput = 0: row by row. Units are granules.
template <class C>
struct MatrixInput<C, 0> {
    using T = typename C::Element;
    using Held = Vector<T, C::kGranule>;
    const T* first;
    long long from[C::kLoads];  // negative where there is no unit
    int into[C::kLoads];

    __device__ __forceinline__ MatrixInput(const T* x, const Sizes& sizes, const MatrixTiling& tiling,
                                           const MatrixItem& item)
        : first(x + (item.channel * sizes.x_channel + item.in_row * sizes.x_row)) {
        const int end =
            (item.column + item.columns - 1) * C::kStrideW - C::kPadLeft + (C::kFilterW - 1) * C::kDilationW + 1;
        const int begin = larger(item.column * C::kStrideW - C::kLead, 0);
        const int last = smaller(ceil_div(larger(end, 0), C::kGranule) * C::kGranule, static_cast<int>(sizes.in_w));
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k) {
            int unit = static_cast<int>(threadIdx.x + k * tiling.threads);
            const int image = tiling.units.quotient(unit);
            unit -= image * static_cast<int>(tiling.units.divisor);
            const int line = tiling.line_units.quotient(unit), channel = tiling.lines.quotient(line);
            const int row = line - channel * static_cast<int>(tiling.lines.divisor);
            const int column = begin + (unit - line * static_cast<int>(tiling.line_units.divisor)) * C::kGranule;
            const bool exists = image < static_cast<int>(tiling.images) &&
                                channel < static_cast<int>(tiling.channels) && row < item.in_rows && column < last;
            from[k] = exists ? image * sizes.x_image + channel * sizes.x_channel + row * sizes.x_row + column : -1;
            const int plane = channel * static_cast<int>(tiling.images) + image;
            into[k] = plane * static_cast<int>(tiling.plane_pitch) +
                      (item.in_row - item.top + row) * static_cast<int>(tiling.pitch) + C::kLead -
                      item.column * C::kStrideW + column;
        }
    }
    __device__ __forceinline__ void load(Held (&held)[C::kLoads], long long image) const {
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k)
            if (from[k] >= 0) held[k] = load_vector<C::kGranule>(first + image + from[k]);
    }
    __device__ __forceinline__ void store(const Held (&held)[C::kLoads], T* planes) const {
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k)
            if (from[k] >= 0) put_elements<C::kGranule>(held[k].element, planes + into[k]);
    }
};

// How a thread stores its part of an item's results, image by image one stretch of y; units are kStoreUnit elements.
template <class C>
struct MatrixOutput {
    using T = typename C::Element;
    T* first;  // of y, in the first image of all
    const MatrixTiling& tiling;
    int units;                               // of the item
    int from[C::kStores], into[C::kStores];  // of the results, of y

    __device__ __forceinline__ MatrixOutput(T* y, const Sizes& sizes, const MatrixTiling& tiling,
                                            const MatrixItem& item)
        : first(y + (static_cast<long long>(item.channel) * C::kMultiplier * tiling.out_plane +
                     static_cast<long long>(item.row) * sizes.out_w)),
          tiling(tiling) {
        const int count = static_cast<int>(tiling.channels) * C::kMultiplier * item.rows *
                          static_cast<int>(sizes.out_w) / C::kStoreUnit;
        units = C::kOneImage ? count : static_cast<int>(tiling.images * tiling.result_units.divisor);
        if constexpr (C::kOneImage) return;
#pragma unroll
        for (int k = 0; k < C::kStores; ++k) {
            const int unit = static_cast<int>(threadIdx.x + k * tiling.threads);
            const int image = tiling.result_units.quotient(unit);
            const int at = (unit - image * static_cast<int>(tiling.result_units.divisor)) * C::kStoreUnit;
            from[k] = image * static_cast<int>(tiling.result_image) + at;
            into[k] = image * static_cast<int>(sizes.out_channels * tiling.out_plane) + at;
            keep(from[k]);
            keep(into[k]);
        }
    }
    __device__ __forceinline__ void store(const T* results, long long image) const {
        if constexpr (C::kOneImage) {
#pragma unroll 4
            for (int at = threadIdx.x * C::kStoreUnit; at < units * C::kStoreUnit;
                 at += static_cast<int>(tiling.threads) * C::kStoreUnit)
                store_vector(first + image + at, *reinterpret_cast<const Vector<T, C::kStoreUnit>*>(results + at));
            return;
        }
#pragma unroll
        for (int k = 0; k < C::kStores; ++k)
            if (static_cast<int>(threadIdx.x + k * tiling.threads) < units)
                store_vector(first + image + into[k],
                             *reinterpret_cast<const Vector<T, C::kStoreUnit>*>(results + from[k]));
    }
};

template <class C>
__device__ __forceinline__ void matrix_images(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                              const MatrixTiling& tiling) {
    using T = typename C::Element;
    using Input = MatrixInput<C, C::kInput>;
    static_assert(C::kLead % C::kGranule == 0, "granules of shared memory are aligned: kLead must be a multiple");

    T* const filters = shared_memory<T>();
    T* const planes = filters + tiling.filter_elements;
    T* const results = planes + tiling.image_elements;
    const int warp = threadIdx.x / 32;
    unsigned number = blockIdx.x * tiling.share;
    const unsigned end = tiling.total - number < tiling.share ? tiling.total : number + tiling.share;
    while (number < end) {
        const MatrixItem item = matrix_item<C>(number, end, sizes, tiling);
        number += item.end_group - item.group;
        const Input input(tensors.x, sizes, tiling, item);
        long long image = first_image(item.group, tiling);
        typename Input::Held held[C::kLoads];
        input.load(held, image * sizes.x_image);

        // While these are on their way.
        for (int at = threadIdx.x; at < static_cast<int>(tiling.image_elements) / 8;
             at += static_cast<int>(tiling.threads))
            reinterpret_cast<uint4*>(planes)[at] = uint4{0, 0, 0, 0};
        const int out_channel = tiling.warps.quotient(warp);
        ChannelBands<C> own(tensors, item, out_channel);
        T* const filter = filters + warp * Band<C>::kFilterElements;
        spread_filter<C>(tensors.w + (static_cast<long long>(item.channel) * C::kMultiplier + out_channel) *
                                         (C::kFilterH * C::kFilterW),
                         filter);
#pragma unroll
        for (int u = 0; u < C::kFilterH; ++u)
#pragma unroll
            for (int step = 0; step < Band<C>::kSteps; ++step) own.bands[u][step] = band_of<C>(filter, u, step);
        const MatrixProducts<C> products(sizes, item, tiling, out_channel,
                                         warp - out_channel * static_cast<int>(tiling.warps.divisor));
        const MatrixOutput<C> output(tensors.y, sizes, tiling, item);
        __syncthreads();
        for (unsigned group = item.group; group < item.end_group;) {
            input.store(held, planes);
            __syncthreads();
            const long long now = image;
            if (++group < item.end_group) {
                image = first_image(group, tiling);
                input.load(held, image * sizes.x_image);
            }
            products.multiply(tensors, sizes, now, own, planes, results);
            __syncthreads();
            if constexpr (C::kStageOutputs) output.store(results, now * sizes.out_channels * tiling.out_plane);
        }
    }
}

template <class C>
__device__ __forceinline__ void matrix_nchw(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const MatrixTiling& tiling) {
    if constexpr (C::kSlice > 0)
        matrix_slices<C>(tensors, sizes, tiling);
    else
        matrix_images<C>(tensors, sizes, tiling);
}

}  // namespace dwconv

// ---- border: everything above is templates; here the -D defines of one specialisation become its Config ----

#include "config.cuh"

#ifndef DWCONV_CONSTANTS  // defaults of the tile
#undef DWCONV_ELEMENT
#define DWCONV_ELEMENT dwconv::Half
#define DWCONV_THREADS 128
#define DWCONV_MIN_BLOCKS 7
#define DWCONV_ROWS 7
#define DWCONV_TILES 1
#define DWCONV_LOADS 4
#define DWCONV_STORES 4
#define DWCONV_LEAD 4
#define DWCONV_GRANULE 4
#define DWCONV_UNIT 8
#define DWCONV_STORE_VECTOR 2
#define DWCONV_STORE_UNIT 8
#define DWCONV_ONE_IMAGE 1
#define DWCONV_INPUT 1
#define DWCONV_STAGE_OUTPUTS 1
#define DWCONV_SLICE 0
#define DWCONV_STAGES 1
#endif

struct Config : ProblemConfig {
    static constexpr int kThreads = DWCONV_THREADS, kMinBlocks = DWCONV_MIN_BLOCKS;
    static constexpr int kRows = DWCONV_ROWS, kTiles = DWCONV_TILES, kLoads = DWCONV_LOADS;
    static constexpr int kLead = DWCONV_LEAD, kGranule = DWCONV_GRANULE, kStoreVector = DWCONV_STORE_VECTOR;
    static constexpr int kUnit = DWCONV_UNIT, kStoreUnit = DWCONV_STORE_UNIT, kStores = DWCONV_STORES;
    static constexpr int kInput = DWCONV_INPUT;
    static constexpr int kSlice = DWCONV_SLICE, kStages = DWCONV_STAGES;  // columns of y where slices are made, else 0
    static constexpr bool kStageOutputs = DWCONV_STAGE_OUTPUTS, kOneImage = DWCONV_ONE_IMAGE;
};

using Tiling = dwconv::MatrixTiling;

extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    dwconv_kernel(const dwconv::Tensors<Config::Element> tensors, const dwconv::Sizes sizes, const Tiling tiling) {
    dwconv::matrix_nchw<Config>(tensors, sizes, tiling);
}
