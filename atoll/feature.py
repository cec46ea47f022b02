"""The vector per image that is clustered. "hog" needs no download and no fitting."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional as F

from atoll.errors import AtollError


class Feature(ABC):
    """A frozen map from images to vectors. Subclasses are final; `build_feature` makes one again from its config."""

    name: ClassVar[str]
    dim: int

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [0,1] to features [B,dim] float32, on the same device."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The plain values that stand in cards."""


class HogConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["hog"] = "hog"
    bins: int = Field(4, ge=2)
    grid: int = Field(8, ge=1)


class Hog(Feature):
    """Histograms of gradient orientations (Dalal and Triggs 2005), `bins` per cell of a `grid` x `grid` over the image.

    Orientations are unsigned, so that dark on light equals light on dark. The square root of the histograms, at unit
    length, is compared: distances between such vectors are Hellinger distances (Arandjelovic and Zisserman 2012). An
    image without any edge gives zeros. Chosen among 24 features by how well k-means finds the glyphs' kinds and keeps a
    character together over the faces (docs/log.md).
    """

    name = "hog"

    def __init__(self, bins: int = 4, grid: int = 8):
        self._config = HogConfig(bins=bins, grid=grid)
        self.bins, self.grid = bins, grid
        self.dim = bins * grid * grid

    def __call__(self, images: Tensor) -> Tensor:
        grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")  # [B,1,H+2,W+2]
        dx = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]  # [B,1,H,W]
        dy = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
        strength = torch.hypot(dx, dy)
        place = torch.atan2(dy, dx) * (self.bins / math.pi)  # each half turn passes all bins once
        low = place.floor()
        share = place - low  # a gradient counts for the two nearest bins, the nearer the more
        maps = grey.new_zeros(len(grey), self.bins, *images.shape[-2:])  # [B,bins,H,W]
        maps.scatter_add_(1, low.long() % self.bins, strength * (1 - share))
        maps.scatter_add_(1, (low.long() + 1) % self.bins, strength * share)
        cells = F.adaptive_avg_pool2d(maps, self.grid).flatten(1)  # [B,bins*grid*grid]
        return F.normalize(cells.sqrt())

    def config(self) -> dict[str, Any]:
        return self._config.model_dump()


def build_feature(config: Mapping[str, Any]) -> Feature:
    """The feature that a card's config describes. Raises AtollError for an unknown name, key or value."""
    if config.get("name") != Hog.name:
        raise AtollError(f"unknown feature {config.get('name')!r}; expected {Hog.name!r}")
    try:
        checked = HogConfig.model_validate(dict(config))
    except ValidationError as error:
        where, message = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise AtollError(f"feature 'hog': {'.'.join(map(str, where))}: {message}") from error
    return Hog(checked.bins, checked.grid)
