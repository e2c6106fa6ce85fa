// row_cells.cuh: what a thread reads of one row, channels first: aligned cells that wait in registers as they lie in
// memory
#pragma once
#include "common.cuh"

namespace dwconv {

// The columns of x that one slot's outputs read, numbered from the slot's first output column * kStrideW: kFirst ...
// kLast. They are loaded in cells of kLoadVector columns, each by one instruction, of the outermost cells a piece if
// that is all that is read. A cell lies in a row wholly or not at all: W and kVector * kStrideW are multiples of
// kLoadVector.
template <class C>
struct ReadColumns {
    static constexpr int kCell = C::kLoadVector;
    static constexpr int kFirst = -C::kPadLeft;
    static constexpr int kLast = kFirst + (C::kVector - 1) * C::kStrideW + (C::kFilterW - 1) * C::kDilationW;
    static constexpr int kSpan = kLast - kFirst + 1;
    static constexpr int kStart = floor_div(kFirst, kCell) * kCell;
    static constexpr int kCells = floor_div(kLast, kCell) - kStart / kCell + 1;

    // The least power of two that holds so many columns.
    __host__ __device__ static constexpr int piece(int columns) {
        int width = 1;
        while (width < columns) width *= 2;
        return width;
    }
    static constexpr int kLeft = kCells == 1 ? kCell : piece(kStart + kCell - kFirst);                     // first cell
    static constexpr int kRight = kCells == 1 ? kCell : piece(kLast + 1 - kStart - (kCells - 1) * kCell);  // last cell

    // Does any output read column kFirst + k? (Not all are read where dilation or stride leave gaps.)
    __host__ __device__ static constexpr bool reads(int k) {
        for (int o = 0; o < C::kVector; ++o)
            if (is_tap(k - o * C::kStrideW, C::kDilationW, C::kFilterW)) return true;
        return false;
    }
    __host__ __device__ static constexpr bool reads_cell(int c) {
        for (int k = 0; k < kCell; ++k)
            if (reads(kStart + c * kCell + k - kFirst)) return true;
        return false;
    }
};

// What one slot reads of one row of x, as it lies in memory; zeros outside of the image. Elements are converted when
// they are used: those of 16 bits take half a register until then, where they are loaded in pairs.
// Shared: where they wait in shared memory, else in global memory.
template <class C, bool Shared = false>
struct SlotRow {
    using T = typename C::Element;
    using Columns = ReadColumns<C>;
    static constexpr int kCell = Columns::kCell;
    static constexpr bool kSingle = sizeof(T) == 2 && kCell == 1;  // one element of 16 bits in each word
    unsigned words[Columns::kCells][kSingle ? 1 : kCell * sizeof(T) / 4];

    template <int Width, class Bits>
    static __device__ __forceinline__ Vector<Bits, Width> read(const Bits* address) {
        if constexpr (Shared)
            return *reinterpret_cast<const Vector<Bits, Width>*>(address);
        else
            return load_vector<Width>(address);
    }

    // Loads Width columns of a cell, from column `from` of it on.
    template <int Width>
    __device__ __forceinline__ void load_piece(const T* address, bool inside, int cell, int from) {
        unsigned* into = &words[cell][from * sizeof(T) / 4];
        if constexpr (Width * sizeof(T) == 2) {  // into the lower half of its word
            *into = 0;
            if (inside) *into = read<1>(reinterpret_cast<const unsigned short*>(address + from)).element[0];
            keep_packed(*into);
        } else {
            Vector<unsigned, Width * sizeof(T) / 4> piece = {};
            if (inside) piece = read<Width * sizeof(T) / 4>(reinterpret_cast<const unsigned*>(address + from));
#pragma unroll
            for (int k = 0; k < static_cast<int>(Width * sizeof(T) / 4); ++k) {
                into[k] = piece.element[k];
                if constexpr (sizeof(T) != 4) keep_packed(into[k]);
            }
        }
    }

    // Keeps the compiler from converting an element right where it is loaded, which waits for it before the next load
    // is issued (bfloat16, 4 rows of 8 columns: 0.73 of a copy's speed instead of 0.89, H200, 2026-11).
    static __device__ __forceinline__ void keep_packed(unsigned& word) {
#ifndef DWCONV_EMULATOR
        asm("" : "+r"(word));
#endif
    }

    // `address` is that of column number `column`, the slot's first output column * kStrideW.
    __device__ __forceinline__ void load(const T* address, bool row_inside, int column, int in_w) {
#pragma unroll
        for (int c = 0; c < Columns::kCells; ++c) {
            if (!Columns::reads_cell(c)) continue;
            const int start = Columns::kStart + c * kCell;
            const bool inside = row_inside && static_cast<unsigned>(column + start) < static_cast<unsigned>(in_w);
            if (c == 0)
                load_piece<Columns::kLeft>(address + start, inside, c, kCell - Columns::kLeft);
            else if (c == Columns::kCells - 1)
                load_piece<Columns::kRight>(address + start, inside, c, 0);
            else
                load_piece<kCell>(address + start, inside, c, 0);
        }
    }

    // Column Columns::kFirst + k.
    template <class Sum>
    __device__ __forceinline__ Sum column(int k) const {
        const int at = Columns::kFirst - Columns::kStart + k, cell = at / kCell, place = at % kCell;
        if constexpr (sizeof(T) == 2) {
            const bool upper = !kSingle && place % 2 && !(Columns::kLeft == 1 && cell == 0);
            return read_element<T>(words[cell][place / 2], upper);
        } else {
            union {
                unsigned bits[sizeof(T) / 4];
                T element;
            } both;
#pragma unroll
            for (int k = 0; k < static_cast<int>(sizeof(T) / 4); ++k)
                both.bits[k] = words[cell][place * sizeof(T) / 4 + k];
            return static_cast<Sum>(both.element);
        }
    }
};

}  // namespace dwconv
