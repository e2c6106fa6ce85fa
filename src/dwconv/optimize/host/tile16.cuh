// Launch of tile16: column tiles, row tiles and planes in three dimensions, the last two folded to the grid's limits.
namespace dwconv {

template <class C>
Launch<Tile16Tiling> tile16_launch(const Sizes& sizes, const void* /* x */) {
    Launch<Tile16Tiling> launch;
    launch.tiling.row_tiles = static_cast<unsigned>(strips(sizes.out_h, 16));
    launch.grid = dim3(static_cast<unsigned>(strips(sizes.out_w, 16)), folded(launch.tiling.row_tiles, 65535),
                       folded(sizes.planes, 65535));
    launch.block = dim3(16, 16);
    return launch;
}

}  // namespace dwconv
