// ---- launches: from the sizes of a call to its grid, on the host ----
#include <cuda_runtime.h>

namespace dwconv {

// A launch of one variant's kernel.
template <class Tiling>
struct Launch {
    Tiling tiling;
    dim3 grid, block;
    unsigned shared_bytes = 0;
    bool possible = true;  // false where the kernel was not made for such sizes or such an address of x
};

static inline long long strips(long long length, long long strip) { return (length + strip - 1) / strip; }

static inline unsigned folded(long long wanted, long long most) {
    return static_cast<unsigned>(wanted < 1 ? 1 : wanted > most ? most : wanted);
}

static inline bool is_aligned(const void* address, unsigned long long bytes) {
    return reinterpret_cast<unsigned long long>(address) % bytes == 0;
}

// More than 48 KiB of shared memory must be asked for. False: a block of this card can't have so much.
template <class Kernel>
bool may_share(Kernel* kernel, unsigned bytes) {
    if (bytes <= 48 * 1024) return true;
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaFuncSetAttribute(kernel, most, static_cast<int>(bytes)) == cudaSuccess) return true;
    cudaGetLastError();  // so that the next check doesn't report it
    return false;
}

// multiplier = ceil(2^shift / divisor), shift = 31 + ceil(log2 divisor): exact for all numbers below 2^31
static inline FastDivisor fast_divisor(long long divisor) {
    unsigned shift = 31;
    while (1ll << (shift - 31) < divisor) ++shift;
    return {static_cast<unsigned>(divisor), static_cast<unsigned>(((1ll << shift) + divisor - 1) / divisor), shift};
}

}  // namespace dwconv
