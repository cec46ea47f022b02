"""Low-rank updates of experts, from training to the ensemble: what is written, loaded, merged and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.assemble import assemble_run
from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.ensemble.lora import LoraChoice
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.artifact import CARD, WEIGHTS, read_card, sha256_file
from atoll.storage.cards import ExpertCard, LoraCard
from atoll.train.expert import train_expert
from atoll.train.lora import merge_expert, train_lora
from tests.train.test_workers import call

NAME = "1-flow-linear"
EXPERT, LORA = f"experts/{NAME}", f"loras/{NAME}"
SECTION = "\nlora: {alpha: 8, targets: [attention.qkv, mlp.0], train: {steps: 6, lr: 0.02}}\n"


@pytest.fixture(scope="module")
def tuned(trained_run, tmp_path_factory) -> Path:
    """A run with an update of rank 4 of its second expert; not to be changed by a test."""
    run = shutil.copytree(trained_run, tmp_path_factory.mktemp("lora") / "run")
    # Eight steps leave the gates almost closed, so that no update of a block could be seen.
    longer = "- cluster: 1\n  train: {steps: 80, lr: 0.02, warmup: 5, ema: 0.9}\n"
    text = (run / "atoll.yaml").read_text().replace("- cluster: 1\n", longer)
    (run / "atoll.yaml").write_text(text + SECTION)
    train_expert(run, load_manifest(run), "1", restart=True)
    shutil.copytree(run / "experts", run / "before")
    assemble_run(run, load_manifest(run))
    train_lora(run, load_manifest(run), "1", 4)
    return run


@pytest.fixture
def copy(tuned, tmp_path) -> Path:
    return shutil.copytree(tuned, tmp_path / "tuned")


def velocities(path: Path, **options: object) -> torch.Tensor:
    """The velocities of an ensemble, or of one expert alone, of three prompts."""
    loaded = load_ensemble(path, **options)
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 1, 4, 8, generator=g), torch.tensor([0.2, 0.5, 0.9])
    condition = loaded.encoder(["moss", "sand rain", ""])
    return loaded.ensemble.velocity(x, t, condition, 2.0)


def test_the_artifact_holds_the_update_alone_and_names_its_base(tuned) -> None:
    card = read_card(tuned / LORA, LoraCard)
    base = read_card(tuned / EXPERT, ExpertCard)
    assert card.lora.plain() == {"rank": 4, "alpha": 8.0, "targets": ["attention.qkv", "mlp.0"]}
    assert (card.base.name, card.base.sha256) == (NAME, base.weights_sha256)
    assert card.training.steps == 6
    assert card.calibration is not None
    assert card.calibration != base.calibration
    tensors = load_file(tuned / LORA / WEIGHTS)
    assert {name for name in tensors if name.startswith("network.")} == {
        f"network.blocks.0.{layer}.lora_{part}.weight" for layer in ("attention.qkv", "mlp.0") for part in "AB"
    }
    assert all(value.abs().max() > 0 for name, value in tensors.items() if "lora_B" in name)
    for file in (tuned / "before").rglob("*.safetensors"):  # the expert and its training are untouched
        assert file.read_bytes() == (tuned / "experts" / file.relative_to(tuned / "before")).read_bytes()


class Stop(Exception):
    pass


def stop_at(step: int):
    def progress(line):
        if line["step"] >= step:
            raise Stop

    return progress


def test_resume_is_bit_exact_after_a_kill(copy, tuned) -> None:
    shutil.rmtree(copy / "loras")
    with pytest.raises(Stop):
        train_lora(copy, load_manifest(copy), "1", 4, progress=stop_at(4))
    state = load_file(copy / "loras/.train-1-flow-linear/checkpoint.safetensors")
    assert all("lora_" in name for name in state)  # a checkpoint as small as the update
    with pytest.raises(AtollError, match="other settings"):
        train_lora(copy, load_manifest(copy), "1", 5, resume=True)
    train_lora(copy, load_manifest(copy), "1", 4, resume=True)
    mine, other = (load_file(run / LORA / WEIGHTS) for run in (copy, tuned))
    assert all(torch.equal(mine[name], other[name]) for name in other)
    before = (copy / LORA / WEIGHTS).stat().st_mtime_ns
    train_lora(copy, load_manifest(copy), "1", 4, resume=True)
    assert (copy / LORA / WEIGHTS).stat().st_mtime_ns == before


def test_the_loss_falls_from_that_of_the_base(copy) -> None:
    """With a long enough training, an update of low rank learns what its base has not learned yet."""
    text = (copy / "atoll.yaml").read_text().replace("steps: 6, lr: 0.02", "steps: 150, lr: 0.01, warmup: 0, ema: 0.5")
    (copy / "atoll.yaml").write_text(text)
    train_lora(copy, load_manifest(copy), "1", 4, restart=True)
    base, update = (read_card(copy / EXPERT, ExpertCard), read_card(copy / LORA, LoraCard))
    losses = [sum(card.training.validation.values()) for card in (base, update)]
    assert losses[1] < 0.99 * losses[0]


@pytest.mark.parametrize("options", [{}, {"memory_budget": "1GB"}, {"weights": "fp32"}, {"memory_budget": "100KB"}])
def test_an_ensemble_with_the_update_is_one_with_the_merged_expert(copy, tmp_path, options) -> None:
    plain = velocities(copy / "ensemble", **options)
    assemble_run(copy, load_manifest(copy), loras=[LoraChoice(copy / LORA)])
    tuned = velocities(copy / "ensemble", **options)
    assert (tuned - plain).abs().max() > 1e-4
    merge_expert(copy / EXPERT, copy / LORA, tmp_path / "merged")
    shutil.rmtree(copy / EXPERT)
    shutil.move(tmp_path / "merged", copy / EXPERT)
    assemble_run(copy, load_manifest(copy))
    assert torch.equal(velocities(copy / "ensemble", **options), tuned)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_the_scale_of_the_entry_counts(copy, scale) -> None:
    entry = LoraChoice(copy / LORA, scale)
    base, one = (load_expert(copy / EXPERT, lora=lora).expert for lora in (None, LoraChoice(copy / LORA)))
    with pytest.warns(UserWarning, match="no calibration, which was measured at 1") if scale else warns_nothing():
        some = load_expert(copy / EXPERT, lora=entry).expert
    name = "blocks.0.attention.qkv.weight"
    weights = [expert.network.state_dict()[name] for expert in (base, one, some)]
    torch.testing.assert_close(weights[2] - weights[0], scale * (weights[1] - weights[0]), rtol=1e-4, atol=1e-6)
    if scale:
        assert some.calibration is None
    else:
        assert torch.equal(some.calibration.slope, base.calibration.slope)


def warns_nothing():
    import warnings

    return warnings.catch_warnings(action="error")


def test_an_update_of_another_expert_is_refused_with_both_hashes(copy, tmp_path) -> None:
    text = (copy / "atoll.yaml").read_text().replace("seed: 0", "seed: 1").replace("name: tiny", "name: tiny\nseed: 7")
    (copy / "atoll.yaml").write_text(text)
    wanted = read_card(copy / LORA, LoraCard).base.sha256[:12]
    train_expert(copy, load_manifest(copy), "1", restart=True)
    given = read_card(copy / EXPERT, ExpertCard).weights_sha256[:12]
    message = rf"update of {NAME} with sha256 {wanted}\.\.\., .* has {given}\.\.\."
    with pytest.raises(AtollError, match=message):
        merge_expert(copy / EXPERT, copy / LORA, tmp_path / "out")
    with pytest.raises(AtollError, match=message):
        assemble_run(copy, load_manifest(copy), loras=[LoraChoice(copy / LORA)])
    with pytest.raises(AtollError, match=message):
        load_expert(copy / EXPERT, lora=LoraChoice(copy / LORA))
    assert not (tmp_path / "out").exists()


def test_a_changed_update_is_noticed_when_the_ensemble_loads(copy) -> None:
    assemble_run(copy, load_manifest(copy), loras=[LoraChoice(copy / LORA)])
    tensors = load_file(copy / LORA / WEIGHTS)
    save_file({name: value + 1 for name, value in tensors.items()}, copy / LORA / WEIGHTS)
    with pytest.raises(AtollError, match="altered or damaged"):
        load_ensemble(copy / "ensemble")
    card = json.loads((copy / LORA / CARD).read_text())
    card["weights"]["sha256"] = sha256_file(copy / LORA / WEIGHTS)
    (copy / LORA / CARD).write_text(json.dumps(card))
    with pytest.raises(AtollError, match="is not the one that was assembled"):
        load_ensemble(copy / "ensemble")


def test_an_update_outside_of_the_ensemble_s_run_needs_trust(copy, tmp_path) -> None:
    shutil.move(copy / "loras", tmp_path / "elsewhere")
    assemble_run(copy, load_manifest(copy), loras=[LoraChoice(tmp_path / "elsewhere" / NAME)])
    with pytest.raises(AtollError, match="leads out of"):
        load_ensemble(copy / "ensemble")
    load_ensemble(copy / "ensemble", trust_paths=True)


def changed(run: Path, old: str, new: str):
    text = (run / "atoll.yaml").read_text()
    assert old in text
    (run / "atoll.yaml").write_text(text.replace(old, new, 1))
    return load_manifest(run)


def test_a_saved_pipeline_takes_the_update_along(copy, tmp_path) -> None:
    pytest.importorskip("diffusers")
    from atoll.diffusers import AtollPipeline

    assemble_run(copy, load_manifest(copy), loras=[LoraChoice(copy / LORA, 0.0)])
    AtollPipeline.from_pretrained(copy / "ensemble").save_pretrained(tmp_path / "saved")
    entry = json.loads((tmp_path / "saved/ensemble/ensemble.json").read_text())["experts"][1]
    assert entry["lora"]["url"] == "loras/001"
    saved = tmp_path / "saved" / "ensemble" / entry["lora"]["url"]
    assert sha256_file(saved / WEIGHTS) == sha256_file(copy / LORA / WEIGHTS)
    assert torch.equal(velocities(tmp_path / "saved" / "ensemble"), velocities(copy / "ensemble"))


def test_what_cannot_be_updated_is_refused_in_a_line(copy, run) -> None:
    cases = {
        "not trained yet, so there is nothing to update": (run, load_manifest(run), 4),
        "rank 16, but blocks.0.attention.qkv maps 16 to 48": (copy, load_manifest(copy), 16),
        "no layer ends in 'to_q'": (copy, changed(copy, "attention.qkv", "to_q"), 4),
    }
    shutil.rmtree(copy / "loras")
    for message, (where, manifest, rank) in cases.items():
        with pytest.raises(AtollError, match=message) as error:
            train_lora(where, manifest, "1", rank)
        assert "\n" not in str(error.value)
        assert not (where / LORA).exists()


def test_an_update_keeps_its_base_s_objective_and_latents(copy) -> None:
    changed(copy, "- cluster: 1\n", "- cluster: 1\n  name: flow-linear\n")
    with pytest.raises(AtollError, match=r"its objective has prediction flow, atoll\.yaml's 1-flow-linear v"):
        train_lora(copy, changed(copy, "prediction: flow", "prediction: v"), "1", 4, restart=True)
    # Latents that another codec wrote.
    file = copy / EXPERT / CARD
    card = json.loads(file.read_text())
    card["codec"]["scale"] = 2.0
    file.write_text(json.dumps(card))
    with pytest.raises(AtollError, match=r"has codec .*'scale': 2\.0.*; a low-rank update keeps its base's"):
        train_lora(copy, changed(copy, "prediction: v", "prediction: flow"), "1", 4, restart=True)


def test_an_update_starts_from_an_expert_of_another_run(copy, run, trained_run) -> None:
    shutil.copytree(trained_run / EXPERT, run / "foreign")
    (run / "atoll.yaml").write_text((run / "atoll.yaml").read_text() + "\nlora: {train: {init: foreign, steps: 4}}\n")
    path = train_lora(run, load_manifest(run), "1", 4)
    card = read_card(path, LoraCard)
    assert card.base.sha256 == read_card(trained_run / EXPERT, ExpertCard).weights_sha256
    assert len([name for name in load_file(path / WEIGHTS) if "lora_A" in name]) == 7  # every layer of the block
    out = merge_expert(run / "foreign", path, run / EXPERT)
    merged = read_card(out, ExpertCard)
    assert (merged.merged.base.name, merged.merged.scale) == (NAME, 1.0)
    assert merged.calibration == card.calibration
    load_expert(out)


def test_the_commands(copy, atoll, monkeypatch) -> None:
    monkeypatch.chdir(copy)
    code, out, err = atoll("train", "expert", "1", "--run", copy, "--lora", "3", "--restart", "--quiet")
    assert (code, err) == (0, "")
    assert "loras/1-flow-linear written" in out
    assert atoll("assemble", "--run", copy, "--lora", f"{LORA}=0.5")[0] == 0
    entry = json.loads((copy / "ensemble" / "ensemble.json").read_text())["experts"][1]
    assert (entry["lora"]["url"], entry["lora"]["scale"]) == (f"../{LORA}", 0.5)
    code, out, _ = atoll("merge", copy / EXPERT, copy / LORA, "-o", copy / "new", "--scale", "0.5")
    assert (code, "no calibration: `atoll calibrate` it" in out) == (0, True)
    for arguments, message in (
        (("assemble", "--run", copy, "--lora", f"{LORA}=much"), "'much' is no number"),
        (("assemble", "--run", copy, "--lora", "nowhere"), "no such update"),
        (("assemble", "--run", copy, "--lora", f"{LORA}=1000"), "scale: got 1000.0"),
        (("merge", copy / EXPERT, copy / EXPERT, "-o", copy / "other"), "kind 'expert'; expected 'lora'"),
        (("merge", copy / EXPERT, copy / LORA, "-o", copy / "new"), "exists already"),
        (("sample", copy / LORA, "moss", "-o", copy / "a.png"), "`atoll merge` makes an expert of it"),
        (("calibrate", copy / LORA), "`atoll merge` makes an expert of it"),
    ):
        code, _, err = atoll(*arguments)
        assert code == 2, arguments
        assert message in " ".join(err.split()), err
        assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_processes_train_an_update_like_one(copy, tuned, sharding) -> None:
    changed(copy, "  steps: 8", f"  sharding: {sharding}\n  steps: 8")
    done = call(copy, "--nproc", 2, "--lora", 4, "--restart", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    mine, other = (load_file(run / LORA / WEIGHTS) for run in (copy, tuned))
    for name in other:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-5)
