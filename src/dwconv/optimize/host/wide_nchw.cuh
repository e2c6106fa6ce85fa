// Launch of wide_nchw: what variants/wide_nchw.py computes for one problem, for any contiguous x.
namespace dwconv {

template <class C>
Launch<WideNchwTiling> wide_nchw_launch(const Sizes& sizes, const void* x) {
    using Columns = StripColumns<C>;
    const int left = larger(0, -Columns::kFirst), right = larger(0, Columns::kLast - Columns::kOwn + 1);
    const int least = C::kWholeRows ? 1 : ceil_div(left, Columns::kOwn) + ceil_div(right, Columns::kOwn);
    const long long row = C::kWholeRows ? strips(sizes.in_w, C::kStrideW) : 0;
    const long long width = row > sizes.out_w ? row : sizes.out_w;
    int log2_lanes = lanes_of(width, C::kVector, least, C::kWholeRows);

    Launch<WideNchwTiling> launch;
    constexpr unsigned kFilterBytes = WideFilter<C>::kTaps * sizeof(typename Accumulator<typename C::Element>::Type);
    for (;; ++log2_lanes) {  // more lanes mean fewer groups in a block, and so fewer filters
        launch.tiling.strips = strip_tiling<C>(sizes, log2_lanes);
        const long long groups = C::kThreads >> log2_lanes;
        const long long of_plane = static_cast<long long>(launch.tiling.strips.row_strips.divisor) *
                                   launch.tiling.strips.column_strips.divisor;
        const long long planes = strips(groups - 1, of_plane) + 1;
        launch.tiling.block_planes = static_cast<unsigned>(planes < groups ? planes : groups);
        launch.shared_bytes = launch.tiling.block_planes * kFilterBytes;
        if (launch.shared_bytes <= 48 * 1024 || log2_lanes == 5) break;
    }
    launch.grid = dim3(strip_blocks<C>(launch.tiling.strips));
    launch.block = dim3(C::kThreads);
    launch.possible = launch.shared_bytes <= 48 * 1024 && strips_fit<C>(sizes, launch.tiling.strips, x) &&
                      (!C::kWholeRows || width <= 32 * C::kVector);
    return launch;
}

}  // namespace dwconv
