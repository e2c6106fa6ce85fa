// Launch of direct_nchw: what variants/direct_nchw.py computes for one problem, for any contiguous x.
namespace dwconv {

template <class C>
Launch<DirectNchwTiling> direct_nchw_launch(const Sizes& sizes, const void* x) {
    // As few idle threads as possible; narrow strips where rows are shared.
    const long long in_all = strips(sizes.out_w, C::kSlots * C::kVector);
    const long long column_strips = strips(in_all, C::kFilterH > 1 ? 32 : 128);
    const long long lanes = strips(in_all, column_strips);
    const long long row_strips = strips(sizes.out_h, C::kRows);
    const long long all = sizes.planes * column_strips * row_strips;
    const long long blocks = strips(all * lanes, C::kThreads);

    Launch<DirectNchwTiling> launch;
    launch.tiling = {fast_divisor(lanes), fast_divisor(row_strips), fast_divisor(column_strips),
                     fast_divisor(sizes.out_channels), static_cast<unsigned>(all)};
    launch.grid = dim3(static_cast<unsigned>(blocks > 0 ? blocks : 1));
    launch.block = dim3(C::kThreads);
    const long long beyond = (lanes * C::kSlots * C::kVector + C::kRows) * larger(C::kStrideH, C::kStrideW);
    const long long most = 0x7fff0000ll - beyond - C::kPadTop - C::kPadLeft;
    launch.possible = sizes.in_h < most && sizes.in_w < most && sizes.out_h < most && sizes.out_w < most &&
                      all * lanes <= 0x7fffffffll - C::kThreads &&
                      is_aligned(x, sizeof(typename C::Element) * C::kLoadVector) && sizes.in_w % C::kLoadVector == 0 &&
                      sizes.out_w % C::kStoreVector == 0 && (!(C::kWarpLoads || C::kWarpStores) || lanes == 32);
    return launch;
}

}  // namespace dwconv
