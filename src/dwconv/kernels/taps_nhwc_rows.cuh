// taps_nhwc_rows.cuh: what the warps of taps_nhwc march over, and how rows of x and g come to shared memory
//   A marches along axis a (rows of the image, or columns: kTurned) and has kColumns outputs across, along axis b.
//   With stride S and dilation D on an axis, q = gcd(S, D): outputs i and inputs r fall into D / q classes that share
//   no products. In class c, output k is i = c + k * D/q, input m is r = c*S - P + m*D, and tap u joins them where
//   m = k * S/q + u. So every problem is one with dilation 1, stride S/q, and inputs that lie apart.
//   A tile of taps is kTapsA x kTapsB of them from (tap_a, tap_b) on, in kTapsD neighbouring taps of the depth from
//   depth_tap on: as if there were no others.
//   A line is kColumns neighbouring outputs of one class, image after image. The tiles of a block (kTiles of each of
//   its kWarps / kChunks warps) take neighbouring lines. A super-line is as many lines as a block has tiles. A position
//   is an output row of a super-line; a block takes part_rows of them. What it takes of one super-line is a segment; a
//   step of it brings the row of g that is `step` outputs from the start, and the kStrideA rows of x that its first
//   taps meet, in each of the kTapsD planes; the row of g meets kLive - 1 steps' rows of x more.
#pragma once
#include "copies.cuh"
#include "filter_gradients.cuh"

namespace dwconv {

struct TapsNhwcTiling {
    unsigned images, lines;
    unsigned parts, part_rows, positions;
    unsigned gathered;  // parts that one block adds up, before the last block adds up what such blocks have found
    FastDivisor tap_tiles, chunk_groups;
    FastDivisor rows;          // of a super-line
    FastDivisor super_lines;   // of one class of rows
    FastDivisor column_tiles;  // of one class of columns
    FastDivisor depths;        // planes of an output volume; `images` are all of them
};

__host__ __device__ constexpr int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

template <class C>
struct TapsNhwc {
    using Element = typename C::Element;
    using Sum = typename Accumulator<Element>::Type;
    static constexpr bool kTurned = C::kTurned;
    static constexpr int kFilterA = kTurned ? C::kFilterW : C::kFilterH, kFilterB = kTurned ? C::kFilterH : C::kFilterW;
    static constexpr int kStepA = kTurned ? C::kStrideW : C::kStrideH, kStepB = kTurned ? C::kStrideH : C::kStrideW;
    static constexpr int kPadA = kTurned ? C::kPadLeft : C::kPadTop, kPadB = kTurned ? C::kPadTop : C::kPadLeft;
    static constexpr int kApartA = kTurned ? C::kDilationW : C::kDilationH;  // of taps, in rows of x
    static constexpr int kApartB = kTurned ? C::kDilationH : C::kDilationW;
    static constexpr int kClassesA = kApartA / greatest_divisor(kStepA, kApartA);
    static constexpr int kClassesB = kApartB / greatest_divisor(kStepB, kApartB);
    static constexpr int kStrideA = kStepA / greatest_divisor(kStepA, kApartA);  // inside a class
    static constexpr int kStrideB = kStepB / greatest_divisor(kStepB, kApartB);
    static constexpr int kReach = kApartA * kStrideA;  // rows of x from one step to the next one

    static constexpr int kPlaneTaps = kFilterA * kFilterB;  // of one tap of the depth
    static constexpr int kTapTilesA = ceil_div(kFilterA, C::kTapsA), kTapTilesB = ceil_div(kFilterB, C::kTapsB);
    static constexpr int kTileTaps = C::kTapsA * C::kTapsB;      // of one tap of the depth
    static constexpr int kLive = ceil_div(C::kTapsA, kStrideA);  // rows of g that a row of x may meet
    static constexpr bool kFlat = C::kStageSteps > 1;            // a stage is several steps of one column
    static constexpr int kRows = kFlat ? kStrideA : smaller(kStrideA, C::kTapsA);  // of x, in a step
    // Columns of x that a tile reads, and those of them that are kept: of a narrow image, only those that exist.
    static constexpr int kWindow = (C::kColumns - 1) * kStrideB + C::kTapsB;
    static constexpr int kSkipped = C::kWidth > 0 ? kPadB : 0;
    static constexpr int kKept = C::kWidth > 0 ? larger(1, smaller(C::kWidth, kWindow - kSkipped)) : kWindow;
    __host__ __device__ static constexpr bool has_column(int column) {
        return column >= kSkipped && column < kSkipped + kKept;
    }

    static constexpr int kTiles = 32 / C::kLanes;                        // of a warp
    static constexpr int kBlockTiles = C::kWarps / C::kChunks * kTiles;  // of a block
    static constexpr int kChannels = C::kLanes * C::kVector;             // of a warp
    static constexpr int kBlockChannels = C::kChunks * kChannels;        // of a block
    static constexpr int kThreads = 32 * C::kWarps;
    static constexpr int kTaps = C::kTapsD * kTileTaps, kSums = kTaps + (C::kHasBias ? 1 : 0);
    static constexpr int kValues = kSums * C::kVector;  // of a thread
    // Sums of a block, each added up over its tiles, as whole vectors of 16 bytes.
    static constexpr int kCount = ceil_div(kValues * C::kChunks * C::kLanes, 4) * 4;

    // A stage of a warp: g [steps * kColumns][kTiles][kChannels],
    // x [steps * kTapsD * kRows * kKept][kTiles][kChannels / M].
    static constexpr int kPitch = kTiles * kChannels, kXPitch = kPitch / C::kMultiplier;
    static constexpr int kGColumns = C::kStageSteps * C::kColumns;
    static constexpr int kXColumns = C::kStageSteps * C::kTapsD * kRows * kKept;
    static constexpr int kAlign = 16 / static_cast<int>(sizeof(Element));
    static constexpr int kGElements = ceil_div(kGColumns * kPitch, kAlign) * kAlign;
    static constexpr int kStage = kGElements + ceil_div(kXColumns * kXPitch, kAlign) * kAlign;

    // Pieces of one copy. The lanes of a tile copy kGStep columns at once.
    static constexpr int kGPiece = C::kGBytes / static_cast<int>(sizeof(Element));
    static constexpr int kXPiece = C::kXBytes / static_cast<int>(sizeof(Element));
    static constexpr int kGPieces = kChannels / kGPiece, kXPieces = kChannels / C::kMultiplier / kXPiece;
    static constexpr int kGStep = C::kLanes / kGPieces, kXStep = C::kLanes / kXPieces;
    static constexpr int kGCopies = ceil_div(kFlat ? kGColumns : C::kColumns, kGStep);
    static constexpr int kXCopies = ceil_div(kFlat ? kXColumns : kKept, kXStep);

    static_assert(kChannels % C::kMultiplier == 0, "a warp must have all output channels of its input channels");
    static_assert(C::kMultiplier == 1 || C::kVector == 1, "kVector must be 1: neighbouring outputs share an input");
    static_assert(kGPieces * kGPiece == kChannels && kGPieces * kGStep == C::kLanes, "pieces must fill a tile's lanes");
    static_assert(kXPieces * kXPiece * C::kMultiplier == kChannels && kXPieces * kXStep == C::kLanes,
                  "pieces must fill a tile's lanes");
    static_assert(C::kWarps % C::kChunks == 0, "kChunks must divide kWarps: each chunk has as many warps");
    static_assert(!kFlat || (C::kColumns == 1 && C::kTapsB == 1), "stages of several steps are of one column");
    static_assert(!kFlat || C::kStageSteps % kLive == 0, "rows of g must be where they were after each stage");
    static_assert(C::kTapsD == 1 || (C::kVolume && !kFlat), "only rows of volumes meet several planes of x");
    static_assert(C::kTapsD <= 32, "which planes exist must fit in 32 bits");
    static_assert(C::kWidth == 0 || (kTapTilesB == 1 && kApartB == 1), "kWidth is of whole filter rows");
    static_assert(kGCopies <= 32 && kXCopies <= 32, "which pieces of a row exist must fit in 32 bits");
    static_assert(C::kStages >= 2, "kStages must be 2 or more: one is read while another one arrives");
};

// What a block, and one warp of it, works on.
template <class C>
struct TapsPlace {
    using W = TapsNhwc<C>;
    unsigned group, tap_tile, part;   // of chunks; of taps; of positions
    int depth_tap, tap_a, tap_b;      // the first of the tile
    unsigned chunk, warp_tile, tile;  // of the block: this warp's chunk and first tile, and its lane's tile
    int in_a, out_a, in_b, out_b;
    long long x_a, x_b, g_a, g_b, g_image;  // strides, in elements

    __device__ __forceinline__ TapsPlace(const Sizes& sizes, const TapsNhwcTiling& tiling) {
        const unsigned above = tiling.tap_tiles.quotient(blockIdx.x);
        tap_tile = blockIdx.x - above * tiling.tap_tiles.divisor;
        part = tiling.chunk_groups.quotient(above);
        group = above - part * tiling.chunk_groups.divisor;
        constexpr unsigned kPlaneTiles = W::kTapTilesA * W::kTapTilesB;
        const unsigned of_plane = C::kVolume ? tap_tile % kPlaneTiles : tap_tile;
        depth_tap = C::kVolume ? static_cast<int>(tap_tile / kPlaneTiles) * C::kTapsD : 0;
        tap_a = static_cast<int>(of_plane / W::kTapTilesB) * C::kTapsA;
        tap_b = static_cast<int>(of_plane % W::kTapTilesB) * C::kTapsB;
        const unsigned warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // tells compilers that it is uniform
        chunk = warp % C::kChunks;
        warp_tile = warp / C::kChunks * W::kTiles;
        tile = warp_tile + min(threadIdx.x % 32 / C::kLanes, W::kTiles - 1u);
        const long long column = sizes.out_channels, row = sizes.out_w * column;
        g_image = sizes.out_h * row;
        in_a = static_cast<int>(W::kTurned ? sizes.in_w : sizes.in_h);
        in_b = static_cast<int>(W::kTurned ? sizes.in_h : sizes.in_w);
        out_a = static_cast<int>(W::kTurned ? sizes.out_w : sizes.out_h);
        out_b = static_cast<int>(W::kTurned ? sizes.out_h : sizes.out_w);
        x_a = W::kTurned ? sizes.x_column : sizes.x_row;
        x_b = W::kTurned ? sizes.x_row : sizes.x_column;
        g_a = W::kTurned ? column : row;
        g_b = W::kTurned ? row : column;
    }
};

// Where a line is: its image, and its first output column with the class of that.
struct TapsLine {
    unsigned image;
    int column_class, first;  // column k of the line is column_class + (first + k) * classes

    template <class C>
    __device__ __forceinline__ static TapsLine find(unsigned line, const TapsNhwcTiling& tiling) {
        constexpr unsigned kClasses = TapsNhwc<C>::kClassesB;
        const unsigned above = tiling.column_tiles.quotient(line);
        TapsLine found;
        found.first = static_cast<int>(line - above * tiling.column_tiles.divisor) * C::kColumns;
        found.image = kClasses == 1 ? above : above / kClasses;
        found.column_class = static_cast<int>(above - found.image * kClasses);
        return found;
    }
};

// A run of output rows of a super-line, those that meet a row of x in the tile of taps.
template <class C>
struct TapsSegment {
    using W = TapsNhwc<C>;
    unsigned super_line;
    int row_class;
    int first, end, last;  // rows of g; the step after the last one
    int base;              // the row of x that the first tap of row 0 meets
    unsigned planes;       // volumes: a bit for each tap of the depth whose plane of x exists, for any of the lanes

    // The next one from `position` on, which it moves. False where there is none; the same for all lanes of a warp.
    __device__ __forceinline__ bool find(unsigned& position, unsigned end_position, const TapsPlace<C>& place,
                                         const Sizes& sizes, const TapsNhwcTiling& tiling) {
        while (position < end_position) {
            const unsigned line = tiling.rows.quotient(position);
            first = static_cast<int>(position - line * tiling.rows.divisor);
            end = static_cast<int>(min(tiling.rows.divisor, first + end_position - position));
            position += end - first;
            const unsigned of_class = W::kClassesA == 1 ? 0 : tiling.super_lines.quotient(line);
            row_class = static_cast<int>(of_class);
            super_line = line - of_class * tiling.super_lines.divisor;
            const unsigned warp_line = super_line * W::kBlockTiles + place.warp_tile;
            if (warp_line >= tiling.lines) continue;
            if constexpr (C::kVolume) {
                planes = ~0u;
                if constexpr (W::kTiles == 1) {
                    planes = MetPlanes::find<C>(TapsLine::find<C>(warp_line, tiling).image, tiling.depths, sizes,
                                                place.depth_tap)
                                 .template existing<C, C::kTapsD>(sizes, place.depth_tap);
                    if (!(C::kHasBias && place.tap_tile == 0) && planes == 0) continue;
                }
            }
            base = row_class * W::kStepA - W::kPadA + place.tap_a * W::kApartA;
            end = min(end, ceil_div(place.out_a - row_class, W::kClassesA));
            // Steps before which all rows of x end.
            const int x_end = place.in_a > base ? ceil_div(place.in_a - base, W::kReach) : 0;
            if constexpr (!C::kHasBias) {
                const int before = -base - (C::kTapsA - 1) * W::kApartA;
                if (before > 0) first = max(first, ceil_div(before, W::kReach));
                end = min(end, x_end);
                if constexpr (W::kTiles == 1 && W::kTapTilesB > 1) {
                    const TapsLine at = TapsLine::find<C>(warp_line, tiling);
                    const int column =
                        at.column_class * W::kStepB - W::kPadB + (place.tap_b + at.first * W::kStrideB) * W::kApartB;
                    if (column >= place.in_b || column + (W::kWindow - 1) * W::kApartB < 0) continue;
                }
            }
            if (first >= end) continue;
            last = min(end + W::kLive - 1, C::kHasBias ? max(x_end, end) : x_end);
            return true;
        }
        return false;
    }
};

// What a lane copies of its tile's rows: the same pieces of neighbouring columns (of neighbouring rows: kFlat).
template <class C>
struct TapsCopies {
    using W = TapsNhwc<C>;
    using Element = typename C::Element;
    static constexpr unsigned kSize = sizeof(Element);
    const TapsPlace<C>& place;
    const TapsNhwcTiling& tiling;
    unsigned position, end_position;
    TapsSegment<C> segment;
    int step = 0;
    bool g_channel, x_channel;    // exist
    int g_first, x_first;         // column (or row) of the lane's first piece
    CopyPlace g_to, x_to;         // where it goes in the warp's first stage
    long long g_piece, x_piece;   // channel
    const Element *g_at, *x_at;   // the first piece of the step's first row
    unsigned g_exists, x_exists;  // a bit for each copy of a row
    unsigned x_planes;            // a bit for each plane of x
    unsigned g_wanted, x_wanted;  // else there is no such column
    static constexpr int kGTargets = W::kFlat ? W::kGColumns : C::kColumns;
    static constexpr int kXTargets = W::kFlat ? W::kXColumns : W::kKept;
    static constexpr bool kGAlways = 32 % C::kLanes == 0 && kGTargets % W::kGStep == 0;
    static constexpr bool kXAlways = 32 % C::kLanes == 0 && kXTargets % W::kXStep == 0;

    __device__ __forceinline__ TapsCopies(const FilterGradients<Element>& tensors, const Sizes& sizes,
                                          const TapsPlace<C>& place_, const TapsNhwcTiling& tiling_, Element* stages,
                                          unsigned first, unsigned end)
        : place(place_),
          tiling(tiling_),
          position(first),
          end_position(end),
          g_to(stages + own_tile() % W::kTiles * W::kChannels + own_lane() / W::kGPieces * W::kPitch +
               own_lane() % W::kGPieces * W::kGPiece),
          x_to(stages + W::kGElements + own_tile() % W::kTiles * (W::kChannels / C::kMultiplier) +
               own_lane() / W::kXPieces * W::kXPitch + own_lane() % W::kXPieces * W::kXPiece) {
        const int tile = own_tile(), of_tile = own_lane();
        const int g_part = of_tile % W::kGPieces * W::kGPiece, x_part = of_tile % W::kXPieces * W::kXPiece;
        const long long channel = (static_cast<long long>(place.group) * C::kChunks + place.chunk) * W::kChannels;
        g_piece = channel + g_part;
        x_piece = channel / C::kMultiplier + x_part;
        g_channel = tile < W::kTiles && g_piece < sizes.out_channels;
        x_channel = tile < W::kTiles && x_piece < sizes.out_channels / C::kMultiplier;
        g_first = of_tile / W::kGPieces;
        x_first = of_tile / W::kXPieces;
        g_wanted = x_wanted = 0;
#pragma unroll
        for (int k = 0; k < W::kGCopies; ++k)
            if (tile < W::kTiles && g_first + k * W::kGStep < kGTargets) g_wanted |= 1u << k;
#pragma unroll
        for (int k = 0; k < W::kXCopies; ++k)
            if (tile < W::kTiles && x_first + k * W::kXStep < kXTargets) x_wanted |= 1u << k;
        keep(g_wanted);
        keep(x_wanted);
        begin(tensors, sizes);
    }

    __device__ __forceinline__ static int own_tile() { return static_cast<int>(threadIdx.x % 32 / C::kLanes); }
    __device__ __forceinline__ static int own_lane() { return static_cast<int>(threadIdx.x % 32 % C::kLanes); }

    __device__ __forceinline__ void begin(const FilterGradients<Element>& tensors, const Sizes& sizes) {
        if (!segment.find(position, end_position, place, sizes, tiling)) {
            segment.last = 0;  // nothing more to copy
            return;
        }
        step = segment.first;
        const unsigned line = segment.super_line * W::kBlockTiles + place.tile;
        const TapsLine at = TapsLine::find<C>(line, tiling);
        const bool exists = line < tiling.lines;
        const int g_column = at.column_class + at.first * W::kClassesB;
        const int x_column =
            at.column_class * W::kStepB - W::kPadB + (place.tap_b + at.first * W::kStrideB + W::kSkipped) * W::kApartB;
        const long long g_row = segment.row_class + static_cast<long long>(step) * W::kClassesA;
        const long long x_row = segment.base + static_cast<long long>(step) * W::kReach;
        const int g_lane = W::kFlat ? 0 : g_first * W::kClassesB, x_lane = W::kFlat ? 0 : x_first * W::kApartB;
        g_at = tensors.g + at.image * place.g_image + g_row * place.g_a + (g_column + g_lane) * place.g_b + g_piece;
        x_at = tensors.x + at.image * sizes.x_image + x_row * place.x_a + (x_column + x_lane) * place.x_b + x_piece;
        if constexpr (C::kVolume) {
            const MetPlanes met = MetPlanes::find<C>(at.image, tiling.depths, sizes, place.depth_tap);
            x_at += met.in_x(sizes) - at.image * sizes.x_image;
            x_planes = met.existing<C, C::kTapsD>(sizes, place.depth_tap);
        }
        g_exists = x_exists = 0;
        if constexpr (W::kFlat) {
            g_at += g_first * W::kClassesA * place.g_a;
            x_at += x_first * W::kApartA * place.x_a;
            g_exists = exists && g_channel && g_column < place.out_b;
            x_exists = exists && x_channel && x_column >= 0 && x_column < place.in_b && (!C::kVolume || x_planes);
        } else {
#pragma unroll
            for (int k = 0; k < W::kGCopies; ++k)
                if (exists && g_channel && g_column + g_lane + k * W::kGStep * W::kClassesB < place.out_b)
                    g_exists |= 1u << k;
#pragma unroll
            for (int k = 0; k < W::kXCopies; ++k)
                if (exists && x_channel &&
                    static_cast<unsigned>(x_column + x_lane + k * W::kXStep * W::kApartB) <
                        static_cast<unsigned>(place.in_b))
                    x_exists |= 1u << k;
        }
    }

    // Starts the copies of the next stage, `stage` bytes behind the first; always ends a group.
    __device__ __forceinline__ void copy(unsigned stage, const FilterGradients<Element>& tensors, const Sizes& sizes) {
        if (step < segment.last) {
            if constexpr (W::kFlat)
                copy_steps(stage);
            else
                copy_step(stage, sizes);
            step += C::kStageSteps;
            if (step < segment.last) {
                g_at += C::kStageSteps * W::kClassesA * place.g_a;
                x_at += C::kStageSteps * W::kReach * place.x_a;
            } else {
                begin(tensors, sizes);
            }
        }
        end_of_copies();
    }

    __device__ __forceinline__ void copy_step(unsigned stage, const Sizes& sizes) {
        if (step < segment.end) {
            const Element* from = g_at;
#pragma unroll
            for (int k = 0; k < W::kGCopies; ++k) {
                if (kGAlways || (g_wanted & 1u << k))
                    copy_piece_to<C::kGBytes, C::kCached>(g_to, stage + k * W::kGStep * W::kPitch * kSize, from,
                                                          g_exists & 1u << k);
                from += W::kGStep * W::kClassesB * place.g_b;
            }
        }
        const int row = segment.base + step * W::kReach;
#pragma unroll
        for (int e = 0; e < W::kRows; ++e) {
            if (static_cast<unsigned>(row + e * W::kApartA) >= static_cast<unsigned>(place.in_a)) continue;
#pragma unroll
            for (int d = 0; d < C::kTapsD; ++d) {
                if (C::kVolume && !(segment.planes & 1u << d)) continue;
                const unsigned exists = !C::kVolume || W::kTiles == 1 || (x_planes & 1u << d) ? x_exists : 0;
                const Element* from = x_at + e * W::kApartA * place.x_a;
                if constexpr (C::kTapsD > 1) from += d * C::kDilationD * sizes.x_depth;
#pragma unroll
                for (int k = 0; k < W::kXCopies; ++k) {
                    if (kXAlways || (x_wanted & 1u << k))
                        copy_piece_to<C::kXBytes, C::kCached>(
                            x_to, stage + ((d * W::kRows + e) * W::kKept + k * W::kXStep) * W::kXPitch * kSize, from,
                            exists & 1u << k);
                    from += W::kXStep * W::kApartB * place.x_b;
                }
            }
        }
    }

    // Several steps of one column; rows that don't exist, or aren't the segment's, become zeros.
    __device__ __forceinline__ void copy_steps(unsigned stage) {
        const Element* from = g_at;
        const int g_rows = segment.end - step - g_first;
#pragma unroll
        for (int k = 0; k < W::kGCopies; ++k) {
            if (kGAlways || (g_wanted & 1u << k))
                copy_piece_to<C::kGBytes, C::kCached>(g_to, stage + k * W::kGStep * W::kPitch * kSize, from,
                                                      k * W::kGStep < g_rows ? g_exists : 0);
            from += W::kGStep * W::kClassesA * place.g_a;
        }
        from = x_at;
        const int row = segment.base + step * W::kReach + x_first * W::kApartA;
#pragma unroll
        for (int k = 0; k < W::kXCopies; ++k) {
            if (kXAlways || (x_wanted & 1u << k))
                copy_piece_to<C::kXBytes, C::kCached>(
                    x_to, stage + k * W::kXStep * W::kXPitch * kSize, from,
                    static_cast<unsigned>(row + k * W::kXStep * W::kApartA) < static_cast<unsigned>(place.in_a)
                        ? x_exists
                        : 0);
            from += W::kXStep * W::kApartA * place.x_a;
        }
    }
};

}  // namespace dwconv
