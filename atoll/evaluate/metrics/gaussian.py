"""Mean and covariance of reference images' features, read from a file: published ones, or those of images that are
not at hand, as those of a collective's private data.

STATISTICS.safetensors   mean [D], covariance [D, D], float64; in its metadata network, size and number of the images
STATISTICS.npz           mu [D], sigma [D, D], as pytorch-fid, clean-fid and ADM write them; it names no network
"""

import json
import math
import zipfile
from collections.abc import Sequence
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

FORMAT = "atoll-statistics-1"


@dataclass(frozen=True)
class Gaussian:
    """What a Fréchet distance is taken to.

    Attributes:
        name: of the file, and the first letters of its hash.
        sha256: of the file.
        mean, covariance: [D] and [D, D], float64.
        count: of the images; infinity where the file does not tell.
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
        """That of (f - mean) @ basis."""
        mean, basis = mean.double(), basis.double()
        return Gaussian(
            self.name, self.sha256, (self.mean - mean) @ basis, basis.T @ self.covariance @ basis, self.count
        )


def save_gaussian(file: Path, moments: Moments, feature: Feature, image_shape: Sequence[int], about: str = "") -> None:
    """Writes `file`, as a whole or not at all.

    Args:
        moments: of the feature's vectors.
        image_shape: [C, H, W] of the images.
        about: what they are, in words.
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
    """Reads what `save_gaussian` wrote, or an .npz with mu and sigma.

    Args:
        feature, image_shape: of what it will be compared with.

    Raises:
        AtollError: a file that is missing, damaged, or of another feature network or size of images. An .npz names
            neither: only its dimensions can be checked.
    """
    if not file.is_file():
        raise AtollError(
            f"{file}: not found; expected reference statistics (.safetensors of `atoll statistics`, or .npz)"
        )
    read = _read_npz if file.suffix == ".npz" else _read_safetensors
    mean, covariance, metadata = read(file)
    try:
        count = float(metadata.get("count", "inf"))
        if metadata:
            _check_made_of(file, metadata, feature, image_shape)
    except (KeyError, ValueError, TypeError) as error:
        raise AtollError(f"{file}: its metadata cannot be read ({error}); make it by `atoll statistics`") from None
    sizes = (tuple(mean.shape), tuple(covariance.shape))
    if sizes != ((feature.dim,), (feature.dim, feature.dim)):
        raise AtollError(
            f"{file}: a mean of {list(sizes[0])} and a covariance of {list(sizes[1])}, the feature {feature.name!r} "
            f"has {feature.dim} dimensions; name the statistics of this network, or the network of these statistics"
        )
    sha256 = sha256_file(file)
    found = Gaussian(f"{file.stem} [{sha256[:8]}]", sha256, mean.double(), covariance.double(), count)
    scale = float(found.covariance.abs().max())
    if not found.finite or float((found.covariance - found.covariance.T).abs().max()) > 1e-6 * scale:
        raise AtollError(f"{file}: its covariance is not finite and symmetric; make the statistics again")
    return found


def _read_safetensors(file: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise AtollError(
                    f"{file}: format {metadata.get('format')!r}, expected {FORMAT!r}; make it by `atoll statistics`"
                )
            return content.get_tensor("mean"), content.get_tensor("covariance"), metadata
    except (SafetensorError, OSError) as error:
        raise AtollError(f"{file}: cannot be read ({error}); get a fresh copy") from None


def _read_npz(file: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    try:
        with np.load(file, allow_pickle=False) as content:
            missing = [key for key in ("mu", "sigma") if key not in content]
            if missing:
                raise AtollError(
                    f"{file}: holds {', '.join(content)}; expected mu and sigma, as pytorch-fid writes them"
                )
            mean, covariance = (torch.from_numpy(np.asarray(content[key], dtype=np.float64)) for key in ("mu", "sigma"))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise AtollError(f"{file}: cannot be read ({error}); get a fresh copy") from None
    return mean, covariance, {}


def _check_made_of(file: Path, metadata: dict[str, str], feature: Feature, image_shape: Sequence[int]) -> None:
    theirs: dict[str, Any] = json.loads(metadata["feature"])
    ours = identity(feature.config())
    other = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if other:
        said = ", ".join(f"{key} {str(theirs.get(key))[:16]} (here {str(ours.get(key))[:16]})" for key in other)
        raise AtollError(f"{file}: statistics of another feature network: {said}; make them by `atoll statistics` here")
    size = json.loads(metadata["image"])
    if size != list(image_shape):
        raise AtollError(
            f"{file}: statistics of images {size}, these are {list(image_shape)}; the distance would be between two "
            "resolutions: make them by `atoll statistics` from data encoded at this size"
        )
