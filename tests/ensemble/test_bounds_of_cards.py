"""No value of a card costs more than its files justify."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.encoders.feature import build_feature
from atoll.encoders.text import build_encoder
from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.errors import AtollError
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.storage.artifact import CARD
from atoll.storage.claims import require_fit

HUGE: dict[str, dict[str, Any]] = {
    "width": {"width": 65_536, "heads": 1},
    "depth": {"depth": 1024},
    "depth and width": {"depth": 1000, "width": 4096},
    "beyond": {"width": 10**9},
    "many blocks": {"depth": 10**7},
    "tokens": {"size": [16_384, 16_384], "patch": 1},
    "ratio": {"mlp_ratio": 1e9},
    "text": {"states_dim": 10**9},
    "another network": {"name": "mmdit", "depth": 1024},
    "bottleneck": {"name": "mmdit", "bottleneck": 10**9},
    "dual blocks": {"name": "mmdit", "depth": 2, "dual_blocks": 10**9},
}
PIXART = {"name": "diffusers", "class": "PixArtTransformer2DModel"}


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "run")


def change(file: Path, key: str, value: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, key: value}))


@pytest.mark.parametrize("name", HUGE)
def test_a_network_that_its_weights_cannot_hold_is_not_built(run, monkeypatch, name) -> None:
    path = run / "experts" / "1-flow-linear"
    change(path / CARD, "network", {**json.loads((path / CARD).read_text())["network"], **HUGE[name]})
    started = torch.nn.Linear.__init__
    built = []
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda *a, **k: (built.append(1), started(*a, **k))[1])
    with pytest.raises(AtollError, match=r"network|claims|tokens"):
        load_expert(path)
    assert not built


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 100_000},
        {"num_hidden_layers": 48, "hidden_size": 8192},
        {"text_config": {"hidden_size": 8192, "num_hidden_layers": 40}},
        {"num_attention_heads": 512, "attention_head_dim": 512, "num_layers": 100},
        {"block_out_channels": [65_536]},
        {"vocab_size": 2**40},
        {"layers_per_block": [500, 500]},
    ],
)
def test_a_configuration_larger_than_its_weights_is_refused(config) -> None:
    with pytest.raises(AtollError, match=r"config\.json: claims a network of at least"):
        require_fit(config, 400, 2**24, "config.json")


def test_configurations_of_published_networks_fit_their_weights() -> None:
    t5_xxl = {"d_model": 4096, "d_ff": 10_240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "vocab_size": 32_128}
    clip = {"text_config": {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 49_408}, "projection_dim": 768}
    kl = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    pixart = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "caption_channels": 4096}
    for config, tensors, millions in ((t5_xxl, 219, 4762), (clip, 196, 123), (kl, 248, 83), (pixart, 632, 611)):
        require_fit(config, tensors, millions * 10**6, "config.json")


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_encoder({"name": "hash", "dim": 65_536, "length": 4096}),
        lambda: build_encoder({"name": "hash", "dim": 10**12, "length": 2}),
        lambda: build_encoder({"name": "label", "labels": [str(n) for n in range(70_000)]}),
        lambda: build_feature({"name": "hog", "bins": 256, "grid": 64}),
        lambda: build_feature({"name": "pixels", "size": 10**6}),
        lambda: Objective("eps", {"name": "linear-beta", "steps": 10**12}),
        lambda: Objective("eps", {"name": "table", "alphas_cumprod": [0.5] * 200_000}),
        lambda: Objective("eps", {"name": "table", "alphas_cumprod": "abc"}),
        lambda: Objective("eps", {"name": "cosine", "s": 1e9}),
        lambda: Objective("eps", ["linear"]),
        lambda: Objective("eps", "linear", time_scale=1e30),
        lambda: Objective("eps", "linear", time_scale="999"),
        lambda: build_network(
            {"name": "diffusers", "class": "PixArtTransformer2DModel", "config": {"num_layers": 600}}
        ),
        lambda: build_network(
            {
                "name": "diffusers",
                "class": "PixArtTransformer2DModel",
                "config": {"sample_size": 1024, "patch_size": 1},
            }
        ),
    ],
)
def test_sizes_are_checked_before_anything_is_allocated(build) -> None:
    with pytest.raises(AtollError) as refused:
        build()
    assert len(str(refused.value)) < 1000


def test_a_part_of_another_shape_or_number_of_clusters_is_refused(run) -> None:
    for key, value in (("latent_shape", [1, 4, 4000]), ("clusters", 4)):
        content = (run / "ensemble" / "ensemble.json").read_text()
        change(run / "ensemble" / "ensemble.json", key, value)
        with pytest.raises(AtollError, match="the ensemble's is"):
            load_ensemble(run / "ensemble")
        (run / "ensemble" / "ensemble.json").write_text(content)


def test_a_name_with_control_characters_is_refused(run) -> None:
    file = run / "ensemble" / "ensemble.json"
    file.write_text(file.read_text().replace('"0-eps-cosine"', '"0\\u001b[31m"', 1))
    with pytest.raises(AtollError, match=r"name without control characters") as refused:
        load_ensemble(run / "ensemble")
    assert str(refused.value).isprintable()


def test_a_warning_does_not_control_the_terminal(run) -> None:
    file = run / "ensemble" / "ensemble.json"
    content = json.loads(file.read_text())
    content["experts"][0]["url"] = "x\u001b[31m"
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="is missing") as warned:
        load_ensemble(run / "ensemble")
    assert all(str(one.message).isprintable() for one in warned)
