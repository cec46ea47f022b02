"""Assembly of unlike experts: replicas are weighed on latents that nobody trained on, encoders may differ."""

import json
import shutil

import pytest
import torch
import yaml

from atoll.assemble import assemble, assemble_run
from atoll.encoders.text import build_encoder
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.pipeline import Pipeline
from atoll.sample.sheet import sample_to_file
from atoll.storage.artifact import CARD, read_card, read_tensors, save_artifact
from atoll.storage.cards import ExpertCard
from atoll.train.expert import train_expert
from tests.conftest import RUN, write_run

EXPERTS = [
    {"cluster": 0, "objective": {"prediction": "eps", "schedule": "cosine"}},
    {"cluster": 0, "objective": {"prediction": "flow", "schedule": "linear"}},
    {"cluster": 1, "objective": {"prediction": "flow", "schedule": "linear"}},
]


@pytest.fixture(scope="module")
def replicated(tmp_path_factory, trained_run):
    """A run with two replicas of cluster 0, and a router."""
    run = write_run(tmp_path_factory.mktemp("replicas") / "run")
    settings = {**RUN, "experts": EXPERTS, "train": {**RUN["train"], "calibration_holdout": 0.3}}
    (run / "atoll.yaml").write_text(yaml.safe_dump(settings))
    manifest = load_manifest(run)
    for expert in manifest.experts:
        train_expert(run, manifest, expert.full_name)
    shutil.copytree(trained_run / "router", run / "router")
    assemble_run(run, manifest)
    return run


def changed(path, **values):
    card = read_card(path, ExpertCard).plain()
    tensors = dict(read_tensors(path, read_card(path, ExpertCard)))
    plain = {key: value for key, value in card.items() if key not in ("format", "kind", "weights")}
    save_artifact(path, ExpertCard(**{**plain, **values}), tensors)


def test_replicas_are_stacked_on_rows_that_both_held_back(replicated) -> None:
    card = json.loads((replicated / "ensemble" / "ensemble.json").read_text())
    (weights,) = card["stackings"]["weights"]
    assert weights["names"] == ["0-eps-cosine", "0-flow-linear"]
    ensemble = load_ensemble(replicated / "ensemble").ensemble
    (stacking,) = ensemble.stackings
    torch.testing.assert_close(stacking.weights, torch.tensor(weights["weights"]))
    expert = ensemble.experts[0]
    torch.testing.assert_close(stacking.mean, expert.calibration.mean)
    x, t = torch.randn(3, 1, 4, 8), torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(ensemble.weights(x, t).sum(1), torch.ones(3))
    equal = load_ensemble(replicated / "ensemble", replicas="equal").ensemble
    prompt = build_encoder(RUN["condition"])(["moss"] * 3)
    assert not torch.allclose(ensemble.velocity(x, t, prompt), equal.velocity(x, t, prompt))


def test_a_stacking_that_was_altered_is_refused(replicated, tmp_path) -> None:
    shutil.copytree(replicated, tmp_path / "run")
    file = tmp_path / "run" / "ensemble" / "stackings.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(AtollError, match="is not the one that was assembled"):
        load_ensemble(tmp_path / "run" / "ensemble")


def test_replicas_are_weighed_on_rows_that_the_assembler_names(replicated, tmp_path) -> None:
    shutil.copytree(replicated, tmp_path / "run")
    shutil.move(tmp_path / "run" / "clusters", tmp_path / "probe")
    manifest = load_manifest(tmp_path / "run")
    assemble_run(tmp_path / "run", manifest, rows=tmp_path / "probe")
    own, probed = (load_ensemble(run / "ensemble").ensemble.stackings for run in (replicated, tmp_path / "run"))
    # The val split of these rows, not what training held out of them: other rows, so other weights.
    assert [stacking.names for stacking in probed] == [stacking.names for stacking in own]
    assert not torch.equal(probed[0].weights, own[0].weights)
    # Rows of other clusters are refused.
    shards = tmp_path / "probe" / "cluster-000" / "index.json"
    shards.write_text(
        shards.read_text().replace(read_card(replicated / "experts" / "0-eps-cosine", ExpertCard).assignment, "f" * 64)
    )
    with pytest.raises(AtollError, match=r"was trained on another assignment than .*probe.cluster-000"):
        assemble_run(tmp_path / "run", manifest, rows=tmp_path / "probe")


def test_replicas_without_their_latents_share_alike_with_a_warning(replicated, tmp_path) -> None:
    shutil.copytree(replicated, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "clusters" / "cluster-000")
    manifest = load_manifest(tmp_path / "run")
    with pytest.warns(UserWarning, match="0-eps-cosine, 0-flow-linear are replicas.*will share alike"):
        assemble_run(tmp_path / "run", manifest)
    ensemble = load_ensemble(tmp_path / "run" / "ensemble").ensemble
    weights = ensemble.weights(torch.randn(3, 1, 4, 8), torch.rand(3))
    torch.testing.assert_close(weights[:, 0], weights[:, 1])


def test_replicas_of_another_assignment_are_refused(replicated, tmp_path) -> None:
    shutil.copytree(replicated, tmp_path / "run")
    for name in ("0-eps-cosine", "0-flow-linear", "1-flow-linear"):
        changed(tmp_path / "run" / "experts" / name, assignment="another")
    with pytest.raises(AtollError, match="was trained on another assignment"):
        assemble_run(tmp_path / "run", load_manifest(tmp_path / "run"))


def test_experts_with_encoders_of_their_own_are_sampled_together(trained_run, tmp_path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    experts = [tmp_path / "run" / "experts" / name for name in ("0-eps-cosine", "1-flow-linear", "2-x0-linear-beta")]
    changed(experts[1], condition={**RUN["condition"], "seed": 7})
    assemble(experts, tmp_path / "run" / "router", tmp_path / "run" / "ensemble")
    pipe = Pipeline.from_pretrained(tmp_path / "run" / "ensemble", routing="oracle")
    assert [expert.encoder for expert in pipe.loaded.ensemble.experts] == [0, 1, 0]
    assert len(pipe.loaded.encoder(["moss"])) == 2
    prompts, options = ["moss sand", "rain", "rust"], {"num_inference_steps": 3, "guidance_scale": 2.0}
    drawn = pipe(prompts, seeds=[1, 2, 3], clusters=[0, 1, 2], **options).latents
    alone = [Pipeline.from_pretrained(path) for path in experts]
    for i, one in enumerate(alone):
        expected = one(prompts[i], seeds=[i + 1], **options).latents
        torch.testing.assert_close(drawn[i : i + 1], expected, atol=1e-5, rtol=1e-4)


def test_the_router_keeps_the_encoder_that_it_was_trained_with(trained_run, tmp_path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    experts = [tmp_path / "run" / "experts" / name for name in ("0-eps-cosine", "1-flow-linear", "2-x0-linear-beta")]
    changed(experts[0], condition={**RUN["condition"], "seed": 7})
    assemble(experts, tmp_path / "run" / "router", tmp_path / "run" / "ensemble")
    ensemble = Pipeline.from_pretrained(tmp_path / "run" / "ensemble").loaded.ensemble
    assert [expert.encoder for expert in ensemble.experts] == [0, 1, 1]
    assert ensemble.router_encoder == 1


def test_the_trace_tells_who_was_asked(replicated, tmp_path) -> None:
    trace = tmp_path / "trace.json"
    prompts = ["moss <sand>", "rain"]
    assert sample_to_file(replicated / "ensemble", prompts, tmp_path / "a.png", steps=4, trace=trace) == {}
    told = json.loads(trace.read_text())
    assert told["experts"] == ["0-eps-cosine", "0-flow-linear", "1-flow-linear"]
    assert [line["prompt"] for line in told["prompts"]] == prompts
    for line in told["prompts"]:
        assert line["t"] == pytest.approx([1.0, 0.75, 0.5, 0.25])
        assert all(sum(step) == pytest.approx(1, abs=1e-5) for step in line["weights"])
    page = trace.with_suffix(".html").read_text()
    assert "moss &lt;sand&gt;" in page
    assert page.count("<svg") == 2
    with pytest.raises(AtollError, match=r"expected a file that ends in \.json"):
        sample_to_file(replicated / "ensemble", prompts, tmp_path / "a.png", steps=1, trace=tmp_path / "trace.txt")


def test_an_expert_of_nan_is_told_at_the_end(trained_run, tmp_path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    path = tmp_path / "run" / "experts" / "0-eps-cosine"
    broken = {
        key: torch.full_like(v, torch.nan) if v.is_floating_point() else v
        for key, v in read_tensors(path, read_card(path, ExpertCard)).items()
    }
    broken["calibration.mean"] = torch.zeros(1, 4, 8)
    save_artifact(path, read_card(path, ExpertCard), broken)
    experts = sorted((tmp_path / "run" / "experts").iterdir())
    assemble([e for e in experts if (e / CARD).is_file()], tmp_path / "run" / "router", tmp_path / "run" / "ensemble")
    with pytest.warns(UserWarning, match="0-eps-cosine answered with NaN"):
        dropped = sample_to_file(
            tmp_path / "run" / "ensemble", ["moss"] * 3, tmp_path / "a.png", steps=2, routing="full"
        )
    assert list(dropped) == ["0-eps-cosine"]


def test_clusters_must_be_one_per_prompt(trained_run) -> None:
    pipe = Pipeline.from_pretrained(trained_run / "ensemble", routing="oracle")
    with pytest.raises(AtollError, match="2 clusters for 1 prompts; expected one cluster per prompt"):
        pipe("moss", clusters=[0, 1])


def test_a_prompt_that_is_cut_is_told(trained_run) -> None:
    pipe = Pipeline.from_pretrained(trained_run / "ensemble")
    with pytest.warns(UserWarning, match=r"'moss sand rain rust fern' is too long: 'rust fern' is cut off") as warned:
        pipe(["moss", "moss sand rain rust fern"], num_inference_steps=1)
    assert warned[0].filename == __file__


def test_a_router_of_another_number_of_clusters_is_refused(trained_run, tmp_path) -> None:
    shutil.copytree(trained_run / "experts" / "1-flow-linear", tmp_path / "expert")
    changed(tmp_path / "expert", k=8)
    with pytest.raises(AtollError, match=r"router: knows 3 clusters, .*expert is of 8"):
        assemble([tmp_path / "expert"], trained_run / "router", tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()


def test_experts_of_other_levels_than_the_manifests_are_refused(replicated, tmp_path):
    run = shutil.copytree(replicated, tmp_path / "run")
    before = (run / "ensemble" / "ensemble.json").read_bytes()
    fine, coarse = ({"prediction": "flow", "schedule": "linear", "levels": levels} for levels in ([0, 0.2], [0.2, 1]))
    experts = [EXPERTS[0], EXPERTS[1], {"cluster": 1, "objective": coarse}]
    (run / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "experts": experts, "generalist": {"objective": fine}}))
    with (
        pytest.warns(match="not trained yet, left out: generalist"),
        pytest.raises(AtollError, match=r"1-flow-linear: trained for all levels, and atoll.yaml says .* 0.2 to 1"),
    ):
        assemble_run(run, load_manifest(run))
    assert (run / "ensemble" / "ensemble.json").read_bytes() == before
