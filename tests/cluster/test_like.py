"""`atoll cluster --like RUN`: the clusters of a run, for images of another size."""

import shutil
from pathlib import Path

import pytest
import yaml

from atoll.cluster import cluster, cluster_like
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.artifact import load_card
from atoll.storage.cards import ClustersCard, ClusterShardsCard
from atoll.storage.layout import CLUSTERS_CARD
from atoll.storage.shards import Shards
from tests.cluster.test_add import K, content, labels, write
from tests.cluster.test_statistics import RAW_CARD
from tests.conftest import RUN

LARGE = (1, 4, 6)


@pytest.fixture
def first(tmp_path) -> Path:
    encoded = write(tmp_path / "first/encoded", range(90), card=RAW_CARD)
    cluster(encoded, tmp_path / "first/clusters", K, fine=24, router_fraction=0.5, measured=True)
    return tmp_path / "first"


@pytest.fixture
def second(tmp_path) -> Path:
    """A run with other images of the same kinds, at twice the size, whose own statistics are others."""
    card = {**RAW_CARD, "statistics": {"mean": [0.0], "std": [7.0], "values": 1000}}
    write(tmp_path / "second/encoded", range(30, 150), card=card, shape=LARGE)
    (tmp_path / "second/atoll.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path / "second"


def test_the_same_clusters_hold_images_of_another_size(first, second) -> None:
    line = cluster_like(second, load_manifest(second), first)
    assert "3 clusters of 40, 40, 40 images, as those of" in line
    old, new = (load_card(run / "clusters" / CLUSTERS_CARD, ClustersCard) for run in (first, second))
    assert new.assignment == old.assignment
    assert new.codec == old.codec
    known = labels(first / "clusters")
    assert {key: number for key, number in labels(second / "clusters").items() if key in known} == {
        f"k{i}": known[f"k{i}"] for i in range(30, 90)
    }
    shards = Shards(second / "clusters/cluster-001", verify=True)
    assert shards.card(ClusterShardsCard).latent_shape == LARGE
    # Normalised by the statistics of the first run.
    raw = [int(key[1:]) % 100 for key in shards.keys]
    assert shards.read("latent", slice(None))[:, 0, 0, 0].tolist() == [(value - 10) / 4 for value in raw]
    assert len(Shards(second / "clusters/router")) > 30


def test_again_it_changes_nothing_and_another_clustering_needs_force(first, second) -> None:
    manifest = load_manifest(second)
    cluster_like(second, manifest, first)
    before = content(second / "clusters")
    assert "is there already" in cluster_like(second, manifest, first)
    assert content(second / "clusters") == before
    cluster(second / "encoded", second / "other", K, fine=24, seed=3)
    (second / "clusters").rename(second / "old")
    (second / "other").rename(second / "clusters")
    with pytest.raises(AtollError, match=r"clusters: holds another clustering; replace it with --force"):
        cluster_like(second, manifest, first)
    cluster_like(second, manifest, first, force=True)
    assert content(second / "clusters") == before


def test_another_k_or_feature_is_refused(first, second) -> None:
    manifest = load_manifest(second)
    four = manifest.model_copy(update={"clusters": manifest.clusters.model_copy(update={"k": 4})})
    with pytest.raises(AtollError, match=r"second: its k is 4, that of .*first/clusters is 3; make atoll.yaml's equal"):
        cluster_like(second, four, first)
    shutil.rmtree(second / "encoded")
    write(second / "encoded", range(9), card={**RAW_CARD, "feature": {"name": "other"}}, shape=LARGE)
    with pytest.raises(AtollError, match=r'second: its feature is \{"name": "other"'):
        cluster_like(second, manifest, first)
    assert not (second / "clusters").exists()


def test_options_that_exclude_each_other(atoll, first, second) -> None:
    for more, message in (("--assign-only", "choose one"), ("--router-fraction=0.1", "leave --router-fraction out")):
        code, _, err = atoll("cluster", "--run", second, "--like", first, more)
        assert (code, message in err) == (2, True), err
