// taps_nchw_stages.cuh: which planes, rows and columns a block of taps_nchw has in shared memory, and their way there
//   Elements stand in shared memory as they stand in memory, at the same place modulo kAlign bytes: neighbouring rows
//   (and planes, where x is dense) come as one stretch, whatever the length of a row is. On sm_90 and newer (kBulk) a
//   warp of its own sends the lines of stages, each by one instruction; before, all threads copy pieces of 16 bytes.
#pragma once
#include "bulk_copies.cuh"
#include "copies.cuh"
#include "filter_gradients.cuh"

namespace dwconv {

// Where x or g stands in a stage: steps in elements of shared memory, congruent to those of memory modulo kAlign bytes.
struct TapsNchwPitches {
    unsigned image, plane, row;
    unsigned merged;  // whole planes of neighbouring channels are one stretch
};

struct TapsNchwTiling {
    FastDivisor parts;                              // of the units; a block sums one part for one group of channels
    FastDivisor row_bands, column_bands;            // of a plane
    unsigned units;                                 // groups of images * bands
    unsigned part_units;                            // of one block, at most
    unsigned images, group_images, group_channels;  // in all; of a stage; input channels of a stage
    unsigned band_row_tiles, band_column_tiles;
    // Thread = ((tap tile * images + image) * planes + plane) * lanes + lane: warps have few tiles of taps, and leave
    // out rows that those meet in the padding.
    FastDivisor lanes;         // of a plane and a tap tile: row_lanes * columns of tiles
    FastDivisor column_lanes;  // band_column_tiles
    unsigned row_lanes;        // lane rows take every row_lanes-th row of tiles
    FastDivisor tap_tiles;     // of a plane
    FastDivisor tap_tile_columns;
    FastDivisor planes;  // output planes of an image in a stage
    TapsNchwPitches x, g;
    unsigned x_begin, g_begin;  // in a stage; in front of x and behind it is room for columns beside the image
    unsigned stage_elements;
    FastDivisor x_team, g_team;  // threads that copy one line
    unsigned scratch;            // sums of threads, in shared memory: behind those of the block and one place more
    FastDivisor depths;          // planes of an output volume; `images` are all of them, one at a time in a stage
};

// What one stage holds: outputs [row, row + rows) x [column, column + columns) of some planes and images, and the
// inputs that they read.
template <class C>
struct TapsNchwStage {
    unsigned image;
    int images;
    int nominal_row, row, rows, nominal_column, column, columns;  // nominal: before the last tile is moved inside
    int in_row, in_rows, in_column, in_columns;

    __device__ __forceinline__ TapsNchwStage(const Sizes& sizes, const TapsNchwTiling& tiling, unsigned unit) {
        const int out_h = static_cast<int>(sizes.out_h), out_w = static_cast<int>(sizes.out_w);
        const int in_h = static_cast<int>(sizes.in_h), in_w = static_cast<int>(sizes.in_w);
        const unsigned above = tiling.column_bands.quotient(unit), group = tiling.row_bands.quotient(above);
        image = group * tiling.group_images;
        images = smaller(static_cast<int>(tiling.group_images), static_cast<int>(tiling.images - image));
        const int band_rows = static_cast<int>(tiling.band_row_tiles) * C::kRows;
        nominal_row = static_cast<int>(above - group * tiling.row_bands.divisor) * band_rows;
        row = smaller(nominal_row, out_h - C::kRows);
        rows = smaller(nominal_row + band_rows, out_h) - row;
        const int top = row * C::kStrideH - C::kPadTop;
        in_row = smaller(larger(top, 0), in_h);
        in_rows =
            larger(smaller(in_h, top + (rows - 1) * C::kStrideH + (C::kFilterH - 1) * C::kDilationH + 1) - in_row, 0);
        if (tiling.column_bands.divisor == 1) {
            nominal_column = column = in_column = 0;
            columns = out_w;
            in_columns = in_w;
        } else {
            const int band_columns = static_cast<int>(tiling.band_column_tiles) * C::kColumns;
            nominal_column = static_cast<int>(unit - above * tiling.column_bands.divisor) * band_columns;
            column = smaller(nominal_column, out_w - C::kColumns);
            columns = smaller(nominal_column + band_columns, out_w) - column;
            const int left = column * C::kStrideW - C::kPadLeft;
            in_column = smaller(larger(left, 0), in_w) / C::kReadX * C::kReadX;
            in_columns = larger(
                smaller(in_w, left + (columns - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW + 1) - in_column,
                0);
        }
    }
};

// What the threads that read a stage know of it.
struct alignas(16) TapsNchwNote {
    int images;  // 0: there is no stage any more
    int nominal_row, nominal_column;
    int x, g;  // where row 0 and column 0 of the first plane would stand, in elements from the stage's first
};

// Elements from the last multiple of `Bytes` to this address.
template <int Bytes, class T>
__device__ __forceinline__ int elements_behind(const T* address) {
    return static_cast<int>(reinterpret_cast<unsigned long long>(address) % Bytes / sizeof(T));
}

// Lines of x or g, all of `length` elements: inner ones one step apart, and sets of them one outer step.
template <class T>
struct TapsNchwLines {
    const T *from, *begin, *end;  // the first line; what it reads lies in [begin, end)
    T* into;
    int behind;  // elements of the first line's place behind `into`
    int length, inner, outer;
    long long inner_step, outer_step;  // in memory
    int inner_pitch, outer_pitch;      // in shared memory

    TapsNchwLines() = default;
    // Rows of the planes of one image (by_rows), or planes, or all planes of each image as one line.
    __device__ __forceinline__ TapsNchwLines(const TapsNchwPitches& pitches, bool by_rows, int images, int planes,
                                             int rows, int columns, long long image_step, long long plane_step,
                                             long long row_step)
        : length(by_rows ? columns
                         : rows * columns + (pitches.merged ? (planes - 1) * static_cast<int>(pitches.plane) : 0)),
          inner(by_rows          ? rows
                : pitches.merged ? 1
                                 : planes),
          outer(by_rows ? planes : images),
          inner_step(by_rows ? row_step : plane_step),
          outer_step(by_rows ? plane_step : image_step),
          inner_pitch(static_cast<int>(by_rows ? pitches.row : pitches.plane)),
          outer_pitch(static_cast<int>(by_rows ? pitches.plane : pitches.image)) {}

    __device__ __forceinline__ int count() const { return inner * outer; }

    // One of two, field by field: a reference to one of them would keep both in local memory.
    __device__ __forceinline__ static TapsNchwLines either(bool is_first, const TapsNchwLines& first,
                                                           const TapsNchwLines& second) {
        TapsNchwLines found;
        found.from = is_first ? first.from : second.from;
        found.begin = is_first ? first.begin : second.begin;
        found.end = is_first ? first.end : second.end;
        found.into = is_first ? first.into : second.into;
        found.behind = is_first ? first.behind : second.behind;
        found.length = is_first ? first.length : second.length;
        found.inner = is_first ? first.inner : second.inner;
        found.outer = is_first ? first.outer : second.outer;
        found.inner_step = is_first ? first.inner_step : second.inner_step;
        found.outer_step = is_first ? first.outer_step : second.outer_step;
        found.inner_pitch = is_first ? first.inner_pitch : second.inner_pitch;
        found.outer_pitch = is_first ? first.outer_pitch : second.outer_pitch;
        return found;
    }
};

// Where one line begins, in memory and in shared memory: both multiples of 16 bytes, `before` elements before it.
template <class T>
struct TapsNchwLine {
    const T* from;
    T* to;
    int before;

    __device__ __forceinline__ TapsNchwLine(const TapsNchwLines<T>& lines, int number) {
        constexpr int kVector = 16 / sizeof(T);
        const int o = lines.inner == 1 ? number : number / lines.inner, i = number - o * lines.inner;
        const int place = lines.behind + o * lines.outer_pitch + i * lines.inner_pitch;
        before = place % kVector;
        from = lines.from + (o * lines.outer_step + i * lines.inner_step - before);
        to = lines.into + (place - before);
    }
};

// Copies lines. Teams of threads take a line each.
template <class C, class T>
__device__ __forceinline__ void copy_lines(const TapsNchwLines<T>& lines, const FastDivisor& team) {
    constexpr int kVector = 16 / sizeof(T);
    const int threads = static_cast<int>(team.divisor), teams = static_cast<int>(team.quotient(C::kThreads));
    const int index = static_cast<int>(team.quotient(threadIdx.x)),
              rank = static_cast<int>(threadIdx.x) - index * threads;
    if (index >= teams) return;
#pragma unroll 1
    for (int number = index; number < lines.count(); number += teams) {
        const TapsNchwLine<T> line(lines, number);
        const int extent = line.before + lines.length;
        if (line.from >= lines.begin && line.from + ceil_div(extent, kVector) * kVector <= lines.end) {
#pragma unroll 4
            for (int at = rank * kVector; at < extent; at += kVector * threads)
                copy_piece_or_zero<16, C::kCached>(line.to + at, line.from + at, true);
        } else {  // at the ends of the tensor: nothing before it or behind it is read
            for (int at = line.before + rank; at < extent; at += threads) line.to[at] = load_one(line.from + at);
        }
    }
}

// An image of the tiling: of volumes, a plane of g, with the plane of x that it meets in a tap of the depth.
template <class C, class Number>
struct TapsNchwPlanes {
    Number image;
    MetPlanes met;

    __device__ __forceinline__ TapsNchwPlanes(const Sizes& sizes, const TapsNchwTiling& tiling, Number number,
                                              int depth_tap)
        : image(number) {
        if constexpr (C::kVolume)
            met = MetPlanes::find<C>(static_cast<unsigned>(number), tiling.depths, sizes, depth_tap);
    }
    __device__ __forceinline__ bool x_exists() const { return !C::kVolume || met.exists; }
    __device__ __forceinline__ long long in_x(const Sizes& sizes) const {
        return C::kVolume ? met.in_x(sizes) : image * sizes.x_image;
    }
    // Its number among all planes of g, where `channel` is the output channel.
    __device__ __forceinline__ long long in_g(const Sizes& sizes, int channel) const {
        return C::kVolume ? (met.image * sizes.out_channels + channel) * sizes.out_d + met.depth
                          : image * sizes.out_channels + channel;
    }
    __device__ __forceinline__ static long long last_of_x(const Sizes& sizes, const TapsNchwTiling& tiling) {
        return C::kVolume
                   ? (tiling.depths.quotient(tiling.images) - 1) * sizes.x_image + (sizes.in_d - 1) * sizes.x_depth
                   : (tiling.images - 1) * sizes.x_image;
    }
};

// The first unit from this one on that adds anything: of volumes, one whose plane of x exists, or whose g is summed for
// the bias.
template <class C>
__device__ __forceinline__ unsigned next_unit(unsigned unit, unsigned last, const Sizes& sizes,
                                              const TapsNchwTiling& tiling, int depth_tap) {
    if constexpr (C::kVolume) {
        if (C::kHasBias && depth_tap == 0) return unit;
        while (unit < last) {
            const unsigned number = tiling.row_bands.quotient(tiling.column_bands.quotient(unit));
            if (MetPlanes::find<C>(number, tiling.depths, sizes, depth_tap).exists) break;
            ++unit;
        }
    }
    return unit;
}

// Starts the copies of a unit's rows of x and g to `into`, and says where they will stand. `stages`: of kBulk, what its
// warp sends them to.
template <class C, class Stages>
__device__ __forceinline__ TapsNchwNote copy_stage(const FilterGradients<typename C::Element>& tensors,
                                                   const Sizes& sizes, const TapsNchwTiling& tiling, int channel,
                                                   int channels, int depth_tap, unsigned unit,
                                                   typename C::Element* into, const Stages* stages) {
    using T = typename C::Element;
    using Lines = TapsNchwLines<T>;
    const TapsNchwStage<C> stage(sizes, tiling, unit);
    TapsNchwNote note{stage.images, stage.nominal_row, stage.nominal_column, 0, 0};
    const bool by_rows = tiling.column_bands.divisor > 1;
    const TapsNchwPlanes<C, unsigned> planes(sizes, tiling, stage.image, depth_tap);
    const bool x_exists = planes.x_exists();
    Lines x(tiling.x, by_rows, stage.images, channels, stage.in_rows, stage.in_columns, sizes.x_image, sizes.x_channel,
            sizes.in_w);
    x.from = tensors.x + ((x_exists ? planes.in_x(sizes) : 0) + channel * sizes.x_channel +
                          (stage.in_row * sizes.in_w + stage.in_column));
    x.begin = tensors.x;
    x.end = tensors.x + (planes.last_of_x(sizes, tiling) + (sizes.out_channels / C::kMultiplier - 1) * sizes.x_channel +
                         sizes.in_h * sizes.in_w);
    x.into = into + tiling.x_begin;
    x.behind = elements_behind<C::kAlign>(x.from);
    note.x =
        static_cast<int>(tiling.x_begin) + x.behind - stage.in_row * static_cast<int>(tiling.x.row) - stage.in_column;

    const long long plane = sizes.out_h * sizes.out_w, channel_step = C::kVolume ? sizes.out_d * plane : plane;
    Lines g(tiling.g, by_rows, stage.images, channels * C::kMultiplier, stage.rows, stage.columns,
            sizes.out_channels * plane, channel_step, sizes.out_w);
    g.from =
        tensors.g + (planes.in_g(sizes, channel * C::kMultiplier) * plane + (stage.row * sizes.out_w + stage.column));
    g.begin = tensors.g;
    g.end = tensors.g + sizes.planes * channel_step;
    g.into = into + tiling.g_begin;
    g.behind = elements_behind<C::kAlign>(g.from);
    note.g = static_cast<int>(tiling.g_begin) + g.behind - stage.row * static_cast<int>(tiling.g.row) - stage.column;

    if (!x_exists) {  // g is summed for the bias beside zeros
        for (unsigned at = tiling.x_begin + threadIdx.x % C::kFillers; at < tiling.g_begin; at += C::kFillers)
            into[at] = T();
        if constexpr (C::kBulk) own_writes_before_copies();
    }
    if constexpr (C::kBulk) {  // a line for each lane, of x and of g at once
        const int of_x = x_exists ? x.count() : 0, all = of_x + g.count();
#pragma unroll 1
        for (int number = static_cast<int>(threadIdx.x % 32); number < all; number += 32) {
            const Lines lines = Lines::either(number < of_x, x, g);
            const TapsNchwLine<T> line(lines, number < of_x ? number : number - of_x);
            send_line(*stages, line.to, line.from, line.before, lines.length, lines.begin, lines.end);
        }
    } else {
        if (x_exists) copy_lines<C>(x, tiling.x_team);
        copy_lines<C>(g, tiling.g_team);
    }
    return note;
}

}  // namespace dwconv
