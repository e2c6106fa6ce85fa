// cuda_emulator.h: CUDA's built-ins for g++, so that it compiles the kernels in kernels/*.cuh as they stand
//
//   One fiber per CUDA thread; a block's fibers run on one OS thread, one at a time, until they wait for each other.
//   This header holds what kernels see. runtime.cpp schedules; switch.h swaps stacks; docs/emulator.md describes it
//   all. No standard header is included: a kernel must not compile here because of a name that NVRTC doesn't know.
#pragma once

#define DWCONV_EMULATOR 1

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ _Pragma("GCC error \"static __shared__ is not emulated: use dwconv::shared_memory<T>()\"")
#define __align__(bytes) __attribute__((aligned(bytes)))

#define DWCONV_VECTOR_TYPES(T, name, align2, align4)                   \
    struct name##2 {                                                   \
        alignas(align2) T x;                                           \
        T y;                                                           \
    };                                                                 \
    struct name##3 { T x, y, z; };                                     \
    struct name##4 {                                                   \
        alignas(align4) T x;                                           \
        T y, z, w;                                                     \
    };                                                                 \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
DWCONV_VECTOR_TYPES(unsigned char, uchar, 2, 4)
DWCONV_VECTOR_TYPES(short, short, 4, 8)
DWCONV_VECTOR_TYPES(unsigned short, ushort, 4, 8)
DWCONV_VECTOR_TYPES(int, int, 8, 16)
DWCONV_VECTOR_TYPES(unsigned, uint, 8, 16)
DWCONV_VECTOR_TYPES(float, float, 8, 16)
DWCONV_VECTOR_TYPES(double, double, 16, 16)
#undef DWCONV_VECTOR_TYPES

namespace dwconv_emulator {

using u32 = unsigned;
using u64 = unsigned long long;

// What one launch is; the twin of `_Launch` in launch.py.
struct Launch {
    u32 grid[3], block[3];
    u64 shared_bytes;
    void* const* arguments;  // one pointer per kernel argument, as for cuLaunchKernel
    u64 order_seed;
    int shuffled;    // run threads and blocks in the order that order_seed gives
    int workers;     // OS threads
    double seconds;  // hand back after about this time, so that Python can show progress and be interrupted
    u64 next_block;  // where to start; where to go on after handing back
    char* message;   // what went wrong, a sentence
    u64 message_bytes;
};

struct Block {
    uint3 index;
    uint3 dim, grid;
    unsigned char* shared;
    u64 shared_bytes;
};

// A CUDA thread. Its fiber reads where it is from here.
struct Thread {
    uint3 index;
    const Block* block;
};

extern __thread Thread* self __attribute__((visibility("hidden")));

enum class Collective : int { kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kBallot, kAll, kAny, kSyncWarp };
enum class Barrier : int { kPlain, kCount, kAnd, kOr };

// Lets the lanes named in mask meet. Returns the lane's result; lanes that have none get poison.
u64 collective(Collective kind, u32 mask, u64 value, int parameter, int width, int line);
int barrier(Barrier kind, int predicate, int line);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
int launch_blocks(Launch* launch, void (*kernel)(void* const* arguments));

// CUDA faults on an address that is not a multiple of the size of what it moves.
template <class T>
inline void check_aligned(const T* address, const char* what) {
    if (reinterpret_cast<u64>(address) % alignof(T) != 0)
        fail("%s of %d bytes at %p, which is not a multiple of %d", what, int(sizeof(T)),
             static_cast<const void*>(address), int(alignof(T)));
}

template <class T>
inline T shuffle(Collective kind, u32 mask, T value, int parameter, int width, int line) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 2, 4 or 8 bytes");
    u64 bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = collective(kind, mask, bits, parameter, width, line);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}

template <unsigned... I>
struct Indices {};
template <unsigned N, unsigned... I>
struct IndicesTo : IndicesTo<N - 1, N - 1, I...> {};
template <unsigned... I>
struct IndicesTo<0, I...> {
    using Type = Indices<I...>;
};
template <class... Arguments, unsigned... I>
inline void call(void (*kernel)(Arguments...), void* const* arguments, Indices<I...>) {
    kernel(*static_cast<Arguments*>(arguments[I])...);
}
template <class... Arguments>
inline void call(void (*kernel)(Arguments...), void* const* arguments) {
    call(kernel, arguments, typename IndicesTo<sizeof...(Arguments)>::Type());
}
// Sizes of the kernel's arguments in bytes, ended by 0: launch.py compares them with what it passes.
template <class... Arguments>
inline const u32* argument_bytes(void (*)(Arguments...)) {
    static const u32 bytes[] = {sizeof(Arguments)..., 0};
    return bytes;
}

}  // namespace dwconv_emulator

#define threadIdx (::dwconv_emulator::self->index)
#define blockIdx (::dwconv_emulator::self->block->index)
#define blockDim (::dwconv_emulator::self->block->dim)
#define gridDim (::dwconv_emulator::self->block->grid)
static constexpr int warpSize = 32;

namespace dwconv {
// Dynamic shared memory: exactly as many bytes as the plan asks for, poisoned with 0xFF before each block.
template <class T>
inline T* shared_memory() {
    const ::dwconv_emulator::Block& block = *::dwconv_emulator::self->block;
    if (block.shared_bytes == 0)
        ::dwconv_emulator::fail("the kernel uses shared memory, but the plan gives it none: set shared_bytes");
    return reinterpret_cast<T*>(block.shared);
}
}  // namespace dwconv

// ---- barriers and warps. The line tells a meeting of different calls; code that g++ duplicates keeps its line. ----

inline void __syncthreads(int line = __builtin_LINE()) {
    ::dwconv_emulator::barrier(::dwconv_emulator::Barrier::kPlain, 0, line);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
    return ::dwconv_emulator::barrier(::dwconv_emulator::Barrier::kCount, predicate, line);
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
    return ::dwconv_emulator::barrier(::dwconv_emulator::Barrier::kAnd, predicate, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
    return ::dwconv_emulator::barrier(::dwconv_emulator::Barrier::kOr, predicate, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    ::dwconv_emulator::collective(::dwconv_emulator::Collective::kSyncWarp, mask, 0, 0, 32, line);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
    return ::dwconv_emulator::shuffle(::dwconv_emulator::Collective::kShuffle, mask, value, lane, width, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    return ::dwconv_emulator::shuffle(::dwconv_emulator::Collective::kShuffleUp, mask, value, delta, width, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    return ::dwconv_emulator::shuffle(::dwconv_emulator::Collective::kShuffleDown, mask, value, delta, width, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, int line = __builtin_LINE()) {
    return ::dwconv_emulator::shuffle(::dwconv_emulator::Collective::kShuffleXor, mask, value, lane_mask, width, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return static_cast<unsigned>(
        ::dwconv_emulator::collective(::dwconv_emulator::Collective::kBallot, mask, predicate != 0, 0, 32, line));
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return static_cast<int>(
        ::dwconv_emulator::collective(::dwconv_emulator::Collective::kAll, mask, predicate != 0, 0, 32, line));
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return static_cast<int>(
        ::dwconv_emulator::collective(::dwconv_emulator::Collective::kAny, mask, predicate != 0, 0, 32, line));
}

// ---- memory ----

template <class T>
inline T __ldg(const T* address) {
    ::dwconv_emulator::check_aligned(address, "__ldg");
    return *address;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void __trap() { ::dwconv_emulator::fail("the kernel called __trap()"); }

inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
inline T dwconv_atomic_add(T* address, T value) {
    T old, sum;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do sum = old + value;
    while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
inline float atomicAdd(float* address, float value) { return dwconv_atomic_add(address, value); }
inline double atomicAdd(double* address, double value) { return dwconv_atomic_add(address, value); }

// ---- arithmetic ----

inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline unsigned __float_as_uint(float a) {
    unsigned bits;
    __builtin_memcpy(&bits, &a, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float a;
    __builtin_memcpy(&a, &bits, sizeof a);
    return a;
}
inline float expf(float a) { return __builtin_expf(a); }
inline double exp(double a) { return __builtin_exp(a); }
inline float erfcf(float a) { return __builtin_erfcf(a); }
inline double erfc(double a) { return __builtin_erfc(a); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}

// ---- 16-bit elements: conversions of kernels/elements.cuh, which are single instructions in CUDA ----

namespace dwconv {
inline float half_to_float(unsigned short bits) {
    const unsigned magnitude = (bits & 0x7fffu) << 13;
    float value = __uint_as_float(magnitude) * 0x1p112f;  // moves the exponent's bias, and subnormals with it
    if (magnitude >= 0x0f800000u) value = __uint_as_float(magnitude | 0x7f800000u);  // Inf and NaN
    return __uint_as_float(__float_as_uint(value) | (bits & 0x8000u) << 16);
}
inline unsigned short float_to_half(float value) {
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    unsigned half;
    if (magnitude > 0x7f800000u) {
        half = 0x7fffu;
    } else if (magnitude >= 0x47800000u) {  // 65536 and more; what rounds to it comes out of the addition below
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14 the result is subnormal: the sum with 0.5 rounds it in place
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    }
    return static_cast<unsigned short>(sign | half);
}
}  // namespace dwconv

// Stands after the kernel file: what launch.py finds in the shared object.
#define DWCONV_EMULATOR_EXPORT(kernel)                                                                                \
    extern "C" __attribute__((visibility("default"))) const unsigned* dwconv_emulator_argument_bytes() {              \
        return ::dwconv_emulator::argument_bytes(&kernel);                                                            \
    }                                                                                                                 \
    extern "C" __attribute__((visibility("default"))) int dwconv_emulator_launch(::dwconv_emulator::Launch* launch) { \
        return ::dwconv_emulator::launch_blocks(                                                                      \
            launch, [](void* const* arguments) { ::dwconv_emulator::call(&kernel, arguments); });                     \
    }
