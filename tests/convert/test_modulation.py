"""DiT's modulation made AdaLN-Single: exact where it can be, and never further than the mean over the blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.condition import Condition
from atoll.convert import convert
from atoll.convert.modulation import FACTORS, activations, factors, share
from atoll.convert.native import Native
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.nn import build_network
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard

HASH = {"name": "hash", "dim": 10, "length": 4}
B, C, D, DEPTH = 3, 2, 16, 5
CONFIG = {
    "size": [8, 12],
    "channels": C,
    "patch": 2,
    "width": D,
    "depth": DEPTH,
    "heads": 2,
    "modulation": "per-block",
}


def native(change: Tensor | None = None, offset: float = 0.5) -> Native:
    """A per-block network; with `change` [b,D] its blocks' maps are proportional, by these factors, up to constants."""
    torch.manual_seed(0)
    network = build_network({"name": "dit", **CONFIG, "states_dim": 4})
    weights = {name: 0.3 * torch.randn_like(value) for name, value in network.state_dict().items()}
    weights = {n: torch.zeros_like(v) if ".cross.out" in n else v for n, v in weights.items()}
    if change is not None:
        first = weights["blocks.0.modulation.linear.weight"]
        for i in range(DEPTH):
            weights[f"blocks.{i}.modulation.linear.weight"] = first * change[i].repeat(6)[:, None]
    return Native(CONFIG, weights, {"classes": 6})


def output(native: Native) -> Tensor:
    network = build_network({"name": "dit", **native.config, "states_dim": 4}).double()
    network.load_state_dict(native.weights)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(B, C, 8, 12, generator=g, dtype=torch.float64)
    condition = Condition(torch.randn(B, 7, 4, generator=g, dtype=torch.float64), torch.ones(B, 7, dtype=torch.bool))
    return network(x, torch.tensor([0.0, 500.0, 999.0]), condition).detach()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", ["equal", "positive", "signed"])
def test_proportional_blocks_are_fitted_exactly(kind) -> None:
    g = torch.Generator().manual_seed(3)
    change = {
        "equal": torch.ones(DEPTH, D),
        "positive": torch.rand(DEPTH, D, generator=g) + 0.5,
        "signed": (torch.rand(DEPTH, D, generator=g) + 0.5) * torch.randn(DEPTH, D, generator=g).sign(),
    }[kind]
    before = native(change)
    after = share(before, fit=True)
    assert after.config["modulation"] == "single"
    assert max(after.notes["residual"]) < 1e-5
    assert relative_error(output(after), output(before)) < 1e-4


def test_the_fit_is_nearer_than_the_mean_and_says_how_near() -> None:
    before = native()
    after = share(before, fit=True)
    inputs = activations(before)
    layers = [f"blocks.{i}.modulation.linear" for i in range(DEPTH)]
    curves = torch.stack(
        [F.linear(inputs, *(before.weights[f"{n}.{part}"].double() for part in ("weight", "bias"))) for n in layers]
    )  # [b,T,6D]
    moving = curves - curves.mean(1, keepdim=True)
    by_mean = moving - moving.mean(0)
    mean_residual = (by_mean.square().sum((1, 2)) / curves.square().sum((1, 2))).sqrt()
    residual = torch.tensor(after.notes["residual"])
    assert residual.mean() < 0.97 * mean_residual.mean()
    assert (residual > 0.05).all()  # random maps have nothing in common
    assert after.notes["classes"] == 6


def test_what_time_does_not_move_is_exact() -> None:
    """Blocks that differ by constants alone: any table can say that."""
    before = native(torch.ones(DEPTH, D))
    weights = before.weights | {f"blocks.{i}.modulation.linear.bias": torch.randn(6 * D) for i in range(DEPTH)}
    before = Native(before.config, weights, {})
    assert relative_error(output(share(before, fit=True)), output(before)) < 1e-4


def test_factors_stay_in_their_bounds() -> None:
    curves = torch.randn(DEPTH, 50, 7, dtype=torch.float64)
    curves[0, :, 0] *= 1e4
    curves[1:, :, 1] = 0.0
    curves[:, :, 2] = 0.0  # not moved at all
    found = factors(curves)
    low, high = FACTORS
    assert found.shape == (DEPTH, 7)
    assert ((found.abs() >= low) & (found.abs() <= high)).all()
    assert (found[:, 2] == 1).all()


def test_reinitialised_is_a_new_networks(dit, tmp_path) -> None:
    torch.save(dit, tmp_path / "dit.pt")
    out = convert(tmp_path / "dit.pt", tmp_path / "e", modulation="reinit", condition=HASH, heads=4)
    state = load_expert(out).expert.network.state_dict()
    assert all(value.abs().max() == 0 for name, value in state.items() if "shared" in name or "modulation" in name)
    torch.testing.assert_close(state["blocks.1.mlp.0.weight"], dit["blocks.1.mlp.fc1.weight"])
    assert "residual" not in read_card(out, ExpertCard).plain()["conversion"]


def test_the_card_tells_the_fits_residual(dit, tmp_path) -> None:
    torch.save(dit, tmp_path / "dit.pt")
    card = read_card(convert(tmp_path / "dit.pt", tmp_path / "e", condition=HASH, heads=4), ExpertCard).plain()
    assert card["conversion"]["modulation"] == "fit"
    assert len(card["conversion"]["residual"]) == 3
    assert all(0 < value < 1.5 for value in card["conversion"]["residual"])
    assert card["network"]["final"] == "per-block"


def test_maps_whose_products_overflow_are_refused() -> None:
    curves = torch.ones(3, 5, 2, dtype=torch.float64)
    curves[1, 2, 1] = 1e200
    with pytest.raises(AtollError, match=r"too large to be fitted .* --modulation per-block"):
        factors(curves)
