"""Latent codecs: images to latents, and back. The latent's shift and scale are applied only here."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from atoll.encoders.find import is_beside_card
from atoll.encoders.trust import USER, Trust
from atoll.encoders.weights import (
    PretrainedConfig,
    WeightsConfig,
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
from atoll.storage.torch_file import read_torch

# Pixels per call of a network on a CPU: four images of 128 x 128. Their activations stay in the processor's cache, so a
# batch of four is up to a third faster than one of 16.
CPU_PIXELS = 2**16


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


class PixelConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["pixels"] = "pixels"
    channels: Literal[1, 3] = 1
    shift: float = 0.0  # the mean of the data, mapped to [-1, 1]
    scale: float = Field(1.0, gt=0)  # 1 / standard deviation of the same


class PixelCodec(Codec):
    """No codec: latent = (2 image - 1 - shift) * scale."""

    name = "pixels"
    factor = 1

    def __init__(self, channels: Literal[1, 3] = 1, shift: float = 0.0, scale: float = 1.0):
        # Validated like a manifest's, also if created directly.
        self._config = PixelConfig(channels=channels, shift=shift, scale=scale)
        self.channels = self.image_channels = channels

    def encode(self, images: Tensor) -> Tensor:
        # Other channels would pass through, as latents of another shape.
        if images.shape[-3] != self.channels:
            raise AtollError(
                f"the images have {images.shape[-3]} channels, the codec 'pixels' is set to {self.channels}: "
                f"set codec.channels to {images.shape[-3]}"
            )
        # Images are in [0, 1]; standardised data are centred at 0.
        return (2 * images - 1 - self._config.shift) * self._config.scale

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents / self._config.scale + self._config.shift + 1) / 2).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        return self._config.model_dump()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return self  # nothing to move


Positive = Annotated[float, Field(gt=0)]


class Standardised(BaseModel):
    """latent = (z - shift) * scale, with one constant or one per channel; None: the network's own constants.

    They bring the latents to zero mean and unit variance. If a network is used far from its training data (TAEF2 below
    128 pixels), measure mean and 1 / standard deviation of z on the data (with shift 0, scale 1), and set them.
    """

    shift: float | tuple[float, ...] | None = None
    scale: Positive | tuple[Positive, ...] | None = None


class KLConfig(PretrainedConfig, Standardised):
    """diffusers' AutoencoderKL: sd-vae-ft-mse, SDXL's, SD3's, FLUX's.

    z is the mean of its posterior, so that an image has one latent. Sampling the posterior would add little compared
    with the latents' own spread: these networks are trained with a KL term weighted by 1e-6.
    """

    name: Literal["kl"] = "kl"


class TinyConfig(PretrainedConfig, Standardised):
    """diffusers' AutoencoderTiny: TAESD, TAESDXL, TAESD3, TAEF1."""

    name: Literal["tiny"] = "tiny"


class TAEF2Config(WeightsConfig, Standardised):
    """FLUX.2's tiny autoencoder: a directory with taef2_encoder and taef2_decoder, .safetensors or .pth.

    Beside a card only .safetensors is read: an artifact of somebody else holds no pickles.
    """

    name: Literal["taef2"] = "taef2"


CodecNetworkConfig = KLConfig | TinyConfig | TAEF2Config


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
    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0


class NetworkCodec(Codec):
    """A codec with a network: latent = (z - shift) * scale.

    Raises:
        AtollError: `shift` or `scale` in the config is a list whose length is not the number of latent channels.
    """

    def __init__(self, config: CodecNetworkConfig, autoencoder: Autoencoder):
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
        self._shift, self._scale = (self._per_channel(key, value) for key, value in constants.items())
        # Cards store the constants and the hash, so that the codec is the same everywhere.
        self._config = config.pinned(autoencoder.sha256, autoencoder.root, **constants)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        # Refuse what the network would fail on, or crop.
        channels, height, width = images.shape[1:]
        if channels != self.image_channels:
            raise AtollError(f"the codec {self.name!r} takes images of {self.image_channels} channels; got {channels}")
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
        # The inverse of `encode`, in float32.
        z = latents.float() / self._scale.to(latents.device) + self._shift.to(latents.device)
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        return self._run(self._autoencoder.decode, z, pixels).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        # The name comes first in every card.
        return {"name": self.name, **self._config.entry()}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        # The network decides the dtype; latents are returned in float32.
        self._autoencoder.network.to(device, dtype)
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

    def _per_channel(self, key: str, value: float | tuple[float, ...]) -> Tensor:
        """Return a constant as [1, C, 1, 1], or [1, 1, 1, 1] for a single number."""
        # One constant per channel, or one for all.
        values = value if isinstance(value, tuple) else (value,)
        if len(values) not in (1, self.channels):
            raise AtollError(
                f"codec {self.name!r}: {key} has {len(values)} values; expected one, or one for each of the "
                f"{self.channels} channels"
            )
        return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def _load_diffusers(config: KLConfig | TinyConfig, trust: Trust) -> Autoencoder:
    """Load an AutoencoderKL or AutoencoderTiny, both for images in [-1, 1]."""
    # The subfolder is where a whole pipeline keeps its codec.
    root = config.find(trust, (config.subfolder,))
    directory = root / config.subfolder
    # Check the hash before anything is loaded.
    sha256 = sha256_files(pretrained_files(directory, "diffusion_pytorch_model"))
    require_sha256(f"codec {config.name!r}", directory, sha256, config.sha256)
    # Load the network.
    cls = "AutoencoderKL" if config.name == "kl" else "AutoencoderTiny"
    network: Any = load_pretrained("diffusers", {cls: cls}, directory)
    own = network.config
    # Many config.json files hold None, which means no shift and no scale.
    shift, scale = own.shift_factor or 0.0, own.scaling_factor or 1.0
    # The two classes differ in the output of `encode` and in the names of their settings.
    if config.name == "kl":
        encode = lambda images: network.encode(2 * images - 1).latent_dist.mode()  # noqa: E731
        stages = own.block_out_channels
        if own.latents_mean is not None and own.latents_std is not None:  # as diffusers' pipelines apply them
            shift, scale = tuple(own.latents_mean), tuple(scale / std for std in own.latents_std)
    else:
        encode = lambda images: network.encode(2 * images - 1).latents  # noqa: E731
        stages = own.encoder_block_out_channels
    # Each stage but the first halves the sides.
    return Autoencoder(
        network,
        encode,
        lambda z: (network.decode(z).sample + 1) / 2,
        own.in_channels,
        own.latent_channels,
        2 ** (len(stages) - 1),
        sha256,
        root,
        shift,
        scale,
    )


def _load_taef2(config: TAEF2Config, trust: Trust) -> Autoencoder:
    """Load FLUX.2's tiny autoencoder, for images in [0, 1]."""
    # Two files: encoder and decoder.
    directory = config.find(trust)
    files = [_either(directory, f"taef2_{part}") for part in ("encoder", "decoder")]
    sha256 = sha256_weights(directory, [file.name for file in files])
    require_sha256("codec 'taef2'", directory, sha256, config.sha256)
    # They must agree on the latent's channels.
    encoder = taef2.load_encoder(_read_tensors(files[0]), str(files[0]))
    decoder = taef2.load_decoder(_read_tensors(files[1]), str(files[1]))
    if encoder.head.out_channels != decoder.stem.in_channels:
        raise AtollError(
            f"{directory}: the encoder returns {encoder.head.out_channels} channels, the decoder takes "
            f"{decoder.stem.in_channels}; get both from one place"
        )
    # One module, to be moved and cast together.
    network = freeze(nn.ModuleList([encoder, decoder]))
    return Autoencoder(network, encoder, decoder, 3, encoder.head.out_channels, 8, sha256, directory)


def _either(directory: Path, stem: str) -> Path:
    """Return the .safetensors or the .pth file of this stem."""
    # safetensors first: reading it needs no unpickling.
    for file in (directory / f"{stem}.safetensors", directory / f"{stem}.pth"):
        if file.is_file():
            if file.suffix == ".pth" and is_beside_card(file):
                raise AtollError(f"{file}: a pickle, which is never read from an artifact; convert it to safetensors")
            return file
    raise AtollError(f"{directory}: neither {stem}.safetensors nor {stem}.pth; name the directory that holds them")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or .pth file; nothing in either is executed."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise AtollError(f"{file}: {advice(file, error)}") from None
    tensors = read_torch(file)
    # A pickle may hold a whole module instead of its tensors.
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
        case KLConfig() | TinyConfig() as checked:
            return NetworkCodec(checked, _load_diffusers(checked, trust))
        case TAEF2Config() as checked:
            return NetworkCodec(checked, _load_taef2(checked, trust))
        case PixelConfig() as checked:
            return PixelCodec(checked.channels, checked.shift, checked.scale)
    raise AssertionError("a config without its codec")
