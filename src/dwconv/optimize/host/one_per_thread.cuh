// Launch of one_per_thread: a thread per output, at most as many blocks as grid.x takes.
namespace dwconv {

template <class C>
Launch<OnePerThreadTiling> one_per_thread_launch(const Sizes& sizes, const void* /* x */) {
    Launch<OnePerThreadTiling> launch;
    launch.tiling.blocks = folded(strips(sizes.planes * sizes.out_h * sizes.out_w, C::kThreads), 0x7fffffff);
    launch.grid = dim3(launch.tiling.blocks);
    launch.block = dim3(C::kThreads);
    return launch;
}

}  // namespace dwconv
