// Strips: what variants/strips.py computes, for kernels whose groups of lanes own strips of columns.
namespace dwconv {

// Lanes of a group (their log2), as few as load the halo or more: as many as a row needs, or few idle ones and few
// halos.
static inline int lanes_of(long long width, long long lane_outputs, int least, bool whole_rows) {
    const auto cost = [&](int log2) {
        const long long strip = lane_outputs << log2;
        if (whole_rows && strips(width, strip) > 1) return 1ll << 62;
        return strips(width, strip) * (strip + 4);
    };
    int log2_lanes = 5;
    for (int fewer = 4; fewer >= 0 && 1 << fewer >= least; --fewer)
        if (cost(fewer) < cost(log2_lanes)) log2_lanes = fewer;
    return log2_lanes;
}

template <class C>
StripTiling strip_tiling(const Sizes& sizes, int log2_lanes) {
    const long long row_strips = strips(sizes.out_h, C::kRows);
    const long long column_strips = strips(sizes.out_w, static_cast<long long>(C::kSlots * C::kVector) << log2_lanes);
    return {fast_divisor(row_strips), fast_divisor(column_strips), fast_divisor(sizes.out_channels),
            static_cast<unsigned>(sizes.planes * row_strips * column_strips), static_cast<unsigned>(log2_lanes)};
}

template <class C>
unsigned strip_blocks(const StripTiling& tiling) {
    const long long blocks = strips(static_cast<long long>(tiling.groups) << tiling.log2_lanes, C::kThreads);
    return static_cast<unsigned>(blocks > 0 ? blocks : 1);
}

// Whether threads, rows and columns can be numbered in 31 bits, with room for the last strip to reach past them, and
// vectors stand at addresses that are multiples of their size.
template <class C>
bool strips_fit(const Sizes& sizes, const StripTiling& tiling, const void* x) {
    const long long groups = sizes.planes * tiling.row_strips.divisor * tiling.column_strips.divisor;
    const long long most = 0x7ffe0000ll - C::kPadTop - C::kPadLeft;
    const bool short_enough = sizes.in_h < most && sizes.in_w < most && sizes.out_h < most && sizes.out_w < most;
    return short_enough && groups << tiling.log2_lanes <= 0x7fffffffll - C::kThreads &&
           is_aligned(x, sizeof(typename C::Element) * C::kLoadVector) && sizes.in_w % C::kLoadVector == 0 &&
           sizes.out_w % C::kStoreVector == 0;
}

}  // namespace dwconv
