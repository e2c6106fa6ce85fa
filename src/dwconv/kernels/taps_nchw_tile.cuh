// taps_nchw_tile.cuh: what a thread does with a tile of outputs: products of g in registers with rows of x
//   sums[a][b] += sum over i < kRows, j < kColumns of g[i][j] * x[i*SH + a*DH][j*SW + b*DW]
//   a < kTapRows, b < kTapColumns: all taps of the filter, or a tile of them
#pragma once
#include "common.cuh"

namespace dwconv {

// Which rows and columns of x the tile reads, numbered from the first; and which of them may lie in the padding.
template <class C>
struct TapsNchwWindow {
    static constexpr bool kTapTilesH = C::kTapRows < C::kFilterH, kTapTilesW = C::kTapColumns < C::kFilterW;
    static constexpr int kHeight = (C::kRows - 1) * C::kStrideH + (C::kTapRows - 1) * C::kDilationH + 1;
    static constexpr int kWidth = (C::kColumns - 1) * C::kStrideW + (C::kTapColumns - 1) * C::kDilationW + 1;
    // Columns are read kReadX at a time, from so many before the first on.
    static constexpr int kPhase = (C::kReadX - C::kPadLeft % C::kReadX) % C::kReadX;

    // A tile of whole rows, or columns, always reaches over both sides in the same way: what is padding is left out.
    __host__ __device__ static constexpr bool reads_row(int r) {
        if (C::kWholeHeight && (r < C::kPadTop || r >= kHeight - C::kBottomReach)) return false;
        for (int i = 0; i < C::kRows; ++i)
            if (is_tap(r - i * C::kStrideH, C::kDilationH, C::kTapRows)) return true;
        return false;
    }
    __host__ __device__ static constexpr bool reads_column(int k) {
        if (k < 0 || k >= kWidth) return false;
        if (C::kWholeWidth && (k < C::kPadLeft || k >= kWidth - C::kRightReach)) return false;
        for (int j = 0; j < C::kColumns; ++j)
            if (is_tap(k - j * C::kStrideW, C::kDilationW, C::kTapColumns)) return true;
        return false;
    }
    __host__ __device__ static constexpr bool reads_piece(int from) {
        for (int k = from; k < from + C::kReadX; ++k)
            if (reads_column(k)) return true;
        return false;
    }
    // Tiles lie inside the output, so that only the first and last rows and columns of a window can be padding.
    __host__ __device__ static constexpr bool row_may_miss(int r) {
        return kTapTilesH || (!C::kWholeHeight && (r < C::kPadTop || r >= kHeight - C::kBottomReach));
    }
    __host__ __device__ static constexpr bool column_may_miss(int k) {
        return kTapTilesW || (!C::kWholeWidth && (k < C::kPadLeft || k >= kWidth - C::kRightReach));
    }
};

// All bits set for columns of the window that are inside of the image, none for those of the padding.
template <class C>
struct TapsNchwMasks {
    using Window = TapsNchwWindow<C>;
    unsigned bits[Window::kWidth];

    __device__ __forceinline__ TapsNchwMasks(int first, int in_w) {
#pragma unroll
        for (int k = 0; k < Window::kWidth; ++k) {
            int column = first + k;
            if constexpr (!Window::kTapTilesW &&
                          C::kEvenColumns) {  // one mask a side: only outermost tiles reach over it
                constexpr int kBetween = C::kColumns * C::kStrideW;
                if (k < C::kPadLeft && k < Window::kWidth - C::kRightReach && kBetween >= C::kPadLeft)
                    column = first;
                else if (k >= C::kPadLeft && k >= Window::kWidth - C::kRightReach && kBetween >= C::kRightReach)
                    column = first + Window::kWidth - 1;
            }
            bits[k] = static_cast<unsigned>(column) < static_cast<unsigned>(in_w) ? ~0u : 0u;
        }
    }
};

__device__ __forceinline__ float masked(float value, unsigned mask) {
    return __uint_as_float(__float_as_uint(value) & mask);
}
__device__ __forceinline__ double masked(double value, unsigned mask) { return mask ? value : 0.0; }

// Reads Width elements of shared memory, a power of two, aligned to their size.
template <int Width, class T, class Sum>
__device__ __forceinline__ void read_elements(const T* from, Sum* into) {
    const auto values = *reinterpret_cast<const Vector<T, Width>*>(from);
#pragma unroll
    for (int k = 0; k < Width; ++k) into[k] = static_cast<Sum>(values.element[k]);
}

// x: the window's first element in shared memory, where row `first_row` of the image stands; it may lie outside.
// g: the tile. Its first missing_rows rows and missing_columns columns belong to another tile.
template <class C, class T, class Sum>
__device__ __forceinline__ void add_tile(const T* shared, int x, int x_pitch, int first_row, int in_h,
                                         const TapsNchwMasks<C>& masks, int g, int g_pitch, int missing_rows,
                                         int missing_columns, Sum (&sums)[C::kTapRows][C::kTapColumns], Sum& bias) {
    using Window = TapsNchwWindow<C>;
    Sum grads[C::kRows][C::kColumns];
#pragma unroll
    for (int r = 0; r < Window::kHeight; ++r) {
        if (r % C::kStrideH == 0 && r / C::kStrideH < C::kRows) {
            const int i = r / C::kStrideH;
#pragma unroll
            for (int j = 0; j < C::kColumns; j += C::kReadG) read_elements<C::kReadG>(shared + g + j, &grads[i][j]);
            if constexpr (!C::kEvenColumns)
#pragma unroll
                for (int j = 0; j < C::kColumns - 1; ++j) grads[i][j] = j >= missing_columns ? grads[i][j] : Sum(0);
            if constexpr (!C::kEvenRows)
                if (i < missing_rows)
#pragma unroll
                    for (int j = 0; j < C::kColumns; ++j) grads[i][j] = Sum(0);
            if constexpr (C::kHasBias)
#pragma unroll
                for (int j = 0; j < C::kColumns; ++j) bias += grads[i][j];
            g += g_pitch;
        }
        if (Window::reads_row(r) &&
            (!Window::row_may_miss(r) || static_cast<unsigned>(first_row + r) < static_cast<unsigned>(in_h))) {
#pragma unroll
            for (int from = -Window::kPhase; from < Window::kWidth; from += C::kReadX) {
                if (!Window::reads_piece(from)) continue;
                Sum window[C::kReadX];
                read_elements<C::kReadX>(shared + x + from, window);
#pragma unroll
                for (int e = 0; e < C::kReadX; ++e) {
                    const int k = from + e;
                    if (!Window::reads_column(k)) continue;
                    if (Window::column_may_miss(k)) window[e] = masked(window[e], masks.bits[k]);
#pragma unroll
                    for (int i = 0; i < C::kRows; ++i) {
                        const int below = r - i * C::kStrideH;
                        if (!is_tap(below, C::kDilationH, C::kTapRows)) continue;
#pragma unroll
                        for (int j = 0; j < C::kColumns; ++j) {
                            const int right = k - j * C::kStrideW;
                            if (is_tap(right, C::kDilationW, C::kTapColumns))
                                sums[below / C::kDilationH][right / C::kDilationW] += grads[i][j] * window[e];
                        }
                    }
                }
            }
        }
        x += x_pitch;
    }
}

}  // namespace dwconv
