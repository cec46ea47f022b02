"""FLUX.2's tiny autoencoder."""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from atoll.encoders.codec.autoencoder import Autoencoder, Standardised
from atoll.encoders.find import is_beside_card
from atoll.encoders.trust import Trust
from atoll.encoders.weights import freeze, require_sha256, sha256_weights
from atoll.errors import AtollError
from atoll.nn import taef2
from atoll.storage.content import advice
from atoll.storage.torch_file import read_torch


class TAEF2Config(Standardised):
    """FLUX.2's tiny autoencoder: a directory with taef2_encoder and taef2_decoder, .safetensors or .pth.

    Beside a card only .safetensors is read: an artifact of somebody else holds no pickles.
    """

    name: Literal["taef2"] = "taef2"


def load_taef2(config: TAEF2Config, trust: Trust) -> Autoencoder:
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
