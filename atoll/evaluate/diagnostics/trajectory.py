"""Why an ensemble draws well or badly: are the experts that it asks those whose data the current state belongs to?

*Expert-Data Alignment Governs Generation Quality in Decentralized Diffusion Models* (arXiv 2602.02685) finds that
quality follows this, and not how stable or how finely resolved the sampling is: the full ensemble is the most stable
and the worst. Both sides are measured here. Along trajectories: how far the experts' data are from the state, how far
their answers are apart, how a perturbation grows, what finer steps change. On held-out latents: how wrong the chosen
and the other experts are, what each has specialised in, and how well the router knows the cluster.

An expert is *chosen* where it has at least 1 % of the weight, or the most: so that routing "full" has others too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.choices import Method
from atoll.condition import Condition, Conditions
from atoll.ensemble import Ensemble, Expert
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
from atoll.evaluate.diagnostics.routers import LEVELS, Given, HeldOut, RouterScores, measure_router, rows_of
from atoll.randomness import seeded_noise
from atoll.shapes import per_sample
from atoll.solver import sample

PERTURBATION = 1e-3  # root mean square per value, of latents whose values are of the order of 1
_DIRECTIONS = 1 << 40  # seeds of perturbations begin here, apart from those of noise


@dataclass(frozen=True)
class Draw:
    """How trajectories are integrated. starts: times from which a perturbation is followed (those of the grid that are
    nearest)."""

    steps: int = 20
    method: Method = "dpm++2m"
    guidance_scale: float = 1.0
    starts: Series = (1.0, 0.8, 0.6, 0.4, 0.2)


@dataclass(frozen=True)
class ClusterDistance:
    """How far the x0-estimate is from the data of the experts' clusters, root mean square per value, at T times.

    An expert of several clusters is as far as the nearest of them.

    Attributes:
        kind: to what: "centroid" or "nearest neighbour".
        chosen: weighted by the experts' weights, mean over images.
        unchosen: mean over the others, then over the images that have any; NaN where none has.
        nearest: to the nearest cluster of all.
        aligned: the weight that lies on experts of the nearest cluster, mean over images.
    """

    kind: str
    chosen: Series
    unchosen: Series
    nearest: Series
    aligned: Series


@dataclass(frozen=True)
class Disagreement:
    """Angle in degrees between two experts' velocities at the same x, mean over pairs and images, at T times.

    Near t = 1 and t = 0 the part of the velocity that all experts share is large, and angles are smaller.

    Attributes:
        chosen: over pairs of chosen experts, of the images that have two; NaN where none has.
        every: over all pairs; NaN with one expert.
    """

    chosen: Series
    every: Series


@dataclass(frozen=True)
class Sensitivity:
    """|dx0| / |dx_t| of a random perturbation at start times t, mean over images and its standard error.

    Its square's mean over directions is the Jacobian's squared Frobenius norm per value of x. size: root mean square of
    the perturbation per value.
    """

    times: Series
    growth: Series
    standard_error: Series
    size: float


@dataclass(frozen=True)
class Refinement:
    """Root mean square per value between final images drawn from the same noise in `steps` n, 2n, 4n, mean over
    images. distances: (steps, steps, distance). Where halving the step divides it by 2^p, the order is p."""

    steps: tuple[int, ...]
    distances: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Trajectory:
    """What was measured while `images` images were drawn. times: of the states looked at [T], before each step;
    space: where the distances were taken."""

    images: int
    routing: str
    steps: int
    method: str
    guidance_scale: float
    space: str
    times: Series
    distances: tuple[ClusterDistance, ...]
    disagreement: Disagreement
    sensitivity: Sensitivity
    refinement: Refinement


@dataclass(frozen=True)
class Diagnostics:
    """All that was measured; None of what there was nothing to measure with."""

    trajectory: Trajectory
    experts: ExpertErrors | None = None
    router: RouterScores | None = None


def diagnose(
    ensemble: Ensemble,
    noise: Tensor,
    condition: Given = None,
    space: ClusterSpace | None = None,
    held_out: HeldOut | None = None,
    draw: Draw | None = None,
    levels: Sequence[float] = LEVELS,
    clusters: Tensor | None = None,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Diagnostics:
    """`diagnose_trajectory`, and with held-out latents `measure_experts` and, of an ensemble with a router,
    `measure_router`.

    Args as theirs. Raises:
        AtollError: as they do.
    """
    trajectory = diagnose_trajectory(ensemble, noise, condition, space, draw, clusters, seed, batch, device)
    if held_out is None:
        return Diagnostics(trajectory)
    experts = measure_experts(ensemble, held_out, levels, batch, device)
    if ensemble.router is None:
        return Diagnostics(trajectory, experts)
    router = measure_router(ensemble.router, held_out, levels, ensemble.router_encoder, batch, device)
    return Diagnostics(trajectory, experts, router)


@torch.inference_mode()
def diagnose_trajectory(
    ensemble: Ensemble,
    noise: Tensor,
    condition: Given = None,
    space: ClusterSpace | None = None,
    draw: Draw | None = None,
    clusters: Tensor | None = None,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Trajectory:
    """Draws images and looks, before each step, at the state x, at the weights and at what every expert says of it.

    The cost, in samplings of the ensemble: 1 for the images, 1 + E/k to look at them (k experts of E are asked in a
    step; of a memory store, each look brings all E in turn), 2 t for each start t, 6 for the refinement.

    Args:
        noise: x at t = 1, [n, ...], such as `seeded_noise`.
        condition: of n rows, or a function of row numbers; None for unconditional networks.
        space: where distances to the clusters are taken; none are without it.
        draw: steps, method, guidance, and where perturbations begin.
        clusters: [n] int64, for routing "oracle".
        seed: of the perturbations: the same for row i of the noise in any batch.
        batch: images at a time; memory holds the velocities of all experts for so many.
        device: where the networks are.

    Raises:
        AtollError: no noise; an expert none of whose clusters has data in `space`; what `sample` and
            `Ensemble.velocity` raise.
    """
    draw = draw or Draw()
    if len(noise) == 0:
        raise AtollError("trajectories from no noise; expected noise [n, ...] of at least one image")
    owned = [] if space is None else [_known(expert, space) for expert in ensemble.experts]
    walks = []
    for rows in torch.arange(len(noise)).split(batch):
        own = None if clusters is None else clusters[rows].to(device)
        seeds = [_DIRECTIONS + seed + row for row in rows.tolist()]
        walk = _Walk(ensemble, rows_of(condition, rows, device), own, space, draw, seeds)
        walk.go(noise[rows].to(device))
        walks.append(walk)
    return _joined(walks, ensemble, draw, space, owned)


def _known(expert: Expert, space: ClusterSpace) -> list[int]:
    """The expert's clusters that have data in the space."""
    known = [k for k in expert.clusters if k < len(space.samples) and len(space.samples[k])]
    if not known:
        raise AtollError(
            f"{expert.name}: the cluster space has no data of its clusters {list(expert.clusters)}; expected latents "
            "of every expert's clusters"
        )
    return known


class _Walk:
    """One batch of images on its way, and what is seen of it: numbers of each image, on the CPU."""

    def __init__(
        self,
        ensemble: Ensemble,
        condition: Condition | Conditions | None,
        cluster: Tensor | None,
        space: ClusterSpace | None,
        draw: Draw,
        seeds: Sequence[int],
    ):
        self.ensemble = ensemble.with_options(drops=False)  # as it is: an expert that breaks is not left out
        scale = draw.guidance_scale
        self.velocity = partial(self.ensemble.velocity, condition=condition, guidance_scale=scale, cluster=cluster)
        self.alone = [partial(one.velocity, condition=condition, guidance_scale=scale) for one in each_alone(ensemble)]
        self.space, self.draw, self.seeds = space, draw, seeds
        self.weights: list[Tensor] = []  # [B, E] at each time
        self.distances: dict[str, list[Tensor]] = {}  # [B, K] at each time
        self.angles: list[Tensor] = []  # [B, 2] at each time: of pairs of chosen experts, of all pairs
        self.growth: list[Tensor] = []  # [B] at each start
        self.changes: list[Tensor] = []  # [B] from n to 2n, 2n to 4n, n to 4n steps

    def go(self, noise: Tensor) -> None:
        steps = self.draw.steps
        grid = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
        starts = start_steps(self.draw)

        def look(index: int, x: Tensor) -> None:
            if index < steps:
                self._look(x, grid[index].expand(len(x)))
            if index in starts:
                self.growth.append(self._growth(x, grid[index:], self.seeds, index))

        look(0, noise)
        ends = [self._drawn(noise, grid, lambda index, x: look(index + 1, x))]
        for factor in (2, 4):
            fine = torch.linspace(1, 0, factor * steps + 1, dtype=noise.dtype, device=noise.device)
            ends.append(self._drawn(noise, fine))
        for a, b in ((0, 1), (1, 2), (0, 2)):
            self.changes.append((ends[a] - ends[b]).flatten(1).square().mean(1).sqrt().cpu().double())

    def _drawn(self, x: Tensor, times: Tensor, callback: Callable[[int, Tensor], None] | None = None) -> Tensor:
        return sample(self.velocity, x, method=self.draw.method, times=times, callback=callback)

    def _look(self, x: Tensor, t: Tensor) -> None:
        with self.ensemble.tracing() as trace:
            u = self.velocity(x, t)
        self.weights.append(trace.weights[0])
        if self.space is not None:
            x0 = x - per_sample(t, x) * u  # u = eps - x0 on the linear path
            for kind, distances in self.space.distances(x0).items():
                self.distances.setdefault(kind, []).append(distances.cpu().double())
        velocities = torch.stack([velocity(x, t) for velocity in self.alone], dim=1)
        angles, chosen = angles_between(velocities), chosen_of(self.weights[-1]).to(x.device)
        of_pairs = [mean_of_pairs(angles, those) for those in (chosen, torch.ones_like(chosen))]
        self.angles.append(torch.stack(of_pairs, dim=1).cpu().double())

    def _growth(self, x: Tensor, times: Tensor, seeds: Sequence[int], index: int) -> Tensor:
        """|dx0| / |dx| [B] of one random perturbation of x [B, ...] at the first of the times."""
        seeds = [seed * self.draw.steps + index for seed in seeds]
        noise = seeded_noise(seeds, x.shape[1:]).to(x)
        moved = x + PERTURBATION * noise
        change = (self._drawn(moved, times) - self._drawn(x, times)).flatten(1).norm(dim=1)
        return (change / (moved - x).flatten(1).norm(dim=1)).cpu().double()


def start_steps(draw: Draw) -> list[int]:
    """The numbers of the steps from which perturbations are followed: those that begin nearest to `draw.starts`."""
    return sorted({min(draw.steps - 1, max(0, round((1 - t) * draw.steps))) for t in draw.starts})


def angles_between(velocities: Tensor) -> Tensor:
    """Angles in degrees between E velocities [B, E, ...] of each sample: [B, E, E], above the diagonal; 0 elsewhere.

    2 atan2(|a - b|, |a + b|) of unit vectors (Kahan), which is exact at 0, where the arc cosine is not.
    """
    unit = F.normalize(velocities.flatten(2), dim=2)
    found = unit.new_zeros(len(unit), unit.shape[1], unit.shape[1])
    for e in range(unit.shape[1] - 1):
        one, others = unit[:, e : e + 1], unit[:, e + 1 :]
        found[:, e, e + 1 :] = 2 * torch.atan2((one - others).norm(dim=2), (one + others).norm(dim=2))
    return torch.rad2deg(found)


def mean_of_pairs(angles: Tensor, those: Tensor) -> Tensor:
    """Mean of angles [B, E, E] over the pairs of `those` experts [B, E] bool: [B], NaN where there is no pair."""
    pairs = (those[:, :, None] & those[:, None]).triu(1)
    return torch.where(pairs, angles, 0).sum((1, 2)) / pairs.sum((1, 2))


def _joined(
    walks: Sequence[_Walk], ensemble: Ensemble, draw: Draw, space: ClusterSpace | None, owned: Sequence[Sequence[int]]
) -> Trajectory:
    """Means over all images."""
    n = draw.steps
    times = tuple((n - step) / n for step in range(n))
    weights = _whole([walk.weights for walk in walks])  # [n, T, E]
    starts = start_steps(draw)
    growth, error = mean_and_error(_whole([walk.growth for walk in walks])) if starts else (torch.empty(0),) * 2
    changes = _whole([walk.changes for walk in walks]).mean(0).tolist()
    pairs = ((n, 2 * n), (2 * n, 4 * n), (n, 4 * n))
    distances = {kind: _whole([walk.distances[kind] for walk in walks]) for kind in walks[0].distances}  # [n, T, K]
    return Trajectory(
        images=len(weights),
        routing=ensemble.routing,
        steps=n,
        method=draw.method,
        guidance_scale=draw.guidance_scale,
        space="" if space is None else space.name,
        times=times,
        distances=tuple(_cluster_distance(kind, every, weights, owned) for kind, every in distances.items()),
        disagreement=_disagreement(_whole([walk.angles for walk in walks]), weights),
        sensitivity=Sensitivity(
            tuple(times[index] for index in starts), tuple(growth.tolist()), tuple(error.tolist()), PERTURBATION
        ),
        refinement=Refinement(
            (n, 2 * n, 4 * n), tuple((a, b, change) for (a, b), change in zip(pairs, changes, strict=True))
        ),
    )


def _whole(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Of each batch, its images' values [B, ...] at each time: [n, T, ...] of all images."""
    return torch.cat([torch.stack(tuple(part), dim=1) for part in parts])


def _cluster_distance(kind: str, distances: Tensor, weights: Tensor, owned: Sequence[Sequence[int]]) -> ClusterDistance:
    """From each image's distances [n, T, K] to the clusters, its experts' weights [n, T, E] and their clusters."""
    of_expert = torch.stack([distances[..., list(clusters)].amin(-1) for clusters in owned], dim=-1)  # [n, T, E]
    chosen, unchosen = by_choice(of_expert, weights)
    covers = torch.tensor([[k in clusters for clusters in owned] for k in range(distances.shape[-1])])  # [K, E]
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
    """From each image's mean angles [n, T, 2], and the weights [n, T, E], which tell who has two chosen experts."""
    there = chosen_of(weights).sum(-1) > 1  # [n, T]
    chosen = [float(angles[there[:, m], m, 0].mean()) for m in range(angles.shape[1])]
    return Disagreement(tuple(chosen), tuple(angles[..., 1].mean(0).tolist()))
