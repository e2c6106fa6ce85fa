// wide_nhwc_rows.cuh: how rows of x come to shared memory: units, their rows, and copies that run beside the arithmetic
//   A block makes `part_rows` output rows of one chunk of channels and one strip of columns, of `slots` images at a
//   time: rows of image after image, as if they were one tall image. What it makes of one image is a unit. What lies
//   beside the image, and channels that don't exist, become zeros; rows above and below the image are not copied.
//   WideNhwcPieces: all threads of a slot copy its columns, each the same piece of channels in every `step`-th column.
//   WideNhwcStretches: where a block takes whole pixels, one thread has a row copied by one bulk copy (sm_90 and
//   newer).
#pragma once
#include "copies.cuh"
#include "epilogue.cuh"

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
    static constexpr int kFilterRow = ceil_div(C::kFilterW, kPack) * kPack;      // taps of a row in shared memory
    static constexpr bool kShareOut = C::kStoreBytes == 16 && !C::kHasResidual;  // outputs leave as whole vectors
    static constexpr int kLive = ceil_div(C::kFilterH, C::kStrideH);  // output rows that one input row adds to

    static constexpr int kFilterBytes =
        C::kMarch ? ceil_div(C::kChannels * kTaps * static_cast<int>(sizeof(Element)), 16) * 16
                  : C::kFilterH * kFilterRow * C::kChannels * static_cast<int>(sizeof(Sum));

    static_assert(kWhole || kLoad == 1, "kLoadBytes must be one element: the block's channels of x start anywhere");
    static_assert(C::kChannels % kLoad == 0, "kChannels must be whole vectors");
    static_assert(C::kChannels % C::kVector == 0, "kVector must divide kChannels: a thread owns whole vectors");
    static_assert(C::kVector == 1 || (C::kMarch && C::kMultiplier == 1), "kVector is the march's, of channels of x");
    static_assert(!C::kBulk || (kWhole && C::kLoadBytes == 16), "kBulk moves whole vectors of 16 bytes");
    static_assert(!C::kMarch || C::kDilationH == 1, "kMarch needs neighbouring rows: each step moves all sums by one");
    static_assert(C::kMarch || C::kTaps % kPack == 0 || C::kTaps >= C::kFilterW,
                  "kTaps must be whole vectors of taps, or a whole row");
    static_assert(C::kStoreBytes < 16 || (C::kChannels % 32 == 0 && C::kVector == 1),
                  "a warp must be 32 channels to store vectors of them");
    static_assert(C::kStages <= 8, "kStages must be at most 8: their barriers take kBarrierBytes");
    static_assert(C::kStages >= 2, "kStages must be 2 or more: one row is read while another one arrives");
};

// ---- bulk copies: a barrier in shared memory counts the bytes of a stage. The emulator copies at once. ----

#if !defined(DWCONV_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DWCONV_BULK_ROWS
#endif

using BulkBarrier = unsigned long long;
constexpr int kBarrierBytes = 64;  // of a block

__device__ __forceinline__ void open_barrier(BulkBarrier* barrier) {
#ifdef DWCONV_BULK_ROWS
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier)))
        : "memory");
#endif
}

// Barriers are open for the copies that this thread starts next.
__device__ __forceinline__ void end_of_barriers() {
#ifdef DWCONV_BULK_ROWS
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void expect_bytes(BulkBarrier* barrier, unsigned bytes) {
#ifdef DWCONV_BULK_ROWS
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(barrier))),
                 "r"(bytes)
                 : "memory");
#endif
}

template <class T>
__device__ __forceinline__ void copy_stretch(T* to, const T* from, unsigned bytes, BulkBarrier* barrier) {
#ifdef DWCONV_BULK_ROWS
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(bytes), "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier)))
                 : "memory");
#else
    for (unsigned k = 0; k < bytes / sizeof(T); ++k) to[k] = from[k];
#endif
}

// Waits until all bytes of the barrier's phase, 0 and 1 in turn, have arrived.
__device__ __forceinline__ void wait_for_bytes(BulkBarrier* barrier, unsigned phase) {
#ifdef DWCONV_BULK_ROWS
    unsigned done;
    do {
        asm volatile(
            "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))), "r"(phase)
            : "memory");
    } while (done == 0);
#endif
}

// ---- units and their rows ----

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
                                              unsigned last_position, unsigned slot_, unsigned first_channel,
                                              int first_column, unsigned slot_elements, unsigned row_elements, Element*,
                                              void*)
        : position(first_position), end_position(last_position), slot(slot_) {
        const unsigned of_slot = threadIdx.x - slot * tiling.groups * W::kLanes;
        const int column = static_cast<int>(of_slot / W::kPieces);
        const unsigned piece = of_slot % W::kPieces * W::kLoad;
        step = static_cast<int>(tiling.groups) * W::kLanes / W::kPieces;
        span = column < step ? static_cast<int>(tiling.columns) - column : 0;  // beyond whole columns: nothing
        channel = static_cast<int>(first_channel / C::kMultiplier + piece);
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

    __device__ __forceinline__ void wait(unsigned) { wait_for_copies<C::kStages - 2>(); }
};

// What thread 0 has copied for all: of each slot, the columns of a row that exist.
template <class C>
struct WideNhwcStretches {
    using W = WideNhwc<C>;
    using Element = typename C::Element;
    unsigned position, end_position;
    int rows = 0;               // that are left of the unit
    int first_column, columns;  // that exist
    unsigned place;             // of the first of them, in elements of a stage
    unsigned slot_place, row_place;
    unsigned slots;  // that have an image
    const Element* line;
    Element* stages;
    BulkBarrier* barriers;
    unsigned phases = 0;  // of the barriers, a bit each

    __device__ __forceinline__ WideNhwcStretches(const Sizes& sizes, const WideNhwcTiling& tiling,
                                                 unsigned first_position, unsigned last_position, unsigned, unsigned,
                                                 int tile_column, unsigned slot_elements, unsigned row_elements,
                                                 Element* stages_, void* memory)
        : position(first_position),
          end_position(last_position),
          stages(stages_),
          barriers(static_cast<BulkBarrier*>(memory)) {
        first_column = max(0, tile_column);
        columns =
            max(0, min(static_cast<int>(sizes.in_w), tile_column + static_cast<int>(tiling.columns)) - first_column);
        const int before = first_column - tile_column, after = before + columns;
        place = before * W::kStaged;
        slot_place = slot_elements;
        row_place = row_elements;
        if (threadIdx.x == 0) {
            for (int k = 0; k < C::kStages; ++k) open_barrier(barriers + k);
            end_of_barriers();
        }
        // Columns beside the image stay zero for as long as the block lives.
        for (unsigned k = 0; k < C::kStages * C::kStageRows * tiling.slots; ++k) {
            Element* line_of = stages + k / tiling.slots * row_place + k % tiling.slots * slot_place;
            for (int e = static_cast<int>(threadIdx.x); e < before * W::kStaged; e += static_cast<int>(blockDim.x))
                line_of[e] = Element();
            for (int e = after * W::kStaged + static_cast<int>(threadIdx.x);
                 e < static_cast<int>(tiling.columns) * W::kStaged; e += static_cast<int>(blockDim.x))
                line_of[e] = Element();
        }
    }

    __device__ __forceinline__ void open(const Tensors<Element>& tensors, const Sizes& sizes,
                                         const WideNhwcTiling& tiling) {
        if (position >= end_position) return;
        const WideNhwcUnit unit = wide_nhwc_unit<C>(position, end_position, sizes, tiling);
        position += unit.out_end - unit.out_first;
        rows = unit.end - unit.first;
        const unsigned image = unit.image_group * tiling.slots;
        slots = min(tiling.slots, tiling.images - image);
        line = tensors.x + image * sizes.x_image + first_column * sizes.x_column + unit.first * sizes.x_row;
    }

    __device__ __forceinline__ void copy(unsigned stage, const Tensors<Element>& tensors, const Sizes& sizes,
                                         const WideNhwcTiling& tiling) {
        if (threadIdx.x != 0 || rows <= 0) return;
        const int count = min(rows, C::kStageRows);
        const unsigned bytes = columns * (W::kStaged * sizeof(Element));
        BulkBarrier* barrier = barriers + stage;
        expect_bytes(barrier, count * slots * bytes);
        Element* row = stages + stage * (C::kStageRows * row_place) + place;
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
            if (bytes > 0)
#pragma unroll 1
                for (unsigned s = 0; s < slots; ++s)
                    copy_stretch(row + s * slot_place, line + s * sizes.x_image, bytes, barrier);
            line += sizes.x_row;
            row += row_place;
        }
        rows -= count;
        if (rows == 0) open(tensors, sizes, tiling);
    }

    __device__ __forceinline__ void wait(unsigned stage) {
        wait_for_bytes(barriers + stage, phases >> stage & 1);
        phases ^= 1u << stage;
    }
};

template <class C, bool Bulk = C::kBulk>
struct WideNhwcCopies : WideNhwcPieces<C> {
    using WideNhwcPieces<C>::WideNhwcPieces;
};
template <class C>
struct WideNhwcCopies<C, true> : WideNhwcStretches<C> {
    using WideNhwcStretches<C>::WideNhwcStretches;
};

}  // namespace dwconv
