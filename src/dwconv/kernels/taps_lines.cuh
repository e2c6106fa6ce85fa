// taps_lines.cuh: what kernels of filters' gradients march over, and what they do with their sums
//   A block marches along axis a (rows of the image, or columns: kTurned). With stride S and dilation D on an axis,
//   q = gcd(S, D), outputs i and inputs r fall into D / q classes that share no products. In class c, output k is
//   i = c + k * D/q, input m is r = c*S - P + m*D, and tap u joins them where m = k * S/q + u. So every problem is one
//   with dilation 1, stride S/q, and inputs that lie apart. Channels first has classes of rows only, and taps kSpreadB
//   positions apart.
//   A tile of taps is kTapsA x kTapsB of them from (tap_a, tap_b) on, in kTapsD neighbouring taps of the depth from
//   depth_tap on: as if there were no others.
//   A line is kLineOutputs neighbouring outputs of one class, image after image. A super-line is the kLines lines that
//   a block takes side by side; its warps take all of them together, or kOwnLines each. A position is an output row of
//   a super-line; a block takes part_rows of them. What it takes of one super-line is a segment; a step of it brings
//   the row of g that is `step` outputs from the start, and the kRows rows of x that its first taps meet, in each of
//   kTapsD planes; the row of g meets kLive - 1 steps' rows of x more. Planes of volumes count as images: one of g
//   meets kTapsD planes of x, or those of them that exist. grid.x = tiles of taps * groups of channels * parts of all
//   output rows, in this order
#pragma once
#include "diagonals.cuh"
#include "filter_gradients.cuh"

namespace dwconv {

struct LinesTiling {
    unsigned images, lines;
    unsigned parts, part_rows, positions;
    unsigned gathered;  // parts that one block adds up, before the last block adds up what such blocks have found
    FastDivisor tap_tiles, channel_groups;
    FastDivisor rows;          // of a super-line
    FastDivisor super_lines;   // of one class of rows
    FastDivisor column_tiles;  // of one class of columns
    FastDivisor depths;        // planes of an output volume; `images` are all of them
};

__host__ __device__ constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }
// The least number from a on that is `remainder` modulo `multiple`.
__host__ __device__ constexpr int up(int a, int multiple, int remainder = 0) {
    return a + ((remainder - a) % multiple + multiple) % multiple;
}

// What layouts of such kernels derive from: the axes of a problem, along the march and across; and a block's sums, of
// BlockChannels channels. Together: neighbouring channels of one thread.
template <class C, int BlockChannels, int TapsD = 1, int Together = 1>
struct TapsLines {
    using Config = C;
    using Element = typename C::Element;
    using Sum = typename Accumulator<Element>::Type;
    static constexpr bool kLast = C::kChannelsLast, kTurned = C::kTurned;
    static_assert(kLast || !kTurned, "channels first, lines are neighbouring columns");
    static constexpr int kFilterA = kTurned ? C::kFilterW : C::kFilterH, kFilterB = kTurned ? C::kFilterH : C::kFilterW;
    static constexpr int kStepA = kTurned ? C::kStrideW : C::kStrideH, kStepB = kTurned ? C::kStrideH : C::kStrideW;
    static constexpr int kPadA = kTurned ? C::kPadLeft : C::kPadTop, kPadB = kTurned ? C::kPadTop : C::kPadLeft;
    static constexpr int kApartA = kTurned ? C::kDilationW : C::kDilationH;  // of taps, in rows of x
    static constexpr int kDilationB = kTurned ? C::kDilationH : C::kDilationW;
    static constexpr int kClassesA = kApartA / common_divisor(kStepA, kApartA);
    static constexpr int kClassesB = kLast ? kDilationB / common_divisor(kStepB, kDilationB) : 1;
    static constexpr int kStrideA = kStepA / common_divisor(kStepA, kApartA);  // inside a class
    static constexpr int kStrideB = kLast ? kStepB / common_divisor(kStepB, kDilationB) : kStepB;
    static constexpr int kApartB = kLast ? kDilationB : 1;   // columns of x from one position to the next
    static constexpr int kSpreadB = kLast ? 1 : kDilationB;  // positions from one tap to the next
    static constexpr int kReach = kApartA * kStrideA;        // rows of x from one step to the next

    static constexpr int kPlaneTaps = kFilterA * kFilterB;  // of one tap of the depth
    static constexpr int kTapTilesA = ceil_div(kFilterA, C::kTapsA), kTapTilesB = ceil_div(kFilterB, C::kTapsB);
    static constexpr int kLive = ceil_div(C::kTapsA, kStrideA);  // rows of g that a row of x may meet
    static constexpr int kRows = smaller(kStrideA, C::kTapsA);   // of x, in a step

    static constexpr int kThreads = 32 * C::kWarps, kBlockChannels = BlockChannels;
    static constexpr int kTapsD = TapsD, kTileTaps = C::kTapsA * C::kTapsB;  // of one tap of the depth
    static constexpr int kTaps = TapsD * kTileTaps, kSums = kTaps + (C::kHasBias ? 1 : 0);
    static constexpr int kCount = up(kSums * BlockChannels, 4);  // sums of a block, as whole vectors
    static constexpr int kPartsAhead = 16;  // loads of parts that are in flight, where registers allow it
    static_assert(TapsD == 1 || C::kVolume, "only planes of volumes meet several planes of x");
    static_assert(TapsD <= 32, "which planes exist must fit in 32 bits");

    // Index `index` of a block's sums counts its lanes of channels, then a lane's channels, then taps and the bias.
    __device__ __forceinline__ static int tap_of(int index) { return index / BlockChannels; }
    __device__ __forceinline__ static int channel_of(int index) {
        constexpr int kLanes = BlockChannels / Together;
        return Together == 1 ? index % BlockChannels : index % kLanes * Together + index / kLanes % Together;
    }
    // A tap of the tile, from its first one on.
    __device__ __forceinline__ static int depth_of(int tap) { return TapsD == 1 ? 0 : tap / kTileTaps; }
    __device__ __forceinline__ static int row_of(int tap) { return (TapsD == 1 ? tap : tap % kTileTaps) / C::kTapsB; }
    __device__ __forceinline__ static int column_of(int tap) { return tap % C::kTapsB; }
};

// What a block works on.
template <class W>
struct LinesPlace {
    using C = typename W::Config;
    unsigned group, tap_tile, part;  // of channels; of taps; of positions
    unsigned first, end;             // positions of the part
    int depth_tap, tap_a, tap_b;     // the first of the tile
    int in_a, out_a, in_b, out_b;
    long long x_a, x_b, g_a, g_b, g_image, g_channel;  // strides, in elements

    __device__ __forceinline__ LinesPlace(const Sizes& sizes, const LinesTiling& tiling) {
        const unsigned above = tiling.tap_tiles.quotient(blockIdx.x);
        tap_tile = blockIdx.x - above * tiling.tap_tiles.divisor;
        part = tiling.channel_groups.quotient(above);
        group = above - part * tiling.channel_groups.divisor;
        first = part * tiling.part_rows;
        end = min(first + tiling.part_rows, tiling.positions);
        constexpr unsigned kPlaneTiles = W::kTapTilesA * W::kTapTilesB;
        const unsigned of_plane = C::kVolume ? tap_tile % kPlaneTiles : tap_tile;
        depth_tap = C::kVolume ? static_cast<int>(tap_tile / kPlaneTiles) * W::kTapsD : 0;
        tap_a = static_cast<int>(of_plane / W::kTapTilesB) * C::kTapsA;
        tap_b = static_cast<int>(of_plane % W::kTapTilesB) * C::kTapsB;
        const long long column = W::kLast ? sizes.out_channels : 1, row = sizes.out_w * column;
        g_channel = W::kLast ? 1 : sizes.out_d * sizes.out_h * row;
        g_image = sizes.out_h * row * (W::kLast ? 1 : sizes.out_d * sizes.out_channels);
        in_a = static_cast<int>(W::kTurned ? sizes.in_w : sizes.in_h);
        in_b = static_cast<int>(W::kTurned ? sizes.in_h : sizes.in_w);
        out_a = static_cast<int>(W::kTurned ? sizes.out_w : sizes.out_h);
        out_b = static_cast<int>(W::kTurned ? sizes.out_h : sizes.out_w);
        x_a = W::kTurned ? sizes.x_column : sizes.x_row;
        x_b = W::kTurned ? sizes.x_row : sizes.x_column;
        g_a = W::kTurned ? column : row;
        g_b = W::kTurned ? row : column;
    }
    // Whether x has this row.
    __device__ __forceinline__ bool has_row(int row) const {
        return static_cast<unsigned>(row) < static_cast<unsigned>(in_a);
    }
    // Where plane `number` of g begins; of volumes, channels first, planes of an image and images aren't as far apart.
    __device__ __forceinline__ long long image_of_g(unsigned number, const LinesTiling& tiling) const {
        if constexpr (C::kVolume && !W::kLast) {
            const unsigned image = tiling.depths.quotient(number);
            return image * g_image + (number - image * tiling.depths.divisor) * static_cast<long long>(out_a) * out_b;
        } else {
            return number * g_image;
        }
    }
};

// Where a line is: its image (of volumes: its plane), and its first output column with the class of that.
template <class W>
struct OutputLine {
    using C = typename W::Config;
    unsigned image;
    int column_class, first;  // column k of the line is column_class + (first + k) * classes

    __device__ __forceinline__ OutputLine(unsigned line, const LinesTiling& tiling) {
        const unsigned above = tiling.column_tiles.quotient(line);
        first = static_cast<int>(line - above * tiling.column_tiles.divisor) * W::kLineOutputs;
        image = W::kClassesB == 1 ? above : above / W::kClassesB;
        column_class = static_cast<int>(above - image * W::kClassesB);
    }
    // The column of x at the line's position 0.
    __device__ __forceinline__ int x_column(int tap_b) const {
        return column_class * W::kStepB - W::kPadB + first * W::kStrideB * W::kApartB +
               tap_b * W::kApartB * W::kSpreadB - W::kLead;
    }
};

// A run of output rows of a super-line, those that meet a row of x in the tile of taps.
template <class W>
struct LinesSegment {
    using C = typename W::Config;
    unsigned super_line;
    int row_class;
    int first, end, last;  // rows of g; the step after the last one
    int base;              // the row of x that the first tap of row 0 meets
    unsigned planes;       // volumes of one own line: a bit for each tap of the depth whose plane of x exists; else all

    // Whether it has this row of g.
    __device__ __forceinline__ bool has(int row) const {
        return static_cast<unsigned>(row - first) < static_cast<unsigned>(end - first);
    }
    // The next one of the block from `position` on, which it moves, for those who own the lines from own_line of the
    // super-line on. False where there is none; the same for all of them.
    __device__ __forceinline__ bool find(unsigned& position, const LinesPlace<W>& place, const Sizes& sizes,
                                         const LinesTiling& tiling, unsigned own_line = 0) {
        while (position < place.end) {
            const unsigned line = tiling.rows.quotient(position);
            first = static_cast<int>(position - line * tiling.rows.divisor);
            end = static_cast<int>(min(tiling.rows.divisor, first + place.end - position));
            position += end - first;
            const unsigned of_class = W::kClassesA == 1 ? 0 : tiling.super_lines.quotient(line);
            row_class = static_cast<int>(of_class);
            super_line = line - of_class * tiling.super_lines.divisor;
            const unsigned first_line = super_line * W::kLines + own_line;
            if (W::kOwnLines < W::kLines && first_line >= tiling.lines) continue;
            planes = ~0u;
            if constexpr (C::kVolume && W::kOwnLines == 1) {
                const OutputLine<W> at(first_line, tiling);
                planes = MetPlanes::find<C>(at.image, tiling.depths, sizes, place.depth_tap)
                             .template existing<C, W::kTapsD>(sizes, place.depth_tap);
                if (!(C::kHasBias && place.tap_tile == 0) && planes == 0) continue;
            }
            base = row_class * W::kStepA - W::kPadA + place.tap_a * W::kApartA;
            end = min(end, ceil_div(place.out_a - row_class, W::kClassesA));
            // Steps before which all rows of x end.
            const int x_end = place.in_a > base ? ceil_div(place.in_a - base, W::kReach) : 0;
            if constexpr (!C::kHasBias) {
                const int before = -base - (C::kTapsA - 1) * W::kApartA;
                if (before > 0) first = max(first, ceil_div(before, W::kReach));
                end = min(end, x_end);
                if constexpr (W::kOwnLines == 1 && W::kTapTilesB > 1) {
                    const int column = OutputLine<W>(first_line, tiling).x_column(place.tap_b);
                    if (column >= place.in_b || column + (W::kLinePositions - 1) * W::kApartB < 0) continue;
                }
            }
            if (first >= end) continue;
            last = min(end + W::kLive - 1, C::kHasBias ? max(x_end, end) : x_end);
            return true;
        }
        return false;
    }
};

// Takes the steps of a segment one after the other: march.step<phase>(number). The phase says which registers a step's
// row of g goes to; the code of one stands behind that of the one before, so that nobody has to look up where it is.
template <int Phases, int Phase = 0, class March>
__device__ __forceinline__ bool take_steps(March& march, int& number, int last) {
    if constexpr (Phase < Phases) {
        march.template step<Phase>(number);
        return ++number < last && take_steps<Phases, Phase + 1>(march, number, last);
    }
    return true;
}
template <int Phases, class March>
__device__ __forceinline__ void take_all_steps(March& march, int first, int last) {
    int number = first;
#pragma unroll 1
    while (take_steps<Phases>(march, number, last)) continue;
}

// A sum of the block, term by term: zeros that stand for what doesn't exist make NaNs of Infs and NaNs.
template <class W>
__device__ __forceinline__ typename W::Sum exact_block_sum(const FilterGradients<typename W::Element>& tensors,
                                                           const Sizes& sizes, const LinesTiling& tiling,
                                                           const LinesPlace<W>& place, long long channel, int tap) {
    using C = typename W::Config;
    using Sum = typename W::Sum;
    const bool is_bias = tap == W::kTaps;
    const int u = place.tap_a + W::row_of(tap), v = place.tap_b + W::column_of(tap);
    Sum sum = 0;
#pragma unroll 1
    for (unsigned position = place.first; position < place.end; ++position) {
        const unsigned line_of_all = tiling.rows.quotient(position);
        const unsigned row_class = W::kClassesA == 1 ? 0 : tiling.super_lines.quotient(line_of_all);
        const unsigned super_line = line_of_all - row_class * tiling.super_lines.divisor;
        const long long i =
            row_class + static_cast<long long>(position - line_of_all * tiling.rows.divisor) * W::kClassesA;
        const long long r = i * W::kStepA - W::kPadA + static_cast<long long>(u) * W::kApartA;
        if (i >= place.out_a || (!is_bias && (r < 0 || r >= place.in_a))) continue;
#pragma unroll 1
        for (unsigned of_super_line = 0; of_super_line < W::kLines; ++of_super_line) {
            const unsigned line = super_line * W::kLines + of_super_line;
            if (line >= tiling.lines) break;
            const OutputLine<W> at(line, tiling);
            long long in_x = at.image * sizes.x_image;
            if constexpr (C::kVolume) {
                const MetPlanes met =
                    MetPlanes::find<C>(at.image, tiling.depths, sizes, place.depth_tap + W::depth_of(tap));
                if (!is_bias && !met.exists) continue;
                in_x = met.in_x(sizes);
            }
            const long long in_g = place.image_of_g(at.image, tiling);
#pragma unroll 1
            for (int t = 0; t < W::kLineOutputs; ++t) {
                const long long j = at.column_class + static_cast<long long>(at.first + t) * W::kClassesB;
                const long long c = j * W::kStepB - W::kPadB + static_cast<long long>(v) * W::kDilationB;
                if (j >= place.out_b || (!is_bias && (c < 0 || c >= place.in_b))) continue;
                const Sum g = static_cast<Sum>(
                    load_one(tensors.g + in_g + i * place.g_a + j * place.g_b + channel * place.g_channel));
                sum += is_bias ? g
                               : g * static_cast<Sum>(load_one(tensors.x + in_x + r * place.x_a + c * place.x_b +
                                                               channel / C::kMultiplier * sizes.x_channel));
            }
        }
    }
    return sum;
}

// The sum over four neighbouring lanes, which have a row of a product of matrices.
__device__ __forceinline__ float sum_of_four(float of_lane) {
    of_lane += __shfl_xor_sync(0xffffffffu, of_lane, 1);
    of_lane += __shfl_xor_sync(0xffffffffu, of_lane, 2);
    return of_lane;
}

// Passes all sums of a block, which its warps have left at `totals`, those of a tap Pitch behind those of the tap
// before, to found(index, sum). All threads call it. One place that does this is less code than one for each channel of
// a warp: code that runs once has to be fetched from afar.
template <class W, int Pitch = W::kBlockChannels, class Found>
__device__ __forceinline__ void find_totals(const float* totals, const Found& found) {
    __syncthreads();
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x); index < W::kSums * W::kBlockChannels; index += W::kThreads)
        found(index, totals[index + index / W::kBlockChannels * (Pitch - W::kBlockChannels)]);
}

// From a tap's sums to those of the next one, where warps add up diagonals: eight taps of four channels use all banks.
template <class W>
constexpr int kDiagonalsPitch = W::kBlockChannels + 4;

// The sums of a block whose warps have kOwn channels each, as products of Chunks chunks (diagonals.cuh): word(channel,
// row of taps, chunk, column) are a lane's words of them, tap v is position kLead + v * kSpreadB, and of_bias(channel)
// is its share of a bias. `totals` has room for all sums of the block. All threads call it.
template <class W, int Chunks, class Word, class OfBias, class Found>
__device__ __forceinline__ void finish_diagonals(float* totals, const Word& word, const OfBias& of_bias,
                                                 const Found& found) {
    using C = typename W::Config;
    constexpr int kOwn = C::kOwn, kTaps = C::kTapsB, kPitch = kDiagonalsPitch<W>;
    constexpr int kFirst = W::kLead / 8, kEights = (W::kLead + (kTaps - 1) * W::kSpreadB) / 8 + 1 - kFirst;
    float* const own = totals + threadIdx.x / 32 * kOwn;
    const Diagonals<W::kStrideB> diagonals;
    diagonals.template add<C::kTapsA * kOwn, Chunks, kFirst, kEights>(
        [&](int k, int chunk, int column) { return word(k % kOwn, k / kOwn, chunk, column); },
        [&](int k, int position, float sum) {
            const int at = position - W::kLead, tap = at / W::kSpreadB;
            if (at >= 0 && at % W::kSpreadB == 0 && tap < kTaps)
                own[(k / kOwn * kTaps + tap) * kPitch + k % kOwn] = sum;
        });
    if constexpr (C::kHasBias) {
#pragma unroll
        for (int o = 0; o < kOwn; ++o) {
            const float sum = sum_of_four(of_bias(o));
            if (diagonals.lane == 0) own[C::kTapsA * kTaps * kPitch + o] = sum;
        }
    }
    find_totals<W, kPitch>(totals, found);
}

// What a block does with the sums of its warps: sums.finish(scratch, found) passes each to found(index, sum). All
// threads call it.
template <class W, class Sums>
__device__ __forceinline__ void finish_lines(const FilterGradients<typename W::Element>& tensors, const Sizes& sizes,
                                             const LinesTiling& tiling, const LinesPlace<W>& place, const Sums& sums) {
    using C = typename W::Config;
    using Element = typename W::Element;
    using Sum = typename W::Sum;
    const long long first_channel = static_cast<long long>(place.group) * W::kBlockChannels;
    const auto store = [&](int index, Sum sum) {
        const long long channel = first_channel + W::channel_of(index);
        const int tap = W::tap_of(index);
        if (channel >= sizes.out_channels) return;
        if (tap < W::kTaps) {
            const int u = place.tap_a + W::row_of(tap), v = place.tap_b + W::column_of(tap);
            const int depth_tap = place.depth_tap + W::depth_of(tap);
            if (u < W::kFilterA && v < W::kFilterB && (C::kFilterD % W::kTapsD == 0 || depth_tap < C::kFilterD))
                tensors.dw[(channel * C::kFilterD + depth_tap) * W::kPlaneTaps +
                           (W::kTurned ? v * W::kFilterA + u : u * W::kFilterB + v)] = static_cast<Element>(sum);
        } else if (tap < W::kSums && place.tap_tile == 0) {
            tensors.db[channel] = static_cast<Element>(sum);
        }
    };
    const unsigned of_grid = place.group * tiling.tap_tiles.divisor + place.tap_tile;
    Sum* const partial =
        static_cast<Sum*>(tensors.partial) + static_cast<unsigned long long>(of_grid) * tiling.parts * W::kCount;
    Sum* const own = partial + static_cast<unsigned long long>(place.part) * W::kCount;
    sums.finish(shared_memory<Sum>(), [&](int index, Sum sum) {
        if (C::kRepair && !is_finite(sum)) {
            const long long channel = first_channel + W::channel_of(index);
            sum = channel < sizes.out_channels
                      ? exact_block_sum<W>(tensors, sizes, tiling, place, channel, W::tap_of(index))
                      : Sum(0);
        }
        if (tiling.parts == 1)
            store(index, sum);
        else
            own[index] = sum;
    });
    if (tiling.parts == 1) return;
    constexpr int kFound = W::kSums * W::kBlockChannels;  // the rest of the last vector is nobody's
    if (kFound + threadIdx.x < W::kCount) own[kFound + threadIdx.x] = 0;
    finish_parts<W::kThreads, W::kPartsAhead, W::kCount>(partial, tiling.parts, tiling.gathered, place.part, of_grid,
                                                         tensors.arrivals, shared_memory<Sum>(), store);
}

}  // namespace dwconv
