// phases.cuh: where the taps of a strided filter meet the gradient of its result, along one dimension
//   dx[t*S + r] = sum over the taps u with remainder(u) = r of w[u] * g[t + offset(u)]     r = 0 ... S-1: the phases
//   Each phase is a convolution of g with a stride of 1; every tap belongs to exactly one of them.
#pragma once
#include "common.cuh"

namespace dwconv {

template <int Stride, int Pad, int Dilation, int Taps>
struct Phases {
    // u*D + q*S = P + t*S + r asks for q - t = ceil((P - u*D) / S)
    __host__ __device__ static constexpr int offset(int tap) { return -floor_div(tap * Dilation - Pad, Stride); }
    __host__ __device__ static constexpr int remainder(int tap) {
        return offset(tap) * Stride - (Pad - tap * Dilation);
    }
    static constexpr int kFirst = -floor_div((Taps - 1) * Dilation - Pad, Stride);
    static constexpr int kLast = -floor_div(-Pad, Stride);
    static constexpr int kSpan = kLast - kFirst + 1;  // elements of g that one t reaches over

    // Does any of `count` neighbouring t read element k of g, counted from the first t + kFirst?
    __host__ __device__ static constexpr bool reads(int k, int count) {
        for (int t = 0; t < count; ++t)
            for (int u = 0; u < Taps; ++u)
                if (t + offset(u) - kFirst == k) return true;
        return false;
    }
};

template <class C>
using RowPhases = Phases<C::kStrideH, C::kPadTop, C::kDilationH, C::kFilterH>;
template <class C>
using ColumnPhases = Phases<C::kStrideW, C::kPadLeft, C::kDilationW, C::kFilterW>;

}  // namespace dwconv
