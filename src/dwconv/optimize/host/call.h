// One call of a kernel: contiguous x [images, channels, in_h, in_w] and y. bias is null where the layer has none.
struct Call {
    const float *x, *weight, *bias;
    float* y;
    long long images, channels, in_h, in_w, out_h, out_w;
    cudaStream_t stream;
};
