// The operator that the layers call: checks, output, launch; its shapes for torch.compile; its gradient
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch/types.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace dwconv_extension {

/*CALL*/

// Defined in the CUDA source. False: the kernel was not made for such a call, and nothing was launched.
bool /*LAUNCHES*/;

namespace {

using Pair = std::array<int64_t, 2>;  // height, width

// What a layer was built with. A layer names its configuration by its place in this table.
struct Configuration {
    Pair filter, stride, padding, dilation;
    int64_t multiplier;  // output channels for each input channel
    bool has_bias;

    // How far the filter reaches past its first element, less the padding: fits into inputs larger than this.
    int64_t reach(int side) const { return dilation[side] * (filter[side] - 1) - 2 * padding[side]; }

    bool fits_into(const torch::Tensor& x) const { return x.size(2) > reach(0) && x.size(3) > reach(1); }

    template <class Int>
    Int out_size(const Int& size, int side) const {
        return (size - reach(side) - 1) / stride[side] + 1;
    }
};
const Configuration kConfigurations[] = {
    /*CONFIGURATIONS*/
};

struct Kernel {
    int64_t configuration;
    std::vector<Pair> made_for;  // image sizes that it was chosen for; it takes others, too, where they allow it
    bool (*launch)(const Call& call);

    bool was_made_for(const Call& call) const {
        for (const Pair& size : made_for)
            if (size[0] == call.in_h && size[1] == call.in_w) return true;
        return false;
    }
};
const Kernel kKernels[] = {
    /*KERNELS*/
};

// For messages. Not by streams: those of an extension whose libstdc++ is linked statically can't write numbers.
std::string text(at::IntArrayRef sizes) {
    std::string joined;
    for (const int64_t size : sizes) joined += (joined.empty() ? "[" : ", ") + std::to_string(size);
    return joined + "]";
}

const Configuration& configuration_of(int64_t number) {
    TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(std::size(kConfigurations)), "configuration ",
                std::to_string(number), " is unknown: this extension has ", std::to_string(std::size(kConfigurations)));
    return kConfigurations[number];
}

// Launches the kernel that was made for this image size, else the first that takes it. False: none does.
bool launch(int64_t configuration, const Call& call) {
    for (const bool made_for_it : {true, false})
        for (const Kernel& kernel : kKernels)
            if (kernel.configuration == configuration && kernel.was_made_for(call) == made_for_it &&
                kernel.launch(call))
                return true;
    return false;
}

void check(const Configuration& made, const torch::Tensor& x, const torch::Tensor& weight,
           const std::optional<torch::Tensor>& bias) {
    TORCH_CHECK(x.dim() == 4, "x has shape ", text(x.sizes()), "; the kernel takes [N, C, H, W]");
    TORCH_CHECK(x.is_cuda() && x.scalar_type() == torch::kFloat && x.is_contiguous(), "x is ", x.scalar_type(), " on ",
                x.device(), "; the kernel takes contiguous float32 on a CUDA device");
    const std::vector<int64_t> wanted = {x.size(1) * made.multiplier, 1, made.filter[0], made.filter[1]};
    TORCH_CHECK(weight.sizes() == wanted, "weight has shape ", text(weight.sizes()), "; it must be ", text(wanted));
    TORCH_CHECK(weight.device() == x.device() && weight.scalar_type() == torch::kFloat, "weight is ",
                weight.scalar_type(), " on ", weight.device(), "; it must be float32 on ", x.device(), ", as x is");
    TORCH_CHECK(bias.has_value() == made.has_bias, "the kernel was made for layers ",
                made.has_bias ? "with" : "without", " a bias");
    if (!made.has_bias) return;
    TORCH_CHECK(bias->sizes() == wanted[0], "bias has shape ", text(bias->sizes()), "; it must be ", text(wanted[0]));
    TORCH_CHECK(bias->device() == x.device() && bias->scalar_type() == torch::kFloat, "bias is ", bias->scalar_type(),
                " on ", bias->device(), "; it must be float32 on ", x.device(), ", as x is");
}

torch::Tensor pytorch_forward(const Configuration& made, const torch::Tensor& x, const torch::Tensor& weight,
                              const std::optional<torch::Tensor>& bias) {
    return at::convolution(x, weight, bias, made.stride, made.padding, made.dilation, false, {0, 0}, x.size(1));
}

torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& weight, const std::optional<torch::Tensor>& bias,
                      int64_t configuration) {
    const Configuration& made = configuration_of(configuration);
    check(made, x, weight, bias);
    if (!made.fits_into(x)) return pytorch_forward(made, x, weight, bias);  // which says what is wrong
    const int64_t out_h = made.out_size(x.size(2), 0), out_w = made.out_size(x.size(3), 1);
    const c10::cuda::CUDAGuard guard(x.device());
    torch::Tensor y = torch::empty({x.size(0), weight.size(0), out_h, out_w}, x.options());
    if (y.numel() == 0) return y;
    const torch::Tensor filter = weight.contiguous(), shift = made.has_bias ? bias->contiguous() : torch::Tensor();
    const bool launched = launch(
        configuration, {x.const_data_ptr<float>(), filter.const_data_ptr<float>(),
                        made.has_bias ? shift.const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(), x.size(0),
                        x.size(1), x.size(2), x.size(3), out_h, out_w, c10::cuda::getCurrentCUDAStream().stream()});
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (launched) return y;
    return pytorch_forward(made, x, weight, bias);
}

// Shape and dtype of the result, for tensors without memory.
torch::Tensor shape_of_forward(const torch::Tensor& x, const torch::Tensor& weight,
                               const std::optional<torch::Tensor>& bias, int64_t configuration) {
    const Configuration& made = configuration_of(configuration);
    return x.new_empty_symint(
        {x.sym_size(0), weight.sym_size(0), made.out_size(x.sym_size(2), 0), made.out_size(x.sym_size(3), 1)});
}

// The gradient is PyTorch's own, and can be differentiated again.
class Convolution : public torch::autograd::Function<Convolution> {
public:
    static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x,
                                 const torch::Tensor& weight, const std::optional<torch::Tensor>& bias,
                                 int64_t configuration) {
        context->save_for_backward({x, weight});
        context->saved_data["configuration"] = configuration;
        const at::AutoDispatchBelowADInplaceOrView below;
        static const auto operation = c10::Dispatcher::singleton()
                                          .findSchemaOrThrow("dwconv_extension::conv2d", "")
                                          .typed<decltype(dwconv_extension::forward)>();
        return operation.call(x, weight, bias, configuration);
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& gradients) {
        const auto saved = context->get_saved_variables();
        const torch::Tensor &x = saved[0], &weight = saved[1];
        const Configuration& made = configuration_of(context->saved_data["configuration"].toInt());
        const std::array<bool, 3> wanted = {context->needs_input_grad(0), context->needs_input_grad(1),
                                            made.has_bias && context->needs_input_grad(2)};
        const std::array<int64_t, 1> bias_shape = {weight.size(0)};
        auto [grad_x, grad_weight, grad_bias] =
            at::convolution_backward(gradients[0], x, weight, bias_shape, made.stride, made.padding, made.dilation,
                                     /*transposed=*/false, {0, 0}, weight.size(0) / made.multiplier, wanted);
        return {grad_x, grad_weight, grad_bias, torch::Tensor()};
    }
};

torch::Tensor forward_with_gradient(const torch::Tensor& x, const torch::Tensor& weight,
                                    const std::optional<torch::Tensor>& bias, int64_t configuration) {
    return Convolution::apply(x, weight, bias, configuration);
}

}  // namespace

TORCH_LIBRARY(dwconv_extension, library) {
    library.def("conv2d(Tensor x, Tensor weight, Tensor? bias, int configuration) -> Tensor");
}
TORCH_LIBRARY_IMPL(dwconv_extension, CUDA, library) { library.impl("conv2d", forward); }
TORCH_LIBRARY_IMPL(dwconv_extension, Meta, library) { library.impl("conv2d", shape_of_forward); }
TORCH_LIBRARY_IMPL(dwconv_extension, Autograd, library) { library.impl("conv2d", forward_with_gradient); }

}  // namespace dwconv_extension
