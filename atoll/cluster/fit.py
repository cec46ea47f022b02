"""Fits the clusters: many fine centroids over the features, then k coarse clusters over the fine centroids.

The two stages are those of DDM (arXiv 2501.05450, section 3.2) and HDDM: the fine stage makes the coarse one cheap, and
balance possible.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.cluster.assign import Assignment, ClusterMethod
from atoll.cluster.balance import balanced, weighted_means
from atoll.cluster.nearest import BLOCK, Workers, nearest, unit_features
from atoll.cluster.sampling import draw, hash_keys, smallest
from atoll.errors import AtollError
from atoll.randomness import cpu_generator, random_rows
from atoll.storage.shards import Shard, Shards

ROWS_PER_CENTROID = 256  # training images per fine centroid that the fine stage reads, at most
_FINE_ROUNDS, _COARSE_ROUNDS, _COARSE_STARTS = 25, 50, 10

ClusterProgress = Callable[[int, int, str], None]  # (rows done, rows in total, what is being done)


@dataclass(frozen=True, eq=False)
class Survey:
    """The result of one pass over all keys.

    Attributes:
        rows: number of images.
        train: number of training images.
        hashes: the smallest draws of training images, ascending: a uniform sample of them.
    """

    rows: int
    train: int
    hashes: np.ndarray


def survey(shards: Shards, seed: int, sample_rows: int) -> Survey:
    """Count the rows and sample at most `sample_rows` training images."""
    rows = train = 0

    # Counts while it yields, so that one pass over the keys suffices.
    def draws() -> Iterator[np.ndarray]:
        nonlocal rows, train
        for part in shards.parts():
            part_draws = _training_draws(part, seed)[1]
            rows, train = rows + len(part), train + len(part_draws)
            yield part_draws

    return Survey(hashes=smallest(draws(), sample_rows), rows=rows, train=train)


def two_stages(
    shards: Shards,
    surveyed: Survey,
    *,
    k: int,
    method: ClusterMethod,
    fine: int,
    seed: int,
    workers: Workers,
    progress: ClusterProgress,
) -> Assignment:
    """Fit fine and coarse centroids. Memory: the features of the sample once, and a few shards.

    Args:
        shards: encoded images with features.
        surveyed: the result of `survey` on them.
        k: number of clusters; they are numbered in the order of their first training images.
        method: "balanced" or "free".
        fine: number of fine centroids, at most.
        seed: of sample and k-means.
        workers: threads.
        progress: called after each shard.

    Raises:
        AtollError: fewer than k distinct features, or features that are not finite.
    """
    stage = fine_stage(shards, surveyed, fine=fine, seed=seed, workers=workers, progress=progress)
    centroids, counts, first, distinct = stage.centroids, stage.counts, stage.first, stage.distinct
    # Every cluster needs at least one centroid.
    if len(centroids) < k:
        raise AtollError(
            f"{len(centroids)} distinct features among {surveyed.train} training images; choose k up to "
            f"{len(centroids)}"
        )
    # Coarse stage: the best of several k-means over the fine centroids, weighted by their images.
    weights = counts.double()
    coarse_of = free_coarse(centroids, weights, k, seed, workers)
    # The free k-means is the starting point of the balanced one.
    if method == "balanced":
        coarse_of = balanced(centroids, weights, coarse_of, k, distinct)
    # Number the clusters by their first training images, so that the numbers do not depend on the k-means.
    firsts = torch.full((k,), surveyed.rows).scatter_reduce(0, coarse_of, first, "amin")
    coarse_of = firsts.argsort(stable=True).argsort()[coarse_of]
    coarse = weighted_means(centroids, weights, coarse_of, k).float()
    return Assignment(method, k, seed, centroids, coarse_of, coarse)


@dataclass(frozen=True, eq=False)
class FineStage:
    """The fine centroids of a data set.

    Attributes:
        centroids: [F,D], each with training images.
        counts: training images of each, [F] int64.
        first: the row of the first of them, [F] int64.
        distinct: whether every distinct feature has its own centroid, so that more would change nothing.
    """

    centroids: Tensor
    counts: Tensor
    first: Tensor
    distinct: bool


def fine_stage(
    shards: Shards, surveyed: Survey, *, fine: int, seed: int, workers: Workers, progress: ClusterProgress
) -> FineStage:
    """Fit fine centroids by k-means on a sample, and count their training images; arguments as in `two_stages`."""
    progress(0, surveyed.rows, "fine k-means")
    sample = _read_sample(shards, surveyed.hashes[: ROWS_PER_CENTROID * fine], seed)
    centroids, _ = kmeans(sample, fine, seed, workers, rounds=_FINE_ROUNDS)
    del sample
    distinct = len(centroids) < fine  # the fine stage drops centroids that get no feature of their own
    # A centroid without training images has no weight and may not attract others.
    counts, first = _count(shards, centroids, workers, progress, surveyed.rows)
    # Dropping a centroid moves its images to others, so count again.
    while not counts.all():
        centroids = centroids[counts > 0]
        counts, first = _count(shards, centroids, workers, progress, surveyed.rows)
    return FineStage(centroids, counts, first, distinct)


def free_coarse(centroids: Tensor, weights: Tensor, k: int, seed: int, workers: Workers) -> Tensor:
    """Return the coarse cluster [F] int64 of each fine centroid: the best of several weighted k-means.

    Args:
        centroids: fine ones [F,D].
        weights: their training images [F] float64.
        k: number of clusters.
        seed: of the first k-means.
        workers: threads.
    """
    starts = (
        kmeans(centroids, k, seed + start, workers, rounds=_COARSE_ROUNDS, weights=weights.float())
        for start in range(_COARSE_STARTS)
    )
    coarse, _ = min(starts, key=lambda result: result[1])
    return nearest(centroids, coarse)[0]


def kmeans(
    points: Tensor, k: int, seed: int, workers: Workers, *, rounds: int, weights: Tensor | None = None
) -> tuple[Tensor, float]:
    """Run Lloyd's algorithm from k random points, with the same bits for any number of threads.

    faiss's k-means, as fast, gives other bits for other numbers of threads.

    Args:
        points: [n, D].
        k: number of centroids.
        seed: of the starting points.
        workers: threads.
        rounds: at most.
        weights: of the points, [n]; default 1.

    Returns:
        (centroids [<=k, D], mean squared distance to them). A centroid that ends without points is left out.
    """
    # The first centroids are random points, of weight one until they are counted.
    centroids = means = points[random_rows(len(points), k, cpu_generator(seed))]
    masses = torch.ones(len(centroids))
    labels, error = torch.empty(0, dtype=torch.int64), 0.0
    # Without weights, every point counts once.
    point_weights = torch.ones(len(points)) if weights is None else weights
    for _ in range(rounds):
        # Assign.
        before = labels
        results = list(workers.map(partial(nearest, centroids=centroids), points.split(BLOCK)))
        labels = torch.cat([numbers for numbers, _ in results])
        costs = torch.cat([distances for _, distances in results]) * point_weights
        error = float(costs.sum() / point_weights.sum())
        # Equal labels give equal means: it has converged.
        if torch.equal(labels, before):
            break
        # Update.
        means, masses = _means(points, labels, len(centroids), workers, weights)
        centroids = _refilled(means, masses, points, costs)
    return means[masses > 0], error


def _means(points: Tensor, labels: Tensor, k: int, workers: Workers, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean [k,D] of each label's points (zero for a label without points), and their total weight [k].

    One thread computes each sum, in the order of the points.
    """
    # Sort the points by label: each label's points are then one range.
    order, counts = labels.argsort(stable=True), labels.bincount(minlength=k)
    ends = counts.cumsum(0)

    # The sums of a group of labels, as one embedding bag over its range of points.
    def total(group: Tensor) -> Tensor:
        low, high = int(ends[group[0]] - counts[group[0]]), int(ends[group[-1]])
        rows = order[low:high]
        starts = ends[group] - counts[group] - low
        return F.embedding_bag(
            rows, points, starts, mode="sum", per_sample_weights=None if weights is None else weights[rows]
        )

    # 64 labels per task, whatever the number of threads.
    sums = torch.cat(list(workers.map(total, torch.arange(k).split(64))))
    masses = counts.float() if weights is None else torch.zeros(k).index_add_(0, labels, weights)
    return sums / masses.clamp(min=1)[:, None], masses


def _refilled(means: Tensor, masses: Tensor, points: Tensor, costs: Tensor) -> Tensor:
    """The means [k,D], but those of mass [k] zero are moved to the points [n,D] with the highest costs [n]."""
    empty = (masses == 0).nonzero().flatten()
    if not len(empty):
        return means
    # Where a centroid reduces the error most.
    costly = costs.argsort(descending=True, stable=True)[: len(empty)]
    return means.index_copy(0, empty, points[costly])


def _read_sample(shards: Shards, hashes: np.ndarray, seed: int) -> Tensor:
    """The features [n,D] of the training images with the given draws, at unit length, in the order of the rows."""
    sample, filled = torch.empty(len(hashes), *shards.shape("feature")), 0
    for part in shards.parts():
        rows, draws = _training_draws(part, seed)
        # Ties at the largest draw could exceed the sample: cut to its size.
        chosen = rows[torch.from_numpy(draws <= hashes[-1])][: len(sample) - filled]
        sample[filled : filled + len(chosen)] = unit_features(part, chosen, shards.path)
        filled += len(chosen)
    return sample


def _training_draws(part: Shard, seed: int) -> tuple[Tensor, np.ndarray]:
    """The training rows [n] of a part and their draws [n] uint64."""
    # Held-out images take no part in the fit.
    rows = [row for row, split in enumerate(part.splits) if split == "train"]
    return torch.tensor(rows, dtype=torch.int64), draw(hash_keys([part.keys[row] for row in rows]), seed, "fit")


def _count(
    shards: Shards, centroids: Tensor, workers: Workers, progress: ClusterProgress, rows: int
) -> tuple[Tensor, Tensor]:
    """The number of training images nearest to each centroid [F], and the row of the first of them [F] int64."""
    counts = torch.zeros(len(centroids), dtype=torch.int64)
    # `rows` means none: it is larger than the number of any row.
    first = torch.full((len(centroids),), rows)

    def nearest_of(part: Shard) -> tuple[Shard, Tensor, Tensor]:
        train = torch.tensor([split == "train" for split in part.splits]).nonzero().flatten()
        return part, train, nearest(unit_features(part, train, shards.path), centroids)[0]

    # The workers search; this thread alone adds up.
    for part, train, numbers in workers.map(nearest_of, shards.parts()):
        counts += numbers.bincount(minlength=len(centroids))
        first.scatter_reduce_(0, numbers, train + part.start, "amin")
        progress(part.start + len(part), rows, "counting")
    return counts, first
