"""Low-rank updates of linear layers: nothing changes at first, only they are trained, and merging gives the same."""

import pytest
import torch
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn import build_network
from atoll.nn.lora import A, B, LowRankLinear, add_lora, lora_weights, merge_lora, target_layers
from atoll.storage.cards import LoraRecord

DIT = {
    "name": "dit", "size": [4, 8], "channels": 1, "patch": 2, "width": 16, "depth": 2, "heads": 2, "states_dim": 8,
    "pooled_dim": 8,
}  # fmt: skip
MMDIT = {**DIT, "name": "mmdit", "dual_blocks": 1}
PIXART = {
    "name": "diffusers", "class": "PixArtTransformer2DModel",
    "config": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
        "cross_attention_dim": 16, "sample_size": 8, "caption_channels": 8,
    },
}  # fmt: skip
NETWORKS = {"dit": DIT, "mmdit": MMDIT, "pixart": PIXART}
RECORD = LoraRecord(rank=3, alpha=6.0)


def build(name: str) -> nn.Module:
    """A network whose every weight matters: zero gates would hide an update."""
    if name == "pixart":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = build_network(NETWORKS[name])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.1)
    return network.eval()


def inputs(name: str) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    shape = (3, 1, 8, 8) if name == "pixart" else (3, 1, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    condition = Condition(torch.randn(3, 4, 8, generator=g), mask, torch.randn(3, 8, generator=g))
    return torch.randn(shape, generator=g), torch.rand(3, generator=g) * 999, condition


@pytest.mark.parametrize("name", NETWORKS)
def test_at_first_the_output_is_the_base_network_s_to_the_bit(name) -> None:
    network, arguments = build(name), inputs(name)
    before = network(*arguments)
    add_lora(network, RECORD)
    assert torch.equal(network(*arguments), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_update_is_trained_and_nothing_else(name) -> None:
    network = build(name)
    layers = add_lora(network, RECORD)
    network(*inputs(name)).square().mean().backward()
    weights = lora_weights(network)
    assert set(weights) == {layer + end for layer in layers for end in (A, B)}
    for parameter_name, parameter in network.named_parameters():
        assert parameter.requires_grad == (parameter_name in weights)
        # B is zero, so A gets no gradient yet; every layer's B does: none is passed by.
        assert (parameter.grad is not None) == (parameter_name in weights), parameter_name
        if parameter_name.endswith(B):
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_merged_gives_what_unmerged_gives(name, scale) -> None:
    base, network, arguments = build(name), build(name), inputs(name)
    add_lora(network, RECORD)
    lora = lora_weights(network)
    with torch.no_grad():
        for weight in lora.values():
            weight.normal_(0, 0.3)
    for module in network.modules():
        if isinstance(module, LowRankLinear):
            module.scale *= scale
    before = base(*arguments)
    weights = merge_lora(base.state_dict(), {k: v.detach() for k, v in lora.items()}, RECORD, scale, "loras/3")
    assert weights.keys() == base.state_dict().keys()
    base.load_state_dict(weights)
    torch.testing.assert_close(base(*arguments), network(*arguments), rtol=1e-4, atol=1e-5)
    if scale:
        assert (base(*arguments) - before).abs().max() > 1e-3
    else:
        assert torch.equal(base(*arguments), before)


def test_merging_rounds_once_to_the_dtype_of_the_base() -> None:
    g = torch.Generator().manual_seed(0)
    weight, a, b = torch.randn(8, 6, generator=g), torch.randn(3, 6, generator=g), torch.randn(8, 3, generator=g)
    merged = merge_lora({"x.weight": weight.half()}, {f"x{A}": a, f"x{B}": b}, RECORD, 0.5, "loras/3")["x.weight"]
    assert merged.dtype == torch.float16
    assert torch.equal(merged, (weight.half().double() + 0.5 * 2 * (b @ a).double()).half())


def test_layers_outside_of_blocks_are_left_alone() -> None:
    layers = target_layers(build("dit"))
    assert len(layers) == 2 * 7  # qkv, out, q, kv, out, and two of the MLP in each block
    assert all(layer.startswith("blocks.") for layer in layers)
    assert target_layers(build("dit"), ["attention.qkv"]) == ["blocks.0.attention.qkv", "blocks.1.attention.qkv"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("qkv", "to_q")}, r"no layer ends in 'to_q'; expected some of attention\.qkv, attention\.out"),
        ({"targets": ("ention.qkv",)}, r"no layer ends in 'ention\.qkv'"),
        ({"rank": 16}, r"rank 16, but blocks\.0\.attention\.qkv maps 16 to 48; expected a rank below 16"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(changes, message) -> None:
    network = build("dit")
    before = network.state_dict().keys()
    with pytest.raises(AtollError, match=message) as error:
        add_lora(network, RECORD.model_copy(update=changes))
    assert "\n" not in str(error.value)
    assert network.state_dict().keys() == before


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(AtollError, match="no linear layer inside of a block"):
        add_lora(nn.Sequential(nn.Linear(3, 3)), RECORD)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lora: lora.pop(f"x{A}"),
        lambda lora: lora.update({f"y{A}": torch.zeros(3, 6), f"y{B}": torch.zeros(8, 3)}),
        lambda lora: lora.update({f"x{A}": torch.zeros(2, 6), f"x{B}": torch.zeros(8, 2)}),
        lambda lora: lora.update({f"x{B}": torch.zeros(1, 3)}),
    ],
)
def test_matrices_that_do_not_fit_the_base_are_named(spoil) -> None:
    lora = {f"x{A}": torch.zeros(3, 6), f"x{B}": torch.zeros(8, 3)}
    spoil(lora)
    with pytest.raises(AtollError, match=r"loras/3: [xy] .*get a fresh copy"):
        merge_lora({"x.weight": torch.zeros(8, 6)}, lora, RECORD, 1.0, "loras/3")
