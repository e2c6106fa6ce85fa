// config.cuh: what the -D defines say about the problem; included below the border of every kernel file
#ifndef DWCONV_CONSTANTS  // defaults that keep the kernel files valid in an editor: 3x3 float32, channels first
#define DWCONV_ELEMENT float
#define DWCONV_CHANNELS_LAST 0
#define DWCONV_FILTER_D 1
#define DWCONV_FILTER_H 3
#define DWCONV_FILTER_W 3
#define DWCONV_STRIDE_D 1
#define DWCONV_STRIDE_H 1
#define DWCONV_STRIDE_W 1
#define DWCONV_PAD_FRONT 0
#define DWCONV_PAD_TOP 1
#define DWCONV_PAD_LEFT 1
#define DWCONV_DILATION_D 1
#define DWCONV_DILATION_H 1
#define DWCONV_DILATION_W 1
#define DWCONV_MULTIPLIER 1
#define DWCONV_REVERSED 0
#define DWCONV_HAS_BIAS 0
#define DWCONV_ACTIVATION 0
#define DWCONV_HAS_SCALE 0
#define DWCONV_HAS_SHIFT 0
#define DWCONV_HAS_RESIDUAL 0
#endif

struct ProblemConfig {
    using Element = DWCONV_ELEMENT;
    static constexpr bool kChannelsLast = DWCONV_CHANNELS_LAST;
    static constexpr int kFilterD = DWCONV_FILTER_D, kFilterH = DWCONV_FILTER_H, kFilterW = DWCONV_FILTER_W;
    static constexpr int kStrideD = DWCONV_STRIDE_D, kStrideH = DWCONV_STRIDE_H, kStrideW = DWCONV_STRIDE_W;
    static constexpr int kPadFront = DWCONV_PAD_FRONT, kPadTop = DWCONV_PAD_TOP, kPadLeft = DWCONV_PAD_LEFT;
    static constexpr int kDilationD = DWCONV_DILATION_D, kDilationH = DWCONV_DILATION_H, kDilationW = DWCONV_DILATION_W;
    static constexpr int kMultiplier = DWCONV_MULTIPLIER;
    static constexpr bool kReversed = DWCONV_REVERSED;  // filters are read from their last tap to their first
    static constexpr bool kHasBias = DWCONV_HAS_BIAS;
    static constexpr int kActivation = DWCONV_ACTIVATION;
    static constexpr bool kHasScale = DWCONV_HAS_SCALE, kHasShift = DWCONV_HAS_SHIFT;
    static constexpr bool kHasResidual = DWCONV_HAS_RESIDUAL;
};
