"""Each expert's error on held-out latents: chosen against other experts, and each expert in each cluster.

Each expert is evaluated alone, with the alignment and calibration that it has within the ensemble.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from atoll.ensemble import Ensemble, Sampler
from atoll.evaluate.diagnostics.routers import LEVELS, HeldOut
from atoll.evaluate.metrics.frechet import squared_errors

CHOSEN = 0.01  # an expert counts as chosen from this weight on; the expert with the largest weight always does

Series = tuple[float, ...]
Table = tuple[Series, ...]


@dataclass(frozen=True)
class ExpertErrors:
    """E |u_e - (eps - x0)|^2 per latent value of each expert alone, on held-out latents.

    Attributes:
        count: held-out latents n.
        names: of the experts [E].
        clusters: that each expert covers [E].
        counts: latents of each cluster [K].
        levels: times t of the linear path [M].
        chosen: error of the experts that the routing chooses at x_t, with its weights, mean over latents [M].
        unchosen: error of the other experts, mean over experts, then over latents that have any [M]; NaN without any.
        chosen_error, unchosen_error: standard errors of these means [M].
        fused: error of the ensemble's own velocity [M]. The square is convex, so it exceeds `chosen` only by the
            contribution of experts below `CHOSEN`.
        matrix: error of expert e (column) in cluster k (row), mean over levels [K, E]; NaN for a cluster without
            latents.
        matrix_error: standard errors of these means, from the variance between latents [K, E].
        by_level, by_level_error: the same at each level [M, K, E].
        over_other_clusters: error in the expert's own clusters over its error in others, with equal weight per cluster
            [E]. Some clusters are harder for every expert, so 1 is not always the threshold.
        over_other_experts: error in the expert's own clusters over the error of experts that do not cover them, in the
            same clusters [E]; below 1 if the expert is better there than the others.
    """

    count: int
    names: tuple[str, ...]
    clusters: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    levels: Series
    chosen: Series
    chosen_error: Series
    unchosen: Series
    unchosen_error: Series
    fused: Series
    matrix: Table
    matrix_error: Table
    by_level: tuple[Table, ...]
    by_level_error: tuple[Table, ...]
    over_other_clusters: Series
    over_other_experts: Series


@torch.inference_mode()
def measure_experts(
    ensemble: Ensemble,
    held_out: HeldOut,
    levels: Sequence[float] = LEVELS,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> ExpertErrors:
    """Evaluate the ensemble, then each expert alone, on the same noisy latents, without guidance.

    The noise is that of `squared_errors`, so the errors are comparable with any denoising error at the same levels and
    seeds. Beside a batch, memory is one number per latent, level and expert.

    Args:
        ensemble: with routing "oracle", the labels are the clusters.
        held_out: latents with their clusters.
        levels: times t of the linear path.
        batch: latents at a time.
        device: of the networks.

    Returns:
        Errors by choice, by cluster and by level.
    """
    # The ensemble, with its weights.
    experts = ensemble.experts
    fused, weights = _ensemble_errors(ensemble, held_out, levels, batch, device)
    # Each expert alone, on the same noise: [n, M, E].
    errors = torch.stack([_errors(alone, held_out, levels, batch, device) for alone in each_alone(ensemble)], dim=2)
    chosen, unchosen = by_choice(errors, weights)  # [2, M] each: mean and standard error
    # Means and standard errors by cluster, at each level and over the levels.
    # A cluster may have an expert but no held-out latents, or the reverse.
    k = max(held_out.clusters, 1 + max(max(expert.clusters) for expert in experts))
    labels = held_out.labels.cpu()
    mine = [errors[labels == cluster] for cluster in range(k)]  # [n_k, M, E] each
    # At each level, and as means over the levels per latent.
    cells = torch.stack([torch.stack(mean_and_error(part)) for part in mine])  # [K, 2, M, E]
    rows = torch.stack([torch.stack(mean_and_error(part.mean(1))) for part in mine])  # [K, 2, E]
    # The experts' own clusters, among those with latents.
    owned = torch.tensor([[cluster in expert.clusters for expert in experts] for cluster in range(k)])
    nonempty = [cluster for cluster in range(k) if len(mine[cluster])]
    return ExpertErrors(
        count=len(errors),
        names=tuple(expert.name for expert in experts),
        clusters=tuple(expert.clusters for expert in experts),
        counts=tuple(len(part) for part in mine),
        levels=tuple(levels),
        chosen=tuple(chosen[0].tolist()),
        chosen_error=tuple(chosen[1].tolist()),
        unchosen=tuple(unchosen[0].tolist()),
        unchosen_error=tuple(unchosen[1].tolist()),
        fused=tuple(fused.double().mean(0).tolist()),
        matrix=_table(rows[:, 0]),
        matrix_error=_table(rows[:, 1]),
        by_level=tuple(_table(level) for level in cells[:, 0].unbind(1)),
        by_level_error=tuple(_table(level) for level in cells[:, 1].unbind(1)),
        over_other_clusters=_over_other_clusters(rows[nonempty, 0], owned[nonempty]),
        over_other_experts=_over_other_experts(rows[nonempty, 0], owned[nonempty]),
    )


def _ensemble_errors(
    ensemble: Ensemble, held_out: HeldOut, levels: Sequence[float], batch: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Errors of the ensemble's own velocity [n, M], and its experts' weights [n, M, E]."""
    # An expert that outputs NaN stays in.
    sampler = Sampler(ensemble, non_finite="keep")
    fused, weights = [], []
    for part in held_out.batches(batch, device):
        # The labels serve routing "oracle"; other routings ignore them.
        velocity = partial(sampler.velocity, cluster=part.labels)
        with sampler.tracing() as trace:
            fused.append(squared_errors(velocity, part.x0, part.condition, levels, part.seeds).cpu())
        # The trace holds one entry per level.
        weights.append(torch.stack(trace.weights, dim=1))
    return torch.cat(fused), torch.cat(weights)


def _errors(
    expert: Ensemble, held_out: HeldOut, levels: Sequence[float], batch: int, device: torch.device | str
) -> Tensor:
    """Errors of one ensemble on all held-out latents, [n, M], float64."""
    # The same batches and seeds for every expert.
    parts = held_out.batches(batch, device)
    errors = [squared_errors(expert.velocity, p.x0, p.condition, levels, p.seeds).cpu() for p in parts]
    return torch.cat(errors).double()


def each_alone(ensemble: Ensemble) -> tuple[Ensemble, ...]:
    """Each expert as an ensemble of one: guided and aligned as it is within the ensemble."""
    # One expert needs no router.
    return tuple(
        Ensemble([expert], None, "full", ensemble.alignment, null=ensemble.null) for expert in ensemble.experts
    )


def chosen_of(weights: Tensor) -> Tensor:
    """Experts that count as chosen, [..., E] bool: at least `CHOSEN` of the weights [..., E], or the largest."""
    return weights >= weights.amax(-1, keepdim=True).clamp(max=CHOSEN)


def by_choice(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error [2, M] over n images, of the chosen experts' values and of the others' values.

    Args:
        values: [n, M, E].
        weights: [n, M, E]; the chosen experts' values are weighted by them, the others' equally.

    Returns:
        (chosen, others).
    """
    # Select by `where`, not by zero weights: 0 times infinity is NaN.
    chosen = chosen_of(weights)
    chosen_weights = torch.where(chosen, weights.to(values), 0)
    # The weighted mean over chosen experts, and the plain mean over others.
    own = torch.where(chosen, values * chosen_weights, 0).sum(-1) / chosen_weights.sum(-1)
    others = torch.where(chosen, 0, values).sum(-1) / (~chosen).sum(-1)
    # Images without other experts do not count in the others' mean.
    has_others = (~chosen).any(-1)  # [n, M]
    columns = [mean_and_error(others[has_others[:, m], m]) for m in range(has_others.shape[1])]
    return torch.stack(mean_and_error(own)), torch.stack([torch.stack(column) for column in columns], dim=1)


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of values [n, ...] over n and its standard error; NaN for none, and an error of NaN for one."""
    if len(values) == 0:
        nothing = values.new_full(values.shape[1:], math.nan)
        return nothing, nothing
    # One value has no spread.
    error = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(values[0], math.nan)
    return values.mean(0), error


def _table(values: Tensor) -> Table:
    return tuple(tuple(row) for row in values.tolist())


def _over_other_clusters(matrix: Tensor, owned: Tensor) -> Series:
    """[E] from the errors [K, E] and who covers which cluster [K, E]; NaN if all or none are an expert's own."""
    # One column per expert.
    columns = zip(matrix.T, owned.T, strict=True)
    return tuple(float(column[own].mean() / column[~own].mean()) for column, own in columns)


def _over_other_experts(matrix: Tensor, owned: Tensor) -> Series:
    """[E] from the same: the mean over an expert's clusters of its error over the mean error of the others."""
    # The mean error of the experts that do not cover each cluster.
    others = torch.where(owned, 0, matrix).sum(1) / (~owned).sum(1)  # [K]
    # A cluster that every expert covers has no others to compare with.
    has_others = owned & ~owned.all(1, keepdim=True)
    return tuple(float((matrix[rows, e] / others[rows]).mean()) for e, rows in enumerate(has_others.T))
