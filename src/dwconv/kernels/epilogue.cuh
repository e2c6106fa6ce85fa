// epilogue.cuh: what happens to a sum before it is stored, all in the type that it was summed in
//   y = scale[c] * activation(sum) + shift[c] + residual     (the sum holds the bias already)
#pragma once
#include "common.cuh"

namespace dwconv {

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }
__device__ __forceinline__ float complementary_error(float v) { return erfcf(v); }
__device__ __forceinline__ double complementary_error(double v) { return erfc(v); }

// Numbers as in problem.py's ACTIVATIONS. Comparisons are written so that a NaN stays a NaN.
template <int Activation, class Sum>
__device__ __forceinline__ Sum activated(Sum v) {
    static_assert(Activation >= 0 && Activation <= 8, "Activation must be one of problem.py's");
    if constexpr (Activation == 1) return v < Sum(0) ? Sum(0) : v;                        // relu
    if constexpr (Activation == 2) return v < Sum(0) ? Sum(0) : v > Sum(6) ? Sum(6) : v;  // relu6
    if constexpr (Activation == 3) return v / (Sum(1) + exponential(-v));                 // silu
    if constexpr (Activation == 4)                                                        // gelu
        return Sum(0.5) * v * complementary_error(v * Sum(-0.70710678118654752440));
    if constexpr (Activation == 5) {  // gelu_tanh: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which doesn't cancel
        const Sum u = v * (Sum(1.5957691216057307117) + Sum(0.07135481627260025) * v * v);
        return v / (Sum(1) + exponential(-u));
    }
    if constexpr (Activation == 6) {  // hardswish
        const Sum gate = v + Sum(3);
        return v * (gate < Sum(0) ? Sum(0) : gate > Sum(6) ? Sum(6) : gate) / Sum(6);
    }
    if constexpr (Activation == 7) return Sum(1) / (Sum(1) + exponential(-v));  // sigmoid
    if constexpr (Activation == 8) return v < Sum(0) ? v * Sum(0.01) : v;       // leaky_relu
    return v;
}

// What the epilogue knows of one channel.
template <class Sum>
struct ChannelValues {
    Sum scale, shift;
};

template <class C>
__device__ __forceinline__ auto channel_values(const Tensors<typename C::Element>& tensors, long long channel) {
    using Sum = typename Accumulator<typename C::Element>::Type;
    ChannelValues<Sum> values = {Sum(1), Sum(0)};
    if constexpr (C::kHasScale) values.scale = static_cast<Sum>(load_one(tensors.scale + channel));
    if constexpr (C::kHasShift) values.shift = static_cast<Sum>(load_one(tensors.shift + channel));
    return values;
}

template <class C, class Sum>
__device__ __forceinline__ Sum finished(Sum sum, const ChannelValues<Sum>& values, typename C::Element residual) {
    Sum v = activated<C::kActivation>(sum);
    if constexpr (C::kHasScale) v *= values.scale;
    if constexpr (C::kHasShift) v += values.shift;
    if constexpr (C::kHasResidual) v += static_cast<Sum>(residual);
    return v;
}

// Stores Width outputs that are neighbours in memory, from offset `at` of y on; the residual stands at the same offset.
// ValuesStep is 0 where they are of one channel (channels first), 1 where they are of neighbouring ones.
template <class C, int Width, int ValuesStep, class Sum>
__device__ __forceinline__ void store_outputs(const Tensors<typename C::Element>& tensors, long long at,
                                              const Sum* sums, const ChannelValues<Sum>* values) {
    using T = typename C::Element;
    Vector<T, Width> residual = {};
    if constexpr (C::kHasResidual) residual = load_vector<Width>(tensors.residual + at);
    Sum out[Width];
#pragma unroll
    for (int k = 0; k < Width; ++k) out[k] = finished<C>(sums[k], values[k * ValuesStep], residual.element[k]);
    store_vector(tensors.y + at, rounded<T, Width>(out));
}

}  // namespace dwconv
