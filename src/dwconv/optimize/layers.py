"""The Python of an exported file that stands between its kernels and its model. Parts between @ are filled in."""

LAYERS = '''\
# ---- The kernels, and the layer that calls them ----------------------------------------------------------------------

import torch
import torch.utils.cpp_extension

DEPTHWISE_CUDA = r"""
@CUDA@
"""

DEPTHWISE_CPP = r"""
@CPP@
"""

# The layers that the kernels were made for: (filter, stride, padding, dilation, output channels for each input channel,
# with a bias) -> the number of their configuration.
DEPTHWISE_CONFIGURATIONS = {
@CONFIGURATIONS@
}

if torch.cuda.is_available():  # without a GPU the layers compute as they always did
    torch.utils.cpp_extension.load_inline(
        name="@EXTENSION@",
        cpp_sources=[DEPTHWISE_CPP],
        cuda_sources=[DEPTHWISE_CUDA],
        extra_cflags=["-O2"],
        extra_cuda_cflags=["-O3"],
        is_python_module=False,  # the sources register an operator: torch.ops.@EXTENSION@.conv2d
        no_implicit_headers=True,
    )


class DepthwiseConv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d, with the same parameters, names and results. Contiguous float32 images on a GPU take the kernels
    above; other inputs, and autocast, take torch.nn.Conv2d's own way."""

    def forward(self, x):
        made_for = (
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.out_channels // self.groups,
            self.bias is not None,
        )
        configuration = DEPTHWISE_CONFIGURATIONS.get(made_for)
        if (
            configuration is None
            or not x.is_cuda
            or x.dtype is not torch.float32
            or x.dim() != 4
            or not x.is_contiguous()
            or torch.is_autocast_enabled("cuda")
        ):
            return super().forward(x)
        return torch.ops.@EXTENSION@.conv2d(x, self.weight, self.bias, configuration)


def use_depthwise_kernels(model):
    """Lets the depthwise layers of a model use the kernels above. Parameters and their names stay as they are."""
    for layer in model.modules():
        if (
            type(layer) is torch.nn.Conv2d
            and layer.groups == layer.in_channels
            and layer.padding_mode == "zeros"
        ):
            layer.__class__ = DepthwiseConv2d


# ---- The model, as it was written; its depthwise layers change over at the end of its constructor --------------------
'''
