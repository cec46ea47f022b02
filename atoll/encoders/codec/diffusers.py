"""The image autoencoders of diffusers: a fixed list, each with its own way of encoding."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

from torch import Tensor

from atoll.encoders.codec.autoencoder import Autoencoder, Standardised
from atoll.encoders.codec.base import Constant
from atoll.encoders.codec.extents import extent_of
from atoll.encoders.trust import Trust
from atoll.encoders.weights import PretrainedConfig, load_pretrained, pretrained_files, require_sha256, sha256_files
from atoll.errors import AtollError

Step = Callable[[Tensor], Tensor]


class AutoencoderConfig(Standardised, PretrainedConfig):
    """An image autoencoder of diffusers, by a name of `KINDS`.

    z is the mean of its posterior, so that an image has one latent. Sampling the posterior would add little compared
    with the latents' own spread: these networks are trained with a KL term weighted by 1e-6.
    """

    name: Literal["kl", "asymmetric-kl", "tiny", "flux2", "dc", "hunyuan", "qwen", "wan", "kvae", "rae"]


@dataclass(frozen=True)
class Kind:
    """A class of diffusers.

    Attributes:
        cls: its name.
        steps: the network -> (encode, decode) of images in [0, 1] and z.
        constants: the network -> (shift, scale), as diffusers' pipelines apply them; read before it is cast.
    """

    cls: str
    steps: Callable[[Any], tuple[Step, Step]]
    constants: Callable[[Any], tuple[Constant, Constant]]


def load_diffusers(config: AutoencoderConfig, trust: Trust) -> Autoencoder:
    """Load a network in float32.

    Raises:
        AtollError: as `build_codec`; a latent size that its config.json does not say.
    """
    kind = KINDS[config.name]
    # The subfolder is where a whole pipeline keeps its codec.
    root = config.find(trust, (config.subfolder,))
    directory = root / config.subfolder
    # Check the hash before anything is loaded.
    sha256 = sha256_files(pretrained_files(directory, "diffusion_pytorch_model"))
    require_sha256(f"codec {config.name!r}", directory, sha256, config.sha256)
    network: Any = load_pretrained("diffusers", {kind.cls: kind.cls}, directory)
    # The sizes, the constants and the calls of this class.
    own = network.config
    extent, (shift, scale), (encode, decode) = extent_of(config.name, own), kind.constants(network), kind.steps(network)
    channels = next(own[key] for key in ("in_channels", "input_channels", "num_channels") if key in own)
    if channels not in (1, 3):
        raise AtollError(f"{directory}: takes images of {channels} channels; expected a codec of 1 or 3")
    return Autoencoder(
        network=network,
        encode=encode,
        decode=decode,
        image_channels=channels,
        channels=extent.channels,
        factor=extent.factor,
        side=extent.side,
        sha256=sha256,
        root=root,
        shift=shift,
        scale=scale,
    )


def _posterior(network: Any) -> tuple[Step, Step]:
    """Images in [-1, 1]; the mean of the posterior."""
    return (
        lambda images: network.encode(2 * images - 1).latent_dist.mode(),
        lambda z: (network.decode(z).sample + 1) / 2,
    )


def _plain(field: str) -> Callable[[Any], tuple[Step, Step]]:
    """Images in [-1, 1]; z is a field of the output."""
    return lambda network: (
        lambda images: getattr(network.encode(2 * images - 1), field),
        lambda z: (network.decode(z).sample + 1) / 2,
    )


def _frame(network: Any) -> tuple[Step, Step]:
    """A codec of video, for videos of one frame: [B, c, 1, h, w] and z [B, C, 1, H, W]."""
    encode, decode = _posterior(network)
    lock = Lock()  # the network stores features of earlier frames in itself

    def one_frame(step: Step) -> Step:
        def call(x: Tensor) -> Tensor:
            with lock:
                return step(x.unsqueeze(2)).squeeze(2)

        return call

    return one_frame(encode), one_frame(decode)


def _patches(network: Any) -> tuple[Step, Step]:
    """FLUX.2's: the latent pixels of each patch are channels of one, C * p * p of them."""
    encode, decode = _posterior(network)
    p, q = network.config.patch_size

    def pack(images: Tensor) -> Tensor:
        z = encode(images)  # [B, C, H p, W q]
        b, c, h, w = z.shape
        z = z.reshape(b, c, h // p, p, w // q, q).permute(0, 1, 3, 5, 2, 4)  # [B, C, p, q, H, W]
        return z.reshape(b, c * p * q, h // p, w // q)

    def unpack(z: Tensor) -> Tensor:
        b, c, h, w = z.shape
        z = z.reshape(b, c // (p * q), p, q, h, w).permute(0, 1, 4, 2, 5, 3)  # [B, C, H, p, W, q]
        return decode(z.reshape(b, c // (p * q), h * p, w * q))

    return pack, unpack


def _representation(network: Any) -> tuple[Step, Step]:
    """RAE: images in [0, 1]; the network normalises its latents itself."""
    return lambda images: network.encode(images).latent, lambda z: network.decode(z).sample


def _config_constants(network: Any) -> tuple[Constant, Constant]:
    """The constants in the config: one scale and shift, or a mean and a deviation of each channel."""
    own = network.config
    # Many config.json files hold None, which means no shift and no scale.
    shift, scale = own.get("shift_factor") or 0.0, own.get("scaling_factor") or 1.0
    mean, std = own.get("latents_mean"), own.get("latents_std")
    if mean is None or std is None:
        return shift, scale
    return tuple(mean), tuple(scale / one for one in std)


def _batch_norm(network: Any) -> tuple[Constant, Constant]:
    """FLUX.2's: the statistics of a batch norm that the network itself never applies."""
    mean, variance = network.bn.running_mean.tolist(), network.bn.running_var.tolist()
    return tuple(mean), tuple(1 / math.sqrt(one + network.config.batch_norm_eps) for one in variance)


KINDS: dict[str, Kind] = {
    "kl": Kind("AutoencoderKL", _posterior, _config_constants),  # sd-vae-ft-mse, SDXL's, SD3's, FLUX.1's
    "asymmetric-kl": Kind("AsymmetricAutoencoderKL", _posterior, _config_constants),
    "tiny": Kind("AutoencoderTiny", _plain("latents"), _config_constants),  # TAESD, TAESDXL, TAESD3, TAEF1
    "flux2": Kind("AutoencoderKLFlux2", _patches, _batch_norm),
    "dc": Kind("AutoencoderDC", _plain("latent"), _config_constants),  # Sana's
    "hunyuan": Kind("AutoencoderKLHunyuanImage", _posterior, _config_constants),
    "qwen": Kind("AutoencoderKLQwenImage", _frame, _config_constants),
    "wan": Kind("AutoencoderKLWan", _frame, _config_constants),
    "kvae": Kind("AutoencoderKLKVAE", _posterior, _config_constants),
    "rae": Kind("AutoencoderRAE", _representation, lambda network: (0.0, 1.0)),
}
