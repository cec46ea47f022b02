"""No codec: the latents are the pixels themselves."""

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from atoll.encoders.codec.base import Codec, Constant, per_channel
from atoll.encoders.codec.statistics import Positive, StatisticsChoice
from atoll.errors import AtollError


class PixelConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["pixels"] = "pixels"
    channels: Literal[1, 3] = 1
    # Mean of the data, mapped to [-1, 1], and 1 / standard deviation of the same; one for all channels, or for each.
    shift: float | tuple[float, ...] = 0.0
    scale: Positive | tuple[Positive, ...] = 1.0
    statistics: StatisticsChoice = None


class PixelCodec(Codec):
    """No codec: latent = (2 image - 1 - shift) * scale."""

    name = "pixels"
    factor = 1

    def __init__(self, channels: Literal[1, 3] = 1, shift: Constant = 0.0, scale: Constant = 1.0):
        # Validated like a manifest's, also if created directly.
        self._config = PixelConfig(channels=channels, shift=shift, scale=scale)
        self.channels = self.image_channels = channels
        constants = {"shift": self._config.shift, "scale": self._config.scale}
        self._shift, self._scale = (
            value if isinstance(value, float) else per_channel(self.name, key, value, channels)
            for key, value in constants.items()
        )

    def encode(self, images: Tensor) -> Tensor:
        # Other channels would pass through, as latents of another shape.
        if images.shape[-3] != self.channels:
            raise AtollError(
                f"the images have {images.shape[-3]} channels, the codec 'pixels' is set to {self.channels}: "
                f"set codec.channels to {images.shape[-3]}"
            )
        # Images are in [0, 1]; standardised data are centred at 0.
        return (2 * images - 1 - self._of(self._shift, images)) * self._of(self._scale, images)

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents / self._of(self._scale, latents) + self._of(self._shift, latents) + 1) / 2).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        return self._config.model_dump(mode="json")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return self  # nothing to move

    @staticmethod
    def _of(constant: float | Tensor, x: Tensor) -> float | Tensor:
        """A constant on the device of `x`."""
        return constant.to(x.device) if isinstance(constant, Tensor) else constant
