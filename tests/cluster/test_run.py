import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from atoll.cluster import cluster, cluster_run, load_assignment
from atoll.cluster.balance import LARGEST, SMALLEST
from atoll.errors import AtollError
from atoll.storage.artifact import load_card, read_json
from atoll.storage.cards import ClustersCard, ClusterShardsCard
from atoll.storage.layout import CLUSTERS_CARD
from atoll.storage.shards import Shards, ShardWriter
from tests.cards import encoded_card

CARD = encoded_card(codec={"name": "pixels"}, feature={"name": "blobs"}, source={"name": "blobs"})


def write(path: Path, sizes=(40, 30, 20), change_val=0.0, spread=0.1) -> Path:
    """Blobs of features, in a mixed order; a latent is its row's number. A fifth of the rows is held out."""
    g = torch.Generator().manual_seed(0)
    blob = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])[torch.randperm(sum(sizes), generator=g)]
    feature = torch.eye(max(len(sizes), 5))[blob] + spread * torch.rand(len(blob), max(len(sizes), 5), generator=g)
    val = torch.arange(len(blob)) % 5 == 4
    feature[val] += change_val
    with ShardWriter(path, CARD, shard_rows=32) as writer:
        writer.append(
            [f"{i:03d}-{b}" for i, b in enumerate(blob.tolist())],
            [f"blob {b}" for b in blob.tolist()],
            ["val" if v else "train" for v in val.tolist()],
            {"latent": torch.arange(len(blob)).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 3).half(), "feature": feature},
        )
    return path


@pytest.fixture
def encoded(tmp_path) -> Path:
    return write(tmp_path / "encoded")


def labels(out: Path) -> dict[str, int]:
    table = pq.read_table(out / "assignment.parquet").to_pydict()
    return dict(zip(table["key"], table["cluster"], strict=True))


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_free_finds_the_blobs(tmp_path, encoded) -> None:
    assert cluster(encoded, tmp_path / "out", 3, "free")
    assigned = labels(tmp_path / "out")
    pairs = {(key[-1], number) for key, number in assigned.items()}
    assert len(pairs) == 3
    assert len({number for _, number in pairs}) == 3
    # Numbered by the first image of each.
    assert list(dict.fromkeys(assigned.values())) == [0, 1, 2]


@pytest.mark.parametrize("count", [5, 6, 9])
def test_few_images_are_balanced_as_well_as_they_can_be(tmp_path, count) -> None:
    rows = next(n for n in range(20) if n - n // 5 == count)  # a fifth is held out
    cluster(write(tmp_path / "encoded", (rows,)), tmp_path / "out", 4)
    sizes = [count["train"] for count in read_json(tmp_path / "out" / CLUSTERS_CARD)["counts"]]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


def test_equal_images_that_prevent_balance_are_named_with_advice_that_helps(tmp_path) -> None:
    encoded = write(tmp_path / "encoded", (30, 5, 5), spread=0.0)
    with pytest.raises(AtollError, match=r"of the 32 training images have the same feature: .*method: free"):
        cluster(encoded, tmp_path / "out", 3)
    assert cluster(encoded, tmp_path / "out", 3, "free")


def test_the_result_holds_centroids_assignment_and_shards(tmp_path, encoded) -> None:
    out = tmp_path / "out"
    cluster(encoded, out, 3, "free", fine=7, seed=5)
    shards, card, assigned = Shards(encoded), read_json(out / CLUSTERS_CARD), labels(out)
    assert {key: card[key] for key in ("format", "kind", "k", "method", "fine", "seed")} == {
        "format": 1, "kind": "clusters", "k": 3, "method": "free", "fine": 7, "seed": 5,
    }  # fmt: skip
    assert (card["encoded"], card["feature"]) == ([shards.sha256], {"name": "blobs"})
    assert card["assignment"] == load_assignment(out, load_card(out / CLUSTERS_CARD, ClustersCard)).sha256(
        {"name": "blobs"}
    )
    assert list(assigned) == shards.keys
    centroids = load_file(out / "centroids.safetensors")
    assert {name: tuple(c.shape) for name, c in centroids.items()} == {
        "fine": (7, 5), "coarse": (3, 5), "coarse_of_fine": (7,),
    }  # fmt: skip
    # Assignment is by the nearest fine centroid, and can be done again from the file.
    distances = torch.cdist(F.normalize(shards.read("feature", slice(None))), centroids["fine"])
    assert centroids["coarse_of_fine"][distances.argmin(1)].tolist() == list(assigned.values())
    counts = [[sum(assigned[k] == c for k, s in zip(shards.keys, shards.splits, strict=True) if s == split)
               for split in ("train", "val")] for c in range(3)]  # fmt: skip
    assert [[c["train"], c["val"]] for c in card["counts"]] == counts
    assert card["largest_over_mean"] == round(max(c[0] for c in counts) * 3 / 72, 4)


def test_an_island_needs_only_its_directory(tmp_path, encoded) -> None:
    out = tmp_path / "out"
    cluster(encoded, out, 3)
    assigned, whole = labels(out), Shards(encoded)
    rows = [i for i, key in enumerate(whole.keys) if assigned[key] == 1]
    expected = [[column[i] for i in rows] for column in (whole.keys, whole.captions, whole.splits)]
    hashed = read_json(out / CLUSTERS_CARD)["assignment"]
    island = shutil.move(out / "cluster-001", tmp_path / "island")
    shutil.rmtree(out)
    shutil.rmtree(encoded)
    mine = Shards(island, verify=True)
    assert [mine.keys, mine.captions, mine.splits] == expected
    assert mine.columns == ("latent",)
    assert mine.read("latent", slice(None))[:, 0, 0, 0].tolist() == rows
    assert mine.card(ClusterShardsCard).plain() == {
        "cluster": 1, "clusters": 3, "assignment": hashed, "latent_shape": [1, 2, 3],
        "codec": CARD["codec"], "condition": CARD["condition"], "source": CARD["source"],
    }  # fmt: skip


def test_clusters_are_disjoint_and_complete(tmp_path, encoded) -> None:
    for method in ("balanced", "free", "random"):
        cluster(encoded, tmp_path / method, 3, method)
        keys = [key for c in range(3) for key in Shards(tmp_path / method / f"cluster-{c:03d}").keys]
        assert sorted(keys) == sorted(Shards(encoded).keys)


def test_balanced_keeps_the_bounds_where_free_does_not(tmp_path) -> None:
    encoded = write(tmp_path / "encoded", sizes=(150, 12, 8, 10), spread=0.5)
    free, balanced = tmp_path / "free", tmp_path / "balanced"
    with pytest.warns(UserWarning, match=r"cluster 0 holds 8.* times its fair share of 25.0%"):
        cluster(encoded, free, 4, "free")
    cluster(encoded, balanced, 4)
    assert read_json(free / CLUSTERS_CARD)["largest_over_mean"] > 2
    assert read_json(balanced / CLUSTERS_CARD)["largest_over_mean"] <= LARGEST
    assert min(c["train"] for c in read_json(balanced / CLUSTERS_CARD)["counts"]) >= SMALLEST * 36 - 2


def test_random_clusters_are_about_equal(tmp_path) -> None:
    encoded = write(tmp_path / "encoded", sizes=(200, 200, 200))
    cluster(encoded, tmp_path / "out", 4, "random")
    sizes = [c["train"] for c in read_json(tmp_path / "out" / CLUSTERS_CARD)["counts"]]
    assert sum(sizes) == 480
    assert max(abs(size - 120) for size in sizes) < 4 * (120 * 0.75) ** 0.5  # four standard deviations
    assert len({(key[-1], number) for key, number in labels(tmp_path / "out").items()}) == 12
    cluster(encoded, tmp_path / "other", 4, "random", seed=1)
    assert labels(tmp_path / "other") != labels(tmp_path / "out")


def test_held_out_images_do_not_influence_the_clusters(tmp_path, encoded) -> None:
    cluster(encoded, tmp_path / "a", 3)
    cluster(write(tmp_path / "changed", change_val=3.0), tmp_path / "b", 3)
    a, b = load_file(tmp_path / "a" / "centroids.safetensors"), load_file(tmp_path / "b" / "centroids.safetensors")
    assert torch.equal(a["fine"], b["fine"])
    assert torch.equal(a["coarse_of_fine"].bincount(), b["coarse_of_fine"].bincount())


@pytest.mark.parametrize("method", ["balanced", "free"])
def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path, method) -> None:
    """Each image occurs four times, like a letter of several scripts: the last bit of a sum then decides."""
    feature = torch.rand(500, 256, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    with ShardWriter(tmp_path / "encoded", CARD, shard_rows=900) as writer:
        columns = {"latent": torch.zeros(2000, 1, 1, 2), "feature": feature}
        writer.append([str(i) for i in range(2000)], [""] * 2000, ["train"] * 2000, columns)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cluster(tmp_path / "encoded", tmp_path / str(threads), 4, method, fine=700)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")


def test_an_existing_clustering_is_kept_and_another_refused(tmp_path, encoded) -> None:
    out = tmp_path / "out"
    assert cluster(encoded, out, 3)
    before = content(out)
    assert cluster(encoded, out, 3) is False
    with pytest.raises(AtollError, match=r"with k 3, requested is 2.*--force"):
        cluster(encoded, out, 2)
    write(encoded, sizes=(20, 20, 20))
    with pytest.raises(AtollError, match="with encoded"):
        cluster(encoded, out, 3)
    assert content(out) == before
    assert cluster(encoded, out, 2, force=True)
    assert not (out / "cluster-002").exists()


def test_a_failure_changes_nothing(tmp_path, encoded, monkeypatch) -> None:
    out = tmp_path / "out"
    cluster(encoded, out, 3)
    before = content(out)

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("atoll.storage.shards.writer.write_bytes", broken)
    with pytest.raises(AtollError, match="No space left"):
        cluster(encoded, out, 2, force=True)
    assert content(out) == before
    assert sorted(os.listdir(tmp_path)) == ["encoded", "out"]


def test_other_directories_are_not_replaced(tmp_path, encoded) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(AtollError, match="no former result"):
        cluster(encoded, tmp_path / "home", 3, force=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("k", "fine", "message"),
    [
        (0, None, "k is 0.*72"),
        (73, None, "k is 73.*from 1 to 72"),
        (5, 4, "4 fine.*at least k = 5"),
        (2, 99, "at most the 72"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path, encoded, k, fine, message) -> None:
    with pytest.raises(AtollError, match=message):
        cluster(encoded, tmp_path / "out", k, "free", fine=fine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["balanced", "free"])
def test_as_many_clusters_as_images_or_one(tmp_path, method) -> None:
    encoded = write(tmp_path / "encoded", sizes=(6, 4))
    cluster(encoded, tmp_path / "out", 8, method)
    assert [c["train"] for c in read_json(tmp_path / "out" / CLUSTERS_CARD)["counts"]] == [1] * 8
    cluster(encoded, tmp_path / "one", 1, method)
    assert set(labels(tmp_path / "one").values()) == {0}


def test_a_feature_that_is_not_finite_is_named(tmp_path) -> None:
    with ShardWriter(tmp_path / "encoded", CARD) as writer:
        feature = torch.rand(9, 4)
        feature[6, 2] = torch.nan
        columns = {"latent": torch.zeros(9, 1, 2, 3), "feature": feature}
        writer.append([f"k{i}" for i in range(9)], [""] * 9, ["train"] * 9, columns)
    with pytest.raises(AtollError, match="'k6' is not finite"):
        cluster(tmp_path / "encoded", tmp_path / "out", 2)


def test_equal_features_are_refused(tmp_path) -> None:
    with ShardWriter(tmp_path / "encoded", CARD) as writer:
        feature = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(torch.tensor([18, 2]), dim=0)
        columns = {"latent": torch.zeros(20, 1, 2, 3), "feature": feature}
        writer.append([f"k{i}" for i in range(20)], [""] * 20, ["train"] * 20, columns)
    with pytest.raises(AtollError, match=r"2 distinct features among 20.*choose k up to 2"):
        cluster(tmp_path / "encoded", tmp_path / "out", 3)
    with pytest.raises(AtollError, match=r"would hold 18 images.*method: free"):
        cluster(tmp_path / "encoded", tmp_path / "out", 2)
    assert cluster(tmp_path / "encoded", tmp_path / "out", 2, "free")


def test_a_directory_without_features_is_refused(tmp_path, encoded) -> None:
    cluster(encoded, tmp_path / "out", 2)
    with pytest.raises(AtollError, match="no column 'feature'"):
        cluster(tmp_path / "out" / "cluster-000", tmp_path / "again", 2)


def test_a_run_is_clustered_with_its_settings(run, manifest) -> None:
    shutil.rmtree(run / "clusters")
    encoded = Shards(run / "encoded")
    everything = [getattr(encoded, name) for name in ("keys", "captions", "splits")]
    columns = {name: encoded.read(name, slice(None)) for name in encoded.columns}
    with ShardWriter(run / "encoded", CARD) as writer:
        writer.append(*everything, columns)
    assert "3 clusters of" in cluster_run(run, manifest)
    assert "there already" in cluster_run(run, manifest)
    assert json.loads((run / "clusters" / CLUSTERS_CARD).read_text())["k"] == 3


def test_shards_are_read_one_at_a_time(tmp_path, encoded, monkeypatch) -> None:
    """A hundred million keys, captions or features would not fit: only `Shards.parts` may be used."""

    def refuse(*_):
        raise AssertionError("everything was read at once")

    with monkeypatch.context() as patch:
        for name in ("keys", "captions", "splits"):
            patch.setattr(Shards, name, property(refuse))
        for name in ("read", "rows"):
            patch.setattr(Shards, name, refuse)
        for method in ("balanced", "free", "random"):
            assert cluster(encoded, tmp_path / method, 3, method, router_fraction=0.5)
    assert len(Shards(tmp_path / "random" / "router")) < 90


def test_the_assignment_applies_to_new_images(tmp_path, encoded) -> None:
    """Fewer held-out images, or none: the same function, the same hash. Another seed or k: another."""
    hashes = {}
    for name, change in (("a", {}), ("b", {"change_val": 2.0})):
        for method in ("free", "random"):
            cluster(write(tmp_path / f"encoded-{name}", **change), tmp_path / (name + method), 3, method)
            hashes[name, method] = read_json(tmp_path / (name + method) / CLUSTERS_CARD)["assignment"]
    assert hashes["a", "free"] == hashes["b", "free"]
    assert hashes["a", "random"] == hashes["b", "random"]
    seen = set(hashes.values())
    for number, change in enumerate(({"seed": 1}, {"k": 2}, {"method": "balanced"}, {"method": "random", "seed": 4})):
        cluster(encoded, tmp_path / f"out-{number}", **{"k": 3, "method": "free", **change})
        seen.add(read_json(tmp_path / f"out-{number}" / CLUSTERS_CARD)["assignment"])
    assert len(seen) == 6


def test_the_path_of_the_weights_does_not_change_the_assignment(tmp_path, encoded) -> None:
    cluster(encoded, tmp_path / "out", 3)
    assignment = load_assignment(tmp_path / "out", load_card(tmp_path / "out" / CLUSTERS_CARD, ClustersCard))
    here = assignment.sha256({"name": "dinov2", "weights": "/here", "sha256": "a"})
    assert here == assignment.sha256({"name": "dinov2", "weights": "/there", "sha256": "a"})
    assert here != assignment.sha256({"name": "dinov2", "weights": "/here", "sha256": "b"})


def test_blank_images_are_in_one_cluster(tmp_path) -> None:
    feature = F.normalize(torch.rand(60, 4, generator=torch.Generator().manual_seed(0)) - 0.5)
    feature[::7] = 0
    with ShardWriter(tmp_path / "encoded", CARD) as writer:
        columns = {"latent": torch.zeros(60, 1, 2, 3), "feature": feature}
        writer.append([f"k{i:02d}" for i in range(60)], [""] * 60, ["train"] * 60, columns)
    cluster(tmp_path / "encoded", tmp_path / "out", 3, "free")
    assigned = labels(tmp_path / "out")
    assert len({assigned[f"k{i:02d}"] for i in range(0, 60, 7)}) == 1
    assert read_json(tmp_path / "out" / CLUSTERS_CARD)["blank"] == 9
    assert "The feature of 9 images is a zero vector" in (tmp_path / "out" / "report.html").read_text()


def test_other_columns_are_copied_in_short_shards(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("atoll.cluster.write._BUFFERS", 4 * 2 * 4 * 36 * 5)  # 5 rows of 36 values, in 4 writers, twice
    with ShardWriter(tmp_path / "encoded", CARD) as writer:
        g = torch.Generator().manual_seed(0)
        latent = torch.rand(60, 1, 3, 6, generator=g)
        columns = {"latent": latent, "latent_flip": latent.flip(-1), "feature": torch.rand(60, 4, generator=g)}
        writer.append([f"k{i}" for i in range(60)], [""] * 60, ["train"] * 60, columns)
    cluster(tmp_path / "encoded", tmp_path / "out", 3, "free")
    for c in range(3):
        shards = Shards(tmp_path / "out" / f"cluster-{c:03d}")
        assert shards.columns == ("latent", "latent_flip")
        assert torch.equal(shards.read("latent", slice(None)).flip(-1), shards.read("latent_flip", slice(None)))
        assert max(len(part) for part in shards.parts()) <= 5


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_impossible_router_fractions_are_refused(tmp_path, encoded, fraction) -> None:
    with pytest.raises(AtollError, match="a number above 0, at most 1"):
        cluster(encoded, tmp_path / "out", 3, router_fraction=fraction)


def test_a_fraction_that_selects_no_image_is_refused(tmp_path, encoded) -> None:
    with pytest.raises(AtollError, match="selects no image for the router"):
        cluster(encoded, tmp_path / "out", 3, router_fraction=1e-9)
    assert not (tmp_path / "out").exists()
