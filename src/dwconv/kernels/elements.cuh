// elements.cuh: the 16-bit element types, without CUDA's headers: a type of 2 bytes and its conversions
//   float(e) is exact; T(f) rounds to nearest, ties to even. An Inf stays Inf, a NaN stays NaN.
#pragma once

namespace dwconv {

#ifndef DWCONV_EMULATOR  // the emulator has its own conversions, in C++
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ __forceinline__ float bfloat16_to_float(unsigned short bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
__device__ __forceinline__ unsigned short float_to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const unsigned bits = __float_as_uint(value);
    if (value != value) return static_cast<unsigned short>(bits >> 16 | 0x40);  // a NaN must not round to an Inf
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

struct Half {
    unsigned short bits;
    Half() = default;
    __device__ __forceinline__ explicit Half(float value) : bits(float_to_half(value)) {}
    __device__ __forceinline__ explicit operator float() const { return half_to_float(bits); }
};

struct BFloat16 {
    unsigned short bits;
    BFloat16() = default;
    __device__ __forceinline__ explicit BFloat16(float value) : bits(float_to_bfloat16(value)) {}
    __device__ __forceinline__ explicit operator float() const { return bfloat16_to_float(bits); }
};

// A number in a register of its own: compilers would rather convert it again from what holds it wherever it is used.
__device__ __forceinline__ float held(float value) {
#ifndef DWCONV_EMULATOR
    asm volatile("" : "+f"(value));
#endif
    return value;
}

// One of the two elements that 4 bytes of memory hold; the first is the lower half.
template <class T>
__device__ __forceinline__ float read_element(unsigned pair, bool upper) {
    T element;
    element.bits = static_cast<unsigned short>(pair >> (upper ? 16 : 0));
    return static_cast<float>(element);
}

// Both of them.
template <class T>
__device__ __forceinline__ void read_pair(unsigned pair, float& first, float& second) {
    first = read_element<T>(pair, false);
    second = read_element<T>(pair, true);
}
template <>
__device__ __forceinline__ void read_pair<BFloat16>(unsigned pair, float& first, float& second) {
    first = held(__uint_as_float(pair << 16));
    second = held(__uint_as_float(pair & 0xffff0000u));
}

// Two sums, rounded, as the 4 bytes they take in memory; the first in the lower half.
template <class T>
__device__ __forceinline__ unsigned rounded_pair(float first, float second) {
    return static_cast<unsigned>(T(second).bits) << 16 | T(first).bits;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // one instruction instead of three
template <>
__device__ __forceinline__ unsigned rounded_pair<Half>(float first, float second) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
template <>
__device__ __forceinline__ unsigned rounded_pair<BFloat16>(float first, float second) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
#endif

}  // namespace dwconv
