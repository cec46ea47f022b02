"""Clusters that grow: a cluster of new data, or a cluster split in two (`atoll cluster --new-cluster`, `--split`).

Every old cluster keeps its number, and every directory that the step does not concern is linked as it is, its index
included: what was trained from it, or is being trained, stays valid. clusters.json keeps the lineage, which says what
each cluster of an older assignment is now.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.cluster.add import both_cuts, refuse_other
from atoll.cluster.assign import Assigned, Assignment, load_assignment
from atoll.cluster.balance import balanced, weighted_means
from atoll.cluster.dedupe import already_there
from atoll.cluster.fit import ROWS_PER_CENTROID, ClusterProgress, fine_stage, free_coarse, survey
from atoll.cluster.grow_write import GrownClusters
from atoll.cluster.nearest import Workers, nearest, unit_features
from atoll.cluster.run import cut_of, finish, island_card, open_encoded, say_counts, statistics_line
from atoll.cluster.sampling import hash_keys
from atoll.cluster.write import append_rows, latent_shapes, shard_rows
from atoll.encoders.trust import STRANGER, Trust
from atoll.errors import AtollError
from atoll.storage.artifact import load_card, whole_directory
from atoll.storage.cards import ClusteringCard, ClustersCard, ClusterShardsCard
from atoll.storage.layout import CLUSTERS_CARD, cluster_path
from atoll.storage.shards import SPLITS, Shard, Shards, ShardWriter


@dataclass(frozen=True, eq=False)
class _Clusters:
    """Clusters that are to grow: their card, fine centroids [F,D] with their clusters [F], and means [k,D]."""

    out: Path
    card: ClustersCard
    fine: Tensor
    coarse_of_fine: Tensor
    coarse: Tensor

    @staticmethod
    def load(out: Path) -> "_Clusters":
        card = load_card(out / CLUSTERS_CARD, ClustersCard)
        assignment = load_assignment(out, card)
        if assignment.fine is None or assignment.coarse_of_fine is None or assignment.coarse is None:
            raise AtollError(f"{out}: random clusters have no meaning that could grow; add images with --assign-only")
        return _Clusters(out, card, assignment.fine, assignment.coarse_of_fine, assignment.coarse)

    def grown(self, fine: Tensor, coarse_of_fine: Tensor, coarse: Tensor) -> Assignment:
        """Return the assignment to one cluster more."""
        return Assignment(self.card.method, self.card.k + 1, self.card.seed, fine, coarse_of_fine, coarse)

    def clustering(self, assignment: Assignment, parent: int | None, **changes: Any) -> ClusteringCard:
        """Return the card of the clusters after one step of growth, with its lineage."""
        lineage = self.card.descent.grown(assignment.sha256(self.card.feature), parent)
        values = {key: value for key, value in self.card.plain().items() if key in ClusteringCard.model_fields}
        about = {"k": lineage.k, "assignment": lineage.assignment, "lineage": lineage.ancestors}
        return ClusteringCard(**{**values, **about, **changes})


def add_cluster(out: Path, encoded: Path, progress: ClusterProgress | None = None, trust: Trust = STRANGER) -> str:
    """Add the images of `encoded` to the clusters at `out` as a cluster of their own.

    Images that are there already are skipped. All others belong to the new cluster, wherever their features are; its
    fine centroids are fitted to them and join the old ones, so that images added later find it. `out` is replaced
    atomically.

    Args:
        out: a finished clusters/ directory.
        encoded: shards with features.
        progress: called after each shard.
        trust: what the codec in the card may reach, to show images.

    Returns:
        A line that says what was done.

    Raises:
        AtollError: as `assign_only`; random clusters; no new training image.
    """
    # The clusters, and the images that are new to them.
    old, shards = _Clusters.load(out), open_encoded(encoded, out)
    card, number, tell = old.card, old.card.k, progress or (lambda done, rows, note: None)
    refuse_other(shards, out, card, Shards(cluster_path(out, 0)))
    tell(0, len(shards), "looking for known images")
    new = torch.from_numpy(~already_there(shards, out, card.k))
    training = torch.zeros(len(shards), dtype=torch.bool).index_fill(0, shards.rows("train"), True)
    if not (new & training).any():
        raise AtollError(f"{encoded}: no training image that {out} does not hold already; name new images")
    with Workers() as workers, whole_directory(out) as directory:
        # As many fine centroids as the other clusters have, if there are images enough.
        fine = max(1, min(len(old.fine) // card.k, int(training.sum()) // 2))
        surveyed = survey(shards, card.seed, ROWS_PER_CENTROID * fine)
        stage = fine_stage(shards, surveyed, fine=fine, seed=card.seed, workers=workers, progress=tell)
        labels = torch.full((len(stage.centroids),), number)
        mean = weighted_means(stage.centroids, stage.counts.double(), torch.zeros_like(labels), 1).float()
        # The old centroids come first: an image between two clusters belongs to the old one.
        centroids, clusters_of = torch.cat([old.fine, stage.centroids]), torch.cat([old.coarse_of_fine, labels])
        assignment = old.grown(centroids, clusters_of, torch.cat([old.coarse, mean]))
        changes = {"encoded": (*card.encoded, shards.sha256), "fine": len(centroids)}
        clustering = old.clustering(assignment, None, **changes)
        # The new cluster's shards, and its rows of what all clusters share.
        island = island_card(clustering, shards).model_copy(update={"cluster": number})
        nearer = 0
        with (
            GrownClusters(directory, out, card, clustering) as output,
            _writer(cluster_path(directory, number), island, shards) as writer,
        ):
            for assigned in workers.map(lambda part: _all_in(part, encoded, number, mean[0]), shards.parts()):
                part, rows = assigned.part, _within(new, assigned.part)
                append_rows(writer, part, rows, _columns(part, rows))
                output.add(assigned, rows)
                nearer += int((clusters_of[nearest(assigned.features[rows], centroids)[0]] != number).sum())
                tell(part.start + len(part), len(shards), "adding")
        cut = both_cuts(card.cut, cut_of(shards))
        card = finish(directory, clustering, assignment, output, workers=workers, tell=tell, trust=trust, cut=cut)
    statistics = statistics_line(encoded, card.codec)
    note = f", {nearer:,} of its images nearer to an older one" if nearer else ""
    return f"{out}: cluster {number} is new{note}: {say_counts(card)}; {_next(card)}{statistics}"


def split_cluster(
    out: Path,
    number: int,
    encoded: Sequence[Path],
    progress: ClusterProgress | None = None,
    trust: Trust = STRANGER,
) -> str:
    """Split a cluster in two by balanced 2-means over its fine centroids.

    The part with the first training image keeps the number, the other one becomes the last cluster. `out` is replaced
    atomically.

    Args:
        out: a finished clusters/ directory.
        number: of the cluster.
        encoded: shards with the features of all its images, such as the run's encoded/.
        progress: called after each shard.
        trust: what the codec in the card may reach, to show images.

    Returns:
        A line that says what was done.

    Raises:
        AtollError: no such cluster; random clusters; an image without a feature in `encoded`; fine centroids that do
            not divide evenly.
    """
    old, tell = _Clusters.load(out), progress or (lambda done, rows, note: None)
    card = old.card
    if not 0 <= number < card.k:
        raise AtollError(f"--split {number}: {out} has the clusters 0 to {card.k - 1}")
    # The features of the cluster's rows are in encoded/ alone.
    rows, sources = Shards(cluster_path(out, number)), [open_encoded(path, out) for path in encoded]
    for shards in sources:
        refuse_other(shards, out, card, rows)
    with Workers() as workers, whole_directory(out) as directory:
        position = {key: row for row, key in enumerate(rows.keys)}
        assignment, moves = _fit_parts(
            old, number, rows, _nearest_own(old, number, sources, position, workers), workers
        )
        clustering = old.clustering(assignment, number)
        moved = {key for key, moves_on in zip(rows.keys, moves.tolist(), strict=True) if moves_on}
        with GrownClusters(directory, out, card, clustering, number, moved) as output:
            _write_parts(directory, rows, moves, clustering, number, output)
            assert assignment.coarse is not None
            _offer_again(sources, position, moves, number, assignment.coarse, output)
        card = finish(directory, clustering, assignment, output, workers=workers, tell=tell, trust=trust, cut=card.cut)
    return (
        f"{out}: cluster {number} is split, its second part is cluster {card.k - 1}: {say_counts(card)}; {_next(card)}"
    )


def _fit_parts(
    old: _Clusters, number: int, rows: Shards, fine_of: Tensor, workers: Workers
) -> tuple[Assignment, Tensor]:
    """Divide the fine centroids of a cluster.

    Args:
        old: the clusters.
        number: of the cluster.
        rows: its shards.
        fine_of: for each of its rows the nearest of its fine centroids [n] int64, numbered among them.
        workers: threads.

    Returns:
        The new assignment, and which rows belong to the second part [n] bool.
    """
    own, train = (old.coarse_of_fine == number).nonzero().flatten(), rows.rows("train")
    weights = fine_of[train].bincount(minlength=len(own)).double()
    where = f"{old.out}: cluster {number}"
    second = _halves(old.fine[own], weights, old.card.seed, workers, where).bool()  # [fine centroids of the cluster]
    # The first training image stays.
    if second[fine_of[train[0]]]:
        second = ~second
    # The same fine centroids, some of them of the new cluster.
    coarse_of_fine = old.coarse_of_fine.clone()
    coarse_of_fine[own[second]] = old.card.k
    means = weighted_means(old.fine[own], weights, second.long(), 2).float()
    coarse = torch.cat([old.coarse, means[1:]])
    coarse[number] = means[0]
    return old.grown(old.fine, coarse_of_fine, coarse), second[fine_of]


def _next(card: ClustersCard) -> str:
    return f"set clusters.k: {card.k} in atoll.yaml, and run `atoll train router --extend`"


def _writer(path: Path, card: ClusterShardsCard, shards: Shards) -> ShardWriter:
    # Two writers at a time, each with a buffer of one shard.
    columns = [name for name in shards.columns if name != "feature"]
    return ShardWriter(path, card, shard_rows(shards, columns, 1), latent_shapes(shards))


def _columns(part: Shard, rows: Tensor) -> dict[str, Tensor]:
    """The columns that clusters store, of rows [n] int64."""
    return {name: column[rows] for name, column in part.columns.items() if name != "feature"}


def _within(rows: Tensor, part: Shard) -> Tensor:
    """The positions within a shard of rows that are marked in [all rows] bool, [n] int64."""
    return rows[part.start : part.start + len(part)].nonzero().flatten()


def _all_in(part: Shard, path: Path, number: int, mean: Tensor) -> Assigned:
    """All rows of a shard as rows of one cluster with this mean [D]."""
    features = unit_features(part, torch.arange(len(part)), path)
    blank = int((features == 0).all(1).sum())
    return Assigned(part, features, torch.full((len(part),), number), (features - mean).norm(dim=1), blank)


def _known(part: Shard, position: dict[str, int]) -> tuple[Tensor, Tensor]:
    """The rows of a shard whose key is in `position`, and their values in it; [n] int64 each."""
    pairs = [(row, position[key]) for row, key in enumerate(part.keys) if key in position]
    both = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _nearest_own(
    old: _Clusters, number: int, sources: Sequence[Shards], position: dict[str, int], workers: Workers
) -> Tensor:
    """Find the nearest of a cluster's own fine centroids for each of its rows.

    Args:
        old: the clusters.
        number: of the cluster.
        sources: shards with features.
        position: the row of each key of the cluster.
        workers: threads.

    Returns:
        [n] int64, numbered among the cluster's fine centroids.

    Raises:
        AtollError: a row is in none of the sources.
    """
    own, result = old.fine[old.coarse_of_fine == number], torch.full((len(position),), -1)

    def search(item: tuple[Shards, Shard]) -> tuple[Tensor, Tensor]:
        shards, part = item
        rows, places = _known(part, position)
        return places, nearest(unit_features(part, rows, shards.path), own)[0]

    for places, numbers in workers.map(search, _parts(sources)):
        result[places] = numbers
    # Without its feature, a row has no part.
    absent = result < 0
    if absent.any():
        lacking = [key for key, row in position.items() if absent[row]]
        raise AtollError(
            f"{old.out}: {len(lacking):,} images of cluster {number}, such as {lacking[0]!r}, have no feature in "
            f"{', '.join(str(shards.path) for shards in sources)}; name all encoded data of the run with --encoded"
        )
    return result


def _parts(sources: Sequence[Shards]) -> Iterator[tuple[Shards, Shard]]:
    for shards in sources:
        for part in shards.parts():
            yield shards, part


def _halves(points: Tensor, weights: Tensor, seed: int, workers: Workers, where: str) -> Tensor:
    """Balanced 2-means of fine centroids [n,D] that weigh [n] float64; labels 0 or 1, [n] int64."""
    used = (weights > 0).nonzero().flatten()
    if len(used) < 2:
        raise AtollError(f"{where} has {len(used)} fine centroid with images; it cannot be split")
    # The free 2-means is the starting point of the balanced one.
    labels = free_coarse(points[used], weights[used], 2, seed, workers)
    try:
        labels = balanced(points[used], weights[used], labels, 2, distinct=True)
    except AtollError:
        heaviest = int(weights.max())
        raise AtollError(
            f"{where} cannot be split evenly: one fine centroid holds {heaviest:,} of its {int(weights.sum()):,} "
            "training images"
        ) from None
    # A fine centroid without training images follows the nearer part.
    means = weighted_means(points[used], weights[used], labels, 2).float()
    result = nearest(points, means)[0]
    result[used] = labels
    return result


def _write_parts(
    directory: Path, rows: Shards, moves: Tensor, clustering: ClusteringCard, number: int, output: GrownClusters
) -> None:
    """Write the shards of both parts of a split cluster, in the order of its rows, and count them."""
    island = rows.card(ClusterShardsCard)
    about = {"clusters": clustering.k, "assignment": clustering.assignment}
    for cluster, mine in ((number, ~moves), (clustering.k - 1, moves)):
        card = island.model_copy(update={**about, "cluster": cluster})
        with _writer(cluster_path(directory, cluster), card, rows) as writer:
            for part in rows.parts():
                chosen = _within(mine, part)
                append_rows(writer, part, chosen, _columns(part, chosen))
        output.counts[cluster] = {split: int(mine[rows.rows(split)].sum()) for split in SPLITS}


def _offer_again(
    sources: Sequence[Shards],
    position: dict[str, int],
    moves: Tensor,
    number: int,
    coarse: Tensor,
    output: GrownClusters,
) -> None:
    """Offer the rows of a split cluster to the report, with their new numbers and distances."""
    seen = torch.zeros(len(moves), dtype=torch.bool)
    for shards, part in _parts(sources):
        rows, places = _known(part, position)
        # Two sources may hold the same image: it is offered once.
        rows, places = rows[~seen[places]], places[~seen[places]]
        seen[places] = True
        if not len(rows):
            continue
        features = unit_features(part, torch.arange(len(part)), shards.path)
        clusters = torch.full((len(part),), number)
        clusters[rows[moves[places]]] = len(coarse) - 1
        distances = (features - coarse[clusters]).norm(dim=1)
        output.report_rows.offer(Assigned(part, features, clusters, distances, 0), rows, hash_keys(part.keys))
