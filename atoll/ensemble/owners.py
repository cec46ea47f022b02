"""Which expert stands for which cluster, at every noise level.

An expert of some levels (`Objective.levels`) counts only at low <= t < high, and at t = 1 if high is 1. Among those
that count, the narrowest that cover a cluster own it: a generalist stands in at the levels where no narrower one is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.ensemble.expert import Expert
from atoll.ensemble.routing import Routing
from atoll.errors import AtollError


@dataclass(frozen=True, eq=False)
class Owners:
    """The owners of all clusters between any two neighbouring edges of levels.

    Attributes:
        edges: path times at which the owners change, between 0 and 1, increasing, L - 1 of them; none without levels.
        tables: L tables [E, K]: 1 where an expert owns a cluster.
    """

    edges: tuple[float, ...]
    tables: tuple[Tensor, ...]

    @classmethod
    def of(cls, experts: Sequence[Expert], excluded: frozenset[int] = frozenset()) -> "Owners":
        """Return the owners among experts without those, by index, that are excluded."""
        edges = sorted({edge for expert in experts for edge in expert.levels} - {0.0, 1.0})
        tables = []
        for start in (0.0, *edges):
            absent = {i for i, one in enumerate(experts) if not one.levels[0] <= start < one.levels[1]}
            tables.append(cluster_owners(experts, excluded | absent))
        return cls(tuple(edges), tuple(tables))

    @property
    def clusters(self) -> int:
        """The number of clusters K."""
        return self.tables[0].shape[1]

    @property
    def experts(self) -> int:
        """The number of experts E."""
        return self.tables[0].shape[0]

    def like(self, values: Tensor) -> "Owners":
        """Return the owners as tables of the dtype and on the device of [B, K] values, for so many clusters."""
        return Owners(self.edges, tuple(of_clusters(table.to(values), values.shape[1]) for table in self.tables))

    def covered(self, t: Tensor) -> Tensor:
        """Return whether a cluster has an owner at times t [B]: [B, K] bool, or [K] without levels."""
        covered = [table.sum(0) > 0 for table in self.tables]
        return covered[0] if not self.edges else torch.stack(covered)[self._interval(t)]

    def shares(self, values: Tensor, t: Tensor, *, divided: bool = True) -> Tensor:
        """Return the experts' sums [B, E] of their clusters' values.

        Args:
            values: of the clusters [B, K].
            t: times [B].
            divided: whether several owners of a cluster share its value equally; otherwise each has all of it.
        """
        tables = [table / table.sum(0).clamp(min=1) if divided else table for table in self.tables]
        if not self.edges:
            return values @ tables[0].T
        # Rows by their levels, which may differ within a batch.
        sums, interval = values.new_zeros(len(values), len(tables[0])), self._interval(t)
        for number, table in enumerate(tables):
            rows = (interval == number).nonzero().squeeze(1)
            sums[rows] = values[rows] @ table.T
        return sums

    def _interval(self, t: Tensor) -> Tensor:
        """Return the number of each time's table [B] int64; an edge belongs to the levels above it."""
        return torch.searchsorted(torch.tensor(self.edges, dtype=t.dtype, device=t.device), t.contiguous(), right=True)

    def somewhere(self) -> Tensor:
        """Return whether a cluster has an owner at some level, [K] bool."""
        return torch.stack([table.sum(0) > 0 for table in self.tables]).any(0)

    def everywhere(self) -> Tensor:
        """Return whether a cluster has an owner at every level, [K] bool."""
        return torch.stack([table.sum(0) > 0 for table in self.tables]).all(0)

    def levels(self, number: int) -> str:
        """Return the levels of a table, for messages: "0.2 to 1"."""
        bounds = (0.0, *self.edges, 1.0)
        return f"{bounds[number]:g} to {bounds[number + 1]:g}"


def check_levels(experts: Sequence[Expert], owners: Owners, rule: Routing | None = None) -> None:
    """Raise AtollError unless a cluster that has an expert at some level has one at every level.

    Args:
        experts: of the ensemble, also those that are excluded.
        owners: without those that are excluded: some expert must be left at every level.
        rule: the routing, if it is known; one over experts would evaluate them outside of their levels.
    """
    if not owners.edges:
        return
    if rule is not None and rule.over_experts:
        names = ", ".join(expert.name for expert in experts if expert.objective.levels is not None)
        raise AtollError(f"a routing over experts, but {names} are of some levels only; expected one over clusters")
    every = Owners.of(experts)
    for number, table in enumerate(every.tables):
        if missing := (every.somewhere() & (table.sum(0) == 0)).nonzero().flatten().tolist():
            raise AtollError(
                f"no expert of cluster {', '.join(map(str, missing))} at the levels {every.levels(number)}; add one of "
                "these levels, such as a generalist, or change the levels of the others"
            )
        if not owners.tables[number].any():
            raise AtollError(f"all experts of the levels {owners.levels(number)} are excluded; expected one at least")


def of_clusters(owners: Tensor, clusters: int) -> Tensor:
    """Return the owners [E, K] of so many clusters: further ones have no owner, those beyond are left out."""
    return torch.nn.functional.pad(owners, (0, clusters - owners.shape[1]))


def cluster_owners(experts: Sequence[Expert], excluded: frozenset[int] = frozenset()) -> Tensor:
    """Return [E, K]: 1 where an expert is among the narrowest that cover a cluster.

    Args:
        experts: E of them.
        excluded: the indices of experts that take no part.
    """
    # The highest cluster that any expert covers sets the width of the table.
    clusters = max(max(expert.clusters) for expert in experts) + 1
    owners = torch.zeros(len(experts), clusters)
    for k in range(clusters):
        # How many clusters each candidate covers.
        breadths = {
            index: len(expert.clusters)
            for index, expert in enumerate(experts)
            if k in expert.clusters and index not in excluded
        }
        # A generalist stands in only where no narrower expert covers the cluster.
        for index, breadth in breadths.items():
            if breadth == min(breadths.values()):
                owners[index, k] = 1
    return owners
