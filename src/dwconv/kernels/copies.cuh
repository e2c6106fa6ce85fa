// copies.cuh: copies to shared memory that run beside the arithmetic (cp.async, sm_80 and newer)
//   Before sm_80, for pieces of two bytes, and in the emulator, the thread waits for its own copy.
#pragma once
#include "common.cuh"

namespace dwconv {

// The number of this thread's warp, the same for all its lanes as compilers see it, too: where one warp alone waits,
// they don't expect its lanes apart from each other behind that (17 instructions for a row of wide_nhwc, and up to 30
// registers; sm_90, NVRTC 13.0). To be called before anything branches.
__device__ __forceinline__ unsigned warp_number() {
#ifdef DWCONV_EMULATOR
    return threadIdx.x / 32;
#else
    return __shfl_sync(__activemask(), threadIdx.x / 32, 0);
#endif
}

#if !defined(DWCONV_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define DWCONV_ASYNC_COPIES
#endif

// Copies Bytes, 16 of them past L1; both addresses are multiples of Bytes.
template <int Bytes>
__device__ __forceinline__ void copy_piece(void* to, const void* from) {
#ifdef DWCONV_ASYNC_COPIES
    if constexpr (Bytes >= 4) {
        const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
        if constexpr (Bytes == 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(Bytes) : "memory");
        return;
    }
#endif
    using Bits = typename Word<Bytes>::Type;
    *static_cast<Bits*>(to) = __ldg(static_cast<const Bits*>(from));
}

// Copies Bytes, or writes zeros where there is nothing to copy. Cached: through L1. Past it, the H200 fetches twice the
// sectors of pieces that don't fill lines (2026-11).
template <int Bytes, bool Cached>
__device__ __forceinline__ void copy_piece_or_zero(void* to, const void* from, bool exists) {
#ifdef DWCONV_ASYNC_COPIES
    if constexpr (Bytes >= 4) {
        const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
        if constexpr (Bytes == 16 && !Cached)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(exists ? 16 : 0)
                         : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(Bytes),
                         "r"(exists ? Bytes : 0)
                         : "memory");
        return;
    }
#endif
    using Bits = typename Word<Bytes>::Type;
    *static_cast<Bits*>(to) = exists ? __ldg(static_cast<const Bits*>(from)) : Bits();
}

// The same, if `is_wanted` is not negative. Nothing branches.
template <int Bytes, bool Cached>
__device__ __forceinline__ void copy_wanted_or_zero(void* to, const void* from, bool exists, int is_wanted) {
#ifdef DWCONV_ASYNC_COPIES
    if constexpr (Bytes == 16) {
        const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
        if constexpr (Cached)
            asm volatile(
                "{\n.reg .pred wanted, left_out;\nsetp.ge.s32 wanted, %3, 0;\nsetp.eq.s32 left_out, %2, 0;\n"
                "@wanted cp.async.ca.shared.global [%0], [%1], 16, left_out;\n}" ::"r"(address),
                "l"(from), "r"(static_cast<int>(exists)), "r"(is_wanted)
                : "memory");
        else
            asm volatile(
                "{\n.reg .pred wanted, left_out;\nsetp.ge.s32 wanted, %3, 0;\nsetp.eq.s32 left_out, %2, 0;\n"
                "@wanted cp.async.cg.shared.global [%0], [%1], 16, left_out;\n}" ::"r"(address),
                "l"(from), "r"(static_cast<int>(exists)), "r"(is_wanted)
                : "memory");
        return;
    }
#endif
    if (is_wanted >= 0) copy_piece_or_zero<Bytes, Cached>(to, from, exists);
}

// A place in shared memory that copies go to, in a register: compilers would rather compute such addresses again for
// each copy (a third of taps_nhwc's instructions beside the multiply-adds, sm_90, NVRTC 13.0).
struct CopyPlace {
#ifdef DWCONV_ASYNC_COPIES
    unsigned address;
    __device__ __forceinline__ explicit CopyPlace(const void* to) {
        asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))));
    }
#else
    unsigned char* address;
    __device__ __forceinline__ explicit CopyPlace(void* to) : address(static_cast<unsigned char*>(to)) {}
#endif
};

// Copies Bytes to `offset` bytes behind a place, or writes zeros where `exists` is 0. The predicate costs an
// instruction; a number of bytes, as copy_piece_or_zero has it, five.
template <int Bytes, bool Cached>
__device__ __forceinline__ void copy_piece_to(const CopyPlace& place, unsigned offset, const void* from,
                                              unsigned exists) {
#ifdef DWCONV_ASYNC_COPIES
    const unsigned address = place.address + offset;
    if constexpr (Bytes >= 4) {
        if constexpr (Bytes == 16 && !Cached)
            asm volatile(
                "{\n\t.reg .pred p;\n\tsetp.eq.u32 p, %2, 0;\n\t"
                "cp.async.cg.shared.global [%0], [%1], 16, p;\n\t}" ::"r"(address),
                "l"(from), "r"(exists)
                : "memory");
        else
            asm volatile(
                "{\n\t.reg .pred p;\n\tsetp.eq.u32 p, %3, 0;\n\t"
                "cp.async.ca.shared.global [%0], [%1], %2, p;\n\t}" ::"r"(address),
                "l"(from), "n"(Bytes), "r"(exists)
                : "memory");
    } else {
        const unsigned short value = exists ? __ldg(static_cast<const unsigned short*>(from)) : 0;
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
    }
#else
    using Bits = typename Word<Bytes>::Type;
    *reinterpret_cast<Bits*>(place.address + offset) = exists ? __ldg(static_cast<const Bits*>(from)) : Bits();
#endif
}

// The same where `wanted` isn't 0. Nothing branches: that would cost three more instructions for each copy (sm_90,
// NVRTC 13.0).
template <int Bytes, bool Cached>
__device__ __forceinline__ void copy_wanted_piece_to(const CopyPlace& place, unsigned offset, const void* from,
                                                     unsigned exists, unsigned wanted) {
#ifdef DWCONV_ASYNC_COPIES
    const unsigned address = place.address + offset;
    if constexpr (Bytes == 16 && !Cached) {
        asm volatile(
            "{\n\t.reg .pred p, w;\n\tsetp.eq.u32 p, %2, 0;\n\tsetp.ne.u32 w, %3, 0;\n\t"
            "@w cp.async.cg.shared.global [%0], [%1], 16, p;\n\t}" ::"r"(address),
            "l"(from), "r"(exists), "r"(wanted)
            : "memory");
        return;
    } else if constexpr (Bytes >= 4) {
        asm volatile(
            "{\n\t.reg .pred p, w;\n\tsetp.eq.u32 p, %3, 0;\n\tsetp.ne.u32 w, %4, 0;\n\t"
            "@w cp.async.ca.shared.global [%0], [%1], %2, p;\n\t}" ::"r"(address),
            "l"(from), "n"(Bytes), "r"(exists), "r"(wanted)
            : "memory");
        return;
    }
#endif
    if (wanted) copy_piece_to<Bytes, Cached>(place, offset, from, exists);
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void end_of_copies() {
#ifdef DWCONV_ASYNC_COPIES
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last Open groups of this thread's copies have arrived.
template <int Open>
__device__ __forceinline__ void wait_for_copies() {
#ifdef DWCONV_ASYNC_COPIES
    asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
#endif
}

}  // namespace dwconv
