"""train.init from an expert of another size: the function stays, the base size, what is refused, and two stages."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from atoll.encoders.text import build_encoder
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.storage.artifact import WEIGHTS, read_card, read_tensors, save_artifact
from atoll.storage.cards import ClusterShardsCard, ExpertCard
from atoll.storage.shards import Shards
from atoll.train.denoiser import denoiser_config
from atoll.train.expert import train_expert
from atoll.train.init_weights import InitWeights
from atoll.train.track import read_metrics
from tests.conftest import RUN, SHAPE, write_run

NAME = "1-flow-linear"
LARGE = (1, 8, 16)  # twice SHAPE's sides: 32 tokens in place of 8
FLOW = Objective("flow", "linear")


def change(run: Path, network: dict | None = None, objective: dict | None = None, **train) -> Path:
    """Change sections of a run's atoll.yaml."""
    content = yaml.safe_load((run / "atoll.yaml").read_text())
    content["network"] |= network or {}
    content["train"] |= train
    content["experts"][1]["objective"] |= objective or {}
    (run / "atoll.yaml").write_text(yaml.safe_dump(content))
    return run


def requested(run: Path, shape=LARGE) -> dict:
    """The config that the run's atoll.yaml asks for, for latents of a shape."""
    manifest = load_manifest(run)
    return denoiser_config(manifest.network_of(manifest.experts[1]), shape, 8, 8)


def data_of(run: Path, **changes) -> ClusterShardsCard:
    return Shards(run / "clusters/cluster-001").card(ClusterShardsCard).model_copy(update=changes)


@pytest.fixture(scope="module", params=["dit", "mmdit"])
def small(request, tmp_path_factory) -> Path:
    """A run with one trained expert; not to be changed by a test."""
    run = write_run(tmp_path_factory.mktemp(request.param) / "small")
    change(run, network={"name": request.param, **({"size_embedding": True} if request.param == "mmdit" else {})})
    train_expert(run, load_manifest(run), "1")
    return run


def loaded(config: dict, weights: dict) -> torch.nn.Module:
    network = build_network(config)
    network.load_state_dict(weights)
    return network


@pytest.mark.filterwarnings("ignore:train.init")
def test_the_function_stays_at_both_sizes(small) -> None:
    init = InitWeights(small / "experts" / NAME)
    config = init.config(requested(small), data_of(small), FLOW)
    assert config == {**requested(small), **config, "size": [8, 16], "base_size": [4, 8]}
    old = loaded(init._card.network, init.weights(init._card.network))
    new = loaded(config, init.weights(config))
    encoder = build_encoder(RUN["condition"])
    for shape in (SHAPE, LARGE):
        x, time, condition = torch.randn(3, *shape), torch.rand(3) * 999, encoder(["moss"] * 3)
        assert torch.equal(new(x, time, condition), old(x, time, condition))
        assert new(x, time, condition).abs().max() > 0


def test_at_equal_size_nothing_is_new(small) -> None:
    init = InitWeights(small / "experts" / NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = init.config(requested(small, SHAPE), data_of(small), FLOW)
    assert "base_size" not in config
    stored = load_file(small / "experts" / NAME / WEIGHTS)
    for name, value in init.weights(config).items():
        assert torch.equal(value, stored[f"network.{name}"])


@pytest.mark.filterwarnings("ignore:train.init")
def test_a_third_stage_keeps_the_first_base(small, tmp_path) -> None:
    """And a stage at the first size again is as the first."""
    large = write_run(tmp_path / "large", shape=LARGE)
    shutil.copy(small / "atoll.yaml", large / "atoll.yaml")
    change(large, init=str(small), steps=2)
    path = train_expert(large, load_manifest(large), "1")
    card = read_card(path, ExpertCard).plain()
    assert card["network"]["base_size"] == [4, 8]
    assert card["training"]["init"]["sha256"] == read_card(small / "experts" / NAME, ExpertCard).weights_sha256
    init = InitWeights(path)
    assert init.config(requested(small, (1, 16, 32)), data_of(large), FLOW)["base_size"] == [4, 8]
    assert init.config(requested(small, LARGE), data_of(large), FLOW) == init._card.network
    assert "base_size" not in init.config(requested(small, SHAPE), data_of(large), FLOW)


def test_what_cannot_change_with_the_size_is_refused_by_name(small, tmp_path) -> None:
    init, data = InitWeights(small / "experts" / NAME), data_of(small)
    with pytest.raises(AtollError, match=r"is a network with patch 2 \(here 4\); make"):
        init.config({**requested(small), "patch": 4}, data, FLOW)
    with pytest.raises(AtollError, match=r"is a network with channels 1 \(here 3\); make"):
        init.config({**requested(small), "channels": 3}, data, FLOW)
    other = {**data.codec, "shift": 0.5, "scale": [2.0]}
    mine = init._card.codec
    init._card = init._card.model_copy(update={"codec": {**mine, "shift": 0.0, "scale": 1.0}})
    message = r"knows latents normalised by shift 0.0, scale 1.0, the data's by shift 0.5, scale 2.0; a stage of"
    with pytest.raises(AtollError, match=message):
        init.config(requested(small), data.model_copy(update={"codec": other}), FLOW)


@pytest.mark.filterwarnings("ignore:train.init")
def test_positions_of_one_size_are_not_stretched(tmp_path) -> None:
    run = write_run(tmp_path / "small")
    path = train_expert(run, load_manifest(run), "1")
    card = read_card(path, ExpertCard)
    tensors = read_tensors(path, card)
    tensors["network.positions"] = tensors["network.positions"] + 0.1
    save_artifact(run / "own", card, tensors)
    init = InitWeights(run / "own")
    with pytest.raises(AtollError, match="own has positions of its own, for latents of 4 x 8 alone, the data have 8 x"):
        init.weights(init.config(requested(run), data_of(run), FLOW))
    init.weights(init.config(requested(run, SHAPE), data_of(run), FLOW))


@pytest.mark.parametrize(
    ("first", "second", "advised"),
    [(None, None, "by 1; .*shift: 2 "), (3, 3, "by 3; .*shift: 6 "), (None, 2, None), (None, {"rule": "sd3"}, None)],
)
def test_a_forgotten_shift_is_named(small, first, second, advised) -> None:
    init = InitWeights(small / "experts" / NAME)
    earlier = Objective("flow", "linear", shift=first).config()
    init._card = init._card.model_copy(update={"objective": earlier})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        init.config(requested(small), data_of(small), Objective("flow", "linear", shift=second))
    lines = [str(one.message) for one in caught]
    assert not lines if advised is None else len(lines) == 1
    if advised is not None:
        with pytest.warns(UserWarning, match=f"on 8 tokens an image, the data have 32, and both .*{advised}"):
            init.config(requested(small), data_of(small), Objective("flow", "linear", shift=second))


@pytest.mark.filterwarnings("ignore:train.init.* was trained on")
def test_another_clustering_is_named(small) -> None:
    init = InitWeights(small / "experts" / NAME)
    with pytest.warns(UserWarning, match="knows cluster 1 of another clustering"):
        init.config(requested(small), data_of(small, assignment="0" * 64), FLOW)


RECIPE = """
name: stages
data: {{source: folder, path: images, size: {size}, validation: 0.2}}
codec: {{name: pixels, channels: 3}}
condition: {{name: hash, dim: 16, length: 4}}
clusters: {{k: 2, method: free}}
network: {{name: mmdit, patch: 4, width: 32, depth: 1, heads: 2}}
train: {{steps: {steps}, batch: 8, warmup: 5, lr: 3.0e-3, ema: 0.9, validate_every: {steps}, track: none, init: {init}}}
experts:
  - {{cluster: 0, objective: {{prediction: flow, schedule: linear, shift: {{rule: sd3, base_tokens: 16}}}}}}
router:
  network: {{patch: 4, width: 16, depth: 1, heads: 2}}
"""


@pytest.mark.slow  # nine commands
def test_two_stages_by_command_begin_below_from_scratch(atoll, tmp_path) -> None:
    """16 px, then 32 px from its run: the first held-out errors of the second stage against those of a new network."""
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        # A bright square on a dark ground, at one of 16 places.
        row, column = torch.randint(0, 4, (2,), generator=generator).tolist()
        image = Image.new("RGB", (32, 32), (30, 30, 60))
        image.paste((220, 200, 90), (8 * column, 8 * row, 8 * column + 8, 8 * row + 8))
        image.save(tmp_path / f"images/{number}.png")
        (tmp_path / f"images/{number}.txt").write_text("a square")
    first = {}
    for name, size, steps, init in (("small", 16, 80, "null"), ("large", 32, 1, "../small"), ("new", 32, 1, "null")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "atoll.yaml").write_text(RECIPE.format(size=size, steps=steps, init=init))
        like = [] if name == "small" else ["--like", tmp_path / "small"]
        for command in (["encode"], ["cluster", *like], ["train", "expert", "0"]):
            code, out, err = atoll(*command, "--run", tmp_path / name)
            assert code == 0, out + err
            assert "warning" not in err
        first[name] = read_metrics(tmp_path / name / "experts/.train-0-flow-linear")[-1]["val"]
    # In the noise, where the structure of an image is decided.
    for level in ("-4", "-2", "+0", "+2"):
        assert first["large"][level] < 0.9 * first["new"][level], level
