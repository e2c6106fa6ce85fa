// wide_nhwc_outputs.cuh: how the sums of a row become outputs
//   Lanes store: each its own outputs, or, where all those of a warp are vectors of neighbouring channels, vectors of
//   the warp's, which are gathered in shared memory. Or the warp's leave from there as a box of y (sm_90 and newer).
#pragma once
#include "epilogue.cuh"
#include "tensor_copies.cuh"
#include "wide_nhwc_rows.cuh"

namespace dwconv {

template <class C>
struct WideNhwcOutputs {
    using W = WideNhwc<C>;
    using Element = typename C::Element;
    using Sum = typename W::Sum;
    static constexpr int kStored = 16 / static_cast<int>(sizeof(Element)), kPieces = 32 / kStored;

    const Sizes& sizes;
    const WideNhwcTiling& tiling;
    const ChannelValues<Sum> (&values)[C::kVector];
    Element* const mine;  // of the warp
    unsigned slot, stored_channel;
    int column, in_row;    // of the first output; where the lane's first store goes
    int pitch, row_pitch;  // from a column to the next one, from a row
    int count = 0;         // columns from the first on that exist
    Tensors<Element> to;   // the lane's first store in the next row

    __device__ __forceinline__ WideNhwcOutputs(const Tensors<Element>& tensors, const Sizes& sizes_,
                                               const WideNhwcTiling& tiling_, const WideNhwcPlace<C>& place,
                                               const ChannelValues<Sum> (&values_)[C::kVector], Element* outputs)
        : sizes(sizes_),
          tiling(tiling_),
          values(values_),
          mine(outputs + threadIdx.x / 32 * W::kWarpOut),
          slot(place.slot),
          to(tensors) {
        const unsigned lane_column = W::kShareOut ? threadIdx.x % 32 / kPieces : 0;
        stored_channel =
            W::kShareOut ? place.first_channel + place.lane / 32 * 32 + threadIdx.x % kPieces * kStored : place.channel;
        column = place.column;
        pitch = static_cast<int>(sizes.out_channels);
        row_pitch = static_cast<int>(sizes.out_w) * pitch;
        in_row = (column + static_cast<int>(lane_column)) * pitch + static_cast<int>(stored_channel);
    }

    __device__ __forceinline__ void begin(const Tensors<Element>& tensors, const WideNhwcUnit& unit) {
        const unsigned image = unit.image_group * tiling.slots + slot;
        count =
            stored_channel < sizes.out_channels && image < tiling.images ? static_cast<int>(sizes.out_w) - column : 0;
        const long long out = (image * sizes.out_h + unit.out_first) * row_pitch + in_row;
        to.y = tensors.y + out;
        if constexpr (C::kHasResidual) to.residual = tensors.residual + out;
    }

    // The next row of the unit.
    __device__ __forceinline__ void store(const Sum (&sums)[C::kColumns][C::kVector]) {
        if constexpr (W::kShareOut) {
            const int lane = static_cast<int>(threadIdx.x % 32);
            __syncwarp();
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t)
                mine[t * 32 + lane] = static_cast<Element>(finished<C>(sums[t][0], values[0], Element()));
            __syncwarp();
#pragma unroll
            for (int k = 0; k < C::kColumns * kPieces; k += 32) {
                const int of_row = k / kPieces + lane / kPieces;
                if (of_row < smaller(count, C::kColumns))
                    store_vector(to.y + k / kPieces * pitch,
                                 *reinterpret_cast<const Vector<Element, kStored>*>(mine + (k + lane) * kStored));
            }
        } else {
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t)
                if (t < count) store_outputs<C, C::kVector, 1>(to, t * pitch, sums[t], values);
        }
        to.y += row_pitch;
        if constexpr (C::kHasResidual) to.residual += row_pitch;
    }

    __device__ __forceinline__ void end() const {}
};

// A warp has kBoxLanes lanes of neighbouring channels, and as many times that as it has groups of columns side by side,
// or images.
template <class C>
struct WideNhwcBoxOutputs {
    using W = WideNhwc<C>;
    using Element = typename C::Element;
    using Sum = typename W::Sum;
    static constexpr int kBoxLanes = smaller(W::kLanes, 32), kPixel = kBoxLanes * C::kVector;
    static_assert(!C::kHasResidual, "a residual is added by lanes that store");
    static_assert(W::kLanes % 32 == 0 || 32 % W::kLanes == 0, "a warp's outputs must be one box");

    const WideNhwcTiling& tiling;
    const ChannelValues<Sum> (&values)[C::kVector];
    const TensorMap& map;
    Element *box, *mine;        // of the warp; where the lane's first output goes
    int channel, column, slot;  // where the box begins
    int image = 0, row = 0;

    __device__ __forceinline__ WideNhwcBoxOutputs(const TensorMap& map_, const WideNhwcTiling& tiling_,
                                                  const WideNhwcPlace<C>& place,
                                                  const ChannelValues<Sum> (&values_)[C::kVector], Element* outputs)
        : tiling(tiling_), values(values_), map(map_) {
        if (threadIdx.x == 0) prefetch_map(map);
        const unsigned warp = warp_number(), lane = threadIdx.x % 32;
        box = outputs + warp * W::kWarpOut;
        mine = box + lane / kBoxLanes * (C::kColumns * kPixel) + lane % kBoxLanes * C::kVector;
        const WideNhwcPlace<C> first(warp * 32, place.first_channel, place.strip, tiling);
        channel = static_cast<int>(first.channel);
        column = first.column;
        slot = static_cast<int>(first.slot);
    }

    __device__ __forceinline__ void begin(const Tensors<Element>&, const WideNhwcUnit& unit) {
        image = static_cast<int>(unit.image_group * tiling.slots) + slot;
        row = unit.out_first;
    }

    __device__ __forceinline__ void store(const Sum (&sums)[C::kColumns][C::kVector]) {
        wait_until_stores_are_read();
        __syncwarp();
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t) {
            Sum out[C::kVector];
#pragma unroll
            for (int e = 0; e < C::kVector; ++e) out[e] = finished<C>(sums[t][e], values[e], Element());
            *reinterpret_cast<Vector<Element, C::kVector>*>(mine + t * kPixel) = rounded<Element, C::kVector>(out);
        }
        own_writes_before_copies();
        __syncwarp();
        if (is_elected()) store_box(map, box, channel, column, image, row);
        ++row;
    }

    // Shared memory stays this block's until boxes have left it.
    __device__ __forceinline__ void end() const { wait_until_stores_are_read(); }
};

}  // namespace dwconv
