// volume_pairs.cuh: products of 16-bit elements on tensor cores, channels last, for the kernels of volumes.cuh
//   For a pair of channels and a filter row, four neighbouring outputs are a product with a matrix of two bands:
//     A[i, 2p + e] = x[row(i), SW * column(i) + p - PL, channel e],   B[2p + e, 2j + f] = w[f, (p - SW*j) / DW] where
//     e = f and that is a tap, else zero,   C[i, 2j + f] = y[row(i), column(i) + j, channel f]
//   so an m16n8k16 does eight columns of a filter row for 16 groups of four outputs, wherever they are. Both channels
//   of a pixel are a word, in the tile as it arrived and in C: nothing is transposed. A warp has one pair of channels.
//   Finished words go to memory through shared memory, where the pairs of a block meet: kPairs words of a pixel.
//   Zeros of B times an Inf or NaN are NaN, also for the other channel: sums that are not finite are computed again,
//   product by product.
#pragma once
#include "bands.cuh"
#include "volume_tiles.cuh"

namespace dwconv {

template <class C>
struct Pairs {
    static constexpr int kPairs = C::kChunk / 2;  // of a block
    static constexpr int kRowWords =
        2 * (C::kFilterW + 1);  // of a filter row in shared memory: [channel][taps and a zero]
    static constexpr int kWords = C::kFilterD * C::kFilterH * kRowWords;  // of a pair's filters: [u][t][row]
    static constexpr int kOutPitch = kPairs / 2 * 2 + 1;  // words of a pixel of outputs: neighbours in different banks
    static_assert(!Volume<C>::kPaired || C::kChunk % 2 == 0, "kChunk must be pairs of channels");
    static_assert(!Volume<C>::kPaired || C::kMultiplier == 1,
                  "kMatrix needs a multiplier of 1: pairs of inputs are of outputs");
};

// The filters of a block's channels, in shared memory: words with the weight of one channel in its half.
template <class C>
__device__ __forceinline__ void share_pairs(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                            const VolumeTiling& tiling, long long first_channel, unsigned* words) {
    using P = Pairs<C>;
#pragma unroll 8  // so that loads don't wait for one another
    for (int at = threadIdx.x; at < P::kPairs * P::kWords; at += tiling.threads) {
        const int v = at % (C::kFilterW + 1), f = at / (C::kFilterW + 1) % 2, row = at / P::kRowWords;
        const int t = row % C::kFilterD, u = row / C::kFilterD % C::kFilterH, pair = row / (C::kFilterD * C::kFilterH);
        const long long channel = first_channel + 2 * pair + f;
        unsigned word = 0;
        if (v < C::kFilterW && channel < sizes.out_channels)
            word = load_one(tensors.w + channel * Volume<C>::kTaps + tap_at<C>((t * C::kFilterH + u) * C::kFilterW + v))
                       .bits;
        words[at] = word << 16 * f;
    }
}

// Where a lane's parts of A, B and C are: groups in the tile (in bytes), the first one in the tile of outputs (in
// words).
template <class C>
__device__ __forceinline__ void place_pairs(Volume<C>& own, const VolumeTiling& tiling, int pair,
                                            const unsigned* words) {
    using V = Volume<C>;
    using P = Pairs<C>;
    const int t = threadIdx.x % 4, n = threadIdx.x % 32 / 4;
#pragma unroll
    for (int m = 0; m < C::kRows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned group = n + m * 16 + half * 8;
            const int row = tiling.lanes_x.quotient(group), column = (group - row * tiling.lanes_x.divisor) * 4;
            const bool exists = row < static_cast<int>(tiling.lanes_y.divisor);
            // Groups that don't exist compute on the tile's first one.
            const int pixel = exists ? row * C::kStrideH * C::kPitch + column * C::kStrideW * V::kPixel : 0;
            own.groups[m][half] = 2 * (pixel + t * V::kPixel + 2 * pair);
        }
    own.out_word = (n * 4 + t) * P::kOutPitch + pair;
    // Column n of B is output j = n / 2, channel n % 2; rows 2t and 2t + 1 are pixel t, rows 8 onwards pixel t + 4.
#pragma unroll
    for (int part = 0; part < 2 * V::kSteps; ++part) {
        const int distance = t + 4 * part - n / 2 * C::kStrideW;
        const int v = is_tap(distance, C::kDilationW, C::kFilterW) ? distance / C::kDilationW : C::kFilterW;
        own.words[part] = words + pair * P::kWords + n % 2 * (C::kFilterW + 1) + v;
    }
    if constexpr (C::kHeldTaps) {
#pragma unroll
        for (int row = 0; row < V::kTapRows; ++row)
#pragma unroll
            for (int step = 0; step < V::kSteps; ++step)
                own.bands[row * V::kSteps + step] =
                    make_uint2(own.words[2 * step][row * P::kRowWords], own.words[2 * step + 1][row * P::kRowWords]);
    }
}

// Adds a plane to the outputs of the ages from `youngest` to `oldest`, or to those of all ages; as add_plane.
template <class C, bool All>
__device__ __forceinline__ void add_pairs(Volume<C>& own, const typename C::Element* tile, int part, int phase,
                                          int youngest, int oldest) {
    using V = Volume<C>;
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(tile);
    const auto word = [](const unsigned char* at) { return *reinterpret_cast<const unsigned*>(at); };
#pragma unroll All && (C::kHeldTaps || C::kUnrollRows > 1) ? C::kFilterH : 1
    for (int u = 0; u < C::kFilterH; ++u)
#pragma unroll
        for (int step = 0; step < V::kSteps; ++step) {
            unsigned a[C::kRows][4];
#pragma unroll
            for (int m = 0; m < C::kRows; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    a[m][i] = word(bytes + own.groups[m][i % 2] +
                                   2 * (u * C::kDilationH * C::kPitch + (8 * step + i / 2 * 4) * V::kPixel));
#pragma unroll
            for (int age = V::kAges - 1; age >= 0; --age) {
                if (!All && (age < youngest || age > oldest)) continue;
                const int row = u * C::kFilterD + part + V::kPeriod * age;
                uint2 b;
                if constexpr (C::kHeldTaps)
                    b = own.bands[(u * C::kFilterD + age) * V::kSteps + step];
                else
                    b = make_uint2(own.words[2 * step][row * Pairs<C>::kRowWords],
                                   own.words[2 * step + 1][row * Pairs<C>::kRowWords]);
#pragma unroll
                for (int m = 0; m < C::kRows; ++m)
                    multiply_matrices<typename C::Element>(own.sums[slot_of<C>(age, phase)][m][0], a[m], b);
            }
        }
}

// Brings the outputs of a finished plane, `depth`, to the tile of outputs; x and tensors.residual (at the plane's
// start) are those of the lane's first channel.
template <class C>
__device__ __forceinline__ void finish_pairs(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                             const VolumeTiling& tiling, const VolumePlace& place, const Volume<C>& own,
                                             const typename C::Element* x, int depth, const float (&bias)[2],
                                             const float (&sums)[C::kRows][1][4],
                                             const ChannelValues<float> (&values)[2], unsigned* outputs) {
    using T = typename C::Element;
    constexpr int kApart = 32 * Pairs<C>::kOutPitch;  // from group to group of a lane
    const bool has_second = place.channel + 1 < sizes.out_channels;
    // Where in y a lane's output is; sets `row` and `column`.
    int row, column;
    const auto exists = [&](int number) {
        const unsigned group = number * 8 + threadIdx.x % 32 / 4;
        row = tiling.lanes_x.quotient(group);
        column = place.tile_column + (group - row * tiling.lanes_x.divisor) * 4 + threadIdx.x % 4;
        const bool inside = place.inside && row < static_cast<int>(tiling.lanes_y.divisor);
        row += place.tile_row;
        return inside && row < sizes.out_h && column < sizes.out_w;
    };
    const auto finish = [&](int number, const float* pair) {
        Vector<T, 2> residual = {};
        if constexpr (C::kHasResidual) {
            if (exists(number)) {
                const T* at = tensors.residual + (row * sizes.out_w + column) * sizes.out_channels;
                residual.element[0] = load_one(at);
                if (has_second) residual.element[1] = load_one(at + 1);
            }
        }
        outputs[own.out_word + number * kApart] = rounded_pair<T>(finished<C>(pair[0], values[0], residual.element[0]),
                                                                  finished<C>(pair[1], values[1], residual.element[1]));
    };
    float checks[2] = {0, 0};  // not finite as soon as a sum is not, or where sums are very large
#pragma unroll
    for (int m = 0; m < C::kRows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float pair[2] = {sums[m][0][2 * half], sums[m][0][2 * half + 1]};
            checks[half] = fmaf(pair[0], pair[1], checks[half]);
            finish(2 * m + half, pair);
        }
    if ((checks[0] + checks[1]) * 0.0f == 0.0f) return;
    unsigned wrong = 0;  // groups with a sum that is not finite
#pragma unroll
    for (int m = 0; m < C::kRows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (!(sums[m][0][2 * half] * 0.0f + sums[m][0][2 * half + 1] * 0.0f == 0.0f)) wrong |= 1u << (2 * m + half);
#pragma unroll 1
    while (wrong != 0) {
        const int number = __ffs(static_cast<int>(wrong)) - 1;
        wrong &= wrong - 1;
        if (!exists(number)) continue;
        const T* filter = tensors.w + place.channel * Volume<C>::kTaps;
        float pair[2] = {exact_sum<C>(x, filter, bias[0], sizes, depth, row, column), 0};
        if (has_second) pair[1] = exact_sum<C>(x + 1, filter + Volume<C>::kTaps, bias[1], sizes, depth, row, column);
        finish(number, pair);
    }
}

// Where the words of the tile of outputs go, from the first output of the block's first channel in a plane on.
template <class C>
__device__ __forceinline__ void make_out_table(int* table, const Sizes& sizes, const VolumeTiling& tiling,
                                               const VolumePlace& place, int first_channel) {
    using P = Pairs<C>;
    for (int at = threadIdx.x; at < static_cast<int>(tiling.volumes) * P::kPairs; at += tiling.threads) {
        const int pair = at % P::kPairs, pixel = at / P::kPairs;
        const unsigned group = pixel / 4;
        const int row = tiling.lanes_x.quotient(group), column = (group - row * tiling.lanes_x.divisor) * 4 + pixel % 4;
        const int out_row = place.tile_row + row, out_column = place.tile_column + column;
        const bool exists = row < static_cast<int>(tiling.lanes_y.divisor) && out_row < sizes.out_h &&
                            out_column < sizes.out_w && first_channel + 2 * pair < sizes.out_channels;
        const long long to = (out_row * sizes.out_w + out_column) * sizes.out_channels + 2 * pair;
        table[at] = exists ? static_cast<int>(to) : kNowhere;
    }
}

// Stores the tile of outputs; `y` is where the block's first channel of the finished plane starts.
template <class C>
__device__ __forceinline__ void store_pairs(typename C::Element* y, const Sizes& sizes, const VolumeTiling& tiling,
                                            int first_channel, const int* table, const unsigned* outputs) {
    using T = typename C::Element;
    using P = Pairs<C>;
    const int count = static_cast<int>(tiling.volumes) * P::kPairs;
#pragma unroll 4
    for (int at = threadIdx.x; at < count; at += tiling.threads) {
        const int to = table[at];
        if (to == kNowhere) continue;
        const unsigned word = outputs[at / P::kPairs * P::kOutPitch + at % P::kPairs];
        if constexpr (C::kStoreVector == 2) {
            *reinterpret_cast<unsigned*>(y + to) = word;
        } else {
            T half;
            half.bits = static_cast<unsigned short>(word);
            y[to] = half;
            half.bits = static_cast<unsigned short>(word >> 16);
            if (first_channel + at % P::kPairs * 2 + 1 < sizes.out_channels) y[to + 1] = half;
        }
    }
}

}  // namespace dwconv
