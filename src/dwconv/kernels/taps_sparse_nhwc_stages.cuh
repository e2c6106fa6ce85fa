// taps_sparse_nhwc_stages.cuh: how the rows that a block of taps_sparse_nhwc multiplies lie in shared memory
//   A chunk is eight neighbouring positions of a line, each with the block's channels: g has kGroups of a line, x those
//   of all windows, the first one from the first tap of the line's first output on. A pair of chunks of g are two
//   neighbours of a line, or, where a line is one chunk, those of two lines (kLinePairs). A set is eight pairs.
//   Chunk number w of the window of a pair of a line is in plane w % kPlanes, at the pair's number + w / kPlanes *
//   kLines; pairs are numbered line after line, then along the lines. Lines as pairs: plane 2 * w + (which line).
//   Positions, chunks and planes of g are so far apart that eight lanes that read 16 bytes each use all banks once.
//   Boxes (kBoxes) lie line after line, as they are in memory, positions close together; pieces of 16 bytes are
//   swizzled and lines shifted, so that positions and lines use different banks.
#pragma once
#include "taps_lines_copies.cuh"
#include "tensor_copies.cuh"

namespace dwconv {

template <class C>
struct TapsSparse : TapsLines<C, C::kOwn * C::kWarps> {
    using Element = typename C::Element;
    using Base = TapsLines<C, C::kOwn * C::kWarps>;
    static_assert(sizeof(Element) == 2, "tensor cores multiply elements of 16 bits");
    static constexpr int kLines = C::kLines, kOwnLines = kLines, kLead = 0, kLineOutputs = 8 * C::kGroups;
    static constexpr bool kLinePairs = C::kGroups == 1;
    static constexpr int kPairs = kLinePairs ? ceil_div(kLines, 2) : ceil_div(C::kGroups, 2) * kLines;
    static constexpr int kSets = ceil_div(kPairs, 8);

    // The window of a group of eight outputs, in chunks; and different chunks that the windows of a pair consist of.
    static constexpr int kWindow = 7 * Base::kStrideB + C::kTapsB;
    static constexpr int kChunks = ceil_div(kWindow, 8);
    static constexpr int kWords = kLinePairs ? 2 * kChunks : Base::kStrideB + kChunks;
    static constexpr int kLinePositions = kWindow + (kLineOutputs - 8) * Base::kStrideB;
    static constexpr int kLineChunks = ceil_div(kLinePositions, 8);
    static constexpr int kPlanes = kLinePairs ? 2 * kLineChunks : 2 * Base::kStrideB;
    // Where a plane begins, in chunks; planes have a row of chunks of the lines more or less.
    static constexpr int kPlaneLines = kLinePairs ? ceil_div(kLines, 2) : kLines;
    __host__ __device__ static constexpr int plane_at(int plane) {
        int chunks = 0;
        for (int p = 0; p < plane; ++p) chunks += (kLinePairs ? 1 : ceil_div(kLineChunks - p, kPlanes)) * kPlaneLines;
        return chunks;
    }
    // Where chunk `word` of the window of pair 0 is; and how far lanes read, those of pairs that don't exist, too.
    __host__ __device__ static constexpr int word_at(int word) {
        return plane_at(word % kPlanes) + word / kPlanes * kPlaneLines;
    }
    __host__ __device__ static constexpr int furthest_word() {
        int furthest = plane_at(kPlanes);
        for (int w = 0; w < kWords; ++w) furthest = larger(furthest, word_at(w) + 8 * kSets);
        return furthest;
    }
    static constexpr int kXChunks = furthest_word();
    // Which of the words is chunk `chunk` of the window of a pair's half.
    __host__ __device__ static constexpr int word_of(int half, int chunk) {
        return kLinePairs ? 2 * chunk + half : half * Base::kStrideB + chunk;
    }

    static constexpr int kXChannels = Base::kBlockChannels / C::kMultiplier;
    static_assert(C::kOwn % (2 * C::kMultiplier) == 0, "a warp has whole pairs of channels of x");

    // Positions of a line that can exist: all, or those inside of an image that is one line wide (kWidth).
    static constexpr int kXFirst = C::kWidth > 0 ? Base::kPadB : 0;
    static constexpr int kXPositions = C::kWidth > 0 ? smaller(C::kWidth, 8 * kLineChunks - kXFirst) : 8 * kLineChunks;
    static constexpr int kGPositions = C::kWidth > 0 ? C::kOutWidth : kLineOutputs;
    static_assert(kXPositions > 0 && kGPositions <= kLineOutputs, "kWidth is of images one line wide");
    using XPieces = LinePieces<C::kXBytes, true, kLines, kXPositions, kXChannels, Base::kThreads>;
    using GPieces = LinePieces<C::kGBytes, true, kLines, kGPositions, Base::kBlockChannels, Base::kThreads>;

    static constexpr int kXPixel = 2 * kXChannels, kGPixel = 2 * Base::kBlockChannels;  // bytes
    static constexpr int kXPitch = C::kBoxes ? kXPixel : up(kXPixel, 32, 16);
    static constexpr int kGPitch = C::kBoxes ? kGPixel : up(kGPixel, 32, 16);
    static constexpr int kXChunkBytes = C::kBoxes ? 8 * kXPitch : up(8 * kXPitch, 128, 32);
    static constexpr int kGChunkBytes = C::kBoxes ? 8 * kGPitch : up(8 * kGPitch, 128, 32);
    static constexpr int kGPlaneBytes = up(8 * kSets * kGChunkBytes, 128, 64);

    // Boxes: chunks of a line that lanes read, of pairs that don't exist, too.
    static constexpr int kPairsOfLine = kLinePairs ? 1 : ceil_div(8 * kSets, kLines);
    static constexpr int kXBoxChunks = kLinePairs ? kChunks : (kPairsOfLine - 1) * 2 * Base::kStrideB + kWords;
    static constexpr int kGBoxChunks = kLinePairs ? 1 : 2 * kPairsOfLine;
    static constexpr int kXLineBytes = kXBoxChunks * kXChunkBytes, kGLineBytes = kGBoxChunks * kGChunkBytes;
    // What a box brings: all that lanes read, or, of images one line wide (kWidth), columns that exist; of x from a
    // multiple of 128 bytes on. The copy engine takes as long for a column of zeros as for any other.
    static constexpr int kXBoxStep = kXPitch < 128 ? 128 / kXPitch : 1;
    static constexpr int kXBoxFirst = C::kWidth > 0 ? Base::kPadB / kXBoxStep* kXBoxStep : 0;
    static constexpr int kXBoxColumns =
        (C::kWidth > 0 ? smaller(Base::kPadB + C::kWidth, 8 * kXBoxChunks) : 8 * kXBoxChunks) - kXBoxFirst;
    static constexpr int kGBoxColumns = C::kWidth > 0 ? C::kOutWidth : 8 * kGBoxChunks;
    // Where line `line` begins. Lines are shifted, of x by two rows of swizzled pieces (neighbours that are a pair
    // together), of g by four (by two): those that lanes read with other words are whole swizzles away.
    static constexpr int kXShift = kXPixel >= 64 ? 2 * kXPixel : 0;
    static constexpr int kGShift = kGPixel >= 64 ? (kLinePairs ? 2 : 4) * kGPixel : 0;
    __host__ __device__ static constexpr int x_line_at(int line) {
        return line * kXLineBytes + (kLinePairs ? line / 2 : line) * kXShift;
    }
    __host__ __device__ static constexpr int g_line_at(int line) { return line * (kGLineBytes + kGShift); }
    // Where pair `pair` of x and of g begins; `half` of it.
    __host__ __device__ static constexpr int x_box_at(int pair) {
        if (kLinePairs) return x_line_at(2 * pair);
        return x_line_at(pair % kLines) + pair / kLines * 2 * Base::kStrideB * kXChunkBytes;
    }
    __host__ __device__ static constexpr int g_box_at(int pair, int half) {
        if (kLinePairs) return g_line_at(2 * pair + half);
        return g_line_at(pair % kLines) + (pair / kLines * 2 + half) * kGChunkBytes;
    }

    static constexpr int kXRowBytes = C::kBoxes ? up(x_line_at(kLines), 1024) : kXChunks * kXChunkBytes;
    static constexpr int kGAt = Base::kRows * kXRowBytes;
    static constexpr int kStageBytes = kGAt + (C::kBoxes ? up(g_line_at(kLines), 1024) : 2 * kGPlaneBytes);
    static_assert(!C::kBoxes || ((kLines & (kLines - 1)) == 0 && Base::kApartB == 1),
                  "lines of boxes must be a power of two, of neighbouring columns");

    // A lane's place in a stage: of pair lane % 4 of x, and of pair lane % 4 / 2 of g, half lane % 2, at position
    // lane / 4, from channel `channel` of the block on.
    __device__ __forceinline__ static unsigned x_from(int lane, int channel) {
        const int pair = lane % 4, at = lane / 4 * kXPitch;
        if (!C::kBoxes) return 2 * channel + at + pair * kXChunkBytes;
        return swizzled(x_box_at(pair) + at + 2 * channel, kXPixel / 16);
    }
    __device__ __forceinline__ static unsigned g_from(int lane, int channel) {
        const int pair = lane % 4, at = lane / 4 * kGPitch;
        if (!C::kBoxes) return 2 * channel + at + kGAt + pair % 2 * kGPlaneBytes + pair / 2 * kGChunkBytes;
        return kGAt + swizzled(g_box_at(pair / 2, pair % 2) + at + 2 * channel, kGPixel / 16);
    }
    // From there to row e of x, and word `word` of a window of pairs `pair`, a multiple of four, and those behind it;
    // to pairs `pair` of g, a multiple of two, and the one behind it.
    __host__ __device__ static constexpr int x_words(int e, int word, int pair) {
        if (!C::kBoxes) return e * kXRowBytes + (word_at(word) + pair) * kXChunkBytes;
        const int in_pair = kLinePairs ? word % 2 * kXLineBytes + word / 2 * kXChunkBytes : word * kXChunkBytes;
        return e * kXRowBytes + x_box_at(pair) + in_pair;
    }
    __host__ __device__ static constexpr int g_words(int pair) {
        return C::kBoxes ? g_box_at(pair, 0) : pair * kGChunkBytes;
    }
    // Behind the stages, and behind what takes their place at the end: sums of the block, or of the last block's
    // threads.
    static constexpr int kSumsBytes = 4 * Base::kSums * kDiagonalsPitch<Base>;
    static constexpr int kGatesAt =
        up(larger(C::kStages * kStageBytes, larger(kSumsBytes, 16 * (Base::kThreads + 1))), 16);
    // What is read before copies are started: the row of g, where registers are left for it; so all, if that isn't
    // more.
    static constexpr bool kRowAhead = C::kOwn < 8, kReadAtOnce = kRowAhead && Base::kRows * kSets == 1;
    static_assert(C::kXBytes >= 4 && C::kGBytes >= 4, "gates open for what is copied, not for what is stored");
    static_assert(C::kStages >= 2, "kStages must be 2 or more: one is read while another one arrives");

    __device__ __forceinline__ static int first_channel() { return 0; }
    __device__ __forceinline__ static unsigned in_x(const XPieces& piece) {
        const int at = kXFirst + piece.position, chunk = at / 8;
        const int number = kLinePairs ? plane_at(2 * chunk + piece.line % 2) + piece.line / 2
                                      : plane_at(chunk % kPlanes) + chunk / kPlanes * kLines + piece.line;
        return number * kXChunkBytes + at % 8 * kXPitch + 2 * piece.channel;
    }
    __device__ __forceinline__ static unsigned in_g(const GPieces& piece) {
        const int chunk = piece.position / 8;
        const int plane = kLinePairs ? piece.line % 2 : chunk % 2;
        const int number = kLinePairs ? piece.line / 2 : chunk / 2 * kLines + piece.line;
        return kGAt + plane * kGPlaneBytes + number * kGChunkBytes + piece.position % 8 * kGPitch + 2 * piece.channel;
    }
};

}  // namespace dwconv
