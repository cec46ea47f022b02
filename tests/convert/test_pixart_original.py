"""PixArt's own `.pth`: the same network as diffusers', from the names and the fused layers of the release."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.convert import convert
from atoll.convert.foreign import keep
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from tests.convert.test_diffusers import HASH, PIXART, TEXT, C, diffusers, inputs, pixart, pixart_error, relative_error

HEADS = PIXART["num_attention_heads"]
# diffusers' names -> the release's, as PixArt's models are written; {i} is a block's number.
NAMES = {
    r"pos_embed\.proj": "x_embedder.proj",
    r"caption_projection\.linear_(1|2)": r"y_embedder.y_proj.fc\1",
    r"adaln_single\.emb\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"adaln_single\.emb\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"adaln_single\.emb\.resolution_embedder\.linear_1": "csize_embedder.mlp.0",
    r"adaln_single\.emb\.resolution_embedder\.linear_2": "csize_embedder.mlp.2",
    r"adaln_single\.emb\.aspect_ratio_embedder\.linear_1": "ar_embedder.mlp.0",
    r"adaln_single\.emb\.aspect_ratio_embedder\.linear_2": "ar_embedder.mlp.2",
    r"adaln_single\.linear": "t_block.1",
    r"proj_out": "final_layer.linear",
    r"scale_shift_table": "final_layer.scale_shift_table",
    r"transformer_blocks\.(\d+)\.scale_shift_table": r"blocks.\1.scale_shift_table",
    r"transformer_blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.attn.proj",
    r"transformer_blocks\.(\d+)\.attn2\.to_q": r"blocks.\1.cross_attn.q_linear",
    r"transformer_blocks\.(\d+)\.attn2\.to_out\.0": r"blocks.\1.cross_attn.proj",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"blocks.\1.mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"blocks.\1.mlp.fc2",
}


def released(network: nn.Module, positions: bool = True, length: int = 120) -> dict[str, Tensor]:
    """The state of diffusers' network as PixArt's training saves it."""
    theirs = network.state_dict()
    own: dict[str, Tensor] = {}
    for name, value in theirs.items():
        for pattern, replacement in NAMES.items():
            if match := re.fullmatch(rf"{pattern}(\.weight|\.bias|)", name):
                own[match.expand(replacement) + match[match.lastindex or 0]] = value
    for i in range(PIXART["num_layers"]):
        block = f"transformer_blocks.{i}"
        for end in ("weight", "bias"):
            qkv = [theirs[f"{block}.attn1.to_{part}.{end}"] for part in "qkv"]
            own[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(qkv)
            kv = [theirs[f"{block}.attn2.to_{part}.{end}"] for part in "kv"]
            own[f"blocks.{i}.cross_attn.kv_linear.{end}"] = torch.cat(kv)
    own["y_embedder.y_embedding"] = torch.ones(length, TEXT)
    return own | ({"pos_embed": network.pos_embed.pos_embed} if positions else {})


def saved(file: Path, weights: dict[str, Tensor]) -> Path:
    other = {name: value + 1 for name, value in weights.items()}
    torch.save({"state_dict": other, "state_dict_ema": weights, "optimizer": {"state": {}}, "epoch": 3}, file)
    return file


@pytest.mark.parametrize("name", ["PixArt-XL-2-256x256.pth", "epoch_3_step_900.pth.tar"])
@pytest.mark.parametrize("kind", ["auto", "pixart"])
def test_the_release_is_diffusers_network(tmp_path, name, kind) -> None:
    theirs = pixart()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = convert(saved(tmp_path / name, released(theirs)), tmp_path / "e", kind, heads=HEADS)
    assert pixart_error(theirs, out) < 1e-5
    card = read_card(out, ExpertCard).plain()
    assert (card["conversion"]["kind"], card["conversion"]["weights"]) == ("pixart", "state_dict_ema")
    assert card["objective"]["schedule"]["name"] == "linear-beta"


@pytest.mark.parametrize("scale", [0.5, 1, 2, 1.3])
@pytest.mark.parametrize("size", [(8, 8), (12, 4)])
def test_the_stored_positions_tell_their_scale(tmp_path, scale, size) -> None:
    theirs = pixart(interpolation_scale=scale)
    out = convert(saved(tmp_path / "x.pth", released(theirs)), tmp_path / "e", heads=HEADS, size=size)
    assert pixart_error(theirs, out, size) < 1e-5


def test_a_network_that_reads_the_resolution(tmp_path) -> None:
    theirs = pixart(use_additional_conditions=True)
    out = convert(saved(tmp_path / "x.pth", released(theirs)), tmp_path / "e", heads=HEADS, size=(8, 16))
    told = {"resolution": torch.tensor([[64.0, 128.0]]).repeat(3, 1), "aspect_ratio": torch.full((3, 1), 0.5)}
    assert pixart_error(theirs, out, (8, 16), told) < 1e-4


@pytest.mark.parametrize(("length", "side", "scale"), [(120, 32, 1.0), (300, 32, 0.5), (120, 128, 2.0), (300, 64, 1.0)])
def test_without_positions_the_size_is_given_and_the_scale_is_the_published_one(tmp_path, length, side, scale) -> None:
    theirs = pixart(sample_size=side, interpolation_scale=scale, use_additional_conditions=False, patch_size=2)
    file = saved(tmp_path / "x.pth", released(theirs, positions=False, length=length))
    with pytest.raises(AtollError, match="no pos_embed in it, which tells the latent's size; say it: --size 64"):
        convert(file, tmp_path / "e", heads=HEADS)
    out = convert(file, tmp_path / "e", heads=HEADS, size=(side, side))
    assert pixart_error(theirs, out, (side, side)) < 1e-4


def test_it_can_be_kept(tmp_path, monkeypatch) -> None:
    """With the heads of a published size; those of the test's are no size of theirs."""
    monkeypatch.setattr("atoll.convert.pixart_original.published_heads", lambda *_: HEADS)
    theirs = pixart()
    out = keep(saved(tmp_path / "x.pth", released(theirs)), tmp_path / "e", condition=HASH)
    x, time, condition = inputs()
    expected = theirs(x, condition.states, time, encoder_attention_mask=condition.mask).sample[:, :C]
    assert relative_error(load_expert(out).expert.network(x, time, condition), expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.0.attn.q_norm.weight": torch.ones(24)},
            r"1 tensors do not fit \(blocks\.0\.attn\.q_norm\.weight: un",
        ),
        ({"blocks.1.attn.qkv.weight": torch.ones(7, 24)}, r"blocks\.1\.attn\.qkv\.weight: unknown"),
        ({"blocks.1.mlp.fc1.bias": None}, r"transformer_blocks\.1\.ff\.net\.0\.proj\.bias: missing"),
        (
            {"pos_embed": torch.ones(1, 15, 24)},
            r"pos_embed has shape \[1, 15, 24\]; expected \[1, N, D\] with N a square",
        ),
        ({"pos_embed": torch.zeros(1, 16, 24)}, r"pos_embed's tokens are 0 apart"),
        ({"final_layer.linear.weight": torch.ones(16, 24)}, r"outputs a token|do not fit"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(tmp_path, change: dict[str, Any], message) -> None:
    weights = {name: value for name, value in (released(pixart()) | change).items() if value is not None}
    with pytest.raises(AtollError, match=message) as raised:
        convert(saved(tmp_path / "x.pth", weights), tmp_path / "e", heads=HEADS)
    assert "\n" not in str(raised.value)


@settings(max_examples=15)
@given(st.data())
def test_a_damaged_file_is_refused_in_one_line(tmp_path, data) -> None:
    weights = released(pixart())
    needed = sorted(name for name in weights if name not in ("pos_embed", "y_embedder.y_embedding"))
    for name in data.draw(st.lists(st.sampled_from(needed), min_size=1, max_size=3, unique=True)):
        shape = data.draw(st.one_of(st.none(), st.lists(st.integers(0, 5), max_size=4)))
        weights.pop(name) if shape is None else weights.update({name: torch.zeros(shape)})
    with pytest.raises(AtollError) as raised:
        convert(saved(tmp_path / "x.pth", weights), tmp_path / "e", "pixart", heads=HEADS)
    assert "\n" not in str(raised.value)


def test_pixart_in_diffusers_names_still_needs_its_config(tmp_path) -> None:
    torch.save(pixart().state_dict(), tmp_path / "x.pt")
    with pytest.raises(AtollError, match=r"no config\.json beside it.*the one that diffusers wrote"):
        convert(tmp_path / "x.pt", tmp_path / "e")
    assert diffusers is not None
