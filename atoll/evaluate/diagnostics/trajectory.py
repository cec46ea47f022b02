"""Diagnostics along sampling trajectories: is the current state near the data of the experts that sample it?

*Expert-Data Alignment Governs Generation Quality in Decentralized Diffusion Models* (arXiv 2602.02685) finds that
quality follows this alignment, not the stability or the resolution of sampling: the full ensemble is the most stable
and the worst. This module measures both. Along trajectories: the distance of the state to the experts' data, the angle
between their velocities, the growth of a perturbation, the effect of finer steps. On held-out latents: the errors of
chosen and other experts, their specialisation, and the router's accuracy.

An expert is *chosen* if it has at least 1 % of the weight, or the largest weight. So routing "full" also has other
experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.choices import Method
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert, Sampler
from atoll.errors import AtollError
from atoll.evaluate.diagnostics.cluster_space import ClusterSpace
from atoll.evaluate.diagnostics.experts import (
    ExpertErrors,
    Series,
    by_choice,
    chosen_of,
    each_alone,
    mean_and_error,
    measure_experts,
)
from atoll.evaluate.diagnostics.results import ClusterDistance, Disagreement, Refinement, Sensitivity, Trajectory
from atoll.evaluate.diagnostics.routers import LEVELS, ConditionSource, HeldOut, RouterScores, measure_router, rows_of
from atoll.randomness import seeded_noise
from atoll.shapes import per_sample
from atoll.solver import sample

PERTURBATION = 1e-3  # root mean square per value; latents have values of order 1
_DIRECTIONS = 1 << 40  # offset of the perturbations' seeds, so that they differ from those of the noise


@dataclass(frozen=True)
class Draw:
    """How trajectories are integrated.

    Attributes:
        starts: times from which a perturbation is followed, rounded to those of the grid.
    """

    steps: int = 20
    method: Method = "dpm++2m"
    guidance_scale: float = 1.0
    starts: Series = (1.0, 0.8, 0.6, 0.4, 0.2)


@dataclass(frozen=True)
class Diagnostics:
    """All measurements; None for those without data or without a router."""

    trajectory: Trajectory
    experts: ExpertErrors | None = None
    router: RouterScores | None = None


def diagnose(
    ensemble: Ensemble,
    noise: Tensor,
    condition: ConditionSource | None = None,
    *,
    space: ClusterSpace | None = None,
    held_out: HeldOut | None = None,
    draw: Draw | None = None,
    levels: Sequence[float] = LEVELS,
    clusters: Tensor | None = None,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Diagnostics:
    """Run `diagnose_trajectory`; with held-out latents also `measure_experts`, and `measure_router` if there is one.

    Args and Raises: see these functions.
    """
    # The trajectories need no held-out latents.
    trajectory = diagnose_trajectory(
        ensemble,
        noise,
        condition,
        space=space,
        draw=draw,
        clusters=clusters,
        seed=seed,
        batch=batch,
        device=device,
    )
    if held_out is None:
        return Diagnostics(trajectory)
    # On held-out latents: the experts, and the router.
    experts = measure_experts(ensemble, held_out, levels, batch, device)
    if ensemble.router is None:
        return Diagnostics(trajectory, experts)
    encoder = ensemble.router_encoder
    router = measure_router(ensemble.router, held_out, levels, encoder=encoder, batch=batch, device=device)
    return Diagnostics(trajectory, experts, router)


@torch.inference_mode()
def diagnose_trajectory(
    ensemble: Ensemble,
    noise: Tensor,
    condition: ConditionSource | None = None,
    *,
    space: ClusterSpace | None = None,
    draw: Draw | None = None,
    clusters: Tensor | None = None,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Trajectory:
    """Sample images and observe, before each step, the state x, the weights and every expert's velocity.

    The cost, in samplings of the ensemble: 1 for the images, 1 + E/k for the observations (a step evaluates k of E
    experts; with experts that load on demand, each observation loads all E), 2 t for each start t, 6 for the
    refinement.

    Args:
        ensemble: with its own routing.
        noise: x at t = 1, [n, ...], such as `seeded_noise`.
        condition: a function of row numbers; None for unconditional networks.
        space: for distances to the clusters; None measures no distances.
        draw: steps, method, guidance, and the starts of perturbations.
        clusters: of the images [n] int64, for routing "oracle".
        seed: of the perturbations, which depend on it and on the row of the noise only.
        batch: images at a time; memory holds the velocities of all experts for one batch.
        device: of the networks.

    Raises:
        AtollError: no noise; an expert without data in `space` for any of its clusters; errors of `sample` and
            `Ensemble.velocity`.
    """
    draw = draw or Draw()
    if len(noise) == 0:
        raise AtollError("got no noise; expected noise [n, ...] for at least one image")
    # The clusters of each expert that have data.
    owned = [] if space is None else [_clusters_with_data(expert, space) for expert in ensemble.experts]
    # Sample and observe batch by batch.
    batches = []
    for rows in torch.arange(len(noise)).split(batch):
        # Each batch has its own condition, labels and seeds.
        labels = None if clusters is None else clusters[rows].to(device)
        # The seeds depend on the row alone, so the batch size changes nothing.
        seeds = [_DIRECTIONS + seed + row for row in rows.tolist()]
        batch_trajectory = _BatchTrajectory(
            ensemble, condition=rows_of(condition, rows, device), cluster=labels, space=space, draw=draw, seeds=seeds
        )
        batch_trajectory.run(noise[rows].to(device))
        batches.append(batch_trajectory)
    return _combine(batches, ensemble, draw, space, owned)


def _clusters_with_data(expert: Expert, space: ClusterSpace) -> list[int]:
    """The expert's clusters that have data in the space."""
    # Clusters beyond the space's, or without a sample, have no data.
    known = [k for k in expert.clusters if k < len(space.samples) and len(space.samples[k])]
    if not known:
        raise AtollError(
            f"{expert.name}: the cluster space has no data of its clusters {list(expert.clusters)}; expected latents "
            "from every expert's clusters"
        )
    return known


class _BatchTrajectory:
    """One batch of trajectories with its measurements: numbers for each image, on the CPU."""

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        condition: tuple[Condition, ...] | None,
        cluster: Tensor | None,
        space: ClusterSpace | None,
        draw: Draw,
        seeds: Sequence[int],
    ):
        # Observe every expert, also one that outputs NaN.
        self.sampler = Sampler(ensemble, non_finite="keep")
        # The ensemble and each expert alone, with the same guidance.
        scale = draw.guidance_scale
        self.velocity = partial(self.sampler.velocity, condition=condition, guidance_scale=scale, cluster=cluster)
        self.alone = [partial(one.velocity, condition=condition, guidance_scale=scale) for one in each_alone(ensemble)]
        self.space, self.draw, self.seeds = space, draw, seeds
        # The measurements.
        self.weights: list[Tensor] = []  # [B, E] at each time
        self.distances: dict[str, list[Tensor]] = {}  # [B, K] at each time
        self.angles: list[Tensor] = []  # [B, 2] at each time: over pairs of chosen experts, over all pairs
        self.growth: list[Tensor] = []  # [B] at each start
        self.changes: list[Tensor] = []  # [B] from n to 2n, 2n to 4n, n to 4n steps

    def run(self, noise: Tensor) -> None:
        """Sample the batch from noise [B, ...] and record the measurements."""
        steps = self.draw.steps
        # The grid of the coarse steps, and the steps at which perturbations start.
        grid = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
        starts = start_steps(self.draw)

        # Observe each state before its step; follow a perturbation from each start.
        def observe(index: int, x: Tensor) -> None:
            # The last state has no step after it.
            if index < steps:
                self._observe(x, grid[index].expand(len(x)))
            if index in starts:
                self.growth.append(self._growth(x, grid[index:], self.seeds, index))

        # The solver calls back after each step; the first state is observed by hand.
        observe(0, noise)
        ends = [self._sample(noise, grid, lambda index, x: observe(index + 1, x))]
        # Sample again with finer steps, and compare the results.
        for factor in (2, 4):
            fine = torch.linspace(1, 0, factor * steps + 1, dtype=noise.dtype, device=noise.device)
            ends.append(self._sample(noise, fine))
        for a, b in ((0, 1), (1, 2), (0, 2)):
            # Differences of the final latents, not of decoded images.
            self.changes.append((ends[a] - ends[b]).flatten(1).square().mean(1).sqrt().cpu().double())

    def _sample(self, x: Tensor, times: Tensor, callback: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Integrate x along `times` with the ensemble's velocity."""
        return sample(self.velocity, x, method=self.draw.method, times=times, callback=callback)

    def _observe(self, x: Tensor, t: Tensor) -> None:
        """Record the weights, the distances of the x0 estimate, and the angles between velocities at x [B, ...]."""
        # The trace records the weights that the velocity used.
        with self.sampler.tracing() as trace:
            u = self.velocity(x, t)
        # The x0 estimate of the ensemble, and its distance to each cluster.
        self.weights.append(trace.weights[0])
        if self.space is not None:
            x0 = x - per_sample(t, x) * u  # u = eps - x0 on the linear path
            for kind, distances in self.space.distances(x0).items():
                self.distances.setdefault(kind, []).append(distances.cpu().double())
        # The experts alone at the same state.
        velocities = torch.stack([velocity(x, t) for velocity in self.alone], dim=1)
        # Means over pairs of chosen experts, then over all pairs.
        angles, chosen = angles_between(velocities), chosen_of(self.weights[-1]).to(x.device)
        means = [mean_of_pairs(angles, mask) for mask in (chosen, torch.ones_like(chosen))]
        self.angles.append(torch.stack(means, dim=1).cpu().double())

    def _growth(self, x: Tensor, times: Tensor, seeds: Sequence[int], index: int) -> Tensor:
        """|dx0| / |dx| [B] for a random perturbation of x [B, ...] at the first of the times."""
        # A direction of its own for each image and start.
        seeds = [seed * self.draw.steps + index for seed in seeds]
        noise = seeded_noise(seeds, x.shape[1:]).to(x)
        perturbed = x + PERTURBATION * noise
        # Sample both to the end; the ratio of the differences is the growth.
        change = (self._sample(perturbed, times) - self._sample(x, times)).flatten(1).norm(dim=1)
        output: Tensor = (change / (perturbed - x).flatten(1).norm(dim=1)).cpu().double()
        return output


def start_steps(draw: Draw) -> list[int]:
    """Numbers of the steps from which perturbations are followed: those nearest to `draw.starts`."""
    return sorted({min(draw.steps - 1, max(0, round((1 - t) * draw.steps))) for t in draw.starts})


def angles_between(velocities: Tensor) -> Tensor:
    """Angles in degrees between E velocities [B, E, ...] of each sample: [B, E, E], 0 on and below the diagonal.

    Computed as 2 atan2(|a - b|, |a + b|) for unit vectors (Kahan), which is accurate near 0, unlike the arc cosine.
    """
    # The angle does not depend on the length.
    unit = F.normalize(velocities.flatten(2), dim=2)
    angles = unit.new_zeros(len(unit), unit.shape[1], unit.shape[1])
    # Each pair once.
    for e in range(unit.shape[1] - 1):
        first, others = unit[:, e : e + 1], unit[:, e + 1 :]
        angles[:, e, e + 1 :] = 2 * torch.atan2((first - others).norm(dim=2), (first + others).norm(dim=2))
    return torch.rad2deg(angles)


def mean_of_pairs(angles: Tensor, mask: Tensor) -> Tensor:
    """Mean of angles [B, E, E] over the pairs of experts in the mask [B, E] bool: [B]; NaN without a pair."""
    # Both experts of the pair are in the mask.
    pairs = (mask[:, :, None] & mask[:, None]).triu(1)
    return torch.where(pairs, angles, 0).sum((1, 2)) / pairs.sum((1, 2))


def _combine(
    batches: Sequence[_BatchTrajectory],
    ensemble: Ensemble,
    draw: Draw,
    space: ClusterSpace | None,
    owned: Sequence[Sequence[int]],
) -> Trajectory:
    """Means over the images of all batches. `owned`: clusters of each expert that have data."""
    # Concatenate the batches.
    n = draw.steps
    times = tuple((n - step) / n for step in range(n))
    weights = _stack([batch.weights for batch in batches])  # [n, T, E]
    # Growth by start, and change by number of steps.
    starts = start_steps(draw)
    growth, error = mean_and_error(_stack([batch.growth for batch in batches])) if starts else (torch.empty(0),) * 2
    changes = _stack([batch.changes for batch in batches]).mean(0).tolist()
    pairs = ((n, 2 * n), (2 * n, 4 * n), (n, 4 * n))
    kinds = batches[0].distances  # the values become [n, T, K]
    distances = {kind: _stack([batch.distances[kind] for batch in batches]) for kind in kinds}
    return Trajectory(
        images=len(weights),
        routing=ensemble.routing,
        steps=n,
        method=draw.method,
        guidance_scale=draw.guidance_scale,
        space="" if space is None else space.name,
        times=times,
        distances=tuple(_cluster_distance(kind, every, weights, owned) for kind, every in distances.items()),
        disagreement=_disagreement(_stack([batch.angles for batch in batches]), weights),
        sensitivity=Sensitivity(
            tuple(times[index] for index in starts), tuple(growth.tolist()), tuple(error.tolist()), PERTURBATION
        ),
        refinement=Refinement(
            (n, 2 * n, 4 * n), tuple((a, b, change) for (a, b), change in zip(pairs, changes, strict=True))
        ),
    )


def _stack(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Concatenate each batch's values [B, ...] at T times: [n, T, ...]."""
    return torch.cat([torch.stack(tuple(part), dim=1) for part in parts])


def _cluster_distance(kind: str, distances: Tensor, weights: Tensor, owned: Sequence[Sequence[int]]) -> ClusterDistance:
    """Means over images of distances [n, T, K] to the clusters, weights [n, T, E] and each expert's clusters."""
    # The nearest of an expert's clusters counts.
    of_expert = torch.stack([distances[..., list(clusters)].amin(-1) for clusters in owned], dim=-1)  # [n, T, E]
    chosen, unchosen = by_choice(of_expert, weights)
    covers = torch.tensor([[k in clusters for clusters in owned] for k in range(distances.shape[-1])])  # [K, E]
    # Weight on experts that cover the nearest cluster.
    nearest, cluster = distances.min(-1)  # [n, T]
    aligned = (weights * covers[cluster]).sum(-1).double()
    return ClusterDistance(
        kind,
        tuple(chosen[0].tolist()),
        tuple(unchosen[0].tolist()),
        tuple(nearest.mean(0).tolist()),
        tuple(aligned.mean(0).tolist()),
    )


def _disagreement(angles: Tensor, weights: Tensor) -> Disagreement:
    """Means over images of mean angles [n, T, 2]; the weights [n, T, E] determine which have two chosen experts."""
    # Images with one chosen expert have no pair.
    has_pairs = chosen_of(weights).sum(-1) > 1  # [n, T]
    chosen = [float(angles[has_pairs[:, m], m, 0].mean()) for m in range(angles.shape[1])]
    return Disagreement(tuple(chosen), tuple(angles[..., 1].mean(0).tolist()))
