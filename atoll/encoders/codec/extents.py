"""The sizes of the latents of diffusers' autoencoders, from a config.json alone; imports no library."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]  # of the network, as in config.json; empty for that of the published weights


@dataclass(frozen=True)
class Extent:
    """The sizes of a codec's latents.

    Attributes:
        channels: C.
        factor: image height / latent height.
        side: the only height and width of its images, in pixels; None for any multiple of the factor.
    """

    channels: int
    factor: int
    side: int | None = None


def extent_of(name: str, config: Config, weights: str = "") -> Extent:
    """Return the sizes of a codec's latents.

    Args:
        name: of the codec, one of `EXTENTS`.
        config: of its network.
        weights: as in atoll.yaml; the name of an AutoencoderDC says its sizes ("dc-ae-f32c32").
    """
    named = re.search(r"f(\d+)c(\d+)", weights)
    if name == "dc" and not config and named:
        return Extent(int(named[2]), int(named[1]))
    return EXTENTS[name](config)


def _stages(key: str, channels: str = "latent_channels", count: int = 4, c: int = 4) -> Callable[[Config], Extent]:
    """Sizes where each stage but the first halves the sides; count, c: of the published weights."""
    return lambda config: Extent(config.get(channels, c), 2 ** (len(config.get(key, range(count))) - 1))


def _flux2(config: Config) -> Extent:
    """32 channels in patches of 2 x 2 latent pixels."""
    inner = _stages("block_out_channels", c=32)(config)
    patch = config.get("patch_size", (2, 2))
    return Extent(inner.channels * math.prod(patch), inner.factor * patch[0])


def _rae(config: Config) -> Extent:
    """One token of the encoder for each patch of the decoder; the encoder's input is resized."""
    patch, read = config.get("patch_size", 16), config.get("encoder_input_size", 224)
    side = patch * (read // config.get("encoder_patch_size", 14))
    return Extent(config.get("encoder_hidden_size", 768), patch, side)


EXTENTS: dict[str, Callable[[Config], Extent]] = {
    "kl": _stages("block_out_channels"),
    "asymmetric-kl": _stages("down_block_out_channels"),
    "tiny": _stages("encoder_block_out_channels"),
    "flux2": _flux2,
    "dc": _stages("encoder_block_out_channels", count=6, c=32),
    "hunyuan": lambda config: Extent(config.get("latent_channels", 64), config.get("spatial_compression_ratio", 32)),
    "qwen": _stages("dim_mult", "z_dim", c=16),
    "wan": lambda config: Extent(config.get("z_dim", 16), config.get("scale_factor_spatial", 8)),
    "kvae": _stages("ch_mult", "z_channels", c=16),
    "rae": _rae,
}
