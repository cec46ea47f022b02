"""The oracle: a finite mixture of Gaussians, whose denoiser, router and velocity are known in closed form.

Whoever writes a schedule, a prediction or a routing checks it here: with exact experts of any objectives, an ensemble's
velocity must equal the mixture's own.
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
    """x0 ~ sum_m w_m N(mu_m, s_m^2 I), its components shared out among K clusters.

    Args:
        means: [M, ...], the shape of one latent behind M.
        scales: [M], standard deviations s_m > 0.
        weights: [M], summing to 1.
        clusters: [M] integers in 0..K-1.
    """

    def __init__(self, means: Tensor, scales: Tensor, weights: Tensor, clusters: Tensor):
        self.means, self.scales, self.weights, self.clusters = means, scales, weights, clusters

    @classmethod
    def random(
        cls, components: int, clusters: int, shape: tuple[int, ...], seed: int = 0, spread: float = 1.5
    ) -> "GaussianMixture":
        """`components` random Gaussians in float64, dealt to the clusters in turn."""
        g = cpu_generator(seed)
        means = spread * torch.randn(components, *shape, generator=g, dtype=torch.float64)
        scales = 0.2 + 0.6 * torch.rand(components, generator=g, dtype=torch.float64)
        weights = 0.2 + torch.rand(components, generator=g, dtype=torch.float64)
        return cls(means, scales, weights / weights.sum(), torch.arange(components) % clusters)

    def cluster(self, k: int) -> "GaussianMixture":
        """The mixture of cluster k alone."""
        mine = self.clusters == k
        weights = self.weights[mine] / self.weights[mine].sum()
        return GaussianMixture(self.means[mine], self.scales[mine], weights, torch.zeros_like(self.clusters[mine]))

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(x0 [count, ...], cluster [count])."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        x0 = self.means[component] + per_sample(self.scales[component], self.means) * noise
        return x0, self.clusters[component]

    def x0_eps(self, x: Tensor, t: Tensor, schedule: Schedule, cluster: int | None = None) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t = x] and E[eps | x_t = x], each [B, ...], of the whole mixture or of one cluster alone."""
        log_p = self._component_log_joint(x, t, schedule)
        if cluster is not None:
            log_p = log_p.masked_fill(self.clusters != cluster, -torch.inf)
        posterior = torch.softmax(log_p, dim=1)  # [B, M]
        alpha, sigma, variance = self._moments(t, schedule)
        alpha_x, sigma_x = per_sample(alpha, x), per_sample(sigma, x)
        residual = x[:, None] - alpha_x[:, None] * self.means  # [B, M, ...]
        x0 = self.means + _like(alpha[:, None] * self.scales**2 / variance, residual) * residual
        eps = _like(1 / variance, residual) * sigma_x[:, None] * residual
        weight = _like(posterior, residual)
        return (weight * x0).sum(1), (weight * eps).sum(1)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The exact global velocity E[eps - x0 | x] on the linear path."""
        x0, eps = self.x0_eps(x, t, PATH)
        return eps - x0

    def router(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        """The exact log p(cluster | x_t) on the linear path, [B, K]."""
        log_p = self._component_log_joint(x, t, PATH)
        clusters = int(self.clusters.max()) + 1
        per_cluster = [torch.logsumexp(log_p[:, self.clusters == k], dim=1) for k in range(clusters)]
        return torch.log_softmax(torch.stack(per_cluster, dim=1), dim=1)

    def network(
        self, objective: Objective, cluster: int | None = None
    ) -> Callable[[Tensor, Tensor, Condition | None], Tensor]:
        """The network that training with `objective` on `cluster` (None: on everything) converges to."""

        def exact(x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
            t = time / objective.time_scale
            x0, eps = self.x0_eps(x, t, objective.schedule, cluster)
            return objective.target(x0, eps, t)

        return exact

    def _moments(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha, sigma, (alpha[:, None] * self.scales) ** 2 + sigma[:, None] ** 2

    def _component_log_joint(self, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """log w_m + log N(x; alpha mu_m, (alpha^2 s_m^2 + sigma^2) I) up to a constant, [B, M]."""
        alpha, _, variance = self._moments(t, schedule)
        residual = (x[:, None] - _like(alpha[:, None], x[:, None]) * self.means).flatten(2)  # [B, M, D]
        distance = residual.square().sum(-1) / variance
        return torch.log(self.weights) - 0.5 * (distance + residual.shape[-1] * torch.log(variance))


def _like(values: Tensor, x: Tensor) -> Tensor:
    """values [B, M] viewed as [B, M, 1, ...]."""
    return values.reshape(*values.shape, *[1] * (x.ndim - 2))


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    """Mean 1-Wasserstein distance of two equally large samples [n, ...] over random directions."""
    a, b = a.flatten(1), b.flatten(1)
    g = cpu_generator(seed)
    direction = torch.randn(a.shape[1], directions, generator=g, dtype=a.dtype)
    direction = direction / direction.norm(dim=0)
    return float(((a @ direction).sort(0).values - (b @ direction).sort(0).values).abs().mean())
