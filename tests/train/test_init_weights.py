"""train.init: training that starts from the weights of another expert."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from atoll.encoders.text import build_encoder
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.artifact import WEIGHTS, read_card
from atoll.storage.cards import ExpertCard
from atoll.train.expert import train_expert
from tests.conftest import RUN, write_run


def set_init(run, path: str, more: str = "") -> None:
    text = (run / "atoll.yaml").read_text()
    (run / "atoll.yaml").write_text(text.replace("steps: 8", f"steps: 8\n  init: {path}{more}"))


def test_training_starts_from_the_weights_and_the_card_records_them(run, trained_run) -> None:
    """With a negligible learning rate the weights stay the same; the objective differs."""
    shutil.copytree(trained_run / "experts/0-eps-cosine", run / "foreign")
    set_init(run, "foreign", "\n  lr: 1.0e-12")
    path = train_expert(run, load_manifest(run), "1")
    mine, other = load_file(path / WEIGHTS), load_file(run / "foreign" / WEIGHTS)
    for name in other:
        if name.startswith("network."):
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=1e-10)
    record = read_card(path, ExpertCard).plain()["training"]["init"]
    assert record == {
        "name": "0-eps-cosine",
        "sha256": read_card(run / "foreign", ExpertCard).weights_sha256,
    }


def test_other_weights_at_the_same_path_are_another_training(run, trained_run) -> None:
    shutil.copytree(trained_run / "experts/0-eps-cosine", run / "foreign")
    set_init(run, "foreign")
    train_expert(run, load_manifest(run), "1")
    train_expert(run, load_manifest(run), "1", resume=True)
    shutil.rmtree(run / "foreign")
    shutil.copytree(trained_run / "experts/2-x0-linear-beta", run / "foreign")
    with pytest.raises(AtollError, match="other settings"):
        train_expert(run, load_manifest(run), "1", resume=True)


def test_a_different_network_is_refused_with_its_keys(run, trained_run) -> None:
    set_init(run, str(trained_run / "experts/0-eps-cosine"))
    text = (run / "atoll.yaml").read_text()
    (run / "atoll.yaml").write_text(text.replace("depth: 1", "depth: 2", 1).replace("width: 16", "width: 32", 1))
    with pytest.raises(AtollError, match=r"width 16 \(here 32\), depth 1 \(here 2\)") as error:
        train_expert(run, load_manifest(run), "1")
    assert "\n" not in str(error.value)


def test_an_mmdit_starts_from_an_mmdit_only(run, trained_run) -> None:
    text = (run / "atoll.yaml").read_text().replace("patch: 2", "patch: 2\n  name: mmdit", 1)
    (run / "atoll.yaml").write_text(text)
    path = train_expert(run, load_manifest(run), "1")
    shutil.move(path, run / "foreign")
    set_init(run, "foreign", "\n  lr: 1.0e-12")
    again = train_expert(run, load_manifest(run), "1", restart=True)
    for name, value in load_file(run / "foreign" / WEIGHTS).items():
        if name.startswith("network."):
            torch.testing.assert_close(load_file(again / WEIGHTS)[name], value, rtol=0, atol=1e-10)
    shutil.rmtree(run / "foreign")
    shutil.copytree(trained_run / "experts/1-flow-linear", run / "foreign")
    with pytest.raises(AtollError, match=r"a network with name dit \(here mmdit\)"):
        train_expert(run, load_manifest(run), "1", restart=True)


def test_a_missing_expert_is_one_line(run) -> None:
    set_init(run, "nowhere")
    with pytest.raises(AtollError, match=r"nowhere.card.json: not found"):
        train_expert(run, load_manifest(run), "1")


def small_pixart(path):
    """Convert a random PixArt with `atoll convert --keep`, to start the tiny run from."""
    from diffusers import PixArtTransformer2DModel

    from atoll.convert.foreign import keep

    torch.manual_seed(1)
    PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, cross_attention_dim=8, in_channels=1, out_channels=2,
        sample_size=4, patch_size=2, caption_channels=8, use_additional_conditions=False,
    ).save_pretrained(path / "pixart")  # fmt: skip
    frozen = {"codec": {"name": "pixels", "channels": 1}, "condition": RUN["condition"]}
    return keep(path / "pixart", path / "start", clusters=[1], k=3, **frozen)


def test_a_kept_network_is_trained_further(tmp_path) -> None:
    run = write_run(tmp_path / "run", shape=(1, 4, 4))
    small_pixart(run)
    set_init(run, "start")
    path = train_expert(run, load_manifest(run), "1")
    card = read_card(path, ExpertCard).plain()
    assert card["network"] == read_card(run / "start", ExpertCard).network
    assert card["objective"]["prediction"] == "flow"
    assert len(card["calibration"]["slope"]) == 19
    mine, initial = load_file(path / WEIGHTS), load_file(run / "start" / WEIGHTS)
    assert any(not torch.equal(mine[name], initial[name]) for name in initial)
    assert (
        load_expert(path)
        .expert.velocity(torch.randn(2, 1, 4, 4), torch.rand(2), encoder()(["moss"] * 2))
        .isfinite()
        .all()
    )


def test_data_and_switches_that_a_kept_network_lacks_are_refused(tmp_path) -> None:
    run = write_run(tmp_path / "run")  # latents of another shape
    small_pixart(run)
    set_init(run, "start")
    with pytest.raises(AtollError, match=r"start has latent_shape \[1, 4, 4\], the data \[1, 4, 8\]"):
        train_expert(run, load_manifest(run), "1")
    other = write_run(tmp_path / "other", shape=(1, 4, 4))
    shutil.copytree(run / "start", other / "start")
    set_init(other, "start", "\n  checkpointing: full")
    with pytest.raises(AtollError, match=r"train.checkpointing: a network that is kept as it came does not support it"):
        train_expert(other, load_manifest(other), "1")


def encoder():
    return build_encoder(RUN["condition"])
