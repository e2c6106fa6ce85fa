// filter_gradients.cuh: what kernels of the gradients of filters and bias share: their arguments, and how the sums of
// many threads and blocks become one, in an order that is the same on every run
//   dw[c*M + j, u] = sum over images n and outputs p of g[n, c*M + j, p] * x[n, c, p*S - P + u*D]
//   db[c*M + j]    = sum over images n and outputs p of g[n, c*M + j, p]
#pragma once
#include "common.cuh"

namespace dwconv {

// g is dense in the layout of x; db is null where it isn't wanted.
template <class T>
struct FilterGradients {
    const T *x, *g;
    T *dw, *db;
    void* partial;       // sums of blocks, in the type they are summed in
    unsigned* arrivals;  // zeros; zeros again after the launch
};

// Whether this block is the last of `parts` that call this with the same counter; all threads must call it. What the
// others wrote before is visible to the last one, and the counter is zero again.
__device__ __forceinline__ bool arrives_last(unsigned* counter, unsigned parts, int* shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *shared = atomicAdd(counter, 1u) == parts - 1;
        if (*shared) *counter = 0;
    }
    __syncthreads();
    const bool last = *shared;
    if (last) __threadfence();
    return last;
}

}  // namespace dwconv
