"""Fitting: exact means, quality beside faiss, empty centroids, and samples that do not depend on the shards."""

import pytest
import torch
from torch.nn import functional as F

from atoll.cluster.fit import _read_sample, kmeans, survey
from atoll.cluster.nearest import BLOCK, Workers, nearest
from atoll.storage.shards import Shards, ShardWriter


@pytest.fixture
def workers():
    with Workers() as threads:
        yield threads


def points(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def test_nearest_returns_the_nearest_centroid_and_its_distance() -> None:
    x, c = points(2 * BLOCK + 7, 5), points(11, 5, seed=1)
    numbers, distances = nearest(x, c)
    exact = torch.cdist(x.double(), c.double()).square()
    assert torch.equal(numbers, exact.argmin(1))
    torch.testing.assert_close(distances.double(), exact.amin(1), atol=1e-6, rtol=0)
    assert nearest(torch.zeros(3, 5), torch.ones(4, 5))[0].tolist() == [0, 0, 0]  # the first of several


def test_every_centroid_is_the_mean_of_its_points(workers) -> None:
    x = points(600, 4)
    centroids, error = kmeans(x, 9, 0, workers, rounds=300)
    numbers, distances = nearest(x, centroids)
    means = torch.stack([x[numbers == c].mean(0) for c in range(9)])
    torch.testing.assert_close(centroids, means, atol=1e-6, rtol=0)
    assert error == pytest.approx(float(distances.mean()), rel=1e-5)


def test_kmeans_is_as_good_as_faiss(workers) -> None:
    faiss = pytest.importorskip("faiss")
    x = points(3000, 8)
    other = faiss.Kmeans(8, 64, niter=25, seed=0, max_points_per_centroid=3000)
    other.train(x.numpy())
    centroids, _ = kmeans(x, 64, 0, workers, rounds=25)
    ours, theirs = (float(nearest(x, c)[1].mean()) for c in (centroids, torch.from_numpy(other.centroids)))
    assert ours < 1.02 * theirs


def test_a_weight_counts_like_repeated_points(workers) -> None:
    x, weights = points(50, 3), torch.arange(1, 51).float()
    centroids, error = kmeans(x, 4, 0, workers, rounds=300, weights=weights)
    numbers, distances = nearest(x, centroids)
    means = torch.stack([(x * weights[:, None])[numbers == c].sum(0) / weights[numbers == c].sum() for c in range(4)])
    torch.testing.assert_close(centroids, means, atol=1e-6, rtol=0)
    assert error == pytest.approx(float((distances * weights).sum() / weights.sum()), rel=1e-5)


def test_a_centroid_without_points_moves_to_the_costliest_point(workers) -> None:
    """Nine tenths of the points coincide: random starts put most centroids there, and they must move."""
    x = torch.cat([torch.ones(1, 6).expand(900, 6), points(100, 6)])
    centroids, error = kmeans(x, 90, 3, workers, rounds=100)
    assert 80 <= len(centroids) <= 90
    assert error < 0.01
    one, error = kmeans(torch.ones(40, 6), 5, 0, workers, rounds=10)
    assert (len(one), error) == (1, pytest.approx(0, abs=1e-5))
    torch.testing.assert_close(one, torch.ones(1, 6))


def write(path, order: list[int], shard_rows: int) -> Shards:
    feature = torch.randn(400, 3, generator=torch.Generator().manual_seed(2))
    with ShardWriter(path, {"feature": {"name": "f"}}, shard_rows) as writer:
        splits = ["val" if i % 4 == 3 else "train" for i in order]
        writer.append([f"k{i}" for i in order], [""] * len(order), splits, {"feature": feature[order]})
    return Shards(path)


def test_the_sample_does_not_depend_on_the_order_of_the_rows(tmp_path) -> None:
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    samples = []
    for name, rows, shard_rows in (("a", list(range(400)), 64), ("b", order, 33)):
        shards = write(tmp_path / name, rows, shard_rows)
        surveyed = survey(shards, 5, 40)
        assert (surveyed.rows, surveyed.train, len(surveyed.hashes)) == (400, 300, 40)
        samples.append(_read_sample(shards, surveyed.hashes, 5))
    a, b = ({tuple(row.tolist()) for row in sample} for sample in samples)
    assert a == b
    assert len(a) == 40
    everything = _read_sample(shards, survey(shards, 5, 1000).hashes, 5)
    train = shards.read("feature", shards.rows("train"))
    torch.testing.assert_close(everything, F.normalize(train))
