// sparse_rows.cuh: how sparse_nhwc's rows of x come to shared memory, and how its rows of y leave it
//   A block makes `part_rows` output rows of one chunk of channels and one strip of columns, of `slots` images at a
//   time: rows of one group of images after the other, as if they were one tall image. What it makes of one group is a
//   unit; its steps are kRows input rows each, with zeros for those above and below the image. All groups are full: the
//   last one starts earlier, and makes some outputs again.
#pragma once
#include "sparse_bands.cuh"
#include "copies.cuh"

namespace dwconv {

struct SparseTiling {
    FastDivisor chunks, column_strips, out_rows;
    FastDivisor unit_steps;  // of a whole image
    // Pixels of x that a slot copies of a row, and of y that it stores; groups of a slot.
    FastDivisor copied_columns, stored_columns, slot_groups;
    FastDivisor slots;         // images side by side
    unsigned images;           // all
    unsigned rows, part_rows;  // output rows of all groups of images, one below the other; of a block
    unsigned width;            // pixels of shared memory from slot to slot
    // Of shared memory, in bytes: from row to row; all stages, behind which the results lie; from those to the steps.
    unsigned row_bytes, results, table;
    unsigned y_row, y_column;  // elements of y from row to row, from column to column
};

template <class C>
struct SparseRows {
    // Eight channels are an octet. The octets of a pixel change places from pixel to pixel such that those of the same
    // channels of eight neighbouring pixels are in different banks; kFolded: those of twice four, eight pixels apart.
    static constexpr int kOctets = C::kChannels / 8;
    static constexpr int kTurns = kOctets % 8 == 0 ? 8 : kOctets % 4 == 0 ? 4 : kOctets % 2 == 0 ? 2 : 1;
    template <bool Folded = C::kFolded>
    __device__ __forceinline__ static int place(int pixel, int octet) {  // in bytes of a row
        const int number = Folded ? pixel ^ (pixel / 2 & 4) : pixel;
        return 16 * (pixel * kOctets + (octet ^ (number / (8 / kTurns) & (kTurns - 1))));
    }
    // After how many pixels the places are the same again.
    static constexpr int kPeriod = C::kFolded ? 16 : 8;
    static constexpr int kPixel = 2 * C::kChannels;                // bytes from pixel to pixel
    static constexpr int kGroups = 8 * C::kTiles;                  // of a row, of all slots
    static constexpr int kResults = kGroups * C::kPitch * kPixel;  // bytes of a row of results
    // The group of outputs that is column `number` of the products' B. Groups whose pixels are read at the same time,
    // columns 2 * k and 2 * k + 1, are kApart groups apart, so that they are in different banks.
    __device__ __forceinline__ static int group_of(int number) {
        const int low = number / 2 % C::kApart;
        return number / (2 * C::kApart) * (2 * C::kApart) + number % 2 * C::kApart + low;
    }
    // Output rows that a step completes, and that are in the making; the row that completes the first of them; how far
    // that one lies above the output row that begins with the step. kWhole: a step takes images as a whole.
    static constexpr int kOutputs = C::kWhole ? C::kOutRows : C::kRows / C::kStrideH;
    static constexpr int kLive = C::kWhole ? kOutputs : ceil_div(C::kFilterH, C::kStrideH);
    static constexpr int kFirst = (C::kFilterH - 1) % C::kStrideH;
    static constexpr int kBehind = C::kWhole ? 0 : (C::kFilterH - 1 - kFirst) / C::kStrideH;
    static constexpr int kAbove = C::kWhole ? 0 : C::kPadTop;  // rows of zeros above an image
    // The row that completes output row k of images that are taken as a whole.
    __host__ __device__ static constexpr int completing(int k) {
        return smaller(k * C::kStrideH - C::kPadTop + C::kFilterH, C::kRows) - 1;
    }
    // Of a tap in memory: its filter row and column. Turned, rows of x and of the filter are columns in memory.
    __device__ __forceinline__ static int tap_row(int tap) {
        return C::kTurned ? tap % C::kFilterH : tap / C::kFilterW;
    }
    __device__ __forceinline__ static int tap_column(int tap) {
        return C::kTurned ? tap / C::kFilterH : tap % C::kFilterW;
    }
    static_assert(C::kWhole || C::kRows % C::kStrideH == 0,
                  "a step begins with a row that a new output row begins with");
    static_assert(C::kRows <= 8 && kOutputs <= 8, "a step's rows are bits of a byte");
    static_assert(C::kChannels % 8 == 0, "a block has whole vectors of channels");
    static_assert(C::kPadTop < C::kFilterH, "every output row must read a step's row");
    static_assert(C::kDilationH == 1, "a step moves the sums on by one row");
    static_assert(C::kMultiplier == 1, "a channel of x is one of y");
    static_assert(C::kPitch >= 8, "results have room for eight outputs of a group");
    static_assert(C::kStages >= 2, "one step's rows are read while another one's arrive");
};

// A line of the block's timetable: what is copied now, and what is computed now, kStages - 1 steps behind. In bytes,
// from x and y on, for column 0 and channel 0 of the first image.
struct alignas(32) SparseStep {
    long long from;  // the first row to copy
    long long to;    // the first output row that is completed
    unsigned rows;   // bit d: row d of those to copy exists; bit 8 + k: the k-th output row completed is the unit's
    int image, row;  // of the first output row completed
    int begins;      // whether a new unit begins after this step

    // Reads a line, 16 bytes at a time.
    __device__ __forceinline__ static SparseStep read(const SparseStep* line) {
        union {
            uint4 words[2];
            SparseStep step;
        } both = {};
        both.words[0] = reinterpret_cast<const uint4*>(line)[0];
        both.words[1] = reinterpret_cast<const uint4*>(line)[1];
        return both.step;
    }
};

// All lines.
template <class C>
struct SparseSteps {
    using R = SparseRows<C>;
    const Sizes& sizes;
    const SparseTiling& tiling;
    int height, group, first, of_first, whole, rest;  // output rows: of an image, of the first unit, ...
    int first_steps, whole_steps;
    int count;

    // Steps that lie above the image as a whole are left out: they add nothing to sums that hold the bias.
    __device__ __forceinline__ static int above(int out_first) {
        return larger(0, R::kAbove - out_first * C::kStrideH) / C::kRows;
    }
    // Of a unit that makes these output rows.
    __device__ __forceinline__ static int steps(int out_first, int out_end) {
        if (C::kWhole) return 1;
        return ((out_end - 1 - out_first) * C::kStrideH + C::kFilterH - 1) / C::kRows + 1 - above(out_first);
    }

    __device__ __forceinline__ SparseSteps(unsigned position, unsigned end, const Sizes& sizes,
                                           const SparseTiling& tiling)
        : sizes(sizes), tiling(tiling) {
        const int rows = static_cast<int>(end - position);
        height = static_cast<int>(tiling.out_rows.divisor);
        group = static_cast<int>(tiling.out_rows.quotient(position));
        first = static_cast<int>(position) - group * height;
        of_first = smaller(rows, height - first);
        whole = static_cast<int>(tiling.out_rows.quotient(rows - of_first));
        rest = rows - of_first - whole * height;
        first_steps = steps(first, first + of_first);
        whole_steps = static_cast<int>(tiling.unit_steps.divisor);
        count = first_steps + whole * whole_steps + (rest > 0 ? steps(0, rest) : 0);
    }

    // Of one step: its first input row, the first output row that it completes, and their unit.
    struct Place {
        int row, out_row, image, out_first, out_end;
        bool ends;
    };
    __device__ __forceinline__ Place place(int at) const {
        const int unit = at < first_steps ? 0 : static_cast<int>(tiling.unit_steps.quotient(at - first_steps)) + 1;
        const int of_unit = at < first_steps ? at : at - first_steps - (unit - 1) * whole_steps;
        Place found;
        found.out_first = unit == 0 ? first : 0;
        found.out_end = unit == 0 ? first + of_first : unit <= whole ? height : rest;
        found.image = smaller((group + unit) * static_cast<int>(tiling.slots.divisor),
                              static_cast<int>(tiling.images - tiling.slots.divisor));
        const int before = above(found.out_first) + of_unit;
        found.row = found.out_first * C::kStrideH - R::kAbove + before * C::kRows;
        found.out_row = found.out_first + before * R::kOutputs - R::kBehind;
        found.ends = of_unit + 1 == steps(found.out_first, found.out_end);
        return found;
    }

    static constexpr int kAhead = C::kStages - 1;  // steps that rows are copied ahead

    // The part of a line that says what is copied for step `at`.
    __device__ __forceinline__ SparseStep copies(int at) const {
        SparseStep line = {};
        if (at >= count) return line;
        const Place copied = place(at);
        line.from = 2 * (copied.image * sizes.x_image + copied.row * sizes.x_row);
        for (int d = 0; d < C::kRows; ++d)
            line.rows |= copied.row + d >= 0 && copied.row + d < sizes.in_h ? 1u << d : 0u;
        return line;
    }

    // Line `at`: the rows of step at + kAhead are copied while step `at` is computed.
    __device__ __forceinline__ SparseStep line(int at) const {
        SparseStep line = copies(at + kAhead);
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
        return line;
    }

    // All of them, by all threads.
    __device__ __forceinline__ void write(SparseStep* lines) const {
        for (int at = static_cast<int>(threadIdx.x); at < count; at += C::kThreads) lines[at] = line(at);
    }
};

// What a thread copies of each row: eight channels of some pixels.
template <class C>
struct SparseFetch {
    using T = typename C::Element;
    const unsigned char* from[C::kLoads];  // in row 0 of image 0
    int into[C::kLoads];                   // in bytes of a row of shared memory; negative: nothing

    __device__ __forceinline__ SparseFetch(const T* x, const Sizes& sizes, const SparseTiling& tiling,
                                           int first_channel, int first_column) {
        constexpr int kOctets = SparseRows<C>::kOctets;
        const int begin = first_column * C::kStrideW - C::kLead;  // of the slot's pixels, in x
        const int count = static_cast<int>(tiling.slots.divisor * tiling.copied_columns.divisor) * kOctets;
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k) {
            const int number = static_cast<int>(threadIdx.x) + k * C::kThreads;
            const int octet = number % kOctets, pixel = number / kOctets;
            const int slot = static_cast<int>(tiling.copied_columns.quotient(pixel));
            const int column = pixel - slot * static_cast<int>(tiling.copied_columns.divisor);
            const bool exists = number < count && begin + column >= 0 && begin + column < sizes.in_w &&
                                first_channel + octet * 8 < sizes.out_channels;
            // All of a block's images are within 31 bits of each other.
            const int at = slot * static_cast<int>(sizes.x_image) + (begin + column) * static_cast<int>(sizes.x_column);
            from[k] = reinterpret_cast<const unsigned char*>(exists ? x + (at + first_channel + octet * 8) : x);
            into[k] = SparseRows<C>::place(slot * static_cast<int>(tiling.width) + column, octet);
            if (!exists) into[k] = -1;
            keep(into[k]);
        }
    }

    // Copies the rows of a line to a stage; rows that don't exist become zeros.
    __device__ __forceinline__ void copy(const SparseStep& line, long long row_bytes, unsigned char* stage,
                                         int stage_row) const {
        const long long first = line.from;
        const unsigned exist = line.rows;
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k)
#pragma unroll
            for (int d = 0; d < C::kRows; ++d)
                if (into[k] >= 0)
                    copy_piece_or_zero<16, C::kCached>(stage + (d * stage_row + into[k]),
                                                       from[k] + (first + d * row_bytes), exist & 1u << d);
        end_of_copies();
    }
};

// Makes zeros of what stands beside the image, where nothing is copied, in as many stages as are used.
template <class C>
__device__ __forceinline__ void clear_beside(unsigned char* stages, int used, const Sizes& sizes,
                                             const SparseTiling& tiling, int first_channel, int first_column) {
    using R = SparseRows<C>;
    constexpr int kLanes = C::kWhole ? 8 : 32;  // that clear a slot of a row; whole images have little beside them
    const int begin = first_column * C::kStrideW - C::kLead, pixels = static_cast<int>(tiling.width);
    const int slots = static_cast<int>(tiling.slots.divisor);
    // Pixels `left` to `right` - 1 of a slot are the image's.
    const int right = smaller(static_cast<int>(tiling.copied_columns.divisor), static_cast<int>(sizes.in_w) - begin);
    const int left = smaller(larger(-begin, 0), right), beside = pixels - (right - left);
    const int octets = smaller(R::kOctets, (static_cast<int>(sizes.out_channels) - first_channel) / 8);
    const int lane = threadIdx.x % kLanes;
#pragma unroll 1
    for (int line = threadIdx.x / kLanes; line < used * C::kRows * slots; line += C::kThreads / kLanes) {
        const int row = static_cast<int>(tiling.slots.quotient(line)), first = (line - row * slots) * pixels;
        unsigned char* const at = stages + row * static_cast<int>(tiling.row_bytes);
#pragma unroll 1
        for (int number = lane; number < beside * R::kOctets; number += kLanes) {
            const int k = number / R::kOctets, pixel = k < left ? k : k + (right - left);
            *reinterpret_cast<uint4*>(at + R::place(first + pixel, number % R::kOctets)) = uint4{0, 0, 0, 0};
        }
        if (octets == R::kOctets) continue;
#pragma unroll 1
        for (int number = lane; number < pixels * R::kOctets; number += kLanes)
            if (number % R::kOctets >= octets)
                *reinterpret_cast<uint4*>(at + R::place(first + number / R::kOctets, number % R::kOctets)) =
                    uint4{0, 0, 0, 0};
    }
}

// What a thread stores of each row: eight channels of some pixels.
template <class C>
struct SparseStores {
    using R = SparseRows<C>;
    using T = typename C::Element;
    unsigned char* into[C::kStores];  // in row 0 of image 0
    int from[C::kStores];             // in bytes of a row of the results
    bool exists[C::kStores];

    __device__ __forceinline__ SparseStores(T* y, const Sizes& sizes, const SparseTiling& tiling, int first_channel,
                                            int first_column) {
        constexpr int kOctets = SparseRows<C>::kOctets;
        const int groups = static_cast<int>(tiling.slot_groups.divisor);
        const int columns = static_cast<int>(tiling.stored_columns.divisor);
        const int image = static_cast<int>(sizes.out_h * sizes.out_w * sizes.out_channels);
#pragma unroll
        for (int k = 0; k < C::kStores; ++k) {
            const int number = static_cast<int>(threadIdx.x) + k * C::kThreads;
            const int octet = number % kOctets, pixel = number / kOctets;
            const int slot = static_cast<int>(tiling.stored_columns.quotient(pixel));
            const int column = pixel - slot * columns, group = column / C::kGroup;
            exists[k] = slot < static_cast<int>(tiling.slots.divisor) && first_column + column < sizes.out_w &&
                        first_channel + octet * 8 < sizes.out_channels;
            const int at = slot * image + (first_column + column) * static_cast<int>(tiling.y_column);
            into[k] = reinterpret_cast<unsigned char*>(exists[k] ? y + (at + first_channel + octet * 8) : y);
            from[k] = exists[k] ? R::template place<false>(
                                      (slot * groups + group) * C::kPitch + column - group * C::kGroup, octet)
                                : 0;
            keep(from[k]);
        }
    }

    // A row of results is read first and stored later, so that what is between hides the reading.
    using Words = uint4[C::kStores];
    __device__ __forceinline__ void read(Words& words, const unsigned char* results) const {
#pragma unroll
        for (int k = 0; k < C::kStores; ++k) words[k] = *reinterpret_cast<const uint4*>(results + from[k]);
    }
    // `to`: of the row, in bytes.
    __device__ __forceinline__ void store(const Words& words, long long to, bool is_made) const {
#pragma unroll
        for (int k = 0; k < C::kStores; ++k)
            if (exists[k] && is_made) *reinterpret_cast<uint4*>(into[k] + to) = words[k];
    }
};

}  // namespace dwconv
