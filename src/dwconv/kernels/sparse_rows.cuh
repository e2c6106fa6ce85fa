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

// Elements of y from image to image; like those of x they are fewer than 2^31.
__device__ __forceinline__ int image_of_y(const Sizes& sizes) {
    return static_cast<int>(sizes.out_h) * static_cast<int>(sizes.out_w) * static_cast<int>(sizes.out_channels);
}

// One multiplication, also where the compiler would widen a factor outside of a loop, and need three.
__device__ __forceinline__ long long wide_product(int a, int b) {
    long long product = static_cast<long long>(a) * b;
#ifndef DWCONV_EMULATOR
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#endif
    return product;
}

// Pixels in shared memory. Eight channels are an octet. The octets of a pixel change places from pixel to pixel such
// that those of the same channels of eight neighbouring pixels are in different banks; Folded: those of twice four,
// eight pixels apart.
template <int Channels, bool Folded>
struct SparsePixels {
    static constexpr int kPixel = 2 * Channels;  // bytes from one to the next
    static constexpr unsigned kOctets = Channels / 8;
    static constexpr unsigned kTurns = kOctets % 8 == 0 ? 8 : kOctets % 4 == 0 ? 4 : kOctets % 2 == 0 ? 2 : 1;
    __device__ __forceinline__ static int place(unsigned pixel, unsigned octet) {  // in bytes of a row
        const unsigned number = Folded ? pixel ^ (pixel / 2 & 4) : pixel;
        return static_cast<int>(16 * (pixel * kOctets + (octet ^ (number / (8 / kTurns) & (kTurns - 1)))));
    }
};

template <class C>
struct SparseRows {
    using X = SparsePixels<C::kXChannels, C::kFolded>;
    using Y = SparsePixels<C::kChannels, false>;
    // After how many pixels of x the places are the same again.
    static constexpr int kPeriod = C::kFolded ? 16 : 8;
    static constexpr unsigned kOctets = Y::kOctets;
    static constexpr unsigned kThreadPixels = C::kThreads / kOctets;  // that all threads copy or store at once
    static_assert(C::kThreads % kOctets == 0, "a thread's pieces are of the same octet");
    static_assert(C::kBoxes || C::kXChannels == C::kChannels, "only boxes bring channels that the block doesn't make");
    static constexpr int kGroups = 8 * C::kTiles;                     // of a row, of all slots
    static constexpr int kResults = kGroups * C::kPitch * Y::kPixel;  // bytes of a row of results
    // The group of outputs that is column `number` of the products' B. Groups whose pixels are read at the same time,
    // columns 2 * k and 2 * k + 1, are kApart groups apart, so that they are in different banks.
    __device__ __forceinline__ static unsigned group_of(unsigned number) {
        const unsigned low = number / 2 % C::kApart;
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

// A line of the block's timetable: what a step reads, which is copied kStages - 1 steps before, and what it completes.
// In bytes, from x and y on, for column 0 and channel 0 of the first image.
struct alignas(32) SparseStep {
    long long from;  // the first input row; its number, if it comes as a box
    unsigned exist;  // bit d: input row d exists; if all come as a box, whether it is wanted
    int image;
    long long to;   // the first output row that is completed
    unsigned made;  // bit k: the k-th output row completed is the unit's; kBegins: a new unit begins after this step
    int row;        // the first output row that is completed
    static constexpr unsigned kBegins = 256;

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
    int rows, height, group, first, of_first;  // output rows: of the block, of an image; of the first unit
    int first_steps;
    // Found by `number_all`: whole units behind the first one, output rows of the last one.
    int whole, rest, whole_steps, rest_steps, count;
    static constexpr int kAhead = C::kStages - 1;  // steps that rows are copied ahead

    // Steps that lie above the image as a whole are left out: they add nothing to sums that hold the bias.
    __device__ __forceinline__ static int above(int out_first) {
        return larger(0, R::kAbove - out_first * C::kStrideH) / C::kRows;
    }
    // The input row that a unit's first step begins with.
    __device__ __forceinline__ static int first_row(int out_first) {
        return out_first * C::kStrideH - R::kAbove + above(out_first) * C::kRows;
    }
    // Of a unit that makes these output rows.
    __device__ __forceinline__ static int steps(int out_first, int out_end) {
        if (C::kWhole) return 1;
        return ((out_end - 1 - out_first) * C::kStrideH + C::kFilterH - 1) / C::kRows + 1 - above(out_first);
    }

    __device__ __forceinline__ SparseSteps(unsigned position, unsigned end, const Sizes& sizes,
                                           const SparseTiling& tiling)
        : sizes(sizes), tiling(tiling) {
        rows = static_cast<int>(end - position);
        height = static_cast<int>(tiling.out_rows.divisor);
        group = static_cast<int>(tiling.out_rows.quotient(position));
        first = static_cast<int>(position) - group * height;
        of_first = smaller(rows, height - first);
        first_steps = steps(first, first + of_first);
    }

    // What isn't needed before the first copies are issued.
    __device__ __forceinline__ void number_all() {
        whole = static_cast<int>(tiling.out_rows.quotient(rows - of_first));
        rest = rows - of_first - whole * height;
        whole_steps = static_cast<int>(tiling.unit_steps.divisor);
        rest_steps = rest > 0 ? steps(0, rest) : 0;
        count = first_steps + whole * whole_steps + rest_steps;
    }

    // What a step reads: from input row `row` on, of `image` and those beside it.
    __device__ __forceinline__ SparseStep reads(int image, int row) const {
        SparseStep line = {};
        line.image = image;
        if constexpr (C::kBoxes) {
            line.from = row;
            line.exist = 1;
            return line;
        }
        line.from = 2 * (wide_product(image, static_cast<int>(sizes.x_image)) +
                         wide_product(row, static_cast<int>(sizes.x_row)));
#pragma unroll
        for (int d = 0; d < C::kRows; ++d)
            line.exist |= static_cast<unsigned>(row + d) < static_cast<unsigned>(sizes.in_h) ? 1u << d : 0u;
        return line;
    }
    __device__ __forceinline__ int image_of(int unit) const {
        return smaller((group + unit) * static_cast<int>(tiling.slots.divisor),
                       static_cast<int>(tiling.images - tiling.slots.divisor));
    }

    // The first steps, whose rows are copied before there is a timetable: those of the first unit, or of whole images.
    __device__ __forceinline__ int early() const { return C::kWhole ? kAhead : smaller(kAhead, first_steps); }
    __device__ __forceinline__ SparseStep early_reads(int at) const {
        if (!C::kWhole) return reads(image_of(0), first_row(first) + at * C::kRows);
        SparseStep line = reads(image_of(at), 0);
        if (at * height >= rows) line.exist = 0;
        return line;
    }

    // Line `at`.
    __device__ __forceinline__ SparseStep line(int at) const {
        if (at >= count) return SparseStep{};
        const int unit = at < first_steps ? 0 : static_cast<int>(tiling.unit_steps.quotient(at - first_steps)) + 1;
        const int of_unit = at < first_steps ? at : at - first_steps - (unit - 1) * whole_steps;
        const int out_first = unit == 0 ? first : 0;
        const int out_end = unit == 0 ? first + of_first : unit <= whole ? height : rest;
        const int row = (unit == 0 ? first_row(first) : first_row(0)) + of_unit * C::kRows;
        SparseStep line = reads(image_of(unit), row);
        line.row = C::kWhole ? 0 : (row + R::kAbove) / C::kStrideH - R::kBehind;
        line.to =
            2 * (wide_product(line.image, image_of_y(sizes)) + wide_product(line.row, static_cast<int>(tiling.y_row)));
#pragma unroll
        for (int k = 0; k < R::kOutputs; ++k)
            line.made |= line.row + k >= out_first && line.row + k < out_end ? 1u << k : 0u;
        if (of_unit + 1 == (unit == 0 ? first_steps : unit <= whole ? whole_steps : rest_steps))
            line.made |= SparseStep::kBegins;
        return line;
    }

    // All of them, by all threads, and those that are copied but never made.
    __device__ __forceinline__ void write(SparseStep* lines) const {
#pragma unroll 1
        for (int at = static_cast<int>(threadIdx.x); at < count + kAhead; at += C::kThreads) lines[at] = line(at);
    }
};

// Where a block is: its first channel, its first column of y, and shared memory for gates of its stages.
struct SparsePlace {
    int first_channel, first_column;
    unsigned char* gates;
};

// What a thread copies of each row: eight channels of some pixels.
template <class C>
struct SparseFetch {
    using R = SparseRows<C>;
    using T = typename C::Element;
    const unsigned char* from[C::kLoads];  // in row 0 of image 0
    int into[C::kLoads];                   // in bytes of a row of shared memory; negative: nothing
    long long row_bytes;                   // of x
    int stage_row;                         // of shared memory, in bytes
    int first_column;

    __device__ __forceinline__ SparseFetch(const T* x, const Sizes& sizes, const SparseTiling& tiling,
                                           const SparsePlace& place)
        : row_bytes(2 * sizes.x_row), stage_row(static_cast<int>(tiling.row_bytes)), first_column(place.first_column) {
        const unsigned octet = threadIdx.x % R::kOctets, columns = tiling.copied_columns.divisor;
        const int channel = place.first_channel + static_cast<int>(octet * 8);
        const int begin = first_column * C::kStrideW - C::kLead;  // of the slot's pixels, in x
        const unsigned count = channel < static_cast<int>(sizes.out_channels) ? tiling.slots.divisor * columns : 0;
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k) {
            const unsigned pixel = threadIdx.x / R::kOctets + k * R::kThreadPixels;
            const unsigned slot = tiling.copied_columns.quotient(pixel), column = pixel - slot * columns;
            const int of_x = begin + static_cast<int>(column);
            const bool exists = pixel < count && static_cast<unsigned>(of_x) < static_cast<unsigned>(sizes.in_w);
            // All of a block's images are within 31 bits of each other.
            unsigned at = slot * static_cast<unsigned>(sizes.x_image) +
                          static_cast<unsigned>(of_x) * static_cast<unsigned>(sizes.x_column) + channel;
            keep(at);
            from[k] = reinterpret_cast<const unsigned char*>(x + at);
            into[k] = exists ? R::X::place(slot * tiling.width + column, octet) : -1;
            keep(into[k]);
        }
    }

    // Copies the rows of a line to a stage; rows that don't exist become zeros.
    __device__ __forceinline__ void copy_early(const SparseStep& line, unsigned char* stage, int) const {
#pragma unroll
        for (int k = 0; k < C::kLoads; ++k)
#pragma unroll
            for (int d = 0; d < C::kRows; ++d)
                copy_wanted_or_zero<16, C::kCached>(stage + (d * stage_row + into[k]),
                                                    from[k] + (line.from + d * row_bytes), line.exist & 1u << d,
                                                    into[k]);
        end_of_copies();
    }
    __device__ __forceinline__ void copy(const SparseStep* line, unsigned char* stage, int number) const {
        copy_early(SparseStep::read(line), stage, number);
    }

    __device__ __forceinline__ static void prefetch() {}
    __device__ __forceinline__ static void open() {}
    // The copies of the stage that was filled first have arrived, and all threads meet.
    __device__ __forceinline__ void meet(int) const {
        wait_for_copies<C::kStages - 2>();
        __syncthreads();
    }

    // Makes zeros of the pixels beside the image that products read, in all stages: nothing is copied there.
    __device__ __forceinline__ void clear_beside(unsigned char* stages, const Sizes& sizes,
                                                 const SparseTiling& tiling) const {
        using B = SparseBand<C>;
        const int begin = first_column * C::kStrideW - C::kLead, slots = static_cast<int>(tiling.slots.divisor);
        // Pixels `left` to `right` - 1 of a slot are the image's.
        const int right =
            smaller(static_cast<int>(tiling.copied_columns.divisor), static_cast<int>(sizes.in_w) - begin);
        const int left = smaller(larger(-begin, 0), right);
        const int read =
            (static_cast<int>(tiling.slot_groups.divisor) - 1) * (C::kGroup * C::kStrideW) + ceil_div(B::kReach, 4) * 4;
        const unsigned beside = static_cast<unsigned>(larger(read - (right - left), 0)) * R::kOctets;
#pragma unroll 1
        for (unsigned number = threadIdx.x; number < beside * slots; number += C::kThreads) {
            const unsigned k = tiling.slots.quotient(number / R::kOctets), slot = number / R::kOctets - k * slots;
            const unsigned pixel = k < static_cast<unsigned>(left) ? k : k + (right - left);
            unsigned char* at = stages + R::X::place(slot * tiling.width + pixel, number % R::kOctets);
#pragma unroll
            for (int row = 0; row < C::kStages * C::kRows; ++row, at += tiling.row_bytes)
                *reinterpret_cast<uint4*>(at) = uint4{0, 0, 0, 0};
        }
    }
};

// One instruction, whatever the compiler makes of the address.
__device__ __forceinline__ void store_16(void* to, const uint4& words) {
#ifdef DWCONV_EMULATOR
    *static_cast<uint4*>(to) = words;
#else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
                 : "memory");
#endif
}

// What a thread stores of each row: eight channels of some pixels.
template <class C>
struct SparseStores {
    using R = SparseRows<C>;
    using T = typename C::Element;
    unsigned char* into[C::kStores];  // in row 0 of image 0
    int from[C::kStores];             // in bytes of a row of the results; negative: nothing
    long long out_row;                // bytes from row to row

    __device__ __forceinline__ SparseStores(T* y, const Sizes& sizes, const SparseTiling& tiling,
                                            const SparsePlace& place)
        : out_row(2 * static_cast<long long>(tiling.y_row)) {
        const unsigned octet = threadIdx.x % R::kOctets, columns = tiling.stored_columns.divisor;
        const int channel = place.first_channel + static_cast<int>(octet * 8);
        const unsigned count = channel < static_cast<int>(sizes.out_channels) ? tiling.slots.divisor * columns : 0;
#pragma unroll
        for (int k = 0; k < C::kStores; ++k) {
            const unsigned pixel = threadIdx.x / R::kOctets + k * R::kThreadPixels;
            const unsigned slot = tiling.stored_columns.quotient(pixel), column = pixel - slot * columns;
            const int of_y = place.first_column + static_cast<int>(column);
            const bool exists = pixel < count && of_y < static_cast<int>(sizes.out_w);
            unsigned at = slot * image_of_y(sizes) + of_y * tiling.y_column + channel;
            keep(at);
            into[k] = reinterpret_cast<unsigned char*>(y + at);
            // Groups lie kPitch pixels apart. What follows divides less than 2^8 by at most 8, with one multiplication.
            const unsigned group = column * (65536 / C::kGroup + 1) >> 16;
            const unsigned of_results =
                slot * tiling.slot_groups.divisor * C::kPitch + column + group * (C::kPitch - C::kGroup);
            from[k] = exists ? R::Y::place(of_results, octet) : -1;
            keep(from[k]);
        }
    }

    // A row of results is read first and stored later, so that what is between hides the reading.
    using Words = uint4[C::kStores];
    __device__ __forceinline__ void read(Words& words, const unsigned char* results) const {
#pragma unroll
        for (int k = 0; k < C::kStores; ++k) words[k] = *reinterpret_cast<const uint4*>(results + larger(from[k], 0));
    }
    // The k-th row that a step before this one made, if it did.
    __device__ __forceinline__ void store(const Words& words, const SparseStep& step, int row) const {
#pragma unroll
        for (int k = 0; k < C::kStores; ++k)
            if (from[k] >= 0 && (step.made & 1u << row)) store_16(into[k] + (step.to + row * out_row), words[k]);
    }

    // What the last step made.
    __device__ __forceinline__ void end(const SparseStep& step, const unsigned char* results) const {
#pragma unroll
        for (int k = 0; k < R::kOutputs; ++k) {
            Words words;
            read(words, results + k * R::kResults);
            store(words, step, k);
        }
    }
};

}  // namespace dwconv
