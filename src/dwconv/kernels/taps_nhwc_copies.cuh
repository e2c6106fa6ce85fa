// taps_nhwc_copies.cuh: rows of x and g come to the stages of a warp of taps_nhwc by its lanes' copies (cp.async)
#pragma once
#include "copies.cuh"
#include "taps_nhwc_rows.cuh"

namespace dwconv {

// What a lane copies of its tile's rows: the same pieces of neighbouring columns (of neighbouring rows: kFlat).
template <class C>
struct TapsCopies {
    using W = TapsNhwc<C>;
    using Element = typename C::Element;
    static constexpr unsigned kSize = sizeof(Element);
    const TapsPlace<C>& place;
    const LinesTiling& tiling;
    unsigned position;
    LinesSegment<W> segment;
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
                                          const TapsPlace<C>& place_, const LinesTiling& tiling_, Element* stages,
                                          unsigned first)
        : place(place_),
          tiling(tiling_),
          position(first),
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
        if (!segment.find(position, place, sizes, tiling, place.warp_tile)) {
            segment.last = 0;  // nothing more to copy
            return;
        }
        step = segment.first;
        const unsigned line = segment.super_line * W::kLines + place.tile;
        const OutputLine<W> at(line, tiling);
        const bool exists = line < tiling.lines;
        const int g_column = at.column_class + at.first * W::kClassesB;
        const int x_column = at.x_column(place.tap_b) + W::kSkipped * W::kApartB;
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

    // The stages that were filled first are there for all lanes, and none reads the one any more that is filled next.
    __device__ __forceinline__ void wait_until_full() const {
        wait_for_copies<C::kStages - 2>();
        __syncwarp();
    }
    __device__ __forceinline__ void wait_for_all() const { wait_for_copies<0>(); }

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
            if (!place.has_row(row + e * W::kApartA)) continue;
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
                copy_piece_to<C::kXBytes, C::kCached>(x_to, stage + k * W::kXStep * W::kXPitch * kSize, from,
                                                      place.has_row(row + k * W::kXStep * W::kApartA) ? x_exists : 0);
            from += W::kXStep * W::kApartA * place.x_a;
        }
    }
};

}  // namespace dwconv
