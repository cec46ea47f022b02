"""Clusters that grow: a cluster of new data, and a cluster split in two; nothing else changes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.cluster import add_cluster, assign_only, cluster, load_assignment, split_cluster
from atoll.errors import AtollError
from atoll.storage.artifact import load_card
from atoll.storage.cards import ClustersCard, ClusterShardsCard, Lineage, parse_card
from atoll.storage.layout import CLUSTERS_CARD
from atoll.storage.shards import Shards
from tests.cluster.test_add import CARD, K, content, labels, write


@pytest.fixture
def out(tmp_path) -> Path:
    cluster(write(tmp_path / "encoded", range(90)), tmp_path / "clusters", K, fine=24, router_fraction=0.5)
    return tmp_path / "clusters"


def card_of(out: Path) -> ClustersCard:
    return load_card(out / CLUSTERS_CARD, ClustersCard)


def consistent(out: Path) -> None:
    """The card, the table, the shards and the samples of a clusters/ directory say the same."""
    card, where = card_of(out), labels(out)
    load_assignment(out, card)
    for c in range(card.k):
        shards = Shards(out / f"cluster-{c:03d}", verify=True)
        assert sorted(shards.keys) == sorted(key for key in where if where[key] == c)
        assert card.descent.knows(shards.card(ClusterShardsCard).assignment)
        assert card.counts[c].model_dump() == {s: shards.splits.count(s) for s in ("train", "val")}
        assert shards.captions == [f"caption {key[1:]}" for key in shards.keys]
        assert shards.read("latent", slice(None))[:, 0, 0, 0].tolist() == [int(key[1:]) % 100 for key in shards.keys]
    for name in ("sample", "images", "router"):
        if (out / name).is_dir():
            rows = Shards(out / name, verify=True)
            assert rows.read("cluster", slice(None)).tolist() == [where[key] for key in rows.keys]
    assert set(Shards(out / "sample").keys) == set(where)


def test_a_split_changes_the_clusters_concerned_alone(tmp_path, out) -> None:
    before, where, old = content(out), labels(out), card_of(out)
    assert "cluster 1 is split, its second part is cluster 3" in split_cluster(out, 1, [tmp_path / "encoded"])
    after, now, card = content(out), labels(out), card_of(out)
    consistent(out)
    same = [name for name in before if name.startswith(("cluster-000", "cluster-002"))]
    assert same
    assert all(after[name] == before[name] for name in same)
    # Keys of other clusters stay; those of cluster 1 divide evenly, in their order.
    assert list(now) == list(where)
    assert {where[key] for key in now if now[key] == 3} == {1}
    assert all(now[key] == where[key] for key in now if now[key] != 3)
    parts = [card.counts[1].train, card.counts[3].train]
    assert sum(parts) == old.counts[1].train
    assert max(parts) <= 1.25 * sum(parts) / 2
    assert Shards(out / "cluster-001").keys[0] == next(key for key in where if where[key] == 1)
    # The assignment is a function still: it finds the stored clusters.
    assignment = load_assignment(out, card)
    (part, *more) = Shards(tmp_path / "encoded").parts()
    for one in (part, *more):
        assert assignment(one, tmp_path).clusters.tolist() == [now[key] for key in one.keys]
    assert card.assignment != old.assignment
    (ancestor,) = card.lineage
    assert ancestor.assignment == old.assignment
    assert ancestor.clusters == ((0,), (1, 3), (2,))
    assert Shards(out / "router").card(ClusterShardsCard).lineage == card.lineage
    # `atoll cluster` recognizes what grew from its clustering.
    assert not cluster(tmp_path / "encoded", out, K, fine=24, router_fraction=0.5)
    assert not cluster(tmp_path / "encoded", out, K + 1, fine=24, router_fraction=0.5)
    with pytest.raises(AtollError, match="was made with k 4, requested is 5"):
        cluster(tmp_path / "encoded", out, 5, fine=24, router_fraction=0.5)


def test_new_data_become_a_cluster_of_their_own(tmp_path, out) -> None:
    before, where, old = content(out), labels(out), card_of(out)
    new = write(tmp_path / "new", range(80, 120), blobs=3, card={**CARD, "source": {"name": "other"}})
    with pytest.raises(AtollError, match=r"no training image that .* does not hold already"):
        add_cluster(out, tmp_path / "encoded")
    assert content(out) == before
    assert "cluster 3 is new: 4 clusters of" in add_cluster(out, new)
    consistent(out)
    after, now, card = content(out), labels(out), card_of(out)
    assert all(after[name] == data for name, data in before.items() if name.startswith("cluster-0"))
    # Ten of its images were there already, in other clusters.
    assert {key: now[key] for key in where} == where
    assert [key for key in now if now[key] == 3] == [f"k{i}" for i in range(90, 120)]
    assert card.encoded == (*old.encoded, Shards(new).sha256)
    assert card.lineage[0].clusters == ((0,), (1,), (2,))
    assert 0 < (Shards(out / "router").read("cluster", slice(None)) == 3).sum() < 30
    # Images that come later find it.
    cards = [Shards(path).card(ClusterShardsCard) for path in sorted(out.glob("cluster-*"))]
    assign_only(out, write(tmp_path / "later", range(120, 130), blobs=3))
    consistent(out)
    assert all(labels(out)[f"k{i}"] == 3 for i in range(120, 130))
    # Each directory stays of the assignment that it was written under.
    assert [Shards(path).card(ClusterShardsCard) for path in sorted(out.glob("cluster-*"))] == cards
    assert [card.clusters for card in cards] == [3, 3, 3, 4]
    # And a second step from there: the lineage says what the first clusters are now.
    split_cluster(out, 3, [tmp_path / "later", tmp_path / "new"])
    consistent(out)
    first, second = card_of(out).lineage
    assert (first.clusters, second.clusters) == (((0,), (1,), (2,)), ((0,), (1,), (2,), (3, 4)))


@pytest.mark.parametrize(
    ("number", "sources", "message"),
    [
        (3, ["encoded"], "--split 3: .* has the clusters 0 to 2"),
        (0, ["other"], "30 images of cluster 0, such as 'k0', have no feature in .*other; name all encoded data"),
    ],
)
def test_a_split_that_cannot_be_is_refused(tmp_path, out, number, sources, message) -> None:
    write(tmp_path / "other", range(90, 100))
    before = content(out)
    with pytest.raises(AtollError, match=message):
        split_cluster(out, number, [tmp_path / name for name in sources])
    assert content(out) == before
    assert not list(tmp_path.glob(".*"))


def test_random_clusters_do_not_grow(tmp_path) -> None:
    out = tmp_path / "clusters"
    cluster(write(tmp_path / "encoded", range(60)), out, 2, "random")
    for grow in (lambda: split_cluster(out, 0, [tmp_path / "encoded"]), lambda: add_cluster(out, tmp_path / "encoded")):
        with pytest.raises(AtollError, match="random clusters have no meaning that could grow"):
            grow()


@given(st.integers(1, 4), st.lists(st.integers(-1, 6), max_size=5))
def test_the_lineage_follows_every_cluster(k, steps) -> None:
    lineage, sets = Lineage("a0", k), [{i} for i in range(k)]  # what the founding clusters are now
    parents, before = [], []
    for number, step in enumerate(steps, start=1):
        parent = None if step < 0 else step % lineage.k
        for one in sets:
            if parent in one:
                one.add(lineage.k)
        before.append(lineage)
        lineage = lineage.grown(f"a{number}", parent)
        parents.append(parent)
    lineage.check()
    assert lineage.parents_since("a0") == parents
    assert [set(lineage.now("a0", (i,))) for i in range(k)] == sets
    assert lineage.now(lineage.assignment, (0,)) == (0,)
    assert not lineage.knows("b")
    for number in range(len(steps)):
        assert lineage.parents_since(f"a{number}") == parents[number:]
    # It continues every lineage that it went through, and none that took other steps.
    assert lineage.continues(lineage)
    for older in before:
        assert lineage.continues(older)
        assert not older.continues(lineage)
        other = older.grown("b", None)
        assert not lineage.continues(other)
        assert not other.grown(lineage.assignment or "", 0).continues(lineage)


@pytest.mark.parametrize(
    "ancestors",
    [
        [("a", [[0], [1]])],  # two steps at once
        [("a", [[0], [1], [1]])],  # an image in two clusters
        [("a", [[0], [1], [4]])],  # beyond k
        [("a", [[0], [3], [2]])],  # a cluster that lost its number
    ],
)
def test_a_lineage_that_cannot_be_is_refused(tmp_path, out, ancestors) -> None:
    add_cluster(out, write(tmp_path / "new", range(90, 120), blobs=3))
    plain = card_of(out).plain()
    plain["lineage"] = [{"assignment": name, "clusters": clusters} for name, clusters in ancestors]
    with pytest.raises(AtollError, match="lineage: "):
        parse_card(ClustersCard, plain, "clusters.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cluster", "--new-cluster"], "--new-cluster needs --encoded, the images of the new cluster"),
        (["cluster", "--split", 0, "--assign-only"], "--assign-only and --split: choose one"),
        (["cluster", "--split", 0, "--force"], "leave --force and --router-fraction out"),
        (["cluster", "--encoded", "new"], "use it with --assign-only, --new-cluster or --split"),
        (["cluster", "--new-cluster", "--encoded", "a", "--encoded", "b"], "takes one --encoded"),
        (["train", "router", "--rows", "drawn"], "--rows names latents for --extend"),
        (["train", "router", "--extend", "--restart"], "leave --resume, --restart and --nproc out"),
    ],
)
def test_options_that_exclude_each_other_are_refused(atoll, options, message) -> None:
    code, _, error = atoll(*options)
    assert code == 2
    assert message in " ".join(error.split())


def test_the_commands_say_what_to_do_next(atoll, tmp_path, out) -> None:
    code, output, _ = atoll("cluster", "-r", tmp_path, "--split", 1)
    assert code == 0
    assert "set clusters.k: 4 in atoll.yaml, and run `atoll train router --extend`" in " ".join(output.split())
    write(tmp_path / "new", range(90, 120), blobs=3)
    assert atoll("cluster", "-r", tmp_path, "--new-cluster", "--encoded", tmp_path / "new")[0] == 0
    assert card_of(out).k == 5
