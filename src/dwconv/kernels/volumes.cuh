// volumes.cuh: the march of the 3-D kernels volume_ncdhw and volume_ndhwc, which differ in what a lane is
//   y[n,c,h,i,j] = b[c] + sum_{t,u,v} w[c,t,u,v] * x[n, c/M, h*SD - PF + t*DD, i*SH - PT + u*DH, j*SW - PL + v*DW]
//
//   A block owns a tile of rows x columns (channels first: of one or several output volumes; channels last: of a chunk
//   of channels) and marches along depth. Every step takes one input plane of the tile from shared memory and adds it
//   to all outputs that read it: kAges = ceil(KD / SD) output planes are in the making at any time, their sums in
//   registers. Planes come by cp.async, kStages of them in shared memory: in flight, or in use. They are used as they
//   arrive, but for channels-first 16-bit ones that tensor cores can't take: those are converted once, by the thread
//   that fetched them, into one of two tiles of float32.
#pragma once
#include "volume_matrix.cuh"
#include "volume_pairs.cuh"
#include "volume_sums.cuh"

namespace dwconv {

// Marches. `window` and `taps` are a lane's places in a tile and in the filters of the block.
template <class C, class Sum>
__device__ __forceinline__ void march(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                      const VolumeTiling& tiling, const VolumePlace& place,
                                      const typename C::Element* x, typename C::Element* slots, Sum* tiles,
                                      const int* table, unsigned* outputs, const Sum* taps, int window,
                                      Volume<C>& own) {
    using V = Volume<C>;
    using T = typename C::Element;
    const int elements = tile_elements<C>(tiling);
    const int in_d = static_cast<int>(sizes.in_d);
    const int steps = V::kPeriod * (place.end - place.first - 1) + C::kFilterD;
    // The input plane of a step; steps go through the taps of one output where planes are reloaded.
    const auto plane_of = [&](int step) {
        if constexpr (C::kReload)
            return (place.first + step / C::kFilterD) * C::kStrideD + step % C::kFilterD * V::kDilationD - C::kPadFront;
        else
            return place.residue + (place.first * V::kPeriod + step) * V::kResidues - C::kPadFront;
    };
    // The steps whose planes exist; all, where padding lies between those of an output.
    const int from = V::kEnds ? larger(0, ceil_div(-plane_of(0), V::kResidues)) : 0;
    const int until = V::kEnds ? smaller(steps, ceil_div(in_d - plane_of(0), V::kResidues)) : steps;
    int only[C::kBatch];
    if constexpr (C::kOneBatch) read_table<C>(table, threadIdx.x, tiling, only);
    // Planes are started in their order, so that pointers need only be moved on.
    int next = from;
    const T* next_x = x + plane_of(from) * sizes.x_depth;
    const long long plane_apart = V::kResidues * sizes.x_depth;
    const auto start = [&](int stage) {
        const int plane = plane_of(next);
        if (next < until && (V::kEnds || static_cast<unsigned>(plane) < static_cast<unsigned>(in_d))) {
            if constexpr (C::kReload) next_x = x + plane * sizes.x_depth;
            fetch<C>(table, next_x, slots + stage * elements, tiling, only);
        }
        end_of_copies();
        next_x += plane_apart;
        ++next;
    };
    Sum bias[V::kLaneChannels];
    ChannelValues<Sum> values[V::kLaneChannels];
#pragma unroll
    for (int e = 0; e < V::kLaneChannels; ++e) {
        const bool exists = place.inside && (!V::kPaired || place.channel + e < sizes.out_channels);
        bias[e] = Sum(0);
        if (C::kHasBias && exists) bias[e] = static_cast<Sum>(load_one(tensors.b + place.channel + e));
        values[e] = channel_values<C>(tensors, exists ? place.channel + e : 0);
    }
    const auto begin = [&](Sum(&sums)[C::kRows][V::kSumColumns][V::kSumVector]) {
#pragma unroll
        for (int i = 0; i < C::kRows; ++i)
#pragma unroll
            for (int o = 0; o < V::kSumColumns; ++o)
#pragma unroll
                for (int e = 0; e < V::kSumVector; ++e) sums[i][o][e] = bias[e % V::kLaneChannels];
    };

    // x of the lane's own volume, of which a block may have several
    const T* volume_x = tensors.x + place.image * sizes.x_image + place.channel / C::kMultiplier * sizes.x_channel;
    const long long out_plane = sizes.out_h * sizes.out_w * (C::kChannelsLast ? sizes.out_channels : 1);
    const long long in_plane = static_cast<long long>(place.row) * sizes.out_w + place.column;
    const long long first_out =
        C::kChannelsLast ? place.image * sizes.out_d * out_plane + in_plane * sizes.out_channels + place.channel
                         : (place.image * sizes.out_channels + place.channel) * sizes.out_d * out_plane + in_plane;
    Tensors<T> out = tensors;  // y and residual from the next finished plane on
    out.y += first_out + (place.first * V::kResidues + place.residue) * out_plane;
    if constexpr (C::kHasResidual) out.residual += out.y - tensors.y;
    // Outputs of pairs of channels on their way out, twice in shared memory.
    T* pending = nullptr;
    int pending_in = 0;
    const int out_words = V::kPaired ? static_cast<int>(tiling.volumes) * Pairs<C>::kOutPitch : 0;
    const auto store_pending = [&] {
        if constexpr (V::kPaired) {
            if (pending == nullptr) return;
            store_pairs<C>(pending, sizes, tiling, place.first_channel, table + tiling.table,
                           outputs + pending_in * out_words);
            pending = nullptr;
            pending_in ^= 1;
        }
    };
    constexpr int kAhead = V::kDirect ? C::kStages - 1 : C::kStages;  // planes in flight while one is added
#pragma unroll
    for (int step = 0; step < kAhead; ++step) start(step);
#pragma unroll
    for (int age = 0; age < V::kAges; ++age) begin(own.sums[age]);
    const auto grow_older = [&] {
#pragma unroll
        for (int age = V::kAges - 1; age > 0; --age)
#pragma unroll
            for (int i = 0; i < C::kRows; ++i)
#pragma unroll
                for (int o = 0; o < V::kSumColumns; ++o)
#pragma unroll
                    for (int e = 0; e < V::kSumVector; ++e) own.sums[age][i][o][e] = own.sums[age - 1][i][o][e];
        begin(own.sums[0]);
    };
    const auto move_on = [&] {
        out.y += V::kResidues * out_plane;
        if constexpr (C::kHasResidual) out.residual += V::kResidues * out_plane;
    };
    int stage = 0;  // (step - from) % kStages
#pragma unroll 1
    for (int round = from; round < until; round += V::kUnroll) {
#pragma unroll
        for (int phase = 0; phase < V::kUnroll; ++phase) {
            const int now = round + phase;
            if (V::kUnroll > 1 && now >= until) break;
            const int plane = plane_of(now);
            const bool is_padding = !V::kEnds && (plane < 0 || plane >= in_d);
            wait_for_copies<kAhead - 1>();
            const typename Selected<V::kDirect, T, Sum>::Type* tile;
            if constexpr (V::kDirect) {
                __syncthreads();  // this plane has arrived, and the one before is no longer read
                start(stage == 0 ? C::kStages - 1 : stage - 1);
                store_pending();
                tile = slots + stage * elements;
            } else {
                Sum* to = tiles + now % 2 * elements;
                if (!is_padding) convert<C>(table, slots + stage * elements, to, tiling);
                start(stage);
                __syncthreads();  // the tile is complete; the other one, filled in the next step, is no longer read
                tile = to;
            }
            stage = stage + 1 == C::kStages ? 0 : stage + 1;

            // Sums grow older: done first, so that a sum's first addition takes it to its new registers.
            if constexpr (V::kRotates) {
                begin(own.sums[slot_of<C>(0, phase)]);
            } else if (now % V::kPeriod == 0) {
                grow_older();
            }
            const int newest = place.first + now / V::kPeriod, part = now % V::kPeriod;
            // ages whose outputs are of this stretch and whose taps exist
            const int youngest = larger(0, newest - place.end + 1);
            const int oldest = smaller(newest - place.first, (C::kFilterD - 1 - part) / V::kPeriod);
            // Sums of other outputs are never stored; where they cost little, they are made all the same.
            constexpr bool kAll = (C::kMatrix ? !V::kPaired || C::kHeldTaps : C::kAll) && V::kPeriod == 1;
            const bool is_whole = kAll || (youngest == 0 && oldest == V::kAges - 1);
            const int finished = newest - (V::kAges - 1);
            const bool is_finished = part == (C::kFilterD - 1) % V::kPeriod && finished >= place.first;
            const int depth = finished * V::kResidues + place.residue;
            if constexpr (V::kPaired) {
                if (!is_padding && is_whole) add_pairs<C, true>(own, tile, part, phase, youngest, oldest);
                if (!is_padding && !is_whole) add_pairs<C, false>(own, tile, part, phase, youngest, oldest);
                if (is_finished) {
                    // The next step's barrier stands before these are stored, the one after it before they are
                    // replaced.
                    finish_pairs<C>(out, sizes, tiling, place, own, volume_x, depth, bias,
                                    own.sums[slot_of<C>(V::kAges - 1, phase)], values,
                                    outputs + pending_in * out_words);
                    pending = out.y - place.channel + place.first_channel;
                }
            } else if constexpr (C::kMatrix) {
                if (!is_padding && is_whole) add_matrices<C, true>(own, tile, part, phase, youngest, oldest);
                if (!is_padding && !is_whole) add_matrices<C, false>(own, tile, part, phase, youngest, oldest);
                if (is_finished)
                    store_matrices<C>(out, sizes, tiling, place, own, volume_x, depth, bias[0],
                                      own.sums[slot_of<C>(V::kAges - 1, phase)], values[0]);
            } else {
                if (!is_padding && is_whole)
                    add_plane<C, true>(own, tile + window, taps, part, phase, youngest, oldest);
                if (!is_padding && !is_whole)
                    add_plane<C, false>(own, tile + window, taps, part, phase, youngest, oldest);
                if (is_finished) store_plane<C>(out, sizes, place, own.sums[slot_of<C>(V::kAges - 1, phase)], values);
            }
            if (is_finished) move_on();
        }
    }
    // Steps behind the last plane finish what is left.
#pragma unroll 1
    for (int now = larger(from, until); V::kEnds && now < steps; ++now) {
        if (now % V::kPeriod == 0) grow_older();
        if (now % V::kPeriod != (C::kFilterD - 1) % V::kPeriod || now < C::kFilterD - 1) continue;
        if constexpr (!C::kMatrix) store_plane<C>(out, sizes, place, own.sums[V::kAges - 1], values);
        move_on();
    }
    wait_for_copies<0>();
    if constexpr (V::kPaired) {
        __syncthreads();
        store_pending();
    }
    __syncthreads();  // nobody reads the tiles, the table or the filters any more
}

}  // namespace dwconv
