"""Drawn data: what is written, what is refused, and that the later stages train on it."""

import json
import shutil
import sys
import warnings
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import atoll.synthesize.run as stage
from atoll.assemble import assemble_run
from atoll.calibration import Calibration
from atoll.encoders.text import build_encoder
from atoll.ensemble import Expert
from atoll.ensemble.loading import LoadedExpert, load_ensemble
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.objective import Objective
from atoll.storage.artifact import CARD, read_card, sha256_file
from atoll.storage.cards import ClusterShardsCard, ExpertCard, RouterCard
from atoll.storage.shards import Shards
from atoll.synthesize import synthesize_run
from atoll.testing import GaussianMixture
from atoll.train.distil import distil_run
from atoll.train.expert import train_expert
from atoll.train.router import train_router
from tests.conftest import RUN, SHAPE, K
from tests.synthesize.conftest import Stop, content, keep_private, synthesize
from tests.waiting import run_to_end

STUDENT = {"objective": {"prediction": "v", "schedule": "cosine"}}


def test_the_result_is_a_complete_run(private, listed, tmp_path) -> None:
    summary = synthesize(private, tmp_path / "drawn", listed, seed=3)
    assert "3 clusters of 22 latents each, drawn by 3 experts" in summary
    drawn = tmp_path / "drawn"
    assert sorted(entry.name for entry in drawn.iterdir()) == ["atoll.yaml", "clusters", "encoded", "experts"]
    encoded = Shards(drawn / "encoded", verify=True)
    clusters = [Shards(drawn / "clusters" / f"cluster-{k:03d}", verify=True) for k in range(K)]
    assert len(set(encoded.keys)) == len(encoded) == 22 * K
    assert encoded.keys == [key for part in clusters for key in part.keys]
    assert torch.equal(
        encoded.read("latent", slice(None)), torch.cat([part.read("latent", slice(None)) for part in clusters])
    )
    assert encoded.shape("latent") == SHAPE
    about = json.loads((drawn / "clusters" / "clusters.json").read_text())
    expert = read_card(private / "experts" / "0-eps-cosine", ExpertCard).plain()
    for card in (about, *(part.card(ClusterShardsCard).plain() for part in (encoded, *clusters))):
        for key in ("assignment", "codec", "condition", "latent_shape"):
            assert card[key] == expert[key]
    table = pq.read_table(drawn / "clusters" / "assignment.parquet").to_pydict()
    assert dict(zip(table["key"], table["cluster"], strict=True)) == {
        key: part.card(ClusterShardsCard).cluster for part in clusters for key in part.keys
    }
    assert table["split"] == encoded.splits
    for part, counts in zip(clusters, about["counts"], strict=True):
        assert dict(Counter(part.splits)) == counts == {"train": 14, "val": 8}
        assert Counter(part.captions).keys() == {"moss sand", "rain", "rust"}


def test_the_card_records_experts_captions_and_sampling(private, listed, tmp_path) -> None:
    synthesize(private, tmp_path / "drawn", listed, seed=3, guidance=1.5, method="heun")
    source = Shards(tmp_path / "drawn" / "encoded").card(ClusterShardsCard).source
    expected = {"steps": 2, "method": "heun", "guidance_scale": 1.5, "seed": 3, "images": 22, "name": "experts"}
    assert expected.items() <= source.items()
    assert source["captions"]["sha256"] == [sha256_file(listed)] * K
    names = ["0-eps-cosine", "1-flow-linear", "2-x0-linear-beta"]
    assert source["experts"] == [
        {"name": name, "draws": [k], "sha256": sha256_file(private / "experts" / name / CARD)}
        for k, name in enumerate(names)
    ]


def test_defaults_are_the_manifests_without_guidance(private, listed, tmp_path) -> None:
    synthesize_run(private, load_manifest(private), tmp_path / "drawn", images=4, captions=listed)
    source = Shards(tmp_path / "drawn" / "encoded").card(ClusterShardsCard).source
    assert (source["steps"], source["method"], source["seed"], source["guidance_scale"]) == (3, "euler", 0, 1.0)


def test_lists_of_images_to_leave_out_hold_for_captions_and_go_along(trained_run, tmp_path) -> None:
    """Training in the new run reads the list that its atoll.yaml names."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "lists").mkdir()
    cluster = Shards(run / "clusters" / "cluster-000")
    gone = [key for key, caption in zip(cluster.keys, cluster.captions, strict=True) if caption != "moss moss"]
    (run / "lists" / "keys.txt").write_text("\n".join(gone))
    text = yaml.safe_dump({**RUN, "train": {**RUN["train"], "skip": "lists/keys.txt"}})
    (run / "atoll.yaml").write_text(text)
    synthesize(run, tmp_path / "drawn")
    drawn = tmp_path / "drawn"
    assert (drawn / "lists" / "keys.txt").read_bytes() == (run / "lists" / "keys.txt").read_bytes()
    assert set(Shards(drawn / "clusters" / "cluster-000").captions) == {"moss moss"}
    assert len(set(Shards(drawn / "clusters" / "cluster-001").captions)) > 1
    with pytest.warns(UserWarning, match="are in no row"):
        train_router(drawn, load_manifest(drawn))
    # A list that is gone matters only where captions come from the data.
    (run / "lists" / "keys.txt").unlink()
    (tmp_path / "captions.txt").write_text("moss\n")
    synthesize(run, tmp_path / "other", tmp_path / "captions.txt")
    with pytest.raises(AtollError, match=r"keys\.txt: cannot be read"):
        synthesize(run, tmp_path / "third")


def test_router_ensemble_and_student_train_on_it(drawn, private) -> None:
    (drawn / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "student": STUDENT}))
    manifest = load_manifest(drawn)
    router = read_card(train_router(drawn, manifest), RouterCard).plain()
    assert router["assignment"] == read_card(drawn / "experts" / "1-flow-linear", ExpertCard).assignment
    assert len(router["accuracy_at_t"]) == 5
    loaded = load_ensemble(assemble_run(drawn, manifest))
    x, condition = torch.randn(2, *SHAPE), build_encoder(RUN["condition"])(["moss"] * 2)
    assert loaded.ensemble.velocity(x, torch.rand(2), condition).isfinite().all()
    shutil.copytree(drawn / "router", private / "router")
    assemble_run(private, load_manifest(private))  # the router fits the experts' own run too
    student = distil_run(drawn, manifest)
    assert read_card(student, ExpertCard).training.rows == 14 * K
    of_all = manifest.model_copy(update={"student": manifest.student.model_copy(update={"teacher": "ensemble"})})
    distil_run(drawn, of_all, restart=True)
    assert load_ensemble(student).ensemble.velocity(x, torch.rand(2), condition).isfinite().all()


def test_the_router_can_follow_the_experts_paths(drawn) -> None:
    (drawn / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "router": {**RUN["router"], "path": "experts"}}))
    assert len(read_card(train_router(drawn, load_manifest(drawn)), RouterCard).path) == K


def test_each_cluster_is_drawn_by_its_own_expert(private, listed, tmp_path, monkeypatch) -> None:
    mixture = GaussianMixture.random(6, K, SHAPE, seed=2)
    mixture = GaussianMixture(mixture.means.float(), mixture.scales.float(), mixture.weights.float(), mixture.clusters)

    def load(path, device, **options):
        card = read_card(path, ExpertCard)
        objective, (cluster,) = Objective(**card.objective), card.clusters
        identity = Calibration.identity(torch.zeros(SHAPE))
        return LoadedExpert(
            Expert(mixture.network(objective, cluster), objective, (cluster,), identity, path.name), card
        )

    monkeypatch.setattr(stage, "load_expert", load)
    count = 400
    synthesize(private, tmp_path / "drawn", listed, images=count, steps=20, method="dpm++2m", shard_rows=150)
    for k in range(K):
        latents = Shards(tmp_path / "drawn" / "clusters" / f"cluster-{k:03d}").read("latent", slice(None)).float()
        own = mixture.cluster(k)
        mean = (own.weights.reshape(-1, 1, 1, 1) * own.means).sum(0)
        assert ((latents.mean(0) - mean).abs() < 5 * (latents.std(0) / count**0.5)).all()


def test_replicas_draw_together_and_are_stacked_on_their_draws(trained_run, listed, tmp_path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    second = {"cluster": 0, "name": "second", "objective": {"prediction": "v", "schedule": "linear"}}
    (run / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "experts": [*RUN["experts"], second]}))
    train_expert(run, load_manifest(run), "0-second")
    private = keep_private(run, tmp_path / "private")
    synthesize(private, tmp_path / "both", listed)
    source = Shards(tmp_path / "both" / "encoded").card(ClusterShardsCard).source
    assert [(e["name"], e["draws"]) for e in source["experts"]][:2] == [("0-eps-cosine", [0]), ("0-second", [0])]
    manifest = load_manifest(tmp_path / "both")
    train_router(tmp_path / "both", manifest)
    assemble_run(tmp_path / "both", manifest)
    stacked = json.loads((tmp_path / "both" / "ensemble" / "ensemble.json").read_text())["stackings"]["weights"]
    assert len(stacked) == 1

    shutil.rmtree(private / "experts" / "0-second")
    with pytest.warns(UserWarning, match="not trained yet, left out: 0-second"):
        synthesize(private, tmp_path / "one", listed)
    alone, both = (Shards(tmp_path / name / "encoded").read("latent", slice(None)) for name in ("one", "both"))
    assert not torch.equal(alone[:22], both[:22])
    assert torch.equal(alone[22:], both[22:])


def test_captions_of_the_shards_are_used_by_default(trained_run, tmp_path) -> None:
    summary = synthesize(trained_run, tmp_path / "drawn")
    assert "captions shared, images not" in summary
    mine, theirs = (Shards(path / "clusters" / "cluster-001") for path in (tmp_path / "drawn", trained_run))
    assert set(mine.captions) == {
        c for c, split in zip(theirs.captions, theirs.splits, strict=True) if split == "train"
    }


def test_a_run_without_data_can_be_filled_in_place(private, listed) -> None:
    before = content(private)
    synthesize(private, private, listed)
    assert before.items() <= content(private).items()
    assert len(Shards(private / "encoded")) == 22 * K
    train_router(private, load_manifest(private))


def test_other_draws_are_refused_or_replaced(drawn, private, listed, tmp_path) -> None:
    for options, message in (
        ({"images": 23}, "drawn with images 22, requested is 23"),
        ({"guidance": 2.0}, "drawn with guidance_scale 1.0"),
        ({"seed": 1}, "drawn with seed 0, requested is 1; replace it with --force"),
    ):
        with pytest.raises(AtollError, match=message):
            synthesize(private, drawn, listed, **options)
    original = listed.read_text()
    listed.write_text("moss sand\nrain\nrusty\n")
    with pytest.raises(AtollError, match="was drawn with different captions than requested"):
        synthesize(private, drawn, listed)
    listed.write_text(original)
    first = content(drawn)["encoded/shard-00000.safetensors"]
    (drawn / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "student": STUDENT}))
    synthesize(private, drawn, listed, seed=1, force=True)
    assert content(drawn)["encoded/shard-00000.safetensors"] != first
    assert load_manifest(drawn).student is not None  # edits of atoll.yaml stay

    out = tmp_path / "out"
    with pytest.raises(Stop):
        synthesize(private, out, listed, progress=lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(AtollError, match="drawn with steps 2, requested is 3"):
        synthesize(private, out, listed, steps=3, resume=True)
    synthesize(private, out, listed, steps=3, force=True)
    assert Shards(out / "encoded").card(ClusterShardsCard).source["steps"] == 3


def test_other_directories_are_refused_and_unchanged(trained_run, private, listed, tmp_path) -> None:
    data = shutil.copytree(trained_run, tmp_path / "data")
    other = keep_private(trained_run, tmp_path / "other")
    (other / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "name": "other"}))
    begun = keep_private(trained_run, tmp_path / "begun")
    (begun / "synthesized.partial").mkdir()
    (begun / "synthesized.partial" / "letter").write_text("dear")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    for out, message in (
        (data, "encoded: exists and was not made by `atoll synthesize`"),
        (other, "is a run with another atoll.yaml"),
        (begun, "exists and holds no unfinished draws"),
        (tmp_path / "full", "exists and is no former result"),
        (listed, "exists and is no former result"),
    ):
        before = content(out)
        for force in (False, True):
            with pytest.raises(AtollError, match=message):
                synthesize(private, out, listed, force=force)
        assert content(out) == before


def test_another_expert_of_the_same_name_is_not_replaced(trained_run, private, listed, tmp_path) -> None:
    out = keep_private(trained_run, tmp_path / "out")
    card = out / "experts" / "1-flow-linear" / CARD
    card.write_text(card.read_text() + "\n")
    with pytest.raises(AtollError, match="1-flow-linear: is another expert than"):
        synthesize(private, out, listed)


def test_every_cluster_needs_an_expert_of_one_run(private, listed, tmp_path) -> None:
    card = private / "experts" / "2-x0-linear-beta" / CARD
    right = json.loads(card.read_text())
    for change, message in (
        ({"assignment": "0" * 64}, "2-x0-linear-beta: its assignment is 000"),
        ({"latent_shape": [1, 8, 4]}, r"its latent_shape is \[1, 8, 4\]"),
        ({"k": 4}, "its k is 4"),
        ({"clusters": [0]}, "cluster 2 has no expert that could draw it; put it at .*2-x0-linear-beta"),
    ):
        card.write_text(json.dumps({**right, **change}))
        with pytest.raises(AtollError, match=message):
            synthesize(private, tmp_path / "out", listed)
    shutil.rmtree(card.parent)
    with pytest.raises(AtollError, match="cluster 2 has no expert"):
        synthesize(private, tmp_path / "out", listed)
    manifest = yaml.safe_dump({**RUN, "experts": RUN["experts"][:2]})
    (private / "atoll.yaml").write_text(manifest)
    with pytest.raises(AtollError, match=r"cluster 2 has no expert that could draw it; name one in atoll.yaml"):
        synthesize(private, tmp_path / "out", listed)
    (private / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "experts": RUN["experts"][:2], "clusters": {"k": 2}}))
    with pytest.raises(AtollError, match=r"is of 3 clusters, atoll.yaml says clusters.k 2"):
        synthesize(private, tmp_path / "out", listed)
    assert not (tmp_path / "out").exists()


def test_a_generalist_draws_clusters_without_an_expert(trained_run, private, listed, tmp_path) -> None:
    shutil.rmtree(private / "experts" / "2-x0-linear-beta")
    shutil.copytree(trained_run / "monolith", private / "experts" / "2-all")
    everything = {"cluster": 2, "name": "all", "objective": {"prediction": "flow", "schedule": "linear"}}
    (private / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "experts": [*RUN["experts"][:2], everything]}))
    synthesize(private, tmp_path / "out", listed)
    draws = {
        e["name"]: e["draws"] for e in Shards(tmp_path / "out" / "encoded").card(ClusterShardsCard).source["experts"]
    }
    assert draws == {"0-eps-cosine": [0], "1-flow-linear": [1], "2-all": [2]}


def test_an_expert_that_returns_nan_leaves_no_data(private, listed, tmp_path, monkeypatch) -> None:
    load_expert = stage.load_expert

    def load(path, device, **options):
        loaded = load_expert(path, device, **options)
        if path.name == "1-flow-linear":
            for weight in loaded.expert.network.parameters():
                weight.fill_(torch.nan)
        return loaded

    out = tmp_path / "out"
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("error")
        patched.setattr(stage, "load_expert", load)
        with pytest.raises(AtollError, match="1-flow-linear answered with NaN"):
            synthesize(private, out, listed)
    assert not (out / "encoded").exists()
    assert not (out / "clusters").exists()
    assert {file.name[:3] for file in (out / "synthesized.partial").glob("0*")} == {"000"}


def test_a_bad_argument_writes_nothing(private, listed, tmp_path) -> None:
    for options in ({"steps": 0}, {"method": "rk4"}, {"images": 1}, {"captions": tmp_path / "none.txt"}):
        with pytest.raises(AtollError):
            synthesize(private, tmp_path / "out", **{"captions": listed, **options})
    with pytest.raises(AtollError, match="no captions"):
        synthesize(private, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_large_latents_make_small_shards(private, listed, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stage, "_SHARD_BYTES", 5 * 64)  # a latent here has 64 bytes
    synthesize(private, tmp_path / "out", listed)
    assert [len(part) for part in Shards(tmp_path / "out" / "clusters" / "cluster-000").parts()] == [5, 5, 5, 5, 2]


def test_the_command(private, listed, tmp_path) -> None:
    command = [sys.executable, "-m", "atoll", "synthesize", str(tmp_path / "out"), "--run", str(private)]
    options = ["--images", "4", "--captions", str(listed), "--steps", "1", "--seed", "2", "--guidance", "2"]
    done = run_to_end([*command, *options])
    assert done.returncode == 0, done.stderr
    assert "3 clusters of 4 latents each, drawn by 3 experts; captions: one list for all clusters" in done.stdout
    source = Shards(tmp_path / "out" / "encoded").card(ClusterShardsCard).source
    assert (source["seed"], source["guidance_scale"], source["steps"]) == (2, 2.0, 1)
