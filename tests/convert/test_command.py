"""`atoll convert` as a user meets it: for itself, or for an expert of a run."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from atoll.assemble import assemble
from atoll.convert import convert
from atoll.convert.arguments import arguments_of_run, frozen_network, objective_of, size_of
from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.errors import AtollError
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from tests.convert.conftest import random_weights

FLAGS = ("--heads", "4", "--condition", "hash,dim=10,length=4")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.save(random_weights(channels=3), tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


def test_flags_say_what_it_becomes(atoll, checkpoint) -> None:
    code, text, error = atoll(
        "convert", checkpoint, "-o", "e", *FLAGS, "--objective", "flow", "--modulation", "per-block", "--cluster", 2,
        "--of", 5, "--codec", "pixels,channels=3", "--name", "moss", "--size", "8x12",
    )  # fmt: skip
    assert code == 0, error
    assert text == "e written: from dit, flow on linear, per-block (exact)\n"
    card = read_card(Path("e"), ExpertCard).plain()
    assert (card["name"], card["clusters"], card["k"], card["latent_shape"]) == ("moss", [2], 5, [3, 8, 12])
    assert card["objective"]["schedule"] == {"name": "linear"}
    assert card["condition"] == {"name": "hash", "dim": 10, "length": 4, "seed": 0}
    assert card["network"]["modulation"] == "per-block"


def test_without_an_objective_it_is_the_originals(atoll, checkpoint) -> None:
    code, text, _ = atoll("convert", checkpoint, "-o", "e", *FLAGS)
    assert code == 0
    assert "eps on linear-beta, fit (off by " in text
    assert read_card(Path("e"), ExpertCard).objective["prediction"] == "eps"
    assert "reinit (new, to be trained)" in atoll("convert", checkpoint, "-o", "f", *FLAGS, "--modulation", "reinit")[1]


def test_for_an_expert_of_a_run(atoll, dit_of_the_run, trained_run, tmp_path) -> None:
    """It says of itself what the trained experts say, so it can stand in their ensemble."""
    torch.save(dit_of_the_run, tmp_path / "dit.pt")
    code, _, error = atoll("convert", "dit.pt", "-o", "e", "--run", trained_run, "--expert", "1")
    assert code == 0, error
    card, trained = (read_card(p, ExpertCard).plain() for p in (Path("e"), trained_run / "experts" / "1-flow-linear"))
    same = ("name", "clusters", "k", "objective", "codec", "condition", "latent_shape", "assignment")
    assert {key: card[key] for key in same} == {key: trained[key] for key in same}
    assert card["network"]["pooled_dim"] == trained["network"]["pooled_dim"] == 8
    assert card["network"]["heads"] == 2  # which no tensor tells
    ensemble = assemble(
        [trained_run / "experts" / "0-eps-cosine", tmp_path / "e", trained_run / "experts" / "2-x0-linear-beta"],
        trained_run / "router",
        tmp_path / "ensemble",
    )
    found = load_ensemble(ensemble, trust_paths=True)
    x, t = torch.randn(3, 1, 4, 8), torch.tensor([0.2, 0.5, 0.9])
    assert found.ensemble.velocity(x, t, found.encoder(["", "moss", "rain"])).isfinite().all()


@pytest.mark.parametrize("modulation", ["single", "per-block"])
def test_training_starts_from_it(atoll, dit_of_the_run, run, tmp_path, modulation) -> None:
    manifest = yaml.safe_load((run / "atoll.yaml").read_text())
    manifest["network"]["modulation"] = modulation
    (run / "atoll.yaml").write_text(yaml.safe_dump(manifest))
    torch.save(dit_of_the_run, tmp_path / "dit.pt")
    code, text, error = atoll("convert", "dit.pt", "-o", run / "start", "--run", run, "--expert", "1-flow-linear")
    assert code == 0, error
    assert ("per-block (exact)" in text) == (modulation == "per-block")
    manifest["experts"][1]["train"] = {"init": "start", "steps": 2, "lr": 1e-9}
    (run / "atoll.yaml").write_text(yaml.safe_dump(manifest))
    code, _, error = atoll("train", "expert", "1", "--run", run)
    assert code == 0, error
    start, trained = (
        load_expert(p).expert.network.state_dict() for p in (run / "start", run / "experts" / "1-flow-linear")
    )
    assert all(torch.allclose(start[name], trained[name], atol=1e-6) for name in start)


def test_a_sit_for_a_run_needs_the_runs_objective_to_read_its_times(atoll, dit_of_the_run, run, tmp_path) -> None:
    args = argparse.Namespace(path_type="Linear", prediction="velocity")
    torch.save({"ema": dit_of_the_run, "args": args}, tmp_path / "sit.pt")
    command = ("convert", "sit.pt", "-o", run / "start", "--run", run, "--expert", "1-flow-linear")
    code, _, error = atoll(*command)
    assert code == 2
    assert "time_scale: got 999.0; a 'sit' reads time as 0..1: set time_scale: 1" in error
    manifest = yaml.safe_load((run / "atoll.yaml").read_text())
    manifest["experts"][1]["objective"]["time_scale"] = 1
    (run / "atoll.yaml").write_text(yaml.safe_dump(manifest))
    code, text, error = atoll(*command)
    assert (code, error) == (0, "")
    assert "from sit (ema), flow on linear" in text
    manifest["experts"][1]["train"] = {"init": "start", "steps": 2, "lr": 1e-9}
    (run / "atoll.yaml").write_text(yaml.safe_dump(manifest))
    assert atoll("train", "expert", "1", "--run", run)[0] == 0
    assert read_card(run / "experts" / "1-flow-linear", ExpertCard).plain()["objective"]["time_scale"] == 1


def test_the_manifest_alone_tells_as_much(run) -> None:
    whole = arguments_of_run(run, "1")
    shutil.rmtree(run / "clusters")
    alone = arguments_of_run(run, "1-flow-linear")
    differ = {key for key in whole if whole[key] != alone[key]}
    assert differ == {"assignment", "size", "codec", "trust"}  # its shards' card tells the codec in short
    assert (alone["network"]["channels"], alone["size"], alone["assignment"]) == (1, (16, 16), None)
    manifest = yaml.safe_load((run / "atoll.yaml").read_text())
    manifest["network"]["pooled"] = False
    (run / "atoll.yaml").write_text(yaml.safe_dump(manifest))
    assert arguments_of_run(run, "1")["pooled"] is False


def test_the_card_of_a_runs_shards_reaches_no_hub_and_no_path(atoll, run, checkpoint, tmp_path, monkeypatch) -> None:
    calls: list = []

    def download(repository: str, *, local_files_only: bool = False, **_: object) -> str:
        calls.append(local_files_only)
        raise FileNotFoundError("not in the cache")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)
    index = run / "clusters" / "cluster-001" / "index.json"
    (tmp_path / "here").mkdir()
    for weights in ("owner/name", str(tmp_path / "here")):
        content = json.loads(index.read_text())
        content["card"]["codec"] = {"name": "kl", "weights": weights, "sha256": "0" * 64, "shift": 0.0, "scale": 1.0}
        index.write_text(json.dumps(content))
        code, _, error = atoll("convert", checkpoint, "-o", "start", "--run", run, "--expert", "1", "--heads", "4")
        assert code == 2
        assert f"weights '{weights}': not found" in error
    assert all(calls)
    assert calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "4"], "DiT knows no text: say which condition encoder"),
        (["--condition", "hash", "--heads", "5"], "width 24, heads 5"),
        (["--condition", "hash"], "say how many"),
        ([*FLAGS, "--modulation", "both"], "unknown modulation 'both'"),
        ([*FLAGS, "--kind", "unet"], "unknown kind 'unet'"),
        ([*FLAGS, "--objective", "noise"], "unknown prediction 'noise'"),
        ([*FLAGS, "--schedule", "quick"], "unknown schedule 'quick'"),
        ([*FLAGS, "--condition", "hash,dim"], "--condition 'hash,dim': expected a name"),
        ([*FLAGS, "--condition", "hash,width=3"], "width"),
        ([*FLAGS, "--codec", "vq"], "vq"),
        ([*FLAGS, "--codec", "pixels,channels=4"], "codec 'pixels': channels: "),
        ([*FLAGS, "--codec", "pixels,channels=1"], "'pixels' has latents of 1 channels, the network's have 3"),
        ([*FLAGS, "--classes", "9"], "7 class embeddings, 9 classes; expected 6 and a null class, or 7 without"),
        ([*FLAGS, "--kind", "sit", "--schedule", "cosine", "--classes", "3"], "7 class embeddings, 3 classes"),
        ([*FLAGS, "--size", "big"], "--size 'big'"),
        ([*FLAGS, "--cluster", "3", "--of", "3"], "clusters [3] of 3"),
        (["--run", "run"], "--run and --expert belong together"),
        (["--expert", "3"], "--run and --expert belong together"),
        (["--run", "nowhere", "--expert", "3"], "not found"),
        (["--run", "run", "--expert", "1", "--objective", "flow"], "leave them out"),
        (["--run", "run", "--expert", "1", "--condition", "hash"], "leave them out"),
        (["--run", "run", "--expert", "1", "--codec", "pixels"], "leave them out"),
        (["--run", "run", "--expert", "1", "--pooled"], "leave them out"),
        (["--run", "run", "--expert", "1", "--name", "moss"], "leave them out"),
        (["--run", "run", "--expert", "9"], "no expert '9'"),
        (["--run", "run", "--expert", "1", "--heads", "4"], "channels 3 (wanted: 1), width 24 (wanted: 16), depth 3"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(atoll, checkpoint, run, arguments, words) -> None:
    before = sorted(run.parent.iterdir())
    code, text, error = atoll("convert", checkpoint, "-o", "e", *arguments)
    assert code == 2
    assert text == ""
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("atoll: ")
    assert words in error
    assert sorted(run.parent.iterdir()) == before


def test_objectives_in_words() -> None:
    assert objective_of(None, None) is None
    assert objective_of("flow", None) == {"prediction": "flow", "schedule": "linear"}
    assert objective_of("v", None) == {"prediction": "v", "schedule": "linear-beta"}
    assert objective_of(None, "cosine,s=0.01") == {"prediction": "eps", "schedule": {"name": "cosine", "s": 0.01}}


def test_frozen_networks_in_words() -> None:
    assert frozen_network("codec", "kl,weights=/a b/c=d") == {"name": "kl", "weights": "/a b/c=d"}
    assert frozen_network("condition", "weights=x,name=clip,length=77") == {
        "weights": "x",
        "name": "clip",
        "length": 77,
    }
    for wrong in ("", "a,b", "a,=1", "dim=3", "a,x=1,x=2", "a,x=[", "a,,"):
        with pytest.raises(AtollError, match="--codec") as raised:
            frozen_network("codec", wrong)
        assert "\n" not in str(raised.value)


def test_sizes_in_words() -> None:
    assert size_of("32") == (32, 32)
    assert size_of("32x48") == (32, 48)
    for wrong in ("", "0", "32x", "x32", "32x48x2", "-32", "3.5", "32 x 48"):
        with pytest.raises(AtollError, match="--size"):
            size_of(wrong)


def test_a_new_dit_that_modulates_nothing_is_fitted_exactly(dit, tmp_path) -> None:
    """DiT starts with all modulation at zero: no curve to share, none to miss."""
    zero = {name: torch.zeros_like(value) if "adaLN" in name else value for name, value in dit.items()}
    torch.save(zero, tmp_path / "dit.pt")
    out = convert(tmp_path / "dit.pt", tmp_path / "e", condition={"name": "hash"}, heads=4)
    assert read_card(out, ExpertCard).plain()["conversion"]["residual"] == [0, 0, 0]
    assert all(value.isfinite().all() for value in load_expert(out).expert.network.state_dict().values())
