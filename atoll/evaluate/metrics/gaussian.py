"""Mean and covariance of reference images' features, read from a file: published ones, or those of private images.

    STATISTICS.safetensors   mean [D], covariance [D, D], float64; its metadata name network, image size and count
    STATISTICS.npz           mu [D], sigma [D, D], as pytorch-fid, clean-fid and ADM write them
    STATISTICS.pt            the same two in a dictionary, as torch-fidelity and training scripts save them

A file is read by its content, whatever its suffix. The last two name no network.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from atoll.encoders.feature import Feature
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import Moments
from atoll.storage.artifact import sha256_file, write_bytes
from atoll.storage.content import advice, content_of
from atoll.storage.torch_file import Opaque, read_torch
from atoll.storage.unpacking import NPZ_WRITER, TIMES_COMPRESSED, refuse_bomb

FORMAT = "atoll-statistics-1"
_SAVE = "np.savez(FILE, mu=mean, sigma=covariance)"
_MOMENTS = (("mu", "sigma"), ("mean", "covariance"), ("mean", "cov"))  # the names that others give them


@dataclass(frozen=True)
class Gaussian:
    """The reference of a Fréchet distance.

    Attributes:
        name: the file's name and the first letters of its hash.
        sha256: the file's hash.
        mean, covariance: [D] and [D, D], float64.
        count: the number of images; infinity if the file does not say.
    """

    name: str
    sha256: str
    mean: Tensor
    covariance: Tensor
    count: float = math.inf

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all())

    def projected(self, mean: Tensor, basis: Tensor) -> "Gaussian":
        """The Gaussian of (f - mean) @ basis, with mean [D] and basis [D, d]."""
        # A linear map of a Gaussian is a Gaussian: no image is needed.
        mean, basis = mean.double(), basis.double()
        return Gaussian(
            self.name, self.sha256, (self.mean - mean) @ basis, basis.T @ self.covariance @ basis, self.count
        )


def save_gaussian(file: Path, moments: Moments, feature: Feature, image_shape: Sequence[int], about: str = "") -> None:
    """Write `file` atomically.

    Args:
        moments: the moments of the feature's vectors.
        image_shape: [C, H, W] of the images.
        about: a description of the images.
    """
    metadata = {
        "format": FORMAT,
        "feature": json.dumps(identity(feature.config()), sort_keys=True),
        "image": json.dumps(list(image_shape)),
        "count": str(moments.count),
        "about": about,
    }
    write_bytes(file, save({"mean": moments.mean, "covariance": moments.covariance}, metadata))


def load_gaussian(file: Path, feature: Feature, image_shape: Sequence[int]) -> Gaussian:
    """Read statistics that `save_gaussian` wrote, or mu and sigma in an .npz or a PyTorch file.

    Args:
        feature, image_shape: what it will be compared with.

    Raises:
        AtollError: a file that is missing, damaged, of another kind, or of another feature network or size of images.
            Only the first kind names those; of the others the dimensions are checked.
    """
    if not file.is_file():
        raise AtollError(
            f"{file}: not found; expected reference statistics (.safetensors of `atoll statistics`, or .npz)"
        )
    # What the file holds, and of what it says that it is.
    mean, covariance, metadata = _read(file)
    try:
        count = float(metadata.get("count", "inf"))
        if metadata:
            _check_made_of(file, metadata, feature, image_shape)
    except (KeyError, ValueError, TypeError) as error:
        raise AtollError(f"{file}: its metadata cannot be read ({error}); make it by `atoll statistics`") from None
    # Foreign files name no network; the dimensions still reveal most mistakes.
    sizes = (tuple(mean.shape), tuple(covariance.shape))
    if sizes != ((feature.dim,), (feature.dim, feature.dim)):
        raise AtollError(
            f"{file}: a mean of {list(sizes[0])} and a covariance of {list(sizes[1])}, the feature {feature.name!r} "
            f"has {feature.dim} dimensions; name the statistics of this network, or the network of these statistics"
        )
    # A covariance that is none would make the distance a wrong number, not an error.
    sha256 = sha256_file(file)
    gaussian = Gaussian(f"{file.stem} [{sha256[:8]}]", sha256, mean.double(), covariance.double(), count)
    scale = float(gaussian.covariance.abs().max())
    if not gaussian.finite or float((gaussian.covariance - gaussian.covariance.T).abs().max()) > 1e-6 * scale:
        raise AtollError(
            f"{file}: its covariance is not finite and symmetric; compute it again in float64, from two images or more"
        )
    return gaussian


def _read(file: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    """(mean, covariance, metadata) of a file, by its content. Raises AtollError for other content."""
    try:
        content = content_of(file)
    except OSError as error:
        raise AtollError(f"{file}: {advice(file, error)}") from None
    if content == "safetensors":
        return _read_safetensors(file)
    if content == "npz":
        return _read_npz(file)
    if content in ("torch", "pickle"):
        return _read_torch(file)
    if content == "npy":
        raise AtollError(f"{file}: an .npy file holds one array; expected both mu and sigma in one file: {_SAVE}")
    raise AtollError(f"{file}: {advice(file, 'neither safetensors, .npz nor a PyTorch file')}")


def _read_safetensors(file: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise AtollError(
                    f"{file}: format {metadata.get('format')!r}, expected {FORMAT!r}; make it by `atoll statistics`, "
                    f"or by {_SAVE}"
                )
            return content.get_tensor("mean"), content.get_tensor("covariance"), metadata
    except (SafetensorError, OSError, MemoryError) as error:
        raise AtollError(f"{file}: {advice(file, error)}") from None


def _read_npz(file: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    try:
        refuse_bomb(file, TIMES_COMPRESSED, NPZ_WRITER)
        # No pickles: a downloaded file must not execute code.
        with np.load(file, allow_pickle=False) as content:
            mean, covariance = (_moment(file, name, content[name]) for name in _names(file, content))
            return mean, covariance, {}
    except (ValueError, MemoryError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise AtollError(f"{file}: {advice(file, error)}") from None


def _read_torch(file: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Tensors or arrays in a dictionary that torch.save or pickle wrote. Nothing in it is executed."""
    content = read_torch(file)
    content = content.fields if isinstance(content, Opaque) else content
    if not isinstance(content, Mapping):
        raise AtollError(f"{file}: holds {type(content).__name__}; expected a dictionary of mu and sigma: {_SAVE}")
    mean, covariance = (_moment(file, name, content[name]) for name in _names(file, content))
    return mean, covariance, {}


def _names(file: Path, content: Mapping[str, Any]) -> tuple[str, str]:
    """The names under which a file has mean and covariance. Raises AtollError if it has not both."""
    for pair in _MOMENTS:
        if all(name in content for name in pair):
            return pair
    # List what the file holds instead.
    names = ", ".join(map(str, list(content)[:6])) or "nothing"
    raise AtollError(f"{file}: holds {names}; expected mu and sigma, as pytorch-fid writes them: {_SAVE}")


def _moment(file: Path, name: str, value: Any) -> Tensor:
    """One of the two as a tensor in float64. Raises AtollError unless it is an array of real numbers."""
    # Floating-point tensors become arrays; other tensors fail the check below.
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy() if value.dtype.is_floating_point else value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        kind = value.dtype if isinstance(value, np.ndarray | Tensor) else type(value).__name__
        raise AtollError(f"{file}: {name} is {kind}; expected an array of real numbers: {_SAVE}")
    return torch.from_numpy(np.asarray(value, dtype=np.float64))


def _check_made_of(file: Path, metadata: dict[str, str], feature: Feature, image_shape: Sequence[int]) -> None:
    theirs: dict[str, Any] = json.loads(metadata["feature"])
    ours = identity(feature.config())
    # The settings that differ, whichever side names them.
    other = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if other:
        said = ", ".join(f"{key} {str(theirs.get(key))[:16]} (here {str(ours.get(key))[:16]})" for key in other)
        raise AtollError(f"{file}: statistics of another feature network: {said}; make them by `atoll statistics` here")
    # Features depend on the size of the images.
    size = json.loads(metadata["image"])
    if size != list(image_shape):
        raise AtollError(
            f"{file}: statistics of images {size}, these are {list(image_shape)}; the distance would be between two "
            "resolutions: make them by `atoll statistics` from data encoded at this size"
        )
