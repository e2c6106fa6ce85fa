// taps_planes_nchw_stages.cuh: which planes a warp of taps_planes_nchw copies, and where its lanes find rows of them
//   A stage of a warp is x [kImages][kXPitch], then g [kImages][kGPitch], in bytes: of each image the planes of the
//   warp's kOwn channels, one stretch of memory, with the bytes before and behind it that make it whole pieces of 16.
//   Lanes read two bytes, or two columns in four where rows are whole words; pitches make those of four images that a
//   warp reads at once lie in different banks.
#pragma once
#include "bulk_copies.cuh"
#include "taps_lines.cuh"

namespace dwconv {

// The least pitch from `bytes` on for which eight words of each of four neighbouring images are 32 different banks.
__host__ __device__ constexpr int plane_pitch(int bytes) { return smaller(up(bytes, 128, 32), up(bytes, 128, 96)); }

// A stretch of Bytes of each image that starts at a multiple of what Bytes and 16 share, and how it is copied.
template <int Bytes, int Behind, int Images>
struct PlaneStretch {
    static constexpr int kStart = common_divisor(16, Bytes);           // bytes that it starts at a multiple of
    static constexpr int kPieces = ceil_div(Bytes + 16 - kStart, 16);  // at most
    // Lanes of an image: with few, some have nothing to do in the last round; with many, more so.
    __host__ __device__ static constexpr int rounds(int lanes) {
        return ceil_div(kPieces, lanes) * ceil_div(Images * lanes, 32);
    }
    static constexpr int kLanes = rounds(8) <= rounds(16) && rounds(8) <= rounds(32) ? 8
                                  : rounds(16) <= rounds(32)                         ? 16
                                                                                     : 32;
    static constexpr int kRounds = ceil_div(kPieces, kLanes), kAtOnce = 32 / kLanes, kCopies = Images / kAtOnce;
    // Behind: bytes that lanes read, and don't use, behind the stretch.
    static constexpr int kPitch = plane_pitch(larger(16 * kPieces, Bytes + 16 - kStart + Behind));
    static_assert(Images % kAtOnce == 0, "images that are copied at once must divide those of a stage");
};

// Tile: which of the tiles of taps.
template <class C, int Tile>
struct TapsPlanes : TapsLines<C, C::kOwn * C::kWarps> {
    using Element = typename C::Element;
    using Base = TapsLines<C, C::kOwn * C::kWarps>;
    static_assert(sizeof(Element) == 2, "tensor cores multiply elements of 16 bits");
    static_assert(C::kImages == 8 || C::kImages == 16, "a product of matrices takes 8 or 16 images");
    static_assert(C::kOwn % C::kMultiplier == 0, "a warp has all outputs of its channels of x");
    static_assert(C::kStages >= 2, "kStages must be 2 or more: one is read while another one arrives");

    // What exact_block_sum is told: a line is an image's row, and all rows are of one class.
    static constexpr int kClassesA = 1, kLines = C::kImages, kLineOutputs = up(C::kOutWidth, 8);
    static constexpr int kEights = C::kImages / 8;

    // Rows of matrices are columns of x: sixteen of one row (kXRows = 1), or those of two rows of at most eight
    // columns. Where lanes read two columns at once, one is in the upper half of the matrix, and the other one in the
    // lower half.
    static constexpr int kXRows = C::kWidth <= 8 ? 2 : 1;
    static constexpr bool kXWords = C::kWidth % 2 == 0 && C::kHeight % kXRows == 0;
    static constexpr bool kGWords = C::kOutWidth % 2 == 0 && C::kOutWidth > 8;
    static constexpr int kXBlocks = ceil_div(C::kWidth, 16);
    static constexpr int kGBlocks = kGWords ? 2 * ceil_div(C::kOutWidth, 16) : ceil_div(C::kOutWidth, 8);
    // Row 8 * half + i of block `block` of x, and column i of block `block` of g.
    __host__ __device__ static constexpr int x_row(int half, int i) { return kXRows == 1 ? 0 : kXWords ? i / 4 : half; }
    __host__ __device__ static constexpr int x_column(int block, int half, int i) {
        if (kXRows == 2) return kXWords ? i % 4 * 2 + half : i;
        return 16 * block + (kXWords ? 2 * i + half : i + 8 * half);
    }
    __host__ __device__ static constexpr int g_column(int block, int i) {
        return kGWords ? block / 2 * 16 + 2 * i + block % 2 : 8 * block + i;
    }
    // Whether any column of these blocks meets another one in a tap.
    __host__ __device__ static constexpr bool blocks_meet(int x_block, int g_block) {
        const int first = 16 * x_block - Base::kStepB * g_column(g_block, 7) + Base::kPadB;
        const int last = 16 * x_block + 15 - Base::kStepB * g_column(g_block, 0) + Base::kPadB;
        return last >= 0 && first <= (Base::kFilterB - 1) * Base::kDilationB;
    }

    // A row of x, or a pair of rows, and row j of g are so many rows of x apart: row - S * j + P, from the first tap of
    // the tile on. Each such distance has its sums; that of row u * D of x is tap u of the tile.
    static constexpr int kTapRows = smaller(C::kTapsA, Base::kFilterA - Tile * C::kTapsA);
    static constexpr int kBefore = Base::kPadA - Tile * C::kTapsA * Base::kApartA;
    static constexpr int kLastRow = (C::kHeight - 1) / kXRows * kXRows;
    static constexpr int kFirstDistance = larger(1 - kXRows, kBefore - Base::kStepA * (C::kOutHeight - 1));
    static constexpr int kLastDistance =
        larger(kFirstDistance, smaller((kTapRows - 1) * Base::kApartA, kLastRow + kBefore));
    static constexpr int kDistances = kLastDistance - kFirstDistance + 1;
    __host__ __device__ static constexpr bool is_distance(int distance) {
        return distance >= kFirstDistance && distance <= kLastDistance &&
               (is_tap(distance, Base::kApartA, kTapRows) ||
                (kXRows == 2 && is_tap(distance + 1, Base::kApartA, kTapRows)));
    }
    static constexpr bool kBias = C::kHasBias && Tile == 0;  // is summed with the first taps

    static constexpr int kXOwn = C::kOwn / C::kMultiplier;  // channels of x of a warp

    static constexpr int kXRowBytes = 2 * C::kWidth, kGRowBytes = 2 * C::kOutWidth;
    static constexpr int kXPlaneBytes = C::kHeight * kXRowBytes, kGPlaneBytes = C::kOutHeight * kGRowBytes;
    static constexpr int kXBehind = (kXRows == 2 ? 16 : 32 * kXBlocks) - kXRowBytes;
    static constexpr int kGBehind = 16 * kGBlocks - kGRowBytes;
    using XStretch = PlaneStretch<kXOwn * kXPlaneBytes, kXBehind, C::kImages>;
    using GStretch = PlaneStretch<C::kOwn * kGPlaneBytes, kGBehind, C::kImages>;
    static constexpr int kXPitch = XStretch::kPitch, kGPitch = GStretch::kPitch;
    static constexpr int kGAt = C::kImages * kXPitch;
    static constexpr int kStageBytes = kGAt + C::kImages * kGPitch;
    // Behind the stages, and behind what takes their place at the end: sums of the block with kSlab rows of taps of
    // each warp, or of the last block's threads.
    static constexpr int kTapRowBytes = 4 * C::kWidth * (C::kOutWidth | 1);
    static constexpr int kSumsBytes = 4 * Base::kCount + C::kSlab * C::kWarps * kTapRowBytes;
    static constexpr int kGatesAt =
        up(larger(C::kWarps * C::kStages * kStageBytes, larger(kSumsBytes, 16 * (Base::kThreads + 1))), 16);
};

// A warp's copies of one tensor, by its lanes.
template <class Stretch, class Element>
struct PlaneCopies {
    const Element* at;  // the lane's first piece of its next image
    unsigned to;        // in a stage
    unsigned wanted;    // the lane has a piece in the last round
    unsigned before;    // bytes that are copied before the stretch

    // `stretch` is where that of image 0 begins, in elements.
    __device__ __forceinline__ PlaneCopies(const Element* tensor, long long stretch, long long image_elements,
                                           unsigned image, unsigned stage_at, int bytes) {
        const unsigned lane = threadIdx.x % 32;
        const unsigned piece = lane % Stretch::kLanes, of_stage = lane / Stretch::kLanes;
        before = static_cast<unsigned>(stretch % 8) * 2;
        at = tensor + (stretch - stretch % 8 + 8 * piece + (image + of_stage) * image_elements);
        to = stage_at + of_stage * Stretch::kPitch + 16 * piece;
        keep(to);
        wanted = 16 * (piece + (Stretch::kRounds - 1) * Stretch::kLanes) < before + bytes;
    }

    // Starts the copies of the images of a stage, of which `images` exist.
    __device__ __forceinline__ void copy(const CopyPlace& stages, unsigned stage, int images,
                                         long long image_elements) {
        const int of_stage = static_cast<int>(threadIdx.x % 32 / Stretch::kLanes);
#pragma unroll
        for (int k = 0; k < Stretch::kCopies; ++k) {
            const unsigned exists = of_stage + k * Stretch::kAtOnce < images;
#pragma unroll
            for (int round = 0; round < Stretch::kRounds; ++round) {
                const unsigned offset =
                    stage + to + k * (Stretch::kAtOnce * Stretch::kPitch) + round * (16 * Stretch::kLanes);
                const Element* const from = at + round * (8 * Stretch::kLanes);
                if (round + 1 < Stretch::kRounds)
                    copy_piece_to<16, false>(stages, offset, from, exists);
                else
                    copy_wanted_piece_to<16, false>(stages, offset, from, exists, wanted);
            }
            at += Stretch::kAtOnce * image_elements;
        }
    }
};

// A warp's copies of both, by its lanes.
template <class W>
struct PlanePieces {
    using C = typename W::Config;
    using Element = typename W::Element;
    PlaneCopies<typename W::XStretch, Element> x;
    PlaneCopies<typename W::GStretch, Element> g;
    const CopyPlace stages;

    __device__ __forceinline__ PlanePieces(const FilterGradients<Element>& tensors, const Sizes& sizes,
                                           const LinesPlace<W>& place, long long channel, unsigned image)
        : x(tensors.x, channel / C::kMultiplier * (C::kHeight * C::kWidth), sizes.x_image, image, 0,
            W::kXOwn * W::kXPlaneBytes),
          g(tensors.g, channel * (C::kOutHeight * C::kOutWidth), place.g_image, image, W::kGAt,
            C::kOwn * W::kGPlaneBytes),
          stages(shared_memory<unsigned char>()) {}

    // Starts the copies of a stage, of which `images` exist: none where there is nothing more to copy.
    __device__ __forceinline__ void copy(unsigned stage, int images, const Sizes& sizes, const LinesPlace<W>& place) {
        if (images > 0) {
            x.copy(stages, stage, images, sizes.x_image);
            g.copy(stages, stage, images, place.g_image);
        }
        end_of_copies();
    }
    // The next stage is there for all lanes, and none reads the one any more that is filled next.
    __device__ __forceinline__ void wait_until_full() const {
        wait_for_copies<C::kStages - 2>();
        __syncwarp();
    }
    __device__ __forceinline__ void wait_for_all() const { wait_for_copies<0>(); }
};

// What one lane of a warp sends of one tensor: the stretch of each image of a stage.
template <class Stretch, class Element, int Images>
struct PlaneSends {
    const Element* from;     // the next image's whole pieces
    unsigned to;             // in a stage
    unsigned bytes, before;  // of each image; of them, before the stretch

    // `stretch` is where that of image 0 begins, in elements.
    __device__ __forceinline__ PlaneSends(const Element* tensor, long long stretch, long long image_elements,
                                          unsigned image, unsigned stage_at, int stretch_bytes)
        : from(tensor + (stretch - stretch % 8 + image * image_elements)),
          to(stage_at),
          bytes(up(static_cast<int>(stretch % 8) * 2 + stretch_bytes, 16)),
          before(static_cast<unsigned>(stretch % 8) * 2) {}

    // For the lane that sends: `images` of a stage exist, and the others are zeros.
    template <bool EvictFirst>
    __device__ __forceinline__ void send(unsigned gate, unsigned char* stage, int images, long long image_elements) {
#pragma unroll
        for (int k = 0; k < Images; ++k)
            if (k < images)
                send_bytes<EvictFirst>(gate, stage + (to + k * Stretch::kPitch), from + k * image_elements, bytes);
#pragma unroll 1
        for (int k = images; k < Images; ++k)
#pragma unroll 1
            for (unsigned at = 0; at < bytes; at += 16)
                *reinterpret_cast<uint4*>(stage + (to + k * Stretch::kPitch + at)) = uint4{0, 0, 0, 0};
    }
    // All lanes: the next stage's images are sent next.
    __device__ __forceinline__ void advance(long long image_elements) { from += Images * image_elements; }
};

// A warp's copies of both, by one lane, each stretch by an instruction (kBulk).
template <class W>
struct PlaneStretches {
    using C = typename W::Config;
    using Element = typename W::Element;
    PlaneSends<typename W::XStretch, Element, C::kImages> x;
    PlaneSends<typename W::GStretch, Element, C::kImages> g;
    WarpStages<C::kStages> stages;

    __device__ __forceinline__ PlaneStretches(const FilterGradients<Element>& tensors, const Sizes& sizes,
                                              const LinesPlace<W>& place, long long channel, unsigned image)
        : x(tensors.x, channel / C::kMultiplier * (C::kHeight * C::kWidth), sizes.x_image, image, 0,
            W::kXOwn * W::kXPlaneBytes),
          g(tensors.g, channel * (C::kOutHeight * C::kOutWidth), place.g_image, image, W::kGAt,
            C::kOwn * W::kGPlaneBytes),
          stages(shared_memory<unsigned char>() + W::kGatesAt + threadIdx.x / 32 * (8 * C::kStages)) {}

    // As of PlanePieces.
    __device__ __forceinline__ void copy(unsigned stage, int images, const Sizes& sizes, const LinesPlace<W>& place) {
        if (images > 0) {
            if (is_elected()) {
                unsigned char* const to = shared_memory<unsigned char>() + stage;
                expect_bytes(stages.gate(), static_cast<unsigned>(smaller(images, C::kImages)) * (x.bytes + g.bytes));
                x.template send<C::kEvictFirst>(stages.gate(), to, images, sizes.x_image);
                g.template send<C::kEvictFirst>(stages.gate(), to, images, place.g_image);
            }
            x.advance(sizes.x_image);
            g.advance(place.g_image);
        }
        stages.is_sent();
    }
    __device__ __forceinline__ void wait_until_full() { stages.wait_until_full(); }
    __device__ __forceinline__ void wait_for_all() const {}  // each was waited for
};

}  // namespace dwconv
