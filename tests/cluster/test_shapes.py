"""Clusters of images in several buckets: the same clusters as of squares, shards of one shape, and growth."""

import pyarrow.parquet as pq
import pytest
import torch

from atoll.cluster.add import assign_only
from atoll.cluster.grow import split_cluster
from atoll.cluster.probe import write_probe
from atoll.cluster.run import cluster
from atoll.storage.layout import ASSIGNMENT, REPORT, ROUTER, cluster_path
from atoll.storage.shards import Shards, ShardWriter
from tests.cards import encoded_card

SHAPES = ((1, 4, 4), (1, 6, 2), (1, 2, 6))


def encode(path, start, stop, sized=True):
    """Rows whose latents hold their number, in three shapes; features around three centres."""
    g = torch.Generator().manual_seed(start)
    with ShardWriter(path, encoded_card(), 7, shapes={"latent": SHAPES[0]}) as writer:
        for row in range(start, stop):
            shape = SHAPES[row // 3 % 3] if sized else SHAPES[0]
            feature = torch.eye(3)[row % 3] + 0.1 * torch.randn(3, generator=g)
            columns = {"latent": torch.full((1, *shape), row / 64).half(), "feature": feature[None]}
            writer.append([f"k{row}"], [f"caption {row}"], ["val" if row % 10 == 9 else "train"], columns)
    return path


def rows_of(directory):
    """{key: (caption, split, shape, number)} of a directory of shards."""
    rows = {}
    for part in Shards(directory, verify=True).parts():
        latents = part.columns["latent"]
        for i, key in enumerate(part.keys):
            rows[key] = (
                part.captions[i],
                part.splits[i],
                tuple(latents.shape[1:]),
                round(float(latents[i].mean() * 64)),
            )
    return rows


def expected(numbers):
    return {f"k{n}": (f"caption {n}", "val" if n % 10 == 9 else "train", SHAPES[n // 3 % 3], n) for n in numbers}


@pytest.fixture
def clusters(tmp_path):
    encode(tmp_path / "encoded", 0, 90)
    cluster(tmp_path / "encoded", tmp_path / "clusters", 3, fine=6, router_fraction=0.5)
    return tmp_path / "clusters"


def test_clusters_do_not_depend_on_the_shape(tmp_path, clusters) -> None:
    encode(tmp_path / "plain", 0, 90, sized=False)
    cluster(tmp_path / "plain", tmp_path / "other", 3, fine=6)
    tables = [pq.read_table(path / ASSIGNMENT).to_pylist() for path in (clusters, tmp_path / "other")]
    groups = [{frozenset(r["key"] for r in table if r["cluster"] == c) for c in range(3)} for table in tables]
    assert groups[0] == groups[1]
    assert sorted(map(len, groups[0])) == [30, 30, 30]
    found = {}
    for number in range(3):
        shards = Shards(cluster_path(clusters, number))
        assert shards.shape("latent") == SHAPES[0]
        assert set(shards.shapes("latent")) == set(SHAPES)
        found |= rows_of(shards.path)
    assert found == expected(range(90))
    router = rows_of(clusters / ROUTER)
    assert 20 < len(router) < 70
    assert router.items() <= found.items()
    assert "at random" in (clusters / REPORT).read_text()


def test_new_images_of_any_shape_are_added(tmp_path, clusters) -> None:
    new = encode(tmp_path / "new", 60, 120)
    assert "30 images added, 30 were there already" in assign_only(clusters, new)
    found = {}
    for number in range(3):
        found |= rows_of(cluster_path(clusters, number))
    assert found == expected(range(120))


def test_a_cluster_is_split_with_its_shapes(tmp_path, clusters) -> None:
    before = rows_of(cluster_path(clusters, 0))
    split_cluster(clusters, 0, [tmp_path / "encoded"])
    parts = [rows_of(cluster_path(clusters, number)) for number in (0, 3)]
    assert {**parts[0], **parts[1]} == before
    assert all(parts)


def test_a_probe_holds_every_shape(tmp_path, clusters) -> None:
    secret = encode(tmp_path / "secret", 100, 130)
    assert sum(write_probe(clusters, secret, tmp_path / "probe")) == 30
    found = {}
    for path in sorted((tmp_path / "probe").iterdir()):
        found |= rows_of(path)
    assert found == {key: (row[0], "val", *row[2:]) for key, row in expected(range(100, 130)).items()}
