"""Codecs with a network: what their configs share, and the codec around a loaded network."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from atoll.encoders.codec.base import Codec, Constant, per_channel
from atoll.encoders.codec.statistics import Positive, StatisticsChoice
from atoll.encoders.weights import WeightsConfig
from atoll.errors import AtollError

# Pixels per call of a network on a CPU: four images of 128 x 128. Their activations stay in the processor's cache, so a
# batch of four is up to a third faster than one of 16.
CPU_PIXELS = 2**16


class Standardised(WeightsConfig):
    """latent = (z - shift) * scale, with one constant or one per channel; None: the network's own constants.

    They bring the latents to zero mean and unit variance. `statistics` decides whether those that `atoll encode`
    measures replace them; see `atoll.encoders.codec.statistics`.
    """

    name: str
    shift: Constant | None = None
    scale: Positive | tuple[Positive, ...] | None = None
    statistics: StatisticsChoice = None


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A loaded network.

    Attributes:
        network: the module to move and cast.
        encode: images [B, c, h, w] in [0, 1] -> z [B, C, h/factor, w/factor].
        decode: z -> images.
        image_channels: c.
        channels: C.
        factor: image height / latent height.
        sha256: the hash of its weights.
        root: where they were found.
        side: the only height and width of its images, in pixels; None for any multiple of the factor.
        shift: the network's own constant, or one per channel.
        scale: the same.
    """

    network: nn.Module
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    image_channels: int
    channels: int
    factor: int
    sha256: str
    root: Path
    side: int | None = None
    shift: Constant = 0.0
    scale: Constant = 1.0


class NetworkCodec(Codec):
    """A codec with a network: latent = (z - shift) * scale.

    Raises:
        AtollError: `shift` or `scale` in the config is a list whose length is not the number of latent channels.
    """

    def __init__(self, config: Standardised, autoencoder: Autoencoder):
        # The sizes are those of the loaded network, not of the config.
        self.name = config.name
        self.channels, self.factor = autoencoder.channels, autoencoder.factor
        self.image_channels = autoencoder.image_channels
        self._autoencoder = autoencoder
        # The config's constants, or those that come with the network.
        constants = {
            "shift": autoencoder.shift if config.shift is None else config.shift,
            "scale": autoencoder.scale if config.scale is None else config.scale,
        }
        self._shift, self._scale = (
            per_channel(self.name, key, value, self.channels) for key, value in constants.items()
        )
        # Cards store the constants and the hash, so that the codec is the same everywhere.
        self._config = config.pinned(autoencoder.sha256, autoencoder.root, **constants)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        # Refuse what the network would fail on, or crop.
        channels, height, width = images.shape[1:]
        if channels != self.image_channels:
            raise AtollError(f"the codec {self.name!r} takes images of {self.image_channels} channels; got {channels}")
        self._require_side("takes images", height, width, self._autoencoder.side)
        if height % self.factor or width % self.factor:
            raise AtollError(
                f"the codec {self.name!r} takes sides that are multiples of {self.factor}; got {height} x {width}: "
                f"set data.size to {max(height // self.factor, 1) * self.factor}"
            )

        # Encode, then standardise.
        z = self._run(self._autoencoder.encode, images, height * width)  # [B,C,h/factor,w/factor]
        return (z - self._shift.to(z.device)) * self._scale.to(z.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        side = self._autoencoder.side
        self._require_side("decodes latents", height, width, None if side is None else side // self.factor)
        # The inverse of `encode`, in float32.
        z = latents.float() / self._scale.to(latents.device) + self._shift.to(latents.device)
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        return self._run(self._autoencoder.decode, z, pixels).clamp(0, 1)

    def _require_side(self, what: str, height: int, width: int, side: int | None) -> None:
        """Raise AtollError for another size than the only one, if there is one."""
        if side is not None and (height, width) != (side, side):
            raise AtollError(
                f"the codec {self.name!r} {what} of {side} x {side} alone; got {height} x {width}: set data.size to "
                f"{self._autoencoder.side}"
            )

    def config(self) -> dict[str, Any]:
        # The name comes first in every card.
        return {"name": self.name, **self._config.entry()}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        # The network decides the dtype; latents are returned in float32.
        # As a plain module: diffusers' own `to` warns that some networks have no part to keep in float32.
        nn.Module.to(self._autoencoder.network, device, dtype)
        return self

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
        """Return function(x) [B, ...] as float32, computed in the network's dtype; in small batches on a CPU."""
        # The network follows its input to the device.
        weight = next(self._autoencoder.network.parameters())
        if weight.device != x.device:
            self._autoencoder.network.to(x.device)
        # On a CPU, a few images per call; on a GPU, all of them.
        x = x.to(weight.dtype, memory_format=torch.channels_last)
        size = max(1, CPU_PIXELS // pixels) if x.device.type == "cpu" else max(1, len(x))
        return torch.cat([function(part).float() for part in x.split(size)]).contiguous()
