// taps_nhwc_boxes.cuh: rows of x and g come to the stages of a warp of taps_nhwc as boxes of tensors (sm_90 and newer)
#pragma once
#include "taps_nhwc_rows.cuh"
#include "tensor_copies.cuh"

namespace dwconv {

// What a warp's first lane sends: of each step a row of g, and those of x that it brings.
template <class C>
struct TapsBoxes {
    using W = TapsNhwc<C>;
    using Element = typename C::Element;
    static_assert(W::kTiles == 1 && !W::kFlat && W::kApartB == 1, "a warp's row must be one box");
    static constexpr unsigned kGBytes = C::kColumns * W::kPitch * sizeof(Element);
    static constexpr unsigned kXBytes = W::kKept * W::kXPitch * sizeof(Element);
    static_assert(kGBytes % 128 == 0 && kXBytes % 128 == 0, "boxes begin at multiples of 128 bytes");

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

    __device__ __forceinline__ void send(Element* to, const TensorMap& map, int of_channels, int column, int row,
                                         int plane) const {
        const int b = W::kTurned ? row : column, c = W::kTurned ? column : row;
        send_box<C::kEvictFirst>(boxes.gate(), to, map, of_channels, b, c, plane);
    }

    // Starts the copies of the next stage, `stage` bytes behind the first.
    __device__ __forceinline__ void copy(unsigned stage, const FilterGradients<Element>&, const Sizes& sizes) {
        if (step < segment.last) {
            const int row = segment.base + step * W::kReach;
            if (is_elected()) {
                Element* const to = stages + stage / sizeof(Element);
                int rows = 0;
#pragma unroll
                for (int e = 0; e < W::kRows; ++e) rows += place.has_row(row + e * W::kApartA);
                if constexpr (C::kVolume)
                    rows *= __popc(segment.planes & static_cast<unsigned>((1ull << C::kTapsD) - 1));
                expect_bytes(boxes.gate(), (step < segment.end ? kGBytes : 0) + rows * kXBytes);
                if (step < segment.end)
                    send(to, maps.g, channel, g_column, segment.row_class + step * W::kClassesA, g_plane);
#pragma unroll
                for (int e = 0; e < W::kRows; ++e) {
                    if (!place.has_row(row + e * W::kApartA)) continue;
#pragma unroll
                    for (int d = 0; d < C::kTapsD; ++d) {
                        if (C::kVolume && !(segment.planes & 1u << d)) continue;
                        send(to + W::kGElements + (d * W::kRows + e) * W::kKept * W::kXPitch, maps.x,
                             channel / C::kMultiplier, x_column, row + e * W::kApartA, x_plane + d * C::kDilationD);
                    }
                }
            }
            if (++step == segment.last) begin(sizes);
        }
        boxes.is_sent();
    }

    __device__ __forceinline__ void wait_for_all() const {}  // each was waited for

    __device__ __forceinline__ void wait_until_full() { boxes.wait_until_full(); }
};

}  // namespace dwconv
