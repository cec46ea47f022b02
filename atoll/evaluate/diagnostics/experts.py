"""Each expert's error on held-out latents: the chosen ones' against the others', and who is good at which cluster.

Each expert is asked alone, as it answers within the ensemble (brought to the common path, calibrated).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from atoll.ensemble import Ensemble
from atoll.evaluate.diagnostics.routers import LEVELS, HeldOut
from atoll.evaluate.metrics.frechet import squared_errors

CHOSEN = 0.01  # of the weight: from there on an expert counts as chosen, and the one of the largest weight does anyhow

Series = tuple[float, ...]
Table = tuple[Series, ...]


@dataclass(frozen=True)
class ExpertErrors:
    """E |u_e - (eps - x0)|^2 per latent value of each expert alone, on `count` held-out latents.

    Attributes:
        names: of the experts [E].
        clusters: which each covers [E].
        counts: latents of each cluster [K].
        levels: times t of the linear path [M].
        chosen: of the experts that the routing chooses at x_t, weighted as it weighs them, mean over latents [M].
        unchosen: of the others, mean over experts and then over the latents that have any [M]; NaN where none has.
        chosen_error, unchosen_error: standard errors of these means [M].
        fused: of the ensemble's own velocity [M]; the square is convex, so it is not above `chosen` but by what the
            experts below `CHOSEN` add.
        matrix: of expert e (column) in cluster k (row), mean over levels [K, E]; NaN in a cluster without latents.
        matrix_error: standard errors of these means, from the spread between latents [K, E].
        by_level, by_level_error: the same at each level [M, K, E].
        over_other_clusters: error in the expert's own clusters over its error in others, each cluster counting alike
            [E]; some clusters are harder than others for every expert, so 1 is not always the line.
        over_other_experts: error in the expert's own clusters over that of the experts that do not cover them, there
            [E]: below 1 where it knows its clusters better than others do.
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
    """Asks the ensemble, then each expert alone, for the velocity at the same noisy latents, without guidance.

    The noise is that of `squared_errors`, so these are comparable with any other denoising error of the same levels and
    seeds. Beside a batch, memory is one number per latent, level and expert.

    Args:
        ensemble: with routing "oracle", the labels are the clusters that it is told.
        held_out: latents with their clusters.
        levels: times t of the linear path.
        batch: latents at a time.
        device: where the networks are.
    """
    experts = ensemble.experts
    measured = ensemble.with_options(drops=False)  # as it is: an expert that breaks is not left out
    fused, weights = [], []
    for part in held_out.batches(batch, device):
        velocity = partial(measured.velocity, cluster=part.labels)
        with measured.tracing() as trace:
            fused.append(squared_errors(velocity, part.x0, part.condition, levels, part.seeds).cpu())
        weights.append(torch.stack(trace.weights, dim=1))  # [B, M, E]
    errors = torch.stack([_errors(one, held_out, levels, batch, device) for one in each_alone(ensemble)], dim=2)
    chosen, unchosen = by_choice(errors, torch.cat(weights))  # [2, M] each: mean and standard error
    k = max(held_out.clusters, 1 + max(max(expert.clusters) for expert in experts))
    labels = held_out.labels.cpu()
    mine = [errors[labels == cluster] for cluster in range(k)]  # [n_k, M, E] each
    cells = torch.stack([torch.stack(mean_and_error(part)) for part in mine])  # [K, 2, M, E]
    rows = torch.stack([torch.stack(mean_and_error(part.mean(1))) for part in mine])  # [K, 2, E]
    owned = torch.tensor([[cluster in expert.clusters for expert in experts] for cluster in range(k)])
    there = [cluster for cluster in range(k) if len(mine[cluster])]
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
        fused=tuple(torch.cat(fused).double().mean(0).tolist()),
        matrix=_table(rows[:, 0]),
        matrix_error=_table(rows[:, 1]),
        by_level=tuple(_table(level) for level in cells[:, 0].unbind(1)),
        by_level_error=tuple(_table(level) for level in cells[:, 1].unbind(1)),
        over_other_clusters=_over_other_clusters(rows[there, 0], owned[there]),
        over_other_experts=_over_other_experts(rows[there, 0], owned[there]),
    )


def _errors(
    expert: Ensemble, held_out: HeldOut, levels: Sequence[float], batch: int, device: torch.device | str
) -> Tensor:
    """[n, M], float64."""
    parts = held_out.batches(batch, device)
    found = [squared_errors(expert.velocity, p.x0, p.condition, levels, p.seeds).cpu() for p in parts]
    return torch.cat(found).double()


def each_alone(ensemble: Ensemble) -> tuple[Ensemble, ...]:
    """Each expert as an ensemble of one: guided and aligned as it is within the ensemble."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the ensemble was made
        return tuple(
            Ensemble([expert], None, "full", ensemble.alignment, ensemble.null, drops=False)
            for expert in ensemble.experts
        )


def chosen_of(weights: Tensor) -> Tensor:
    """Which experts count as chosen, [..., E] bool: with at least `CHOSEN` of the weight [..., E], or the most."""
    return weights >= weights.amax(-1, keepdim=True).clamp(max=CHOSEN)


def by_choice(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error [2, M] over n images of the chosen experts' values and of the others'.

    Args:
        values: [n, M, E].
        weights: [n, M, E]; the chosen ones' values are weighted by them, the others count alike.
    """
    chosen = chosen_of(weights)
    kept = torch.where(chosen, weights.to(values), 0)
    # What has no weight is left out before it is multiplied: 0 times infinity is no number.
    own = torch.where(chosen, values * kept, 0).sum(-1) / kept.sum(-1)
    others = torch.where(chosen, 0, values).sum(-1) / (~chosen).sum(-1)
    there = (~chosen).any(-1)  # [n, M]
    columns = [mean_and_error(others[there[:, m], m]) for m in range(there.shape[1])]
    return torch.stack(mean_and_error(own)), torch.stack([torch.stack(column) for column in columns], dim=1)


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of values [n, ...] over n and its standard error; NaN of none, the error also of one."""
    if len(values) == 0:
        nothing = values.new_full(values.shape[1:], math.nan)
        return nothing, nothing
    error = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(values[0], math.nan)
    return values.mean(0), error


def _table(values: Tensor) -> Table:
    return tuple(tuple(row) for row in values.tolist())


def _over_other_clusters(matrix: Tensor, owned: Tensor) -> Series:
    """[E], from clusters with latents [K, E] and who covers them [K, E]; NaN where all or none of them are its own."""
    columns = zip(matrix.T, owned.T, strict=True)
    return tuple(float(column[own].mean() / column[~own].mean()) for column, own in columns)


def _over_other_experts(matrix: Tensor, owned: Tensor) -> Series:
    """[E], of the same: the mean over the expert's clusters of its error by the mean of those who do not cover them."""
    others = torch.where(owned, 0, matrix).sum(1) / (~owned).sum(1)  # [K]
    there = owned & ~owned.all(1, keepdim=True)
    return tuple(float((matrix[rows, e] / others[rows]).mean()) for e, rows in enumerate(there.T))
