"""What every latent codec does."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from atoll.errors import AtollError

Constant = float | tuple[float, ...]  # one for all channels, or one for each


class Codec(ABC):
    """A frozen encoder and decoder of images. Subclasses are final; `build_codec` creates one from its config.

    It computes on the device of its input, without gradients, and returns float32.

    Attributes:
        name: the name in configs.
        channels: C of the latent.
        factor: image height / latent height, and the same for the width.
        image_channels: c of the images.
    """

    name: str
    channels: int
    factor: int
    image_channels: int

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, c, h, w] in [0, 1] as latents [B, C, h/factor, w/factor] of about unit variance.

        Raises:
            AtollError: another number of channels, or sides that are not multiples of the factor.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, H, W] to images [B, c, H*factor, W*factor], clamped to [0, 1]."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the plain values that are stored in cards."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the codec to a device and set the dtype that it computes in; return it."""


def per_channel(name: str, key: str, value: Constant, channels: int) -> Tensor:
    """Return a constant as [C, 1, 1], or [1, 1, 1] for a single number, float32.

    Raises:
        AtollError: `value` is a list whose length is not `channels`. name, key: of the codec and of the constant.
    """
    # One constant per channel, or one for all.
    values = value if isinstance(value, tuple) else (value,)
    if len(values) not in (1, channels):
        raise AtollError(
            f"codec {name!r}: {key} has {len(values)} values; expected one, or one for each of the {channels} channels"
        )
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
