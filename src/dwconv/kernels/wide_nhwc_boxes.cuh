// wide_nhwc_boxes.cuh: rows of x come to shared memory as boxes of a tensor (sm_90 and newer)
//   One lane has the rows of a stage copied, all images and columns of them, by one instruction, or by one for each
//   kBoxColumns columns where they are too many for a box; what lies outside of the image comes as zeros. Stages are
//   filled and read between gates, so that warps may be a step apart.
#pragma once
#include "tensor_copies.cuh"
#include "wide_nhwc_rows.cuh"

namespace dwconv {

template <class C>
struct WideNhwcBoxes {
    using W = WideNhwc<C>;
    using Element = typename C::Element;
    static constexpr int kBoxBytes = C::kBoxColumns * W::kStaged * static_cast<int>(sizeof(Element));
    static_assert(C::kBoxes == 1 || (kBoxBytes % 128 == 0 && C::kStageRows == 1),
                  "boxes side by side begin at multiples of 128 bytes, in the one row of a stage");

    StageGates<C::kStages, C::kThreads, 1> gates;
    unsigned position, end_position;
    int row = 0, end = 0;  // of the unit: what is sent next
    int image = 0;
    int channel, column;  // where boxes begin
    unsigned row_bytes;
    const unsigned warp = warp_number();

    __device__ __forceinline__ WideNhwcBoxes(const TensorMap& map, unsigned first_position, unsigned last_position,
                                             const WideNhwcPlace<C>& place, int first_column, unsigned row_elements)
        : gates(shared_memory<unsigned char>(), blockDim.x),
          position(first_position),
          end_position(last_position),
          column(first_column) {
        if (threadIdx.x == 0) prefetch_map(map);
        channel = static_cast<int>(place.first_channel / C::kMultiplier);
        row_bytes = row_elements * static_cast<unsigned>(sizeof(Element));
    }

    __device__ __forceinline__ void open(const Sizes& sizes, const WideNhwcTiling& tiling) {
        if (position >= end_position) return;
        const WideNhwcUnit unit = wide_nhwc_unit<C>(position, end_position, sizes, tiling);
        position += unit.out_end - unit.out_first;
        row = unit.first;
        end = unit.end;
        image = static_cast<int>(unit.image_group * tiling.slots);
    }

    // The first warp sends the next kStageRows rows of the unit to a stage that is empty, or was read before `reading`,
    // which is read now. Nothing reads those behind the unit's last row.
    template <bool Empty>
    __device__ __forceinline__ void fill(unsigned stage, unsigned reading, const TensorMap& map, const Sizes& sizes,
                                         const WideNhwcTiling& tiling) {
        if (warp > 0 || row >= end) return;
        if constexpr (!Empty) gates.wait_until_empty(stage, stage > reading);
        if (is_elected()) {
            unsigned char* const to =
                shared_memory<unsigned char>() + W::kGateBytes + stage * W::stage_bytes(row_bytes);
            expect_bytes(gates.gate(stage), C::kStageRows * row_bytes);
#pragma unroll
            for (int k = 0; k < C::kBoxes; ++k)
                send_box<C::kEvictFirst>(gates.gate(stage), to + k * kBoxBytes, map, channel,
                                         column + k * C::kBoxColumns, image, row);
        }
        row += C::kStageRows;
        if (row >= end) open(sizes, tiling);
    }
};

}  // namespace dwconv
