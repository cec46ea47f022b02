"""Targets of representation: principal components of a frozen network's patch features.

A network of diffusion learns faster if tokens in its middle predict features of the clean image (REPA, arXiv
2410.06940). The features are those of a few hundred dimensions; their leading components are enough (ReDi, arXiv
2504.16064, takes 8) and fit beside the latents. All images of a run share one set of components, so that all experts
learn to predict the same quantities.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.encoders.feature import PATCH_FEATURES, Feature
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.storage.artifact import write_bytes
from atoll.storage.cards import TargetsRecord

COMPONENTS = "targets.safetensors"  # the components, in encoded/
_SMALLEST = 1e-6  # variance of a component over that of the first: below, it is rounding


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of patch features.

    Attributes:
        mean: of the features, [D] float32.
        directions: orthonormal, [d,D] float32, the one of the largest variance first.
        deviation: standard deviation along each of them, [d] float32.
    """

    mean: Tensor
    directions: Tensor
    deviation: Tensor

    def __call__(self, maps: Tensor) -> Tensor:
        """Return the coordinates [B,d,h,w] of features [B,D,h,w], of unit variance where the components were fitted."""
        mean, directions, deviation = (
            tensor.to(maps.device) for tensor in (self.mean, self.directions, self.deviation)
        )
        centred = maps.float() - mean[:, None, None]  # [B,D,h,w]
        return torch.einsum("dD,BDhw->Bdhw", directions / deviation[:, None], centred)

    def write(self, file: Path) -> None:
        """Write the components to a file, atomically."""
        from safetensors.torch import save

        write_bytes(file, save({name: getattr(self, name) for name in ("mean", "directions", "deviation")}))

    @staticmethod
    def read(file: Path, dims: int) -> "Components":
        """Read a file of `dims` components. Raises AtollError if it is damaged or has others."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                components = Components(*(opened.get_tensor(name) for name in ("mean", "directions", "deviation")))
        except (OSError, SafetensorError) as error:
            raise AtollError(f"{file}: cannot be read ({error}); encode again with --force") from None
        mean, directions, deviation = components.mean, components.directions, components.deviation
        if directions.shape != (dims, *mean.shape) or deviation.shape != (dims,):
            raise AtollError(
                f"{file}: holds components {list(directions.shape)}; expected {dims} rows; encode again with --force"
            )
        return components


class FeatureMoments:
    """The sums that principal components follow from, in float64."""

    def __init__(self) -> None:
        self.count = 0  # feature vectors
        self._total = torch.zeros(0, dtype=torch.float64)
        self._products = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, maps: Tensor) -> None:
        """Add features [B,D,h,w]; images with a value that is not finite are left out."""
        maps = maps[maps.flatten(1).isfinite().all(1)].cpu().double()  # [b,D,h,w]
        vectors = maps.transpose(0, 1).flatten(1)  # [D,bhw]
        if not self.count:
            self._total, self._products = vectors.new_zeros(len(vectors)), vectors.new_zeros(len(vectors), len(vectors))
        self.count += vectors.shape[1]
        self._total += vectors.sum(1)
        self._products += vectors @ vectors.T

    def components(self, dims: int) -> Components:
        """Return the leading components.

        The sign of a direction is such that its largest entry is positive.

        Raises:
            AtollError: the features vary in fewer directions.
        """
        mean = self._total / max(1, self.count)
        variance, directions = torch.linalg.eigh(self._products / max(1, self.count) - torch.outer(mean, mean))
        # The largest variance first: eigh sorts upwards.
        variance, directions = variance.flip(0), directions.T.flip(0)  # [D], [D,D]
        varying = int((variance > _SMALLEST * variance[:1].clamp(min=0)).sum())
        if varying < dims:
            raise AtollError(
                f"targets.dims is {dims}, and the patch features of {self.count:,} places vary in "
                f"{varying} directions; lower targets.dims, or take more images"
            )
        directions = directions[:dims]
        signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()  # [d,1]
        return Components(mean.float(), (directions * signs).float().contiguous(), variance[:dims].sqrt().float())


@dataclass(frozen=True, eq=False)
class TargetNetwork:
    """What computes the targets of images: a frozen network, and the components of its features.

    Attributes:
        feature: the network.
        dims: components per place.
        grid: places per side.
        components: None until they are fitted or read.
    """

    feature: Feature
    dims: int
    grid: int
    components: Components | None = None

    def __post_init__(self) -> None:
        if self.feature.name not in PATCH_FEATURES:
            raise AtollError(
                f"targets.feature: {self.feature.name!r} has no patch features; use one of {', '.join(PATCH_FEATURES)}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Return the targets [B,dims,grid,grid] float16 of images [B,C,H,W] in [0, 1]."""
        assert self.components is not None
        return self.components(self.feature.patches(images, self.grid)).half()

    def record(self, sha256: str | None = None) -> TargetsRecord:
        """Return the card's record. sha256: of the components' file, if it is known."""
        about: dict[str, Any] = {} if sha256 is None else {"sha256": sha256}
        # Without the place of the weights: nobody needs them to train on targets.
        return TargetsRecord(feature=identity(self.feature.config()), dims=self.dims, grid=self.grid, **about)
