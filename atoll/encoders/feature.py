"""Features: one vector per image, for clustering. "hog" and "pixels" are formulas; the others are networks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from atoll.encoders.backbones import (
    Backbone,
    CLIPImageConfig,
    DINOv2Config,
    EfficientNetConfig,
    FeatureNetworkConfig,
    MobileNetConfig,
    SqueezeNetConfig,
    load_backbone,
)
from atoll.encoders.trust import USER, Trust
from atoll.encoders.weights import parse_config
from atoll.errors import AtollError
from atoll.nn import squeezenet
from atoll.storage import bounds

# The networks whose last map of features, or tokens, `Feature.patches` returns.
PATCH_FEATURES = ("efficientnet-lite0", "mobilenetv2", "squeezenet", "dinov2", "clip-image")


class Feature(ABC):
    """A frozen map from images to vectors. Subclasses are final; `build_feature` creates one from its config.

    Attributes:
        name: the name in configs.
        dim: the width of a vector.
        takes_bf16: whether its vectors hardly change in bf16; clusters depend on them.
    """

    name: str
    dim: int
    takes_bf16: bool = False

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Return features [B, dim] float32 of images [B, C, H, W] in [0, 1], on the same device, without gradients."""

    def patches(self, images: Tensor, grid: int) -> Tensor:
        """Return features of the places of images.

        Args:
            images: [B, C, H, W] in [0, 1], of any sides; all of the image is read, nothing is cropped.
            grid: cells of a side.

        Returns:
            [B, D, grid, grid] float32, without gradients.

        Raises:
            AtollError: a feature without patch features.
        """
        raise AtollError(f"the feature {self.name!r} has no patch features; use one of {', '.join(PATCH_FEATURES)}")

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the plain values that are stored in cards."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the feature to a device and set the dtype that a network computes in; return it."""


class HogConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["hog"] = "hog"
    bins: int = Field(4, ge=2, le=256)  # orientations
    grid: int = Field(8, ge=1, le=64)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if (dim := self.bins * self.grid**2) > bounds.MAX_DIM:
            raise ValueError(f"bins x grid x grid is {dim:,}; expected at most {bounds.MAX_DIM:,}")
        return self


class Hog(Feature):
    """Histograms of gradient orientations (Dalal and Triggs 2005), `bins` per cell of a `grid` x `grid` over the image.

    Orientations are unsigned, so that dark on light equals light on dark. The vector is the square root of the
    histograms at unit length: distances between such vectors are Hellinger distances (Arandjelovic and Zisserman 2012).
    An image without any edge has the zero vector. Chosen among 24 features by how well k-means separates the kinds of
    glyphs and keeps a character together over the typefaces (docs/log.md).
    """

    name = "hog"

    def __init__(self, bins: int = 4, grid: int = 8):
        self._config = HogConfig(bins=bins, grid=grid)
        self.bins, self.grid = bins, grid
        self.dim = bins * grid * grid

    def __call__(self, images: Tensor) -> Tensor:
        # Gradients of the grey image.
        grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")  # [B,1,H+2,W+2]
        dx = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]  # [B,1,H,W]
        dy = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
        strength = torch.hypot(dx, dy)
        # Each gradient counts for its two nearest orientation bins, linearly.
        place = torch.atan2(dy, dx) * (self.bins / math.pi)  # each half turn passes all bins once
        low = place.floor()
        fraction = place - low
        maps = grey.new_zeros(len(grey), self.bins, *images.shape[-2:])  # [B,bins,H,W]
        maps.scatter_add_(1, low.long() % self.bins, strength * (1 - fraction))
        maps.scatter_add_(1, (low.long() + 1) % self.bins, strength * fraction)
        # Histograms per cell, then the Hellinger map.
        cells = F.adaptive_avg_pool2d(maps, self.grid).flatten(1)  # [B,bins*grid*grid]
        return F.normalize(cells.sqrt())

    def config(self) -> dict[str, Any]:
        return self._config.model_dump()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return self  # nothing to move


class PixelsConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["pixels"] = "pixels"
    size: int = Field(8, ge=1, le=128)  # 3 x 128 x 128 numbers, within MAX_DIM


class Pixels(Feature):
    """The image itself at `size` x `size` RGB pixels: the baseline for features."""

    name = "pixels"
    takes_bf16 = True

    def __init__(self, size: int = 8):
        self.size, self.dim = size, 3 * size * size

    def __call__(self, images: Tensor) -> Tensor:
        # Smooth downscaling, so that the vector is the coarse image.
        return resize(rgb(images.float(), self.name), self.size).flatten(1)

    def config(self) -> dict[str, Any]:
        return PixelsConfig(size=self.size).model_dump()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return self  # nothing to move


class NetworkFeature(Feature):
    """A network's vector of an image: the shorter side is resized to `size`, and the centre is cropped."""

    def __init__(self, config: FeatureNetworkConfig, backbone: Backbone):
        # The backbone's size, since the config may leave it open.
        self.name, self.dim, self.size = config.name, backbone.dim, backbone.size
        # Transformers run in 16 bits everywhere; the vector of MobileNetV2, with its 8-bit weights, changes by a fifth.
        self.takes_bf16 = config.name in ("dinov2", "clip-image")
        self._backbone = backbone
        self._config = config.pinned(backbone.sha256, backbone.root, size=backbone.size)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        # The vector is float32 whatever the network computes in.
        return self._backbone.vector(self._input(resize(images.float(), self.size))).float()

    @torch.no_grad()
    def patches(self, images: Tensor, grid: int) -> Tensor:
        # As many pixels as `size` squared, at the image's aspect, and whole cells of the network's map.
        height, width = images.shape[-2:]
        step, scale = self._backbone.step, self.size / math.sqrt(height * width)
        sides = [self.size, self.size]
        if step is not None:
            sides = [max(1, round(side * scale / step)) * step for side in (height, width)]
        images = images.float()
        if sides != [height, width]:
            images = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)  # bicubic overshoots
        maps = self._backbone.patches(self._input(images)).float()  # [B,D,h,w]
        return F.interpolate(maps, (grid, grid), mode="bilinear", antialias=True)  # [B,D,grid,grid]

    @torch.no_grad()
    def taps(self, images: Tensor) -> list[Tensor]:
        """Return SqueezeNet's seven feature maps [B, D, h, w] of the images at their own size, float32.

        They are for a perceptual distance.

        Raises:
            AtollError: another feature, or images smaller than 17 pixels.
        """
        # Only SqueezeNet has layers that a perceptual distance is calibrated for.
        network = self._backbone.network
        if not isinstance(network, squeezenet.SqueezeNet):
            raise AtollError(f"the feature {self.name!r} has no taps; use 'squeezenet'")
        return [tap.float() for tap in network.taps(self._input(images.float()))]

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **self._config.entry()}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        self._backbone.network.to(device, dtype)
        return self

    def _input(self, images: Tensor) -> Tensor:
        """Return images [B, 1 or 3, h, w] as the network takes them, [B, 3, h, w]; move the network to their device."""
        # Colour channels and device.
        images = rgb(images, self.name)
        weight = next(self._backbone.network.parameters())
        if weight.device != images.device:
            self._backbone.network.to(images.device)
        # Standardised as in the network's training.
        mean, std = self._backbone.mean.to(images.device), self._backbone.std.to(images.device)
        images = (images - mean) / std  # [B,3,h,w]
        return images.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def rgb(images: Tensor, feature: str) -> Tensor:
    """Return images [B, 1 or 3, H, W] as [B, 3, H, W].

    Args:
        images: grey or RGB.
        feature: the name for the error text.

    Raises:
        AtollError: another number of channels.
    """
    # An alpha channel has no meaning for a feature.
    if images.shape[1] not in (1, 3):
        raise AtollError(f"the feature {feature!r} takes images of 1 or 3 channels; got {images.shape[1]}")
    return images.expand(-1, 3, -1, -1)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images [B, C, H, W] in [0, 1] to [B, C, size, size]: bicubic by the shorter side, then a centre crop."""
    # The shorter side becomes `size`.
    height, width = images.shape[-2:]
    if min(height, width) != size:
        shape = [max(size, round(side * size / min(height, width))) for side in (height, width)]
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)  # bicubic overshoots
        height, width = shape
    # The centre of the longer one.
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


_CONFIGS: dict[str, type[BaseModel]] = {
    "hog": HogConfig,
    "pixels": PixelsConfig,
    "dinov2": DINOv2Config,
    "clip-image": CLIPImageConfig,
    "mobilenetv2": MobileNetConfig,
    "squeezenet": SqueezeNetConfig,
    "efficientnet-lite0": EfficientNetConfig,
}


def build_feature(config: Mapping[str, Any], trust: Trust = USER) -> Feature:
    """Create the feature that a manifest's or a card's config describes.

    Args:
        config: its name and options.
        trust: what its weights may reach; `STRANGER` for a card's config.

    Raises:
        AtollError: an unknown name, key or value; weights that are not found, damaged, or not those of the config's
            sha256; a missing package.
    """
    match parse_config("feature", _CONFIGS, config):
        case HogConfig() as checked:
            return Hog(checked.bins, checked.grid)
        case PixelsConfig() as checked:
            return Pixels(checked.size)
        case checked if isinstance(checked, FeatureNetworkConfig):
            return NetworkFeature(checked, load_backbone(checked, trust))
    raise AssertionError("a config without its feature")
