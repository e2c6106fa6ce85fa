// tensor_copies.cuh: boxes of a tensor, copied to shared memory or from there by one instruction each
// (cp.async.bulk.tensor, sm_90 and newer)
//   The copy engine knows the tensor by a map that the host has made (tensor_maps.py). What a box has outside of the
//   tensor becomes zeros. Along the innermost dimension it begins at a multiple of 16 bytes: elsewhere it is an illegal
//   instruction. In the emulator the thread copies for itself.
#pragma once
#include "bulk_copies.cuh"

namespace dwconv {

// A tensor of four dimensions, the innermost one first. On a GPU it is the driver's, and opaque; in the emulator: its
// address, four sizes, bytes from one to the next of the outer three dimensions, four sizes of a box, bytes of an
// element, and of rows whose pieces of 16 are swizzled.
struct
#ifndef DWCONV_EMULATOR
    alignas(64)
#endif
        TensorMap {
    unsigned long long words[16];
};

// Boxes of channels-last tensors: x, and y's gradient.
struct GradientMaps {
    TensorMap x, g;
};

// The same of what is read, and of what is written, too: x, and y.
struct InputMap {
    TensorMap x;
};
struct ForwardMaps {
    TensorMap x, y;
};

// Where byte `at` of shared memory stands if rows of so many pieces of 16 bytes are swizzled: none of 0.
__host__ __device__ constexpr unsigned swizzled(unsigned at, unsigned pieces) {
    return pieces == 0 ? at : at ^ (at / 128 % pieces * 16);
}

#ifdef DWCONV_EMULATOR
// Calls each(its place in shared memory, its place in the tensor or null) for every byte of a box.
template <class Each>
inline void bytes_of_box(const TensorMap& map, const void* place, const int (&first)[4], const Each& each) {
    const unsigned long long* const sizes = map.words + 1;
    const unsigned long long* const steps = map.words + 5;
    const unsigned long long* const box = map.words + 8;
    const unsigned long long element = map.words[12];
    if (first[0] * static_cast<long long>(element) % 16 != 0)
        ::dwconv_emulator::fail("a box begins at element %d of a line, which is no multiple of 16 bytes", first[0]);
    const unsigned long long pieces = map.words[13] / 16;
    unsigned char* const shared = shared_memory<unsigned char>();
    unsigned long long at = static_cast<const unsigned char*>(place) - shared;
    for (unsigned long long d = 0; d < box[3]; ++d)
        for (unsigned long long c = 0; c < box[2]; ++c)
            for (unsigned long long b = 0; b < box[1]; ++b)
                for (unsigned long long a = 0; a < box[0]; ++a, at += element) {
                    const long long index[4] = {
                        first[0] + static_cast<long long>(a), first[1] + static_cast<long long>(b),
                        first[2] + static_cast<long long>(c), first[3] + static_cast<long long>(d)};
                    bool exists = true;
                    unsigned long long offset = index[0] * element;
                    for (int k = 0; k < 4; ++k) {
                        exists = exists && index[k] >= 0 && index[k] < static_cast<long long>(sizes[k]);
                        if (k > 0) offset += index[k] * steps[k - 1];
                    }
                    for (unsigned long long byte = 0; byte < element; ++byte)
                        each(shared[swizzled(at + byte, pieces)],
                             exists ? reinterpret_cast<unsigned char*>(map.words[0]) + offset + byte : nullptr);
                }
}
#endif

// The engine fetches the map of a tensor before it is needed.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
#if !defined(DWCONV_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

__device__ __forceinline__ void prefetch_maps(const GradientMaps& maps) {
    prefetch_map(maps.x);
    prefetch_map(maps.g);
}

// For one lane: starts a copy to `to`, a multiple of 128 bytes, for the stage of a gate. EvictFirst: of what is copied,
// L2 keeps nothing that it would lose something else for.
template <bool EvictFirst>
__device__ __forceinline__ void send_box(unsigned gate, void* to, const TensorMap& map, int a, int b, int c, int d) {
#ifdef DWCONV_EMULATOR
    bytes_of_box(map, to, {a, b, c, d},
                 [](unsigned char& shared, const unsigned char* byte) { shared = byte == nullptr ? 0 : *byte; });
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (EvictFirst)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
            "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(address),
            "l"(&map), "r"(a), "r"(b), "r"(c), "r"(d), "r"(gate), "l"(evict_first())
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
            "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(address),
            "l"(&map), "r"(a), "r"(b), "r"(c), "r"(d), "r"(gate)
            : "memory");
#endif
}

// For one lane: starts a copy of a box in shared memory, from a multiple of 128 bytes on, to the tensor. What the box
// has outside of the tensor goes nowhere. What threads wrote there is followed by own_writes_before_copies() and a
// barrier.
__device__ __forceinline__ void store_box(const TensorMap& map, const void* from, int a, int b, int c, int d) {
#ifdef DWCONV_EMULATOR
    bytes_of_box(map, from, {a, b, c, d}, [](const unsigned char& shared, unsigned char* byte) {
        if (byte != nullptr) *byte = shared;
    });
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
                 "r"(a), "r"(b), "r"(c), "r"(d), "r"(static_cast<unsigned>(__cvta_generic_to_shared(from)))
                 : "memory");
#endif
}

// For the lane that started them: boxes that it stores have left shared memory.
__device__ __forceinline__ void wait_until_stores_are_read() {
#if !defined(DWCONV_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

}  // namespace dwconv
