// wide_nhwc_rows.cuh: how rows of x come to shared memory: units, their rows, and copies that run beside the arithmetic
//   A block makes `part_rows` output rows of one chunk of channels and one strip of columns, of `slots` images at a
//   time: rows of image after image, as if they were one tall image. What it makes of one image is a unit. What lies
//   beside the image, and channels that don't exist, become zeros; rows above and below the image are not copied.
//   WideNhwcPieces: all threads of a slot copy its columns, each the same piece of channels in every `step`-th column.
//   WideNhwcBoxes: one lane has them copied (wide_nhwc_boxes.cuh).
#pragma once
#include "copies.cuh"

namespace dwconv {

struct WideNhwcTiling {
    unsigned groups, slots;
    unsigned columns;  // of x that a slot keeps, from `skipped` on; nothing reads those left and right of them
    unsigned skipped;
    unsigned unit_rows;  // output rows of a unit, at most
    unsigned images;
    unsigned rows, part_rows;  // output rows of a slot's images, one below the other; of a block
    FastDivisor chunks, column_strips, out_rows;
};

template <class C>
struct WideNhwc {
    using Element = typename C::Element;
    using Sum = typename Accumulator<Element>::Type;
    static constexpr int kTaps = C::kFilterH * C::kFilterW;
    static constexpr int kLanes = C::kChannels / C::kVector;                         // threads of a column
    static constexpr int kLoad = C::kLoadBytes / static_cast<int>(sizeof(Element));  // elements that are copied at once
    // Channels of x that a block reads: whole vectors, from a multiple of kLoad on.
    static constexpr bool kWhole = C::kChannels % (C::kMultiplier * kLoad) == 0;
    static constexpr int kStaged =
        kWhole ? C::kChannels / C::kMultiplier : (C::kChannels + C::kMultiplier - 2) / C::kMultiplier + 1;
    static constexpr int kPieces = kStaged / kLoad;  // of a column
    static constexpr int kPack = 16 / static_cast<int>(sizeof(Sum));
    static constexpr int kFilterRow = ceil_div(C::kFilterW, kPack) * kPack;  // taps of a row in shared memory
    // Outputs leave as whole vectors, or as boxes: of a warp they take kWarpOut elements of shared memory.
    static constexpr bool kShareOut = C::kStoreBytes == 16 && !C::kHasResidual && !C::kOutBoxes;
    static constexpr int kWarpOut =
        C::kOutBoxes ? ceil_div(32 * C::kVector * C::kColumns * static_cast<int>(sizeof(Element)), 128) * 128 /
                           static_cast<int>(sizeof(Element))
        : kShareOut ? 32 * C::kColumns
                    : 0;
    static constexpr int kLive = ceil_div(C::kFilterH, C::kStrideH);  // output rows that one input row adds to

    static constexpr int kFilterBytes =
        C::kMarch ? ceil_div(C::kChannels * kTaps * static_cast<int>(sizeof(Element)), 16) * 16
                  : C::kFilterH * kFilterRow * C::kChannels * static_cast<int>(sizeof(Sum));

    static constexpr int kGateBytes = C::kBoxes > 0 ? 128 : 0;  // before the stages

    static_assert(16 * C::kStages <= kGateBytes || C::kBoxes == 0, "gates of kStages stages must fit in kGateBytes");
    static_assert(kWhole || kLoad == 1, "kLoadBytes must be one element: the block's channels of x start anywhere");
    static_assert(C::kChannels % kLoad == 0, "kChannels must be whole vectors");
    static_assert(C::kChannels % C::kVector == 0, "kVector must divide kChannels: a thread owns whole vectors");
    static_assert(C::kVector == 1 || (C::kMarch && C::kMultiplier == 1), "kVector is the march's, of channels of x");
    static_assert(C::kBoxes == 0 || kWhole, "boxes are whole channels of x");
    static_assert(C::kBoxes > 0 || !C::kOutBoxes, "kernels without boxes of x get no map of y");
    static_assert(!C::kMarch || C::kDilationH == 1, "kMarch needs neighbouring rows: each step moves all sums by one");
    static_assert(C::kMarch || C::kTaps % kPack == 0 || C::kTaps >= C::kFilterW,
                  "kTaps must be whole vectors of taps, or a whole row");
    static_assert(C::kStoreBytes < 16 || (C::kChannels % 32 == 0 && C::kVector == 1),
                  "a warp must be 32 channels to store vectors of them");
    static_assert(C::kStages >= 2, "kStages must be 2 or more: one row is read while another one arrives");

    // From one stage to the next one; boxes begin at multiples of 128 bytes.
    __device__ __forceinline__ static unsigned stage_bytes(unsigned row_bytes) {
        constexpr bool kAligned = C::kBoxes == 0 || C::kStageRows * kStaged * sizeof(Element) % 128 == 0;
        return kAligned ? C::kStageRows * row_bytes : (C::kStageRows * row_bytes + 127) / 128 * 128;
    }
};

// What a thread works on.
template <class C>
struct WideNhwcPlace {
    unsigned first_channel, lane, group, slot;
    unsigned channel;   // the thread's first one
    int strip, column;  // of outputs

    __device__ __forceinline__ WideNhwcPlace(unsigned thread, unsigned first_channel_, int strip_,
                                             const WideNhwcTiling& tiling)
        : first_channel(first_channel_), strip(strip_) {
        using W = WideNhwc<C>;
        const unsigned across = thread / W::kLanes;
        lane = thread % W::kLanes;
        slot = across / tiling.groups;
        group = across - slot * tiling.groups;
        channel = first_channel + lane * C::kVector;
        column = (strip * static_cast<int>(tiling.groups) + static_cast<int>(group)) * C::kColumns;
    }
};

struct WideNhwcUnit {
    unsigned image_group;
    int out_first, out_end;  // output rows
    int first, end;          // input rows that they read, without padding
};

// What begins at output row `position` of all images, of a block whose rows end before `end_position`.
template <class C>
__device__ __forceinline__ WideNhwcUnit wide_nhwc_unit(unsigned position, unsigned end_position, const Sizes& sizes,
                                                       const WideNhwcTiling& tiling) {
    WideNhwcUnit unit;
    unit.image_group = tiling.out_rows.quotient(position);
    unit.out_first = static_cast<int>(position - unit.image_group * tiling.out_rows.divisor);
    unit.out_end = min(unit.out_first + static_cast<int>(min(tiling.unit_rows, end_position - position)),
                       static_cast<int>(sizes.out_h));
    unit.first = max(0, unit.out_first * C::kStrideH - C::kPadTop);
    unit.end = min((unit.out_end - 1) * C::kStrideH - C::kPadTop + (C::kFilterH - 1) * C::kDilationH + 1,
                   static_cast<int>(sizes.in_h));
    return unit;
}

// What one thread copies: one piece of channels, in every `step`-th column of its slot.
template <class C>
struct WideNhwcPieces {
    using W = WideNhwc<C>;
    using Element = typename C::Element;
    unsigned position, end_position, slot;
    int rows = 0;         // that are left of the unit
    int step;             // columns from the thread's first piece to its next one
    int span;             // columns from the first piece to the end of the tile
    int channel;          // of the piece, in x
    unsigned place;       // of the thread's first piece, in elements of a stage
    int image_column;     // of that piece
    unsigned in_w;        // columns that exist for the thread: none where there is no such channel or image
    int column_step;      // in elements, as the next two
    unsigned row_place;   // from one row of a stage to the next one
    const Element* line;  // the first piece in the next row

    __device__ __forceinline__ WideNhwcPieces(const Sizes& sizes, const WideNhwcTiling& tiling, unsigned first_position,
                                              unsigned last_position, const WideNhwcPlace<C>& place_of,
                                              int first_column, unsigned slot_elements, unsigned row_elements)
        : position(first_position), end_position(last_position), slot(place_of.slot) {
        const unsigned of_slot = threadIdx.x - slot * tiling.groups * W::kLanes;
        const int column = static_cast<int>(of_slot / W::kPieces);
        const unsigned piece = of_slot % W::kPieces * W::kLoad;
        step = static_cast<int>(tiling.groups) * W::kLanes / W::kPieces;
        span = column < step ? static_cast<int>(tiling.columns) - column : 0;  // beyond whole columns: nothing
        channel = static_cast<int>(place_of.first_channel / C::kMultiplier + piece);
        place = slot * slot_elements + column * W::kStaged + piece;
        row_place = row_elements;
        column_step = step * static_cast<int>(sizes.x_column);
        image_column = first_column + column;
    }

    __device__ __forceinline__ void open(const Tensors<Element>& tensors, const Sizes& sizes,
                                         const WideNhwcTiling& tiling) {
        if (position >= end_position) return;
        const WideNhwcUnit unit = wide_nhwc_unit<C>(position, end_position, sizes, tiling);
        position += unit.out_end - unit.out_first;
        rows = unit.end - unit.first;
        const unsigned image = unit.image_group * tiling.slots + slot;
        line = tensors.x + image * sizes.x_image + channel + image_column * sizes.x_column + unit.first * sizes.x_row;
        const bool exists = channel < sizes.out_channels / C::kMultiplier && image < tiling.images;
        in_w = exists ? static_cast<unsigned>(sizes.in_w) : 0u;
    }

    // Copies the next rows of the unit, kStageRows or those that are left, to a stage.
    __device__ __forceinline__ void copy(unsigned stage, const Tensors<Element>& tensors, const Sizes& sizes,
                                         const WideNhwcTiling& tiling) {
        if (rows > 0) {
            Element* row = shared_memory<Element>() + stage * (C::kStageRows * row_place) + place;
            const int left = rows - C::kStageRows;
#pragma unroll 1
            for (; rows > 0 && rows > left; --rows) {
                if constexpr (C::kCopies > 0) {
#pragma unroll
                    for (int p = 0; p < C::kCopies; ++p)
                        if (p * step < span)
                            copy_piece_or_zero<C::kLoadBytes, C::kCached>(
                                row + p * step * W::kStaged, line + p * column_step,
                                static_cast<unsigned>(image_column + p * step) < in_w);
                } else {
                    const Element* from = line;
                    Element* to = row;
                    int at = image_column;
#pragma unroll 1
                    for (int k = span; k > 0; k -= step) {
                        copy_piece_or_zero<C::kLoadBytes, C::kCached>(to, from, static_cast<unsigned>(at) < in_w);
                        at += step;
                        from += column_step;
                        to += step * W::kStaged;
                    }
                }
                line += sizes.x_row;
                row += row_place;
            }
            if (rows <= 0) open(tensors, sizes, tiling);
        }
        end_of_copies();
    }

    __device__ __forceinline__ void wait() { wait_for_copies<C::kStages - 2>(); }
};

}  // namespace dwconv
