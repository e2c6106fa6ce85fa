// warp_rows.cuh: rows of 16-bit elements that take loads, or stores, of 4 bytes, of strips that belong to a warp each
//   A lane owns 8 neighbouring columns, 4 words of a row. If it moved them by itself, every move of the warp would
//   leave gaps, and L2 get every sector four times (1.3 times as long for a 3x3 filter on 510 columns). So words are
//   moved as they lie, 32 neighbours at a time, and lanes trade them.
#pragma once
#include "epilogue.cuh"
#include "row_cells.cuh"

namespace dwconv {

// Word n of a strip's 128 belongs to lane n / 4, and is its number n % 4. Move k of the warp takes words 32 * k to
// 32 * k + 31: the bits of n % 4 have changed places with the upper two of the lane.
struct WarpWords {
    static constexpr int kCount = 4, kElements = 2;      // of a lane and row; of a word
    static constexpr int kStep = 32 * kElements;         // columns from one move to the next
    static constexpr int kColumns = kCount * kElements;  // of a lane

    // Columns from a lane's own first one to the one it moves first.
    __host__ __device__ static constexpr int moved(int lane) {
        return (lane % 8 * kCount + lane / 8) * kElements - lane * kColumns;
    }
    // From own words to moved ones, and back. All lanes call it.
    static __device__ __forceinline__ void trade(unsigned* words) {
        trade(words[0], words[2], 16);
        trade(words[1], words[3], 16);
        trade(words[0], words[1], 8);
        trade(words[2], words[3], 8);
    }

private:
    // Lanes that differ in this bit: the lower one gets both first words, the upper one both second ones.
    static __device__ __forceinline__ void trade(unsigned& first, unsigned& second, unsigned lane_bit) {
        const bool upper = threadIdx.x & lane_bit;
        const unsigned traded = __shfl_xor_sync(0xffffffffu, upper ? first : second, lane_bit);
        (upper ? first : second) = traded;
    }
};

// What a lane reads of a row of x, as SlotRow has it: its own words, and those of its neighbours that it needs, too.
template <class C>
struct WarpRow {
    using T = typename C::Element;
    using Columns = ReadColumns<C>;
    static constexpr int kLeft = -floor_div(Columns::kFirst, WarpWords::kElements);  // neighbours' words
    static constexpr int kRight = larger(0, floor_div(Columns::kLast, WarpWords::kElements) - WarpWords::kCount + 1);
    unsigned words[kLeft + WarpWords::kCount + kRight];

    __device__ __forceinline__ void load(const T* address, bool row_inside, int column, int in_w) {
        static_assert(sizeof(T) == 2 && C::kVector == WarpWords::kColumns && C::kStrideW == 1,
                      "lanes own 4 words of two elements side by side");
        static_assert(kLeft <= WarpWords::kCount && kRight <= WarpWords::kCount, "neighbours have no more words");
        const int lane = static_cast<int>(threadIdx.x % 32);
        const T* first = address + WarpWords::moved(lane);
        const int first_column = column + WarpWords::moved(lane);
#ifndef DWCONV_EMULATOR
        asm("" : "+l"(first));  // compilers would find each word's address by itself, from x on
#endif
        const auto word = [&](bool wanted, int from) {
            unsigned found = 0;
            if (wanted && row_inside && static_cast<unsigned>(first_column + from) < static_cast<unsigned>(in_w))
                found = load_vector<1>(reinterpret_cast<const unsigned*>(first + from)).element[0];
            return found;
        };
#pragma unroll
        for (int k = 0; k < WarpWords::kCount; ++k) words[kLeft + k] = word(true, k * WarpWords::kStep);
#pragma unroll
        for (int k = 0; k < kLeft; ++k) words[k] = word(lane == 0, (k - kLeft) * WarpWords::kElements);
#pragma unroll
        for (int k = 0; k < kRight; ++k)
            words[kLeft + WarpWords::kCount + k] =
                word(lane == 31, (WarpWords::kCount + k) * WarpWords::kElements - WarpWords::moved(31));
    }

    // Before the first use. All lanes call it.
    __device__ __forceinline__ void settle() {
        const int lane = static_cast<int>(threadIdx.x % 32);
        WarpWords::trade(words + kLeft);
#pragma unroll
        for (int k = 0; k < kLeft; ++k) {
            const unsigned left = __shfl_sync(0xffffffffu, words[WarpWords::kCount + k], lane - 1);
            if (lane > 0) words[k] = left;
        }
#pragma unroll
        for (int k = 0; k < kRight; ++k) {
            const unsigned right = __shfl_sync(0xffffffffu, words[kLeft + k], lane + 1);
            if (lane < 31) words[kLeft + WarpWords::kCount + k] = right;
        }
    }

    // Column Columns::kFirst + k.
    template <class Sum>
    __device__ __forceinline__ Sum column(int k) const {
        const int at = Columns::kFirst + k + kLeft * WarpWords::kElements;
        return read_element<T>(words[at / 2], at % 2);
    }
};

// Stores a lane's outputs of a row, the first of which has number `column` and is at offset `at` of y. All lanes call
// it, with the same row.
template <class C, class Sum>
__device__ __forceinline__ void store_warp_row(const Tensors<typename C::Element>& tensors, long long at, int column,
                                               int out_w, const ChannelValues<Sum>& values,
                                               const Sum (&sums)[C::kVector]) {
    static_assert(sizeof(typename C::Element) == 2 && C::kVector == WarpWords::kColumns && !C::kHasResidual,
                  "lanes have 4 words of two results each");
    unsigned words[WarpWords::kCount];
#pragma unroll
    for (int k = 0; k < WarpWords::kCount; ++k) {
        Sum done[WarpWords::kElements];
#pragma unroll
        for (int e = 0; e < WarpWords::kElements; ++e)
            done[e] = finished<C>(sums[k * WarpWords::kElements + e], values, {});
        words[k] = rounded_pair<typename C::Element>(done[0], done[1]);
    }
    WarpWords::trade(words);
    const int moved = WarpWords::moved(static_cast<int>(threadIdx.x % 32));
#pragma unroll
    for (int k = 0; k < WarpWords::kCount; ++k)
        if (column + moved + k * WarpWords::kStep < out_w)
            *reinterpret_cast<unsigned*>(tensors.y + at + moved + k * WarpWords::kStep) = words[k];
}

}  // namespace dwconv
