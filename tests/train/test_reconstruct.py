"""A weak ensemble from the snapshots of a run: `atoll ema ENSEMBLE --at-step N`, then `atoll sample --weak`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atoll.assemble import assemble_run
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.artifact import CARD, WEIGHTS, read_card, sha256_file
from atoll.storage.cards import ExpertCard
from atoll.storage.layout import ENSEMBLE_CARD
from atoll.train.expert import train_expert
from atoll.train.reconstruct import reconstruct, reconstruct_ensemble
from atoll.train.router import train_router
from atoll.train.snapshots import reconstruct_expert, snapshots_of
from tests.conftest import K, write_run

WIDTHS = (0.05, 0.15)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Path:
    """A run whose experts have snapshots at steps 2, 4, 6 and 8; not to be changed by a test."""
    run = write_run(tmp_path_factory.mktemp("tracked") / "run")
    text = (run / "atoll.yaml").read_text()
    profiles = f"steps: 8\n  ema_profiles: {list(WIDTHS)}\n  ema_snapshot_every: 2"
    (run / "atoll.yaml").write_text(text.replace("steps: 8", profiles))
    manifest = load_manifest(run)
    for k in range(K):
        train_expert(run, manifest, str(k))
    train_router(run, manifest)
    assemble_run(run, manifest)
    return run


def test_an_average_that_ends_at_a_snapshot_reads_no_later_one(tracked, tmp_path) -> None:
    expert = tracked / "experts" / "1-flow-linear"
    directory = tracked / "experts" / ".train-1-flow-linear" / "ema"
    # Of a tracked width it is the snapshot itself.
    mine = load_file(reconstruct_expert(expert, WIDTHS[1], tmp_path / "tracked", step=4) / WEIGHTS)
    for name, tensor in load_file(directory / "000000004-1.safetensors").items():
        torch.testing.assert_close(mine[f"network.{name}"], tensor, rtol=1e-5, atol=1e-7)
    record = read_card(tmp_path / "tracked", ExpertCard).training.ema
    assert (record.step, record.snapshots) == (4, 4)
    # Of another width, it is what a training of four steps would give.
    short = tmp_path / "run" / "experts"
    shutil.copytree(expert, short / expert.name)
    shutil.copytree(directory, short / f".train-{expert.name}" / "ema")
    for snapshot in snapshots_of(short / f".train-{expert.name}" / "ema"):
        if snapshot.step > 4:
            snapshot.file.unlink()
    card = json.loads((short / expert.name / CARD).read_text())
    card["training"]["steps"] = 4
    (short / expert.name / CARD).write_text(json.dumps(card))
    ended = load_file(reconstruct_expert(short / expert.name, 0.1, tmp_path / "ended") / WEIGHTS)
    other = load_file(reconstruct_expert(expert, 0.1, tmp_path / "other", step=4) / WEIGHTS)
    assert all(torch.equal(ended[name], other[name]) for name in ended)
    # The last step by name is the last step.
    last = load_file(reconstruct_expert(expert, 0.1, tmp_path / "eight", step=8) / WEIGHTS)
    default = load_file(reconstruct_expert(expert, 0.1, tmp_path / "default") / WEIGHTS)
    assert all(torch.equal(last[name], default[name]) for name in last)
    assert "step" not in read_card(tmp_path / "default", ExpertCard).plain()["training"]["ema"]


def test_a_step_without_a_snapshot_is_refused(tracked, tmp_path) -> None:
    with pytest.raises(AtollError, match="no snapshot of step 5; expected one of 2, 4, 6, 8"):
        reconstruct_ensemble(tracked / "ensemble", 0.1, tmp_path / "weak", 5)
    assert not list(tmp_path.iterdir())


def test_an_ensemble_is_reconstructed_with_its_router_and_calibrations(tracked, tmp_path) -> None:
    out = reconstruct_ensemble(tracked / "ensemble", WIDTHS[1], tmp_path / "weak", 4)
    moved = shutil.move(out, tmp_path / "moved")
    main, weak = load_ensemble(tracked / "ensemble"), load_ensemble(moved)
    assert [expert.name for expert in weak.experts] == [expert.name for expert in main.experts]
    for old, new, expert in zip(main.experts, weak.experts, weak.ensemble.experts, strict=True):
        assert (old.calibration is None) == (new.calibration is None)
        assert old.calibration is None or old.calibration != new.calibration
        file = tracked / "experts" / f".train-{old.name}" / "ema" / "000000004-1.safetensors"
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(expert.network.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)
    router = dict(main.ensemble.router.named_parameters())
    assert all(torch.equal(value, router[name]) for name, value in weak.ensemble.router.named_parameters())
    main.with_weak(weak, Path(moved))


def test_experts_of_no_run_are_left_without_a_calibration(tracked, tmp_path) -> None:
    # The clusters are elsewhere.
    for name in ("ensemble", "experts", "router"):
        shutil.copytree(tracked / name, tmp_path / "run" / name)
    shutil.copyfile(tracked / "atoll.yaml", tmp_path / "run" / "atoll.yaml")
    with pytest.warns(UserWarning, match="written without a calibration .*clusters/"):
        out = reconstruct_ensemble(tmp_path / "run" / "ensemble", 0.1, tmp_path / "run" / "weak")
    assert read_card(out / "0-eps-cosine", ExpertCard).calibration is None


@pytest.mark.parametrize("name", ["../outside", "router", "1-flow-linear"])
def test_names_that_are_no_directories_are_refused(tracked, tmp_path, name) -> None:
    run = tmp_path / "run"
    for part in ("ensemble", "experts", "router"):
        shutil.copytree(tracked / part, run / part)
    shutil.copyfile(tracked / "atoll.yaml", run / "atoll.yaml")
    card = json.loads((run / "ensemble" / ENSEMBLE_CARD).read_text())
    card["experts"][0]["name"] = name
    (run / "ensemble" / ENSEMBLE_CARD).write_text(json.dumps(card))
    with pytest.raises(AtollError, match="of which no directory can be made"):
        reconstruct(run / "ensemble", 0.1, run / "weak")
    assert not (run / "weak").exists()


def test_an_expert_that_changed_since_is_refused(tracked, tmp_path) -> None:
    run = tmp_path / "run"
    for part in ("ensemble", "experts", "router"):
        shutil.copytree(tracked / part, run / part)
    shutil.copyfile(tracked / "atoll.yaml", run / "atoll.yaml")
    with (run / "experts" / "1-flow-linear" / CARD).open("a") as file:
        file.write("\n")
    with pytest.raises(AtollError, match="is not the one that was assembled"):
        reconstruct(run / "ensemble", 0.1, run / "weak")


def test_two_commands_sample_away_from_an_earlier_snapshot(tracked, atoll, tmp_path) -> None:
    run = shutil.copytree(tracked, tmp_path / "run")
    code, out, _ = atoll("ema", run / "ensemble", "--sigma-rel", 0.1, "--at-step", 4, "-o", run / "weak")
    assert (code, out) == (0, f"{run / 'weak'} written\n")
    arguments = ["sample", run / "ensemble", "moss", "--guidance", 2, "--quiet"]
    assert atoll(*arguments, "--weak", run / "weak", "-o", "guided.png")[0] == 0
    assert atoll(*arguments, "-o", "usual.png")[0] == 0
    assert sha256_file(Path("guided.png")) != sha256_file(Path("usual.png"))
    code, _, error = atoll("ema", run / "ensemble", "--sigma-rel", 0.1, "-o", run / "weak")
    assert code == 2
    assert "exists already" in " ".join(error.split())
    code, out, _ = atoll("ema", run / "experts" / "1-flow-linear", "--sigma-rel", 0.1, "-o", run / "longer")
    assert (code, out) == (0, f"{run / 'longer'} written; calibrate it with `atoll calibrate`\n")
