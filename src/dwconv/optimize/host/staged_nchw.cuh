// Launch of staged_nchw: what variants/staged_nchw.py computes for one problem (cut and place there), for contiguous x.
namespace dwconv {

static inline long long raised(long long a, long long multiple, long long remainder = 0) {
    return a + ((remainder - a) % multiple + multiple) % multiple;
}

static inline ShortDivisor short_divisor(long long divisor) {
    return {static_cast<unsigned>(divisor), static_cast<unsigned>(strips(1ll << 31, divisor))};
}

template <class C>
struct StagedLaunch {
    using T = typename C::Element;
    using Sum = typename Accumulator<T>::Type;
    static constexpr int kVector = 16 / sizeof(T);
    Sizes sizes;
    long long in_planes, column_tiles, row_tiles;
    long long planes, rows, columns, item_rows, item_columns, row_items, column_items;
    long long lines, line_units, pitch, plane_pitch, image_vectors, filter_elements;
    bool stretch, fits = false;

    explicit StagedLaunch(const Sizes& sizes)
        : sizes(sizes),
          in_planes(sizes.planes / C::kMultiplier),
          column_tiles(strips(sizes.out_w, C::kColumns)),
          row_tiles(strips(sizes.out_h, C::kRows)) {
        const long long most = in_planes > 1 ? in_planes : 1;
        long long tiles = C::kThreads;
        while (tiles > 32 && most * C::kMultiplier * row_tiles * column_tiles < 256 * tiles) tiles /= 2;
        for (; tiles >= 1 && tiles >= C::kMultiplier && !fits; tiles /= 2) {
            const long long of_block = tiles / C::kMultiplier;
            planes = 1, rows = row_tiles, columns = column_tiles;
            if (row_tiles * column_tiles <= of_block) {
                planes = of_block / (row_tiles * column_tiles);
                if (planes > most) planes = most;
            } else {
                if (column_tiles > (of_block < 64 ? of_block : 64))
                    columns = strips(column_tiles, strips(column_tiles, of_block < 32 ? of_block : 32));
                rows = of_block / columns > 1 ? of_block / columns : 1;
                rows = strips(row_tiles, strips(row_tiles, rows));
            }
            place();
            const long long window = reach(item_rows, C::kStrideH, C::kFilterH, C::kDilationH);
            const long long fetched = planes > 1 || lines < window ? lines : window;
            fits = fetched * planes * line_units < 1 << 16 && lines < 1 << 15 && line_units < 1 << 15 &&
                   shared_bytes() <= (tiles > 32 ? C::kSharedBudget : C::kSharedLimit);
        }
    }

    static long long reach(long long outputs, int stride, int taps, int apart) {
        return (outputs - 1) * stride + static_cast<long long>(taps - 1) * apart + 1;
    }
    long long shared_bytes() const {
        long long image = image_vectors * 16;
        if (C::kStageOutputs) {
            const long long outputs = planes * C::kMultiplier * item_rows * sizes.out_w;
            const long long results = raised((outputs + kVector) * (C::kHasResidual ? sizeof(Sum) : sizeof(T)), 16);
            if (results > image) image = results;
        }
        return filter_elements * sizeof(Sum) + image;
    }
    long long blocks() const { return strips(in_planes, planes) * row_items * column_items; }

    void place() {
        row_items = strips(row_tiles, rows), column_items = strips(column_tiles, columns);
        item_rows = rows * C::kRows < sizes.out_h ? rows * C::kRows : sizes.out_h;
        item_columns = columns * C::kColumns < sizes.out_w ? columns * C::kColumns : sizes.out_w;
        const bool dense = sizes.x_row == sizes.in_w && sizes.x_channel == sizes.in_h * sizes.in_w &&
                           sizes.x_image == sizes.x_channel * (sizes.out_channels / C::kMultiplier);
        stretch = dense && column_items == 1 && sizes.in_w >= larger(2, kVector - 1);
        const long long lead = StagedWindow<C>::kLead, across = columns * C::kColumns;
        const long long end = lead - C::kPadLeft + reach(across, C::kStrideW, C::kFilterW, C::kDilationW);
        pitch = raised(end, 4);
        if (column_items == 1) {
            long long right = reach(sizes.out_w, C::kStrideW, C::kFilterW, C::kDilationW) - C::kPadLeft - sizes.in_w;
            if (right < lead) right = lead;
            pitch = raised(sizes.in_w + right, 4);
        }
        const long long tile_rows = reach(rows * C::kRows, C::kStrideH, C::kFilterH, C::kDilationH);
        const long long below = reach(sizes.out_h, C::kStrideH, C::kFilterH, C::kDilationH) - C::kPadTop - sizes.in_h;
        const long long banks = 128 / sizeof(T), step = across * C::kStrideW % banks;
        long long last_rows = tile_rows;
        plane_pitch = 0;
        if (planes > 1) {
            const long long between = below > C::kPadTop ? below : C::kPadTop;
            plane_pitch = raised((sizes.in_h + between) * pitch, banks, step);
            if (last_rows < C::kPadTop + sizes.in_h) last_rows = C::kPadTop + sizes.in_h;
        } else if (C::kRows * C::kStrideH % 2 && step) {
            while (pitch * C::kRows * C::kStrideH % banks != step) pitch += 4;
        }
        lines = reach(item_rows, C::kStrideH, C::kFilterH, C::kDilationH);
        if (stretch || planes > 1 || lines > sizes.in_h) lines = sizes.in_h;
        long long width = lead + reach(item_columns, C::kStrideW, C::kFilterW, C::kDilationW);
        if (width > sizes.in_w) width = sizes.in_w;
        line_units = stretch ? sizes.in_w : strips(width, C::kGranule);
        const long long last = raised(end, 4) > pitch ? raised(end, 4) : pitch;
        const long long elements = (planes - 1) * plane_pitch + (last_rows - 1) * pitch + last;
        image_vectors = strips(elements * sizeof(T), 16);
        const long long taps = planes * C::kMultiplier * C::kFilterH * C::kFilterW;
        filter_elements = C::kShareFilters ? raised(taps + 3, 4) : 0;
    }

    StagedNchwTiling tiling() const {
        const long long gap = plane_pitch - lines * pitch;
        return {fast_divisor(row_items),
                fast_divisor(column_items),
                fast_divisor(sizes.out_channels),
                short_divisor(strips(item_columns, C::kColumns)),
                short_divisor(planes * C::kMultiplier),
                short_divisor(line_units),
                short_divisor(lines),
                static_cast<unsigned>(planes),
                static_cast<unsigned>(item_rows),
                static_cast<unsigned>(item_columns),
                static_cast<unsigned>(sizes.in_h * sizes.in_w),
                static_cast<unsigned>(sizes.out_h * sizes.out_w),
                static_cast<unsigned>(pitch),
                static_cast<unsigned>(plane_pitch),
                static_cast<unsigned>(gap > 0 ? gap : 0),
                static_cast<unsigned>(filter_elements),
                static_cast<unsigned>(image_vectors),
                fast_divisor(1)};
    }
};

template <class C>
Launch<StagedNchwTiling> staged_items_launch(const Sizes& sizes, const void* x) {
    using T = typename C::Element;
    const long long most = 1ll << 31;
    Launch<StagedNchwTiling> launch;
    launch.possible = false;
    if (sizes.in_h >= most || sizes.in_w >= most || sizes.in_h * sizes.in_w >= most ||
        sizes.out_h * sizes.out_w >= most || sizes.planes >= most)
        return launch;
    const StagedLaunch<C> made(sizes);
    if (!made.fits) return launch;
    launch.tiling = made.tiling();
    launch.grid = dim3(folded(made.blocks(), 0x7fffffff));
    launch.block = dim3(C::kThreads);
    launch.shared_bytes = static_cast<unsigned>(made.shared_bytes());
    launch.possible = made.blocks() <= 0x7fffffff && made.stretch == C::kStretch &&
                      (!C::kStageOutputs || made.row_items == 1 || C::kMultiplier == 1) &&
                      sizes.in_w % C::kGranule == 0 && sizes.out_w % C::kStoreVector == 0 &&
                      is_aligned(x, sizeof(T) * C::kGranule);
    return launch;
}

// The marches: what variants/staged_march.py computes.
template <class C>
struct MarchLaunch {
    static constexpr long long kTaps = C::kFilterH * C::kFilterW, kBytes = sizeof(typename C::Element);
    Sizes sizes;
    long long in_plane, out_plane, planes, lanes, ring, buffer;
    long long column_items = 1, item_rows = 0, item_columns = 0, plane_pitch = 0, out_pitch = 0;
    long long copy_lanes = 1, store_lanes = 1;
    bool fits;

    MarchLaunch(const Sizes& sizes, const void* x)
        : sizes(sizes), in_plane(sizes.in_h * sizes.in_w), out_plane(sizes.out_h * sizes.out_w) {
        const bool dense = sizes.x_row == sizes.in_w && sizes.x_channel == in_plane &&
                           sizes.x_image == sizes.x_channel * sizes.out_channels;
        const bool seen = sizes.out_h - 1 - C::kPadTop < sizes.in_h && sizes.out_w - 1 - C::kPadLeft < sizes.in_w;
        fits = dense && seen && in_plane < 1 << 26 && out_plane < 1 << 26;
        if (C::kWhole > 0)
            whole();
        else
            rows(is_aligned(x, 16));
    }

    void whole() {
        lanes = C::kWholeLanes;
        planes = 32 / lanes;
        const bool as_many = sizes.in_h == sizes.out_h && sizes.in_w == sizes.out_w;
        ring = raised(planes * in_plane, 16 / kBytes);
        buffer = raised(planes * (!as_many && out_plane > kTaps ? out_plane : kTaps), 16 / kBytes);
        fits = fits && sizes.in_w == C::kWhole && sizes.out_w == lanes * C::kColumns && as_many == C::kInPlace;
    }

    void rows(bool aligned) {
        const long long granule = aligned && sizes.in_w % 4 == 0 && sizes.out_w % 4 == 0 ? 4 : 1;
        const long long width = sizes.in_w, lead = raised(C::kPadLeft, granule);
        const long long column_tiles = strips(sizes.out_w, C::kColumns);
        column_items = strips(column_tiles, 32);
        item_columns = column_items == 1 ? sizes.out_w : raised(strips(column_tiles, column_items) * C::kColumns, 4);
        if (strips(item_columns, C::kColumns) > 32) item_columns -= 4;
        column_items = strips(sizes.out_w, item_columns);
        lanes = strips(item_columns, C::kColumns);
        planes = 32 / lanes;
        item_rows = sizes.out_h;
        long long staged = item_columns + C::kFilterW - 1 + granule;
        if (staged > width) staged = width;
        const bool even = granule == 4 && lanes * planes == 32 && lanes * C::kColumns == sizes.out_w &&
                          sizes.out_channels % planes == 0 && 2 * width <= 4 * 32 && planes == 4 * (32 / (width / 2)) &&
                          planes == 4 * (32 / (sizes.out_w / 2));
        copy_lanes = even ? width / 2 : pieces(staged, granule);
        store_lanes = even ? sizes.out_w / 2 : pieces(item_columns, granule);
        long long right = sizes.out_w - 1 - C::kPadLeft + C::kFilterW - width;
        if (right < lead) right = lead;
        const long long least = raised(staged + right, granule);
        plane_pitch = least;
        for (long long pitch = least; pitch < least + 32; pitch += granule)
            if (conflicts(pitch) < conflicts(plane_pitch)) plane_pitch = pitch;
        const long long reach = lead - C::kPadLeft + lanes * C::kColumns + C::kFilterW - 1;
        out_pitch = raised(item_columns, 4) * (even ? 2 : 1);
        ring = raised(2 * C::kStages * planes * plane_pitch + (reach > plane_pitch ? reach - plane_pitch : 0), 4);
        buffer = raised(planes * (out_pitch > kTaps ? out_pitch : kTaps), 4);
        fits = fits && granule == C::kGranule && even == C::kEven;
    }

    static long long pieces(long long elements, long long granule) {
        const long long count = strips(elements, granule);
        return count < 32 ? count : 32;
    }

    // The most lanes of a warp that read the same bank.
    int conflicts(long long pitch) const {
        int met[32] = {}, most = 0;
        for (long long p = 0; p < planes; ++p)
            for (long long c = 0; c < lanes; ++c) {
                const int now = ++met[(p * pitch + c * C::kColumns) % 32];
                if (now > most) most = now;
            }
        return most;
    }

    long long items() const {
        return sizes.planes / sizes.out_channels * strips(sizes.out_channels, planes) * column_items;
    }
    long long blocks() const {
        const long long made = strips(items(), C::kThreads / 32);
        return C::kAhead > 0 && made > C::kAhead ? C::kAhead : made;
    }
    long long warp_elements() const { return (C::kAhead > 0 ? 2 : 1) * ring + buffer; }
    long long shared_bytes() const { return kBytes * (C::kThreads / 32) * warp_elements(); }

    StagedNchwTiling tiling() const {
        const auto narrow = [](long long value) { return static_cast<unsigned>(value); };
        const long long copied = 32 / copy_lanes, stored = 32 / store_lanes;
        return {fast_divisor(1),
                fast_divisor(column_items),
                fast_divisor(sizes.out_channels),
                short_divisor(lanes),
                short_divisor(1),
                short_divisor(sizes.in_w),
                short_divisor(1),
                narrow(planes),
                narrow(item_rows),
                narrow(item_columns),
                narrow(in_plane),
                narrow(out_plane),
                narrow(planes * plane_pitch),
                narrow(plane_pitch),
                0,
                0,
                0,
                fast_divisor(strips(sizes.out_channels, planes)),
                narrow(warp_elements()),
                narrow(ring),
                narrow(out_pitch),
                narrow(copy_lanes),
                narrow(copied),
                narrow(copied * in_plane),
                narrow(copied * plane_pitch),
                narrow(store_lanes),
                narrow(stored),
                narrow(stored * out_plane),
                narrow(stored * out_pitch)};
    }
};

template <class C>
Launch<StagedNchwTiling> staged_march_launch(const Sizes& sizes, const void* x) {
    const long long most = 1ll << 31;
    Launch<StagedNchwTiling> launch;
    launch.possible = false;
    if (sizes.in_h >= most || sizes.in_w >= most || sizes.planes >= most) return launch;
    const MarchLaunch<C> made(sizes, x);
    launch.tiling = made.tiling();
    launch.grid = dim3(folded(made.blocks(), 0x7fffffff));
    launch.block = dim3(C::kThreads);
    launch.shared_bytes = static_cast<unsigned>(made.shared_bytes());
    launch.possible = made.fits && made.items() < 0x7fffffff && made.shared_bytes() <= C::kSharedLimit;
    return launch;
}

template <class C>
Launch<StagedNchwTiling> staged_nchw_launch(const Sizes& sizes, const void* x) {
    if constexpr (C::kMarch || C::kWhole > 0)
        return staged_march_launch<C>(sizes, x);
    else
        return staged_items_launch<C>(sizes, x);
}

}  // namespace dwconv
