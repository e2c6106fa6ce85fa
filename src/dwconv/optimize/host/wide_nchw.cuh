// Launch of wide_nchw: what variants/wide_nchw.py computes for one problem (class Band there), for any contiguous x.
namespace dwconv {

// One axis of the problem, along or across.
struct WideAxis {
    long long size, out, taps, stride, dilation, pad;
    long long window(long long outputs) const { return (outputs - 1) * stride + (taps - 1) * dilation + 1; }
};

static inline long long odd_pieces(long long count, long long piece) { return piece * (strips(count, piece) | 1); }

template <class C>
struct WideLaunch {
    using Axes = WideAxes<C>;
    using Sum = typename Accumulator<typename C::Element>::Type;
    static constexpr long long kMostTiles = C::kQueued ? 2048 : C::kThreads;
    static constexpr bool kFlat = Axes::kWhole && !C::kTransposed && !C::kHalves;
    Sizes sizes;
    WideAxis along, across;
    long long batch, along_tiles, across_tiles, images = 1, channels = 1;

    explicit WideLaunch(const Sizes& sizes) : sizes(sizes) {
        const WideAxis rows = {sizes.in_h, sizes.out_h, C::kFilterH, C::kStrideH, C::kDilationH, C::kPadTop};
        const WideAxis columns = {sizes.in_w, sizes.out_w, C::kFilterW, C::kStrideW, C::kDilationW, C::kPadLeft};
        along = C::kTransposed ? rows : columns;
        across = C::kTransposed ? columns : rows;
        batch = sizes.planes / sizes.out_channels;
        along_tiles = strips(along.out, C::kAlong);
        across_tiles = strips(across.out, C::kAcross);
        cut();
        channels = C::kChannels < sizes.out_channels ? C::kChannels : sizes.out_channels;
        fill();
    }

    long long tiles() const { return images * channels * along_tiles * across_tiles; }
    long long tasks() const { return strips(tiles(), 32); }
    long long warps() const { return C::kQueued && tasks() > C::kThreads / 32 ? C::kThreads / 32 : tasks(); }
    long long along_bands() const { return strips(along.out, along_tiles * C::kAlong); }
    long long across_bands() const { return strips(across.out, across_tiles * C::kAcross); }
    long long image_groups() const { return strips(batch, images); }
    long long channel_groups() const { return strips(sizes.out_channels, channels); }
    long long blocks() const { return image_groups() * channel_groups() * along_bands() * across_bands(); }
    long long in_extent() const {
        if (Axes::kWhole) return C::kInAlong;
        const long long window = along.window(along_tiles * C::kAlong);
        const long long reached = along.size + Axes::kMargin + Axes::kReach;
        return strips((window < reached ? window : reached) + Axes::kShift, 4) * 4;
    }
    long long in_lines() const {
        const bool one = across_bands() == 1;
        const long long reached =
            one ? across.window(across.out) - across.pad : across.window(across_tiles * C::kAcross);
        return reached > across.size ? across.size : reached < 0 ? 0 : reached;
    }
    long long in_pitch() const { return kFlat ? C::kInAlong : odd_pieces(in_extent(), Axes::kRead); }
    long long out_pitch() const { return kFlat ? C::kAlong : odd_pieces(along_tiles * C::kAlong, Axes::kWrite); }
    bool channels_merged() const {
        const bool dense = sizes.x_channel == sizes.in_h * sizes.in_w && sizes.x_row == sizes.in_w;
        return channels > 1 && kFlat && !C::kQueued && dense && C::kMultiplier == 1 && across_bands() == 1 &&
               in_lines() == sizes.in_h;
    }
    long long in_plane() const { return in_lines() * in_pitch(); }
    long long out_plane() const { return (channels_merged() ? across.out : across_tiles * C::kAcross) * out_pitch(); }
    long long in_mirror() const { return odd_pieces((channels_merged() ? channels : 1) * in_plane(), Axes::kRead); }
    long long in_image() const { return Axes::kCopies * in_mirror(); }
    long long out_image() const { return odd_pieces((channels_merged() ? channels : 1) * out_plane(), Axes::kWrite); }
    long long in_channel() const { return channels_merged() ? in_plane() : images * in_image(); }
    long long out_channel() const { return channels_merged() ? out_plane() : images * out_image(); }
    long long shared_bytes() const {
        const long long groups = channels_merged() ? 1 : channels;
        const long long inputs = groups * images * in_image(), outputs = groups * images * out_image();
        const long long buffers = C::kQueued ? warps() * 32 * Axes::kBufferPitch : 0;
        const long long staged = C::kQueued || inputs > outputs ? inputs : outputs;
        const long long taps = channels * Axes::kCopies * Axes::kLines * Axes::kTapPitch;
        return 16 + (taps + staged + buffers) * sizeof(Sum);
    }

    // Cuts planes until one band fits into a block's budget.
    void cut() {
        while (along_tiles * across_tiles > 1 && (tiles() > kMostTiles || shared_bytes() > C::kSharedBudget)) {
            const long long length = along_tiles * C::kAlong * along.stride;
            const long long height = across_tiles * C::kAcross * across.stride;
            if (across_tiles == 1 || (along_tiles > 1 && length > height))
                along_tiles = strips(along_tiles, 2);
            else
                across_tiles = strips(across_tiles, 2);
        }
        const long long bands[] = {along_bands(), across_bands()};
        along_tiles = strips(strips(along.out, C::kAlong), bands[0]);
        across_tiles = strips(strips(across.out, C::kAcross), bands[1]);
    }

    // Fills the block with images, then with channels.
    void fill() {
        const long long wanted = Axes::kTaps > C::kChunk ? 16 : 8, most = batch < 32 ? batch : 32;
        while (2 * images <= most && (images < wanted || tiles() < 192)) {
            images *= 2;
            if (tiles() <= kMostTiles && shared_bytes() <= C::kSharedBudget && blocks() >= 256) continue;
            images /= 2;
            break;
        }
        const long long groups = image_groups();
        images = groups > 0 && batch > 0 ? strips(batch, groups) : 1;
        while (2 * channels <= sizes.out_channels && 2 * tiles() <= 64) {
            channels *= 2;
            if (shared_bytes() <= C::kSharedBudget) continue;
            channels /= 2;
            break;
        }
    }

    WideNchwTiling tiling(bool aligned) const {
        WideNchwTiling made;
        made.along_bands = fast_divisor(along_bands());
        made.across_bands = fast_divisor(across_bands());
        made.channel_groups = fast_divisor(channel_groups());
        made.images = fast_divisor(images);
        made.channels = static_cast<unsigned>(channels);
        made.batch = static_cast<unsigned>(batch);
        made.along_tiles = fast_divisor(along_tiles);
        made.across_tiles = fast_divisor(across_tiles);
        made.near_tiles = 1;
        const long long beside = C::kTransposed ? 1 : images;
        while (made.near_tiles * 2 * beside <= 8 && across_tiles % (made.near_tiles * 2) == 0) made.near_tiles *= 2;
        const long long uneven = across.window(across.out) - 2 * across.pad - across.size;
        made.tasks = static_cast<unsigned>(tasks());
        made.folded = across_bands() == 1 && Axes::kLines > 8 && uneven >= -1 && uneven <= 1;
        made.in_pitch = static_cast<unsigned>(in_pitch());
        made.in_channel = static_cast<unsigned>(in_channel());
        made.in_image = static_cast<unsigned>(in_image());
        made.out_pitch = static_cast<unsigned>(out_pitch());
        made.out_channel = static_cast<unsigned>(out_channel());
        made.out_image = static_cast<unsigned>(out_image());
        made.in_mirror = C::kHalves ? static_cast<unsigned>(in_mirror()) : 0;
        made.in_extent = static_cast<unsigned>(in_extent());

        constexpr long long kMove = Axes::kMove;
        const bool one_band = across_bands() == 1;
        made.in_merged = kFlat && (sizes.in_h == 1 || sizes.x_row == sizes.in_w);
        made.out_merged = kFlat && !C::kQueued;
        made.channels_merged = channels_merged();
        const long long planes = made.channels_merged ? channels : 1;
        made.in_wide = aligned && sizes.x_image % kMove == 0 && (made.channels_merged || sizes.x_channel % kMove == 0);
        if (made.in_merged)
            made.in_wide &= sizes.in_w % kMove == 0 || (one_band && planes * in_lines() * sizes.in_w % kMove == 0);
        else
            made.in_wide &= sizes.in_w % kMove == 0 && sizes.x_row % kMove == 0;
        const long long starts = C::kTransposed && !one_band ? across_tiles * C::kAcross : 0;
        made.out_wide = aligned && (made.out_merged && one_band ? planes * sizes.out_h * sizes.out_w % kMove == 0
                                                                : sizes.out_w % kMove == 0 && starts % kMove == 0);
        if (made.channels_merged && sizes.out_channels % channels) made.in_wide = made.out_wide = 0;
        const bool near = made.near_tiles % kMove == 0 && !made.folded && C::kAcross == 1 && starts % kMove == 0;
        if (C::kQueued) made.out_wide = aligned && sizes.out_w % kMove == 0 && (!C::kTransposed || near);

        const long long move_in = made.in_wide ? kMove : 1, move_out = made.out_wide ? kMove : 1;
        long long in_rows = C::kTransposed ? in_extent() : in_lines();
        long long in_columns = C::kTransposed ? in_lines() : in_extent();
        const long long out_lines = across_tiles * C::kAcross, out_extent = along_tiles * C::kAlong;
        long long out_rows = C::kTransposed ? out_extent : out_lines;
        long long out_columns = C::kTransposed ? out_lines : out_extent;
        if (made.in_merged) in_columns *= in_rows, in_rows = 1;
        if (made.out_merged) out_columns *= out_rows, out_rows = 1;
        if (made.channels_merged) in_columns *= channels, out_columns = channels * across.out * C::kAlong;
        if (C::kTransposed) in_columns += move_in - 1;
        in_rows = strips(in_rows, Axes::kNearRows);
        const long long in_moves = strips(in_columns, Axes::kGroup * move_in);
        made.in_rows = fast_divisor(in_rows > 0 ? in_rows : 1);
        made.in_moves = fast_divisor(in_moves > 0 ? in_moves : 1);
        made.out_rows = fast_divisor(strips(out_rows, Axes::kNearRows));
        made.out_moves = fast_divisor(strips(out_columns, Axes::kGroup * move_out));
        return made;
    }
};

template <class C>
Launch<WideNchwTiling> wide_nchw_launch(const Sizes& sizes, const void* x) {
    const long long most = 0x7ff00000ll - 2 * (C::kPadTop + C::kPadLeft);
    const bool short_enough = sizes.in_h < most && sizes.in_w < most && sizes.out_h < most && sizes.out_w < most;
    using Axes = WideAxes<C>;
    const bool whole = !C::kInAlong || ((C::kTransposed ? sizes.in_h : sizes.in_w) == C::kInAlong &&
                                        (C::kTransposed ? sizes.out_h : sizes.out_w) == Axes::kCopies * C::kAlong);
    const WideLaunch<C> made(sizes);
    Launch<WideNchwTiling> launch;
    launch.tiling = made.tiling(is_aligned(x, sizeof(typename C::Element) * Axes::kMove));
    launch.grid = dim3(folded(made.blocks(), 0x7fffffff));
    launch.block = dim3(static_cast<unsigned>(32 * made.warps()));
    launch.shared_bytes = static_cast<unsigned>(made.shared_bytes());
    launch.possible = short_enough && whole && (!C::kHalves || made.along_bands() == 1) &&
                      made.blocks() <= 0x7fffffff && made.shared_bytes() <= C::kSharedLimit;
    return launch;
}

}  // namespace dwconv
