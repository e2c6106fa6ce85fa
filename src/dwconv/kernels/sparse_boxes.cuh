// sparse_boxes.cuh: rows of x come to sparse_nhwc's stages as boxes of a tensor (sm_90 and newer)
//   The copy engine makes zeros of what a box has outside of the image. Its boxes are swizzled as SparseRows::place has
//   it.
#pragma once
#include "sparse_rows.cuh"
#include "tensor_copies.cuh"

namespace dwconv {

// One lane sends all rows of a step, of all images that lie side by side, by one instruction.
template <class C>
class SparseBoxes {
    const TensorMap& x_;
    int channel_, column_;
    unsigned bytes_, gates_ = 0;  // of a stage; where a gate for each stage begins
    unsigned round_ = 0;

    __device__ __forceinline__ void send(const SparseStep& line, unsigned char* stage, int number) const {
        if (line.exist == 0) return;
        expect_bytes(gates_ + 8 * number, bytes_);
        send_box<false>(gates_ + 8 * number, stage, x_, channel_, column_, line.image, static_cast<int>(line.from));
    }

public:
    // The engine fetches the map before it is needed.
    __device__ __forceinline__ static void prefetch(const TensorMap& x) {
        if (threadIdx.x == 0) prefetch_map(x);
    }

    // What thread 0 sends may begin at once.
    __device__ __forceinline__ SparseBoxes(const void*, const Sizes&, const SparseTiling& tiling,
                                           const SparsePlace& place, const TensorMap& x)
        : x_(x),
          channel_(place.first_channel),
          column_(place.first_column * C::kStrideW - C::kLead),
          bytes_(C::kRows * tiling.row_bytes) {
        static_assert(C::kGateBytes >= 8 * C::kStages, "each stage has a gate");
#ifndef DWCONV_EMULATOR
        gates_ = static_cast<unsigned>(__cvta_generic_to_shared(place.gates));
        if (threadIdx.x == 0) {
#pragma unroll
            for (int k = 0; k < C::kStages; ++k) Gate::initialize(gates_ + 8 * k, 1);
            own_writes_before_copies();
        }
#endif
    }

    // Of the first steps, before warps are on their ways.
    __device__ __forceinline__ void copy_early(const SparseStep& line, unsigned char* stage, int number) const {
        if (threadIdx.x == 0) send(line, stage, number);
    }
    __device__ __forceinline__ void copy(const SparseStep* line, unsigned char* stage, int number) const {
        // Warps take turns: the one that sends is late at the barrier.
        if (__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0) == number % C::kWarps && is_elected())
            send(SparseStep::read(line), stage, number);
    }

    __device__ __forceinline__ void clear_beside(unsigned char*, const Sizes&, const SparseTiling&) const {}

    // Gates are open for all.
    __device__ __forceinline__ static void open() { __syncthreads(); }
    // What was sent to stage `number` has arrived, and all threads meet.
    __device__ __forceinline__ void meet(int number) {
#ifndef DWCONV_EMULATOR
        Gate::wait(gates_ + 8 * number, round_);
        if (number + 1 == C::kStages) round_ ^= 1;
#endif
        __syncthreads();
    }
};

}  // namespace dwconv
