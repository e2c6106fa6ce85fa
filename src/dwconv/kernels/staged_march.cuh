// staged_march.cuh: a march down the rows of planes; what kernels/staged_nchw.cuh does for float32 filters of many taps
//   An item is a strip of rows (and columns) of up to 32 planes of one image. It belongs to one warp, which streams its
//   rows through a ring of its own in shared memory: no barrier of the block. A lane makes kColumns neighbouring
//   columns of one plane, with the filter in registers: an input row is added to all output rows that read it, and the
//   sums move on by one output row as they are added to.
//   Ring: kStages stages of two rows: [row][plane][column]. The zeros left of a plane's row are those right of the one
//   before. Outputs are gathered behind it, and leave as stretches.
//   kEven: all tiles are whole, and a lane copies and stores the same piece of two rows of four planes.
#pragma once
#include "copies.cuh"
#include "staged_planes.cuh"

namespace dwconv {

// Which of the pieces of several planes a lane moves: `across` neighbouring lanes those of a plane, of `planes` planes
// at a time. Lanes that are left over do what others do.
struct MarchShare {
    int group, piece;

    __device__ __forceinline__ MarchShare(unsigned across, unsigned planes, unsigned lane) {
        group = lane / across;
        piece = lane - group * across;
        if (group >= static_cast<int>(planes)) group = 0;
    }
};

// Calls `move` with each of a lane's planes, as the count of the steps to it: four of them where kEven.
template <class C, class Move>
__device__ __forceinline__ void each_plane(int group, int groups, int planes, const Move& move) {
    if constexpr (C::kEven) {
#pragma unroll
        for (int k = 0; k < 4; ++k) move(k);
    } else {
#pragma unroll 1
        for (int k = 0; group + k * groups < planes; ++k) move(k);
    }
}

// Adds an input row, of which `window` is what the lane reads, to the output rows that read it: filter rows Phase,
// Phase + stride, ... do. sums[0] belongs to the newest output row. At phase 0 another one begins, and every sum takes
// the place of the one above: as the first multiply-add writes it there, that costs nothing. Output 0's first tap reads
// window[-Before]; what lies outside of the window is padding.
//   A multiply-add reads three registers, and each of two banks gives one a clock, unless the one before read the same.
//   Two rows at a time and registers to spare let the compiler arrange most of them; how many it leaves is a matter of
//   the order here, by which a seventh of them or a third is (docs/variants/staged_nchw.md).
template <class C, int Phase, int Before, int Window, class Sum>
__device__ __forceinline__ void march_row(const Sum (&window)[Window], const Sum (&taps)[C::kFilterH][C::kFilterW],
                                          Sum bias, Sum (&sums)[ceil_div(C::kFilterH, C::kStrideH)][C::kColumns]) {
    constexpr int kLive = ceil_div(C::kFilterH, C::kStrideH);
    constexpr int kReach = (C::kColumns - 1) * C::kStrideW + C::kFilterW;
    Sum moved[kLive][C::kColumns];
#pragma unroll
    for (int k = 0; k < kLive; ++k)
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
            moved[k][t] = Phase > 0 ? sums[k][t] : k > 0 ? sums[larger(k - 1, 0)][t] : bias;
    // What output column t has of the window's column e, counted from the first one that output 0 would read.
    const auto add = [&](int k, int t, int e) {
        const int u = Phase + k * C::kStrideH, v = e - t * C::kStrideW, column = e - Before;
        if (u < C::kFilterH && is_tap(v, 1, C::kFilterW) && column >= 0 && column < Window)
            moved[k][t] += taps[u][v] * window[column];
    };
    if constexpr (C::kWhole > 0) {
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
#pragma unroll
            for (int e = 0; e < kReach; ++e)
#pragma unroll
                for (int k = 0; k < kLive; ++k) add(k, k % 2 == 0 ? t : C::kColumns - 1 - t, e);
    } else {
#pragma unroll
        for (int e = 0; e < kReach; ++e)
#pragma unroll
            for (int t = 0; t < C::kColumns; ++t)
#pragma unroll
                for (int k = 0; k < kLive; ++k) add(k, t, e);
    }
#pragma unroll
    for (int k = 0; k < kLive; ++k)
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
            if (Phase + k * C::kStrideH < C::kFilterH) sums[k][t] = moved[k][t];
}

template <class C>
__device__ __forceinline__ void staged_march(const Tensors<typename C::Element>& tensors, const Sizes& sizes,
                                             const StagedNchwTiling& tiling) {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    using Window = StagedWindow<C>;
    static_assert(sizeof(T) == 4, "the march takes float32: copies move 4 bytes or more");
    static_assert(
        C::kStrideH == 1 && C::kStrideW == 1 && C::kDilationH == 1 && C::kDilationW == 1 && C::kMultiplier == 1,
        "the march takes neighbouring rows and columns of as many planes as it makes");
    static_assert(C::kStages >= 2, "kStages must be 2 or more: one stage is read while another one arrives");
    constexpr int kTaps = C::kFilterH * C::kFilterW, kWindow = C::kColumns + C::kFilterW - 1;
    constexpr int kFlushRows = C::kEven ? 2 : 1;  // of outputs that leave at once

    // The warp's item.
    const int lane = static_cast<int>(threadIdx.x % 32);
    const unsigned warp = warp_number(), number = blockIdx.x * (C::kThreads / 32) + warp;
    const unsigned above = tiling.column_items.quotient(number), group = tiling.row_items.quotient(above);
    const unsigned image = tiling.channel_groups.quotient(group);
    const unsigned channel = (group - image * tiling.channel_groups.divisor) * tiling.item_planes;
    const int channels = static_cast<int>(sizes.out_channels), in_w = static_cast<int>(tiling.line_units.divisor);
    const int out_w = static_cast<int>(sizes.out_w);
    const unsigned first_plane = image * channels + channel;
    if (first_plane >= sizes.planes) return;
    const int planes = smaller(tiling.item_planes, channels - channel);
    const int out_column = static_cast<int>((number - above * tiling.column_items.divisor) * tiling.item_columns);
    const int out_columns = smaller(tiling.item_columns, out_w - out_column);
    const int out_first = static_cast<int>((above - group * tiling.row_items.divisor) * tiling.item_rows);
    const int out_end = smaller(out_first + static_cast<int>(tiling.item_rows), static_cast<int>(sizes.out_h));
    const int last = out_end - 1 - C::kPadTop + C::kFilterH - 1;    // the last row that is read, or of padding
    const int complete = out_first - C::kPadTop + C::kFilterH - 1;  // the row after which the first outputs are
    const int row = larger(0, out_first - C::kPadTop);              // the first that is read
    const int origin = row - (complete - row) % 2;                  // stages are pairs of rows, as outputs are

    const int in_end = smaller(last + 1, static_cast<int>(sizes.in_h));

    // The warp's shared memory.
    const int plane_pitch = static_cast<int>(tiling.plane_pitch);
    // In registers: what is read again from the parameters is waited for, in each step.
    int pitch = static_cast<int>(tiling.pitch);
    int copy_pitch = static_cast<int>(tiling.copy_pitch), store_pitch = static_cast<int>(tiling.store_pitch);
    unsigned copy_step = tiling.copy_step, store_step = tiling.store_step;
    keep(pitch), keep(copy_pitch), keep(store_pitch), keep(copy_step), keep(store_step);
    const int stage_elements = 2 * pitch, last_stage = (C::kStages - 1) * stage_elements;
    T* const ring = shared_memory<T>() + warp * tiling.warp_elements;
    T* const buffer = ring + tiling.ring_elements;

    // Copies of the next pair of rows.
    const int first_cell = Window::kLead - smaller(out_column, Window::kLead);  // of a row in shared memory
    const int first = out_column - Window::kLead + first_cell;
    const int pieces = ceil_div(
        larger(smaller(in_w, out_column + out_columns - C::kPadLeft + C::kFilterW - 1) - first, 0), C::kGranule);
    const MarchShare share(tiling.copy_lanes, tiling.copy_planes, lane);
    const int below = C::kEven ? share.piece / larger(1, pieces) : 0;  // the row of the lane's piece in a stage
    const T* from = tensors.x + (static_cast<long long>(first_plane + share.group) * tiling.in_plane +
                                 (origin * in_w + first + share.piece * C::kGranule));
    T* const into =
        ring + share.group * plane_pitch + first_cell + below * pitch + (share.piece - below * pieces) * C::kGranule;
    const auto copy = [&](int stage, int copied_row) {
        if constexpr (C::kEven) {
            if (static_cast<unsigned>(copied_row + below - row) < static_cast<unsigned>(in_end - row))
                each_plane<C>(share.group, tiling.copy_planes, planes, [&](int k) {
                    copy_piece<C::kGranule * sizeof(T)>(into + stage + k * copy_pitch,
                                                        from + k * static_cast<long long>(copy_step));
                });
        } else {
#pragma unroll 1
            for (int r = larger(0, row - copied_row); r < smaller(2, in_end - copied_row); ++r)
                each_plane<C>(share.group, tiling.copy_planes, planes, [&](int k) {
                    T* const to = into + stage + k * copy_pitch + r * pitch;
                    const T* line = from + k * static_cast<long long>(copy_step) + r * in_w;
#pragma unroll 1
                    for (int at = 0; at < pieces - share.piece; at += 32)
                        copy_piece<C::kGranule * sizeof(T)>(to + at * C::kGranule, line + at * C::kGranule);
                });
        }
        end_of_copies();
        from += 2 * in_w;
    };
    // The first rows are on their way before anything else.
#pragma unroll 1
    for (int s = 0; s < C::kStages - 1; ++s) copy(s * stage_elements, origin + s * 2);

    // While they are: zeros beside them, and the filter, by way of shared memory.
    {
        const int end_cell = first_cell + pieces * C::kGranule;
        const int lines = static_cast<int>(C::kStages * 2 * tiling.item_planes);
#pragma unroll 1
        for (int line = lane; line < lines; line += 32) {
            T* const cells = ring + line * plane_pitch;
#pragma unroll 1
            for (int c = 0; c < first_cell; ++c) cells[c] = T(0);
#pragma unroll 1
            for (int c = end_cell; c < plane_pitch; ++c) cells[c] = T(0);
        }
#pragma unroll 1
        for (int at = lines * plane_pitch + lane; at < static_cast<int>(tiling.ring_elements); at += 32)
            ring[at] = T(0);
    }
    const T* const w = tensors.w + static_cast<long long>(channel) * kTaps;
#pragma unroll 4
    for (int k = lane; k < planes * kTaps; k += 32) buffer[k] = load_one(w + k);
    __syncwarp();
    const int lanes = static_cast<int>(tiling.column_tiles.divisor);  // of a plane
    const int plane = smaller(lane / lanes, planes - 1);
    const int column = (lane - lane / lanes * lanes) * C::kColumns;
    const bool exists = lane / lanes < planes;
    Sum taps[C::kFilterH][C::kFilterW];
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
        taps[k / C::kFilterW][k % C::kFilterW] = static_cast<Sum>(buffer[plane * kTaps + tap_at<C>(k)]);
    const Sum bias = C::kHasBias ? static_cast<Sum>(load_one(tensors.b + channel + plane)) : Sum(0);
    const ChannelValues<Sum> values = channel_values<C>(tensors, channel + plane);

    // Outputs wait at `gathered`, of kFlushRows rows of each plane.
    const int gather_columns = exists ? out_columns - column : 0;
    T* const gathered = buffer + plane * static_cast<int>(tiling.out_pitch) + column;
    int waiting = 0;  // elements of a plane
    const MarchShare out_share(tiling.store_lanes, tiling.store_planes, lane);
    const T* const results =
        buffer + out_share.group * static_cast<int>(tiling.out_pitch) + out_share.piece * C::kStoreVector;
    long long out = static_cast<long long>(first_plane + out_share.group) * tiling.out_plane +
                    (static_cast<long long>(out_first) * out_w + out_column + out_share.piece * C::kStoreVector);
    const auto store_piece = [&](const T* from, long long to) {
        Vector<T, C::kStoreVector> stored = *reinterpret_cast<const Vector<T, C::kStoreVector>*>(from);
        if constexpr (C::kHasResidual) {
            const auto residual = load_vector<C::kStoreVector>(tensors.residual + to);
#pragma unroll
            for (int k = 0; k < C::kStoreVector; ++k) stored.element[k] += residual.element[k];
        }
        store_vector(tensors.y + to, stored);
    };
    const auto flush = [&] {
        __syncwarp();
        const int part = waiting - out_share.piece * C::kStoreVector;  // elements from the lane's piece on
        if constexpr (C::kEven) {
            if (part > 0)
                each_plane<C>(out_share.group, tiling.store_planes, planes, [&](int k) {
                    store_piece(results + k * store_pitch, out + k * static_cast<long long>(store_step));
                });
        } else {
            each_plane<C>(out_share.group, tiling.store_planes, planes, [&](int k) {
#pragma unroll 1
                for (int at = 0; at < part; at += 32 * C::kStoreVector)
                    store_piece(results + k * store_pitch + at, out + k * static_cast<long long>(store_step) + at);
            });
        }
        __syncwarp();  // the buffer has been read
        out += kFlushRows * out_w;
        waiting = 0;
    };
    const auto gather = [&](const Sum(&done)[C::kColumns]) {
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t)
            if (C::kEven || t < gather_columns)
                gathered[waiting + t] = finished<WithoutResidual<C>>(done[t], values, T{});
        waiting += out_columns;
    };

    Sum sums[C::kFilterH][C::kColumns];
#pragma unroll
    for (int k = 0; k < C::kFilterH; ++k)
#pragma unroll
        for (int t = 0; t < C::kColumns; ++t) sums[k][t] = bias;
    const T* const own = ring + plane * plane_pitch + Window::kShift + column;
    const T* at = own;
    int stage = last_stage, next = origin;  // the stage that is read, or was; its successor's rows
    const auto next_stage = [&] {
        wait_for_copies<C::kStages - 2>();
        __syncwarp();  // the rows are there for all lanes, and none reads the stage any more that is filled now
        copy(stage, next + (C::kStages - 1) * 2);
        stage = stage == last_stage ? 0 : stage + stage_elements;
        at = own + stage;
        next += 2;
    };
    const auto read = [&](const T* from, Sum(&window)[kWindow]) {
#pragma unroll
        for (int k = 0; k < kWindow; ++k) window[k] = static_cast<Sum>(from[k]);
    };
    if (origin < row) {  // a first row without the one above it; it completes nothing
        next_stage();
        Sum window[kWindow];
        read(at + pitch, window);
        march_row<C, 0, 0>(window, taps, bias, sums);
    }
#pragma unroll 1
    while (next + 1 < in_end) {
        const bool completes = next >= complete;
        next_stage();
        Sum windows[2][kWindow];
        read(at, windows[0]);
        read(at + pitch, windows[1]);
        waiting = 0;
        march_row<C, 0, 0>(windows[0], taps, bias, sums);
        if (completes) {
            gather(sums[C::kFilterH - 1]);
            if constexpr (kFlushRows == 1) flush();
        }
        march_row<C, 0, 0>(windows[1], taps, bias, sums);
        if (completes) {
            gather(sums[C::kFilterH - 1]);
            flush();
        }
    }
    int done = next;  // rows
    const auto store = [&](const Sum(&sum)[C::kColumns]) {
        if (done >= complete && done <= last) {
            gather(sum);
            if (waiting == kFlushRows * out_columns || done == last) flush();
        }
        ++done;
    };
    if (next < in_end) {  // a last one without the one below it
        next_stage();
        Sum window[kWindow];
        read(at, window);
        march_row<C, 0, 0>(window, taps, bias, sums);
        store(sums[C::kFilterH - 1]);
    }
#pragma unroll
    for (int k = C::kFilterH - 2; k >= 0; --k) store(sums[k]);  // what only padding would be added to
    wait_for_copies<0>();
}

}  // namespace dwconv
