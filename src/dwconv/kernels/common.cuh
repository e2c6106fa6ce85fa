// common.cuh: what every depthwise kernel shares: its arguments, vector access, exact fast division
//
// Freestanding: no torch, no CUTLASS, no libcu++. NVRTC compiles it as it stands, nvcc inside an exported file, and
// g++ under the emulator, which supplies CUDA's built-ins (threadIdx, __shfl_sync, __ldg, float4, ...) by a header.
#pragma once
#include "elements.cuh"

namespace dwconv {

// Sizes of one launch. Everything else that a kernel needs to know is a compile-time constant of its Config.
// x is [N, C, D, H, W] with any strides in which columns (channels first) or channels (channels last) are neighbours;
// y is dense in the same layout. Images have a depth of 1, sequences a depth and height of 1.
struct Sizes {
    long long planes;        // N * C*M, the output planes
    long long out_channels;  // C*M
    long long in_d, in_h, in_w;
    long long out_d, out_h, out_w;
    long long x_image, x_channel, x_depth, x_row, x_column;  // strides of x, in elements
};

// Where the tensors of one launch are; null where the problem has none.
template <class T>
struct Tensors {
    const T *x, *w, *b;
    T* y;
    const T *scale, *shift;  // [C*M]
    const T* residual;       // as y
};

// The type in which products are summed: float32 for everything up to float32, float64 for float64.
template <class T>
struct Accumulator {
    using Type = float;
};
template <>
struct Accumulator<double> {
    using Type = double;
};

// Width consecutive elements, moved by one instruction where the address allows it (aligned to their size).
template <class T, int Width>
struct alignas(sizeof(T) * Width) Vector {
    static_assert(Width > 0 && (Width & (Width - 1)) == 0, "Width must be a power of two: it is one memory access");
    static_assert(sizeof(T) * Width <= 16, "a thread moves at most 16 bytes with one instruction");
    T element[Width];
};

// The built-in type of as many bytes, for the read-only load path.
template <int Bytes>
struct Word;
template <>
struct Word<2> {
    using Type = unsigned short;
};
template <>
struct Word<4> {
    using Type = unsigned int;
};
template <>
struct Word<8> {
    using Type = uint2;
};
template <>
struct Word<16> {
    using Type = uint4;
};

// One of two types.
template <bool First, class A, class B>
struct Selected {
    using Type = A;
};
template <class A, class B>
struct Selected<false, A, B> {
    using Type = B;
};

// Loads Width elements from memory that no thread writes during the launch.
template <int Width, class T>
__device__ __forceinline__ Vector<T, Width> load_vector(const T* address) {
    using Bits = typename Word<sizeof(T) * Width>::Type;
    union {
        Bits bits;
        Vector<T, Width> vector;
    } both;
    both.bits = __ldg(reinterpret_cast<const Bits*>(address));
    return both.vector;
}

template <class T>
__device__ __forceinline__ T load_one(const T* address) {
    return load_vector<1>(address).element[0];
}

template <int Width, class T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, Width>& values) {
    using Bits = typename Word<sizeof(T) * Width>::Type;
    union {
        Vector<T, Width> vector;
        Bits bits;
    } both = {values};
    *reinterpret_cast<Bits*>(address) = both.bits;
}

// Sums as elements, each rounded once.
template <class T, int Width, class Sum>
__device__ __forceinline__ Vector<T, Width> rounded(const Sum* sums) {
    Vector<T, Width> values;
    if constexpr (sizeof(T) == 2 && Width % 2 == 0) {
        union {
            unsigned pairs[Width / 2];
            Vector<T, Width> vector;
        } both;
#pragma unroll
        for (int k = 0; k < Width / 2; ++k) both.pairs[k] = rounded_pair<T>(sums[2 * k], sums[2 * k + 1]);
        values = both.vector;
    } else {
#pragma unroll
        for (int k = 0; k < Width; ++k) values.element[k] = static_cast<T>(sums[k]);
    }
    return values;
}

// A value of another lane of the warp; all lanes must call it. Lanes count within groups of `width`.
template <class T>
__device__ __forceinline__ T shuffled(T value, int lane, int width) {
    if constexpr (sizeof(T) == 2) {
        value.bits =
            static_cast<unsigned short>(__shfl_sync(0xffffffffu, static_cast<unsigned>(value.bits), lane, width));
        return value;
    } else {
        return __shfl_sync(0xffffffffu, value, lane, width);
    }
}

// Reads four elements of shared memory; their address must be a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void load_shared_4(const T* address, T* into) {
    constexpr int kWidth = 16 / sizeof(T);
#pragma unroll
    for (int k = 0; k < 4; k += kWidth) {
        const Vector<T, kWidth> values = *reinterpret_cast<const Vector<T, kWidth>*>(address + k);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) into[k + e] = values.element[e];
    }
}

// Keeps a value in a register that the compiler would rather find again in each iteration.
template <class T>
__device__ __forceinline__ void keep(T& value) {
    static_assert(sizeof(T) == 4, "a register has 32 bits");
#ifndef DWCONV_EMULATOR
    asm volatile("" : "+r"(value));
#endif
}

#ifndef DWCONV_EMULATOR  // the emulator has its own: a buffer of exactly the size asked for, poisoned
// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(16) unsigned char dwconv_shared[];
    return reinterpret_cast<T*>(dwconv_shared);
}
#endif

// Division of numbers below 2^31 by a divisor known before the launch: one multiplication and a shift.
//   quotient(n) = n * multiplier / 2^shift, exact for n < 2^31      (plan.py computes multiplier and shift)
struct FastDivisor {
    unsigned divisor, multiplier, shift;

    __device__ __forceinline__ unsigned quotient(unsigned n) const {
        return static_cast<unsigned>((static_cast<unsigned long long>(n) * multiplier) >> shift);
    }
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
// Does a filter of so many taps, `dilation` apart, have one at this distance from its first?
__host__ __device__ constexpr bool is_tap(int distance, int dilation, int taps) {
    return distance >= 0 && distance % dilation == 0 && distance < taps * dilation;
}
// floor(a / b) for b > 0, also where a is negative
__host__ __device__ constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Where tap `number` of a filter stands in memory; numbers may count on through the filters behind it. Gradients of x
// are sums with reversed filters.
template <class C>
__host__ __device__ constexpr int tap_at(int number) {
    constexpr int kTaps = C::kFilterD * C::kFilterH * C::kFilterW;
    return C::kReversed ? number / kTaps * kTaps + (kTaps - 1 - number % kTaps) : number;
}

}  // namespace dwconv
