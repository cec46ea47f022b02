"""One evaluation of an ensemble's velocity: what is asked, and which experts it needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.ensemble.offload import selection_probs
from atoll.ensemble.owners import Owners
from atoll.ensemble.prompt_cache import PromptSource


@dataclass(frozen=True, eq=False)
class Query:
    """One evaluation of the velocity.

    Attributes:
        x: samples [B, ...].
        t: their times [B].
        prompts: the conditions of B rows; None for an unconditional ensemble.
        scale: each sample's guidance scale [B] away from the null condition; 1 outside the guidance range.
        cluster: each sample's own cluster [B] int64, for routing "oracle".
        weak_scale: each sample's guidance scale [B] away from the weak ensemble; None without one, and `scale` is 1
            with one.
    """

    x: Tensor
    t: Tensor
    prompts: PromptSource | None
    scale: Tensor
    cluster: Tensor | None
    weak_scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Routed:
    """A query with the experts that it needs.

    Attributes:
        query: the query.
        weights: each expert's weight [B, E]; rows sum to 1.
        factors: what each expert's velocity is multiplied by [B, E]: the weights, except for stacked replicas.
        offset: what is added to the experts' velocities [B, ...]: the stacked replicas' pull to their mean.
        rows: for each expert, the rows of the batch that use it [b] int64.
        active: the experts that some row uses, in increasing order.
        stacked: the experts whose answer is stacked, and therefore neither calibrated nor clamped.
        log_p: the clusters' log-probabilities [B, K], -inf where no expert covers one; None if clusters play no part.
        owners: of the clusters; None with log_p.
        per_cluster: each cluster's weight [B, K], which the weak ensemble shares; None if clusters play no part.
    """

    query: Query
    weights: Tensor
    factors: Tensor
    offset: Tensor
    rows: tuple[Tensor, ...]
    active: tuple[int, ...]
    stacked: frozenset[int]
    log_p: Tensor | None
    owners: Owners | None
    per_cluster: Tensor | None

    def selection_probs(self) -> list[float]:
        """Return each expert's probability to be selected in the next step; nothing if clusters play no part."""
        if self.log_p is None or self.owners is None:
            return []
        # Including clusters that the routing cuts off; each of a cluster's owners has its probability.
        return selection_probs(self.owners.shares(torch.softmax(self.log_p, dim=1), self.query.t, divided=False))

    def numbers(self, order: Sequence[int]) -> list[int]:
        """Return how many numbers of x each of these experts is evaluated at; guided rows count twice."""
        guided, per_row = self.query.scale != 1.0, self.query.x[0].numel()
        return [(len(rows) + int(guided[rows].sum())) * per_row for rows in (self.rows[index] for index in order)]
