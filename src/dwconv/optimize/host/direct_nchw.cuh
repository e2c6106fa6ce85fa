// Launch of direct_nchw: what variants/direct_nchw.py computes for one problem, for any contiguous x.
namespace dwconv {

template <class C>
Launch<DirectNchwTiling> direct_nchw_launch(const Sizes& sizes, const void* x) {
    using Columns = DirectColumns<C>;
    const long long lane_outputs = C::kSlots * C::kVector;
    // Lanes of a group, as few as load the halo or more: as many as a row needs, or few idle ones and few halos.
    const int left = larger(0, -Columns::kFirst), right = larger(0, Columns::kLast - Columns::kOwn + 1);
    const int least = C::kWholeWindow ? ceil_div(left, Columns::kOwn) + ceil_div(right, Columns::kOwn) : 1;
    const long long width = C::kWholeRows && strips(sizes.in_w - C::kColumnShift, C::kStrideW) > sizes.out_w
                                ? strips(sizes.in_w - C::kColumnShift, C::kStrideW)
                                : sizes.out_w;
    const auto cost = [&](int log2) {
        const long long strip = lane_outputs << log2;
        if (C::kWholeRows && strips(width, strip) > 1) return 1ll << 62;
        return strips(width, strip) * (strip + 4);
    };
    int log2_lanes = 5;
    for (int fewer = 4; fewer >= 0 && 1 << fewer >= least; --fewer)
        if (cost(fewer) < cost(log2_lanes)) log2_lanes = fewer;

    const long long row_strips = strips(sizes.out_h, C::kRows);
    const long long column_strips = strips(sizes.out_w, lane_outputs << log2_lanes);
    const long long groups = sizes.planes * row_strips * column_strips;
    const long long blocks = strips(groups << log2_lanes, C::kThreads);
    const long long owned = C::kColumnShift + (static_cast<long long>(C::kSlots * Columns::kOwn) << log2_lanes);
    Launch<DirectNchwTiling> launch;
    launch.tiling.row_strips = fast_divisor(row_strips);
    launch.tiling.column_strips = fast_divisor(column_strips);
    launch.tiling.out_channels = fast_divisor(sizes.out_channels);
    launch.tiling.groups = static_cast<unsigned>(groups);
    launch.tiling.log2_lanes = static_cast<unsigned>(log2_lanes);
    launch.grid = dim3(static_cast<unsigned>(blocks > 0 ? blocks : 1));
    launch.block = dim3(C::kThreads);
    launch.possible = groups << log2_lanes <= 0x7fffffffll - C::kThreads &&
                      is_aligned(x, sizeof(typename C::Element) * C::kLoadVector) && sizes.in_w % C::kLoadVector == 0 &&
                      sizes.out_w % C::kStoreVector == 0 &&
                      (!C::kWholeRows || (owned >= sizes.in_w && column_strips == 1));
    return launch;
}

}  // namespace dwconv
