// staged_planes.cuh: items of whole planes, or of ranges of a plane's rows and columns, and their way into shared
// memory
#pragma once
#include "epilogue.cuh"

namespace dwconv {

// Division of numbers below 2^16 by a divisor below 2^15: quotient(n) = 2n * multiplier / 2^32, exact.
struct ShortDivisor {
    unsigned divisor, multiplier;

    __device__ __forceinline__ int quotient(int n) const {
        return static_cast<int>(static_cast<unsigned long long>(static_cast<unsigned>(n) * 2) * multiplier >> 32);
    }
};

struct StagedNchwTiling {
    FastDivisor row_items, column_items;  // items that a plane is cut into, downwards and sideways
    FastDivisor out_channels;
    ShortDivisor column_tiles, tile_planes;   // of an item: tiles side by side, output planes
    ShortDivisor line_units;                  // kStretch: in_w; else the granules that cover a row of an item
    ShortDivisor lines;                       // input rows of one plane in an item, at most; in_h if kStretch
    unsigned item_planes;                     // input planes of an item
    unsigned item_rows, item_columns;         // outputs of an item in each plane
    unsigned in_plane, out_plane;             // elements of x and y in a plane
    unsigned pitch, plane_pitch;              // elements of shared memory from row to row, from plane to plane
    unsigned plane_gap;                       // from one plane's row `lines` to the next one's row 0
    unsigned filter_elements, image_vectors;  // of shared memory; vectors of 16 bytes
    // kMarch (kernels/staged_march.cuh), where items belong to warps:
    FastDivisor channel_groups;             // of item_planes channels, in an image
    unsigned warp_elements, ring_elements;  // of shared memory, in all and of the ring
    unsigned out_pitch;                     // from plane to plane in the buffer of outputs
    // Lanes that share a plane, planes at a time; the step to a lane's next plane in memory, and in shared memory.
    unsigned copy_lanes, copy_planes, copy_step, copy_pitch;
    unsigned store_lanes, store_planes, store_step, store_pitch;
};

// The columns of shared memory around a tile: column 0 of an item's outputs reads from column kShift on.
template <class C>
struct StagedWindow {
    static constexpr int kLead = ceil_div(C::kPadLeft, C::kGranule) * C::kGranule;  // before the first input column
    static constexpr int kShift = kLead - C::kPadLeft;
    static constexpr int kEnd = kShift + (C::kColumns - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW + 1;
    static constexpr int kQuads = ceil_div(kEnd, 4);

    // Does the tile read any of these four columns?
    __host__ __device__ static constexpr bool reads(int quad) {
        for (int o = 0; o < C::kColumns; ++o)
            for (int k = 4 * quad; k < 4 * quad + 4; ++k)
                if (is_tap(k - kShift - o * C::kStrideW, C::kDilationW, C::kFilterW)) return true;
        return false;
    }
};

// A configuration whose residual is added later.
template <class C>
struct WithoutResidual : C {
    static constexpr bool kHasResidual = false;
};

// What a block works on: outputs [row, row + rows) x [column, column + columns) of the planes.
struct StagedItem {
    unsigned plane, planes;  // input planes
    int row, rows, column, columns;
    int top, in_row, in_rows;  // the input row that row 0 of shared memory stands for; the rows to fetch
};

template <class C>
__device__ __forceinline__ StagedItem staged_item(const Sizes& sizes, const StagedNchwTiling& tiling) {
    StagedItem item;
    const unsigned above = C::kStretch ? blockIdx.x : tiling.column_items.quotient(blockIdx.x);
    const unsigned group = tiling.row_items.quotient(above);
    item.plane = group * tiling.item_planes;
    const unsigned planes = static_cast<unsigned>(sizes.planes) / C::kMultiplier;
    item.planes = planes - item.plane < tiling.item_planes ? planes - item.plane : tiling.item_planes;
    item.row = static_cast<int>((above - group * tiling.row_items.divisor) * tiling.item_rows);
    item.column = C::kStretch ? 0 : (blockIdx.x - above * tiling.column_items.divisor) * tiling.item_columns;
    item.rows = smaller(static_cast<int>(tiling.item_rows), static_cast<int>(sizes.out_h) - item.row);
    item.columns = smaller(static_cast<int>(tiling.item_columns), static_cast<int>(sizes.out_w) - item.column);
    item.top = item.row * C::kStrideH - C::kPadTop;
    item.in_row = larger(item.top, 0);
    int end = static_cast<int>(sizes.in_h);
    if (tiling.item_planes == 1)  // of several planes every row is fetched: they are neighbours in memory
        end = smaller(end, item.top + (item.rows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1);
    item.in_rows = larger(end - item.in_row, 0);
    return item;
}

// Elements from the last multiple of 16 bytes to this address.
template <class T>
__device__ __forceinline__ int staged_head(const T* address) {
    return static_cast<int>(reinterpret_cast<unsigned long long>(address) % 16 / sizeof(T));
}

// `count` neighbouring elements of memory as aligned vectors of 16 bytes, and single ones before and after them.
template <class T>
struct StagedStretch {
    static constexpr int kVector = 16 / sizeof(T);
    const T* memory;
    int before, vectors, count;  // single elements in front; vectors behind them

    __device__ __forceinline__ StagedStretch(const T* memory, int count) : memory(memory), count(count) {
        before = smaller((kVector - staged_head(memory)) % kVector, count);
        vectors = (count - before) / kVector;
    }
    __device__ __forceinline__ int first_of(int vector) const { return before + vector * kVector; }
    __device__ __forceinline__ Vector<T, kVector> load(int vector) const {
        return load_vector<kVector>(memory + first_of(vector));
    }
    // Calls `take` with the single elements, which most stretches don't have.
    template <class Take>
    __device__ __forceinline__ void each_single(const Take& take) const {
        const int after = first_of(vectors);
        if (before > 0 || after < count) {
            if (threadIdx.x < before) take(static_cast<int>(threadIdx.x));
            if (after + static_cast<int>(threadIdx.x) < count) take(after + static_cast<int>(threadIdx.x));
        }
    }
};

// Width neighbouring elements, to shared memory as To.
template <int Width, class T, class To>
__device__ __forceinline__ void put_elements(const T* elements, To* into) {
    constexpr int kWidth = smaller(Width, 16 / sizeof(To));
#pragma unroll
    for (int k = 0; k < Width; k += kWidth) {
        Vector<To, kWidth> values;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) values.element[e] = static_cast<To>(elements[k + e]);
        *reinterpret_cast<Vector<To, kWidth>*>(into + k) = values;
    }
}

// The input of an item as one stretch of memory. Units are its vectors, and single elements at its ends.
template <class C, bool Stretch>
struct StagedInput {
    using T = typename C::Element;
    using Held = Vector<T, 16 / sizeof(T)>;
    StagedStretch<T> stretch;
    const StagedNchwTiling& tiling;
    int lead;

    __device__ __forceinline__ StagedInput(const T* x, const Sizes& sizes, const StagedNchwTiling& tiling,
                                           const StagedItem& item)
        : stretch(x + (static_cast<long long>(item.plane) * tiling.in_plane +
                       static_cast<unsigned>(item.in_row) * tiling.line_units.divisor),
                  item.planes * item.in_rows * tiling.line_units.divisor),
          tiling(tiling),
          lead((item.in_row - item.top) * tiling.pitch + StagedWindow<C>::kLead) {}

    __device__ __forceinline__ int units() const { return stretch.vectors; }
    __device__ __forceinline__ Held load(int unit) const { return stretch.load(unit); }

    // Where element `at` of the stretch goes to; how many elements there are from it to the end of its row; and what
    // lies between that row and the next.
    struct Place {
        int into, left, gap;
    };
    __device__ __forceinline__ Place place(int at) const {
        const int line = tiling.line_units.quotient(at), plane = tiling.lines.quotient(line);
        const int width = tiling.line_units.divisor, gap = tiling.pitch - width;
        const bool is_last = line + 1 == (plane + 1) * static_cast<int>(tiling.lines.divisor);
        return {lead + at + line * gap + plane * static_cast<int>(tiling.plane_gap), (line + 1) * width - at,
                is_last ? gap + static_cast<int>(tiling.plane_gap) : gap};
    }
    __device__ __forceinline__ void store(int unit, const Held& held, T* image) const {
        const Place at = place(stretch.first_of(unit));
        T* const into = image + at.into;
#pragma unroll
        for (int k = 0; k < StagedStretch<T>::kVector; k += C::kGranule)  // two rows at most: they are long enough
            put_elements<C::kGranule>(&held.element[k], (k < at.left ? into : into + at.gap) + k);
    }
    __device__ __forceinline__ void store_singles(T* image) const {
        stretch.each_single([&](int at) { image[place(at).into] = load_one(stretch.memory + at); });
    }
};

// The input of an item row by row. Units are granules.
template <class C>
struct StagedInput<C, false> {
    using T = typename C::Element;
    using Held = Vector<T, C::kGranule>;
    const T* x;
    const Sizes& sizes;
    const StagedNchwTiling& tiling;
    const StagedItem& item;
    int first, last;  // columns [first, last)

    __device__ __forceinline__ StagedInput(const T* x, const Sizes& sizes, const StagedNchwTiling& tiling,
                                           const StagedItem& item)
        : x(x), sizes(sizes), tiling(tiling), item(item) {
        const int end =
            (item.column + item.columns - 1) * C::kStrideW - C::kPadLeft + (C::kFilterW - 1) * C::kDilationW + 1;
        first = larger(item.column * C::kStrideW - StagedWindow<C>::kLead, 0);
        last = smaller(ceil_div(larger(end, 0), C::kGranule) * C::kGranule, static_cast<int>(sizes.in_w));
    }

    struct Place {
        int plane, row, column;
        bool exists;
    };
    __device__ __forceinline__ Place place(int unit) const {
        const int line = tiling.line_units.quotient(unit);
        Place at;
        at.plane = tiling.lines.quotient(line);
        at.row = line - at.plane * tiling.lines.divisor;
        at.column = first + (unit - line * tiling.line_units.divisor) * C::kGranule;
        at.exists = at.row < item.in_rows && at.column < last;
        return at;
    }
    __device__ __forceinline__ int units() const {
        return item.planes * tiling.lines.divisor * tiling.line_units.divisor;
    }
    __device__ __forceinline__ Held load(int unit) const {
        const Place at = place(unit);
        if (!at.exists) return {};
        const unsigned plane = item.plane + at.plane;
        const unsigned image = tiling.out_channels.quotient(plane * C::kMultiplier);
        const unsigned channel = plane - image * (tiling.out_channels.divisor / C::kMultiplier);
        return load_vector<C::kGranule>(x + image * sizes.x_image + channel * sizes.x_channel +
                                        (item.in_row + at.row) * sizes.x_row + at.column);
    }
    __device__ __forceinline__ void store(int unit, const Held& held, T* image) const {
        const Place at = place(unit);
        if (!at.exists) return;
        const int into = at.plane * tiling.plane_pitch + (item.in_row - item.top + at.row) * tiling.pitch +
                         StagedWindow<C>::kLead - item.column * C::kStrideW + at.column;
        put_elements<C::kGranule>(held.element, image + into);
    }
    __device__ __forceinline__ void store_singles(T*) const {}
};

// Copies the filters of output planes [plane, plane + planes) to shared memory, one after the other.
// Returns where the first stands: as far from a multiple of 16 bytes as vectors of them can be stored.
template <class C, class Sum>
__device__ __forceinline__ Sum* share_filters(const typename C::Element* w, Sum* filters, unsigned plane,
                                              unsigned planes, const StagedNchwTiling& tiling) {
    using Stretch = StagedStretch<typename C::Element>;
    constexpr int kTaps = C::kFilterH * C::kFilterW;
    const unsigned channels = tiling.out_channels.divisor;
    unsigned channel = plane - tiling.out_channels.quotient(plane) * channels;
    Sum* const begin = filters + staged_head(w + static_cast<long long>(channel) * kTaps) % 4;
    for (unsigned done = 0; done < planes; channel = 0) {  // once, unless the item reaches into the next image
        const unsigned now = done + channels - channel < planes ? channels - channel : planes - done;
        const Stretch stretch(w + static_cast<long long>(channel) * kTaps, static_cast<int>(now * kTaps));
        Sum* const into = begin + done * kTaps;
        const bool aligned = (into + stretch.before - filters) % 4 == 0;
#pragma unroll 2
        for (int unit = threadIdx.x; unit < stretch.vectors; unit += C::kThreads) {
            const auto held = stretch.load(unit);
            if (aligned)
                put_elements<Stretch::kVector>(held.element, into + stretch.first_of(unit));
            else
#pragma unroll
                for (int k = 0; k < Stretch::kVector; ++k)
                    into[stretch.first_of(unit) + k] = static_cast<Sum>(held.element[k]);
        }
        stretch.each_single([&](int at) { into[at] = static_cast<Sum>(load_one(stretch.memory + at)); });
        done += now;
    }
    return begin;
}

}  // namespace dwconv
