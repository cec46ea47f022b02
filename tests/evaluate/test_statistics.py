"""A run whose latents are normalised by measured statistics, from its clusters to the evaluation's reference."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from atoll.assemble import assemble_run
from atoll.cluster import cluster_run
from atoll.convert.arguments import arguments_of_run
from atoll.encoders.codec import build_codec
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.evaluate.run import open_run
from atoll.manifest import Manifest, load_manifest
from atoll.storage.artifact import read_card, read_json, write_json
from atoll.storage.cards import EncodedCard, ExpertCard, RouterCard
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards, ShardWriter
from atoll.train.calibrate_expert import calibrate_expert
from atoll.train.expert import train_expert, train_monolith
from atoll.train.router import _data_set, train_router
from tests.cards import encoded_card
from tests.conftest import RUN

SHAPE, ROWS = (3, 4, 8), 60
CODEC = {"name": "pixels", "channels": 3, "shift": 0.5, "scale": 2.0}
STATISTICS = {"mean": [-1.0, 0.0, 2.0], "std": [0.5, 1.0, 4.0], "values": 999}


def write_encoded(path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(STATISTICS[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    group = torch.arange(ROWS) % 3
    latents = (mean + std * (group.reshape(-1, 1, 1, 1) - 1 + 0.4 * torch.randn(ROWS, *SHAPE, generator=g))).half()
    columns = {"latent": latents, "feature": torch.eye(3)[group] + 0.1 * torch.rand(ROWS, 3, generator=g)}
    splits = ["val" if i % 10 >= 7 else "train" for i in range(ROWS)]
    card = encoded_card(codec=CODEC, condition=RUN["condition"], statistics=STATISTICS)
    with ShardWriter(path, card) as writer:
        writer.append([f"k{i}" for i in range(ROWS)], [f"caption {i}" for i in range(ROWS)], splits, columns)


def trained(path: Path, statistics: str) -> tuple[Path, Manifest]:
    """A run with two experts, a router and a monolith."""
    path.mkdir(parents=True)
    settings = {**RUN, "codec": {**CODEC, "statistics": statistics}, "clusters": {"k": 3, "fine": 12}}
    settings["train"] = {**RUN["train"], "steps": 4}
    (path / "atoll.yaml").write_text(yaml.safe_dump(settings))
    write_encoded(path / "encoded")
    manifest = load_manifest(path)
    cluster_run(path, manifest)
    for name in ("0", "1", "2"):
        train_expert(path, manifest, name)
    train_router(path, manifest)
    train_monolith(path, manifest)
    return path, manifest


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {name: trained(root / name, name) for name in ("measured", "codec")}


def test_every_part_learns_and_is_measured_in_the_normalised_space(runs) -> None:
    run, manifest = runs["measured"]
    assemble_run(run, manifest)
    opened, layout, raw = open_run(run), RunLayout(run), Shards(run / "encoded")
    codec = opened.loaded.card.codec
    assert codec == read_card(layout.router, RouterCard).codec == read_card(layout.monolith, ExpertCard).codec
    assert codec["scale"] == [4.0, 2.0, 0.5]
    # The evaluation's reference: the latents of the clusters, and the images that were encoded.
    rows = torch.arange(ROWS)
    mean, std = (torch.tensor(STATISTICS[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    expected = (raw.read("latent", rows).float() - mean) / std
    torch.testing.assert_close(opened.reference.latents(rows), expected, rtol=2e-3, atol=2e-3)
    images = build_codec(CODEC).decode(raw.read("latent", rows).float())
    torch.testing.assert_close(opened.reference.images(rows), images, rtol=0, atol=2e-3)
    by_key = {
        key: shards.read("latent", slice(None))[i] for shards in opened.clusters for i, key in enumerate(shards.keys)
    }
    assert all(torch.equal(opened.encoded.read("latent", slice(i, i + 1))[0], by_key[f"k{i}"]) for i in range(ROWS))
    # The router learns from encoded/, and must see what the experts see.
    data, labels, _, _ = _data_set(run)
    assert torch.equal(data.read("latent", rows), opened.encoded.read("latent", rows))
    assert len(labels) == ROWS
    assert Shards(run / "encoded").card(EncodedCard).codec == CODEC


def test_experts_of_other_statistics_are_refused_by_name(runs, tmp_path) -> None:
    (run, manifest), (other, _) = runs["measured"], runs["codec"]
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    strange = next((other / "experts").glob("1-*"))
    shutil.rmtree(mixed / "experts" / strange.name)
    shutil.copytree(strange, mixed / "experts" / strange.name)
    with pytest.raises(AtollError) as refusal:
        assemble_run(mixed, manifest)
    message = str(refusal.value)
    assert message.count(str(mixed / "experts")) == 2
    assert "1-flow-linear: its latents are normalised by shift 0.5, scale 2.0," in message
    assert "0-eps-cosine by shift[0] 0.0, scale[0] 4.0; parts of one model need the same statistics" in message


def test_an_ensemble_of_other_statistics_is_not_loaded(runs, tmp_path) -> None:
    """ensemble.json may be anybody's, as a collective's is."""
    run = tmp_path / "run"
    shutil.copytree(runs["measured"][0], run)
    assemble_run(run, runs["measured"][1])
    card = read_json(RunLayout(run).ensemble_card)
    write_json(RunLayout(run).ensemble_card, {**card, "codec": CODEC})
    with pytest.raises(AtollError, match=r"scale\[0\] 4\.0, those of the ensemble by shift 0\.5, scale 2\.0"):
        load_ensemble(RunLayout(run).ensemble)


def test_a_monolith_of_other_statistics_is_refused(runs, tmp_path) -> None:
    (run, manifest), (other, _) = runs["measured"], runs["codec"]
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    assemble_run(mixed, manifest)
    shutil.rmtree(RunLayout(mixed).monolith)
    shutil.copytree(RunLayout(other).monolith, RunLayout(mixed).monolith)
    with pytest.raises(AtollError, match=r"monolith: its latents are normalised by shift 0\.5"):
        open_run(mixed)


def test_a_training_does_not_go_on_with_other_statistics(runs, tmp_path) -> None:
    """The clusters are the same, so only the constants tell one training from the other."""
    run = tmp_path / "run"
    shutil.copytree(runs["codec"][0], run)
    settings = yaml.safe_load((run / "atoll.yaml").read_text())
    settings["codec"]["statistics"] = "measured"
    (run / "atoll.yaml").write_text(yaml.safe_dump(settings))
    before = read_json(run / "clusters" / "clusters.json")["assignment"]
    with pytest.raises(AtollError, match="other statistics"):
        cluster_run(run, load_manifest(run))
    cluster_run(run, load_manifest(run), force=True)
    assert read_json(run / "clusters" / "clusters.json")["assignment"] == before
    for work in (
        lambda: train_expert(run, load_manifest(run), "0", resume=True),
        lambda: train_router(run, load_manifest(run), resume=True),
    ):
        with pytest.raises(AtollError, match=r"was trained under other settings or on other data; add --restart"):
            work()


def test_weights_of_other_statistics_are_begun_from_with_a_warning(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["measured"][0], run)
    shutil.copytree(next((runs["codec"][0] / "experts").glob("1-*")), run / "old")
    settings = yaml.safe_load((run / "atoll.yaml").read_text())
    settings["experts"][1]["train"] = {"init": "old", "steps": 1}
    (run / "atoll.yaml").write_text(yaml.safe_dump(settings))
    with pytest.warns(
        UserWarning, match=r"train\.init: .*old knows latents normalised by shift 0\.5, scale 2\.0, the data"
    ):
        train_expert(run, load_manifest(run), "1", restart=True)


@pytest.mark.parametrize("name", ["measured", "codec"])
def test_a_converted_network_knows_the_latents_of_the_codec_itself(runs, name) -> None:
    """Whatever the run normalises by: nobody trained the checkpoint on that."""
    assert arguments_of_run(runs[name][0], "0")["codec"] == CODEC


def test_rows_of_other_statistics_calibrate_no_expert(runs) -> None:
    expert = next((runs["measured"][0] / "experts").glob("1-*"))
    with pytest.raises(
        AtollError, match=r"cluster-001: its latents are normalised by shift 0\.5, .*the expert by shift\["
    ):
        calibrate_expert(expert, [RunLayout(runs["codec"][0]).cluster(1)])


def test_a_reference_of_another_codec_is_refused(runs, tmp_path) -> None:
    run, manifest = tmp_path / "run", runs["measured"][1]
    shutil.copytree(runs["measured"][0], run)
    assemble_run(run, manifest)
    index = read_json(run / "encoded" / "index.json")
    index["card"]["codec"] = {**CODEC, "name": "kl", "sha256": "0" * 64}
    write_json(run / "encoded" / "index.json", index)
    with pytest.raises(AtollError, match=r"encoded: its codec is .*kl.*that of .*ensemble is .*pixels"):
        open_run(run)
