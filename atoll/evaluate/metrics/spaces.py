"""The named feature spaces for distances between sets of images, each from a frozen feature network."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from atoll.encoders.feature import Feature, build_feature
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import Moments, principal_components
from atoll.evaluate.metrics.gaussian import Gaussian
from atoll.evaluate.metrics.inception import build_inception

# Feature names within the names of distances.
LABELS = {
    "mobilenetv2": "MNv2",
    "squeezenet": "SqueezeNet",
    "efficientnet-lite0": "ENLite0",
    "dinov2": "DINOv2",
    "clip-image": "CLIP",
    "hog": "HOG",
    "inception": "Inception",
    "pixels": "pixels",
}


class FeatureSpace:
    """A feature of images, whole or projected on its first principal components (not whitened).

    Implements `frechet.Features`. An image with NaN or infinity gets a vector of NaN, whatever the feature network
    would return: it never counts as an image.

    Args:
        feature: frozen.
        mean, basis: [D] and [D, components], orthonormal; None: the whole vector. `fit` computes them.
        explained: fraction of the variance within the basis.
    """

    def __init__(
        self, feature: Feature, mean: Tensor | None = None, basis: Tensor | None = None, explained: float = 1.0
    ):
        # A projection needs both.
        if (mean is None) != (basis is None):
            raise ValueError("a mean without its basis, or a basis without its mean")
        if basis is not None and len(basis) != feature.dim:
            raise ValueError(f"a basis of {len(basis)} dimensions for a feature of {feature.dim}")
        self.feature, self.explained = feature, explained
        self.mean = None if mean is None else mean.float().cpu()
        self.basis = None if basis is None else basis.float().cpu()
        self.dim = feature.dim if basis is None else basis.shape[1]
        self.name = LABELS[feature.name] + ("" if basis is None else f"-pca{self.dim}")
        self._sha256 = hash_of(feature, self.mean, self.basis)

    @classmethod
    def fit(cls, feature: Feature, batches: Iterable[Tensor], components: int) -> "FeatureSpace":
        """Fit the projection on the first components of reference images, batches [B, C, H, W] in [0, 1].

        Few dimensions or images give fewer components. Memory does not grow with the number of images.

        Raises:
            AtollError: fewer than two images, or features that are not finite.
        """
        fit = SpaceFit(feature, components)
        for images in batches:
            fit.update(images)
        return fit.done()

    @classmethod
    def of(cls, feature: Feature, statistics: Gaussian, components: int | None) -> "FeatureSpace":
        """The projection on the first components of reference statistics: the same for everyone who has them."""
        if components is None:
            return cls(feature)
        basis, explained = principal_components(statistics, components)
        return cls(feature, statistics.mean, basis, explained)

    def seen(self, statistics: Gaussian) -> Gaussian:
        """Project statistics of the whole feature into this space."""
        if self.mean is None or self.basis is None:
            return statistics
        return statistics.projected(self.mean, self.basis)

    def __call__(self, images: Tensor, /) -> Tensor:
        vectors = self.feature(images)  # [B,D]
        if self.mean is not None and self.basis is not None:
            vectors = (vectors - self.mean.to(vectors.device)) @ self.basis.to(vectors.device)
        # Some networks return finite numbers for NaN, so check the images themselves.
        broken = ~torch.isfinite(images).flatten(1).all(1)
        return vectors.masked_fill(broken[:, None].to(vectors.device), torch.nan)

    @property
    def sha256(self) -> str:
        """Hash of the network's weights and settings, mean and basis; for whole Inception, of its weights."""
        return self._sha256


class SpaceFit:
    """Fits a projection to images that arrive in batches."""

    def __init__(self, feature: Feature, components: int):
        self.feature, self.components, self._moments = feature, components, Moments(feature.dim)

    def update(self, images: Tensor) -> None:
        """Add images [B, C, H, W]."""
        self._moments.update(self.feature(images))

    def done(self) -> FeatureSpace:
        """Return the fitted space. Raises AtollError for fewer than two images, or features that are not finite."""
        moments, name = self._moments, self.feature.name
        if moments.count < 2:
            raise AtollError(f"the principal components of {moments.count} images; expected at least 2")
        if not moments.finite:
            raise AtollError(f"the feature {name!r} of the reference images is not finite; look at the data")
        basis, explained = principal_components(moments, self.components)
        return FeatureSpace(self.feature, moments.mean, basis, explained)


def build_space_feature(config: Mapping[str, Any]) -> Feature:
    """Like `build_feature`, and also "inception", which is for metrics only."""
    return build_inception(config) if config.get("name") == "inception" else build_feature(config)


def hash_of(feature: Feature, mean: Tensor | None = None, basis: Tensor | None = None) -> str:
    """Hash of a feature and of its projection."""
    config = feature.config()
    if feature.name == "inception" and basis is None:
        return str(config["sha256"])  # the published hash
    # Without paths: the same network elsewhere gets the same hash.
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode())
    for part in (mean, basis):
        if part is not None:
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()
