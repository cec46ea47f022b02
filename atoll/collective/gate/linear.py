"""The best linear denoiser of some latents, in closed form: the reference that exists before any expert does.

For x = alpha x0 + sigma eps with x0 of mean m and covariance C, the linear estimate of least error is
x0_hat = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x - alpha m) (Wiener 1949). It is the exact denoiser of a Gaussian.
A network that learned its cluster is at no noise level much worse; one that learned something else is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.schedule import PATH

MAX_ROWS = 2048  # of the covariance: its decomposition takes seconds, for any size of a latent


@dataclass(frozen=True, eq=False)
class LinearDenoiser:
    """A Gaussian's denoiser. D numbers per latent, R directions.

    Attributes:
        mean: m [D] float64.
        directions: orthonormal [D, R]; variances: C along each [R].
        floor: C along every other direction.
        shape: of one latent.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    floor: float
    shape: tuple[int, ...]

    @classmethod
    def of(cls, latents: Tensor) -> "LinearDenoiser":
        """Estimate mean and covariance of latents [n, ...], n at least 2.

        The covariance is shrunk towards a multiple of the identity (Ledoit and Wolf 2004): with fewer rows than
        numbers per latent, the sample covariance has directions of variance 0, and a row outside of them an error
        without bound.
        """
        rows = latents[:MAX_ROWS].flatten(1).double()
        count, size = rows.shape
        mean = rows.mean(0)
        centred = rows - mean
        # The smaller of the two products has all nonzero variances.
        if count < size:
            variances, left = torch.linalg.eigh(centred @ centred.T / count)
            variances = variances.clamp(min=0)
            directions = centred.T @ left / (count * variances).sqrt().clamp(min=1e-12)
        else:
            variances, directions = torch.linalg.eigh(centred.T @ centred / count)
            variances = variances.clamp(min=0)
        # The shrinkage of least expected error; its three moments follow from variances and lengths of rows.
        level = variances.sum() / size
        spread = (variances.square().sum() / size - level**2).clamp(min=1e-30)
        noise = (centred.square().sum(1).square().mean() - variances.square().sum()) / (count * size)
        shrinkage = float((noise / spread).clamp(0, 1))
        floor = shrinkage * float(level)
        # Directions without variance cannot be normalised; they belong to the floor.
        good = variances > 1e-9 * variances.max()
        return cls(
            mean, directions[:, good], (1 - shrinkage) * variances[good] + floor, floor, tuple(latents.shape[1:])
        )

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return its velocity (x - x0_hat)/sigma on the linear path; x [B, ...], t [B] above 0 -> [B, ...]."""
        alpha, sigma = (values.double()[:, None] for values in (PATH.alpha(t), PATH.sigma(t)))
        residual = x.flatten(1).double() - alpha * self.mean

        def gain(variance: Tensor | float) -> Tensor:
            return alpha * variance / (alpha**2 * variance + sigma**2)

        # The floor's gain everywhere, and what the known directions add to it.
        rest = gain(self.floor)
        known = (residual @ self.directions) * (gain(self.variances) - rest)
        x0 = self.mean + rest * residual + known @ self.directions.T
        return ((x.flatten(1).double() - x0) / sigma).to(x).view_as(x)

    def error(self, t: Tensor) -> Tensor:
        """Return the squared error of its velocity per number of a latent that a Gaussian would show, t [B] -> [B]."""
        alpha, sigma = (values.double()[:, None] for values in (PATH.alpha(t), PATH.sigma(t)))

        def remaining(variance: Tensor | float) -> Tensor:
            return variance / (alpha**2 * variance + sigma**2)

        size = len(self.mean)
        known = remaining(self.variances).sum(1)
        rest = remaining(self.floor)[:, 0] * (size - len(self.variances))
        return ((known + rest) / size).to(t)
