// taps_sparse_nhwc_boxes.cuh: lines of x and g come to the stages of a block of taps_sparse_nhwc as boxes of tensors
// (sm_90 and newer)
#pragma once
#include "taps_sparse_nhwc_stages.cuh"
#include "tensor_copies.cuh"

namespace dwconv {

// Warps that send a step, each up to four lines, if they are more than one.
template <class C>
__host__ __device__ constexpr int box_senders(int senders = 1) {
    return 8 * senders <= C::kLines && C::kWarps % (2 * senders) == 0 ? box_senders<C>(2 * senders) : senders;
}

// Stages are filled by the copies of all threads, or by what lanes of some warps send.
template <class C>
using SparseGates =
    StageGates<C::kStages, TapsSparse<C>::kThreads, C::kBoxes ? box_senders<C>() : TapsSparse<C>::kThreads>;

// What one lane of a warp sends: rows of g, and of x, of some lines of a step. Warps take turns: who is late for that
// has time to catch up while stages are ahead.
template <class C>
struct TapsSparseBoxes {
    using W = TapsSparse<C>;
    static constexpr unsigned kXBytes = W::kXBoxColumns * W::kXPitch, kGBytes = W::kGBoxColumns * W::kGPitch;

    static constexpr int kSenders = box_senders<C>(), kTurns = C::kWarps / kSenders, kOwnLines = W::kLines / kSenders;
    static_assert(W::kLines % kSenders == 0, "senders share the lines of a step");

    const GradientMaps& maps;
    const LinesPlace<W>& place;
    const LinesTiling& tiling;
    unsigned position;
    LinesSegment<W> segment;
    int step = 0;
    int first_line;  // of those that this warp sends
    int turns;       // until its next one

    __device__ __forceinline__ TapsSparseBoxes(const GradientMaps& maps_, const Sizes& sizes,
                                               const LinesPlace<W>& place_, const LinesTiling& tiling_)
        : maps(maps_), place(place_), tiling(tiling_), position(place_.first) {
        if (threadIdx.x == 0) prefetch_maps(maps);
        const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // uniform, for compilers
        first_line = warp % kSenders * kOwnLines;
        turns = warp / kSenders;
        begin(sizes);
    }

    // Whether this warp sends the next step.
    __device__ __forceinline__ bool has_turn() const { return turns == 0; }

    __device__ __forceinline__ void begin(const Sizes& sizes) {
        if (segment.find(position, place, sizes, tiling))
            step = segment.first;
        else
            segment.last = step = 0;  // nothing more to send
    }

    // Sends the next step to a stage, if it is this warp's turn.
    __device__ __forceinline__ void send(unsigned char* stage, unsigned gate, const Sizes& sizes) {
        if (step >= segment.last) return;
        if (has_turn() && is_elected()) send_step(stage, gate, sizes);
        turns = has_turn() ? kTurns - 1 : turns - 1;
        if (++step == segment.last) begin(sizes);
    }

    __device__ __forceinline__ void send_step(unsigned char* stage, unsigned gate, const Sizes& sizes) const {
        const int row = segment.base + step * W::kReach, channel = static_cast<int>(place.group * W::kBlockChannels);
        const bool has_g = step < segment.end;
        unsigned rows = 0;
#pragma unroll
        for (int e = 0; e < W::kRows; ++e) rows += place.has_row(row + e * W::kApartA);
        expect_bytes(gate, kOwnLines * (rows * kXBytes + (has_g ? kGBytes : 0)));
#pragma unroll 1
        for (int line = first_line; line < first_line + kOwnLines; ++line) {
            const OutputLine<W> at(segment.super_line * W::kLines + line, tiling);
            int plane = static_cast<int>(at.image);
            if (has_g)
                send_box<C::kEvictFirst>(gate, stage + W::kGAt + W::g_line_at(line), maps.g, channel, at.first,
                                         segment.row_class + step * W::kClassesA, plane);
            if constexpr (C::kVolume) {  // a plane that doesn't exist is outside of the tensor
                const MetPlanes met = MetPlanes::find<C>(at.image, tiling.depths, sizes, place.depth_tap);
                plane = met.exists ? static_cast<int>(met.image * sizes.in_d) + met.x_depth : -1;
            }
#pragma unroll
            for (int e = 0; e < W::kRows; ++e)
                if (place.has_row(row + e * W::kApartA))
                    send_box<C::kEvictFirst>(
                        gate, stage + e * W::kXRowBytes + W::x_line_at(line) + W::kXBoxFirst * W::kXPitch, maps.x,
                        channel / C::kMultiplier, at.x_column(place.tap_b) + W::kXBoxFirst, row + e * W::kApartA,
                        plane);
        }
    }
};

// A warp clears a line's columns that no box brings: all but Columns from First on, of Pitch bytes each.
template <int First, int Columns, int All, int Pitch>
__device__ __forceinline__ void clear_beside(unsigned char* line) {
    constexpr int kPieces = (All - Columns) * (Pitch / 16);
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x % 32); at < kPieces; at += 32) {
        const int column = at / (Pitch / 16);
        *reinterpret_cast<uint4*>(line + (column < First ? column : column + Columns) * Pitch +
                                  at % (Pitch / 16) * 16) = uint4{0, 0, 0, 0};
    }
}

// The same for all stages: a warp a line at a time. Boxes may be on their way; products, behind the next barrier.
template <class C>
__device__ __forceinline__ void clear_beside_boxes(unsigned char* stages) {
    using W = TapsSparse<C>;
#pragma unroll 1
    for (int line = static_cast<int>(threadIdx.x / 32); line < C::kStages * W::kLines; line += C::kWarps) {
        unsigned char* const stage = stages + line / W::kLines * W::kStageBytes;
#pragma unroll
        for (int e = 0; e < W::kRows; ++e)
            clear_beside<W::kXBoxFirst, W::kXBoxColumns, 8 * W::kXBoxChunks, W::kXPitch>(
                stage + e * W::kXRowBytes + W::x_line_at(line % W::kLines));
        clear_beside<0, W::kGBoxColumns, 8 * W::kGBoxChunks, W::kGPitch>(stage + W::kGAt +
                                                                         W::g_line_at(line % W::kLines));
    }
}

}  // namespace dwconv
