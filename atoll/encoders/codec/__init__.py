"""Latent codecs: images to latents, and back. The latent's shift and scale are applied only here."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from atoll.encoders.codec.autoencoder import NetworkCodec
from atoll.encoders.codec.base import Codec
from atoll.encoders.codec.diffusers import KINDS, AutoencoderConfig, load_diffusers
from atoll.encoders.codec.pixels import PixelCodec, PixelConfig
from atoll.encoders.codec.taef2 import TAEF2Config, load_taef2
from atoll.encoders.trust import USER, Trust
from atoll.encoders.weights import parse_config

__all__ = ["Codec", "NetworkCodec", "PixelCodec", "build_codec"]

_CONFIGS: dict[str, type[BaseModel]] = {
    "pixels": PixelConfig,
    "taef2": TAEF2Config,
    **dict.fromkeys(KINDS, AutoencoderConfig),
}


def build_codec(config: Mapping[str, Any], trust: Trust = USER) -> Codec:
    """Create the codec that a manifest's or a card's config describes.

    Args:
        config: its name and options.
        trust: what its weights may reach; `STRANGER` for a card's config.

    Raises:
        AtollError: an unknown name, key or value; weights that are not found, damaged, or not those of the config's
            sha256; a missing package.
    """
    match parse_config("codec", _CONFIGS, config):
        case AutoencoderConfig() as checked:
            return NetworkCodec(checked, load_diffusers(checked, trust))
        case TAEF2Config() as checked:
            return NetworkCodec(checked, load_taef2(checked, trust))
        case PixelConfig() as checked:
            return PixelCodec(checked.channels, checked.shift, checked.scale)
    raise AssertionError("a config without its codec")
