// taps_nhwc_boxes.cuh: rows of x and g come to the stages of a warp of taps_nhwc as boxes of tensors (sm_90 and newer)
#pragma once
#include "taps_nhwc_rows.cuh"
#include "tensor_copies.cuh"

namespace dwconv {

// What a warp's first lane sends: the rows of g of a stage, and those of x that its steps bring. Where these are
// neighbours, they are one box, with zeros for those that don't exist.
template <class C>
struct TapsBoxes {
    using W = TapsNhwc<C>;
    using Element = typename C::Element;
    static_assert(W::kTiles == 1 && !W::kFlat && W::kApartB == 1, "a warp's row must be one box");
    static constexpr bool kNeighbours = W::kApartA == 1 && W::kReach == W::kRows;
    static constexpr int kBoxRows = kNeighbours ? W::kStageRows : 1, kBoxes = W::kStageRows / kBoxRows;
    static constexpr unsigned kGBytes = W::kGColumns * W::kPitch * sizeof(Element);
    static constexpr unsigned kXBytes = kBoxRows * W::kKept * W::kXPitch * sizeof(Element);
    static_assert(kGBytes % 128 == 0 && kXBytes % 128 == 0, "boxes begin at multiples of 128 bytes");
    static_assert(C::kStageSteps == 1 || kNeighbours, "rows of several steps must be neighbours");

    const TapsPlace<C>& place;
    const LinesTiling& tiling;
    const GradientMaps& maps;
    WarpStages<C::kStages> boxes;
    Element* const stages;
    unsigned position;
    LinesSegment<W> segment;
    int step = 0;
    int channel, g_column, x_column, g_plane, x_plane;

    __device__ __forceinline__ TapsBoxes(const GradientMaps& maps_, const Sizes& sizes, const TapsPlace<C>& place_,
                                         const LinesTiling& tiling_, Element* stages_, void* gates, unsigned first)
        : place(place_), tiling(tiling_), maps(maps_), boxes(gates), stages(stages_), position(first) {
        if (threadIdx.x == 0) prefetch_maps(maps);
        channel = static_cast<int>((place.group * C::kChunks + place.chunk) * W::kChannels);
        begin(sizes);
    }

    __device__ __forceinline__ void begin(const Sizes& sizes) {
        if (!segment.find(position, place, sizes, tiling, place.warp_tile)) {
            segment.last = step = 0;  // nothing more to copy
            return;
        }
        step = segment.first;
        const OutputLine<W> at(segment.super_line * W::kLines + place.warp_tile, tiling);
        g_column = at.first;
        x_column = at.x_column(place.tap_b) + W::kSkipped;
        g_plane = x_plane = static_cast<int>(at.image);
        if constexpr (C::kVolume) {
            const MetPlanes met = MetPlanes::find<C>(at.image, tiling.depths, sizes, place.depth_tap);
            x_plane = static_cast<int>(met.image * sizes.in_d) + met.x_depth;
        }
    }

    // Whether the k-th box of a step's rows of x is sent.
    __device__ __forceinline__ bool has_box(int row, int k) const {
        return kNeighbours || place.has_row(row + k * W::kApartA);
    }

    // Starts the copies of the next stage, `stage` bytes behind the first.
    __device__ __forceinline__ void copy(unsigned stage, const FilterGradients<Element>&, const Sizes& sizes) {
        if (step < segment.last) {
            const int row = segment.base + step * W::kReach;
            if (is_elected()) {
                const unsigned gate = boxes.gate();
                Element* const to = stages + stage / sizeof(Element);
                int count = 0;
#pragma unroll
                for (int k = 0; k < kBoxes; ++k) count += has_box(row, k);
                if constexpr (C::kVolume)
                    count *= __popc(segment.planes & static_cast<unsigned>((1ull << C::kTapsD) - 1));
                expect_bytes(gate, (step < segment.end ? kGBytes : 0) + count * kXBytes);
                if (step < segment.end)
                    send_box<C::kEvictFirst>(gate, to, maps.g, channel, g_column,
                                             segment.row_class + step * W::kClassesA, g_plane);
#pragma unroll
                for (int k = 0; k < kBoxes; ++k) {
                    if (!has_box(row, k)) continue;
#pragma unroll
                    for (int d = 0; d < C::kTapsD; ++d) {
                        if (C::kVolume && !(segment.planes & 1u << d)) continue;
                        send_box<C::kEvictFirst>(
                            gate, to + W::kGElements + (d * kBoxes + k) * kBoxRows * W::kKept * W::kXPitch, maps.x,
                            channel / C::kMultiplier, x_column, row + k * W::kApartA, x_plane + d * C::kDilationD);
                    }
                }
            }
            step += C::kStageSteps;
            if (step >= segment.last) begin(sizes);
        }
        boxes.is_sent();
    }

    __device__ __forceinline__ void wait_for_all() const {}  // each was waited for

    __device__ __forceinline__ void wait_until_full() { boxes.wait_until_full(); }
};

}  // namespace dwconv
