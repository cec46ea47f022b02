"""The image autoencoders of diffusers."""

from typing import Any, Literal

from atoll.encoders.codec.autoencoder import Autoencoder, Standardised
from atoll.encoders.trust import Trust
from atoll.encoders.weights import PretrainedConfig, load_pretrained, pretrained_files, require_sha256, sha256_files


class KLConfig(Standardised, PretrainedConfig):
    """diffusers' AutoencoderKL: sd-vae-ft-mse, SDXL's, SD3's, FLUX's.

    z is the mean of its posterior, so that an image has one latent. Sampling the posterior would add little compared
    with the latents' own spread: these networks are trained with a KL term weighted by 1e-6.
    """

    name: Literal["kl"] = "kl"


class TinyConfig(Standardised, PretrainedConfig):
    """diffusers' AutoencoderTiny: TAESD, TAESDXL, TAESD3, TAEF1."""

    name: Literal["tiny"] = "tiny"


def load_diffusers(config: KLConfig | TinyConfig, trust: Trust) -> Autoencoder:
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
