"""diffusers' networks behind the adapter: they compute what the class computes when it is called directly."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.encoders.text import LabelEncoder
from atoll.errors import AtollError
from atoll.nn import Foreign, build_network

diffusers = pytest.importorskip("diffusers")

B, C, SIDE, L, TEXT, CLASSES = 3, 2, 8, 5, 10, 6
LABELS = ("fern", "moss", "rain", "rust", "sand", "silt")
COMMON = {
    "num_attention_heads": 4,
    "attention_head_dim": 6,
    "in_channels": C,
    "out_channels": 2 * C,
    "num_layers": 2,
    "sample_size": SIDE,
    "patch_size": 2,
}
PIXART = {**COMMON, "cross_attention_dim": 24, "caption_channels": TEXT}
DIT = {**COMMON, "num_embeds_ada_norm": CLASSES}


def foreign(cls: str, pixels: tuple[int, int] | None = None, **config: Any) -> Foreign:
    network = build_network({"name": "diffusers", "class": cls, "config": config, "pixels": pixels})
    assert isinstance(network, Foreign)
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def pixart(pixels: tuple[int, int] | None = None, **changes: Any) -> Foreign:
    return foreign("PixArtTransformer2DModel", pixels, **PIXART | changes)


def dit(**changes: Any) -> Foreign:
    return foreign("DiTTransformer2DModel", **DIT | changes)


def inputs() -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, C, SIDE, SIDE, generator=g)
    mask = torch.tensor([[True] * L, [True, False, True, False, False], [True] + [False] * 4])
    return x, torch.tensor([0.0, 371.5, 999.0]), Condition(torch.randn(B, L, TEXT, generator=g), mask)


@pytest.mark.parametrize(
    "changes", [{}, {"out_channels": C}, {"out_channels": None}, {"patch_size": 4}, {"norm_eps": 1e-3}], ids=str
)
def test_pixart_is_diffusers(changes) -> None:
    network = pixart(**changes)
    x, time, condition = inputs()
    expected = network.network(
        x, encoder_hidden_states=condition.states, timestep=time, encoder_attention_mask=condition.mask
    ).sample
    assert expected.shape[1] == (changes.get("out_channels", 2 * C) or C)
    found = network(x, time, condition)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected[:, :C], rtol=1e-5, atol=1e-5)
    hidden = Condition(torch.where(condition.mask[..., None], condition.states, 7.0), condition.mask)
    torch.testing.assert_close(network(x, time, hidden), found)  # behind the mask nothing is read


def test_a_pixart_that_is_told_the_images_size() -> None:
    network = pixart(pixels=(48, 64), use_additional_conditions=True)
    x, time, condition = inputs()
    told = {"resolution": torch.tensor([[48.0, 64.0]] * B), "aspect_ratio": torch.full((B, 1), 48 / 64)}
    expected = network.network(
        x, condition.states, time, added_cond_kwargs=told, encoder_attention_mask=condition.mask
    ).sample[:, :C]
    torch.testing.assert_close(network(x, time, condition), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AtollError, match=r"set pixels: \[height, width\]"):
        pixart(use_additional_conditions=True)


def test_dit_is_diffusers_and_reads_the_label() -> None:
    """The empty caption is the null class, which diffusers' pipeline has as number n."""
    network, encoder = dit(), LabelEncoder(LABELS)
    x, time, _ = inputs()
    found = network(x, time, encoder(["silt", "", "fern"]))
    expected = network.network(x, time, class_labels=torch.tensor([5, CLASSES, 0])).sample[:, :C]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    again = network(x, time, encoder(["silt", "", "fern"]).to(dtype=torch.bfloat16))
    assert torch.equal(found, again)
    assert not torch.allclose(found[0], network(x, time, encoder(["moss"] * B))[0])


@pytest.mark.parametrize("make", [pixart, dit])
def test_nothing_is_drawn_in_training(make) -> None:
    """A training step is a function of (seed, step) alone; diffusers' DiT would drop a tenth of the labels."""
    network = make().requires_grad_(True)
    x, time, condition = inputs()
    condition = condition if make is pixart else LabelEncoder(LABELS)(["silt", "", "fern"])
    found = network(x, time, condition)
    network.train()
    for _ in range(30):
        assert torch.equal(network(x, time, condition), found)
    found.sum().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if "norm1.emb" not in n)


@pytest.mark.parametrize("make", [pixart, dit])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16(make, how) -> None:
    network = make()
    x, time, condition = inputs()
    condition = condition if make is pixart else LabelEncoder(LABELS)(["silt", "", "fern"])
    expected = network(x, time, condition)
    network = network.bfloat16() if how == "weights" else network
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = network(x, time, condition)
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("make", [pixart, dit])
def test_one_built_on_the_meta_device_is_whole_once_it_has_its_weights(make) -> None:
    """As every network is loaded: diffusers saves no positions, and there they would stay without values."""
    network = make()
    with torch.device("meta"):
        other = build_network(network.config.model_dump(mode="json"))
    other.load_state_dict(network.state_dict(), strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
    x, time, condition = inputs()
    condition = condition if make is pixart else LabelEncoder(LABELS)(["silt", "", "fern"])
    assert torch.equal(other.eval()(x, time, condition), network(x, time, condition))


def test_a_configuration_comes_back() -> None:
    config = {"name": "diffusers", "class": "PixArtTransformer2DModel", "config": PIXART, "pixels": [48, 64]}
    assert build_network(config).config.model_dump(mode="json") == config
    del config["pixels"]
    assert build_network(config).config.model_dump(mode="json") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": "StableDiffusionPipeline"}, r"class: got 'StableDiffusionPipeline', input should be 'PixArt"),
        ({"class": "os.system"}, r"class: got 'os\.system'"),
        ({"config": PIXART | {"rotary": True}}, r"config\.rotary: unknown key"),
        ({"config": PIXART | {"num_layers": 10**6}}, r"num_layers"),
        ({"config": PIXART | {"num_layers": 513}}, r"num_layers 513; expected at most 512"),
        ({"config": PIXART | {"sample_size": 2048}}, r"sample_size 2048; expected at most 1024"),
        ({"config": PIXART | {"attention_head_dim": 10**12}}, r"attention_head_dim"),
        ({"config": PIXART | {"num_attention_heads": -1}}, r"num_attention_heads"),
        ({"config": PIXART | {"norm_type": "layer_norm"}}, r"cannot be built from its config \(Forward pass is not"),
        ({"config": PIXART | {"patch_size": 0}}, r"cannot be built from its config"),
        ({"config": PIXART | {"out_channels": 3}}, r"3 channels out, 2 in"),
        ({"config": [1]}, r"config: got \[1\]"),
        ({"colour": 1}, r"colour: unknown key"),
    ],
    ids=str,
)
def test_a_card_that_asks_for_something_else_is_refused(changes, message) -> None:
    config = {"name": "diffusers", "class": "PixArtTransformer2DModel", "config": PIXART} | changes
    with pytest.raises(AtollError, match=message) as raised:
        build_network(config)
    assert "\n" not in str(raised.value)


JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.none(), max_size=1)


@settings(max_examples=60)
@given(key=st.sampled_from(sorted(PIXART)), value=JUNK, cls=st.sampled_from([(pixart, PIXART), (dit, DIT)]))
def test_a_configuration_with_anything_in_it_is_built_or_refused_in_one_line(key, value, cls) -> None:
    name = "PixArtTransformer2DModel" if cls[0] is pixart else "DiTTransformer2DModel"
    try:
        with torch.device("meta"):
            build_network({"name": "diffusers", "class": name, "config": cls[1] | {key: value}})
    except AtollError as error:
        assert "\n" not in str(error)  # noqa: PT017 - the other outcome is as good


def test_inputs_that_do_not_fit_are_named() -> None:
    x, time, condition = inputs()
    label = LabelEncoder(LABELS)(["silt", "", "fern"])
    for given_, message in (
        ((x[:, :, :4], time, condition), r"latent: got shape \[3, 2, 4, 8\], expected \[B, 2, 8, 8\]"),
        ((x, time[:2], condition), r"time: got shape \[2\]"),
        ((x, time, None), r"condition: got none, expected 3 rows"),
        ((x, time, label), r"condition states: got 6 wide, expected 10"),
    ):
        with pytest.raises(AtollError, match=message):
            pixart()(*given_)
    for given_, message in (
        ((x, time, None), r"pooled vector: got none, expected \[3, 6\] of one-hot rows; use the encoder 'label'"),
        ((x, time, condition), r"got none"),
        ((x, time, LabelEncoder(LABELS[:5])(["", "", "fern"])), r"got shape \[3, 5\], expected \[3, 6\]"),
    ):
        with pytest.raises(AtollError, match=message):
            dit()(*given_)
