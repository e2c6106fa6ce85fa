// taps_lines_copies.cuh: how rows of x and g come to shared memory, for kernels that march over lines of outputs
#pragma once
#include "copies.cuh"
#include "taps_lines.cuh"

namespace dwconv {

// The pieces of one row of a super-line that a thread copies: those numbered thread + k * Threads of so many threads
// that share a row. Channels last a piece is some channels of a position; channels first some neighbouring positions of
// a channel, and those of a chunk of eight stand together, of one line after another.
template <int Bytes, bool Last, int Lines, int Positions, int Channels, int Threads>
struct LinePieces {
    static constexpr int kWidth = Bytes / 2;
    static constexpr int kAcross = Last ? Positions : ceil_div(Positions, kWidth);  // pieces along a line
    static constexpr int kTogether = Last ? Channels / kWidth : 8 / kWidth;
    static constexpr int kGroups = Last ? Positions : ceil_div(kAcross, kTogether);
    static constexpr int kAll = Lines * kGroups * kTogether * (Last ? 1 : Channels);
    static constexpr int kCopies = ceil_div(kAll, Threads);
    static constexpr bool kAlways = kAll % Threads == 0 && (Last || kAcross % kTogether == 0);  // all are wanted
    static_assert(Last ? Channels % kWidth == 0 : Positions % kWidth == 0, "pieces must fill a row");
    static_assert(kCopies <= 32, "which pieces exist must fit in 32 bits");

    int line, position, channel;  // the first of the piece
    bool wanted;

    __device__ __forceinline__ explicit LinePieces(int k) {
        const int number = static_cast<int>(threadIdx.x % Threads) + k * Threads;
        const int above = number / kTogether, together = number - above * kTogether;
        const int across = above / Lines;
        wanted = kAlways || number < kAll;
        line = above - across * Lines;
        if (Last) {
            channel = together * kWidth;
            position = across;
        } else {
            channel = across / kGroups;
            const int piece = (across - channel * kGroups) * kTogether + together;
            position = piece * kWidth;
            wanted = wanted && (kAlways || piece < kAcross);
        }
    }
};

// What a thread copies. W says where pieces of x and g belong in a stage, in bytes.
template <class W>
struct LinesCopies {
    using C = typename W::Config;
    using Element = typename W::Element;
    using XPieces = typename W::XPieces;
    using GPieces = typename W::GPieces;
    static constexpr int kXCopies = XPieces::kCopies, kGCopies = GPieces::kCopies;
    // Compilers would rather find places in a stage again for each copy. With eight channels, registers want it, too.
    static constexpr bool kKept = C::kOwn < 8;

    const LinesPlace<W>& place;
    const LinesTiling& tiling;
    unsigned position;
    LinesSegment<W> segment;
    int step = 0;
    CopyPlace stages;
    unsigned x_to[kXCopies], g_to[kGCopies];  // in a stage
    // Rows of the first line's image; and where pieces are from there on, in elements. A super-line spans less than
    // 2^31.
    const Element *x_row, *g_row;
    unsigned x_at[kXCopies], g_at[kGCopies];
    unsigned x_wanted = 0, g_wanted = 0, x_exists, g_exists;  // a bit for each piece

    __device__ __forceinline__ LinesCopies(const FilterGradients<Element>& tensors, const Sizes& sizes,
                                           const LinesPlace<W>& place_, const LinesTiling& tiling_, void* stages_)
        : place(place_), tiling(tiling_), position(place_.first), stages(stages_) {
#pragma unroll
        for (int k = 0; k < kXCopies; ++k) {
            const XPieces piece(k);
            x_to[k] = W::in_x(piece);
            if constexpr (kKept) keep(x_to[k]);
            if (piece.wanted) x_wanted |= 1u << k;
        }
#pragma unroll
        for (int k = 0; k < kGCopies; ++k) {
            const GPieces piece(k);
            g_to[k] = W::in_g(piece);
            if constexpr (kKept) keep(g_to[k]);
            if (piece.wanted) g_wanted |= 1u << k;
        }
        begin(tensors, sizes);
    }

    // Finds the next segment, and where its first rows are.
    __device__ __forceinline__ void begin(const FilterGradients<Element>& tensors, const Sizes& sizes) {
        if (!segment.find(position, place, sizes, tiling)) {
            segment.last = step = 0;  // nothing more to copy
            return;
        }
        step = segment.first;
        const long long channels = sizes.out_channels;
        const long long first_channel = static_cast<long long>(place.group) * W::kBlockChannels + W::first_channel();
        const unsigned first_line = segment.super_line * W::kLines;
        const unsigned image = OutputLine<W>(first_line, tiling).image;
        const unsigned volume = C::kVolume ? tiling.depths.quotient(image) : image;
        x_row = tensors.x + (volume * sizes.x_image + first_channel / C::kMultiplier * sizes.x_channel +
                             (segment.base + static_cast<long long>(step) * W::kReach) * place.x_a);
        g_row = tensors.g + (place.image_of_g(image, tiling) + first_channel * place.g_channel +
                             (segment.row_class + static_cast<long long>(step) * W::kClassesA) * place.g_a);
        x_exists = g_exists = 0;
#pragma unroll
        for (int k = 0; k < kXCopies; ++k) {
            const XPieces piece(k);
            const OutputLine<W> at(first_line + piece.line, tiling);
            const int column = at.x_column(place.tap_b) + (W::kXFirst + piece.position) * W::kApartB;
            bool exists = first_line + piece.line < tiling.lines &&
                          first_channel / C::kMultiplier + piece.channel < channels / C::kMultiplier &&
                          static_cast<unsigned>(column) < static_cast<unsigned>(place.in_b);
            long long plane = (at.image - volume) * sizes.x_image;
            if constexpr (C::kVolume) {
                const MetPlanes met = MetPlanes::find<C>(at.image, tiling.depths, sizes, place.depth_tap);
                exists = exists && met.exists;
                plane = met.in_x(sizes) - volume * sizes.x_image;
            }
            x_at[k] = static_cast<unsigned>(plane + column * place.x_b + piece.channel * sizes.x_channel);
            if (exists) x_exists |= 1u << k;
        }
#pragma unroll
        for (int k = 0; k < kGCopies; ++k) {
            const GPieces piece(k);
            const OutputLine<W> at(first_line + piece.line, tiling);
            const int column = at.column_class + (at.first + piece.position) * W::kClassesB;
            g_at[k] = static_cast<unsigned>(place.image_of_g(at.image, tiling) - place.image_of_g(image, tiling) +
                                            column * place.g_b + piece.channel * place.g_channel);
            if (first_line + piece.line < tiling.lines && first_channel + piece.channel < channels &&
                column < place.out_b)
                g_exists |= 1u << k;
        }
    }

    // Whether this thread copies of the next step: all do.
    __device__ __forceinline__ static constexpr bool has_turn() { return true; }

    template <int Bytes, bool Always>
    __device__ __forceinline__ void copy_one(unsigned offset, const Element* from, unsigned exists,
                                             unsigned wanted) const {
        if constexpr (Always)
            copy_piece_to<Bytes, C::kCached>(stages, offset, from, exists);
        else
            copy_wanted_piece_to<Bytes, C::kCached>(stages, offset, from, exists, wanted);
    }

    // Starts the copies of the next step, `stage` bytes behind the first stage; always ends a group.
    __device__ __forceinline__ void copy(unsigned stage, const FilterGradients<Element>& tensors, const Sizes& sizes) {
        if (step < segment.last) {
            if (step < segment.end) {
#pragma unroll
                for (int k = 0; k < kGCopies; ++k)
                    copy_one<C::kGBytes, GPieces::kAlways>(stage + g_to[k], g_row + g_at[k], g_exists & 1u << k,
                                                           g_wanted & 1u << k);
            }
            const int row = segment.base + step * W::kReach;
#pragma unroll
            for (int e = 0; e < W::kRows; ++e) {
                if (!place.has_row(row + e * W::kApartA)) continue;
                const Element* const from = x_row + e * W::kApartA * place.x_a;
#pragma unroll
                for (int k = 0; k < kXCopies; ++k)
                    copy_one<C::kXBytes, XPieces::kAlways>(stage + e * W::kXRowBytes + x_to[k], from + x_at[k],
                                                           x_exists & 1u << k, x_wanted & 1u << k);
            }
            if (++step < segment.last) {
                x_row += W::kReach * place.x_a;
                g_row += W::kClassesA * place.g_a;
            } else {
                begin(tensors, sizes);
            }
        }
        end_of_copies();
    }
};

}  // namespace dwconv
