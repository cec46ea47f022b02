"""The generalist: an expert of all clusters, of some noise levels, from its training to the ensemble."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from atoll.assemble import assemble_run
from atoll.collective.gate.contents import check_contents
from atoll.collective.open import run_files
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.evaluate.diagnostics.run import diagnose_run
from atoll.evaluate.sweep import choose_experts
from atoll.evaluate.variants import variants_of
from atoll.launch.job import jobs_of
from atoll.manifest import EvaluateSettings, Manifest, load_manifest
from atoll.schedule import PATH
from atoll.storage.artifact import load_clusters, read_card
from atoll.storage.cards import ClusterShardsCard, ExpertCard
from atoll.storage.layout import RunLayout, TrainingLayout
from atoll.storage.shards import Shards
from atoll.synthesize import synthesize_run
from atoll.train.expert import train_expert, train_generalist
from atoll.train.lora import train_lora
from tests.conftest import RUN, write_run

FINE = {"prediction": "flow", "schedule": "linear", "levels": [0, 0.2]}
COARSE = {"prediction": "flow", "schedule": "linear", "levels": [0.2, 1]}
SHORT = {"steps": 3, "batch": 9, "validate_every": 3}
GENERALIST = {"objective": FINE, "train": SHORT}


def write(run: Path, **sections) -> Manifest:
    """Write an atoll.yaml of one coarse expert per cluster and a fine generalist."""
    experts = [{"cluster": k, "objective": COARSE, "train": SHORT} for k in range(3)]
    content = {**RUN, "experts": experts, "generalist": GENERALIST, **sections}
    (run / "atoll.yaml").write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return load_manifest(run)


@pytest.fixture(scope="module")
def split(tmp_path_factory, trained_run) -> Path:
    """A run with trained coarse experts and a fine generalist, assembled with a router; not to be changed by a test."""
    run = write_run(tmp_path_factory.mktemp("split") / "run")
    manifest = write(run)
    train_generalist(run, manifest)
    for k in range(3):
        train_expert(run, manifest, str(k))
    shutil.copytree(trained_run / "router", run / "router")
    assemble_run(run, manifest)
    return run


def losses(path: Path) -> dict[str, float]:
    lines = TrainingLayout.of(path).metrics.read_text().splitlines()
    return next(line["val"] for line in map(json.loads, lines) if "val" in line)


def test_it_is_an_expert_of_all_clusters_trained_and_measured_at_its_levels(split) -> None:
    card = read_card(split / "generalist", ExpertCard)
    assert (card.name, card.clusters, card.training.seed) == ("generalist", (0, 1, 2), 995)
    assert card.objective["levels"] == [0.0, 0.2]
    # Nodes and levels of the window, which ends at 0.25.
    times = PATH.time_at(torch.tensor(card.calibration.log_snr, dtype=torch.float64))
    assert [round(float(t), 4) for t in times] == [0.2, 0.12, 0.06, 0.02]
    assert losses(split / "generalist").keys() == {"+4", "+6"}
    # The experts' begins at 0.15.
    assert losses(split / "experts/0-flow-linear").keys() == {"-6", "-4", "-2", "+0", "+2"}


def test_the_ensemble_evaluates_it_alone_at_its_levels(split) -> None:
    ensemble = load_ensemble(split / "ensemble").ensemble
    assert [e.name for e in ensemble.experts] == [*(f"{k}-flow-linear" for k in range(3)), "generalist"]
    t = torch.tensor([0.05, 0.6])
    shape = read_card(split / "generalist", ExpertCard).latent_shape
    routed = ensemble.route(ensemble.query(torch.randn(2, *shape), t))
    assert routed.rows[3].tolist() == [0]
    torch.testing.assert_close(routed.weights.sum(1), torch.ones(2))
    assert float(routed.weights[1, 3]) == 0


def test_without_it_the_ensemble_is_refused_and_nothing_is_written(split, tmp_path) -> None:
    run = Path(shutil.copytree(split, tmp_path / "run"))
    before = RunLayout(run).ensemble_card.read_bytes()
    with pytest.raises(
        AtollError, match=r"no network denoises cluster 0 at the levels 0 to 0.2; .* add a `generalist:`"
    ):
        write(run, generalist=None)
    # Cards may say otherwise than atoll.yaml.
    without = load_manifest(split).model_copy(update={"generalist": None})
    with pytest.raises(AtollError, match=r"no expert of cluster 0, 1, 2 at the levels 0 to 0.2; add one"):
        assemble_run(run, without)
    assert RunLayout(run).ensemble_card.read_bytes() == before
    with pytest.raises(AtollError, match=r"atoll.yaml names no generalist; add a `generalist:` section"):
        train_generalist(run, without)
    # An expert of some levels is no model by itself.
    with pytest.raises(AtollError, match=r"no expert of cluster 0 at the levels 0 to 0.2"):
        load_ensemble(run / "experts/0-flow-linear")


def test_a_choice_of_experts_keeps_it(split) -> None:
    ensemble = load_ensemble(split / "ensemble").ensemble
    chosen = choose_experts(ensemble, {"all": "flow-linear"}, "all")
    assert [expert.name for expert in chosen.experts][-1] == "generalist"


def test_what_evaluates_experts_alone_leaves_it_out_or_is_refused(split, tmp_path) -> None:
    loaded = load_ensemble(split / "ensemble")
    variants, groups, _ = variants_of(loaded.ensemble, {})
    assert groups["expert"] == ()
    assert "full" in {variant.name for variant in variants}
    shards = [Shards(RunLayout(split).cluster(0))]
    options = {"encoder": loaded.encoder, "codec": loaded.codec, "space": None, "settings": EvaluateSettings()}
    with pytest.raises(
        AtollError, match=r"every level, and 0-flow-linear, .*generalist are of some levels only; set it"
    ):
        diagnose_run(loaded.ensemble, clusters=shards, **options)
    manifest = load_manifest(split)
    with pytest.raises(AtollError, match="2-flow-linear: of some levels only; expected experts that draw"):
        synthesize_run(split, manifest, tmp_path / "drawn", images=2)
    assert not (tmp_path / "drawn").exists()


def test_a_collective_has_no_experts_of_some_levels(split) -> None:
    manifest = load_manifest(split)
    with pytest.raises(AtollError, match="generalist: a collective has experts of one cluster each"):
        run_files(split, manifest)
    with pytest.raises(AtollError, match=r"0-flow-linear, .*: objective.levels: a collective checks experts at all"):
        run_files(split, manifest.model_copy(update={"generalist": None}))
    layout = RunLayout(split)
    check, loaded = check_contents(
        layout.expert("0-flow-linear"),
        Shards(layout.cluster(0)).card(ClusterShardsCard),
        load_clusters(layout.clusters_card).descent,
        name="0-flow-linear",
        clusters=(0,),
        now=(0,),
        known={},
    )
    assert loaded is None
    assert "is of the levels [0.2, 1.0] only; train it without levels" in str(check)


def test_an_update_keeps_the_levels_of_its_base(split, tmp_path) -> None:
    run = Path(shutil.copytree(split, tmp_path / "run"))
    other = [{"cluster": 0, "objective": {**COARSE, "levels": [0.3, 1]}, "train": SHORT}]
    with pytest.raises(AtollError, match=r"its objective has levels \[0.2, 1.0\], .* \[0.3, 1.0\]"):
        train_lora(run, write(run, experts=other, generalist={"objective": {**FINE, "levels": [0, 0.3]}}), "0", 2)


def test_it_starts_from_the_common_model_as_experts_do(run) -> None:
    common = {"objective": {"prediction": "flow", "schedule": "linear"}, "train": SHORT}
    manifest = write(run, common=common, train={**RUN["train"], "init": "common"})
    assert manifest.generalist is not None
    assert manifest.starts_from_common(manifest.generalist)
    after = {job.name: job.after for job in jobs_of(run, manifest)}
    assert (after["generalist"], after["0-flow-linear"], after["router"]) == ("common", "common", "")
    # Unless it opts out.
    manifest = write(run, common=common, generalist={**GENERALIST, "train": {"init": None}}, train={"init": "common"})
    assert {job.name: job.after for job in jobs_of(run, manifest)}["generalist"] == ""
    # Like all parts it skips rows, and its patch divides the sizes.
    manifest = write(run, generalist={**GENERALIST, "network": {"patch": 4}}).skipping("keys.txt")
    assert manifest.train_of(manifest.generalist).skip == "keys.txt"
    assert manifest.size_step(1) == 4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"generalist": {**GENERALIST, "train": {"step": 5}}}, "step"),
        ({"generalist": {**GENERALIST, "network": {"widht": 5}}}, "widht"),
        ({"generalist": {"train": SHORT}}, "generalist.objective: Field required"),
        (
            {"generalist": {**GENERALIST, "train": {"init": "common"}}},
            "generalist: train.init: common, but there is no",
        ),
        ({"generalist": {**GENERALIST, "train": {"sample_every": 2}}}, "generalist: train.sample_every with objective"),
    ],
)
def test_what_cannot_be_is_refused_with_the_file(run, sections, message) -> None:
    with pytest.raises(AtollError, match=message) as error:
        write(run, **sections)
    assert "\n" not in str(error.value)


def test_the_command(run, atoll) -> None:
    write(run)
    code, out, _ = atoll("train", "generalist", "-r", run, "--quiet")
    assert (code, out) == (0, f"{run}/generalist written\n")
