"""`--assign-only`: new images are added to existing clusters."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from atoll.cluster import assign_only, cluster, load_assignment
from atoll.cluster import dedupe as dedupe_module
from atoll.cluster import report_rows as rows_module
from atoll.cluster.sampling import draw, hash_keys
from atoll.errors import AtollError
from atoll.storage.artifact import load_card, read_json, write_json
from atoll.storage.cards import ClustersCard, ClusterShardsCard
from atoll.storage.layout import CLUSTERS_CARD
from atoll.storage.shards import Shards, ShardWriter
from tests.cards import encoded_card

K = 3
CARD = encoded_card(feature={"name": "blobs", "weights": "/here", "sha256": "a"}, source={"name": "blobs"})


def write(path: Path, numbers: range, blobs=None, card=CARD, shape=(1, 2, 3), flip=True, shard_rows=32) -> Path:
    """Row i belongs to blob i % 3; its latent and feature are functions of i."""
    rows = list(numbers)
    features, latents = [], []
    for i in rows:
        g = torch.Generator().manual_seed(i)
        direction = torch.eye(5)[i % 3 if blobs is None else blobs]
        features.append(direction * (1 + i % 4) + 0.1 * torch.rand(5, generator=g))
        latents.append(torch.full(shape, i % 100).half())
    columns = {"latent": torch.stack(latents), "feature": torch.stack(features)}
    if flip:
        columns["latent_flip"] = columns["latent"].flip(-1) + 1
    splits = ["val" if i % 5 == 4 else "train" for i in rows]
    with ShardWriter(path, card, shard_rows) as writer:
        writer.append([f"k{i}" for i in rows], [f"caption {i}" for i in rows], splits, columns)
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    cluster(write(tmp_path / "encoded", range(90)), tmp_path / "clusters", K, fine=12)
    return tmp_path / "clusters"


def labels(out: Path) -> dict[str, int]:
    table = pq.read_table(out / "assignment.parquet").to_pydict()
    return dict(zip(table["key"], table["cluster"], strict=True))


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def assert_refused(out: Path, encoded: Path, message: str) -> None:
    before = content(out)
    with pytest.raises(AtollError, match=message):
        assign_only(out, encoded)
    assert content(out) == before
    assert not list(out.parent.glob(".*"))


def test_new_images_join_the_old_ones(tmp_path, out) -> None:
    old, card = labels(out), read_json(out / CLUSTERS_CARD)
    nodes = {c: (out / f"cluster-00{c}" / "shard-00000.safetensors").stat().st_ino for c in range(K)}
    more = write(tmp_path / "more", range(90, 161), card={**CARD, "feature": {**CARD["feature"], "weights": "/there"}})
    assert "71 images added: 3 clusters of" in assign_only(out, more)
    after, again = labels(out), read_json(out / CLUSTERS_CARD)
    assert list(after) == [f"k{i}" for i in range(161)]
    assert {key: after[key] for key in old} == old
    assert all(after[f"k{i}"] == after[f"k{i % 3}"] for i in range(161))
    assert (
        again["assignment"]
        == card["assignment"]
        == load_assignment(out, load_card(out / CLUSTERS_CARD, ClustersCard)).sha256(CARD["feature"])
    )
    assert again["encoded"] == [*card["encoded"], Shards(more).sha256]
    for c in range(K):
        shards = Shards(out / f"cluster-00{c}", verify=True)
        assert (shards.path / "shard-00000.safetensors").stat().st_ino == nodes[c]  # a link, not a copy
        members = [int(key[1:]) for key in after if after[key] == c]
        assert shards.keys == [f"k{i}" for i in members]
        assert shards.captions == [f"caption {i}" for i in members]
        assert shards.read("latent", slice(None))[:, 0, 0, 0].tolist() == [i % 100 for i in members]
        assert shards.read("latent_flip", slice(None))[:, 0, 0, 0].tolist() == [i % 100 + 1 for i in members]
        assert shards.card(ClusterShardsCard).assignment == card["assignment"]
        counts = {split: shards.splits.count(split) for split in ("train", "val")}
        assert again["counts"][c] == counts
    assert "161 images in 3 clusters" in (out / "report.html").read_text()
    # `atoll cluster` still recognizes its own clustering.
    assert cluster(tmp_path / "encoded", out, K, fine=12) is False


def test_the_report_samples_old_and_new_images(tmp_path, out, monkeypatch) -> None:
    monkeypatch.setattr(rows_module, "SAMPLED", 20)
    monkeypatch.setattr(rows_module, "REPORT_IMAGES", 4)
    cluster(tmp_path / "encoded", out, K, fine=12, force=True)
    assign_only(out, write(tmp_path / "more", range(90, 150)))
    after, assignment = labels(out), load_assignment(out, load_card(out / CLUSTERS_CARD, ClustersCard))
    keys = list(after)
    draws = dict(zip(keys, draw(hash_keys(keys), 0, "sample").tolist(), strict=True))
    assert Shards(out / "sample").keys == sorted(keys, key=draws.get)[:20]
    both = [Shards(tmp_path / name).read("feature", slice(None)) for name in ("encoded", "more")]
    feature = dict(zip(keys, F.normalize(torch.cat(both)), strict=True))
    draws = dict(zip(keys, draw(hash_keys(keys), 0, "images").tolist(), strict=True))
    for c in range(K):
        members = [key for key in keys if after[key] == c]
        distance = {key: float((feature[key] - assignment.coarse[c]).norm()) for key in members}
        expected = {*sorted(members, key=distance.get)[:4], *sorted(members, key=draws.get)[:4]}
        images = Shards(out / "images")
        shown = [k for k, n in zip(images.keys, images.read("cluster", slice(None)).tolist(), strict=True) if n == c]
        assert set(shown) >= expected
        assert len(shown) <= 2 * 4


def test_known_images_are_skipped(tmp_path, out, monkeypatch) -> None:
    more = write(tmp_path / "more", range(90, 120))
    assign_only(out, more)
    before = content(out)
    assert "all images of" in assign_only(out, more)
    monkeypatch.setattr(dedupe_module, "_PASS", 7)
    again = write(tmp_path / "again", range(100, 120), shard_rows=7)
    assert "no image added, 20 were there already" in assign_only(out, again)
    assert content(out) == before
    overlap = write(tmp_path / "overlap", range(60, 140), shard_rows=9)
    assert "20 images added, 60 were there already" in assign_only(out, overlap)
    assert list(labels(out)) == [f"k{i}" for i in range(140)]


def test_another_image_with_a_known_key_is_refused(tmp_path, out) -> None:
    more = tmp_path / "more"
    columns = {name: torch.full((2, 1, 2, 3), 7.0).half() for name in ("latent", "latent_flip")}
    with ShardWriter(more, CARD) as writer:
        writer.append(["new", "k33"], ["", "caption 33"], ["train"] * 2, {**columns, "feature": torch.rand(2, 5)})
    assert_refused(out, more, "image 'k33' is in .* already with another caption, split or latent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"card": {**CARD, "feature": {"name": "blobs", "sha256": "b"}}}, r"feature is .*\"b\".*is .*\"a\""),
        ({"card": {**CARD, "codec": {"name": "pixels", "channels": 3}}}, r"codec is .*3.* is .*1"),
        ({"shape": (1, 3, 2)}, r"latent shape is \[1, 3, 2\], that of .* is \[1, 2, 3\]"),
        ({"flip": False}, r"columns is \[\"latent\"\], that of .* is \[\"latent\", \"latent_flip\"\]"),
    ],
)
def test_data_of_another_kind_are_refused(tmp_path, out, change, message) -> None:
    assert_refused(out, write(tmp_path / "more", range(90, 99), **change), message)


def test_missing_or_damaged_clusters_are_named(tmp_path, out) -> None:
    more = write(tmp_path / "more", range(90, 99))
    with pytest.raises(AtollError, match=r"clusters.json: not found"):
        assign_only(tmp_path / "nowhere", more)
    card = read_json(out / CLUSTERS_CARD)
    write_json(out / CLUSTERS_CARD, {**card, "assignment": "0" * 64})
    assert_refused(out, more, "altered or damaged")
    write_json(out / CLUSTERS_CARD, card)
    (out / "centroids.safetensors").write_bytes(b"")
    assert_refused(out, more, "cannot be read")


def test_a_failure_changes_nothing(tmp_path, out, monkeypatch) -> None:
    more = write(tmp_path / "more", range(90, 140))

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("atoll.storage.shards.writer.write_bytes", broken)
    assert_refused(out, more, "No space left")


def test_a_feature_that_is_not_finite_is_named(tmp_path, out) -> None:
    more = write(tmp_path / "more", range(90, 99))
    file, shards = more / "shard-00000.safetensors", Shards(more)
    feature = shards.read("feature", slice(None))
    feature[3, 1] = torch.inf
    with ShardWriter(tmp_path / "bad", CARD) as writer:
        columns = {name: shards.read(name, slice(None)) for name in ("latent", "latent_flip")}
        writer.append(shards.keys, shards.captions, shards.splits, {**columns, "feature": feature})
    assert file.exists()
    assert_refused(out, tmp_path / "bad", "'k93' is not finite")


def test_a_lost_balance_raises_a_warning(tmp_path, out) -> None:
    with pytest.warns(UserWarning, match=r"no longer balanced: its largest cluster holds 1\.\d+ times the mean"):
        assign_only(out, write(tmp_path / "more", range(90, 130), blobs=1))


def test_new_images_are_sampled_for_the_router(tmp_path) -> None:
    encoded, out = write(tmp_path / "encoded", range(90)), tmp_path / "clusters"
    cluster(encoded, out, K, fine=12, router_fraction=0.4)
    assign_only(out, write(tmp_path / "more", range(90, 200)))
    at_once = tmp_path / "at_once"
    cluster(write(tmp_path / "all", range(200)), at_once, K, fine=12, router_fraction=0.4)
    after, router = labels(out), Shards(out / "router", verify=True)
    assert router.keys == Shards(at_once / "router").keys
    assert 50 < len(router) < 110
    assert router.read("cluster", slice(None)).tolist() == [after[key] for key in router.keys]
    assert router.columns == ("cluster", "latent", "latent_flip")
    assert os.path.exists(out / "router" / "shard-00001.safetensors")
    assert router.read("latent", slice(None))[:, 0, 0, 0].tolist() == [int(key[1:]) % 100 for key in router.keys]


def test_captions_that_are_cut_are_counted_on_the_page_of_old_and_new(tmp_path) -> None:
    def card(captions, fraction):
        counts = {"good": 90, "uncaptioned": 0, "skipped": {}, "cut": {"captions": captions, "fraction": fraction}}
        return {**CARD, "counts": counts}

    out = tmp_path / "clusters"
    cluster(write(tmp_path / "encoded", range(90), card=card(30, 0.2)), out, K, fine=12)
    said = "captions are longer than the text encoder reads: on average"
    assert f"30 {said} 20% of their text is cut." in (out / "report.html").read_text()
    assign_only(out, write(tmp_path / "more", range(90, 120), card=card(10, 0.6)))
    assert f"40 {said} 30% of their text is cut." in (out / "report.html").read_text()
