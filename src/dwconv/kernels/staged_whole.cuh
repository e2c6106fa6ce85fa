// staged_whole.cuh: a march down whole small planes; what kernels/staged_nchw.cuh does for images of few columns
//   An item is planes of one image that are one stretch of memory, and belongs to one warp: no barrier of the block.
//   kAhead: a warp makes several items, and fetches the next one's input while it sums one's. An item's input and its
//   filters come to shared memory as they are. A lane owns a plane's rows, or their left or right half. Products with
//   padding beside the image are left out: a right half is worked on from right to left, with the filter mirrored, so
//   that both have the padding in front. Outputs leave as one stretch: from the input's place where they are as many,
//   else from the filters'.
#pragma once
#include "staged_march.cuh"

namespace dwconv {

// Copies `count` neighbouring elements, the warp's lanes side by side.
template <class T>
__device__ __forceinline__ void copy_stretch(T* to, const T* from, int count, int lane) {
    constexpr int kVector = 16 / sizeof(T);
    int done = 0;
    if (staged_head(from) == 0) {
        const int vectors = count / kVector;
        int at = lane;
#pragma unroll 1
        for (; at + 7 * 32 < vectors; at += 8 * 32)
#pragma unroll
            for (int k = 0; k < 8; ++k) copy_piece<16>(to + (at + k * 32) * kVector, from + (at + k * 32) * kVector);
#pragma unroll 1
        for (; at < vectors; at += 32) copy_piece<16>(to + at * kVector, from + at * kVector);
        done = vectors * kVector;
    }
    if (sizeof(T) == 2 && reinterpret_cast<unsigned long long>(from + done) % 4 == 0) {
        constexpr int kPair = 4 / sizeof(T);
        const int pairs = (count - done) / kPair;
#pragma unroll 1
        for (int at = lane; at < pairs; at += 32) copy_piece<4>(to + done + at * kPair, from + done + at * kPair);
        done += pairs * kPair;
    }
#pragma unroll 1
    for (int at = done + lane; at < count; at += 32) copy_piece<sizeof(T)>(to + at, from + at);
}

// Two neighbouring elements of 16 bits, at a multiple of 4 bytes, as sums.
template <class T>
__device__ __forceinline__ void load_pair(const T* address, float* into) {
    const auto pair = *reinterpret_cast<const Vector<T, 2>*>(address);
    into[0] = static_cast<float>(pair.element[0]);
    into[1] = static_cast<float>(pair.element[1]);
}
template <>
__device__ __forceinline__ void load_pair(const BFloat16* address, float* into) {  // one instruction each
    const unsigned pair = *reinterpret_cast<const unsigned*>(address);
    into[0] = __uint_as_float(pair << 16);
    into[1] = __uint_as_float(pair & 0xffff0000u);
}

// Stores Width neighbouring results, offset `to` of y on, and adds the residual.
template <class C, int Width>
__device__ __forceinline__ void store_results(const Tensors<typename C::Element>& tensors, long long to,
                                              const typename C::Element* from) {
    using T = typename C::Element;
    Vector<T, Width> results = *reinterpret_cast<const Vector<T, Width>*>(from);
    if constexpr (C::kHasResidual) {
        const auto residual = load_vector<Width>(tensors.residual + to);
#pragma unroll
        for (int k = 0; k < Width; ++k) results.element[k] = static_cast<T>(results.element[k] + residual.element[k]);
    }
    store_vector(tensors.y + to, results);
}

// Stores `count` neighbouring results, the warp's lanes side by side.
template <class C>
__device__ __forceinline__ void store_warp_stretch(const Tensors<typename C::Element>& tensors, long long to,
                                                   const typename C::Element* from, int count, int lane) {
    constexpr int kVector = 16 / sizeof(typename C::Element);
    int done = 0;
    if (staged_head(tensors.y + to) == 0) {
        const int vectors = count / kVector;
        int at = lane;
#pragma unroll 1
        for (; at + 3 * 32 < vectors; at += 4 * 32)
#pragma unroll
            for (int k = 0; k < 4; ++k)
                store_results<C, kVector>(tensors, to + (at + k * 32) * kVector, from + (at + k * 32) * kVector);
#pragma unroll 1
        for (; at < vectors; at += 32) store_results<C, kVector>(tensors, to + at * kVector, from + at * kVector);
        done = vectors * kVector;
    }
#pragma unroll 1
    for (int at = done + lane; at < count; at += 32) store_results<C, 1>(tensors, to + at, from + at);
}

template <class C>
__device__ __forceinline__ void staged_whole(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                             const StagedNchwTiling& tiling) {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    constexpr int kWidth = C::kWhole, kLanes = C::kWholeLanes, kTaps = C::kFilterH * C::kFilterW;
    constexpr int kOutWidth = kLanes * C::kColumns, kLive = ceil_div(C::kFilterH, C::kStrideH);
    static_assert(sizeof(T) == 4 || (sizeof(T) == 2 && !C::kHasResidual),
                  "whole planes take float32, or 16 bits: a result that waits for its residual would be rounded twice");
    static_assert(C::kAhead == 0 || C::kInPlace, "kAhead: outputs must not take the place of the next item's filters");
    static_assert(C::kDilationH == 1 && C::kDilationW == 1 && C::kMultiplier == 1 && C::kStrideH <= 2,
                  "whole planes take neighbouring taps, and as many planes as are made");
    static_assert(kLanes == 1 || (kLanes == 2 && C::kInPlace && C::kStrideH == 1 && C::kStrideW == 1 &&
                                  kOutWidth == kWidth && C::kFilterW % 2 == 1 && C::kPadLeft == C::kFilterW / 2),
                  "halves of rows mirror each other");
    constexpr int kWindow = kLanes == 1 ? kWidth : C::kColumns + C::kFilterW / 2;
    constexpr int kPointers = kLanes == 1 ? 1 : kWindow;

    const int lane = static_cast<int>(threadIdx.x % 32);
    const unsigned warp = warp_number();
    const int height = static_cast<int>(sizes.in_h), in_plane = static_cast<int>(tiling.in_plane);
    const int out_h = static_cast<int>(sizes.out_h), out_plane = static_cast<int>(tiling.out_plane);
    const int channels = static_cast<int>(sizes.out_channels);
    T* stretch = shared_memory<T>() + warp * tiling.warp_elements;
    T* const filters = stretch + tiling.ring_elements;
    T* other = stretch + (tiling.warp_elements - tiling.ring_elements);  // kAhead: the next item's input

    // A warp's items; their planes are neighbours in memory.
    unsigned number = blockIdx.x * (C::kThreads / 32) + warp, first_plane;
    int channel, planes;
    const auto find = [&] {
        const unsigned image = tiling.channel_groups.quotient(number);
        channel = static_cast<int>((number - image * tiling.channel_groups.divisor) * tiling.item_planes);
        first_plane = image * static_cast<unsigned>(channels) + channel;
        planes = smaller(tiling.item_planes, channels - channel);
        return first_plane < sizes.planes;
    };
    const auto fetch = [&](T* input) {
        copy_stretch(filters, tensors.w + static_cast<long long>(channel) * kTaps, planes * kTaps, lane);
        end_of_copies();
        copy_stretch(input, tensors.x + static_cast<long long>(first_plane) * in_plane, planes * in_plane, lane);
        end_of_copies();
    };
    if (!find()) return;
#ifndef DWCONV_EMULATOR
    // Warps of a multiprocessor begin one after the other. Else they all wait for memory first, and then for one
    // another (7x7 on 14x14: attainment 0.77 to 0.81 instead of 0.75, H200, 2026-11).
    if constexpr (C::kAhead > 0) {
        const unsigned before = blockIdx.x / (C::kAhead / C::kMinBlocks) % C::kMinBlocks;  // blocks that began before
        __nanosleep(150 * (before * (C::kThreads / 32) + warp));
    }
#endif
    fetch(stretch);
    for (;;) {
        const int plane = smaller(lane / kLanes, planes - 1);
        const bool exists = lane / kLanes < planes, mirrored = kLanes == 2 && lane % 2 == 1;
        const Sum bias = C::kHasBias ? static_cast<Sum>(load_one(tensors.b + channel + plane)) : Sum(0);
        const ChannelValues<Sum> values = channel_values<C>(tensors, channel + plane);
        const long long first_output = static_cast<long long>(first_plane) * out_plane;
        const int outputs = planes * out_plane;
        wait_for_copies<1>();
        __syncwarp();
        Sum taps[C::kFilterH][C::kFilterW];
        {
            constexpr int kForwards = C::kReversed ? -1 : 1;
            const T* const filter = filters + plane * kTaps + tap_at<C>(mirrored ? C::kFilterW - 1 : 0);
            const int step = mirrored ? -kForwards : kForwards;
#pragma unroll
            for (int v = 0; v < C::kFilterW; ++v)
#pragma unroll
                for (int u = 0; u < C::kFilterH; ++u)
                    taps[u][v] = static_cast<Sum>(filter[v * step + u * (kForwards * C::kFilterW)]);
        }
        Sum sums[kLive][C::kColumns];
#pragma unroll
        for (int k = 0; k < kLive; ++k)
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t) sums[k][t] = bias;
        wait_for_copies<0>();
        __syncwarp();  // everything is there, and all filters have been read
        bool more = false;
        if constexpr (C::kAhead > 0) {  // the next item is on its way while this one is summed
            number += gridDim.x * (C::kThreads / 32);
            more = find();
            if (more) fetch(other);
        }

        T* at[kPointers];  // the window's columns of the next row
        at[0] = stretch + plane * in_plane + (mirrored ? kWidth - 1 : 0);
#pragma unroll
        for (int k = 1; k < kPointers; ++k) at[k] = at[0] + (mirrored ? -k : k);
        const auto cell = [&](int k, int below) { return (kLanes == 1 ? at[0] + k : at[k]) + below * kWidth; };
        const auto read = [&](int below, Sum(&window)[kWindow]) {
            if constexpr (sizeof(T) == 2 && kLanes == 1 && kWidth % 2 == 0) {  // rows start at pairs
#pragma unroll
                for (int k = 0; k < kWindow; k += 2) {
                    load_pair(cell(k, below), &window[k]);
                }
            } else {
#pragma unroll
                for (int k = 0; k < kWindow; ++k) window[k] = static_cast<Sum>(*cell(k, below));
            }
        };
        const auto advance = [&](int rows) {
#pragma unroll
            for (int k = 0; k < kPointers; ++k) at[k] += rows * kWidth;
        };
        // Outputs stand `below` rows from where `at` points to, or at `to`.
        T* const results = C::kInPlace ? stretch : filters;
        T* to = results + plane * out_plane;
        const auto store = [&](const Sum(&done)[C::kColumns], int below) {
            if constexpr (!C::kInPlace) to += kOutWidth;
            if (!exists) return;
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t)
                *(C::kInPlace ? cell(t, below) : to + (t - kOutWidth)) =
                    static_cast<T>(finished<WithoutResidual<C>>(done[t], values, T{}));
        };
        constexpr int kLast = C::kFilterH - 1;  // the filter row that completes an output row
        constexpr int kFirst = C::kPadTop % C::kStrideH,
                      kSecond = (C::kPadTop + 1) % C::kStrideH;  // phases of rows
        constexpr int kAbove = kLast - C::kPadTop;  // rows from the one that completes an output row up to its own
        int row = 0;
        if constexpr (C::kRows == 2) {
#pragma unroll 1
            for (; row + 1 < height; row += 2) {
                Sum windows[2][kWindow];
                read(0, windows[0]);
                read(1, windows[1]);
                if constexpr (kLanes > 1) __syncwarp();  // both halves of the rows have been read
                march_row<C, kFirst, C::kPadLeft>(windows[0], taps, bias, sums);
                if (row >= kAbove && kLast % C::kStrideH == kFirst) store(sums[kLive - 1], -kAbove);
                march_row<C, kSecond, C::kPadLeft>(windows[1], taps, bias, sums);
                if (row + 1 >= kAbove && kLast % C::kStrideH == kSecond) store(sums[kLive - 1], 1 - kAbove);
                advance(2);
            }
            if (row < height) {
                Sum window[kWindow];
                read(0, window);
                if constexpr (kLanes > 1) __syncwarp();
                march_row<C, kFirst, C::kPadLeft>(window, taps, bias, sums);
                if (row >= kAbove && kLast % C::kStrideH == kFirst) store(sums[kLive - 1], -kAbove);
                advance(1);
            }
        } else {
            static_assert(C::kRows == 2 || C::kStrideH == 1, "rows that are 2 apart come in pairs");
#pragma unroll 1
            for (; row < height; ++row) {
                Sum window[kWindow];
                read(0, window);
                if constexpr (kLanes > 1) __syncwarp();
                march_row<C, 0, C::kPadLeft>(window, taps, bias, sums);
                if (row >= kAbove) store(sums[kLive - 1], -kAbove);
                advance(1);
            }
        }
        // What only padding would be added to. sums[k] is that of output row newest - k.
        const int newest = (height - 1 + C::kPadTop) / C::kStrideH;
        const int begun = larger(0, floor_div(height - 1 - kAbove, C::kStrideH) + 1);  // the first that isn't complete
#pragma unroll
        for (int k = kLive - 1; k >= 0; --k)
            if (newest - k >= begun && newest - k < out_h) store(sums[k], C::kPadTop - 1 - k);
        __syncwarp();
        store_warp_stretch<C>(tensors, first_output, results, outputs, lane);
        if (!more) return;
        T* const done = stretch;
        stretch = other;
        other = done;
    }
}

}  // namespace dwconv
