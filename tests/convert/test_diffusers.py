"""diffusers' networks: the converted one computes what the real class computes, from what the real class saved."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.convert import convert
from atoll.convert.dit import DiffusersDiT
from atoll.convert.pixart import PixArt
from atoll.encoders.text import HashEncoder
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard

diffusers = pytest.importorskip("diffusers")

B, C, L, TEXT = 3, 3, 5, 10
HASH = {"name": "hash", "dim": TEXT, "length": L}
PIXART = {
    "num_attention_heads": 4,
    "attention_head_dim": 6,
    "in_channels": C,
    "out_channels": 2 * C,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": TEXT,
}
DIT = {key: PIXART[key] for key in ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels")}
DIT |= {"num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 6}


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def pixart(**changes: Any) -> nn.Module:
    return randomised(diffusers.PixArtTransformer2DModel(**(PIXART | changes)))


def dit(**changes: Any) -> nn.Module:
    """With one embedder of time and class for all blocks, as what was converted from DiT has."""
    network = randomised(diffusers.DiTTransformer2DModel(**(DIT | changes)))
    for block in network.transformer_blocks:
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    return network


def saved(network: nn.Module, directory: Path, **options: Any) -> Path:
    network.save_pretrained(directory, **options)
    return directory


def inputs(height: int = 8, width: int = 8, text: int = TEXT) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, C, height, width, generator=g)
    mask = torch.tensor([[True] * L, [True, False, True, False, False], [True] + [False] * 4])
    return x, torch.tensor([0.0, 371.0, 999.0]), Condition(torch.randn(B, L, text, generator=g), mask)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def pixart_error(theirs: nn.Module, out: Path, size: tuple[int, int] = (8, 8), told: Any = None) -> float:
    x, time, condition = inputs(*size, text=load_expert(out).card.network["states_dim"])
    expected = theirs(
        x,
        encoder_hidden_states=condition.states,
        timestep=time,
        added_cond_kwargs=told,
        encoder_attention_mask=condition.mask,
    ).sample[:, :C]
    return relative_error(load_expert(out).expert.network(x, time, condition), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 3, "attention_head_dim": 8},
        {"patch_size": 4},
        {"patch_size": 1},
        {"interpolation_scale": 2},
        {"out_channels": C},
        {"out_channels": None},
        {"attention_bias": False},
        {"caption_channels": None},
    ],
    ids=str,
)
def test_pixart_equals_diffusers(tmp_path, changes) -> None:
    theirs = pixart(**changes)
    out = convert(saved(theirs, tmp_path / "p"), tmp_path / "e")
    assert pixart_error(theirs, out) < 1e-4


@pytest.mark.parametrize("ours", [PixArt, DiffusersDiT])
def test_what_config_json_leaves_out_is_the_classs_default(ours) -> None:
    cls = diffusers.PixArtTransformer2DModel if ours is PixArt else diffusers.DiTTransformer2DModel
    theirs = inspect.signature(cls.__init__).parameters
    found = {name: field.default for name, field in ours.model_fields.items() if name in theirs}
    assert found == {name: theirs[name].default for name in found}
    assert len(found) > 12


def test_what_older_versions_stored_besides_is_left_out(tmp_path) -> None:
    theirs = pixart()
    file = saved(theirs, tmp_path / "p") / "diffusion_pytorch_model.safetensors"
    stored = {"pos_embed.pos_embed": torch.ones(1, 16, 24), "caption_projection.y_embedding": torch.ones(120, TEXT)}
    save_file(load_file(file) | stored, file)
    assert pixart_error(theirs, convert(tmp_path / "p", tmp_path / "e")) < 1e-4


@pytest.mark.parametrize("size", [(8, 16), (12, 4)])
def test_pixart_of_another_size(tmp_path, size) -> None:
    theirs = pixart(interpolation_scale=2)
    out = convert(saved(theirs, tmp_path / "p"), tmp_path / "e", size=size)
    assert load_expert(out).card.plain()["latent_shape"] == [C, *size]
    assert pixart_error(theirs, out, size) < 1e-4


def test_pixart_that_is_told_the_resolution(tmp_path) -> None:
    theirs = pixart(use_additional_conditions=True)
    codec = {"name": "pixels", "channels": C}  # one pixel per latent pixel
    source = saved(theirs, tmp_path / "p")
    for name, given, factor in (("a", None, 8), ("b", codec, 1)):
        out = convert(source, tmp_path / name, size=(8, 16), codec=given)
        pixels = torch.tensor([[8.0, 16.0]]).repeat(B, 1) * factor
        told = {"resolution": pixels, "aspect_ratio": torch.full((B, 1), 0.5)}
        assert pixart_error(theirs, out, (8, 16), told) < 1e-4
        assert pixart_error(theirs, out, (8, 16), told | {"resolution": 2 * pixels}) > 1e-3
        assert read_card(out, ExpertCard).plain()["conversion"]["resolution"] == [8 * factor, 16 * factor]


def dit_error(theirs: nn.Module, out: Path) -> float:
    x, time, condition = inputs()
    expected = theirs(x, timestep=time, class_labels=torch.full((B,), DIT["num_embeds_ada_norm"])).sample[:, :C]
    return relative_error(load_expert(out).expert.network(x, time, condition), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 3, "attention_head_dim": 8},
        {"patch_size": 4},
        {"norm_eps": 1.0},
        {"out_channels": None},
        {"attention_bias": False},
    ],
    ids=str,
)
def test_dit_equals_diffusers(tmp_path, changes) -> None:
    theirs = dit(**changes)
    out = convert(saved(theirs, tmp_path / "d"), tmp_path / "e", modulation="per-block", condition=HASH)
    assert read_card(out, ExpertCard).plain()["conversion"]["kind"] == "diffusers-dit"
    assert dit_error(theirs, out) < 1e-4


def test_blocks_with_different_embedders_are_refused(tmp_path) -> None:
    theirs = dit()
    theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias += 0.1
    with pytest.raises(AtollError, match="embedders of time and null class of blocks 0 and 1 differ"):
        convert(saved(theirs, tmp_path / "d"), tmp_path / "e", condition=HASH)


def test_shards_a_pipelines_folder_a_file_and_a_pickle_are_read(tmp_path) -> None:
    theirs = pixart()
    saved(theirs, tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    saved(theirs, tmp_path / "pipeline" / "transformer")
    saved(theirs, tmp_path / "half", variant="fp16")
    saved(theirs, tmp_path / "pickle", safe_serialization=False)
    file = saved(theirs, tmp_path / "single") / "diffusion_pytorch_model.safetensors"
    for i, source in enumerate((*(tmp_path / n for n in ("shards", "pipeline", "half", "pickle")), file)):
        assert pixart_error(theirs, convert(source, tmp_path / f"e{i}")) < 1e-4


def test_a_missing_shard_and_one_outside_are_named(tmp_path) -> None:
    directory = saved(pixart(), tmp_path / "p", max_shard_size="20KB")
    index = directory / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = next(iter(content["weight_map"].values()))
    (directory / shard).rename(tmp_path / shard)
    with pytest.raises(AtollError, match=f"{shard}: not found, though"):
        convert(directory, tmp_path / "e")
    content["weight_map"] = {k: f"../{shard}" if v == shard else v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(AtollError, match=f"{shard}: not found, though"):
        convert(directory, tmp_path / "e")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn": "geglu"}, r"config\.json: activation_fn: got 'geglu'"),
        ({"norm_eps": 1e-5}, r"norm_eps: got 1e-05"),
        ({"num_attention_heads": "many"}, r"num_attention_heads: got 'many'"),
        ({"rotary": True}, r"got rotary True, which no conversion knows"),
        ({"num_layers": 10**12}, r"2 blocks and a patch .*config\.json says 1000000000000 and \[24, 3, 2, 2\]"),
        ({"attention_head_dim": 10**9}, r"patch embedding \[24, 3, 2, 2\], config\.json says 2 and \[4000000000"),
        ({"sample_size": 10**9}, r"sample_size: got 1000000000"),
        ({"caption_channels": 11}, r"caption_projection\.linear_1\.weight: float32 \[24, 10\], expected \[24, 11\]"),
        ({"cross_attention_dim": 25}, r"cross_attention_dim 25, the network is 24 wide"),
        ({"out_channels": 4}, r"16 outputs a token, 4 a pixel; expected 3 \(eps\)"),
    ],
)
def test_wrong_configurations_are_named(tmp_path, changes, message) -> None:
    directory = saved(pixart(), tmp_path / "p")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(AtollError, match=message):
        convert(directory, tmp_path / "e")


def test_keys_that_switch_nothing_on_are_passed_over(tmp_path) -> None:
    """As in the published config.json, which older versions of diffusers wrote."""
    theirs = pixart()
    directory = saved(theirs, tmp_path / "p")
    config = json.loads((directory / "config.json").read_text())
    config |= {"double_self_attention": False, "num_vector_embeds": None, "use_linear_projection": False}
    (directory / "config.json").write_text(json.dumps(config))
    assert pixart_error(theirs, convert(directory, tmp_path / "e")) < 1e-4


def test_the_condition_must_be_as_wide_as_the_checkpoints(tmp_path) -> None:
    directory = saved(pixart(), tmp_path / "p")
    with pytest.raises(AtollError, match="its states are 12 wide, the checkpoint's 10"):
        convert(directory, tmp_path / "e", condition=HASH | {"dim": 12})
    with pytest.raises(AtollError, match=r"heads 4: config\.json tells"):
        convert(directory, tmp_path / "e", heads=4)
    with pytest.raises(AtollError, match="modulation 'fit': PixArt has AdaLN-Single and keeps it"):
        convert(directory, tmp_path / "e", modulation="fit")
    wanted = {"heads": 4, "mlp_ratio": 4.0, "modulation": "single"}
    with pytest.raises(AtollError, match=r"its network has modulation single \(wanted: per-block\)"):
        convert(directory, tmp_path / "e", network=wanted | {"modulation": "per-block"})
    assert not (tmp_path / "e").exists()
    out = convert(directory, tmp_path / "e", condition=HASH, pooled=True, network=wanted)
    x, time, _ = inputs()
    network = load_expert(out).expert.network
    told = HashEncoder(dim=TEXT, length=L)(["", "moss", "rain"])
    other = Condition(told.states, told.mask, torch.randn_like(told.pooled))
    assert torch.equal(network(x, time, told), network(x, time, other))  # until it is trained


def test_without_a_condition_the_card_says_so(tmp_path) -> None:
    card = read_card(convert(saved(pixart(), tmp_path / "p"), tmp_path / "e"), ExpertCard).plain()
    assert card["condition"] == {"name": "unknown", "dim": TEXT}
    assert card["codec"] == {"name": "unknown"}
