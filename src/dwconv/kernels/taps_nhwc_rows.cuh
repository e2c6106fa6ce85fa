// taps_nhwc_rows.cuh: how rows of x and g lie in the shared memory of taps_nhwc's warps
//   A lane has kColumns outputs across the march: a line. The tiles of a block, kTiles of each of its kWarps / kChunks
//   warps, take neighbouring lines; each warp marches over its own ones (taps_lines.cuh).
#pragma once
#include "taps_lines.cuh"

namespace dwconv {

template <class C>
struct TapsNhwc : TapsLines<C, C::kChunks * C::kLanes * C::kVector, C::kTapsD, C::kVector> {
    using Element = typename C::Element;
    using Base = TapsLines<C, C::kChunks * C::kLanes * C::kVector, C::kTapsD, C::kVector>;
    static constexpr bool kFlat = C::kStageSteps > 1 && !C::kBoxes;     // a stage is several steps of one column
    static constexpr int kRows = kFlat ? Base::kStrideA : Base::kRows;  // of x, in a step
    // Columns of x that a tile reads, and those of them that are kept: of a narrow image, only those that exist.
    static constexpr int kWindow = (C::kColumns - 1) * Base::kStrideB + C::kTapsB;
    static constexpr int kSkipped = C::kWidth > 0 ? Base::kPadB : 0;
    static constexpr int kKept = C::kWidth > 0 ? larger(1, smaller(C::kWidth, kWindow - kSkipped)) : kWindow;
    __host__ __device__ static constexpr bool has_column(int column) {
        return column >= kSkipped && column < kSkipped + kKept;
    }

    static constexpr int kTiles = 32 / C::kLanes;             // of a warp
    static constexpr int kChannels = C::kLanes * C::kVector;  // of a warp
    static constexpr int kValues = Base::kSums * C::kVector;  // of a thread
    static constexpr int kPartsAhead = 8;                     // more would need more registers than the march
    // What taps_lines.cuh asks for.
    static constexpr int kLines = C::kWarps / C::kChunks * kTiles, kOwnLines = kTiles;
    static constexpr int kLineOutputs = C::kColumns, kLinePositions = kWindow, kLead = 0;

    // A stage of a warp: g [steps * kColumns][kTiles][kChannels],
    // x [kTapsD * steps * kRows * kKept][kTiles][kChannels / M].
    static constexpr int kPitch = kTiles * kChannels, kXPitch = kPitch / C::kMultiplier;
    static constexpr int kGColumns = C::kStageSteps * C::kColumns;
    static constexpr int kStageRows = C::kStageSteps * kRows;  // of x, of each plane
    static constexpr int kXColumns = C::kTapsD * kStageRows * kKept;
    static constexpr int kAlign = (C::kBoxes ? 128 : 16) / static_cast<int>(sizeof(Element));
    static constexpr int kGElements = ceil_div(kGColumns * kPitch, kAlign) * kAlign;
    static constexpr int kStage = kGElements + ceil_div(kXColumns * kXPitch, kAlign) * kAlign;

    // Gates of boxes stand behind the stages, and behind what takes their place at the end.
    static constexpr int kStagesBytes = C::kWarps * C::kStages * kStage * static_cast<int>(sizeof(Element));
    static constexpr int kSumsBytes = C::kSlab * Base::kThreads * static_cast<int>(sizeof(typename Base::Sum));
    static constexpr int kGatesAt = up(larger(kStagesBytes, larger(kSumsBytes, 16 * (Base::kThreads + 1))), 16);

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
    static_assert(!kFlat || C::kStageSteps % Base::kLive == 0, "rows of g must be where they were after each stage");
    static_assert(C::kTapsD == 1 || !kFlat, "stages of several steps of one column are of one plane of x");
    static_assert(C::kWidth == 0 || (Base::kTapTilesB == 1 && Base::kApartB == 1), "kWidth is of whole filter rows");
    static_assert(kGCopies <= 32 && kXCopies <= 32, "which pieces of a row exist must fit in 32 bits");
    static_assert(C::kStages >= 2, "kStages must be 2 or more: one is read while another one arrives");
};

// What a block, and one warp of it, works on.
template <class C>
struct TapsPlace : LinesPlace<TapsNhwc<C>> {
    using W = TapsNhwc<C>;
    unsigned chunk, warp_tile, tile;  // of the block: this warp's chunk and first tile, and its lane's tile

    __device__ __forceinline__ TapsPlace(const Sizes& sizes, const LinesTiling& tiling) : LinesPlace<W>(sizes, tiling) {
        const unsigned warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // tells compilers that it is uniform
        chunk = warp % C::kChunks;
        warp_tile = warp / C::kChunks * W::kTiles;
        tile = warp_tile + min(threadIdx.x % 32 / C::kLanes, W::kTiles - 1u);
    }
};

}  // namespace dwconv
