"""What is measured: the Fréchet distance of images, and a velocity's error on held-out latents by noise level."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.condition import Condition, Conditions
from atoll.errors import AtollError
from atoll.randomness import seeded_noise
from atoll.schedule import PATH

# (x [B, ...], t [B], condition of B rows) -> dx/dt [B, ...] on the linear path
ConditionedVelocity = Callable[[Tensor, Tensor, Any], Tensor]

# Images of more values than this are averaged 2x2 before their PCA: its covariance has this number squared.
PCA_VALUES_MAX = 1024
# Fewer images than this per dimension on a side, and the Fréchet distance is said to be biased: FID's own habit is
# 10,000 images or more in 2048 dimensions.
BIAS_IMAGES_PER_DIMENSION = 5


class Moments:
    """Mean and covariance of vectors that arrive in batches, in float64; memory D^2, however many there are.

    Chan, Golub & LeVeque 1983: two parts are joined exactly, so statistics of disjoint parts may be merged.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (f - mean)(f - mean)^T

    def update(self, features: Tensor) -> None:
        """Adds features [n, D]."""
        part = Moments(len(self.mean))
        features = features.detach().cpu().double()
        if len(features):
            part.count = len(features)
            part.mean = features.mean(0)
            centred = features - part.mean
            part._scatter = centred.T @ centred
            self.merge(part)

    def merge(self, other: "Moments") -> None:
        """Adds all that `other` has seen."""
        total = self.count + other.count
        if total == 0:
            return
        shift = other.mean - self.mean
        self._scatter = self._scatter + other._scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[D, D], divided by n - 1. Raises AtollError with fewer than two vectors."""
        if self.count < 2:
            raise AtollError(f"a covariance of {self.count} images; expected at least 2")
        return self._scatter / (self.count - 1)

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self._scatter).all())


class TwoMoments(Protocol):
    """Mean [D] and covariance [D, D] of features, float64: `Moments`, or a `Gaussian` that was read from a file."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def covariance(self) -> Tensor: ...
    @property
    def count(self) -> float: ...
    @property
    def finite(self) -> bool: ...


def frechet_distance(a: TwoMoments, b: TwoMoments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), between the Gaussians fitted to two sets of features.

    Heusel et al. 2017, Eq. 6 (Dowson & Landau 1982). S_a S_b has the eigenvalues of the symmetric R S_b R with
    R = S_a^(1/2), so two symmetric eigendecompositions suffice and no imaginary part arises.

    Raises:
        AtollError: fewer than two images on a side, or features that are not finite.
    """
    if not (a.finite and b.finite):
        raise AtollError("the Fréchet distance of features that are not finite: the sampling diverged")
    s_a, s_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(s_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + s_a.trace() + s_b.trace() - 2 * cross
    return max(0.0, float(distance))  # of equal sets the rounding error may be negative


def bias_warning(n: int, m: float, dim: int) -> str | None:
    """What to say of a Fréchet distance between n and m images in `dim` dimensions; None where both are enough.

    The estimate is biased upwards, as 1/n (Chong & Forsyth 2020): two samples of one Gaussian with equal variances lie
    (D + 5)/4 (1/n + 1/m) of its total variance apart (second order in 1/n), which at n = m = 5 D is a tenth. Of n <= D
    images the covariance is singular besides: in most directions nothing was measured.
    """
    side, enough = int(min(n, m)), BIAS_IMAGES_PER_DIMENSION * dim
    if side >= enough:
        return None
    singular = ", and its covariance is singular (no more images than dimensions)" if side <= dim else ""
    return (
        f"a Fréchet distance of {n:,} against {_said(m)} images in {dim:,} dimensions is biased upwards{singular}: "
        f"the smaller side should hold {BIAS_IMAGES_PER_DIMENSION} images per dimension ({enough:,}); measure more "
        f"images, take at most {max(1, side // BIAS_IMAGES_PER_DIMENSION):,} components, or read the kernel "
        "distance, which is unbiased"
    )


def _said(images: float) -> str:
    return f"{images:,.0f}" if math.isfinite(images) else "an unknown number of"


class Features(Protocol):
    """The space that a distance is taken in: `PixelPCA`, or a `FeatureSpace`. `metric_name` names the distance.

    Attributes:
        name: of the space, as it stands in a distance's name ("MNv2-pca64").
        dim: D.
        explained: the share of the variance of the full features that lies in the components kept; 1 where all are.
        sha256: of all that the features depend on: numbers are comparable where it is equal.
    """

    name: str
    dim: int
    explained: float

    @property
    def sha256(self) -> str: ...

    def __call__(self, images: Tensor, /) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> [B, dim]."""


class Named(Protocol):
    """What a space is called by: `Features`, or what a report tells of them."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


# A metric has a name of its own where it is taken in the very space that it was defined in.
_OWN_NAMES = {("FD", "Inception"): "FID", ("KD", "Inception"): "KID", ("MMD", "CLIP"): "CMMD"}


def metric_name(kind: str, features: Named) -> str:
    """What the field calls a metric in a space, and the first 8 letters of the space's hash.

    "FD" (Fréchet distance), "KD" (kernel distance), "MMD" (RBF), "precision", ...: "FD-MNv2-pca64 [3fa9c2d1]". FID and
    KID are of Inception's features, all 2048, and CMMD is of CLIP's; in other spaces they are FD, KD and MMD.
    """
    return f"{_OWN_NAMES.get((kind, features.name), f'{kind}-{features.name}')} [{features.sha256[:8]}]"


def principal_components(moments: TwoMoments, components: int) -> tuple[Tensor, float]:
    """The orthonormal directions [D, components] of most variance, largest first, and the share of it they hold.

    Fewer than asked for where dimensions, or images less one, are fewer. Raises AtollError below two images.
    """
    kept = int(min(components, len(moments.mean), moments.count - 1))
    variances, vectors = torch.linalg.eigh(moments.covariance)
    basis = vectors.flip(1)[:, :kept]
    # An eigenvector's sign is arbitrary; its largest entry is made positive.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * largest.sign(), float(variances[-kept:].sum() / variances.sum())


class PixelPCA:
    """The principal components of pixels: blind to meaning, but needs no pretrained network and no download.

    Not whitened, so a distance here is in squared pixel values (of [0, 1], summed over the image).

    Args:
        mean: [D], D = C H W after pooling.
        basis: [D, components], orthonormal.
        pool: images are averaged over pool x pool before.
        explained: the share of the pixels' variance that lies in the basis; errors outside of it are not seen.
    """

    def __init__(self, mean: Tensor, basis: Tensor, pool: int = 1, explained: float = 1.0):
        self.mean, self.basis, self.pool, self.explained = mean.float(), basis.float(), pool, explained
        self.dim = basis.shape[1]
        self.name = f"pca{self.dim}"

    @classmethod
    def fit(cls, batches: Iterable[Tensor], components: int = 48) -> "PixelPCA":
        """Fitted on batches of images [B, C, H, W]; fewer components where images or pixels are fewer.

        Raises:
            AtollError: fewer than two images.
        """
        fit = PixelFit(components)
        for images in batches:
            fit.update(images)
        return fit.done()

    def __call__(self, images: Tensor, /) -> Tensor:
        return (_pooled(images, self.pool).float() - self.mean) @ self.basis

    @property
    def sha256(self) -> str:
        """Of the fitted mean and basis: distances are comparable where it is equal."""
        data = torch.cat([self.mean[:, None], self.basis], dim=1).contiguous().numpy().tobytes()
        return hashlib.sha256(data).hexdigest()


class PixelFit:
    """A `PixelPCA` in the making, from images that arrive in batches."""

    def __init__(self, components: int):
        self.components, self._pool = components, 1
        self._moments: Moments | None = None

    def update(self, images: Tensor) -> None:
        """Adds images [B, C, H, W], all of one size."""
        if self._moments is None:
            while images[0].numel() / self._pool**2 > PCA_VALUES_MAX and min(images.shape[-2:]) >= 2 * self._pool:
                self._pool *= 2
        vectors = _pooled(images, self._pool)
        self._moments = self._moments or Moments(vectors.shape[1])
        self._moments.update(vectors)

    def done(self) -> PixelPCA:
        """Raises AtollError for fewer than two images."""
        if self._moments is None:
            raise AtollError("a PCA of no images; expected at least 2")
        basis, explained = principal_components(self._moments, self.components)
        return PixelPCA(self._moments.mean, basis, self._pool, explained)


def _pooled(images: Tensor, pool: int) -> Tensor:
    return (F.avg_pool2d(images, pool) if pool > 1 else images).flatten(1)


@dataclass(frozen=True)
class DenoisingError:
    """E |u - (eps - x0)|^2 per latent value, at the times `levels` of the linear path.

    Attributes:
        levels: t, [M].
        by_level: [M].
        mean: over the levels.
        standard_error: of the mean, from the spread between images.
    """

    levels: tuple[float, ...]
    by_level: tuple[float, ...]
    mean: float
    standard_error: float

    @classmethod
    def of(cls, levels: Sequence[float], errors: Tensor) -> "DenoisingError":
        """From the errors [images, M] of `squared_errors`."""
        errors = errors.double()
        spread = errors.mean(1).std() if len(errors) > 1 else torch.tensor(0.0)
        return cls(
            tuple(levels),
            tuple(errors.mean(0).tolist()),
            float(errors.mean()),
            float(spread) / math.sqrt(len(errors)),
        )


def squared_errors(
    velocity: ConditionedVelocity,
    x0: Tensor,
    condition: Condition | Conditions | None,
    levels: Sequence[float],
    seeds: Sequence[int],
) -> Tensor:
    """|u(x_t, t) - (eps - x0)|^2, mean over the values of a latent: [B, M], M = len(levels).

    Conditional flow matching's objective (Lipman et al. 2023, Eq. 9); its least value is the posterior variance, not 0.

    Args:
        x0: latents [B, ...].
        seeds: one per latent, see `noisy_latents`.
    """
    columns = []
    for x, eps, t in noisy_latents(x0, levels, seeds):
        error = velocity(x, t, condition) - (eps - x0)
        columns.append(error.square().flatten(1).mean(1))
    return torch.stack(columns, dim=1)


def noisy_latents(x0: Tensor, levels: Sequence[float], seeds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (x_t [B, ...], eps [B, ...], t [B]) on the linear path at each of the levels.

    Args:
        x0: latents [B, ...].
        levels: times t of the linear path, [M].
        seeds: one per latent; its noise at level m depends on its seed and m alone, whatever is being measured.
    """
    for level, time in enumerate(levels):
        eps = seeded_noise([seed * len(levels) + level for seed in seeds], x0.shape[1:]).to(x0)
        t = torch.full((len(x0),), time, dtype=x0.dtype, device=x0.device)
        yield PATH.diffuse(x0, eps, t), eps, t
