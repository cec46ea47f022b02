"""The rows that the report shows, selected while all rows are streamed; selections of two data sets can be merged.

sample/     a uniform sample of all rows: feature, cluster, distance to the cluster's centroid
images/     for each cluster the rows nearest to the centroid, and a uniform sample: latent, cluster, distance
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
    """A selected row.

    Attributes:
        score: rows with the smallest scores are selected.
        key: of the image.
        caption: of the image.
        split: "train" or "val".
        cluster: its number.
        distance: to its cluster's centroid.
        tensor: its feature [D] or its latent [C,H,W].
    """

    score: float
    key: str
    caption: str
    split: Split
    cluster: int
    distance: float
    tensor: Tensor


class Smallest:
    """The `count` rows with the smallest scores among all offered ones; ties are broken by the key."""

    def __init__(self, count: int):
        self.count = count
        self.bound = float("inf")  # rows above it are dropped
        self._rows: list[ReportRow] = []

    def offer(self, rows: Iterable[ReportRow]) -> None:
        """Add rows; those that cannot be among the smallest are dropped now or later."""
        self._rows += (row for row in rows if row.score <= self.bound)
        # Sorted only when twice as many have gathered: amortized cost per row is small.
        if len(self._rows) >= 2 * self.count:
            self.rows()

    def rows(self) -> list[ReportRow]:
        """Return the selected rows by ascending score."""
        # Equal scores by key, so that the order of arrival does not matter.
        self._rows.sort(key=attrgetter("score", "key"))
        del self._rows[self.count :]
        # Once full, later rows must be below the largest selected score.
        if len(self._rows) == self.count:
            self.bound = self._rows[-1].score
        return list(self._rows)


class ReportRows:
    """The selected rows of k clusters. Memory does not depend on how many rows are offered.

    Attributes:
        sample: rows with features, in the order of their draws.
        nearest: for each cluster, rows with latents, nearest to the centroid.
        random: for each cluster, rows with latents, a uniform sample.
    """

    def __init__(self, k: int, seed: int):
        self._seed = seed
        self.sample = Smallest(SAMPLED)
        self.nearest = [Smallest(REPORT_IMAGES) for _ in range(k)]
        self.random = [Smallest(REPORT_IMAGES) for _ in range(k)]

    def offer(self, assigned: Assigned, rows: Tensor, hashes: np.ndarray) -> None:
        """Offer rows of a shard.

        Args:
            assigned: the shard with its clusters.
            rows: to offer, [n] int64.
            hashes: of the keys of all its rows.
        """
        # A uniform sample of all rows, for the quality.
        latents, distances = assigned.part.columns["latent"], assigned.distances
        draws = draw(hashes, self._seed, SAMPLE)
        chosen = _at_most(draws, self.sample.bound, rows)
        self.sample.offer(
            _rows(assigned.part, chosen, draws, assigned.features, clusters=assigned.clusters, distances=distances)
        )
        draws = draw(hashes, self._seed, IMAGES)
        # Images of each cluster, for the page.
        for c in assigned.clusters[rows].unique().tolist():
            members = rows[assigned.clusters[rows] == c]
            for smallest, scores in ((self.nearest[c], distances.numpy()), (self.random[c], draws)):
                chosen = _at_most(scores, smallest.bound, members)
                smallest.offer(
                    _rows(assigned.part, chosen, scores, latents, clusters=assigned.clusters, distances=distances)
                )

    def adopt(self, directory: Path, without: int | None = None) -> None:
        """Offer the rows that were written to a directory, except those of the cluster `without`."""
        # The draws follow from the keys, so the stored rows need no scores.
        for part in Shards(directory / SAMPLE).parts():
            stored = _stored(part, draw(hash_keys(part.keys), self._seed, SAMPLE), "feature")
            self.sample.offer(row for row in stored if row.cluster != without)
        # Each stored image is offered to both selections: it may be near, random, or both.
        for part in Shards(directory / IMAGES).parts():
            for row in _stored(part, draw(hash_keys(part.keys), self._seed, IMAGES), "latent"):
                if row.cluster != without:
                    self.random[row.cluster].offer([row])
            for row in _stored(part, part.columns["distance"].numpy(), "latent"):
                if row.cluster != without:
                    self.nearest[row.cluster].offer([row])

    def write(self, directory: Path) -> None:
        """Write sample/ and images/ into a directory."""
        _write(directory / SAMPLE, "feature", self.sample.rows())
        # A row may be selected twice, as near and as random; it is stored once.
        images = {row.key: row for smallest in (*self.nearest, *self.random) for row in smallest.rows()}
        _write(directory / IMAGES, "latent", sorted(images.values(), key=attrgetter("cluster", "key")))


def _at_most(scores: np.ndarray, bound: float, rows: Tensor) -> Tensor:
    return rows[torch.from_numpy(scores <= bound)[rows]]


def _rows(
    part: Shard, rows: Tensor, scores: np.ndarray, tensors: Tensor, *, clusters: Tensor, distances: Tensor
) -> Iterator[ReportRow]:
    for i in rows.tolist():
        text = part.keys[i], part.captions[i], part.splits[i]
        # A copy: a view would hold the whole shard in memory.
        yield ReportRow(scores[i].item(), *text, int(clusters[i]), float(distances[i]), tensors[i].clone())


def _stored(part: Shard, scores: np.ndarray, column: str) -> Iterator[ReportRow]:
    columns = part.columns
    return _rows(
        part,
        torch.arange(len(part)),
        scores,
        columns[column],
        clusters=columns["cluster"],
        distances=columns["distance"],
    )


def _write(directory: Path, column: str, rows: list[ReportRow]) -> None:
    # Images of several shapes: each shape's rows in their order.
    shapes = sorted({tuple(row.tensor.shape) for row in rows})
    with ShardWriter(directory, ReportRowsCard(kept=directory.name), shapes={column: shapes[0]}) as writer:
        for shape in shapes:
            own = [row for row in rows if row.tensor.shape == shape]
            writer.append(
                [row.key for row in own],
                [row.caption for row in own],
                [row.split for row in own],
                {
                    column: torch.stack([row.tensor for row in own]),
                    "cluster": torch.tensor([row.cluster for row in own]),
                    "distance": torch.tensor([row.distance for row in own]),
                },
            )
