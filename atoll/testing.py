"""The oracle: a finite mixture of Gaussians, whose denoiser, router and velocity are known in closed form.

Use it to check a new schedule, prediction or routing: with exact experts of any objectives, an ensemble's velocity must
equal the mixture's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from atoll.condition import Condition
from atoll.objective import Objective
from atoll.randomness import cpu_generator
from atoll.schedule import PATH, Schedule
from atoll.shapes import per_sample


class GaussianMixture:
    """x0 ~ sum_m w_m N(mu_m, s_m^2 I), with M components that belong to K clusters.

    Args:
        means: mu [M, ...]; the axes behind M are the shape of one latent.
        scales: standard deviations s [M], above 0.
        weights: w [M], summing to 1.
        clusters: the cluster of each component, [M] integers in 0..K-1.
    """

    def __init__(self, means: Tensor, scales: Tensor, weights: Tensor, clusters: Tensor):
        self.means, self.scales, self.weights, self.clusters = means, scales, weights, clusters

    @classmethod
    def random(
        cls, components: int, clusters: int, shape: tuple[int, ...], seed: int = 0, spread: float = 1.5
    ) -> "GaussianMixture":
        """Return a random mixture in float64; component m belongs to cluster m modulo `clusters`.

        Args:
            components: M.
            clusters: K.
            shape: of one latent.
            seed: of means, scales and weights.
            spread: standard deviation of the means, default 1.5.
        """
        # Float64: the oracle is the reference for everything else.
        generator = cpu_generator(seed)
        means = spread * torch.randn(components, *shape, generator=generator, dtype=torch.float64)
        # Scales and weights stay away from 0, so no component degenerates.
        scales = 0.2 + 0.6 * torch.rand(components, generator=generator, dtype=torch.float64)
        weights = 0.2 + torch.rand(components, generator=generator, dtype=torch.float64)
        return cls(means, scales, weights / weights.sum(), torch.arange(components) % clusters)

    def cluster(self, k: int) -> "GaussianMixture":
        """Return the mixture of cluster k alone, as a mixture with one cluster."""
        # The components of this cluster, with their weights renormalised.
        inside = self.clusters == k
        weights = self.weights[inside] / self.weights[inside].sum()
        return GaussianMixture(
            self.means[inside], self.scales[inside], weights, torch.zeros_like(self.clusters[inside])
        )

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw latents x0 [count, ...] and their clusters [count]."""
        # First the component, then the point within it.
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        x0 = self.means[component] + per_sample(self.scales[component], self.means) * noise
        return x0, self.clusters[component]

    def x0_eps(self, x: Tensor, t: Tensor, schedule: Schedule, cluster: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the exact posterior means E[x0 | x_t = x] and E[eps | x_t = x].

        Args:
            x: points [B, ...].
            t: times [B] of the schedule.
            schedule: the path of x.
            cluster: condition on this cluster; None for the whole mixture.

        Returns:
            (x0, eps), each [B, ...].
        """
        log_p = self._component_log_joint(x, t, schedule)
        if cluster is not None:
            # Components of other clusters get probability 0.
            log_p = log_p.masked_fill(self.clusters != cluster, -torch.inf)
        posterior = torch.softmax(log_p, dim=1)  # [B, M]
        # The posterior means within each component, then their mean over components.
        alpha, sigma, variance = self._moments(t, schedule)
        alpha_x, sigma_x = per_sample(alpha, x), per_sample(sigma, x)
        residual = x[:, None] - alpha_x[:, None] * self.means  # [B, M, ...]
        x0 = self.means + _like(alpha[:, None] * self.scales**2 / variance, residual) * residual
        eps = _like(1 / variance, residual) * sigma_x[:, None] * residual
        weight = _like(posterior, residual)
        return (weight * x0).sum(1), (weight * eps).sum(1)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the exact global velocity E[eps - x0 | x_t = x] on the linear path; x [B, ...], t [B] -> [B, ...]."""
        x0, eps = self.x0_eps(x, t, PATH)
        return eps - x0

    def router(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Return the exact log p(cluster | x_t = x) on the linear path; x [B, ...], t [B] -> [B, K].

        `pooled` is ignored; it is there because every router takes it.
        """
        log_p = self._component_log_joint(x, t, PATH)
        clusters = int(self.clusters.max()) + 1
        # p(cluster) is the sum over its components.
        per_cluster = [torch.logsumexp(log_p[:, self.clusters == k], dim=1) for k in range(clusters)]
        return torch.log_softmax(torch.stack(per_cluster, dim=1), dim=1)

    def network(
        self, objective: Objective, cluster: int | None = None
    ) -> Callable[[Tensor, Tensor, Condition | None], Tensor]:
        """Return the network that training with `objective` converges to.

        Args:
            objective: its prediction, schedule and time scale.
            cluster: the cluster that it is trained on; None for the whole mixture.
        """

        # The trained network's input is the scaled time; the oracle takes the time itself.
        def exact(x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
            t = time / objective.time_scale
            x0, eps = self.x0_eps(x, t, objective.schedule, cluster)
            return objective.target(x0, eps, t)

        return exact

    def _moments(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        """alpha [B], sigma [B] and each component's variance of x_t, alpha^2 s^2 + sigma^2 [B, M]."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha, sigma, (alpha[:, None] * self.scales) ** 2 + sigma[:, None] ** 2

    def _component_log_joint(self, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """log w_m + log N(x; alpha mu_m, (alpha^2 s_m^2 + sigma^2) I) up to a constant, [B, M]."""
        # Each component's marginal at time t is a Gaussian again.
        alpha, _, variance = self._moments(t, schedule)
        residual = (x[:, None] - _like(alpha[:, None], x[:, None]) * self.means).flatten(2)  # [B, M, D]
        distance = residual.square().sum(-1) / variance
        return torch.log(self.weights) - 0.5 * (distance + residual.shape[-1] * torch.log(variance))


def _like(values: Tensor, x: Tensor) -> Tensor:
    """values [B, M] viewed as [B, M, 1, ...]."""
    return values.reshape(*values.shape, *[1] * (x.ndim - 2))


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    """Return the mean 1-Wasserstein distance of two samples over random one-dimensional projections.

    Args:
        a: [n, ...].
        b: [n, ...], of the same n.
        directions: number of projections, default 256.
        seed: of the directions.
    """
    a, b = a.flatten(1), b.flatten(1)
    direction = torch.randn(a.shape[1], directions, generator=cpu_generator(seed), dtype=a.dtype)
    # On each direction the 1-Wasserstein distance is that of the sorted projections.
    direction = direction / direction.norm(dim=0)
    return float(((a @ direction).sort(0).values - (b @ direction).sort(0).values).abs().mean())
