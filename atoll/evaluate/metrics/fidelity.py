"""Metrics beyond the first two moments: manifolds of neighbours, and kernel distances.

All take features real [n, D] and fake [m, D] and compute in float64. They need the features themselves, so the caller
keeps a bounded number of them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.errors import AtollError
from atoll.randomness import cpu_generator, random_rows

# Squared distances by products have a rounding error of about 1e-13 of the vectors' squared length. Below the first
# number a distance is 0; within the second, relative, two distances are equal.
ZERO, TIE = 1e-12, 1e-9


@dataclass(frozen=True)
class ManifoldScores:
    """Each in [0, 1], except density, which is about 1 for equal distributions and can be larger.

    Attributes:
        precision: fraction of fakes within the reals' manifold: quality.
        recall: fraction of reals within the fakes' manifold: variety.
        density: mean number of reals' balls that contain a fake, over k: quality, robust to outliers among the reals.
        coverage: fraction of reals with a fake in their ball: variety, robust to outliers among the fakes.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real: Tensor, fake: Tensor, pr_k: int = 3, dc_k: int = 5, chunk: int = 512) -> ManifoldScores:
    """Precision and recall (Kynkäänniemi et al. 2019, section 2), density and coverage (Naeem et al. 2020, section 3).

    A set's manifold is the union of balls around its vectors; each reaches to the k-th nearest vector of the same set.
    As published, a ball includes its edge for precision and recall, but not for density and coverage. All four depend
    on the number of images: compare at equal n and equal m. Time grows as (n + m)^2 D: 10,000 against 10,000 vectors
    of 1280 numbers take about 90 s of one core.

    Args:
        real, fake: features [n, D] and [m, D].
        pr_k, dc_k: k of precision and recall, and of density and coverage.
        chunk: rows of distances at a time; memory is about chunk * max(n, m) * 32 bytes.

    Raises:
        AtollError: shapes that do not fit, features that are not finite, or fewer vectors than max(pr_k, dc_k) + 1.
    """
    real, fake = _checked(real, fake, max(pr_k, dc_k) + 1)
    # Centre: shorter vectors have smaller rounding errors.
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    # The radii of the balls.
    real_radii = _squared_radii(real, (pr_k, dc_k), chunk)  # [n,2]
    fake_radii = _squared_radii(fake, (pr_k,), chunk)[:, 0]  # [m]
    # One pass over the distances, some fakes at a time.
    precise = dense = 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for part, radii in zip(fake.split(chunk), fake_radii.split(chunk), strict=True):
        squared = _squared_distances(part, real)  # [c,n]
        precise += int((squared <= real_radii[:, 0] * (1 + TIE)).any(1).sum())
        recalled |= (squared <= radii[:, None] * (1 + TIE)).any(0)
        within = squared < real_radii[:, 1] * (1 - TIE)  # [c,n]
        dense += int(within.sum())
        covered |= within.any(0)
    return ManifoldScores(
        precision=precise / len(fake),
        recall=float(recalled.double().mean()),
        density=dense / (dc_k * len(fake)),
        coverage=float(covered.double().mean()),
    )


@dataclass(frozen=True)
class KernelDistance:
    """Mean over `subsets` pairs of subsets of `size` images, and the standard deviation between them."""

    mean: float
    std: float
    subsets: int
    size: int


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> KernelDistance:
    """The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, unbiased: KID on Inception's features.

    Binkowski et al. 2018. Unbiased: its mean does not depend on the number of images, and for equal distributions it is
    negative about as often as positive.

    Args:
        real, fake: features [n, D] and [m, D].
        subsets: pairs of subsets, drawn without replacement within each; one if `size` covers both sets.
        size: images of a subset, at most n and m.
        seed: of the subsets.

    Raises:
        AtollError: shapes that do not fit, features that are not finite, or fewer than two vectors on a side.
    """
    real, fake = _checked(real, fake, 2)
    # Both subsets have the same size, as the estimate requires.
    size = min(size, len(real), len(fake))
    if size == len(real) == len(fake):
        subsets = 1  # all subsets would be equal
    generator = cpu_generator(seed)
    estimates = []
    for _ in range(subsets):
        x = real[random_rows(len(real), size, generator)]
        y = fake[random_rows(len(fake), size, generator)]
        estimates.append(_polynomial_mmd(x, y))
    values = torch.tensor(estimates, dtype=torch.float64)
    return KernelDistance(float(values.mean()), float(values.std(correction=0)), subsets, size)


def rbf_distance(real: Tensor, fake: Tensor, sigma: float = 10.0, scale: float = 1000.0, chunk: int = 512) -> float:
    """scale * MMD^2 of unit-normalised features with the kernel exp(-|x - y|^2 / (2 sigma^2)): CMMD on CLIP's.

    Jayasumana et al. 2024, section 4. As in their code, the sums include each vector with itself: the estimate is never
    negative and is biased upwards by about scale (1/n + 1/m) E |x - x'|^2 / (2 sigma^2), at most 10 (1/n + 1/m) for
    vectors without a common direction.

    Raises:
        AtollError: shapes that do not fit, features that are not finite, vectors of zeros, or none.
    """
    real, fake = _checked(real, fake, 1)
    # The kernel works on directions.
    for vectors in (real, fake):
        if bool((vectors.norm(dim=1) == 0).any()):
            raise AtollError("a feature of zeros has no direction; take another feature, or leave out blank images")
    real, fake = F.normalize(real), F.normalize(fake)

    def mean_kernel(a: Tensor, b: Tensor) -> float:
        # Some rows at a time: the whole kernel matrix may exceed the memory.
        kernels = [(-_squared_distances(part, b) / (2 * sigma**2)).exp().sum() for part in a.split(chunk)]
        total = sum(float(kernel) for kernel in kernels)
        return total / (len(a) * len(b))

    return scale * (mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake))


def _polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate for x and y [s, D]: it leaves out pairs of a vector with itself."""
    s, dim = x.shape
    xx, yy, xy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (s * (s - 1))
    return float(within - 2 * xy.mean())


def _checked(real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Check both sets and return them in float64 on the CPU. `least`: vectors needed on each side."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise AtollError(
            f"features of shapes {list(real.shape)} and {list(fake.shape)}; expected [n, D] and [m, D], of one space"
        )
    # Name the side that is wrong.
    for name, vectors in (("real", real), ("drawn", fake)):
        if len(vectors) < least:
            raise AtollError(f"{len(vectors)} {name} images; expected at least {least}: give more images")
        if not bool(torch.isfinite(vectors).all()):
            raise AtollError(f"features of {name} images that are not finite: the sampling diverged")
    return real.detach().cpu().double(), fake.detach().cpu().double()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of a [c, D] and b [n, D], float64: [c, n]. Equal vectors are at exactly 0."""
    # By products: much faster than differences; tiny results are rounding errors.
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)  # [c,n]
    squared = lengths - 2 * (a @ b.T)
    return squared.masked_fill_(squared <= ZERO * lengths, 0)


def _squared_radii(vectors: Tensor, ks: tuple[int, ...], chunk: int) -> Tensor:
    """The squared distance of each of the vectors [n, D] to its k-th nearest other one: [n, len(ks)]."""
    radii = []
    for start in range(0, len(vectors), chunk):
        squared = _squared_distances(vectors[start : start + chunk], vectors)  # [c,n]
        squared.diagonal(start).fill_(torch.inf)  # not itself
        nearest = squared.topk(max(ks), largest=False).values  # [c,max k], sorted
        radii.append(nearest[:, [k - 1 for k in ks]])
    return torch.cat(radii)
