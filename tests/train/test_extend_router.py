"""A model that grows: its router is extended, its old experts stay valid, and what did not grow from it is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from atoll.assemble import assemble, assemble_run
from atoll.cluster import add_cluster, cluster, split_cluster
from atoll.encoders.text import build_encoder
from atoll.ensemble.loading import load_ensemble, load_router
from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest
from atoll.storage.artifact import read_card, read_tensors, save_artifact, sha256_file, write_json
from atoll.storage.cards import ExpertCard, RouterCard
from atoll.storage.shards import Shards, ShardWriter
from atoll.synthesize import synthesize_run
from atoll.train import extend_router as extend_module
from atoll.train.expert import train_expert, train_monolith
from atoll.train.extend_router import extend_router
from atoll.train.router import train_router
from tests.cards import encoded_card
from tests.conftest import RUN, write_run

NEW_MEAN = 3.0  # of the new cluster's latents; the old ones have -1, 0 and 1


@pytest.fixture(autouse=True)
def few_samples(monkeypatch) -> None:
    monkeypatch.setattr(extend_module, "SAMPLES", 512)


def grow_manifest(run: Path, k: int, *experts: dict) -> Manifest:
    settings = {**RUN, "clusters": {"k": k}, "experts": [*RUN["experts"], *experts]}
    (run / "atoll.yaml").write_text(yaml.safe_dump(settings))
    return load_manifest(run)


def write_new(path: Path, rows: int = 20) -> Path:
    card = encoded_card(codec={"name": "pixels", "channels": 1}, condition=RUN["condition"])
    latents = NEW_MEAN + 0.3 * torch.randn(rows, 1, 4, 8, generator=torch.Generator().manual_seed(5))
    # Features are compared by direction: the new images have their own.
    features = latents.flatten(1) * torch.tensor([1.0, -1.0]).repeat(16)
    with ShardWriter(path, card) as writer:
        splits = ["val" if i % 10 >= 7 else "train" for i in range(rows)]
        text = [f"new-{i:03d}" for i in range(rows)], ["reef"] * rows, splits
        writer.append(*text, {"latent": latents.half(), "feature": features})
    return path


@pytest.fixture(scope="module")
def founded(tmp_path_factory) -> Path:
    """A run with real clusters, experts, router and ensemble, before any growth."""
    path = write_run(tmp_path_factory.mktemp("founded") / "run")
    shutil.rmtree(path / "clusters")
    cluster(path / "encoded", path / "clusters", 3, fine=24)
    manifest = load_manifest(path)
    for number in range(3):
        train_expert(path, manifest, str(number))
    train_router(path, manifest)
    assemble_run(path, manifest)
    write_new(path.parent / "new")
    return path


@pytest.fixture
def run(founded, tmp_path) -> Path:
    shutil.copytree(founded, tmp_path / "run")
    shutil.copytree(founded.parent / "new", tmp_path / "new")
    return tmp_path / "run"


def points() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 1, 4, 8, generator=torch.Generator().manual_seed(7)), torch.linspace(0, 1, 6)


def test_a_new_cluster_joins_and_nothing_is_retrained(run) -> None:
    old, before = load_router(run / "router"), dict(read_tensors(run / "router", read_card(run / "router", RouterCard)))
    experts = {path: path.read_bytes() for path in (run / "experts").glob("*/*.*")}
    add_cluster(run / "clusters", run.parent / "new")
    manifest = grow_manifest(run, 4, {"cluster": 3, "objective": {"prediction": "flow", "schedule": "linear"}})
    extend_router(run, manifest)
    # All old weights are there, to the bit, and old clusters keep their ratios.
    card = read_card(run / "router", RouterCard)
    after = read_tensors(run / "router", card)
    assert all(torch.equal(after[name], weights) for name, weights in before.items())
    assert (card.clusters, card.lineage[0].clusters) == (4, ((0,), (1,), (2,)))
    x, t = points()
    old_p, new_p = old(x, t), load_router(run / "router")(x, t)
    torch.testing.assert_close(new_p[:, :3].log_softmax(1), old_p, atol=1e-5, rtol=0)
    # The new logit has learnt something.
    latents = Shards(run.parent / "new").read("latent", slice(None)).float()
    t = torch.full((len(latents),), 0.2)
    p = load_router(run / "router")(0.8 * latents + 0.2 * torch.randn_like(latents), t).exp()
    assert p[:, 3].mean() > 0.9
    # Old experts fit without retraining, beside the new one.
    train_expert(run, manifest, "3")
    for number in range(3):
        assert train_expert(run, manifest, str(number), resume=True).is_dir()
    assert {path: path.read_bytes() for path in experts} == experts
    assemble_run(run, manifest)
    ensemble = load_ensemble(run / "ensemble").ensemble
    assert [expert.clusters for expert in ensemble.experts] == [(0,), (1,), (2,), (3,)]
    # `atoll launch` takes the extended router as finished; a new one is trained on all clusters.
    assert train_router(run, manifest, resume=True) == run / "router"
    assert read_card(run / "router", RouterCard).network["grown"] == [None]
    with pytest.raises(AtollError, match="already trained, and extended; add --restart"):
        train_router(run, manifest)
    train_router(run, manifest, restart=True)
    anew = read_card(run / "router", RouterCard)
    assert (anew.clusters, anew.lineage, anew.training.rows) == (4, card.lineage, 42 + 14)
    assemble_run(run, manifest)
    train_monolith(run, manifest)
    assert read_card(run / "monolith", ExpertCard).k == 4


def test_an_expert_of_a_split_cluster_becomes_a_generalist_of_both_parts(run) -> None:
    ensemble = load_ensemble(run / "ensemble", routing="full").ensemble
    (x, t), prompt = points(), build_encoder(RUN["condition"])(["moss"] * 6)
    before = ensemble.velocity(x, t, prompt)
    split_cluster(run / "clusters", 1, [run / "encoded"])
    manifest = grow_manifest(run, 4)
    extend_router(run, manifest)
    assemble_run(run, manifest)
    ensemble = load_ensemble(run / "ensemble", routing="full").ensemble
    assert [expert.clusters for expert in ensemble.experts] == [(0,), (1, 3), (2,)]
    # The parts sum to their parent, so the model is the same until a part has its own expert.
    torch.testing.assert_close(ensemble.velocity(x, t, prompt), before, atol=1e-4, rtol=1e-4)
    # Then the old expert stands in for the other part alone.
    manifest = grow_manifest(run, 4, {"cluster": 3, "objective": {"prediction": "flow", "schedule": "linear"}})
    assert read_card(train_expert(run, manifest, "3"), ExpertCard).k == 4
    assemble_run(run, manifest)
    grown = load_ensemble(run / "ensemble", routing="full").ensemble
    assert [expert.clusters for expert in grown.experts] == [(0,), (1, 3), (2,), (3,)]
    assert not torch.allclose(grown.velocity(x, t, prompt), before, atol=1e-3)


def test_several_steps_are_learnt_at_once(run) -> None:
    old = load_router(run / "router")
    add_cluster(run / "clusters", run.parent / "new")
    split_cluster(run / "clusters", 0, [run / "encoded"])
    extend_router(run, grow_manifest(run, 5))
    card = read_card(run / "router", RouterCard)
    assert card.network["grown"] == [None, 0]
    x, t = points()
    log_p = load_router(run / "router")(x, t)
    parts = torch.cat([torch.logaddexp(log_p[:, 0], log_p[:, 4])[:, None], log_p[:, 1:3]], dim=1)
    torch.testing.assert_close(parts.log_softmax(1), old(x, t), atol=1e-5, rtol=0)


def test_old_clusters_may_be_drawn_by_their_experts(run) -> None:
    # Before the growth: nobody has the images of clusters 0 and 2 here, but their experts.
    synthesize_run(run, load_manifest(run), run.parent / "drawn", images=10, steps=2)
    add_cluster(run / "clusters", run.parent / "new")
    for number in (0, 2):
        shutil.rmtree(run / "clusters" / f"cluster-00{number}")
    manifest = grow_manifest(run, 4)
    with pytest.raises(AtollError, match=r"no latents of cluster 0, 2; .* by --rows"):
        extend_router(run, manifest)
    extend_router(run, manifest, rows=run.parent / "drawn" / "clusters")
    assert read_card(run / "router", RouterCard).clusters == 4


def test_what_did_not_grow_from_the_clusters_is_refused(run) -> None:
    manifest = load_manifest(run)
    with pytest.raises(AtollError, match=r"knows all 3 clusters of .*; nothing to extend"):
        extend_router(run, manifest)
    add_cluster(run / "clusters", run.parent / "new")
    manifest = grow_manifest(run, 4)
    extend_router(run, manifest)
    experts = sorted((run / "experts").glob("[0-9]*"))
    assemble(experts, run / "router", run / "ensemble")
    # An expert of other clusters: refused when it is assembled, and when another's card names it.
    card = read_card(experts[1], ExpertCard)
    tensors = {name: value.clone() for name, value in read_tensors(experts[1], card).items()}
    save_artifact(experts[1], card.model_copy(update={"assignment": "f" * 64}), tensors)
    with pytest.raises(AtollError, match=r"its assignment is f+, that of .*router is .*, which did not grow from it"):
        assemble(experts, run / "router", run / "ensemble")
    listing = json.loads((run / "ensemble" / "ensemble.json").read_text())
    listing["experts"][1]["sha256"] = sha256_file(experts[1] / "card.json")
    write_json(run / "ensemble" / "ensemble.json", listing)
    with pytest.raises(AtollError, match="which did not grow from it; run `atoll assemble` again"):
        load_ensemble(run / "ensemble")
    # So is a router of other clusters.
    router = read_card(run / "router", RouterCard)
    tensors = {name: value.clone() for name, value in read_tensors(run / "router", router).items()}
    save_artifact(run / "router", router.model_copy(update={"assignment": "f" * 64, "lineage": None}), tensors)
    with pytest.raises(AtollError, match="did not grow from its own; train a router anew"):
        extend_router(run, manifest)


def test_an_extension_is_the_same_every_time(run) -> None:
    add_cluster(run / "clusters", run.parent / "new")
    manifest, cards = grow_manifest(run, 4), []
    shutil.copytree(run / "router", run.parent / "router")
    for _ in range(2):
        extend_router(run, manifest)
        cards.append(read_card(run / "router", RouterCard).weights)
        shutil.rmtree(run / "router")
        shutil.copytree(run.parent / "router", run / "router")
    assert cards[0] == cards[1]
