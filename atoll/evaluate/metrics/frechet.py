"""The Fréchet distance of images, and a velocity's error on held-out latents by noise level."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.randomness import seeded_noise
from atoll.schedule import PATH

# (x [B, ...], t [B], condition of B rows) -> dx/dt [B, ...] on the linear path
ConditionedVelocity = Callable[[Tensor, Tensor, Any], Tensor]

# Images of more values than this are averaged 2x2 before their PCA: its covariance has this number squared.
PCA_VALUES_MAX = 1024
# With fewer images per dimension than this, the report warns that the Fréchet distance is biased. FID is usually
# computed from 10,000 images or more in 2048 dimensions.
BIAS_IMAGES_PER_DIMENSION = 5


class Moments:
    """Running mean and covariance of vectors in float64; memory is D^2, however many arrive.

    Statistics of disjoint parts merge exactly (Chan, Golub & LeVeque 1983).
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (f - mean)(f - mean)^T

    def update(self, features: Tensor) -> None:
        """Add features [n, D]."""
        # Moments of the batch alone, merged into the running ones.
        part = Moments(len(self.mean))
        features = features.detach().cpu().double()
        if len(features):
            part.count = len(features)
            part.mean = features.mean(0)
            centred = features - part.mean
            part._scatter = centred.T @ centred
            self.merge(part)

    def merge(self, other: "Moments") -> None:
        """Add everything that `other` holds."""
        total = self.count + other.count
        if total == 0:
            return
        # The scatter around the joint mean includes the distance between the two means.
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
    """Mean [D] and covariance [D, D] of features, float64: `Moments`, or a `Gaussian` from a file."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def covariance(self) -> Tensor: ...
    @property
    def count(self) -> float: ...
    @property
    def finite(self) -> bool: ...


def frechet_distance(a: TwoMoments, b: TwoMoments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): the distance of Gaussians fitted to two sets of features.

    Heusel et al. 2017, Eq. 6 (Dowson & Landau 1982). S_a S_b has the eigenvalues of the symmetric R S_b R with
    R = S_a^(1/2), so two symmetric eigendecompositions suffice and no imaginary part arises.

    Raises:
        AtollError: fewer than two images on a side, or features that are not finite.
    """
    if not (a.finite and b.finite):
        raise AtollError("the Fréchet distance of features that are not finite: the sampling diverged")
    # The trace of the square root, from eigenvalues of a symmetric matrix.
    s_a, s_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(s_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + s_a.trace() + s_b.trace() - 2 * cross
    return max(0.0, float(distance))  # for equal sets, rounding can make it negative


def bias_warning(n: int, m: float, dim: int) -> str | None:
    """Warn about a Fréchet distance between n and m images in `dim` dimensions; None if there are enough.

    The estimate is biased upwards, as 1/n (Chong & Forsyth 2020): for two samples of one Gaussian with equal variances
    it is (D + 5)/4 (1/n + 1/m) of the total variance (second order in 1/n), a tenth at n = m = 5 D. With n <= D
    images the covariance is also singular: most directions were not measured.
    """
    # The smaller side dominates the bias.
    side, enough = int(min(n, m)), BIAS_IMAGES_PER_DIMENSION * dim
    if side >= enough:
        return None
    singular = ", and its covariance is singular (no more images than dimensions)" if side <= dim else ""
    return (
        f"a Fréchet distance of {n:,} against {_count_text(m)} images in {dim:,} dimensions is biased upwards"
        f"{singular}: the smaller side should hold {BIAS_IMAGES_PER_DIMENSION} images per dimension ({enough:,}); "
        f"measure more images, take at most {max(1, side // BIAS_IMAGES_PER_DIMENSION):,} components, or read the "
        "kernel distance, which is unbiased"
    )


def _count_text(images: float) -> str:
    return f"{images:,.0f}" if math.isfinite(images) else "an unknown number of"


class Features(Protocol):
    """A feature space for distances: `PixelPCA` or a `FeatureSpace`. `metric_name` names the distance.

    Attributes:
        name: of the space, as part of a distance's name ("MNv2-pca64").
        dim: D.
        explained: fraction of the full features' variance within the components; 1 without a projection.
        sha256: of everything that the features depend on; numbers are comparable if it is equal.
    """

    name: str
    dim: int
    explained: float

    @property
    def sha256(self) -> str: ...

    def __call__(self, images: Tensor, /) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> [B, dim]."""


class Named(Protocol):
    """A name and a hash: `Features`, or their description in a report."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


# A metric in the space that it was defined in has a name of its own.
_OWN_NAMES = {("FD", "Inception"): "FID", ("KD", "Inception"): "KID", ("MMD", "CLIP"): "CMMD"}


def metric_name(kind: str, features: Named) -> str:
    """The field's name of a metric in a space, with the first 8 digits of the space's hash.

    For kinds such as "FD" (Fréchet distance), "KD" (kernel distance), "MMD" (RBF) or "precision":
    "FD-MNv2-pca64 [3fa9c2d1]". FID and KID are defined in all 2048 of Inception's features, CMMD in CLIP's; in other
    spaces they are called FD, KD and MMD.
    """
    return f"{_OWN_NAMES.get((kind, features.name), f'{kind}-{features.name}')} [{features.sha256[:8]}]"


def principal_components(moments: TwoMoments, components: int) -> tuple[Tensor, float]:
    """The orthonormal directions [D, components] of largest variance, in order, and the fraction of it within them.

    There are at most as many as dimensions, and as images minus one. Raises AtollError below two images.
    """
    # n centred vectors span at most n - 1 directions.
    count = int(min(components, len(moments.mean), moments.count - 1))
    variances, vectors = torch.linalg.eigh(moments.covariance)
    basis = vectors.flip(1)[:, :count]
    # An eigenvector's sign is arbitrary: make its largest entry positive.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * largest.sign(), float(variances[-count:].sum() / variances.sum())


class PixelPCA:
    """The principal components of pixels: blind to meaning, but without a pretrained network or a download.

    Not whitened, so a distance here is in squared pixel values (in [0, 1], summed over the image).

    Args:
        mean: [D], D = C H W after pooling.
        basis: [D, components], orthonormal.
        pool: images are averaged over pool x pool pixels first.
        explained: fraction of the pixels' variance within the basis; errors outside of it are invisible.
    """

    def __init__(self, mean: Tensor, basis: Tensor, pool: int = 1, explained: float = 1.0):
        self.mean, self.basis, self.pool, self.explained = mean.float(), basis.float(), pool, explained
        self.dim = basis.shape[1]
        self.name = f"pca{self.dim}"

    @classmethod
    def fit(cls, batches: Iterable[Tensor], components: int = 48) -> "PixelPCA":
        """Fit on batches of images [B, C, H, W]; few images or pixels give fewer components.

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
        """Hash of the fitted mean and basis; distances are comparable if it is equal."""
        data = torch.cat([self.mean[:, None], self.basis], dim=1).contiguous().numpy().tobytes()
        return hashlib.sha256(data).hexdigest()


class PixelFit:
    """Fits a `PixelPCA` to images that arrive in batches."""

    def __init__(self, components: int):
        self.components, self._pool = components, 1
        self._moments: Moments | None = None

    def update(self, images: Tensor) -> None:
        """Add images [B, C, H, W], all of one size."""
        # The first batch sets the pooling: halve the size until the covariance is small enough.
        if self._moments is None:
            while images[0].numel() / self._pool**2 > PCA_VALUES_MAX and min(images.shape[-2:]) >= 2 * self._pool:
                self._pool *= 2
        # Later batches have the same pooling.
        vectors = _pooled(images, self._pool)
        self._moments = self._moments or Moments(vectors.shape[1])
        self._moments.update(vectors)

    def done(self) -> PixelPCA:
        """Return the fitted PCA. Raises AtollError for fewer than two images."""
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
        levels: times t, [M].
        by_level: error at each level, [M].
        mean: over the levels.
        standard_error: of the mean, from the variance between images.
    """

    levels: tuple[float, ...]
    by_level: tuple[float, ...]
    mean: float
    standard_error: float

    @classmethod
    def of(cls, levels: Sequence[float], errors: Tensor) -> "DenoisingError":
        """From the errors [images, M] of `squared_errors`."""
        errors = errors.double()
        # Levels of one image are not independent: the spread is between images.
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
    condition: tuple[Condition, ...] | None,
    levels: Sequence[float],
    seeds: Sequence[int],
) -> Tensor:
    """|u(x_t, t) - (eps - x0)|^2, mean over the values of a latent: [B, M], M = len(levels).

    Conditional flow matching's objective (Lipman et al. 2023, Eq. 9); its minimum is the posterior variance, not 0.

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
        seeds: one per latent; the noise at level m depends on the seed and m only, whatever is measured.
    """
    for level, time in enumerate(levels):
        # Each pair of seed and level has other noise.
        eps = seeded_noise([seed * len(levels) + level for seed in seeds], x0.shape[1:]).to(x0)
        t = torch.full((len(x0),), time, dtype=x0.dtype, device=x0.device)
        yield PATH.diffuse(x0, eps, t), eps, t
