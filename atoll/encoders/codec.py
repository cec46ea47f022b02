"""Latent codecs: images to what is diffused, and back. The latent's shift and scale live only here."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from atoll.encoders.weights import (
    PretrainedConfig,
    WeightsConfig,
    find_weights,
    freeze,
    load_pretrained,
    parse_config,
    pretrained_files,
    require_sha256,
    sha256_files,
    sha256_weights,
)
from atoll.errors import AtollError
from atoll.nn import taef2
from atoll.storage.content import advice

# Pixels that a network sees at once on a CPU: four images of 128 x 128. Their maps stay in the cache, which makes a
# batch of four up to a third faster than one of 16.
CPU_PIXELS = 2**16


class Codec(ABC):
    """A frozen pair of maps. Subclasses are final; `build_codec` makes one again from its config.

    It computes where its input lies, without gradients, and gives float32.
    """

    name: str
    channels: int  # C of the latent
    factor: int  # image height / latent height, and the same for the width
    image_channels: int  # c of the images

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images [B,c,h,w] in [0,1] to latents [B,C,h/factor,w/factor] of about unit variance.

        Raises:
            AtollError: other channels, or sides that are no multiples of the factor.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,H,W] to images [B,c,H*factor,W*factor], clamped to [0,1]."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The plain values that stand in cards."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Itself, moved to a device; `dtype` is what it computes in."""


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
        self.channels = self.image_channels = channels

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

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return self  # nothing to move


Positive = Annotated[float, Field(gt=0)]


class Standardised(BaseModel):
    """latent = (z - shift) * scale, of all channels or of each; None: the constants that come with the network.

    They bring the latents to zero mean and unit variance. Where a network is used far from what it was made for (TAEF2
    below 128 pixels), measure mean and 1 / standard deviation of z on the data (shift 0, scale 1), and set them.
    """

    shift: float | tuple[float, ...] | None = None
    scale: Positive | tuple[Positive, ...] | None = None


class KLConfig(PretrainedConfig, Standardised):
    """diffusers' AutoencoderKL: sd-vae-ft-mse, SDXL's, SD3's, FLUX's.

    z is the mean of its posterior, so that an image has one latent. What a draw would add is small against the latents'
    own spread: these networks are trained with a KL term weighted by 1e-6.
    """

    name: Literal["kl"] = "kl"


class TinyConfig(PretrainedConfig, Standardised):
    """diffusers' AutoencoderTiny: TAESD, TAESDXL, TAESD3, TAEF1."""

    name: Literal["tiny"] = "tiny"


class TAEF2Config(WeightsConfig, Standardised):
    """FLUX.2's tiny autoencoder: a directory with taef2_encoder and taef2_decoder, .safetensors or .pth."""

    name: Literal["taef2"] = "taef2"


CodecNetworkConfig = KLConfig | TinyConfig | TAEF2Config


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A loaded network: encode gives z [B,C,h/factor,w/factor] of images [B,c,h,w] in [0,1], decode goes back."""

    network: nn.Module  # what is moved and cast
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    image_channels: int
    channels: int
    factor: int
    sha256: str
    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0


class NetworkCodec(Codec):
    """A codec with a network: latent = (z - shift) * scale.

    Raises:
        AtollError: `shift` or `scale` of the config is a list of another length than the latent has channels.
    """

    def __init__(self, config: CodecNetworkConfig, autoencoder: Autoencoder):
        self.name = config.name
        self.channels, self.factor = autoencoder.channels, autoencoder.factor
        self.image_channels = autoencoder.image_channels
        self._autoencoder = autoencoder
        constants = {
            "shift": autoencoder.shift if config.shift is None else config.shift,
            "scale": autoencoder.scale if config.scale is None else config.scale,
        }
        self._shift, self._scale = (self._per_channel(key, value) for key, value in constants.items())
        self._config = config.model_copy(update={**constants, "sha256": autoencoder.sha256})

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        channels, height, width = images.shape[1:]
        if channels != self.image_channels:
            raise AtollError(f"the codec {self.name!r} takes images of {self.image_channels} channels; got {channels}")
        if height % self.factor or width % self.factor:
            raise AtollError(
                f"the codec {self.name!r} takes sides that are multiples of {self.factor}; got {height} x {width}: "
                f"set data.size to {max(height // self.factor, 1) * self.factor}"
            )
        z = self._run(self._autoencoder.encode, images, height * width)  # [B,C,h/factor,w/factor]
        return (z - self._shift.to(z.device)) * self._scale.to(z.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.float() / self._scale.to(latents.device) + self._shift.to(latents.device)
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        return self._run(self._autoencoder.decode, z, pixels).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **self._config.model_dump(mode="json", exclude={"name"})}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        self._autoencoder.network.to(device, dtype)
        return self

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
        """function(x) [B,...] as float32, on the device of x, in the network's dtype; in small batches on a CPU."""
        weight = next(self._autoencoder.network.parameters())
        if weight.device != x.device:
            self._autoencoder.network.to(x.device)
        x = x.to(weight.dtype, memory_format=torch.channels_last)
        size = max(1, CPU_PIXELS // pixels) if x.device.type == "cpu" else max(1, len(x))
        return torch.cat([function(part).float() for part in x.split(size)]).contiguous()

    def _per_channel(self, key: str, value: float | tuple[float, ...]) -> Tensor:
        """[1,C,1,1], or [1,1,1,1] for a single number."""
        values = value if isinstance(value, tuple) else (value,)
        if len(values) not in (1, self.channels):
            raise AtollError(
                f"codec {self.name!r}: {key} has {len(values)} values; expected one, or one for each of the "
                f"{self.channels} channels"
            )
        return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def _load_diffusers(config: KLConfig | TinyConfig) -> Autoencoder:
    """AutoencoderKL or AutoencoderTiny, both for images in [-1,1]."""
    directory = find_weights(config.weights, (config.subfolder,)) / config.subfolder
    found = sha256_files(pretrained_files(directory, "diffusion_pytorch_model"))
    require_sha256(f"codec {config.name!r}", directory, found, config.sha256)
    cls = "AutoencoderKL" if config.name == "kl" else "AutoencoderTiny"
    network: Any = load_pretrained("diffusers", {cls: cls}, directory)
    own = network.config
    # None in the files of many networks, which means that they have none.
    shift, scale = own.shift_factor or 0.0, own.scaling_factor or 1.0
    if config.name == "kl":
        encode = lambda images: network.encode(2 * images - 1).latent_dist.mode()  # noqa: E731
        stages = own.block_out_channels
        if own.latents_mean is not None and own.latents_std is not None:  # as diffusers' pipelines use them
            shift, scale = tuple(own.latents_mean), tuple(scale / std for std in own.latents_std)
    else:
        encode = lambda images: network.encode(2 * images - 1).latents  # noqa: E731
        stages = own.encoder_block_out_channels
    return Autoencoder(
        network,
        encode,
        lambda z: (network.decode(z).sample + 1) / 2,
        own.in_channels,
        own.latent_channels,
        2 ** (len(stages) - 1),
        found,
        shift,
        scale,
    )


def _load_taef2(config: TAEF2Config) -> Autoencoder:
    directory = find_weights(config.weights)
    files = [_either(directory, f"taef2_{part}") for part in ("encoder", "decoder")]
    found = sha256_weights(directory, [file.name for file in files])
    require_sha256("codec 'taef2'", directory, found, config.sha256)
    encoder = taef2.load_encoder(_read_tensors(files[0]), str(files[0]))
    decoder = taef2.load_decoder(_read_tensors(files[1]), str(files[1]))
    if encoder.head.out_channels != decoder.stem.in_channels:
        raise AtollError(
            f"{directory}: the encoder gives {encoder.head.out_channels} channels, the decoder takes "
            f"{decoder.stem.in_channels}; get both from one place"
        )
    network = freeze(nn.ModuleList([encoder, decoder]))
    return Autoencoder(network, encoder, decoder, 3, encoder.head.out_channels, 8, found)


def _either(directory: Path, stem: str) -> Path:
    for file in (directory / f"{stem}.safetensors", directory / f"{stem}.pth"):
        if file.is_file():
            return file
    raise AtollError(f"{directory}: neither {stem}.safetensors nor {stem}.pth; name the directory that holds them")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth; nothing in either is executed."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors errors: whatever a damaged file makes the readers raise
        raise AtollError(f"{file}: {advice(file, error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise AtollError(
            f"{file}: holds no dictionary of tensors; expected the encoder or decoder that taesd publishes"
        )
    return tensors


_CONFIGS: dict[str, type[BaseModel]] = {
    "pixels": PixelConfig,
    "kl": KLConfig,
    "tiny": TinyConfig,
    "taef2": TAEF2Config,
}


def build_codec(config: Mapping[str, Any]) -> Codec:
    """The codec that a manifest's or a card's config describes.

    Raises:
        AtollError: an unknown name, key or value; weights that are not found, damaged, or not those of the config's
            sha256; a missing package.
    """
    match parse_config("codec", _CONFIGS, config):
        case KLConfig() | TinyConfig() as checked:
            return NetworkCodec(checked, _load_diffusers(checked))
        case TAEF2Config() as checked:
            return NetworkCodec(checked, _load_taef2(checked))
        case PixelConfig() as checked:
            return PixelCodec(checked.channels, checked.shift, checked.scale)
    raise AssertionError("a name without its codec")
