"""Secret images are assigned to clusters that exist, into a directory of their own."""

from pathlib import Path

import pytest

from atoll.cluster import cluster, write_probe
from atoll.errors import AtollError
from atoll.storage.cards import ClusterShardsCard
from atoll.storage.layout import CLUSTERS_CARD
from atoll.storage.shards import Shards
from tests.cards import encoded_card
from tests.cluster.test_add import CARD, K, content, labels, write


@pytest.fixture
def out(tmp_path) -> Path:
    cluster(write(tmp_path / "encoded", range(90)), tmp_path / "clusters", K, fine=12)
    return tmp_path / "clusters"


def test_new_images_join_their_clusters_and_known_ones_are_left_out(out, tmp_path) -> None:
    before, known = content(out), labels(out)
    counts = write_probe(out, write(tmp_path / "secret", range(80, 150)), tmp_path / "probe")
    assert counts == [20, 20, 20]
    assert content(out) == before
    for number in range(K):
        shards = Shards(tmp_path / "probe" / f"cluster-{number:03d}")
        assert set(shards.splits) == {"val"}
        assert not set(shards.keys) & set(known)
        card = shards.card(ClusterShardsCard)
        assert (card.cluster, card.assignment) == (
            number,
            Shards(out / "cluster-000").card(ClusterShardsCard).assignment,
        )
        # Where `--assign-only` would put them: row i belongs to blob i % 3.
        blob = {int(key[1:]) % 3 for key in shards.keys}
        assert blob == {int(key[1:]) % 3 for key, cluster in known.items() if cluster == number}
        assert "feature" not in shards.columns


def test_a_contributor_needs_the_clustering_alone(out, tmp_path) -> None:
    joined = tmp_path / "joined"
    joined.mkdir()
    for name in (CLUSTERS_CARD, "centroids.safetensors"):
        (joined / name).write_bytes((out / name).read_bytes())
    assert sum(write_probe(joined, write(tmp_path / "secret", range(100, 130)), tmp_path / "probe")) == 30


def test_images_that_are_no_secret_or_of_another_kind_are_refused(out, tmp_path) -> None:
    with pytest.raises(AtollError, match="a probe needs others"):
        write_probe(out, tmp_path / "encoded", tmp_path / "probe")
    other = encoded_card(**{**CARD, "codec": {"name": "pixels", "channels": 3}})
    with pytest.raises(AtollError, match="its codec is"):
        write_probe(out, write(tmp_path / "other", range(100, 130), card=other), tmp_path / "probe")
    assert not (tmp_path / "probe").exists()
    with pytest.raises(AtollError, match="exists"):
        write_probe(out, tmp_path / "encoded", out)
