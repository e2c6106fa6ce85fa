// taps_nchw_stages.cuh: which planes, rows and columns a block of taps_nchw has in shared memory, and their way there
//   Elements stand in shared memory as they stand in memory, at the same place modulo 16 bytes: neighbouring rows (and
//   planes, where x is dense) come as one stretch, in pieces of 16 bytes, whatever the length of a row is.
#pragma once
#include "copies.cuh"
#include "filter_gradients.cuh"

namespace dwconv {

// Where x or g stands in a stage: steps in elements of shared memory, congruent to those of memory modulo 16 bytes.
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
    int x_head, g_head;  // elements between a multiple of 16 bytes and the first of x, of g

    TapsNchwStage() = default;
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

// Elements from the last multiple of 16 bytes to this address.
template <class T>
__device__ __forceinline__ int elements_behind_vector(const T* address) {
    return static_cast<int>(reinterpret_cast<unsigned long long>(address) % 16 / sizeof(T));
}

// Lines of memory, all of `length` elements: inner ones one step apart, and sets of them one outer step.
struct TapsNchwLines {
    int length, inner, outer;
    long long inner_step, outer_step;  // in memory
    int inner_pitch, outer_pitch;      // in shared memory

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
};

// Copies lines that begin at `from`; what it reads lies in [begin, end). Teams of threads take a line each.
template <class C, class T>
__device__ __forceinline__ void copy_lines(T* into, const T* from, const T* begin, const T* end,
                                           const TapsNchwLines& lines, const FastDivisor& team) {
    constexpr int kVector = 16 / sizeof(T);
    const int threads = static_cast<int>(team.divisor), teams = static_cast<int>(team.quotient(C::kThreads));
    const int index = static_cast<int>(team.quotient(threadIdx.x)),
              rank = static_cast<int>(threadIdx.x) - index * threads;
    if (index >= teams) return;
    const int head = elements_behind_vector(from);
#pragma unroll 1
    for (int number = index; number < lines.inner * lines.outer; number += teams) {
        const int o = lines.inner == 1 ? number : number / lines.inner, i = number - o * lines.inner;
        const int place = head + o * lines.outer_pitch + i * lines.inner_pitch, before = place % kVector;
        const T* const line = from + (o * lines.outer_step + i * lines.inner_step - before);  // at 16 bytes
        T* const to = into + (place - before);
        const int extent = before + lines.length;
        if (line >= begin && line + (extent + kVector - 1) / kVector * kVector <= end) {
#pragma unroll 4
            for (int at = rank * kVector; at < extent; at += kVector * threads)
                copy_piece_or_zero<16, C::kCached>(to + at, line + at, true);
        } else {  // at the ends of the tensor: nothing before it or behind it is read
            for (int at = before + rank; at < extent; at += threads) to[at] = load_one(line + at);
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

// Starts the copies of a stage's rows of x and g into shared memory.
template <class C>
__device__ __forceinline__ void copy_stage(const FilterGradients<typename C::Element>& tensors, const Sizes& sizes,
                                           const TapsNchwTiling& tiling, int channel, int channels, int depth_tap,
                                           TapsNchwStage<C>& stage, typename C::Element* into) {
    using T = typename C::Element;
    const bool by_rows = tiling.column_bands.divisor > 1;
    const TapsNchwPlanes<C, unsigned> planes(sizes, tiling, stage.image, depth_tap);
    if (planes.x_exists()) {
        const T* const end =
            tensors.x + (planes.last_of_x(sizes, tiling) + (sizes.out_channels / C::kMultiplier - 1) * sizes.x_channel +
                         sizes.in_h * sizes.in_w);
        const T* const from = tensors.x + (planes.in_x(sizes) + channel * sizes.x_channel +
                                           (stage.in_row * sizes.in_w + stage.in_column));
        stage.x_head = elements_behind_vector(from);
        copy_lines<C>(into + tiling.x_begin, from, tensors.x, end,
                      TapsNchwLines(tiling.x, by_rows, stage.images, channels, stage.in_rows, stage.in_columns,
                                    sizes.x_image, sizes.x_channel, sizes.in_w),
                      tiling.x_team);
    } else {  // g is summed for the bias beside zeros
        stage.x_head = 0;
        for (unsigned at = tiling.x_begin + threadIdx.x; at < tiling.g_begin; at += C::kThreads) into[at] = T();
    }
    {
        const long long plane = sizes.out_h * sizes.out_w, channel_step = C::kVolume ? sizes.out_d * plane : plane;
        const T* const from = tensors.g + (planes.in_g(sizes, channel * C::kMultiplier) * plane +
                                           (stage.row * sizes.out_w + stage.column));
        stage.g_head = elements_behind_vector(from);
        copy_lines<C>(into + tiling.g_begin, from, tensors.g, tensors.g + sizes.planes * channel_step,
                      TapsNchwLines(tiling.g, by_rows, stage.images, channels * C::kMultiplier, stage.rows,
                                    stage.columns, sizes.out_channels * plane, channel_step, sizes.out_w),
                      tiling.g_team);
    }
}

}  // namespace dwconv
