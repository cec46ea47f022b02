"""Paris's networks against a forward pass written here from the description of the release, over its state dict."""

import pytest
import torch
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.ensemble.offload import cast_weights
from atoll.errors import AtollError
from atoll.nn import SIZES, Paris, ParisConfig, ParisRouter, ParisRouterConfig, build_network
from atoll.nn.paris import LATENT

B, C, SIDE, L, STATES, K = 3, 3, 8, 5, 10, 4
SMALL = {"size": (SIDE, SIDE), "channels": C, "patch": 2, "width": 24, "depth": 2, "heads": 3}


def randomised(network: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.to(dtype).eval().requires_grad_(False)


def expert(dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
    return randomised(build_network({"name": "paris", **SMALL, "states_dim": STATES} | changes), dtype)


def router(dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
    return randomised(build_network({"name": "paris-router", **SMALL, "clusters": K} | changes), dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, C, SIDE, SIDE, generator=g, dtype=dtype)
    mask = torch.tensor([[True] * L, [True] * 2 + [False] * 3, [True] + [False] * 4])
    states = torch.randn(B, L, STATES, generator=g, dtype=dtype)
    return x, torch.tensor([0.0, 371.5, 1000.0], dtype=dtype), Condition(states, mask)


def layout(
    width: int = 24, depth: int = 2, tokens: int = 16, states: int = STATES, ratio: int = 4, patch: int = 2
) -> dict:
    """An expert's tensors and their shapes, as the release has them."""
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (width, C, patch, patch), "patch_embed.bias": (width,), "pos_embed": (1, tokens, width),
        **linear("time_embed.mlp.0", width, 256), **linear("time_embed.mlp.2", width, width),
        **linear("text_proj", width, states), **linear("t_block.1", 6 * width, width),
        **linear("final_layer.linear", patch**2 * C, width), "final_layer.scale_shift_table": (2, width),
    }  # fmt: skip
    for i in range(depth):
        found[f"layers.{i}.scale_shift_table"] = (6, width)
        found |= attentions(f"layers.{i}.attn", width) | attentions(f"layers.{i}.cross_attn", width)
        found |= linear(f"layers.{i}.mlp.0", ratio * width, width) | linear(f"layers.{i}.mlp.2", width, ratio * width)
    return found


def router_layout(width: int = 24, depth: int = 2, tokens: int = 16, clusters: int = K, ratio: int = 4) -> dict:
    """The router's."""
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (width, C, 2, 2), "patch_embed.bias": (width,), "pos_embed": (1, tokens, width),
        **linear("time_embed.mlp.0", width, 256), **linear("time_embed.mlp.2", width, width),
        "cls_token": (1, 1, width), **linear("head.0", width, width), "head.2.weight": (width,),
        "head.2.bias": (width,), **linear("head.4", clusters, width),
    }  # fmt: skip
    for i in range(depth):
        found |= linear(f"layers.{i}.adaLN_modulation.1", 6 * width, width) | attentions(f"layers.{i}.attn", width)
        found |= linear(f"layers.{i}.mlp.0", ratio * width, width) | linear(f"layers.{i}.mlp.2", width, ratio * width)
    return found


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def attentions(name: str, width: int) -> dict[str, tuple[int, ...]]:
    joint = {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)}
    return joint | linear(f"{name}.out_proj", width, width)


def as_released(network: nn.Module) -> dict[str, Tensor]:
    """The network's weights under the release's names."""
    found: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        part, _, end = name.rpartition(".")
        if part.endswith(("attn.qkv", "attn.q")):
            found[f"{part.rpartition('.')[0]}.in_proj_{end}"] = value
        elif part.endswith("attn.kv"):
            joint = f"{part.rpartition('.')[0]}.in_proj_{end}"
            found[joint] = torch.cat([found[joint], value])
        else:
            found[name.replace("attn.out.", "attn.out_proj.")] = value
    return found


# The forward pass of the release: plain functions over the state dict, torch's own multi-head attention, einsum.


def affine(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def normed(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5).sqrt()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def multihead(w: dict[str, Tensor], name: str, x: Tensor, other: Tensor, heads: int) -> Tensor:
    reference = nn.MultiheadAttention(x.shape[2], heads, batch_first=True, dtype=x.dtype)
    reference.load_state_dict({k.removeprefix(f"{name}."): v for k, v in w.items() if k.startswith(f"{name}.")})
    return reference(x, other, other)[0]


def embedded_time(w: dict[str, Tensor], time: Tensor) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(128, dtype=time.dtype) / 128)
    angle = time[:, None] * frequency
    hidden = swish(affine(w, "time_embed.mlp.0", torch.cat([torch.cos(angle), torch.sin(angle)], 1)))
    return affine(w, "time_embed.mlp.2", hidden)


def embedded_patches(w: dict[str, Tensor], x: Tensor) -> Tensor:
    kernel = w["patch_embed.weight"]
    p = kernel.shape[-1]
    patches = x.unfold(2, p, p).unfold(3, p, p)  # [B,C,h,w,p,p]
    tokens = torch.einsum("bchwpq,dcpq->bhwd", patches, kernel) + w["patch_embed.bias"]
    return tokens.flatten(1, 2) + w["pos_embed"]


def layer(w: dict[str, Tensor], i: int, x: Tensor, six: Tensor, text: Tensor | None, heads: int) -> Tensor:
    a = [six[:, j : j + 1] for j in range(6)]
    y = normed(x) * (1 + a[1]) + a[0]
    x = x + a[2] * multihead(w, f"layers.{i}.attn", y, y, heads)
    if text is not None:
        x = x + multihead(w, f"layers.{i}.cross_attn", x, text, heads)
    y = normed(x) * (1 + a[4]) + a[3]
    return x + a[5] * affine(w, f"layers.{i}.mlp.2", gelu(affine(w, f"layers.{i}.mlp.0", y)))


def released_expert(w: dict[str, Tensor], x: Tensor, time: Tensor, states: Tensor, heads: int) -> Tensor:
    depth, p = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("layers.")), w["patch_embed.weight"].shape[-1]
    t = embedded_time(w, time)
    shared = affine(w, "t_block.1", swish(t)).reshape(len(x), 6, -1)
    text, h = affine(w, "text_proj", states), embedded_patches(w, x)
    for i in range(depth):
        h = layer(w, i, h, w[f"layers.{i}.scale_shift_table"][None] + shared, text, heads)
    shift, scale = (w["final_layer.scale_shift_table"][None] + t[:, None]).chunk(2, 1)
    out = affine(w, "final_layer.linear", normed(h) * (1 + scale) + shift)
    side = x.shape[-1] // p
    out = out.reshape(len(x), side, side, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(x.shape)


def released_router(w: dict[str, Tensor], x: Tensor, time: Tensor, heads: int) -> Tensor:
    depth = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("layers."))
    t = embedded_time(w, time)
    h = torch.cat([w["cls_token"].expand(len(x), 1, -1), embedded_patches(w, x)], 1)
    for i in range(depth):
        six = affine(w, f"layers.{i}.adaLN_modulation.1", swish(t)).reshape(len(x), 6, -1)
        h = layer(w, i, h, six, None, heads)
    y = normed(gelu(affine(w, "head.0", h[:, 0]))) * w["head.2.weight"] + w["head.2.bias"]
    return affine(w, "head.4", gelu(y)).softmax(-1)


@pytest.mark.parametrize("changes", [{}, {"patch": 4}, {"patch": 1}, {"heads": 6}, {"mlp_ratio": 2.0}], ids=str)
def test_the_expert_is_the_releases(changes) -> None:
    network = expert(**changes)
    x, time, condition = inputs()
    expected = released_expert(as_released(network), x, time, condition.states, network.config.heads)
    torch.testing.assert_close(network(x, time, condition), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"patch": 4}, {"heads": 6}, {"mlp_ratio": 2.0}], ids=str)
def test_the_router_is_the_releases(changes) -> None:
    network = router(**changes)
    x, time, _ = inputs()
    found = network(x, time / 1000)
    expected = released_router(as_released(network), x, time, network.config.heads)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(B, dtype=x.dtype))
    assert torch.equal(found, network(x, time / 1000, torch.randn(B, 7)))  # no text


def test_small_signals_show_the_eps_of_the_norms() -> None:
    """1e-5 and 1e-6 differ only where the stream is small."""
    network = expert()
    for name in ("patch_embed.weight", "patch_embed.bias", "pos_embed"):
        network.get_parameter(name).mul_(1e-3)
    for block in network.layers:
        for table in (block.scale_shift_table, block.cross_attn.out.weight, block.cross_attn.out.bias):
            table.mul_(1e-3)
    network.t_block[1].weight.mul_(1e-3), network.t_block[1].bias.mul_(1e-3)
    x, time, condition = inputs()
    expected = released_expert(as_released(network), x, time, condition.states, network.config.heads)
    torch.testing.assert_close(network(x, time, condition), expected, rtol=1e-9, atol=1e-9)


def test_padding_is_read_and_a_pooled_vector_is_not() -> None:
    network = expert()
    x, time, condition = inputs()
    everything = Condition(condition.states, torch.ones_like(condition.mask), torch.randn(B, 3))
    assert torch.equal(network(x, time, condition), network(x, time, everything))
    other = Condition(condition.states.clone(), condition.mask)
    other.states[2, -1] += 1  # behind its mask
    assert not torch.allclose(network(x, time, condition)[2], network(x, time, other)[2])


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        networks = (
            Paris(ParisConfig.model_validate({**LATENT, **SIZES["XL/2"], "states_dim": 768})),
            ParisRouter(ParisRouterConfig.model_validate({**LATENT, **SIZES["B/2"], "clusters": 8})),
        )
    assert [round(sum(p.numel() for p in n.parameters()) / 1e6) for n in networks] == [606, 129]


def test_the_layout_is_the_releases() -> None:
    """Names and shapes as they are written down above, from the release's description."""
    for network, expected in ((expert(), layout()), (router(), router_layout())):
        assert {name: tuple(value.shape) for name, value in as_released(network).items()} == expected


def test_a_new_one_says_nothing_yet() -> None:
    """The zero gates are zero, and no cluster is likelier than another."""
    x, time, condition = inputs(torch.float32)
    network = Paris(ParisConfig.model_validate({**SMALL, "states_dim": STATES}))
    assert torch.equal(network(x, time, condition), torch.zeros_like(x))
    found = ParisRouter(ParisRouterConfig.model_validate({**SMALL, "clusters": K}))(x, time / 1000)
    torch.testing.assert_close(found.exp(), torch.full((B, K), 1 / K))


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16(how) -> None:
    network, telling = expert(torch.float32), router(torch.float32)
    x, time, condition = inputs(torch.float32)
    expected, probable = network(x, time, condition), telling(x, time / 1000)
    if how == "weights":
        network, telling = network.bfloat16(), telling.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found, log_p = network(x, time, condition), telling(x, time / 1000)
    assert found.dtype == log_p.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < 0.05
    assert (log_p.exp() - probable.exp()).abs().max() < 0.15


def test_int8_reaches_every_matrix() -> None:
    """torchao rounds linear layers alone, so attention's have to be such."""
    pytest.importorskip("torchao")
    for network, arguments in ((expert(torch.float32), inputs(torch.float32)), (router(torch.float32), ())):
        x, t = inputs(torch.float32)[0], torch.tensor([0.0, 0.5, 1.0])
        expected = network(*(arguments or (x, t)))
        network = cast_weights(network, "int8")
        matrices = [p for name, p in network.named_parameters() if name.endswith("weight") and p.ndim == 2]
        assert all(hasattr(matrix, "__tensor_flatten__") for matrix in matrices)
        assert (network(*(arguments or (x, t))) - expected).norm() / expected.norm() < 0.1


def test_a_configuration_comes_back() -> None:
    for network in (expert(), router()):
        config = network.config.model_dump(mode="json")
        assert build_network(config).config == network.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(B, C, SIDE, 4)}, r"latent: got shape \[3, 3, 8, 4\], expected \[B, 3, 8, 8\]"),
        ({"time": torch.zeros(2)}, r"time: got shape \[2\], expected \[3\]"),
        ({"condition": None}, r"condition: got none, expected 3 rows"),
        ({"condition": Condition(torch.zeros(2, L, STATES), torch.ones(2, L, dtype=torch.bool))}, "got 2 rows"),
        ({"condition": Condition(torch.zeros(B, L, 9), torch.ones(B, L, dtype=torch.bool))}, "got 9 wide, expected 10"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message) -> None:
    given = dict(zip(("x", "time", "condition"), inputs(torch.float32), strict=True)) | change
    with pytest.raises(AtollError, match=message):
        expert(torch.float32)(*given.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "width 24, heads 5"),
        ({"patch": 3}, "size 8x8, patch 3"),
        ({"width": 0}, "width: got 0"),
        ({"colour": 1}, "colour: unknown key"),
    ],
)
def test_configurations_that_do_not_fit_are_named(change, message) -> None:
    for build in (expert, router):
        with pytest.raises(AtollError, match=message):
            build(**change)
