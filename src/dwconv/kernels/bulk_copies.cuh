// bulk_copies.cuh: stages of shared memory that a warp fills, for itself or for its block, each stretch of memory by
// one instruction (cp.async.bulk and mbarrier, sm_90 and newer); in the emulator a thread copies for itself, and gates
// are barriers
//   The copies are made by another unit, the asynchronous proxy. What threads have written to shared memory by
//   themselves, and copies will write again, is followed by own_writes_before_copies().
#pragma once
#include "gates.cuh"

namespace dwconv {

#if !defined(DWCONV_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// For L2: lines that are read leave it before all others. What was written before, and isn't in memory yet, may stay.
__device__ __forceinline__ unsigned long long evict_first() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
#endif

// Starts a copy for the stage of a gate; addresses and `bytes`, more than 0, are multiples of 16. EvictFirst: of what
// is copied, L2 keeps nothing that it would lose something else for.
template <bool EvictFirst>
__device__ __forceinline__ void send_bytes(unsigned gate, void* to, const void* from, unsigned bytes) {
#ifdef DWCONV_EMULATOR
    for (unsigned at = 0; at < bytes; at += 16)
        *reinterpret_cast<Vector<int, 4>*>(static_cast<char*>(to) + at) =
            *reinterpret_cast<const Vector<int, 4>*>(static_cast<const char*>(from) + at);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (EvictFirst)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
            "%4;" ::"r"(address),
            "l"(from), "r"(bytes), "r"(gate), "l"(evict_first())
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
            "l"(from), "r"(bytes), "r"(gate)
            : "memory");
#endif
}

// For one lane, once for each of those that fill the stage of a gate: so many bytes will arrive.
__device__ __forceinline__ void expect_bytes(unsigned gate, unsigned bytes) {
#ifdef DWCONV_EMULATOR
    static_cast<void>(gate), static_cast<void>(bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .b64 state;\n\tmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n\t}" ::"r"(gate),
                 "r"(bytes)
                 : "memory");
#endif
}

// True in one lane of a whole warp. Compilers know that it is one: they need no loop over lanes that send.
__device__ __forceinline__ bool is_elected() {
#if !defined(DWCONV_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    unsigned elected;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(elected));
    return elected;
#else
    return threadIdx.x % 32 == 0;
#endif
}

// A warp's own stages, filled and read in turn: each is on its way while the ones before are read.
template <int Stages>
class WarpStages {
    unsigned gates_ = 0;  // the address of Stages gates
    unsigned filled_ = 0, read_ = 0, round_ = 0;

public:
    static constexpr int kBytes = 8 * Stages;

    // `gates`: kBytes of shared memory that stay this warp's. All lanes call it.
    __device__ __forceinline__ explicit WarpStages(void* gates) {
#ifdef DWCONV_EMULATOR
        static_cast<void>(gates);
#else
        gates_ = static_cast<unsigned>(__cvta_generic_to_shared(gates));
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int k = 0; k < Stages; ++k) Gate::initialize(gates_ + 8 * k, 1);
            own_writes_before_copies();
        }
        __syncwarp();
#endif
    }

    // Of the stage that is filled now.
    __device__ __forceinline__ unsigned gate() const { return gates_ + 8 * filled_; }
    // All lanes: what is sent from now on goes to the next stage.
    __device__ __forceinline__ void is_sent() { filled_ = filled_ + 1 == Stages ? 0 : filled_ + 1; }

    // All lanes: the next stage to be read is there for all of them, and none reads those before it any more.
    __device__ __forceinline__ void wait_until_full() {
#ifndef DWCONV_EMULATOR
        Gate::wait(gates_ + 8 * read_, round_);
        if (++read_ == Stages) {
            read_ = 0;
            round_ ^= 1;
        }
#endif
        __syncwarp();
    }
};

// Stages of shared memory that one warp fills and the others, `Readers` threads, read: each as far ahead of the other
// as there are stages. Both go through them in the same order; in the emulator the warp waits until a stage is read.
template <int Stages, int Readers, bool EvictFirst>
class BulkStages {
    unsigned stage_ = 0, round_ = 0;
#ifdef DWCONV_EMULATOR
    bool waits_ = false;

    static void meet() { __syncthreads(); }  // both sides at one barrier
#else
    unsigned full_;  // addresses of Stages gates, then as many of empty stages

    __device__ __forceinline__ unsigned full() const { return full_ + 8 * stage_; }
    __device__ __forceinline__ unsigned empty() const { return full_ + 8 * (Stages + stage_); }
#endif

public:
    static constexpr int kBytes = 16 * Stages;

    // `gates`: kBytes of shared memory that stay theirs. All threads call it; copies may start afterwards.
    __device__ __forceinline__ explicit BulkStages(void* gates) {
#ifdef DWCONV_EMULATOR
        static_cast<void>(gates);
#else
        full_ = static_cast<unsigned>(__cvta_generic_to_shared(gates));
        if (threadIdx.x == 0) {
#pragma unroll
            for (int k = 0; k < Stages; ++k) {
                Gate::initialize(full_ + 8 * k, 32);
                Gate::initialize(full_ + 8 * (Stages + k), Readers / 32);
            }
            own_writes_before_copies();
        }
#endif
        __syncthreads();
    }

    // Which stage it is that this warp fills or reads now.
    __device__ __forceinline__ unsigned stage() const { return stage_; }
    __device__ __forceinline__ void next() {
        if (++stage_ == Stages) {
            stage_ = 0;
            round_ ^= 1;
        }
    }

    // For the warp that fills: all readers are done with what was there.
    __device__ __forceinline__ void wait_until_empty() {
#ifdef DWCONV_EMULATOR
        if (waits_) meet();
        waits_ = true;
#else
        Gate::wait(empty(), round_ ^ 1);  // in the first round nothing was there
#endif
    }
    // Starts a copy to the stage: see send_bytes.
    __device__ __forceinline__ void send(void* to, const void* from, unsigned bytes) const {
#ifdef DWCONV_EMULATOR
        send_bytes<EvictFirst>(0, to, from, bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(full()), "r"(bytes) : "memory");
        send_bytes<EvictFirst>(full(), to, from, bytes);
#endif
    }
    // This lane has sent all that it sends to the stage, and written what it writes by itself. All lanes call it.
    __device__ __forceinline__ void sent() const {
#ifdef DWCONV_EMULATOR
        meet();
#else
        Gate::arrive(full());
#endif
    }

    // For readers: all that was sent to the stage has arrived.
    __device__ __forceinline__ void wait_until_full() const {
#ifdef DWCONV_EMULATOR
        meet();
#else
        Gate::wait(full(), round_);
#endif
    }
    // This warp has read the stage. All lanes call it.
    __device__ __forceinline__ void is_read() const {
#ifdef DWCONV_EMULATOR
        meet();
#else
        __syncwarp();
        if (threadIdx.x % 32 == 0) Gate::arrive(empty());
#endif
    }
};

// Sends `length` elements that begin `before` elements behind `line` to as many behind `to`, where both are multiples
// of 16 bytes. Nothing outside of [begin, end) is read: at these ends the thread copies elements by itself.
template <class T, class Stages>
__device__ __forceinline__ void send_line(const Stages& stages, T* to, const T* line, int before, int length,
                                          const T* begin, const T* end) {
    constexpr int kVector = 16 / sizeof(T);
    const int extent = before + length, whole = ceil_div(extent, kVector) * kVector;
    const int first = line < begin ? kVector : 0;
    const int last = larger(line + whole > end ? whole - kVector : whole, first);
    if (last > first)
        stages.send(to + first, line + first, static_cast<unsigned>((last - first) * static_cast<int>(sizeof(T))));
    if (first > 0 || last < whole) {
#pragma unroll 1
        for (int at = before; at < smaller(first, extent); ++at) to[at] = load_one(line + at);
#pragma unroll 1
        for (int at = larger(last, before); at < extent; ++at) to[at] = load_one(line + at);
        own_writes_before_copies();
    }
}

}  // namespace dwconv
