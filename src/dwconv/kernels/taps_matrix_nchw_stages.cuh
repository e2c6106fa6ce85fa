// taps_matrix_nchw_stages.cuh: how the rows that a warp of taps_matrix_nchw multiplies lie in shared memory
//   A chunk is eight neighbouring positions of a line of a channel, 16 bytes: g has kGroups of a line, x kLineChunks,
//   the first one kLead positions before the first tap of the line's first output. Chunk c of line l of x is number (c
//   % S * kChunkRows + c / S) * kLines + l: groups of eight outputs, numbered through all lines, find the chunks of
//   their windows in their own order.
#pragma once
#include "taps_lines_copies.cuh"

namespace dwconv {

template <class C>
struct TapsMatrix : TapsLines<C, C::kOwn * C::kWarps> {
    using Element = typename C::Element;
    using Base = TapsLines<C, C::kOwn * C::kWarps>;
    static_assert(sizeof(Element) == 2, "tensor cores multiply elements of 16 bits");
    static constexpr int kLines = C::kLines, kOwnLines = kLines, kLead = C::kLead, kLineOutputs = 8 * C::kGroups;

    // The window of a group of eight outputs: rows of the matrix that it makes, with those of other groups.
    static constexpr int kWindow = 7 * Base::kStrideB + (C::kTapsB - 1) * Base::kSpreadB + 1 + kLead;
    static constexpr int kPartsAhead = 8;                            // more would need more registers than the march
    static constexpr int kMatrices = ceil_div(kWindow, 16);          // of 16 rows
    static constexpr int kSets = ceil_div(C::kGroups * kLines, 16);  // of 16 groups
    static constexpr int kLinePositions = kWindow + (kLineOutputs - 8) * Base::kStrideB;
    static constexpr int kLineChunks = ceil_div(kLinePositions, 8);
    static constexpr int kChunkRows =
        larger(C::kGroups + (2 * kMatrices - 1) / Base::kStrideB, ceil_div(kLineChunks, Base::kStrideB));
    // Where chunk number `chunk` of a group's window is, from the group's number on.
    __host__ __device__ static constexpr int chunk_at(int chunk) {
        return (chunk % Base::kStrideB * kChunkRows + chunk / Base::kStrideB) * kLines;
    }
    static constexpr int kGChunks = 16 * kSets;
    static constexpr int kXChunks = larger(kGChunks + chunk_at(smaller(Base::kStrideB - 1, 2 * kMatrices - 1)) +
                                               (2 * kMatrices - 1) / Base::kStrideB * kLines,
                                           Base::kStrideB * kChunkRows * kLines);

    static constexpr int kXOwn = larger(1, C::kOwn / C::kMultiplier);  // channels of x of a warp
    static_assert(C::kOwn % C::kMultiplier == 0 || C::kMultiplier % C::kOwn == 0, "a warp has whole channels of x");

    // Positions of a line that can exist: all, or those inside of an image that is one line wide (kWidth).
    static constexpr int kXFirst = C::kWidth > 0 ? Base::kPadB + kLead : 0;
    static constexpr int kXPositions = C::kWidth > 0 ? smaller(C::kWidth, 8 * kLineChunks - kXFirst) : 8 * kLineChunks;
    static constexpr int kGPositions = C::kWidth > 0 ? C::kOutWidth : kLineOutputs;
    static_assert(kXPositions > 0 && kGPositions <= kLineOutputs, "kWidth is of images one line wide");
    using XPieces = LinePieces<C::kXBytes, false, kLines, kXPositions, kXOwn, 32>;
    using GPieces = LinePieces<C::kGBytes, false, kLines, kGPositions, C::kOwn, 32>;

    // A stage of a warp: x [kRows][kXOwn][kXChunks], then g [kOwn][kGChunks], 16 bytes each.
    static constexpr int kXChannelBytes = 16 * kXChunks, kGChannelBytes = 16 * kGChunks;
    static constexpr int kXRowBytes = kXOwn * kXChannelBytes, kGAt = Base::kRows * kXRowBytes;
    static constexpr int kStageBytes = kGAt + C::kOwn * kGChannelBytes;
    static_assert(C::kStages >= 2, "kStages must be 2 or more: one is read while another one arrives");

    __device__ __forceinline__ static int first_channel() { return static_cast<int>(threadIdx.x / 32) * C::kOwn; }
    __device__ __forceinline__ static unsigned in_x(const XPieces& piece) {
        const int at = kXFirst + piece.position, chunk = at / 8;
        const int number = (chunk % Base::kStrideB * kChunkRows + chunk / Base::kStrideB) * kLines + piece.line;
        return piece.channel * kXChannelBytes + 16 * number + 2 * (at % 8);
    }
    __device__ __forceinline__ static unsigned in_g(const GPieces& piece) {
        return kGAt + piece.channel * kGChannelBytes + 16 * (piece.position / 8 * kLines + piece.line) +
               2 * (piece.position % 8);
    }
};

}  // namespace dwconv
