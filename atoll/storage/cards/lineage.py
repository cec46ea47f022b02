"""How clusters grew: older assignments, and what each of their clusters is now.

A cluster keeps its number for ever. A step of growth adds one cluster, whose number is the old number of clusters:
either new data, or the second part of a cluster that was split. So the ancestors alone tell every step.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from atoll.storage import bounds
from atoll.storage.bounds import Name
from atoll.storage.cards.record import CardRecord


class AncestorRecord(CardRecord):
    """An older assignment.

    Attributes:
        assignment: its hash.
        clusters: for each of its clusters, the clusters that hold the same images now.
    """

    assignment: Name
    clusters: Annotated[tuple[bounds.Clusters, ...], Field(min_length=1, max_length=bounds.MAX_CLUSTERS)]


Ancestors = Annotated[tuple[AncestorRecord, ...], Field(max_length=bounds.MAX_ANCESTORS)]  # the oldest first


@dataclass(frozen=True)
class Lineage:
    """An assignment and its ancestors.

    Attributes:
        assignment: the hash of the current one; None if unknown.
        k: its number of clusters.
        ancestors: the oldest first.
    """

    assignment: str | None
    k: int
    ancestors: tuple[AncestorRecord, ...] = ()

    def check(self) -> None:
        """Raise ValueError unless each ancestor has one cluster less than the next one, all different and below k."""
        # Each step adds one cluster, and no image is in two clusters.
        sizes = [len(ancestor.clusters) for ancestor in self.ancestors] + [self.k]
        if sizes != list(range(sizes[0], sizes[0] + len(sizes))):
            raise ValueError(f"lineage: assignments of {sizes} clusters, expected one more at each step")
        for ancestor in self.ancestors:
            numbers = [number for clusters in ancestor.clusters for number in clusters]
            if len(set(numbers)) < len(numbers) or max(numbers) >= self.k:
                raise ValueError(f"lineage: expected different clusters from 0 to k - 1 = {self.k - 1}")
            # A cluster's number stays with its first part.
            if any(number not in clusters for number, clusters in enumerate(ancestor.clusters)):
                raise ValueError("lineage: expected every old cluster to keep its number")

    def ancestor(self, assignment: str | None) -> AncestorRecord | None:
        """Return the ancestor with this hash; None if there is none."""
        return next((one for one in self.ancestors if one.assignment == assignment), None)

    def knows(self, assignment: str | None) -> bool:
        """Return whether an assignment is this one or an ancestor."""
        return assignment == self.assignment or self.ancestor(assignment) is not None

    def clusters_of(self, assignment: str | None) -> int:
        """Return the number of clusters of a known assignment."""
        ancestor = self.ancestor(assignment)
        return self.k if ancestor is None else len(ancestor.clusters)

    def now(self, assignment: str | None, clusters: tuple[int, ...]) -> tuple[int, ...]:
        """Return what clusters of a known assignment are now.

        Raises:
            ValueError: an unknown assignment, or a number beyond its clusters.
        """
        if not self.knows(assignment):
            raise ValueError(f"assignment {assignment} is not in the lineage of {self.assignment}")
        ancestor = self.ancestor(assignment)
        if ancestor is None:
            return clusters
        # Cards come from strangers: a number may be too large.
        if max(clusters) >= len(ancestor.clusters):
            raise ValueError(f"cluster {max(clusters)} of an assignment of {len(ancestor.clusters)} clusters")
        return tuple(sorted(number for cluster in clusters for number in ancestor.clusters[cluster]))

    def continues(self, older: "Lineage") -> bool:
        """Return whether this is another lineage after some steps of growth, or that lineage itself."""
        if not self.knows(older.assignment) or self.clusters_of(older.assignment) != older.k:
            return False
        # Every older assignment is here too, and its clusters are what the other lineage's became.
        for theirs in older.ancestors:
            mine = self.ancestor(theirs.assignment)
            now = [self.now(older.assignment, clusters) for clusters in theirs.clusters]
            if mine is None or [tuple(sorted(clusters)) for clusters in mine.clusters] != now:
                return False
        return True

    def parents_since(self, assignment: str | None) -> list[int | None]:
        """Return the steps from a known assignment to this one: the cluster that was split, None for a new cluster."""
        parents: list[int | None] = []
        # The steps in between, each an ancestor with the cluster that the next one adds.
        first = next((i for i, one in enumerate(self.ancestors) if one.assignment == assignment), len(self.ancestors))
        for ancestor in self.ancestors[first:]:
            added = len(ancestor.clusters)
            parents.append(next((old for old, now in enumerate(ancestor.clusters) if added in now), None))
        return parents

    def grown(self, assignment: str, parent: int | None) -> "Lineage":
        """Return the lineage after one step.

        Args:
            assignment: the hash of the new assignment.
            parent: the cluster that was split; None for a cluster of new data.
        """
        # The new cluster belongs to whatever its parent belonged to.
        ancestors = [
            AncestorRecord(
                assignment=one.assignment,
                clusters=tuple((*now, self.k) if parent in now else now for now in one.clusters),
            )
            for one in (*self.ancestors, *self._as_ancestor())
        ]
        return Lineage(assignment, self.k + 1, tuple(ancestors))

    def _as_ancestor(self) -> list[AncestorRecord]:
        assert self.assignment is not None, "an unknown assignment does not grow"
        return [AncestorRecord(assignment=self.assignment, clusters=tuple((number,) for number in range(self.k)))]


class DescendedRecord(CardRecord):
    """A record of clusters that may have grown; reading it checks its lineage."""

    @property
    @abstractmethod
    def descent(self) -> Lineage:
        """The assignment with its ancestors."""

    @model_validator(mode="after")
    def _descends(self) -> Self:
        self.descent.check()
        return self
