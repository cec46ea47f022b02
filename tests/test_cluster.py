import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from atoll.artifact import read_json
from atoll.cluster import CLUSTERS, LARGEST, SMALLEST, _balanced, _transport, assignment_hash, cluster, cluster_run
from atoll.errors import AtollError
from atoll.shards import Shards, ShardWriter

CARD = {
    "codec": {"name": "pixels"},
    "condition": {"name": "hash"},
    "feature": {"name": "blobs"},
    "source": {"name": "blobs"},
}


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
    found = labels(tmp_path / "out")
    pairs = {(key[-1], number) for key, number in found.items()}
    assert len(pairs) == 3
    assert len({number for _, number in pairs}) == 3
    # Numbered by the first image of each.
    assert list(dict.fromkeys(found.values())) == [0, 1, 2]


def test_what_is_written(tmp_path, encoded) -> None:
    out = tmp_path / "out"
    cluster(encoded, out, 3, "free", fine=7, seed=5)
    shards, card, found = Shards(encoded), read_json(out / CLUSTERS), labels(out)
    assert {key: card[key] for key in ("format", "kind", "k", "method", "fine", "seed")} == {
        "format": 1, "kind": "clusters", "k": 3, "method": "free", "fine": 7, "seed": 5,
    }  # fmt: skip
    assert (card["encoded"], card["feature"]) == (shards.sha256, {"name": "blobs"})
    assert card["assignment"] == assignment_hash(list(found), torch.tensor(list(found.values())))
    assert list(found) == shards.keys
    centroids = load_file(out / "centroids.safetensors")
    assert {name: tuple(c.shape) for name, c in centroids.items()} == {
        "fine": (7, 5), "coarse": (3, 5), "coarse_of_fine": (7,),
    }  # fmt: skip
    # Assignment is by the nearest fine centroid, and can be done again from the file.
    distances = torch.cdist(F.normalize(shards.read("feature", slice(None))), centroids["fine"])
    assert centroids["coarse_of_fine"][distances.argmin(1)].tolist() == list(found.values())
    counts = [[sum(found[k] == c for k, s in zip(shards.keys, shards.splits, strict=True) if s == split)
               for split in ("train", "val")] for c in range(3)]  # fmt: skip
    assert [[c["train"], c["val"]] for c in card["counts"]] == counts
    assert card["largest_over_mean"] == round(max(c[0] for c in counts) * 3 / 72, 4)


def test_an_island_needs_its_directory_and_nothing_else(tmp_path, encoded) -> None:
    out = tmp_path / "out"
    cluster(encoded, out, 3)
    found, whole = labels(out), Shards(encoded)
    rows = [i for i, key in enumerate(whole.keys) if found[key] == 1]
    expected = [[column[i] for i in rows] for column in (whole.keys, whole.captions, whole.splits)]
    hashed = read_json(out / CLUSTERS)["assignment"]
    island = shutil.move(out / "cluster-001", tmp_path / "island")
    shutil.rmtree(out)
    shutil.rmtree(encoded)
    mine = Shards(island, verify=True)
    assert [mine.keys, mine.captions, mine.splits] == expected
    assert mine.columns == ("latent",)
    assert mine.read("latent", slice(None))[:, 0, 0, 0].tolist() == rows
    assert mine.card == {
        "cluster": 1, "clusters": 3, "assignment": hashed, "latent_shape": [1, 2, 3],
        "codec": CARD["codec"], "condition": CARD["condition"], "source": CARD["source"],
    }  # fmt: skip


def test_clusters_are_disjoint_and_whole(tmp_path, encoded) -> None:
    for method in ("balanced", "free", "random"):
        cluster(encoded, tmp_path / method, 3, method)
        keys = [key for c in range(3) for key in Shards(tmp_path / method / f"cluster-{c:03d}").keys]
        assert sorted(keys) == sorted(Shards(encoded).keys)


def test_balanced_keeps_the_bounds_where_free_does_not(tmp_path) -> None:
    encoded = write(tmp_path / "encoded", sizes=(150, 12, 8, 10), spread=0.5)
    free, balanced = tmp_path / "free", tmp_path / "balanced"
    cluster(encoded, free, 4, "free")
    cluster(encoded, balanced, 4)
    assert read_json(free / CLUSTERS)["largest_over_mean"] > 2
    assert read_json(balanced / CLUSTERS)["largest_over_mean"] <= LARGEST
    assert min(c["train"] for c in read_json(balanced / CLUSTERS)["counts"]) >= SMALLEST * 36 - 2


def test_random_is_equal_and_means_nothing(tmp_path, encoded) -> None:
    cluster(encoded, tmp_path / "out", 4, "random")
    assert [c["train"] for c in read_json(tmp_path / "out" / CLUSTERS)["counts"]] == [18] * 4
    assert len({(key[-1], number) for key, number in labels(tmp_path / "out").items()}) == 12
    cluster(encoded, tmp_path / "other", 4, "random", seed=1)
    assert labels(tmp_path / "other") != labels(tmp_path / "out")


def test_held_out_images_have_no_say(tmp_path, encoded) -> None:
    cluster(encoded, tmp_path / "a", 3)
    cluster(write(tmp_path / "changed", change_val=3.0), tmp_path / "b", 3)
    a, b = load_file(tmp_path / "a" / "centroids.safetensors"), load_file(tmp_path / "b" / "centroids.safetensors")
    assert torch.equal(a["fine"], b["fine"])
    assert torch.equal(a["coarse_of_fine"].bincount(), b["coarse_of_fine"].bincount())


def test_the_same_bytes_whatever_the_number_of_threads(tmp_path) -> None:
    """Each picture is there four times, as a letter is in several scripts: then the last bit of a sum decides."""
    feature = torch.rand(500, 256, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    with ShardWriter(tmp_path / "encoded", CARD) as writer:
        columns = {"latent": torch.zeros(2000, 1, 1, 2), "feature": feature}
        writer.append([str(i) for i in range(2000)], [""] * 2000, ["train"] * 2000, columns)
    code = "import sys, pathlib as p, atoll.cluster as c; c.cluster(*map(p.Path, sys.argv[1:]), k=4, fine=700)"
    for threads in "12":
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", code, tmp_path / "encoded", tmp_path / threads]
        subprocess.run(command, check=True, env=environment)
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_the_same_clustering_is_not_made_again_and_another_not_replaced(tmp_path, encoded) -> None:
    out = tmp_path / "out"
    assert cluster(encoded, out, 3)
    before = content(out)
    assert cluster(encoded, out, 3) is False
    with pytest.raises(AtollError, match=r"with k 3, asked for is 2.*--force"):
        cluster(encoded, out, 2)
    write(encoded, sizes=(20, 20, 20))
    with pytest.raises(AtollError, match="with encoded"):
        cluster(encoded, out, 3)
    assert content(out) == before
    assert cluster(encoded, out, 2, force=True)
    assert not (out / "cluster-002").exists()


def test_a_failure_leaves_what_was_there(tmp_path, encoded, monkeypatch) -> None:
    out = tmp_path / "out"
    cluster(encoded, out, 3)
    before = content(out)

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("atoll.shards.write_bytes", broken)
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
    ("k", "fine", "said"),
    [
        (0, None, "k is 0.*72"),
        (73, None, "k is 73.*from 1 to 72"),
        (5, 4, "4 fine.*at least k = 5"),
        (2, 99, "at most the 72"),
    ],
)
def test_impossible_numbers(tmp_path, encoded, k, fine, said) -> None:
    with pytest.raises(AtollError, match=said):
        cluster(encoded, tmp_path / "out", k, "free", fine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["balanced", "free", "random"])
def test_as_many_clusters_as_images_and_one(tmp_path, method) -> None:
    encoded = write(tmp_path / "encoded", sizes=(6, 4))
    cluster(encoded, tmp_path / "out", 8, method)
    assert [c["train"] for c in read_json(tmp_path / "out" / CLUSTERS)["counts"]] == [1] * 8
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


def test_images_that_all_look_the_same(tmp_path) -> None:
    with ShardWriter(tmp_path / "encoded", CARD) as writer:
        feature = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(torch.tensor([18, 2]), dim=0)
        columns = {"latent": torch.zeros(20, 1, 2, 3), "feature": feature}
        writer.append([f"k{i}" for i in range(20)], [""] * 20, ["train"] * 20, columns)
    with pytest.raises(AtollError, match=r"2 distinct features among 20.*choose k up to 2"):
        cluster(tmp_path / "encoded", tmp_path / "out", 3)
    with pytest.raises(AtollError, match=r"would hold 18 images.*method: free"):
        cluster(tmp_path / "encoded", tmp_path / "out", 2)
    assert cluster(tmp_path / "encoded", tmp_path / "out", 2, "free")


def test_a_directory_without_features(tmp_path, encoded) -> None:
    cluster(encoded, tmp_path / "out", 2)
    with pytest.raises(AtollError, match="no column 'feature'"):
        cluster(tmp_path / "out" / "cluster-000", tmp_path / "again", 2)


def test_the_hash_is_of_the_pairs_in_any_order() -> None:
    a = assignment_hash(["x", "y", "z"], torch.tensor([0, 1, 1]))
    assert a == assignment_hash(["z", "x", "y"], torch.tensor([1, 0, 1]))
    assert a != assignment_hash(["x", "y", "z"], torch.tensor([1, 0, 0]))


def test_transport_is_the_cheapest_within_the_bounds() -> None:
    """Against all assignments: whole weights of one, so the linear program's answer is whole."""
    g = torch.Generator().manual_seed(3)
    for _ in range(5):
        distances = torch.rand(7, 3, generator=g, dtype=torch.float64)
        weights = torch.ones(7, dtype=torch.float64)
        found = _transport(distances, weights, 2, 3)
        cost = {
            choice: sum(float(distances[i, c]) for i, c in enumerate(choice))
            for choice in itertools.product(range(3), repeat=7)
            if all(2 <= choice.count(c) <= 3 for c in range(3))
        }
        assert cost[tuple(found.tolist())] == pytest.approx(min(cost.values()))


def test_transport_puts_points_that_the_program_splits_where_there_is_room() -> None:
    """All want the first label, then the second; five points of weight 2 do not fit as halves."""
    distances = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64).expand(5, 3)
    found = _transport(distances, torch.full((5,), 2.0, dtype=torch.float64), 0, 5)
    assert found.bincount(minlength=3).tolist() == [2, 2, 1]


def test_balance_goes_on_until_nothing_changes() -> None:
    points = torch.rand(90, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.ones(90, dtype=torch.float64)
    found = _balanced(points, weights, torch.arange(90) % 3, 3)
    means = torch.stack([points[found == c].mean(0) for c in range(3)]).double()
    again = _transport(torch.cdist(points.double(), means).square(), weights, SMALLEST * 30, LARGEST * 30)
    assert torch.equal(found, again)


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_balance_holds_where_no_point_weighs_a_quarter_of_the_mean(data) -> None:
    k = data.draw(st.integers(1, 4))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=40 * k, max_size=60 * k))
    weights = torch.tensor(weights, dtype=torch.float64)
    points = torch.randn(len(weights), 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    found = _balanced(points, weights, torch.zeros(len(weights), dtype=torch.int64), k)
    assert float(found.bincount(weights, minlength=k).max()) <= LARGEST * float(weights.sum()) / k


def test_the_clusters_of_a_run(run, manifest) -> None:
    shutil.rmtree(run / "clusters")
    encoded = Shards(run / "encoded")
    everything = [getattr(encoded, name) for name in ("keys", "captions", "splits")]
    columns = {name: encoded.read(name, slice(None)) for name in encoded.columns}
    with ShardWriter(run / "encoded", {**encoded.card, **CARD}) as writer:
        writer.append(*everything, columns)
    assert "3 clusters of" in cluster_run(run, manifest)
    assert "there already" in cluster_run(run, manifest)
    assert json.loads((run / "clusters" / CLUSTERS).read_text())["k"] == 3
