// slice_reach.cuh: what a slice of matrix_slices is: where it lies, which inputs its products need, who moves what of
// it
#pragma once
#include "copies.cuh"
#include "matrix_items.cuh"

namespace dwconv {

// Brings a line that will be read later closer.
__device__ __forceinline__ void prefetch_line(const void* at) {
#ifndef DWCONV_EMULATOR
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

// `check` turns from zeros into a NaN when one of two neighbouring elements is an Inf or a NaN.
#ifdef DWCONV_EMULATOR
template <class T>
__device__ __forceinline__ unsigned watched(unsigned check, unsigned pair) {
    T first, second;
    first.bits = static_cast<unsigned short>(pair), second.bits = static_cast<unsigned short>(pair >> 16);
    const float sum = static_cast<float>(first) * 0.0f + static_cast<float>(second) * 0.0f;
    return sum == 0.0f ? check : 0x7fffu;
}
#else
template <class T>
__device__ __forceinline__ unsigned watched(unsigned check, unsigned pair);
template <>
__device__ __forceinline__ unsigned watched<Half>(unsigned check, unsigned pair) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(check) : "r"(pair), "r"(0));
    return check;
}
template <>
__device__ __forceinline__ unsigned watched<BFloat16>(unsigned check, unsigned pair) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(check) : "r"(pair), "r"(0));
    return check;
}
#endif

// The thread's number, found again in each iteration: what follows from it would take more registers than clocks.
__device__ __forceinline__ int thread_now() {
    int thread = static_cast<int>(threadIdx.x);
    keep(thread);
    return thread;
}

// Keeps the compiler from moving all loads to the front, where they take registers.
__device__ __forceinline__ void in_order() {
#ifndef DWCONV_EMULATOR
    asm volatile("" ::: "memory");
#endif
}

// Which inputs the eight outputs of a product need, counted from the input at the warp's first output.
template <class C>
struct SliceReach {
    static constexpr int kWidth = C::kSlice;  // columns of x and y
    static constexpr int kImages = 16, kProducts = 7, kOutputs = 8 * kProducts, kWarps = 7;
    static constexpr int kWindowH = (C::kFilterH - 1) * C::kDilationH + 1;
    static_assert(kOutputs % kWidth == 0,
                  "a warp must make whole rows: the inputs of its products are those of any warp");
    static_assert(C::kStrideH == 1 && C::kStrideW == 1 && C::kMultiplier == 1,
                  "planes of y must be as large as those of x");

    __host__ __device__ static constexpr int first(int product) {
        const int row = 8 * product / kWidth, column = 8 * product % kWidth;
        return (row - C::kPadTop) * kWidth + larger(column - C::kPadLeft, 0);
    }
    __host__ __device__ static constexpr int last(int product) {
        const int row = (8 * product + 7) / kWidth, column = (8 * product + 7) % kWidth;
        const int reach = column - C::kPadLeft + (C::kFilterW - 1) * C::kDilationW;
        return (row - C::kPadTop + kWindowH - 1) * kWidth + smaller(reach, kWidth - 1);
    }
    // Steps of 16 inputs, from `begin` on: of all products; of one, at most.
    __host__ __device__ static constexpr int steps(int begin) {
        int count = 0;
        for (int p = 0; p < kProducts; ++p) count += (last(p) - begin) / 16 - (first(p) - begin) / 16 + 1;
        return count;
    }
    __host__ __device__ static constexpr int most_steps(int begin) {
        int most = 0;
        for (int p = 0; p < kProducts; ++p) most = larger(most, (last(p) - begin) / 16 - (first(p) - begin) / 16 + 1);
        return most;
    }
};

template <class C>
struct Slice : SliceReach<C> {
    using R = SliceReach<C>;
    static constexpr int kAligned = floor_div(R::first(0), 8) * 8;
    static constexpr int kBegin = R::steps(kAligned - 8) < R::steps(kAligned) ? kAligned - 8 : kAligned;
    static constexpr int kSteps = (R::last(R::kProducts - 1) - kBegin) / 16 + 1;
    static constexpr int kBands = R::most_steps(kBegin);  // pieces of M, 16 inputs x 8 outputs, for a product
    // 784 bytes from image to image are an odd number of 16 bytes: eight rows of A lie in different banks.
    static constexpr int kElements = R::kOutputs * R::kWarps, kStage = R::kImages * kElements;
    static constexpr int kStages = C::kStages, kThreads = 32 * R::kWarps;
    // Zeros in front of each stage and behind the last one: what the first and last warp's steps reach beyond it.
    static constexpr int kOver = kBegin + 16 * kSteps - R::kOutputs;
    static constexpr int kGap = larger(larger(-kBegin, kOver), 8);
    // A channel's taps stand by rows and columns from an output to an input, with rows of zeros around, and so many
    // between planes that no tap reaches across. Where neighbouring inputs are always of one row, both are read at a
    // time, from a copy of the tables that begins one element later for outputs whose taps stand at odd places.
    static constexpr bool kPairs = R::kWidth % 2 == 0;
    static constexpr int kCopies = kPairs ? 2 : 1;
    static constexpr int kTablePitch = 2 * R::kWidth - (kPairs ? 0 : 1);
    static constexpr int kApart = larger(R::kWindowH, C::kPadTop);
    static constexpr int kInputs = ceil_div((R::kWarps - 1) * R::kOutputs + 16 * kSteps, 8) * 8;
    static constexpr int kValues = (C::kHasBias ? 1 : 0) + (C::kHasScale ? 1 : 0) + (C::kHasShift ? 1 : 0);
    static_assert(kGap % 8 == 0, "rows of A start at 16 bytes");
    static_assert(C::kThreads == kThreads, "a slice has seven warps");

    __host__ __device__ static constexpr int first_step(int p) { return (R::first(p) - kBegin) / 16; }
    __host__ __device__ static constexpr int last_step(int p) { return (R::last(p) - kBegin) / 16; }
    __host__ __device__ static constexpr bool takes(int p, int step) {
        return step >= first_step(p) && step <= last_step(p);
    }
};

// A slice of 16 images: where it is in memory.
struct SlicePlace {
    int slice;  // of an image
    int image;  // the first one
};

// Which vectors of 8 elements a thread moves of a slice: the same one of every fourth image.
struct SlicePart {
    static constexpr int kVectors = 49, kBeside = 4;
    int image, vector;  // a thread without any has an image from kBeside on

    __device__ __forceinline__ SlicePart() {
        const int thread = thread_now();
        image = thread / kVectors;
        vector = thread - image * kVectors;
    }
};

}  // namespace dwconv
