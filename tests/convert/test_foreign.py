"""diffusers' networks kept as they are: as experts on the disk, alone and in one ensemble with a native DiT."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.assemble import assemble
from atoll.condition import Condition
from atoll.convert import convert
from atoll.convert.arguments import arguments_of_run
from atoll.convert.foreign import keep
from atoll.encoders.text import LabelEncoder, build_encoder
from atoll.ensemble.loading import load_ensemble, load_expert
from atoll.errors import AtollError
from atoll.nn import build_network
from atoll.storage.artifact import read_card, save_artifact
from atoll.storage.cards import ExpertCard, RouterCard
from tests.nn import test_foreign as direct
from tests.nn.test_foreign import LABELS

diffusers = pytest.importorskip("diffusers")

B, C, SIDE, L, TEXT, K = 3, 3, 8, 5, 10, 2
COMMON, PIXART, DIT = (
    config | {"in_channels": C, "out_channels": 2 * C} for config in (direct.COMMON, direct.PIXART, direct.DIT)
)
HASH = {"name": "hash", "dim": TEXT, "length": L, "seed": 0}
LABEL = {"name": "label", "labels": list(LABELS)}
PIXELS = {"name": "pixels", "channels": C}


def saved(directory: Path, cls: str = "PixArtTransformer2DModel", **config: Any) -> tuple[nn.Module, Path]:
    """A network of random weights, and the directory that diffusers wrote of it."""
    torch.manual_seed(0)
    network = getattr(diffusers, cls)(**config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    network.eval().requires_grad_(False).save_pretrained(directory)
    return network, directory


@pytest.fixture
def pixart(tmp_path) -> tuple[nn.Module, Path]:
    return saved(tmp_path / "pixart", **PIXART)


@pytest.fixture
def dit(tmp_path) -> tuple[nn.Module, Path]:
    return saved(tmp_path / "dit", "DiTTransformer2DModel", **DIT)


def native(out: Path, number: int, k: int = K) -> Path:
    """An expert of Atoll's own: flow, of other size, for the same latents and captions."""
    torch.manual_seed(number)
    sizes = {"size": [SIDE, SIDE], "channels": C, "patch": 4, "width": 16, "depth": 1, "heads": 2}
    network = build_network({"name": "dit", **sizes, "states_dim": TEXT})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    card = {
        "name": "native", "clusters": [number], "k": k, "objective": {"prediction": "flow", "schedule": "linear"},
        "network": network.config.model_dump(mode="json"), "latent_shape": [C, SIDE, SIDE], "codec": PIXELS,
        "condition": HASH, "assignment": "these", "calibration": None,
    }  # fmt: skip
    save_artifact(out, ExpertCard(**card), {f"network.{k}": v for k, v in network.state_dict().items()})
    return out


def router(out: Path, k: int = K) -> Path:
    sizes = {"size": [SIDE, SIDE], "channels": C, "patch": 4, "width": 16, "depth": 1, "heads": 2}
    network = build_network({"name": "router", **sizes, "clusters": k})
    card = {
        "network": network.config.model_dump(mode="json"), "clusters": k, "latent_shape": [C, SIDE, SIDE],
        "codec": PIXELS, "condition": HASH, "assignment": "these",
    }  # fmt: skip
    save_artifact(out, RouterCard(**card), {f"network.{k}": v for k, v in network.state_dict().items()})
    return out


def inputs() -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, C, SIDE, SIDE, generator=g)
    mask = torch.tensor([[True] * L, [True, False, True, False, False], [True] + [False] * 4])
    return x, torch.tensor([0.0, 371.5, 999.0]), Condition(torch.randn(B, L, TEXT, generator=g), mask)


def test_a_kept_pixart_is_diffusers(pixart, tmp_path) -> None:
    theirs, source = pixart
    out = keep(source, tmp_path / "e", condition=HASH)
    x, time, condition = inputs()
    expected = theirs(x, condition.states, time, encoder_attention_mask=condition.mask).sample[:, :C]
    network = load_expert(out).expert.network
    torch.testing.assert_close(network(x, time, condition), expected, rtol=1e-5, atol=1e-5)
    converted = load_expert(convert(source, tmp_path / "n", condition=HASH)).expert.network
    torch.testing.assert_close(network(x, time, condition), converted(x, time, condition), rtol=1e-3, atol=1e-3)


def test_a_kept_dit_is_diffusers(dit, tmp_path) -> None:
    theirs, source = dit
    out = keep(source, tmp_path / "e", condition=LABEL)
    x, time, _ = inputs()
    expected = theirs(x, time, class_labels=torch.tensor([2, 6, 0])).sample[:, :C]
    found = load_expert(out).expert.network(x, time, LabelEncoder(LABELS)(["rain", "", "fern"]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_its_card_says_what_it_is(pixart, tmp_path) -> None:
    card = read_card(
        keep(pixart[1], tmp_path / "e", condition=HASH, clusters=(1, 2), k=4, name="moss"), ExpertCard
    ).plain()
    assert (card["name"], card["clusters"], card["k"]) == ("moss", [1, 2], 4)
    assert card["network"]["name"] == "diffusers"
    assert card["network"]["class"] == "PixArtTransformer2DModel"
    assert card["network"]["config"]["caption_channels"] == TEXT
    assert card["latent_shape"] == [C, SIDE, SIDE]
    assert card["objective"]["schedule"]["name"] == "linear-beta"
    assert card["objective"]["time_scale"] == 999.0
    assert (card["codec"], card["condition"]) == ({"name": "unknown"}, HASH)
    assert card["conversion"]["modulation"] == "kept"


def test_in_one_ensemble_with_a_native_expert(pixart, tmp_path) -> None:
    told = {"condition": HASH, "codec": PIXELS, "assignment": "these", "k": K}
    experts = [keep(pixart[1], tmp_path / "kept", name="kept", **told), native(tmp_path / "native", 1)]
    out = assemble(experts, router(tmp_path / "router"), tmp_path / "ensemble")
    with pytest.warns(UserWarning, match="kept: an eps-expert without calibration"):
        loaded = load_ensemble(out, routing="full", strict=True, trust_paths=True)
    x, t = inputs()[0], torch.tensor([0.2, 0.5, 0.9])
    (condition,) = loaded.encoder(["", "moss", "rain on moss"])
    # The router of the test finds both clusters alike likely, so the ensemble is the mean of its experts.
    both = [expert.velocity(x, t, condition) for expert in loaded.ensemble.experts]
    torch.testing.assert_close(loaded.ensemble.velocity(x, t, condition), (both[0] + both[1]) / 2)
    assert not torch.allclose(both[0], both[1])
    with torch.autocast("cpu", torch.bfloat16):
        u = loaded.ensemble.velocity(x, t, condition, guidance_scale=3.0)
    assert u.isfinite().all()


def test_experts_that_read_captions_and_classes_in_one_ensemble(pixart, dit, tmp_path) -> None:
    """Each encodes the prompt with its own encoder; the prompt has to be a class, then."""
    told = {"codec": PIXELS, "assignment": "these", "k": K}
    experts = [
        keep(pixart[1], tmp_path / "a", condition=HASH, **told),
        keep(dit[1], tmp_path / "b", condition=LABEL, clusters=(1,), **told),
    ]
    out = assemble(experts, router(tmp_path / "router"), tmp_path / "ensemble")
    with pytest.warns(UserWarning, match="without calibration"):
        loaded = load_ensemble(out, routing="full", trust_paths=True)
    x, t = inputs()[0], torch.tensor([0.2, 0.5, 0.9])
    u = loaded.ensemble.velocity(x, t, loaded.encoder(["", "moss", "rain"]), guidance_scale=3.0)
    assert u.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "told", "message"),
    [
        ({"sample_size": 4}, {}, r"its latent_shape is \[3, 8, 8\], that of .*kept is \[3, 4, 4\]"),
        (
            {"in_channels": 1, "out_channels": 2},
            {"codec": {"name": "pixels", "channels": 1}},
            r"its latent_shape is \[3, 8, 8\], that of .*kept is \[1, 8, 8\]",
        ),
        (
            {},
            {"codec": PIXELS | {"scale": 2.0}},
            r"its latents are normalised by scale None, .*kept by scale 2\.0",
        ),
        ({}, {"codec": None}, r"its codec is .*pixels.*that of .*kept is .*unknown"),
        ({}, {"assignment": "others"}, r"its assignment is these, that of .*kept is others"),
    ],
    ids=str,
)
def test_another_latent_space_is_refused_with_both_named(tmp_path, changes, told, message) -> None:
    _, source = saved(tmp_path / "pixart", **PIXART | changes)
    told = {"codec": PIXELS, "assignment": "these", "k": K} | told
    experts = [keep(source, tmp_path / "kept", condition=HASH, **told), native(tmp_path / "native", 1)]
    with pytest.raises(AtollError, match=rf"native: {message}"):
        assemble(experts, router(tmp_path / "router"), tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()


def test_the_command(atoll, pixart, dit) -> None:
    flags = ("--codec", "pixels,channels=3", "--condition")
    code, text, error = atoll("convert", pixart[1], "--keep", "-o", "e", *flags, "hash,dim=10,length=5", "--of", 3)
    assert (code, text, error) == (0, "e written: from pixart, eps on linear-beta, kept (exact)\n", "")
    assert load_expert("e").card.k == 3
    Path("classes.txt").write_text("\n".join(LABELS))
    code, text, error = atoll("convert", dit[1], "--keep", "-o", "d", *flags, "label,labels=classes.txt")
    assert (code, error) == (0, "")
    assert read_card(Path("d"), ExpertCard).condition == LABEL  # the names, not their file
    flags = (*flags, "hash,dim=10,length=5", "--objective", "flow")
    code, text, _ = atoll("convert", pixart[1], "--keep", "-o", "f", *flags)
    assert (code, text) == (0, "f written: from pixart, flow on linear, kept (exact)\n")


def test_for_an_expert_of_a_run(atoll, run) -> None:
    """All but the encoder, which is the network's own, is the run's; its shards' latents are no square."""
    own = {"in_channels": 1, "out_channels": 1, "cross_attention_dim": 24, "caption_channels": 8, "sample_size": 16}
    _, source = saved(run / "pixart", **COMMON | own)
    arguments = ("convert", source, "--keep", "--run", run, "--expert", "0", "-o")
    code, _, error = atoll(*arguments, "e")
    assert code == 2
    assert "its latents are 16x16, requested are 4x8; a network that is kept keeps its size" in error
    shutil.rmtree(run / "clusters")
    told = arguments_of_run(run, "0")
    assert atoll(*arguments, "e")[0] == 0
    card = read_card(Path("e"), ExpertCard).plain()
    same = ("name", "k", "codec", "assignment")
    assert {key: card[key] for key in same} == {key: told[key] for key in same}
    assert build_encoder(card["condition"]).config() == build_encoder(told["condition"]).config()
    assert (card["clusters"], card["objective"]["schedule"]["name"]) == ([0], "cosine")
    assert atoll(*arguments, "f", "--condition", "hash,dim=8,length=9")[0] == 0
    assert build_encoder(read_card(Path("f"), ExpertCard).condition).length == 9
    assert "leave them out" in atoll(*arguments, "g", "--codec", "pixels")[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "name the encoder: --condition with its own, 10 wide"),
        (
            ["--condition", "hash,dim=12"],
            "'hash' with states 12 wide does not fit; expected --condition with its own, 10 wide",
        ),
        (["--condition", "hash,dim=10", "--size", "16"], "its latents are 8x8, requested are 16x16"),
        (["--condition", "hash,dim=10", "--modulation", "fit"], "--keep does not convert"),
        (["--condition", "hash,dim=10", "--pooled"], "--keep does not convert"),
        (["--condition", "hash,dim=10", "--heads", "4"], "--keep does not convert"),
        (["--condition", "hash,dim=10", "--kind", "dit"], "a 'dit' cannot be kept, only one of pixart, diffusers-dit"),
        (["--condition", "hash,dim=10", "--cluster", "3", "--of", "3"], "clusters [3] of 3"),
        (["--condition", "hash,dim=10", "--kind", "diffusers-dit"], "which DiTTransformer2DModel does not know"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(atoll, pixart, flags, words) -> None:
    code, text, error = atoll("convert", pixart[1], "--keep", "-o", "e", *flags)
    assert (code, text) == (2, "")
    assert len(error.strip().splitlines()) == 1
    assert words in error
    assert not Path("e").exists()


def test_a_dit_wants_its_own_classes(dit, tmp_path) -> None:
    for condition in (None, {"name": "hash", "dim": 6}, {"name": "label", "labels": list(LABELS[:5])}):
        with pytest.raises(AtollError, match="--condition label,labels=FILE with its 6 classes"):
            keep(dit[1], tmp_path / "e", condition=condition)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_channels": 11}, r"caption_projection\.linear_1\.weight: float32 \[24, 10\], expected \[24, 11\]"),
        ({"num_layers": 3}, r"21 tensors do not fit \(transformer_blocks\.2\..*: missing"),
        ({"num_layers": 10**12}, r"num_layers"),
        ({"attention_head_dim": 60000}, r"tokens of width 240000; expected at most"),
        ({"rotary": True}, r"got rotary True, which PixArtTransformer2DModel does not know"),
    ],
    ids=str,
)
def test_wrong_configurations_are_named(pixart, tmp_path, changes, message) -> None:
    file = pixart[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AtollError, match=message) as raised:
        keep(pixart[1], tmp_path / "e", condition=HASH)
    assert "\n" not in str(raised.value)
    file.unlink()
    with pytest.raises(AtollError, match=r"no config\.json beside it"):
        keep(pixart[1], tmp_path / "e", condition=HASH)
    assert not (tmp_path / "e").exists()


def test_keys_that_switch_nothing_on_are_passed_over(pixart, tmp_path) -> None:
    """As in the published config.json, which older versions of diffusers wrote."""
    file = pixart[1] / "config.json"
    old = {"double_self_attention": False, "num_vector_embeds": None, "use_linear_projection": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    assert "num_vector_embeds" not in read_card(keep(pixart[1], tmp_path / "e", condition=HASH), ExpertCard).network


def test_a_pixart_that_is_told_the_images_size(tmp_path) -> None:
    theirs, source = saved(tmp_path / "pixart", **PIXART | {"use_additional_conditions": True})
    out = keep(source, tmp_path / "e", condition=HASH)
    assert read_card(out, ExpertCard).network["pixels"] == [
        8 * SIDE,
        8 * SIDE,
    ]  # of an autoencoder of factor 8
    assert read_card(keep(source, tmp_path / "f", condition=HASH, codec=PIXELS), ExpertCard).network["pixels"] == [
        8,
        8,
    ]
    x, time, condition = inputs()
    told = {"resolution": torch.full((B, 2), 8.0 * SIDE), "aspect_ratio": torch.ones(B, 1)}
    expected = theirs(x, condition.states, time, told, encoder_attention_mask=condition.mask).sample[:, :C]
    found = load_expert(out).expert.network(x, time, condition)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
