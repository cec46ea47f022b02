"""Latent codecs: images to what is diffused, and back. The latent's shift and scale live only here."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from atoll.errors import AtollError


class Codec(ABC):
    """A frozen pair of maps. Subclasses are final; `build_codec` makes one again from its config."""

    name: ClassVar[str]
    channels: int  # C of the latent
    factor: int  # image height / latent height, and the same for the width

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images [B,c,h,w] in [0,1] to latents [B,C,h/factor,w/factor] of about unit variance."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,H,W] to images [B,c,H*factor,W*factor], clamped to [0,1]."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The plain values that stand in cards."""


class PixelConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["pixels"] = "pixels"
    channels: Literal[1, 3] = 1
    shift: float = 0.0  # the data's mean, and
    scale: float = Field(1.0, gt=0)  # one over its standard deviation, once it is mapped to [-1,1]


class PixelCodec(Codec):
    """No codec: latent = (2 image - 1 - shift) * scale."""

    name = "pixels"
    factor = 1

    def __init__(self, channels: Literal[1, 3] = 1, shift: float = 0.0, scale: float = 1.0):
        self._config = PixelConfig(channels=channels, shift=shift, scale=scale)
        self.channels = channels

    def encode(self, images: Tensor) -> Tensor:
        if images.shape[-3] != self.channels:
            raise AtollError(
                f"the images have {images.shape[-3]} channels, the codec 'pixels' is set to {self.channels}: "
                f"set codec.channels to {images.shape[-3]}"
            )
        return (2 * images - 1 - self._config.shift) * self._config.scale

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents / self._config.scale + self._config.shift + 1) / 2).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        return self._config.model_dump()


def build_codec(config: Mapping[str, Any]) -> Codec:
    """The codec that a card's config describes. Raises AtollError for an unknown name, key or value."""
    if config.get("name") != PixelCodec.name:
        raise AtollError(f"unknown codec {config.get('name')!r}; known: {PixelCodec.name!r}")
    try:
        checked = PixelConfig.model_validate(dict(config))
    except ValidationError as error:
        where, message = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise AtollError(f"codec 'pixels': {'.'.join(map(str, where))}: {message}") from error
    return PixelCodec(checked.channels, checked.shift, checked.scale)
