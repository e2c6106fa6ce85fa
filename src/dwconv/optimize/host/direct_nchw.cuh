// Launch of direct_nchw: what variants/direct_nchw.py computes for one problem, for any contiguous x.
namespace dwconv {

template <class C>
Launch<DirectNchwTiling> direct_nchw_launch(const Sizes& sizes, const void* x) {
    using Columns = StripColumns<C>;
    const int left = larger(0, -Columns::kFirst), right = larger(0, Columns::kLast - Columns::kOwn + 1);
    const int least = C::kWholeWindow ? ceil_div(left, Columns::kOwn) + ceil_div(right, Columns::kOwn) : 1;
    const long long row = C::kWholeRows ? strips(sizes.in_w - C::kColumnShift, C::kStrideW) : 0;
    const long long width = row > sizes.out_w ? row : sizes.out_w;
    const int log2_lanes = lanes_of(width, C::kSlots * C::kVector, least, C::kWholeRows);

    Launch<DirectNchwTiling> launch;
    launch.tiling.strips = strip_tiling<C>(sizes, log2_lanes);
    launch.grid = dim3(strip_blocks<C>(launch.tiling.strips));
    launch.block = dim3(C::kThreads);
    launch.possible =
        strips_fit<C>(sizes, launch.tiling.strips, x) && (!C::kWholeRows || width <= 32ll * C::kSlots * C::kVector);
    return launch;
}

}  // namespace dwconv
