"""The rows that the report shows, kept while all rows stream by; kept rows of two data sets merge into those of both.

sample/     a uniform sample of all rows: feature, cluster, distance to the cluster's centroid
images/   of each cluster, those nearest the centroid and a uniform sample: latent, cluster, distance
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atoll.cluster.assign import Assigned
from atoll.cluster.sampling import draw, hash_keys
from atoll.storage.cards import ReportRowsCard
from atoll.storage.shards import Shard, Shards, ShardWriter, Split

SAMPLE, IMAGES = "sample", "images"
SAMPLED = 8192  # rows in the sample
REPORT_IMAGES = 24  # images per cluster of either kind


@dataclass(frozen=True, eq=False)
class ReportRow:
    """A row that is kept. distance: to its cluster's centroid. tensor: its feature [D] or its latent [C,H,W]."""

    score: float
    key: str
    caption: str
    split: Split
    cluster: int
    distance: float
    tensor: Tensor


class Smallest:
    """The `most` rows of least score among all that were offered; equal scores by key."""

    def __init__(self, most: int):
        self.most = most
        self.bound = float("inf")  # rows above it are not kept
        self._rows: list[ReportRow] = []

    def offer(self, rows: Iterable[ReportRow]) -> None:
        """Adds rows; those that cannot be among the smallest are dropped now or later."""
        self._rows += (row for row in rows if row.score <= self.bound)
        if len(self._rows) >= 2 * self.most:
            self.rows()

    def rows(self) -> list[ReportRow]:
        """The rows kept, by ascending score."""
        self._rows.sort(key=attrgetter("score", "key"))
        del self._rows[self.most :]
        if len(self._rows) == self.most:
            self.bound = self._rows[-1].score
        return list(self._rows)


class ReportRows:
    """What is kept of k clusters. Memory does not depend on how many rows are offered.

    Attributes:
        sample: rows with features, by their draw. nearest, random: for each cluster, rows with latents.
    """

    def __init__(self, k: int, seed: int):
        self._seed = seed
        self.sample = Smallest(SAMPLED)
        self.nearest = [Smallest(REPORT_IMAGES) for _ in range(k)]
        self.random = [Smallest(REPORT_IMAGES) for _ in range(k)]

    def offer(self, assigned: Assigned, rows: Tensor, hashes: np.ndarray) -> None:
        """Offers some rows [n] of a part, whose keys' hashes are [len(part)]."""
        latents, distances = assigned.part.columns["latent"], assigned.distances
        drawn = draw(hashes, self._seed, SAMPLE)
        chosen = _at_most(drawn, self.sample.bound, rows)
        self.sample.offer(_rows(assigned.part, chosen, drawn, assigned.features, assigned.clusters, distances))
        drawn = draw(hashes, self._seed, IMAGES)
        for c in assigned.clusters[rows].unique().tolist():
            mine = rows[assigned.clusters[rows] == c]
            for kept, scores in ((self.nearest[c], distances.numpy()), (self.random[c], drawn)):
                chosen = _at_most(scores, kept.bound, mine)
                kept.offer(_rows(assigned.part, chosen, scores, latents, assigned.clusters, distances))

    def adopt(self, directory: Path) -> None:
        """Offers what was written there."""
        for part in Shards(directory / SAMPLE).parts():
            drawn = draw(hash_keys(part.keys), self._seed, SAMPLE)
            self.sample.offer(_stored(part, drawn, "feature"))
        for part in Shards(directory / IMAGES).parts():
            drawn = draw(hash_keys(part.keys), self._seed, IMAGES)
            for row in _stored(part, drawn, "latent"):
                self.random[row.cluster].offer([row])
            for row in _stored(part, part.columns["distance"].numpy(), "latent"):
                self.nearest[row.cluster].offer([row])

    def write(self, directory: Path) -> None:
        """Writes sample/ and images/ into a directory."""
        _write(directory / SAMPLE, "feature", self.sample.rows())
        images = {row.key: row for kept in (*self.nearest, *self.random) for row in kept.rows()}
        _write(directory / IMAGES, "latent", sorted(images.values(), key=attrgetter("cluster", "key")))


def _at_most(scores: np.ndarray, bound: float, rows: Tensor) -> Tensor:
    return rows[torch.from_numpy(scores <= bound)[rows]]


def _rows(
    part: Shard, rows: Tensor, scores: np.ndarray, tensors: Tensor, clusters: Tensor, distances: Tensor
) -> Iterator[ReportRow]:
    for i in rows.tolist():
        text = part.keys[i], part.captions[i], part.splits[i]
        yield ReportRow(scores[i].item(), *text, int(clusters[i]), float(distances[i]), tensors[i].clone())


def _stored(part: Shard, scores: np.ndarray, column: str) -> Iterator[ReportRow]:
    columns = part.columns
    return _rows(part, torch.arange(len(part)), scores, columns[column], columns["cluster"], columns["distance"])


def _write(directory: Path, column: str, rows: list[ReportRow]) -> None:
    with ShardWriter(directory, ReportRowsCard(kept=directory.name)) as writer:
        writer.append(
            [row.key for row in rows],
            [row.caption for row in rows],
            [row.split for row in rows],
            {
                column: torch.stack([row.tensor for row in rows]),
                "cluster": torch.tensor([row.cluster for row in rows]),
                "distance": torch.tensor([row.distance for row in rows]),
            },
        )
