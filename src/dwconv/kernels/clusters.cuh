// clusters.cuh: neighbouring blocks that run at the same time and read each other's shared memory (sm_90 and newer)
//   The emulator has no clusters: what runs there must have another way.
#pragma once
#include "common.cuh"

namespace dwconv {

#ifndef DWCONV_EMULATOR
// All threads of all blocks of the cluster are here; what they wrote before, others may read behind it.
__device__ __forceinline__ void meet_in_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What stands in shared memory of block `rank` of the cluster, where this block has `own`.
template <class T>
__device__ __forceinline__ T load_of_block(const T* own, unsigned rank) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "words of 4 or 8 bytes");
    unsigned address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank));
    if constexpr (sizeof(T) == 4) {
        unsigned bits;
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(address) : "memory");
        return __uint_as_float(bits);
    } else {
        unsigned long long bits;
        asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(address) : "memory");
        return __longlong_as_double(static_cast<long long>(bits));
    }
}
#endif

}  // namespace dwconv
