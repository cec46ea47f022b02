"""SqueezeNet 1.1 (Iandola et al. 2016, arXiv 1602.07360), trained on ImageNet with Caffe, as an image feature.

A file of 2.5 MB (float16). Its maps, the taps, make a perceptual distance. Letters: B batch, D channels.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.errors import AtollError

DIM = 512
SMALLEST = 17  # pixels of a side: below, nothing is left for the third pooling

# Of the fire modules 2 to 9: channels in, squeezed, out of each of the two expansions.
FIRES = {
    "fire2": (64, 16, 64),
    "fire3": (128, 16, 64),
    "fire4": (128, 32, 128),
    "fire5": (256, 32, 128),
    "fire6": (256, 48, 192),
    "fire7": (384, 48, 192),
    "fire8": (384, 64, 256),
    "fire9": (512, 64, 256),
}


class Fire(nn.Module):
    """A 1x1 convolution to few channels, then 1x1 and 3x3 ones side by side (the paper's Fig. 1)."""

    def __init__(self, inputs: int, squeezed: int, outputs: int):
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, outputs, 1)
        self.expand3x3 = nn.Conv2d(squeezed, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze1x1(x))  # [B,squeezed,h,w]
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))  # [B,2*outputs,h,w]


class SqueezeNet(nn.Module):
    """Images [B,3,h,w] in [0,1] to features [B,512]: the mean of the last map, what its classifier would read."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        for name, sizes in FIRES.items():
            self.add_module(name, Fire(*sizes))
        # Caffe's input: blue, green, red in 0..255 minus the mean colour.
        self.register_buffer("mean", torch.tensor([104.0, 117.0, 123.0]).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.last_map(images).mean((2, 3))  # [B,512]

    def last_map(self, images: Tensor) -> Tensor:
        """The last map [B,512,h/16,w/16], rounded down. Raises AtollError as `taps`."""
        return self.taps(images)[-1]

    def taps(self, images: Tensor) -> list[Tensor]:
        """The maps [B,D,h',w'] after conv1, fire3, fire5, fire6, fire7, fire8 and fire9 (those of LPIPS, Zhang 2018).

        Raises:
            AtollError: a side below 17 pixels.
        """
        if min(images.shape[-2:]) < SMALLEST:
            raise AtollError(
                f"SqueezeNet was given {images.shape[-2]} x {images.shape[-1]} pixels; "
                f"it needs sides of at least {SMALLEST}: enlarge the images"
            )
        # Every pooling halves the map; the taps are those of LPIPS.
        x = F.relu(self.conv1(images.flip(1) * 255 - self.mean))  # [B,64,h/2,w/2]
        taps = [x]
        for name in FIRES:
            if name in ("fire2", "fire4", "fire6"):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = self.get_submodule(name)(x)
            if name not in ("fire2", "fire4"):
                taps.append(x)
        return taps  # 64 at h/2; 128 at h/4; 256 at h/8; 384, 384, 512, 512 at h/16


def load_squeezenet(arrays: Mapping[str, np.ndarray], where: str) -> SqueezeNet:
    """Build the network with the weights of a file: conv1__w, conv1__b, fire2_squeeze1x1__w, ... (Caffe's names).

    Raises:
        AtollError: an array is missing or has another shape; the message begins with `where`.
    """
    network = SqueezeNet()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            module, kind = name.rsplit(".", 1)
            # Caffe's name of the parameter.
            key = f"{module.replace('.', '_')}__{kind[0]}"  # fire2.squeeze1x1.weight: fire2_squeeze1x1__w
            if key not in arrays:
                raise AtollError(f"{where}: no array {key!r}; give squeezenet11_caffe_fp16.npz")
            if arrays[key].shape != tuple(parameter.shape):
                raise AtollError(
                    f"{where}: {key} is {arrays[key].shape}, expected {tuple(parameter.shape)}; "
                    "give squeezenet11_caffe_fp16.npz"
                )
            parameter.copy_(torch.from_numpy(arrays[key].astype(np.float32)))
    return network
