// volume_cubes.cuh: cubes of 2x2x2 outputs on sparse tensor cores, for volume_ndhwc: 16 bits, filters up to 3x3x3
//   Eight outputs of 2 planes x 2 rows x 2 columns read cubes of 4x4x4 pixels. For two channels h, input plane k of the
//   four, and eight cubes n, with outputs o = (f, dy, dx) and pixels p = (r, c):
//     A_k[(h, o), (p, h')] = w[h, k - f, r - dy, c - dx] where h' = h and that is a tap, else 0
//     B[(p, h'), n]        = x[plane(n) + k, row(n) + r, column(n) + c, h']
//     C[(h, o), n]         = y[plane(n) + f, row(n) + dy, column(n) + dx, h]
//   so four m16n8k32 for sparse matrices make 64 outputs of two channels (of four neighbouring columns of A each row
//   has two, as in sparse_bands.cuh). Pixels are multiplied as they lie, pairs of channels in a word.
//
//   A block marches along depth, two planes a step: they finish one pair of output planes (k = 2, 3) and begin the next
//   one (k = 0, 1), whose sums stay in registers. A warp has two channels and all of the tile: products of 4 columns x
//   8 rows, beside one another. Results take the place of pixels in shared memory that only this warp reads and has
//   read; the threads that fetched these vectors store them a step later, and fetch others there.
//   Zeros of A times an Inf or NaN are NaN: outputs that are NaN are computed again, product by product.
#pragma once
#include "sparse_bands.cuh"
#include "volume_tiles.cuh"

namespace dwconv {

template <class C>
struct Cubes {
    using T = typename C::Element;
    static constexpr int kThreads = 16 * C::kChunk;                     // a warp for every two channels
    static constexpr int kTiles = C::kColumns, kRows = 8;               // products of 4 columns; output rows of a tile
    static constexpr int kVector = C::kLoadVector;                      // elements of a copy
    static constexpr int kVectors = (kRows + 2) * C::kPitch / kVector;  // of a plane of a tile
    static constexpr int kOwn = ceil_div(kVectors, kThreads);           // that a thread copies
    // Elements from pixel to pixel: an odd number of words, so that neighbours lie in different banks.
    static constexpr int kPixel = C::kLinear ? C::kChunk : C::kChunk / 4 * 4 + 2;
    // Elements in front of a row's first pixel, which is kPadLeft columns left of the tile's first output. Results
    // stand as many columns to the right of where their windows start as lets them start with a vector, too.
    static constexpr int kLead = (kVector - C::kPadLeft * kPixel % kVector) % kVector;
    static constexpr int kAside = C::kPadLeft % C::kColumnAlign;
    static constexpr int kStep = 2 * C::kPlane;  // elements of a step
    static_assert(C::kFilterD <= 3 && C::kFilterH <= 3 && C::kFilterW <= 3, "a cube of 4x4x4 holds all taps of 2x2x2");
    static_assert(C::kStrideD == 1 && C::kStrideH == 1 && C::kStrideW == 1, "neighbouring outputs share their windows");
    static_assert(C::kDilationD == 1 && C::kDilationH == 1 && C::kDilationW == 1, "taps are neighbours");
    static_assert(C::kMultiplier == 1 && C::kChunk % 2 == 0, "pairs of channels of x are pairs of y");
    static_assert(kVector % 2 == 0 && kLead % 2 == 0, "pairs of channels are words");
    static_assert((kLead + kAside * kPixel) % kVector == 0, "rows of results must start with a vector");
    static_assert(C::kPlane >= (kRows + 2) * C::kPitch && C::kPlane % 8 == 0, "planes start at multiples of 16 bytes");
    static_assert(C::kPitch >= kLead + (4 * kTiles + larger(2, kAside)) * kPixel, "rows hold windows and results");
    // Results are written after the next product's pixels are read, and must leave those of the one after it.
    static_assert(kAside <= 4, "results must not reach pixels that are still to be read");
    static_assert(C::kStages >= 2, "one step's planes are read while another one's arrive");
};

// Where vectors of a tile come from and go to, in a plane of x and y.
template <class C>
__device__ __forceinline__ void make_cube_table(int2* table, const Sizes& sizes, const VolumePlace& place) {
    using Q = Cubes<C>;
    const int channels = static_cast<int>(sizes.out_channels);
#pragma unroll 1
    for (int k = 0; k < Q::kOwn; ++k) {
        const int at = threadIdx.x + k * Q::kThreads;
        const int row = at * Q::kVector / C::kPitch, element = at * Q::kVector % C::kPitch;
        const int from_row = place.tile_row - C::kPadTop + row, to_row = place.tile_row + row;
        const int result = element - Q::kLead - Q::kAside * Q::kPixel;
        bool is_read = from_row >= 0 && from_row < sizes.in_h && row < Q::kRows + 2, is_made = to_row < sizes.out_h;
        int from, to;
        if constexpr (C::kLinear) {
            from = (place.tile_column - C::kPadLeft) * C::kChunk - Q::kLead + element;
            to = place.tile_column * C::kChunk + result;
            is_read = is_read && from >= 0 && from < sizes.in_w * C::kChunk;
            is_made = is_made && to < sizes.out_w * C::kChunk;
        } else {
            const int column = element / Q::kPixel, channel = element % Q::kPixel;
            const int from_column = place.tile_column - C::kPadLeft + column, to_column = place.tile_column + column;
            const bool exists = channel < C::kChunk && place.first_channel + channel < channels;
            from = from_column * static_cast<int>(sizes.x_column) + channel;
            to = to_column * channels + channel;
            is_read = is_read && exists && from_column >= 0 && from_column < sizes.in_w;
            is_made = is_made && exists && to_column < sizes.out_w;
        }
        is_made = is_made && row < Q::kRows && result >= 0 && result < 4 * Q::kTiles * Q::kPixel;
        table[at] = make_int2(is_read ? from_row * static_cast<int>(sizes.x_row) + from : kNowhere,
                              is_made ? to_row * static_cast<int>(sizes.out_w) * channels + to : kNowhere);
    }
}

// A lane's part of the filters of two channels: A of the four input planes of a cube.
template <class C>
__device__ __forceinline__ void load_cube(uint4 (&matrices)[4], const typename C::Element* filter, bool exists) {
    const int output = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int f = output / 4, dy = output / 2 % 2, dx = output % 2;
    const auto pair = [&](int k, int channel, int half) {  // pixels 8 * half + 2 * t and the next one
        unsigned word = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int depth = k - f, u = 2 * half + t / 2 - dy, v = 2 * (t % 2) + e - dx;
            constexpr int kTaps = C::kFilterD * C::kFilterH * C::kFilterW;
            const int tap = (depth * C::kFilterH + u) * C::kFilterW + v;  // below kTaps, so that nothing is divided
            const int at = channel * kTaps + (C::kReversed ? kTaps - 1 - tap : tap);
            if (exists && depth >= 0 && depth < C::kFilterD && u >= 0 && u < C::kFilterH && v >= 0 && v < C::kFilterW)
                word |= static_cast<unsigned>(load_one(filter + at).bits) << 16 * e;
        }
        return word;
    };
#pragma unroll
    for (int k = 0; k < 4; ++k) matrices[k] = uint4{pair(k, 0, 0), pair(k, 1, 0), pair(k, 0, 1), pair(k, 1, 1)};
}

// What a warp keeps of its two channels, and where its lanes' pixels and results are.
template <class C>
struct CubeMarch {
    using Q = Cubes<C>;
    using T = typename C::Element;
    int pixels, results;  // in a slot, in bytes
    float bias[2];
    ChannelValues<float> values[2];
    uint4 matrices[4];
    float sums[Q::kTiles][4];  // of the pair of planes in the making
    float check = 0;           // NaN as soon as a finished sum is, and hardly otherwise

    __device__ __forceinline__ CubeMarch(const Tensors<T>& tensors, const VolumePlace& place) {
        const int lane = threadIdx.x % 32, group = lane / 4, pair = threadIdx.x / 32;
        // Cubes n of a product: two columns of four. Those of a lane's two results lie below one another.
        const int row = group / 4 * 4 + group % 2 * 2, column = group / 2 % 2 * 2 + lane % 4;
        pixels = 2 * (Q::kLead + row * C::kPitch + column * Q::kPixel) + 4 * pair;
        const int output = lane / 4, first = lane % 4;
        const int out_row = first / 2 * 4 + output / 2 % 2, out_column = first % 2 * 2 + output % 2;
        results = 2 * (Q::kLead + output / 4 * C::kPlane + out_row * C::kPitch + (out_column + Q::kAside) * Q::kPixel) +
                  4 * pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const long long channel = place.inside ? place.channel + e : 0;
            bias[e] = C::kHasBias ? static_cast<float>(load_one(tensors.b + channel)) : 0.0f;
            values[e] = channel_values<C>(tensors, channel);
        }
        load_cube<C>(matrices, tensors.w + place.channel * (C::kFilterD * C::kFilterH * C::kFilterW), place.inside);
#pragma unroll
        for (int m = 0; m < Q::kTiles; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][i] = 0;
    }

    // Bytes of a slot from the lane's first result to others of it.
    static constexpr int kBelow = 4 * C::kPitch, kBeside = 8 * Q::kPixel;

    // One of the lane's outputs of a step that finishes planes `depth` and depth + 1: whether it exists, and where.
    struct Output {
        int depth, row, column;
        long long at;  // in y
    };
    __device__ __forceinline__ static bool find(Output& output, const Sizes& sizes, const VolumePlace& place, int depth,
                                                int m, int e) {
        const int own = threadIdx.x % 32 / 4, first = threadIdx.x % 4;
        output.depth = depth + own / 4;
        output.row = place.tile_row + first / 2 * 4 + 2 * e + own / 2 % 2;
        output.column = place.tile_column + 4 * m + first % 2 * 2 + own % 2;
        output.at =
            (((place.image * sizes.out_d + output.depth) * sizes.out_h + output.row) * sizes.out_w + output.column) *
                sizes.out_channels +
            place.channel;
        return place.inside && output.depth >= place.first && output.depth < place.end && output.row < sizes.out_h &&
               output.column < sizes.out_w;
    }

    // Adds the two planes of a slot: finishes output planes `depth` and depth + 1, whose results stay in the slot, and
    // begins the next two.
    __device__ __forceinline__ void add(const Tensors<T>& tensors, const Sizes& sizes, const VolumePlace& place,
                                        T* slot, int depth) {
        unsigned char* const bytes = reinterpret_cast<unsigned char*>(slot);
        const float begun[4] = {bias[0], bias[0], bias[1], bias[1]};
        unsigned words[2] = {0, 0};
#pragma unroll
        for (int m = 0; m < Q::kTiles + 1; ++m) {
            unsigned b[2][4];
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    if (m < Q::kTiles)
                        b[k][r] = *reinterpret_cast<const unsigned*>(
                            bytes + pixels + (2 * (k * C::kPlane + r * C::kPitch) + m * kBeside));
            __syncwarp();
            if (m > 0) {
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    *reinterpret_cast<unsigned*>(bytes + results + (e * kBelow + (m - 1) * kBeside)) = words[e];
            }
            if (m == Q::kTiles) break;
            float old[4];
            multiply_sparse<T>(old, matrices[2], b[0], sums[m]);
            multiply_sparse<T>(sums[m], matrices[0], b[0], begun);
            multiply_sparse<T>(old, matrices[3], b[1], old);
            multiply_sparse<T>(sums[m], matrices[1], b[1], sums[m]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                Vector<T, 2> residual = {};
                if constexpr (C::kHasResidual) {
                    Output output;
                    if (find(output, sizes, place, depth, m, e))
                        residual = load_vector<2>(tensors.residual + output.at);
                }
                check = fmaf(old[e], old[2 + e], check);
                words[e] = rounded_pair<T>(finished<C>(old[e], values[0], residual.element[0]),
                                           finished<C>(old[2 + e], values[1], residual.element[1]));
            }
        }
    }
};

// Where the block's tile is, and the warp's channels.
template <class C>
__device__ __forceinline__ VolumePlace cube_place(const Sizes& sizes, const VolumeTiling& tiling) {
    unsigned rest = blockIdx.x;
    const auto next = [&rest](const FastDivisor& size) {
        const unsigned quotient = size.quotient(rest), digit = rest - quotient * size.divisor;
        rest = quotient;
        return static_cast<int>(digit);
    };
    VolumePlace place;
    place.tile_column = next(tiling.tiles_x) * (4 * Cubes<C>::kTiles);
    place.tile_row = next(tiling.tiles_y) * Cubes<C>::kRows;
    place.first_channel = next(tiling.channels) * C::kChunk;
    place.first = next(tiling.length) * static_cast<int>(tiling.share);
    place.image = rest;
    place.end = smaller(place.first + static_cast<int>(tiling.share), static_cast<int>(sizes.out_d));
    place.channel = place.first_channel + threadIdx.x / 32 * 2;
    place.inside = place.channel < sizes.out_channels;
    if (!place.inside) place.channel = 0;
    return place;
}

// Computes those of the lane's outputs again, product by product, that are NaN in y: an epilogue leaves a NaN what it
// is.
template <class C>
__device__ __forceinline__ void repair_cubes(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                             const VolumeTiling& tiling) {
    using Q = Cubes<C>;
    using T = typename C::Element;
    const VolumePlace place = cube_place<C>(sizes, tiling);
#pragma unroll 1
    for (int depth = place.first; depth < place.end; depth += 2)
#pragma unroll 1
        for (int number = 0; number < 4 * Q::kTiles; ++number) {
            typename CubeMarch<C>::Output output;
            if (!CubeMarch<C>::find(output, sizes, place, depth, number / 4, number / 2 % 2)) continue;
            constexpr int kTaps = C::kFilterD * C::kFilterH * C::kFilterW;
            const int own = number % 2;
            const float made = static_cast<float>(tensors.y[output.at + own]);
            if (made == made) continue;
            const long long channel = place.channel + own;
            const float sum =
                exact_sum<C>(tensors.x + place.image * sizes.x_image + channel, tensors.w + channel * kTaps,
                             C::kHasBias ? static_cast<float>(load_one(tensors.b + channel)) : 0.0f, sizes,
                             output.depth, output.row, output.column);
            T residual = {};
            if constexpr (C::kHasResidual) residual = load_one(tensors.residual + output.at + own);
            tensors.y[output.at + own] =
                static_cast<T>(finished<C>(sum, channel_values<C>(tensors, channel), residual));
        }
}

template <class C>
__device__ __forceinline__ void volume_cubes(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                             const VolumeTiling& tiling) {
    using Q = Cubes<C>;
    using T = typename C::Element;
    const VolumePlace place = cube_place<C>(sizes, tiling);
    const int pairs = ceil_div(place.end - place.first, 2);  // of output planes; a step more than that
    T* const slots = shared_memory<T>();
    int2* const table = reinterpret_cast<int2*>(slots + C::kStages * Q::kStep);
    make_cube_table<C>(table, sizes, place);

    // Planes are fetched, and outputs stored, in their order, so that pointers need only be moved on.
    const int in_d = static_cast<int>(sizes.in_d);
    const long long out_plane = sizes.out_h * sizes.out_w * sizes.out_channels;
    int plane = place.first - C::kPadFront;
    const int last_plane = plane + 2 * pairs;  // and the one behind it
    const T* from = tensors.x + place.image * sizes.x_image + plane * sizes.x_depth + place.first_channel;
    T* to = tensors.y + (place.image * sizes.out_d + place.first) * out_plane + place.first_channel;
    // Stores the results of so many planes that a step has left in a slot, and starts to fetch the next planes to it:
    // each thread those vectors that it made the table of.
    const auto turn = [&](T* slot, int stored) {
        const bool fetches = plane <= last_plane;
        const bool exists[2] = {plane >= 0 && plane < in_d, plane + 1 >= 0 && plane + 1 < in_d};
        const T* const from_second = from + sizes.x_depth;
        T* const to_second = to + out_plane;
#pragma unroll Q::kOwn <= 4 ? Q::kOwn : 2
        for (int k = 0; k < Q::kOwn; ++k) {
            const int at = threadIdx.x + k * Q::kThreads;
            if ((k + 1) * Q::kThreads > Q::kVectors && at >= Q::kVectors) break;
            T* const first = slot + at * Q::kVector;
            T* const second = first + C::kPlane;
            const int2 places = table[at];
            using Results = Vector<T, Q::kVector>;
            if (stored > 0 && places.y != kNowhere) {
                const Results results[2] = {*reinterpret_cast<const Results*>(first),
                                            *reinterpret_cast<const Results*>(second)};
                store_vector(to + places.y, results[0]);
                if (stored > 1) store_vector(to_second + places.y, results[1]);
            }
            if (!fetches) continue;
            const bool is_read = places.x != kNowhere;
            const int offset = is_read ? places.x : 0;
            copy_piece_or_zero<2 * Q::kVector, false>(first, from + offset, is_read && exists[0]);
            copy_piece_or_zero<2 * Q::kVector, false>(second, from_second + offset, is_read && exists[1]);
        }
        end_of_copies();
        plane += 2;
        from += 2 * sizes.x_depth;
        if (stored > 0) to += 2 * out_plane;
    };
    constexpr int kAhead = C::kStages - 1;  // steps that planes are fetched ahead
#pragma unroll 1
    for (int step = 0; step < kAhead; ++step) turn(slots + step * Q::kStep, 0);
    CubeMarch<C> march(tensors, place);
    int now = 0, before = kAhead * Q::kStep;           // slots of this step and of the one before
    int depth = place.first - 2, finished_planes = 0;  // what this step finishes; how many the one before has
#pragma unroll 1
    for (; depth < place.end; depth += 2) {
        wait_for_copies<kAhead - 1>();
        __syncthreads();  // this step's planes are there, and the results of the step before
        turn(slots + before, finished_planes);
        march.add(tensors, sizes, place, slots + now, depth);
        finished_planes = depth < place.first ? 0 : smaller(2, place.end - depth);
        before = now;
        now = now == kAhead * Q::kStep ? 0 : now + Q::kStep;
    }
    __syncthreads();
    turn(slots + before, finished_planes);
    if (march.check == march.check) return;
    __syncthreads();
    repair_cubes<C>(tensors, sizes, tiling);
}

}  // namespace dwconv
