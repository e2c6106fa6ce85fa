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
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // barriers make it one for all threads of the block
        *shared = atomicAdd(counter, 1u) == parts - 1;
        if (*shared) {
            __threadfence();  // which would wait for the counter, were it written before
            *counter = 0;
        }
    }
    __syncthreads();
    return *shared;
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

// Adds up Count sums of `parts` blocks, part after part, and passes each to store(index, sum); `apart`: sums from one
// part to the next one. Where there are more threads than vectors of 16 bytes, they share the parts: each slice of
// neighbouring parts is summed by other threads, and then slice after slice. All Threads threads of the block must call
// it; `scratch` is 16 * Threads bytes of shared memory that nobody uses. Ahead: loads of a thread that are in flight,
// of four registers each. The sums may be stored to the first part.
template <int Threads, int Ahead, unsigned Count, class Sum, class Store>
__device__ __forceinline__ void add_parts_up(const Sum* partial, unsigned parts, unsigned apart, Sum* scratch,
                                             const Store& store) {
    constexpr unsigned kWidth = 16 / sizeof(Sum), kVectors = Count / kWidth;
    static_assert(Count % kWidth == 0, "parts are whole vectors");
    constexpr unsigned kSlices = kVectors < Threads ? Threads / kVectors : 1;
    const unsigned slice_parts = (parts + kSlices - 1) / kSlices;
    const unsigned slice = kSlices == 1 ? 0 : threadIdx.x / kVectors;
    const unsigned first_part = slice * slice_parts, end_part = min(parts, first_part + slice_parts);
    Sum* const own = scratch + threadIdx.x * kWidth;
#pragma unroll 1
    for (unsigned vector = threadIdx.x - slice * kVectors; vector < kVectors; vector += Threads) {
        if (slice == kSlices) break;
        Sum sums[kWidth] = {};
        const Sum* from = partial + static_cast<unsigned long long>(first_part) * apart + vector * kWidth;
#pragma unroll 1
        for (unsigned part = first_part; part < end_part; part += Ahead) {
            // Zeros stand for what isn't there, so that no condition is needed after the loads: with one for each they
            // would wait for one another, since a thread has seven predicates.
            Vector<Sum, kWidth> found[Ahead] = {};
#pragma unroll
            for (unsigned k = 0; k < Ahead; ++k, from += apart)
                if (part + k < end_part) found[k] = load_written<kWidth>(from);
#pragma unroll
            for (unsigned k = 0; k < Ahead; ++k)
#pragma unroll
                for (unsigned e = 0; e < kWidth; ++e) sums[e] += found[k].element[e];
        }
#pragma unroll
        for (unsigned e = 0; e < kWidth; ++e) own[e] = sums[e];
        if constexpr (kSlices > 1) break;
#pragma unroll 1
        for (unsigned e = 0; e < kWidth; ++e) store(vector * kWidth + e, own[e]);
    }
    if constexpr (kSlices > 1) {
        __syncthreads();
#pragma unroll 1
        for (unsigned index = threadIdx.x; index < Count; index += Threads) {
            Sum sum = scratch[index];
#pragma unroll
            for (unsigned k = 1; k < kSlices; ++k) sum += scratch[k * Count + index];
            store(index, sum);
        }
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
    const bool at_once = gathered >= parts;  // no divisions then
    const unsigned gatherers = at_once ? 1 : (parts + gathered - 1) / gathered;
    const unsigned gatherer = at_once ? 0 : part / gathered;
    arrivals += of_grid * (gatherers == 1 ? 1 : gatherers + 1);
    bool of_all = gatherers == 1;
    unsigned* counter = arrivals + gatherer;
    Sum* from = partial + static_cast<unsigned long long>(gatherer) * gathered * Count;
    unsigned number = min(gathered, parts - gatherer * gathered), apart = Count;
#pragma unroll 1
    while (arrives_last(counter, number, flag)) {
        add_parts_up<Threads, Ahead, Count>(from, number, apart, scratch, [&](unsigned index, Sum sum) {
            if (of_all)
                store(static_cast<int>(index), sum);
            else
                from[index] = sum;
        });
        if (of_all) return;
        of_all = true;
        counter = arrivals + gatherers;
        from = partial;
        number = gatherers;
        apart = gathered * Count;
    }
}

}  // namespace dwconv
