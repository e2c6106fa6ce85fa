// matrix_slices.cuh: small planes as products of matrices, without placing rows: 16-bit elements, channels first
//   A slice is 392 neighbouring outputs of an image, whole planes of some channels: 8 of 7x7, 2 of 14x14. Its inputs
//   are neighbours, too. For 16 images at a time
//     Y[image, o] = sum_k X[image, k] * M[k, o],   M[k, o] = the tap between input k and output o, zero if there is
//     none
//   Each of seven warps makes 56 neighbouring outputs, seven products wide. As 56 outputs are whole rows, the inputs
//   that eight of them need lie equally far from the warp's first output in every warp, and only these are multiplied.
//   What differs is M: padding is a matter of its zeros. So slices pass through shared memory as they lie, in vectors
//   of 16 bytes, and a warp's part of M stays in registers for all images. Zeros of M times an Inf or NaN of other
//   rows, channels or images are NaN: such sums are computed again (exact_sum).
#pragma once
#include "slice_reach.cuh"

namespace dwconv {

template <class C>
struct Slices {
    using S = Slice<C>;
    using T = typename C::Element;
    static constexpr int kVector = 8;
    const Tensors<T>& tensors;
    const Sizes& sizes;
    // Of it: channels, lines (rows) and out_plane of a slice's planes; row_items: slices of an image; plane_pitch,
    // plane_gap: elements of a channel's table, its rows in front of the taps.
    const MatrixTiling& tiling;
    // In shared memory: tables of taps; where in them a tap is found in bytes, by output plus by input; values of the
    // epilogue by output, a bias first; stages, results.
    T* const tables;
    int* const outputs;
    unsigned short* const inputs;
    float* const values;
    T* const stages;
    T* const results;
    uint2 bands[S::kProducts][S::kBands];

    __device__ __forceinline__ Slices(const Tensors<T>& tensors, const Sizes& sizes, const MatrixTiling& tiling)
        : tensors(tensors),
          sizes(sizes),
          tiling(tiling),
          tables(shared_memory<T>()),
          outputs(reinterpret_cast<int*>(tables + S::kCopies * tiling.channels * tiling.plane_pitch)),
          inputs(reinterpret_cast<unsigned short*>(outputs + S::kElements)),
          values(reinterpret_cast<float*>(inputs + S::kInputs)),
          stages(reinterpret_cast<T*>(values + S::kValues * S::kElements) + S::kGap),
          results(stages + S::kStages * (S::kStage + S::kGap)) {}

    // Of the block's k-th group of images. Blocks begin with whole slices, neighbours of each other, so that lines that
    // two slices share are wanted by both at the same time; then each has its share of the groups of those left.
    __device__ __forceinline__ SlicePlace place(unsigned k) const {
        const unsigned block = blockIdx.x, groups = tiling.image_groups.divisor;
        const bool is_whole = k < tiling.whole;
        const unsigned shared = tiling.whole * (gridDim.x - 1) + block * tiling.share + min(block, tiling.longer);
        const unsigned number = is_whole ? k : shared + k, slice = tiling.image_groups.quotient(number);
        return {static_cast<int>(is_whole ? slice * gridDim.x + block : slice),
                first_image(number - slice * groups, tiling)};
    }
    __device__ __forceinline__ T* stage(int number) const { return stages + number * (S::kStage + S::kGap); }

    __device__ __forceinline__ void fetch(const SlicePlace& place, T* to) const {
        using P = SlicePart;
        const P part;
        const int image_elements = static_cast<int>(sizes.x_image);
        const T* from = tensors.x + static_cast<long long>(place.image + part.image) * image_elements +
                        (place.slice * S::kElements + part.vector * kVector);
        to += part.image * S::kElements + part.vector * kVector;
        if (part.image >= P::kBeside) return;
#pragma unroll
        for (int image = 0; image < S::kImages; image += P::kBeside)
            copy_piece<16>(to + image * S::kElements, from + image * image_elements);
    }

    __device__ __forceinline__ void store(const SlicePlace& place) const {
        using P = SlicePart;
        const P part;
        const int image_elements = static_cast<int>(sizes.out_channels * tiling.out_plane);
        T* to = tensors.y + static_cast<long long>(place.image + part.image) * image_elements +
                (place.slice * S::kElements + part.vector * kVector);
        const T* from = results + (part.image * S::kElements + part.vector * kVector);
        if (part.image >= P::kBeside) return;
#pragma unroll
        for (int image = 0; image < S::kImages; image += P::kBeside)
            store_vector(to + image * image_elements,
                         *reinterpret_cast<const Vector<T, kVector>*>(from + image * S::kElements));
    }

    // (Code that runs once is not unrolled: its instructions come from L2, later than they would be executed.)
    // What all slices of the block share: zeros between stages, which are multiplied by zeros of M; zeros around taps;
    // places in their tables.
    __device__ __forceinline__ void prepare() const {
#pragma unroll 1
        for (int at = threadIdx.x; at < (S::kStages + 1) * S::kGap; at += S::kThreads) {
            const int gap = at / S::kGap;
            stages[gap * (S::kStage + S::kGap) - S::kGap + at % S::kGap].bits = 0;
        }
        const int planes = static_cast<int>(tiling.channels), table = static_cast<int>(tiling.plane_pitch);
#pragma unroll 1
        for (int at = threadIdx.x; at < S::kCopies * planes * table / 8; at += S::kThreads)
            reinterpret_cast<uint4*>(tables)[at] = uint4{0, 0, 0, 0};
        // Rows are numbered from one slice further up, where nothing is negative.
        const int zero =
            S::kElements / S::kWidth + planes * S::kApart - C::kPadTop - static_cast<int>(tiling.plane_gap);
#pragma unroll 1
        for (int at = threadIdx.x; at < S::kElements; at += S::kThreads) {
            const int row = at / S::kWidth, plane = tiling.lines.quotient(row);
            int place =
                plane * table - (zero + row + plane * S::kApart) * S::kTablePitch + S::kWidth - 1 - at % S::kWidth;
            if (S::kPairs && place % 2 != 0) place += planes * table - 1;
            outputs[at] = 2 * place;
        }
#pragma unroll 1
        for (int at = threadIdx.x; at < S::kInputs; at += S::kThreads) {
            const int input = at + S::kBegin + S::kElements, row = input / S::kWidth;
            const int place = (row + tiling.lines.quotient(row) * S::kApart) * S::kTablePitch + input % S::kWidth;
            inputs[at] = static_cast<unsigned short>(2 * place);
        }
    }

    // Taps of a slice's channels: the first ones, on their way.
    static constexpr int kTaps = C::kFilterH * C::kFilterW, kHeld = 2;
    __device__ __forceinline__ void load_taps(T (&held)[kHeld], int slice) const {
        const int all = static_cast<int>(tiling.channels) * kTaps;
        const T* of = tensors.w + static_cast<long long>(slice) * all;
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            const int tap = threadIdx.x + k * S::kThreads;
            if (tap < all) held[k] = load_one(of + tap);
        }
        const int after = all + static_cast<int>(threadIdx.x) * 16;  // the next slice's
        if (after < 2 * all && slice + 1 < static_cast<int>(tiling.row_items.divisor)) prefetch_line(of + after);
    }
    __device__ __forceinline__ void store_taps(const T (&held)[kHeld], int slice) const {
        const int all = static_cast<int>(tiling.channels) * kTaps;
        const auto put = [this](int number, T value) {
            const int tap = tap_at<C>(number);
            const int channel = tap / kTaps, u = tap % kTaps / C::kFilterW;
            const int away = tap % C::kFilterW * C::kDilationW - C::kPadLeft + S::kWidth - 1;
            const int row = static_cast<int>(tiling.plane_gap) + u * C::kDilationH;
            const int planes = static_cast<int>(tiling.channels), table = static_cast<int>(tiling.plane_pitch);
            if (away < 0 || away >= S::kTablePitch) return;
#pragma unroll
            for (int copy = 0; copy < S::kCopies; ++copy)
                tables[(copy * planes + channel) * table + row * S::kTablePitch + away - copy] = value;
        };
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (static_cast<int>(threadIdx.x) + k * S::kThreads < all) put(threadIdx.x + k * S::kThreads, held[k]);
#pragma unroll 1
        for (int tap = threadIdx.x + kHeld * S::kThreads; tap < all; tap += S::kThreads)
            put(tap, load_one(tensors.w + static_cast<long long>(slice) * all + tap));
        if constexpr (S::kValues > 0) {
#pragma unroll 1
            for (int at = threadIdx.x; at < S::kElements; at += S::kThreads) {
                const int channel = slice * static_cast<int>(tiling.channels) + tiling.lines.quotient(at / S::kWidth);
                float* to = values + at;
                const auto next = [&to](const T* of) {
                    *to = static_cast<float>(load_one(of));
                    to += S::kElements;
                };
                if constexpr (C::kHasBias) next(tensors.b + channel);
                if constexpr (C::kHasScale) next(tensors.scale + channel);
                if constexpr (C::kHasShift) next(tensors.shift + channel);
            }
        }
    }

    // This lane's part of M.
    __device__ __forceinline__ void load_bands() {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const unsigned char* from[S::kProducts];
#pragma unroll
        for (int p = 0; p < S::kProducts; ++p)
            from[p] = reinterpret_cast<const unsigned char*>(tables) + outputs[warp * S::kOutputs + lane / 4 + 8 * p];
        const unsigned* const pairs = reinterpret_cast<const unsigned*>(inputs + warp * S::kOutputs) + lane % 4;
#pragma unroll
        for (int step = 0; step < S::kSteps; ++step) {
            in_order();
            const unsigned first = pairs[8 * step], second = pairs[8 * step + 4];
            const unsigned at[4] = {first & 0xffffu, first >> 16, second & 0xffffu, second >> 16};
#pragma unroll
            for (int p = 0; p < S::kProducts; ++p) {
                if (!S::takes(p, step)) continue;
                unsigned taps[4];
#pragma unroll
                for (int e = 0; e < 4; e += S::kPairs ? 2 : 1) {
                    if constexpr (S::kPairs)
                        taps[e] = *reinterpret_cast<const unsigned*>(from[p] + at[e]);
                    else
                        taps[e] = *reinterpret_cast<const unsigned short*>(from[p] + at[e]);
                }
                bands[p][step - S::first_step(p)] = S::kPairs
                                                        ? make_uint2(taps[0], taps[2])
                                                        : make_uint2(taps[0] | taps[1] << 16, taps[2] | taps[3] << 16);
            }
        }
    }

    // Puts two neighbouring outputs into the results. `output`: of the slice; `image`: of the 16.
    __device__ __forceinline__ unsigned put(const SlicePlace& place, int image, int output, float first,
                                            float second) const {
        T residual[2] = {};
        if constexpr (C::kHasResidual) {
            const T* of = tensors.residual + (place.image + image) * (sizes.out_channels * tiling.out_plane) +
                          place.slice * S::kElements + output;
            for (int k = 0; k < 2; ++k) residual[k] = load_one(of + k);
        }
        ChannelValues<float> of[2] = {{1.0f, 0.0f}, {1.0f, 0.0f}};
        const float* from = values + (C::kHasBias ? S::kElements : 0) + output;
        if constexpr (C::kHasScale) of[0].scale = from[0], of[1].scale = from[1], from += S::kElements;
        if constexpr (C::kHasShift) of[0].shift = from[0], of[1].shift = from[1];
        const float out[2] = {finished<C>(first, of[0], residual[0]), finished<C>(second, of[1], residual[1])};
        const unsigned pair = rounded_pair<T>(out[0], out[1]);
        *reinterpret_cast<unsigned*>(results + image * S::kElements + output) = pair;
        return pair;
    }

    // The sums of a slice of 16 images, and their way into the results.
    __device__ __forceinline__ void multiply(const SlicePlace& place, const T* input) const {
        const int thread = thread_now(), warp = thread / 32, lane = thread % 32;
        const int column = warp * S::kOutputs + lane % 4 * 2;
        float sums[S::kProducts][4];
#pragma unroll
        for (int p = 0; p < S::kProducts; ++p)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[p][e] = C::kHasBias ? values[column + 8 * p + e % 2] : 0.0f;
        const int row = 2 * (lane % 16 * S::kElements + warp * S::kOutputs + S::kBegin + lane / 16 * 8);
#pragma unroll
        for (int step = 0; step < S::kSteps; ++step) {
            unsigned a[4];
            load_matrices(a, input, row + 32 * step);
#pragma unroll
            for (int p = 0; p < S::kProducts; ++p)
                if (S::takes(p, step)) multiply_matrices<T>(sums[p], a, bands[p][step - S::first_step(p)]);
        }
        unsigned check = 0;  // a NaN as soon as an output is not finite
#pragma unroll
        for (int p = 0; p < S::kProducts; ++p)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                check = watched<T>(
                    check, put(place, lane / 4 + 8 * half, column + 8 * p, sums[p][2 * half], sums[p][2 * half + 1]));
        if (__any_sync(0xffffffffu, check != 0)) put_exact(place, column, sums);
    }

    __device__ __forceinline__ float sum_again(const SlicePlace& place, int image, int output) const {
        const int line = output / S::kWidth, plane = tiling.lines.quotient(line);
        const int channel = place.slice * static_cast<int>(tiling.channels) + plane;
        return exact_sum<C>(tensors.x + (place.image + image) * sizes.x_image + channel * sizes.x_channel,
                            tensors.w + static_cast<long long>(channel) * (C::kFilterH * C::kFilterW),
                            C::kHasBias ? values[output] : 0.0f, sizes, 0,
                            line - plane * static_cast<int>(tiling.lines.divisor), output % S::kWidth);
    }

    // Computes those sums again that are not finite.
    __device__ __forceinline__ void put_exact(const SlicePlace& place, int column,
                                              const float (&sums)[S::kProducts][4]) const {
        unsigned wrong = 0;
#pragma unroll
        for (int p = 0; p < S::kProducts; ++p)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (!(sums[p][e] * 0.0f == 0.0f)) wrong |= 3u << (4 * p + e / 2 * 2);  // a pair is put together
#pragma unroll 1
        while (wrong != 0) {
            const int bit = __ffs(static_cast<int>(wrong)) - 1, image = threadIdx.x % 32 / 4 + bit / 2 % 2 * 8;
            wrong &= wrong - 1;
            wrong &= wrong - 1;
            const int output = column + bit / 4 * 8;
            const float first = sum_again(place, image, output);
            put(place, image, output, first, sum_again(place, image, output + 1));
        }
    }

    __device__ __forceinline__ void run() {
        const unsigned end = tiling.whole + tiling.share + (blockIdx.x < tiling.longer ? 1 : 0);
        int at = 0, loaded = -1;
        T held[kHeld];
        load_taps(held, place(0).slice);
#pragma unroll 1
        for (unsigned ahead = 0; ahead + 1 < S::kStages; ++ahead) {
            if (ahead < end) fetch(place(ahead), stage(ahead));
            end_of_copies();
        }
        prepare();
        __syncthreads();
        for (unsigned k = 0; k < end; ++k) {
            const SlicePlace now = place(k);
            if (now.slice != loaded) {
                if (loaded >= 0) load_taps(held, now.slice);
                store_taps(held, now.slice);
                loaded = now.slice;
                __syncthreads();
                load_bands();
            }
            wait_for_copies<S::kStages - 2>();
            __syncthreads();  // the slice is there; the results of the one before have left, and its stage is free
            const int before = at == 0 ? S::kStages - 1 : at - 1;
            if (k + (S::kStages - 1) < end) fetch(place(k + (S::kStages - 1)), stage(before));
            end_of_copies();
            multiply(now, stage(at));
            __syncthreads();
            store(now);
            at = at + 1 == S::kStages ? 0 : at + 1;
        }
    }
};

template <class C>
__device__ __forceinline__ void matrix_slices(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                              const MatrixTiling& tiling) {
    Slices<C>(tensors, sizes, tiling).run();
}

}  // namespace dwconv
