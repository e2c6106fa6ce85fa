// filter_gradients.cuh: what kernels of the gradients of filters and bias share: their arguments, and how the sums of
// many threads and blocks become one, in an order that is the same on every run
//   dw[c*M + j, u] = sum over images n and outputs p of g[n, c*M + j, p] * x[n, c, p*S - P + u*D]
//   db[c*M + j]    = sum over images n and outputs p of g[n, c*M + j, p]
#pragma once
#include "common.cuh"

namespace dwconv {

// g is dense in the layout of x; db is null where it isn't wanted.
template <class T>
struct FilterGradients {
    const T *x, *g;
    T *dw, *db;
    void* partial;       // sums of blocks, in the type they are summed in
    unsigned* arrivals;  // zeros; zeros again after the launch
};

template <class Sum>
__device__ __forceinline__ bool is_finite(Sum value) {
    return value - value == Sum(0);
}

// Volumes: plane `number` of g, counted through all images, is plane `depth` of one of them; with a tap of the depth it
// meets a plane of x, which may lie in the padding.
struct MetPlanes {
    unsigned image;
    int depth, x_depth;
    bool exists;

    template <class C>
    __device__ __forceinline__ static MetPlanes find(unsigned number, const FastDivisor& depths, const Sizes& sizes,
                                                     int depth_tap) {
        MetPlanes found;
        found.image = depths.quotient(number);
        found.depth = static_cast<int>(number - found.image * depths.divisor);
        found.x_depth = found.depth * C::kStrideD - C::kPadFront + depth_tap * C::kDilationD;
        found.exists = static_cast<unsigned>(found.x_depth) < static_cast<unsigned>(sizes.in_d);
        return found;
    }
    __device__ __forceinline__ long long in_x(const Sizes& sizes) const {
        return image * sizes.x_image + x_depth * sizes.x_depth;
    }
    // A bit for each of Taps neighbouring taps of the depth, from this one on, that the filter has and whose plane of x
    // exists.
    template <class C, int Taps>
    __device__ __forceinline__ unsigned existing(const Sizes& sizes, int depth_tap) const {
        unsigned found = 0;
#pragma unroll
        for (int k = 0; k < Taps; ++k)
            if (static_cast<unsigned>(x_depth + k * C::kDilationD) < static_cast<unsigned>(sizes.in_d) &&
                (C::kFilterD % Taps == 0 || depth_tap + k < C::kFilterD))
                found |= 1u << k;
        return found;
    }
};

// Whether this block is the last of `parts` that call this with the same counter; all threads must call it. What the
// others wrote before is visible to the last one, and the counter is zero again.
__device__ __forceinline__ bool arrives_last(unsigned* counter, unsigned parts, int* shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *shared = atomicAdd(counter, 1u) == parts - 1;
        if (*shared) *counter = 0;
    }
    __syncthreads();
    const bool last = *shared;
    if (last) __threadfence();
    return last;
}

// Loads what other blocks have written during this launch: past L1, which may hold older bytes.
template <int Width, class T>
__device__ __forceinline__ Vector<T, Width> load_written(const T* address) {
    static_assert(sizeof(T) * Width == 16, "Width must be a vector of 16 bytes");
#ifdef DWCONV_EMULATOR
    return *reinterpret_cast<const Vector<T, Width>*>(address);
#else
    union {
        uint4 bits;
        Vector<T, Width> vector;
    } both;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(both.bits.x), "=r"(both.bits.y), "=r"(both.bits.z), "=r"(both.bits.w)
                 : "l"(address)
                 : "memory");
    return both.vector;
#endif
}

// Adds up `count` sums of `parts` blocks, partial[parts][count], part after part, and passes each to store(index, sum).
// Where there are more threads than vectors of 16 bytes, they share the parts: each slice of neighbouring parts is
// summed by other threads, and then slice after slice. All Threads threads of the block must call it; `scratch` is
// 16 * Threads bytes of shared memory that nobody uses. Ahead: loads of a thread that are in flight, of four registers
// each. `partial` and `count` are whole vectors. `apart`: sums from one
// part to the next one, `count` where it is 0. The sums may be stored to the first part.
template <int Threads, int Ahead, class Sum, class Store>
__device__ __forceinline__ void finish_filter_gradients(const Sum* partial, unsigned parts, unsigned count,
                                                        Sum* scratch, const Store& store, unsigned apart = 0) {
    constexpr int kWidth = 16 / sizeof(Sum);
    const unsigned long long pitch = apart == 0 ? count : apart;
    const unsigned vectors = count / kWidth;
    const unsigned slices = vectors < Threads ? min(Threads / vectors, parts) : 1;
    const unsigned slice_parts = (parts + slices - 1) / slices;
    const unsigned slice = slices == 1 ? 0 : threadIdx.x / vectors;
    const unsigned first_part = slice * slice_parts, end_part = min(parts, first_part + slice_parts);
#pragma unroll 1
    for (unsigned vector = threadIdx.x - slice * vectors; vector < vectors; vector += Threads) {
        Sum sums[kWidth] = {};
        if (slice < slices) {
            const Sum* from = partial + first_part * pitch + vector * kWidth;
#pragma unroll 1
            for (unsigned part = first_part; part < end_part; part += Ahead) {
                Vector<Sum, kWidth> found[Ahead];
#pragma unroll
                for (unsigned k = 0; k < Ahead; ++k)
                    if (part + k < end_part) found[k] = load_written<kWidth>(from + k * pitch);
#pragma unroll
                for (unsigned k = 0; k < Ahead; ++k)
                    if (part + k < end_part)
#pragma unroll
                        for (int e = 0; e < kWidth; ++e) sums[e] += found[k].element[e];
                from += Ahead * pitch;
            }
        }
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
            if (slices == 1)
                store(vector * kWidth + e, sums[e]);
            else if (slice < slices)
                scratch[slice * count + vector * kWidth + e] = sums[e];
        }
        if (slices > 1) break;
    }
    if (slices == 1) return;
    __syncthreads();
    for (unsigned index = threadIdx.x; index < count; index += Threads) {
        Sum sum = scratch[index];
        for (unsigned k = 1; k < slices; ++k) sum += scratch[k * count + index];
        store(index, sum);
    }
}

// What the blocks of one counter do when each has left its sums at partial[part][Count]: the last one adds them up and
// passes each to store(index, sum). Of more than `gathered` parts, the last block of each `gathered` neighbours adds up
// theirs first. `arrivals`: a counter for all parts, or one for each of those gatherers and one for them, of each
// `of_grid`. All threads must call it; `scratch` is 16 * (Threads + 1) bytes of shared memory that nobody uses.
template <int Threads, int Ahead, unsigned Count, class Sum, class Store>
__device__ __forceinline__ void finish_parts(Sum* partial, unsigned parts, unsigned gathered, unsigned part,
                                             unsigned of_grid, unsigned* arrivals, Sum* scratch, const Store& store) {
    int* const flag = reinterpret_cast<int*>(scratch + 16 / sizeof(Sum) * Threads);
    const unsigned gatherers = (parts + gathered - 1) / gathered;
    arrivals += of_grid * (gatherers == 1 ? 1 : gatherers + 1);
    const auto store_all = [&](unsigned index, Sum sum) { store(static_cast<int>(index), sum); };
    if (gatherers == 1) {
        if (arrives_last(arrivals, parts, flag))
            finish_filter_gradients<Threads, Ahead>(partial, parts, Count, scratch, store_all);
        return;
    }
    const unsigned gatherer = part / gathered, first = gatherer * gathered;
    const unsigned of_gatherer = min(gathered, parts - first);
    if (!arrives_last(arrivals + gatherer, of_gatherer, flag)) return;
    Sum* const found = partial + static_cast<unsigned long long>(first) * Count;
    finish_filter_gradients<Threads, Ahead>(found, of_gatherer, Count, scratch,
                                            [&](unsigned index, Sum sum) { found[index] = sum; });
    if (arrives_last(arrivals + gatherers, gatherers, flag))
        finish_filter_gradients<Threads, Ahead>(partial, gatherers, Count, scratch, store_all, gathered * Count);
}

}  // namespace dwconv
