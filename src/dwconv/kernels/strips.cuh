// strips.cuh: groups of lanes that own strips of columns: what channels-first kernels share
//   A group of `lanes` threads makes kRows output rows of one strip: lanes * kSlots * kVector columns.
//   Groups are numbered row strip fastest, then column strip, then plane: row strips are neighbours in a block.
#pragma once
#include "common.cuh"

namespace dwconv {

struct StripTiling {
    FastDivisor row_strips;     // of one column strip
    FastDivisor column_strips;  // of one plane
    FastDivisor out_channels;   // of one image
    unsigned groups;            // planes * column strips * row strips
    unsigned log2_lanes;        // lanes in a group: 1 to 32, fewer for narrow images
};

// Which input columns one lane owns, which ones its outputs read, and who holds the difference.
//
//   A slot of a lane makes kVector neighbouring outputs and loads kOwn neighbouring inputs. Slots are interleaved over
//   the lanes (slot s of lane l stands at (s * lanes + l) * kOwn), so that a warp's loads and stores are contiguous.
//   Numbered from the first owned column, the outputs read columns kFirst ... kLast. Those outside 0 ... kOwn-1 belong
//   to other lanes and come by shuffle; those outside the whole strip are its halo, loaded by the lanes at its ends.
template <class C>
struct StripColumns {
    static constexpr int kOwn = C::kVector * C::kStrideW;
    static constexpr int kFirst = -C::kPadLeft - C::kColumnShift;
    static constexpr int kLast = kFirst + (C::kVector - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW;
    static constexpr int kSpan = kLast - kFirst + 1;
    // Columns of the strip's halo, left and right of it; none where a strip is as wide as the image, whose rows end
    // there.
    static constexpr int kLeft = C::kWholeRows ? 0 : larger(0, -kFirst);
    static constexpr int kRight = C::kWholeRows ? 0 : larger(0, kLast - kOwn + 1);
    static constexpr int kLeftLanes = ceil_div(kLeft, kOwn);
    static constexpr int kRightLanes = ceil_div(kRight, kOwn);
    static constexpr int kLeftEach = smaller(kLeft, kOwn);  // halo columns that one lane loads
    static constexpr int kRightEach = smaller(kRight, kOwn);
    static constexpr int kHalo = larger(kLeftEach, kRightEach);

    __host__ __device__ static constexpr bool halo_comes_in(int width) {
        return C::kLoadVector % width == 0 && kLeftEach % width == 0 && kRightEach % width == 0;
    }
    static constexpr int kHaloVector = halo_comes_in(8) ? 8 : halo_comes_in(4) ? 4 : halo_comes_in(2) ? 2 : 1;

    // Does any output read column kFirst + k? (Not all are read where dilation or stride leave gaps.)
    __host__ __device__ static constexpr bool reads(int k) {
        for (int o = 0; o < C::kVector; ++o)
            if (is_tap(k - o * C::kStrideW, C::kDilationW, C::kFilterW)) return true;
        return false;
    }
};

// What a lane holds of one input row: slot s in columns[s + 1], and in columns[0] and columns[kSlots + 1] what lanes
// left and right of the strip would own. That is its halo, which the lanes at its ends hold for all; zeros elsewhere.
template <class C>
struct StripRow {
    typename C::Element columns[C::kSlots + 2][StripColumns<C>::kOwn];
};

// The place of a thread: which plane, which rows and columns.
struct StripPlace {
    unsigned plane;            // of the output: image * C*M + channel
    long long image, channel;  // of the output
    int row, column;           // first output row and column of the lane, in slot 0
    int lanes, lane;           // lanes of the group, and this thread's number in it
    bool inside;               // false in groups past the last one: they take part in shuffles and store nothing
};

template <class C>
__device__ __forceinline__ StripPlace strip_place(const StripTiling& tiling) {
    const unsigned group = (blockIdx.x * C::kThreads + threadIdx.x) >> tiling.log2_lanes;
    const unsigned column_strip = tiling.row_strips.quotient(group);
    const unsigned plane = tiling.column_strips.quotient(column_strip);
    const unsigned image = tiling.out_channels.quotient(plane);
    StripPlace place;
    place.lanes = 1 << tiling.log2_lanes;
    place.lane = threadIdx.x & (place.lanes - 1);
    place.plane = plane;
    place.image = image;
    place.channel = plane - image * tiling.out_channels.divisor;
    place.row = (group - column_strip * tiling.row_strips.divisor) * C::kRows;
    place.column = (column_strip - plane * tiling.column_strips.divisor) * (place.lanes * C::kSlots * C::kVector) +
                   place.lane * C::kVector;
    place.inside = group < tiling.groups;
    return place;
}

// Reads Width columns, the first of them number `column` of a row, from `address`; zeros where they lie outside of the
// row (whole vectors do, as W is a multiple of Width).
template <int Width, class T>
__device__ __forceinline__ void load_columns(const T* address, bool row_inside, int column, int in_w, T* into) {
    Vector<T, Width> values = {};
    if (row_inside && static_cast<unsigned>(column) < static_cast<unsigned>(in_w)) values = load_vector<Width>(address);
#pragma unroll
    for (int k = 0; k < Width; ++k) into[k] = values.element[k];
}

// Reads a lane's share of a row; `address` is that of its first own column, which has number `first` in the row.
template <class C>
__device__ __forceinline__ void load_row(const typename C::Element* address, bool row_inside, const StripPlace& place,
                                         int first, int in_w, StripRow<C>& into) {
    using Columns = StripColumns<C>;
    constexpr int kOwn = Columns::kOwn;
    const int slot = place.lanes * kOwn;
#pragma unroll
    for (int s = 0; s < C::kSlots; ++s)
#pragma unroll
        for (int k = 0; k < kOwn; k += C::kLoadVector)
            load_columns<C::kLoadVector>(address + s * slot + k, row_inside, first + s * slot + k, in_w,
                                         &into.columns[s + 1][k]);
    typename C::Element halo[larger(1, Columns::kHalo)] = {};
    if constexpr (Columns::kHalo > 0) {
        const bool right = place.lane < Columns::kRightLanes;
        const bool left = place.lane >= place.lanes - Columns::kLeftLanes;
        const int away = right ? C::kSlots * slot : kOwn - Columns::kLeftEach - slot;
        const int each = right ? Columns::kRightEach : Columns::kLeftEach;
#pragma unroll
        for (int k = 0; k < Columns::kHalo; k += Columns::kHaloVector)
            load_columns<Columns::kHaloVector>(address + away + k, row_inside && (right || left) && k < each,
                                               first + away + k, in_w, &halo[k]);
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        const int from_left = k - (kOwn - Columns::kLeftEach);
        into.columns[0][k] = from_left >= 0 ? halo[from_left] : typename C::Element(0);
        into.columns[C::kSlots + 1][k] = k < Columns::kRightEach ? halo[k] : typename C::Element(0);
    }
}

// Column `offset` of slot s, numbered from the lane's first own column; all lanes of the warp must call it.
template <class C>
__device__ __forceinline__ typename C::Element column_of(const StripRow<C>& row, int s, int offset,
                                                         const StripPlace& place) {
    using Columns = StripColumns<C>;
    const int away = floor_div(offset, Columns::kOwn);  // lanes to the right
    const int k = offset - away * Columns::kOwn;
    if (away == 0) return row.columns[s + 1][k];
    // A lane that others reach by going round the end of the group hands out the neighbouring slot, or the halo.
    const bool round = away > 0 ? place.lane < away : place.lane >= place.lanes + away;
    const typename C::Element given = round ? row.columns[away > 0 ? s + 2 : s][k] : row.columns[s + 1][k];
    return __shfl_sync(0xffffffffu, given, (place.lane + away) & (place.lanes - 1), place.lanes);
}

// Writes a lane's sums of one row; `address` is that of its first column in slot 0.
template <class C, class Sum>
__device__ __forceinline__ void store_row(typename C::Element* address, const StripPlace& place, int out_w,
                                          const Sum (&sums)[C::kSlots][C::kVector]) {
    using T = typename C::Element;
    const int slot = place.lanes * C::kVector;
#pragma unroll
    for (int s = 0; s < C::kSlots; ++s)
#pragma unroll
        for (int o = 0; o < C::kVector; o += C::kStoreVector) {
            Vector<T, C::kStoreVector> values;
#pragma unroll
            for (int k = 0; k < C::kStoreVector; ++k) values.element[k] = static_cast<T>(sums[s][o + k]);
            if (place.column + s * slot + o < out_w) store_vector<C::kStoreVector>(address + s * slot + o, values);
        }
}

// Starts the sums of a thread: with the bias of its channel, or with zeros.
template <class C, class Sum>
__device__ __forceinline__ void start_sums(const typename C::Element* b, const StripPlace& place,
                                           Sum (&sums)[C::kRows][C::kSlots][C::kVector]) {
    const Sum bias = C::kHasBias ? static_cast<Sum>(__ldg(b + place.channel)) : Sum(0);
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
        for (int s = 0; s < C::kSlots; ++s)
#pragma unroll
            for (int o = 0; o < C::kVector; ++o) sums[i][s][o] = bias;
}

// Writes the sums of a thread to its rows of y.
template <class C, class Sum>
__device__ __forceinline__ void store_sums(typename C::Element* y, const Sizes& sizes, const StripPlace& place,
                                           const Sum (&sums)[C::kRows][C::kSlots][C::kVector]) {
    if (!place.inside) return;
    const long long plane_rows = (place.image * sizes.out_channels + place.channel) * sizes.out_h;
    typename C::Element* out = y + (plane_rows + place.row) * sizes.out_w + place.column;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i, out += sizes.out_w)
        if (place.row + i < sizes.out_h) store_row<C>(out, place, static_cast<int>(sizes.out_w), sums[i]);
}

}  // namespace dwconv
