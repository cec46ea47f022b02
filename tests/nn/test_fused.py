"""The fused kernel of a linear layer and its activation: where it is used, and that it computes the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atoll.condition import Condition
from atoll.nn import build_network, fused
from atoll.nn.lora import add_lora
from atoll.storage.cards import LoraRecord

pytestmark = pytest.mark.skipif(fused._KERNEL is None, reason="torch without oneDNN")


@pytest.mark.parametrize(("activation", "own"), [("gelu", lambda y: F.gelu(y, approximate="tanh")), ("silu", F.silu)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_activation_rounded_once(activation, own, bias) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).to(torch.bfloat16)
    x = torch.randn(3, 5, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = own(F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()))
        got = fused.activated(x, layer.weight, layer.bias, activation)
        twice = own(layer(x))
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= (twice - exact).abs().max()
    assert torch.allclose(got.double(), exact, rtol=2**-7, atol=2**-9)


def test_its_gelu_is_the_tanh_form() -> None:
    one, x = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), -3.0, dtype=torch.bfloat16)
    # The exact one is -0.00405 there.
    assert float(fused.activated(x, one, None, "gelu")) == pytest.approx(-0.00364, rel=0.01)


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_a_network_uses_it_in_sampling_only(name, monkeypatch) -> None:
    calls = []
    kernel = fused._KERNEL
    monkeypatch.setattr(fused, "_KERNEL", lambda *arguments: calls.append(arguments[3]) or kernel(*arguments))
    torch.manual_seed(0)
    network = build_network(
        {"name": name, "channels": 1, "size": [4, 4], "patch": 2, "width": 32, "depth": 3, "heads": 2, "states_dim": 8}
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.2, 0.7])
    condition = Condition(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    with torch.no_grad():
        expected = network(x, t, condition)
        with torch.autocast("cpu", torch.bfloat16):
            network(x, t, condition)
    network(x, t, condition)
    network.to(torch.bfloat16)(x, t, condition)  # with gradients
    assert not calls  # in float32, in training's autocast, with gradients
    with torch.inference_mode():
        got = network(x, t, condition)
        assert calls == [{"dit": "gelu", "mmdit": "swish"}[name]] * 3
        monkeypatch.setattr(fused, "_KERNEL", None)
        plain = network(x, t, condition)
    assert len(calls) == 3
    # As near to float32 as the plain form, which rounds more often.
    assert (got - expected).abs().max() <= 1.5 * (plain - expected).abs().max()


def test_torch_counts_its_flops() -> None:
    x, weight = torch.randn(3, 4, 8, dtype=torch.bfloat16), torch.randn(5, 8, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        fused.activated(x, weight, None, "gelu")
    assert counter.get_total_flops() == 2 * 3 * 4 * 8 * 5


def test_a_layer_that_is_more_than_linear_is_called() -> None:
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        layer = nn.Linear(32, 32).to(torch.bfloat16)
        assert fused.is_fused(x, layer)
        assert not fused.is_fused(x.float(), layer)
        handle = layer.register_forward_hook(lambda *_: None)
        assert not fused.is_fused(x, layer)
        handle.remove()
        assert fused.is_fused(x, layer)
        block = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"mlp": layer})])})
        add_lora(block, LoraRecord(rank=2, alpha=2.0))
        assert not fused.is_fused(x, block["blocks"][0]["mlp"])
