"""Clusters of normalised latents: one data set's statistics for everything that is added, split or read later."""

from pathlib import Path

import pytest
import torch

from atoll.cluster import add_cluster, assign_only, cluster, cluster_run, split_cluster, write_probe
from atoll.encoders.codec import build_codec
from atoll.errors import AtollError
from atoll.manifest import parse_manifest
from atoll.storage.artifact import load_card
from atoll.storage.cards import ClustersCard, ClusterShardsCard
from atoll.storage.layout import CLUSTERS_CARD
from atoll.storage.shards import Shards
from tests.cluster.test_add import CARD, K, labels, write

RAW = {"name": "pixels", "channels": 1, "shift": 0.5, "scale": 2.0}
# Row i has the latent i % 100, mirrored i % 100 + 1: these are no statistics of it, so that a second measurement shows.
STATISTICS = {"mean": [10.0], "std": [4.0], "values": 1000}
RAW_CARD = {**CARD, "codec": RAW, "statistics": STATISTICS}


@pytest.fixture
def out(tmp_path) -> Path:
    encoded = write(tmp_path / "encoded", range(90), card=RAW_CARD)
    assert cluster(encoded, tmp_path / "clusters", K, fine=24, router_fraction=0.5, measured=True)
    return tmp_path / "clusters"


def check(directory: Path, rows: int | None = None) -> dict:
    """Every latent is (raw - 10) / 4, by the key that says what was raw. Returns the codec of the card."""
    shards = Shards(directory, verify=True)
    raw = torch.tensor([float(int(key[1:]) % 100) for key in shards.keys])
    for name, offset in (("latent", 0.0), ("latent_flip", 1.0)):
        if name in shards.columns:
            assert torch.equal(shards.read(name, slice(None))[:, 0, 1, 2], ((raw + offset - 10) / 4).half())
    assert rows is None or len(shards) == rows
    return shards.card(ClusterShardsCard).codec if "latent_flip" in shards.columns else {}


def test_clusters_hold_normalised_latents_and_their_codec_decodes_them(out) -> None:
    card = load_card(out / CLUSTERS_CARD, ClustersCard)
    # z = latent / 2 + 0.5 = (4 normalised + 10) / 2 + 0.5
    assert card.codec == {**RAW, "shift": [5.5], "scale": [0.5]}
    for c in range(K):
        assert check(out / f"cluster-{c:03d}") == card.codec
    assert check(out / "router") == card.codec
    check(out / "images")
    raw = torch.tensor([[[[9.0]]]])
    assert torch.equal(build_codec(card.codec).decode((raw - 10) / 4), build_codec(RAW).decode(raw))


def test_without_measured_statistics_latents_stay_as_they_are(tmp_path) -> None:
    encoded = write(tmp_path / "encoded", range(90), card=RAW_CARD)
    cluster(encoded, tmp_path / "clusters", K, fine=24)
    assert load_card(tmp_path / "clusters" / CLUSTERS_CARD, ClustersCard).codec == RAW
    shards = Shards(tmp_path / "clusters" / "cluster-000")
    assert shards.read("latent", slice(None))[:, 0, 0, 0].tolist() == [int(key[1:]) % 100 for key in shards.keys]


def test_the_same_clustering_is_there_and_other_statistics_are_another(tmp_path, out) -> None:
    arguments = {"fine": 24, "router_fraction": 0.5}
    assert not cluster(tmp_path / "encoded", out, K, measured=True, **arguments)
    with pytest.raises(AtollError, match=r"other statistics, codec shift 5\.5, scale 0\.5, requested is shift 0"):
        cluster(tmp_path / "encoded", out, K, **arguments)
    assert cluster(tmp_path / "encoded", out, K, force=True, **arguments)


OTHERS = {
    "none": CARD | {"codec": RAW},
    "alike": RAW_CARD,
    "other": RAW_CARD | {"statistics": {"mean": [22.0], "std": [2.0], "values": 9}},
    "typed": RAW_CARD | {"codec": {**RAW, "shift": [0.5]}},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_added_images_are_normalised_by_the_statistics_of_the_run(tmp_path, out, kind) -> None:
    """Whatever statistics they have themselves; images that are known are recognised."""
    old, said = load_card(out / CLUSTERS_CARD, ClustersCard).codec, "the run keeps its statistics"
    more = write(tmp_path / "more", range(60, 150), card=OTHERS[kind])
    done = assign_only(out, more)
    assert "60 images added, 30 were there already" in done
    assert (said in done) == (kind == "other")
    if kind == "other":
        assert "means of 3.00 to 3.00 and deviations of 0.50 to 0.50" in done
    third = add_cluster(out, write(tmp_path / "third", range(200, 230), blobs=4, card=OTHERS[kind]))
    assert (said in third) == (kind == "other")
    split_cluster(out, 1, [tmp_path / "encoded", more])
    card = load_card(out / CLUSTERS_CARD, ClustersCard)
    assert (card.k, card.codec) == (K + 2, old)
    for c in range(K + 2):
        assert check(out / f"cluster-{c:03d}") == old
    assert check(out / "router") == old
    check(out / "images")
    assert len(labels(out)) == 180


def test_a_probe_is_normalised_by_the_statistics_of_the_collective(tmp_path, out) -> None:
    write_probe(out, write(tmp_path / "secret", range(60, 150), card=OTHERS["other"]), tmp_path / "probe")
    rows = [check(tmp_path / "probe" / f"cluster-{c:03d}", 20) for c in range(K)]
    assert rows == [load_card(out / CLUSTERS_CARD, ClustersCard).codec] * K


YAML = """
name: run
codec: {codec}
clusters: {{k: 3, fine: 24}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ("{name: pixels, channels: 1}", [0.5, 2.0]),
        ("{name: pixels, channels: 1, statistics: measured}", [[5.5], [0.5]]),
    ],
)
def test_atoll_yaml_decides_which_statistics_are_used(tmp_path, codec, expected) -> None:
    write(tmp_path / "encoded", range(90), card=RAW_CARD)
    cluster_run(tmp_path, parse_manifest(YAML.format(codec=codec), "here"))
    card = load_card(tmp_path / "clusters" / CLUSTERS_CARD, ClustersCard)
    assert [card.codec["shift"], card.codec["scale"]] == expected
