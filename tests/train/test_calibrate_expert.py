"""`atoll calibrate`: measures again, calibrates foreign experts, and refuses data that do not fit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.storage.artifact import CARD, read_card, read_tensors, save_artifact
from atoll.storage.cards import ExpertCard
from atoll.train.calibrate_expert import calibrate_expert, plot, table


@pytest.fixture
def expert(trained_run, tmp_path):
    return shutil.copytree(trained_run / "experts" / "0-eps-cosine", tmp_path / "expert")


@pytest.fixture
def shards(trained_run):
    return [trained_run / "clusters" / "cluster-000"]


def changed(path, **values):
    """Change entries of the expert's card."""
    card = read_card(path, ExpertCard).plain()
    tensors = read_tensors(path, read_card(path, ExpertCard))
    card = {key: value for key, value in card.items() if key not in ("format", "kind", "weights")}
    save_artifact(path, ExpertCard(**{**card, **values}), dict(tensors))


def without(path) -> None:
    """Remove calibration, training and assignment from the card, as in a converted expert."""
    card = read_card(path, ExpertCard).plain()
    tensors = {k: v for k, v in read_tensors(path, read_card(path, ExpertCard)).items() if k.startswith("network.")}
    plain = {k: v for k, v in card.items() if k not in ("format", "kind", "weights")}
    elsewhere = {**plain, "calibration": None, "training": None, "assignment": None}
    save_artifact(path, ExpertCard(**elsewhere), tensors)


def test_calibration_is_that_of_the_training(expert, shards) -> None:
    before = load_expert(expert)
    calibrate_expert(expert, shards)
    after = load_expert(expert)
    for name in ("mean", "log_snr", "slope", "x0_mse", "x0_mse_raw"):
        one, other = (getattr(e.expert.calibration, name) for e in (before, after))
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
    assert after.card.plain()["calibration"]["measured_on"] == before.card.plain()["calibration"]["measured_on"]
    weights = [dict(e.expert.network.state_dict()) for e in (before, after)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0] | weights[1])
    assert {k: v for k, v in after.card.plain().items() if k not in ("calibration", "weights")} == {
        k: v for k, v in before.card.plain().items() if k not in ("calibration", "weights")
    }


def test_a_foreign_expert_gets_a_calibration(expert, shards, tmp_path) -> None:
    without(expert)
    calibration = calibrate_expert(expert, shards, out=tmp_path / "calibrated", rows=5)
    assert load_expert(expert).expert.calibration is None
    loaded = load_expert(tmp_path / "calibrated")
    torch.testing.assert_close(loaded.expert.calibration.slope, calibration.slope.float())
    assert loaded.card.plain()["calibration"]["measured_on"] == "val"
    assert loaded.card.plain()["calibration"]["rows"] == 5
    assert len(loaded.card.plain()["calibration"]["velocity_mse"]) == len(calibration.log_snr)


def test_velocity_error_is_the_x0_error_over_sigma(expert, shards) -> None:
    """u = (x - x0)/sigma on the linear path, so an x0 error counts 1/t^2."""
    calibration = calibrate_expert(expert, shards)
    t = 1 / (1 + (calibration.log_snr.double() / 2).exp())
    torch.testing.assert_close(calibration.velocity_mse.double(), calibration.x0_mse.double() / t**2, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"latent_shape": [1, 4, 6], "calibration": None}, r"latent_shape is \[1, 4, 8\], the expert's \[1, 4, 6\]"),
        (
            {"codec": {"name": "pixels", "channels": 3}},
            "its codec is .*'channels': 1.*name shards of",
        ),
        ({"assignment": "another"}, "its assignment is .* the expert's another"),
        ({"clusters": [1]}, r"is cluster 0, the expert's clusters are \[1\]; name one of them"),
        ({"condition": {"name": "unknown", "dim": 8}}, "its text encoder is unknown"),
        (
            {"training": {"mark": "elsewhere", "steps": 8, "calibration_holdout": 0.25, "seed": 0, "rows": 3}},
            "was trained on 3 rows, these shards have",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused_and_nothing_changes(expert, shards, card, message) -> None:
    changed(expert, **card)
    before = (expert / CARD).read_text()
    with pytest.raises(AtollError, match=message):
        calibrate_expert(expert, shards)
    assert (expert / CARD).read_text() == before


def test_held_out_rows_are_selected_again(run, manifest) -> None:
    from atoll.train.expert import train_expert

    settings = replace_train(manifest, calibration_holdout=0.3)
    path = train_expert(run, settings, "0")
    before = load_expert(path)
    assert before.card.plain()["calibration"]["measured_on"] == "held back"
    calibrate_expert(path, [run / "clusters" / "cluster-000"])
    after = load_expert(path)
    assert after.card.plain()["calibration"]["measured_on"] == "held back"
    torch.testing.assert_close(after.expert.calibration.slope, before.expert.calibration.slope, rtol=2e-5, atol=2e-6)
    other = calibrate_expert(path, [run / "clusters" / "cluster-000"], use="val")
    assert not torch.allclose(other.x0_mse.float(), before.expert.calibration.x0_mse, rtol=1e-3)


def replace_train(manifest, **values):
    return manifest.model_copy(update={"train": manifest.train.model_copy(update=values)})


def test_existing_output_and_unknown_rows_are_refused(expert, shards) -> None:
    with pytest.raises(AtollError, match="exists already; choose another directory"):
        calibrate_expert(expert, shards, out=expert)
    with pytest.raises(AtollError, match="--use some: expected one of auto, val, all"):
        calibrate_expert(expert, shards, use="some")


def test_table_and_plot_show_all_nodes(expert, shards, tmp_path) -> None:
    calibration = calibrate_expert(expert, shards)
    lines = table(calibration).splitlines()
    assert len(lines) == 1 + len(calibration.log_snr)
    assert lines[1].startswith("0.020")
    assert len({len(line) for line in lines}) == 1
    plot(replace(calibration), tmp_path / "plot.png", "one")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert json.loads((expert / CARD).read_text())["calibration"]["slope"][0] == pytest.approx(calibration.slope[0])
