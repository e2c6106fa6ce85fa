// gates.cuh: stages of shared memory that all threads of a block fill, and all its warps read, without meeting at a
// barrier (mbarrier, sm_80 and newer)
//   A stage is filled by cp.async, read, filled again. A warp that reads waits until the copies of all threads have
//   arrived; one that fills, until all warps have read what was there. So warps may be a step apart. The emulator,
//   where copies have arrived when they are started, meets at a barrier instead.
#pragma once
#include "copies.cuh"

namespace dwconv {

// What this thread has written to shared memory stands there before a copy that starts after the next barrier.
__device__ __forceinline__ void own_writes_before_copies() {
#if !defined(DWCONV_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#ifndef DWCONV_EMULATOR
// One mbarrier, by its address: 8 bytes of shared memory.
struct Gate {
    // Waits until the round of this parity is complete: 0 for the first one, 1 for the second, and so on.
    __device__ __forceinline__ static void wait(unsigned gate, unsigned parity) {
        asm volatile(
            "{\n\t.reg .pred open;\n\tAGAIN:\n\t"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
            "mbarrier.try_wait.parity.shared.b64 open, [%0], %1;\n\t"
#else
            "mbarrier.test_wait.parity.shared.b64 open, [%0], %1;\n\t"
#endif
            "@!open bra AGAIN;\n\t}" ::"r"(gate),
            "r"(parity)
            : "memory");
    }
    __device__ __forceinline__ static void arrive(unsigned gate) {
        asm volatile("{\n\t.reg .b64 state;\n\tmbarrier.arrive.shared.b64 state, [%0];\n\t}" ::"r"(gate) : "memory");
    }
    __device__ __forceinline__ static void initialize(unsigned gate, unsigned arrivals) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(gate), "r"(arrivals) : "memory");
    }
};
#endif

// Threads: that read, at most. Fillers: arrivals that fill a stage, of all threads, or of those that send to it (sm_90
// and newer).
template <int Stages, int Threads, int Fillers = Threads>
class StageGates {
    unsigned full_;  // addresses of Stages gates, then as many of empty stages
    unsigned round_ = 0;

public:
    static constexpr int kBytes = 16 * Stages;

    // `gates`: kBytes of shared memory that stay theirs. All threads call it; copies may start afterwards.
    __device__ __forceinline__ explicit StageGates(void* gates, unsigned readers = Threads) {
#ifdef DWCONV_EMULATOR
        full_ = 0;
        static_cast<void>(readers);
#else
        full_ = static_cast<unsigned>(__cvta_generic_to_shared(gates));
        keep(full_);  // else it is found again in each step, from the block's number in its cluster (S2UR)
        if (threadIdx.x == 0) {
            for (int k = 0; k < Stages; ++k) {
                Gate::initialize(full_ + 8 * k, Fillers);
                Gate::initialize(full_ + 8 * (Stages + k), readers);
            }
            if (Fillers < Threads) own_writes_before_copies();
        }
#endif
        __syncthreads();
    }

    // Of stage `stage`, in the round that is read now: its copies have arrived.
    __device__ __forceinline__ void wait_until_full(unsigned stage) const {
#ifdef DWCONV_EMULATOR
        __syncthreads();
#else
        Gate::wait(full_ + 8 * stage, round_);
#endif
    }
    // This thread has read it. One arrival for each warp would be 0.6 % faster (H200, 2026-11), but racecheck knows of
    // no order among lanes where the compiler leaves out __syncwarp().
    __device__ __forceinline__ void is_read(unsigned stage) const {
#ifndef DWCONV_EMULATOR
        Gate::arrive(full_ + 8 * (Stages + stage));
#endif
    }
    // All warps have read stage `stage` in the round that was read `rounds_ago`, 0 or 1.
    __device__ __forceinline__ void wait_until_empty(unsigned stage, unsigned rounds_ago) const {
#ifndef DWCONV_EMULATOR
        Gate::wait(full_ + 8 * (Stages + stage), round_ ^ rounds_ago);
#endif
    }
    // This thread's copies to it have been started.
    __device__ __forceinline__ void is_filled(unsigned stage) const {
#ifndef DWCONV_EMULATOR
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full_ + 8 * stage) : "memory");
#endif
    }
    // What copies that are sent to a stage arrive at.
    __device__ __forceinline__ unsigned gate(unsigned stage) const { return full_ + 8 * stage; }
    // The stage behind this one; behind the last one, the first of the next round.
    __device__ __forceinline__ unsigned next(unsigned stage) {
        if (stage + 1 < Stages) return stage + 1;
        round_ ^= 1;
        return 0;
    }
};

}  // namespace dwconv
