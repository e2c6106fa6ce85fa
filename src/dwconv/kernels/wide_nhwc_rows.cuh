// wide_nhwc_rows.cuh: how rows of x come to shared memory: units, their rows, and copies that run beside the arithmetic
//   A unit is a strip of output rows and columns of `slots` images. All threads of a slot copy its columns, each the
//   same piece of channels in every `step`-th column. What lies beside the image, and channels that don't exist,
//   become zeros; rows above and below the image are not copied.
#pragma once
#include "epilogue.cuh"

namespace dwconv {

struct WideNhwcTiling {
    unsigned groups, slots;
    unsigned columns;  // of x that a slot keeps, from `skipped` on; nothing reads those left and right of them
    unsigned skipped;
    unsigned unit_rows;  // output rows of a unit
    unsigned images;
    unsigned units, part_units;  // in all; of a block
    FastDivisor chunks, row_strips, column_strips;
};

template <class C>
struct WideNhwc {
    using Element = typename C::Element;
    using Sum = typename Accumulator<Element>::Type;
    static constexpr int kTaps = C::kFilterH * C::kFilterW;
    static constexpr int kLoad = C::kLoadBytes / static_cast<int>(sizeof(Element));  // elements that are copied at once
    // Channels of x that a block reads: whole vectors, from a multiple of kLoad on.
    static constexpr bool kWhole = C::kChannels % (C::kMultiplier * kLoad) == 0;
    static constexpr int kStaged =
        kWhole ? C::kChannels / C::kMultiplier : (C::kChannels + C::kMultiplier - 2) / C::kMultiplier + 1;
    static constexpr int kPieces = kStaged / kLoad;  // of a column
    static constexpr int kPack = 16 / static_cast<int>(sizeof(Sum));
    static constexpr int kFilterRow = ceil_div(C::kFilterW, kPack) * kPack;      // taps of a row in shared memory
    static constexpr bool kShareOut = C::kStoreBytes == 16 && !C::kHasResidual;  // outputs leave as whole vectors
    static constexpr int kLive = ceil_div(C::kFilterH, C::kStrideH);  // output rows that one input row adds to

    static constexpr int kFilterBytes =
        C::kMarch ? ceil_div(C::kChannels * kTaps * static_cast<int>(sizeof(Element)), 16) * 16
                  : C::kFilterH * kFilterRow * C::kChannels * static_cast<int>(sizeof(Sum));

    static_assert(kWhole || kLoad == 1, "kLoadBytes must be one element: the block's channels of x start anywhere");
    static_assert(C::kChannels % kLoad == 0, "kChannels must be whole vectors");
    static_assert(!C::kMarch || C::kDilationH == 1, "kMarch needs neighbouring rows: each step moves all sums by one");
    static_assert(C::kMarch || C::kTaps % kPack == 0 || C::kTaps >= C::kFilterW,
                  "kTaps must be whole vectors of taps, or a whole row");
    static_assert(C::kStoreBytes < 16 || C::kChannels % 32 == 0, "a warp must be 32 channels to store vectors of them");
    static_assert(C::kStages >= 2, "kStages must be 2 or more: one row is read while another one arrives");
};

// ---- copies to shared memory that run beside the arithmetic; before sm_80 the thread waits for its own ----

#if !defined(DWCONV_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define DWCONV_ASYNC_ROWS
#endif

// Copies Bytes to shared memory, or writes zeros where there is nothing to copy.
template <int Bytes>
__device__ __forceinline__ void row_piece(void* to, const void* from, bool exists) {
#ifdef DWCONV_ASYNC_ROWS
    if constexpr (Bytes >= 4) {
        const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
        if constexpr (Bytes == 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(exists ? 16 : 0)
                         : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(Bytes),
                         "r"(exists ? Bytes : 0)
                         : "memory");
        return;
    }
#endif
    using Bits = typename Word<Bytes>::Type;
    *static_cast<Bits*>(to) = exists ? __ldg(static_cast<const Bits*>(from)) : Bits();
}

__device__ __forceinline__ void end_of_row() {
#ifdef DWCONV_ASYNC_ROWS
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the thread's last Open groups of copies have arrived.
template <int Open>
__device__ __forceinline__ void wait_for_rows() {
#ifdef DWCONV_ASYNC_ROWS
    asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
#endif
}

// ---- units and their rows ----

struct WideNhwcUnit {
    unsigned image_group;
    int column_strip;
    int out_first, out_end;  // output rows
    int first, end;          // input rows that they read, without padding
};

template <class C>
__device__ __forceinline__ WideNhwcUnit wide_nhwc_unit(unsigned number, const Sizes& sizes,
                                                       const WideNhwcTiling& tiling) {
    WideNhwcUnit unit;
    const unsigned above = tiling.row_strips.quotient(number);
    unit.image_group = tiling.column_strips.quotient(above);
    unit.column_strip = static_cast<int>(above - unit.image_group * tiling.column_strips.divisor);
    unit.out_first = static_cast<int>((number - above * tiling.row_strips.divisor) * tiling.unit_rows);
    unit.out_end = min(unit.out_first + static_cast<int>(tiling.unit_rows), static_cast<int>(sizes.out_h));
    unit.first = max(0, unit.out_first * C::kStrideH - C::kPadTop);
    unit.end = min((unit.out_end - 1) * C::kStrideH - C::kPadTop + (C::kFilterH - 1) * C::kDilationH + 1,
                   static_cast<int>(sizes.in_h));
    return unit;
}

// What one thread copies: one piece of channels, in every `step`-th column of its slot.
template <class C>
struct WideNhwcCopies {
    using W = WideNhwc<C>;
    using Element = typename C::Element;
    unsigned number, end_number, slot;
    int rows;             // that are left of the unit
    int column, step;     // of the thread's first piece, in the tile; from there to its next one
    int span;             // columns from there to the end of the tile
    int channel;          // of the piece, in x
    unsigned place;       // of the thread's first piece, in elements of a stage
    int image_column;     // of that piece
    unsigned in_w;        // columns that exist for the thread: none where there is no such channel or image
    int column_step;      // in elements, as the next two
    unsigned row_place;   // from one row of a stage to the next one
    long long row_step;   // from one row of x to the next one
    const Element* line;  // the first piece in the next row

    __device__ __forceinline__ void open(const Tensors<Element>& tensors, const Sizes& sizes,
                                         const WideNhwcTiling& tiling) {
        if (number >= end_number) return;
        const WideNhwcUnit unit = wide_nhwc_unit<C>(number, sizes, tiling);
        rows = unit.end - unit.first;
        const int strip_columns = static_cast<int>(tiling.groups) * C::kColumns * C::kStrideW;
        image_column = unit.column_strip * strip_columns - C::kPadLeft + static_cast<int>(tiling.skipped) + column;
        const unsigned image = unit.image_group * tiling.slots + slot;
        line = tensors.x + image * sizes.x_image + channel + image_column * sizes.x_column + unit.first * sizes.x_row;
        const bool exists = channel < sizes.out_channels / C::kMultiplier && image < tiling.images;
        in_w = exists ? static_cast<unsigned>(sizes.in_w) : 0u;
    }

    // Copies the next rows of the unit, kStageRows or those that are left, to a stage.
    __device__ __forceinline__ void copy(Element* stage, const Tensors<Element>& tensors, const Sizes& sizes,
                                         const WideNhwcTiling& tiling) {
        if (number < end_number) {
            Element* row = stage + place;
            const int left = rows - C::kStageRows;
#pragma unroll 1
            for (; rows > 0 && rows > left; --rows) {
                if constexpr (C::kCopies > 0) {
#pragma unroll
                    for (int p = 0; p < C::kCopies; ++p)
                        if (p * step < span)
                            row_piece<C::kLoadBytes>(row + p * step * W::kStaged, line + p * column_step,
                                                     static_cast<unsigned>(image_column + p * step) < in_w);
                } else {
                    const Element* from = line;
                    Element* to = row;
                    int at = image_column;
#pragma unroll 1
                    for (int k = span; k > 0; k -= step) {
                        row_piece<C::kLoadBytes>(to, from, static_cast<unsigned>(at) < in_w);
                        at += step;
                        from += column_step;
                        to += step * W::kStaged;
                    }
                }
                line += row_step;
                row += row_place;
            }
            if (rows == 0) {
                ++number;
                open(tensors, sizes, tiling);
            }
        }
        end_of_row();
    }
};

}  // namespace dwconv
