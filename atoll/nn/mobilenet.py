"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), trained on ImageNet with TensorFlow, as an image feature.

The weights are int8 with a scale per output channel (a file of 3.4 MB); they are widened to float32 once, when loaded.
Batch norms are folded into the convolutions. Letters: B batch, D channels.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.errors import AtollError

DIM = 1280

# The paper's Table 2: expansion t, channels c, blocks n, stride s of the first.
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class Conv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: if the padding is odd, the extra row and column are at the end."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, side, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        # A pointwise convolution needs no padding.
        side, stride = self.kernel_size[0], self.stride[0]
        if side == 1 and stride == 1:
            return super().forward(x)
        # The padding of both sides together, in TensorFlow's way.
        height, width = (max((-(-n // stride) - 1) * stride + side - n, 0) for n in x.shape[-2:])
        # Even padding: the convolution pads by itself, without a copy of the map.
        if height % 2 == 0 and width % 2 == 0:
            pad = (height // 2, width // 2)
            return F.conv2d(x, self.weight, self.bias, stride, pad, groups=self.groups)
        # Odd padding: pad by hand.
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project: ReLU6 after the first two, a skip where the shapes allow it (Fig. 4d)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, side: int = 3):
        super().__init__()
        hidden = inputs * expansion
        self.expand = Conv(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = Conv(hidden, hidden, side, stride, groups=hidden)
        self.project = Conv(hidden, outputs, 1)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))  # [B,tD,h,w]
        h = F.relu6(self.depthwise(h))  # [B,tD,h/s,w/s]
        h = self.project(h)  # [B,D',h/s,w/s]
        return x + h if self.skips else h  # [B,D',h/s,w/s]


class MobileNetV2(nn.Module):
    """Images [B,3,h,w] in [0,1] to features [B,1280]: the mean of the last map, what its classifier would read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, stride=2)
        blocks, channels = [], 32
        for expansion, outputs, count, stride in BLOCKS:
            for i in range(count):
                blocks.append(InvertedResidual(channels, outputs, expansion, stride if i == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = Conv(channels, DIM, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last_map(images).mean((2, 3))  # [B,1280]

    def last_map(self, images: Tensor) -> Tensor:
        """Images [B,3,h,w] in [0,1] to the last map [B,1280,h/32,w/32], rounded up."""
        x = F.relu6(self.stem(2 * images - 1))  # [B,32,h/2,w/2]
        x = self.blocks(x)  # [B,320,h/32,w/32]
        return F.relu6(self.head(x))  # [B,1280,h/32,w/32]


def load_mobilenet(arrays: Mapping[str, np.ndarray], where: str) -> MobileNetV2:
    """Build the network from a file: q0, q1, ... int8 weights, s0, ... their scales, b0, ... biases, in order of use.

    Raises:
        AtollError: an array is missing or has another shape; the message begins with `where`.
    """
    network = MobileNetV2()
    convolutions = [module for module in network.modules() if isinstance(module, Conv)]
    with torch.no_grad():
        for i, convolution in enumerate(convolutions):
            try:
                quantised, scale, bias = arrays[f"q{i}"], arrays[f"s{i}"], arrays[f"b{i}"]
            except KeyError as error:
                raise AtollError(f"{where}: no array {error}; give mobilenetv2_tf_int8.npz") from None
            # Check shapes before anything is copied.
            expected, outputs = tuple(convolution.weight.shape), (len(convolution.weight),)
            if quantised.shape != expected or scale.shape != outputs or bias.shape != outputs:
                raise AtollError(
                    f"{where}: q{i}, s{i}, b{i} are {quantised.shape}, {scale.shape}, {bias.shape}; "
                    f"expected {expected}, {outputs}, {outputs}; give mobilenetv2_tf_int8.npz"
                )
            # Dequantise: one scale per output channel.
            weight = quantised.astype(np.float32) * scale.astype(np.float32).reshape(-1, 1, 1, 1)
            convolution.weight.copy_(torch.from_numpy(weight))
            assert convolution.bias is not None
            convolution.bias.copy_(torch.from_numpy(bias.astype(np.float32)))
    return network
