// matrix_rows.cuh: how matrix_nhwc's rows of x come to shared memory, and how its rows of y leave it
//   A block makes `part_rows` output rows of one chunk of channels and one strip of columns, of `slots` images at a
//   time: rows of one group of images after the other, as if they were one tall image. What it makes of one group is a
//   unit; its steps are kRows input rows each, with zeros for those above and below the image. All groups are full: the
//   last one starts earlier, and makes some outputs again.
#pragma once
#include "bands.cuh"
#include "copies.cuh"

namespace dwconv {

struct MatrixMarchTiling {
    FastDivisor chunks, column_strips, out_rows;
    unsigned slots, groups;  // images side by side; groups of eight outputs of each, side by side
    unsigned images;
    unsigned rows, part_rows;  // output rows of all groups of images, one below the other; of a block
    unsigned units;            // of eight pixels of x that a slot keeps
    unsigned unit_stride;      // ceil(units / kStrideW): see unit_place
    unsigned columns;          // of x that a slot reads, from the strip's first one on
    // Of the rows of channels, in elements: from slot to slot, from channel to channel.
    unsigned plane_slot, plane_pitch;
    unsigned step_place;       // of the steps, in elements from the rows of channels on; a multiple of 8
    unsigned y_row, y_column;  // elements of y from row to row, from column to column
};

template <class C>
struct MatrixRows {
    // Elements from pixel to pixel in shared memory: an odd number of 16 bytes, so that eight of them, read or
    // written together, are in different banks.
    static constexpr int kPixel = C::kChannels / 8 % 2 == 1 ? C::kChannels : C::kChannels + 8;
    // Results of a row: 16 groups of eight pixels, and 16 bytes between them, so that they start in different banks.
    static constexpr int kGroup = 8 * kPixel + 8, kResults = 16 * kGroup;
    static constexpr int kLive = ceil_div(C::kFilterH, C::kStrideH);  // output rows that one input row adds to
    static constexpr int kOutputs = C::kRows / C::kStrideH;           // output rows that a step completes
    static constexpr int kFirst = (C::kFilterH - 1) % C::kStrideH;    // its row that completes the first of them
    // Of a tap in memory: its filter row and column. Turned, rows of x and of the filter are columns in memory.
    __device__ __forceinline__ static int tap_row(int tap) {
        return C::kTurned ? tap % C::kFilterH : tap / C::kFilterW;
    }
    __device__ __forceinline__ static int tap_column(int tap) {
        return C::kTurned ? tap / C::kFilterH : tap % C::kFilterW;
    }
    static_assert(C::kRows % C::kStrideH == 0, "a step begins with the row that a new output row begins with");
    static_assert(C::kRows <= 8, "a step's rows are bits of a byte");
    static_assert(C::kOwn <= 2 && C::kChannels % 8 == 0, "a warp has one or two channels, a block whole vectors");
    static_assert(C::kPadTop < C::kFilterH, "every output row must read a step's row");
    static_assert(C::kDilationH == 1, "a step moves the sums on by one row");
    static_assert(C::kMultiplier == 1, "a channel of x is one of y");
    static_assert(C::kStages >= 2, "one step's rows are read while another one's arrive");
};

// The number of a thread among those that copy, turn and store.
template <class C>
__device__ __forceinline__ int helper_thread() {
    return static_cast<int>(threadIdx.x) - 32 * C::kWarps;
}

// A barrier of all threads. They come to it from the code of different roles.
__device__ __forceinline__ void meet() { __syncthreads(); }

// Where eight pixels, the unit-th of a slot, lie in a row of a channel: every kStrideW-th of them side by side, since a
// product reads them together.
template <class C>
__device__ __forceinline__ int unit_place(int unit, const MatrixMarchTiling& tiling) {
    if constexpr (C::kStrideW == 1) return unit * 8;
    return (unit % C::kStrideW * static_cast<int>(tiling.unit_stride) + unit / C::kStrideW) * 8;
}

// Where a word of a pixel lies in the results: the words of 16 bytes are turned around by the number of the pixel's
// group, since the same word of 32 pixels is written at a time.
__device__ __forceinline__ int turns_of(int group) { return group / 2 % 4; }
__device__ __forceinline__ int turned_word(int word, int group) { return word / 4 * 4 + (word + turns_of(group)) % 4; }

// A line of the block's timetable: what is copied now, and what is computed now, kStages steps behind. In bytes, from
// x and y on, for column 0 and channel 0 of the first image.
struct alignas(16) MatrixStep {
    long long from;  // the first row to copy
    long long to;    // the first output row that is completed
    unsigned rows;   // bit d: row d of those to copy exists; bit 8 + k: the k-th output row completed is the unit's
    int image, row;  // of the first output row completed
    int begins;      // whether a new unit begins after this step
};

// All lines.
template <class C>
struct MatrixSteps {
    using R = MatrixRows<C>;
    const Sizes& sizes;
    const MatrixMarchTiling& tiling;
    int height, group, first, of_first, whole, rest;  // output rows: of an image, of the first unit, ...
    int first_steps, whole_steps;
    int count;

    // Steps that lie above the image as a whole are left out: they add nothing to sums that hold the bias.
    __device__ __forceinline__ static int above(int out_first) {
        return larger(0, C::kPadTop - out_first * C::kStrideH) / C::kRows;
    }
    // Of a unit that makes these output rows.
    __device__ __forceinline__ static int steps(int out_first, int out_end) {
        return ((out_end - 1 - out_first) * C::kStrideH + C::kFilterH - 1) / C::kRows + 1 - above(out_first);
    }

    __device__ __forceinline__ MatrixSteps(unsigned position, unsigned end, const Sizes& sizes,
                                           const MatrixMarchTiling& tiling)
        : sizes(sizes), tiling(tiling) {
        const int rows = static_cast<int>(end - position);
        height = static_cast<int>(tiling.out_rows.divisor);
        group = static_cast<int>(tiling.out_rows.quotient(position));
        first = static_cast<int>(position) - group * height;
        of_first = smaller(rows, height - first);
        whole = (rows - of_first) / height;
        rest = rows - of_first - whole * height;
        first_steps = steps(first, first + of_first);
        whole_steps = steps(0, height);
        count = first_steps + whole * whole_steps + (rest > 0 ? steps(0, rest) : 0);
    }

    // Of one step: its first input row, the first output row that it completes, and their unit.
    struct Place {
        int row, out_row, image, out_first, out_end;
        bool ends;
    };
    __device__ __forceinline__ Place place(int at) const {
        const int unit = at < first_steps ? 0 : (at - first_steps) / whole_steps + 1;
        const int of_unit = at < first_steps ? at : at - first_steps - (unit - 1) * whole_steps;
        Place found;
        found.out_first = unit == 0 ? first : 0;
        found.out_end = unit == 0 ? first + of_first : unit <= whole ? height : rest;
        found.image =
            smaller((group + unit) * static_cast<int>(tiling.slots), static_cast<int>(tiling.images - tiling.slots));
        const int before = above(found.out_first) + of_unit;
        found.row = found.out_first * C::kStrideH - C::kPadTop + before * C::kRows;
        found.out_row = found.out_first + before * R::kOutputs - (C::kFilterH - 1 - R::kFirst) / C::kStrideH;
        found.ends = of_unit + 1 == steps(found.out_first, found.out_end);
        return found;
    }

    // Line `at`, from -kStages on: those before 0 compute nothing.
    __device__ __forceinline__ MatrixStep line(int at) const {
        MatrixStep line = {};
        if (at + C::kStages < count) {
            const Place copied = place(at + C::kStages);
            line.from = 2 * (copied.image * sizes.x_image + copied.row * sizes.x_row);
            for (int d = 0; d < C::kRows; ++d)
                line.rows |= copied.row + d >= 0 && copied.row + d < sizes.in_h ? 1u << d : 0u;
        }
        if (at >= 0) {
            const Place made = place(at);
            line.image = made.image;
            line.row = made.out_row;
            line.to = 2 * (made.image * sizes.out_h * sizes.out_w * sizes.out_channels +
                           made.out_row * static_cast<long long>(tiling.y_row));
            for (int k = 0; k < R::kOutputs; ++k) {
                const int row = made.out_row + k;
                line.rows |= row >= made.out_first && row < made.out_end ? 256u << k : 0u;
            }
            line.begins = made.ends;
        }
        return line;
    }

    // Lines -1 to count - 1, by the threads that copy.
    __device__ __forceinline__ void write(MatrixStep* lines) const {
        for (int at = helper_thread<C>() - 1; at < count; at += 32 * C::kHelpers) lines[at + 1] = line(at);
    }
};

// What a thread copies of each row: eight channels of some pixels.
template <class C>
struct MatrixFetch {
    using T = typename C::Element;
    const unsigned char* from[C::kLoads];  // in row 0 of image 0
    int into[C::kLoads];                   // in bytes of a row of shared memory; negative: nothing

    __device__ __forceinline__ MatrixFetch(const T* x, const Sizes& sizes, const MatrixMarchTiling& tiling,
                                           int first_channel, int first_column) {
        constexpr int kOctets = C::kChannels / 8;
        const int begin = first_column * C::kStrideW - C::kPadLeft;  // of the slot's pixels, in x
        const int count = static_cast<int>(tiling.slots * tiling.columns) * kOctets;
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k) {
            const int number = helper_thread<C>() + k * 32 * C::kHelpers;
            const int octet = number % kOctets, pixel = number / kOctets;
            const int slot = pixel / static_cast<int>(tiling.columns);
            const int column = pixel - slot * static_cast<int>(tiling.columns);
            const bool exists = number < count && begin + column >= 0 && begin + column < sizes.in_w &&
                                first_channel + octet * 8 < sizes.out_channels;
            const long long at = slot * sizes.x_image + (begin + column) * sizes.x_column + first_channel + octet * 8;
            from[k] = reinterpret_cast<const unsigned char*>(exists ? x + at : x);
            into[k] = 2 * ((slot * static_cast<int>(tiling.units) * 8 + column) * MatrixRows<C>::kPixel + octet * 8);
            if (!exists) into[k] = -1;
            keep(into[k]);
        }
    }

    // Copies the rows of a line to a stage; rows that don't exist become zeros.
    __device__ __forceinline__ void copy(const MatrixStep& line, long long row_bytes, unsigned char* stage,
                                         int stage_row) const {
        const long long first = line.from;
        const unsigned exist = line.rows;
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k)
#pragma unroll
            for (int d = 0; d < C::kRows; ++d)
                if (into[k] >= 0)
                    copy_piece_or_zero<16, true>(stage + (d * stage_row + into[k]), from[k] + (first + d * row_bytes),
                                                 exist & 1u << d);
        end_of_copies();
    }
};

// Makes zeros of what stands beside the image in all stages, where nothing is copied; by the warps that multiply.
template <class C>
__device__ __forceinline__ void clear_beside(unsigned char* stages, const Sizes& sizes, const MatrixMarchTiling& tiling,
                                             int first_channel, int first_column) {
    constexpr int kOctets = C::kChannels / 8;
    const int begin = first_column * C::kStrideW - C::kPadLeft, pixels = static_cast<int>(tiling.units) * 8;
    const int lines = C::kStages * C::kRows * static_cast<int>(tiling.slots);
    for (int line = static_cast<int>(threadIdx.x / 32); line < lines; line += C::kWarps)
        for (int at = static_cast<int>(threadIdx.x % 32); at < pixels * kOctets; at += 32) {
            const int pixel = at / kOctets, octet = at % kOctets;
            const bool exists = pixel < static_cast<int>(tiling.columns) && begin + pixel >= 0 &&
                                begin + pixel < sizes.in_w && first_channel + octet * 8 < sizes.out_channels;
            if (!exists)
                *reinterpret_cast<uint4*>(stages + 2 * ((line * pixels + pixel) * MatrixRows<C>::kPixel + octet * 8)) =
                    uint4{0, 0, 0, 0};
        }
}

// What a thread stores of each row: eight channels of some pixels.
template <class C>
struct MatrixStores {
    using T = typename C::Element;
    unsigned char* into[C::kStores];  // in row 0 of image 0
    int from[C::kStores];             // in bytes of a row of the results; negative: nothing
    int turns[C::kStores];            // how far its words are turned around

    __device__ __forceinline__ MatrixStores(T* y, const Sizes& sizes, const MatrixMarchTiling& tiling,
                                            int first_channel, int first_column) {
        constexpr int kOctets = C::kChannels / 8;
        const int columns = static_cast<int>(tiling.groups) * 8;
#pragma unroll
        for (int k = 0; k < C::kStores; ++k) {
            const int number = helper_thread<C>() + k * 32 * C::kHelpers;
            const int octet = number % kOctets, pixel = number / kOctets;
            const int slot = pixel / columns, column = pixel - slot * columns;
            const bool exists = slot < static_cast<int>(tiling.slots) && first_column + column < sizes.out_w &&
                                first_channel + octet * 8 < sizes.out_channels;
            into[k] = reinterpret_cast<unsigned char*>(
                y + (slot * sizes.out_h * sizes.out_w * sizes.out_channels +
                     (first_column + column) * static_cast<long long>(tiling.y_column) + first_channel + octet * 8));
            from[k] = exists ? 2 * (pixel * MatrixRows<C>::kPixel + pixel / 8 * 8 + octet * 8) : -1;
            turns[k] = turns_of(pixel / 8);
            keep(from[k]);
            keep(turns[k]);
        }
    }

    // Stores a row of results; `to`: of the row, in bytes.
    __device__ __forceinline__ void store(const unsigned char* results, long long to) const {
#pragma unroll
        for (int k = 0; k < C::kStores; ++k) {
            if (from[k] < 0) continue;
            const uint4 turned = *reinterpret_cast<const uint4*>(results + from[k]);
            const uint4 once = turns[k] & 1 ? uint4{turned.y, turned.z, turned.w, turned.x} : turned;
            *reinterpret_cast<uint4*>(into[k] + to) = turns[k] & 2 ? uint4{once.z, once.w, once.x, once.y} : once;
        }
    }
};

}  // namespace dwconv
