"""DiT's own layout: the converted network against a forward pass written from the published description."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.convert import convert
from atoll.encoders.text import HashEncoder
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.nn import DiT
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from tests.convert.conftest import random_weights

HASH = {"name": "hash", "dim": 10, "length": 4}
HEADS, CHANNELS, PATCH, CLASSES = 4, 2, 2, 6
B = 3


def published(w: dict[str, Tensor], x: Tensor, index: Tensor, label: int, positions: Tensor | None = None) -> Tensor:
    """DiT, section 3.2 of arXiv 2212.09748 (adaLN-Zero), in float64, for x [B,C,H,W]; eps and the variance's half."""
    w = {name: value.double() for name, value in w.items()}
    width, (batch, _, height, wide) = w["x_embedder.proj.bias"].numel(), x.shape
    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(value: Tensor) -> Tensor:
        return (value - value.mean(-1, keepdim=True)) / (value.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    angles = index.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    c = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
    c = F.silu(linear("t_embedder.mlp.2", F.silu(c)) + w["y_embedder.embedding_table.weight"][label])
    tokens = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    tokens = tokens.flatten(2).transpose(1, 2) + (w["pos_embed"] if positions is None else positions)
    for i in range(depth):
        vectors = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(6, dim=2)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors
        h = linear(f"blocks.{i}.attn.qkv", norm(tokens) * (1 + scale_1) + shift_1)
        q, k, v = h.reshape(batch, -1, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        h = ((q @ k.transpose(2, 3)) / math.sqrt(width // HEADS)).softmax(-1) @ v
        tokens = tokens + gate_1 * linear(f"blocks.{i}.attn.proj", h.transpose(1, 2).flatten(2))
        h = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(tokens) * (1 + scale_2) + shift_2), approximate="tanh")
        tokens = tokens + gate_2 * linear(f"blocks.{i}.mlp.fc2", h)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=2)
    tokens = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    out = torch.zeros(batch, tokens.shape[2] // PATCH**2, height, wide, dtype=torch.float64)
    for n in range(tokens.shape[1]):
        i, j = divmod(n, wide // PATCH)
        patch = tokens[:, n].reshape(batch, PATCH, PATCH, -1).permute(0, 3, 1, 2)
        out[:, :, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH] = patch
    return out


def saved(dit: dict[str, Tensor], tmp_path: Path, key: str | None = None) -> Path:
    file = tmp_path / "dit.pt"
    torch.save({key: dit} if key else dit, file)
    return file


def network_of(path: Path) -> DiT:
    network = load_expert(path).expert.network
    assert isinstance(network, DiT)
    return network


def inputs(height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, CHANNELS, height, width, generator=g), torch.tensor([0.0, 371.0, 999.0])


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def captions() -> list[str]:
    return ["", "moss", "rain and sand"]


@pytest.mark.parametrize("pooled", [False, True])
def test_per_block_equals_dit_at_the_null_class_whatever_the_caption(dit, tmp_path, pooled) -> None:
    out = convert(
        saved(dit, tmp_path), tmp_path / "e", modulation="per-block", condition=HASH, heads=HEADS, pooled=pooled
    )
    x, index = inputs()
    expected = published(dit, x, index, label=CLASSES)
    got = network_of(out)(x, index, HashEncoder(dim=10, length=4)(captions()))
    assert relative_error(got, expected[:, :CHANNELS]) < 1e-5
    for label in range(CLASSES):  # the test can tell the classes apart
        assert relative_error(got, published(dit, x, index, label)[:, :CHANNELS]) > 1e-2


def test_times_of_the_objective_are_dits_indices(dit, tmp_path) -> None:
    expert = load_expert(
        convert(saved(dit, tmp_path), tmp_path / "e", modulation="per-block", condition=HASH, heads=HEADS)
    ).expert
    assert expert.objective.prediction == "eps"
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    index = torch.tensor([0, 371, 999])
    alpha = expert.objective.schedule.alpha(index.double() / 999)
    torch.testing.assert_close(alpha**2, torch.cumprod(1 - betas, 0)[index])
    torch.testing.assert_close(index.double() / 999 * expert.objective.time_scale, index.double())


def test_outputs_without_a_variance_are_kept_whole(dit, tmp_path) -> None:
    for part in ("weight", "bias"):
        rows = dit[f"final_layer.linear.{part}"]
        dit[f"final_layer.linear.{part}"] = rows.unflatten(0, (4, -1))[:, :CHANNELS].flatten(0, 1)
    out = convert(saved(dit, tmp_path), tmp_path / "e", "dit", modulation="per-block", condition=HASH, heads=HEADS)
    x, index = inputs()
    got = network_of(out)(x, index, HashEncoder(dim=10, length=4).null(B))
    assert relative_error(got, published(dit, x, index, CLASSES)) < 1e-5


def test_what_dit_does_not_know_starts_as_the_paper_says(dit, tmp_path) -> None:
    wide = HASH | {"dim": 512}
    convert(saved(dit, tmp_path), tmp_path / "a", condition=wide, heads=HEADS, seed=1)
    w = network_of(tmp_path / "a").state_dict()
    assert w["embed_states.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert all(w[f"blocks.{i}.cross.out.weight"].abs().max() == 0 for i in range(3))
    assert w["blocks.0.cross.q.weight"].abs().min() > 0
    convert(saved(dit, tmp_path), tmp_path / "b", condition=wide, heads=HEADS, seed=1)
    convert(saved(dit, tmp_path), tmp_path / "c", condition=wide, heads=HEADS, seed=2)
    same, other = network_of(tmp_path / "b").state_dict(), network_of(tmp_path / "c").state_dict()
    assert all(torch.equal(w[name], same[name]) for name in w)
    assert not torch.equal(w["embed_states.weight"], other["embed_states.weight"])


def test_the_card_tells_what_it_is(tmp_path) -> None:
    objective = {"prediction": "flow", "schedule": "linear"}
    codec = {"name": "pixels", "channels": 3, "shift": 0.0, "scale": 1.0}
    out = convert(
        saved(random_weights(channels=3), tmp_path),
        tmp_path / "e",
        objective=objective,
        condition=HASH,
        codec=codec,
        name="moss",
        clusters=(2,),
        k=5,
        heads=HEADS,
    )
    card = read_card(out, ExpertCard).plain()
    assert (card["name"], card["clusters"], card["k"], card["codec"]) == ("moss", [2], 5, codec)
    assert card["objective"]["prediction"] == "flow"
    assert card["latent_shape"] == [3, 8, 8]
    assert card["conversion"]["kind"] == "dit"
    assert card["conversion"]["classes"] == CLASSES
    assert list(card["conversion"]["source"]) == ["dit.pt"]
    assert load_expert(out).expert.objective.prediction == "flow"


@pytest.mark.parametrize("key", ["ema", "model", "state_dict"])
def test_weights_may_lie_under_a_key(dit, tmp_path, key) -> None:
    convert(saved(dit, tmp_path, key), tmp_path / "e", condition=HASH, heads=HEADS)
    torch.testing.assert_close(network_of(tmp_path / "e").state_dict()["positions"], dit["pos_embed"][0])


def test_ema_is_read_where_there_are_both(dit, tmp_path) -> None:
    torch.save({"model": {k: v + 1 for k, v in dit.items()}, "ema": dit, "steps": 7}, tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "e", condition=HASH, heads=HEADS)
    torch.testing.assert_close(network_of(tmp_path / "e").state_dict()["positions"], dit["pos_embed"][0])


def test_another_size_stretches_the_positions(dit, tmp_path) -> None:
    out = convert(
        saved(dit, tmp_path), tmp_path / "e", modulation="per-block", condition=HASH, heads=HEADS, size=(8, 16)
    )
    x, index = inputs(8, 16)
    row, column = torch.cartesian_prod(torch.arange(4.0), torch.arange(8) / 2).T.double()
    frequencies = 10000 ** -(torch.arange(6, dtype=torch.float64) / 6)
    angles = [value[:, None] * frequencies for value in (column, row)]
    positions = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)
    expected = published(dit, x, index, CLASSES, positions)[:, :CHANNELS]
    assert relative_error(network_of(out)(x, index, HashEncoder(dim=10, length=4).null(B)), expected) < 1e-5
    assert read_card(out, ExpertCard).plain()["conversion"]["positions"] == "stretched from 16"


def test_published_sizes_need_no_heads(dit, tmp_path) -> None:
    with pytest.raises(AtollError, match=r"width 24 and depth 3 are none of DiT's sizes.*say how many"):
        convert(saved(dit, tmp_path), tmp_path / "e", condition=HASH)
    assert not (tmp_path / "e").exists()


def change(dit: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    changed = dict(dit)
    changed.pop(name, None)
    return changed if value is None else changed | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.1.attn.proj.bias", None, r"1 tensors .*blocks\.1\.attn\.proj\.bias: missing, expected \[24\]"),
        ("blocks.1.attn.qkv.weight", torch.ones(9, 24), r"attn\.qkv\.weight: float32 \[9, 24\], expected \[72, 24\]"),
        ("blocks.2.mlp.fc2.bias", torch.ones(24).int(), r"mlp\.fc2\.bias: int32 \[24\], expected \[24\]"),
        ("blocks.0.attn.q_norm.weight", torch.ones(6), r"1 tensors .*q_norm\.weight: unknown"),
        ("pos_embed", None, r"pos_embed is missing; expected 3 dimensions"),
        ("pos_embed", torch.ones(1, 15, 24), r"15 positions are no square; say the latent's size"),
        ("blocks.3.attn.proj.bias", torch.ones(24), r"blocks\.3\.adaLN_modulation\.1\.weight: missing"),
        ("final_layer.linear.weight", torch.ones(12, 24), r"12 outputs a token, 3 a pixel; expected 2 \(eps\)"),
    ],
)
def test_what_does_not_fit_is_named(dit, tmp_path, name, value, message) -> None:
    with pytest.raises(AtollError, match=message) as raised:
        convert(saved(change(dit, name, value), tmp_path), tmp_path / "e", condition=HASH, heads=HEADS)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modulation": "both"}, "unknown modulation 'both'; expected one of fit, reinit, per-block"),
        ({"clusters": (3,), "k": 3}, r"clusters \[3\] of 3: .*numbered from 0 to k - 1"),
        ({"clusters": ()}, r"clusters \[\]"),
        ({"objective": {"prediction": "eps", "schedule": "linear-beta", "time_scale": 1.0}}, r"time_scale: got 1\.0"),
        ({"objective": {"prediction": "noise", "schedule": "linear"}}, "unknown prediction 'noise'"),
        ({"condition": None}, "DiT knows no text"),
        ({"kind": "unet"}, "unknown kind 'unet'; expected auto or one of dit, sit, repa, pixart, diffusers-dit"),
        ({"kind": "pixart", "heads": None}, r"no config\.json beside it"),
        ({"size": (9, 8)}, r"size 9x8, patch 2"),
        ({"heads": 5}, r"width 24, heads 5"),
    ],
)
def test_wrong_arguments_are_named(dit, tmp_path, arguments, message) -> None:
    with pytest.raises(AtollError, match=message):
        convert(saved(dit, tmp_path), tmp_path / "e", **({"condition": HASH, "heads": HEADS} | arguments))
    assert not (tmp_path / "e").exists()


def test_nothing_is_overwritten(dit, tmp_path) -> None:
    (tmp_path / "e").mkdir()
    with pytest.raises(AtollError, match="exists already"):
        convert(saved(dit, tmp_path), tmp_path / "e", condition=HASH, heads=HEADS)


def test_a_network_can_be_trained_on(dit, tmp_path) -> None:
    network = network_of(convert(saved(dit, tmp_path), tmp_path / "e", condition=HASH, heads=HEADS))
    network.train().requires_grad_(True)
    x, index = inputs()
    network(x, index, HashEncoder(dim=10, length=4)(captions())).square().mean().backward()
    still = [n for n, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    behind = {f"blocks.{i}.cross.{part}" for i in range(3) for part in ("q", "kv")} | {"embed_states"}
    assert {name.rpartition(".")[0] for name in still} == behind  # behind the zero output of cross-attention
