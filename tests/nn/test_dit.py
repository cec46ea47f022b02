"""The denoiser against diffusers' PixArt, against DiT's description, and against what it promises."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import profile

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn import SIZES, DiT, DiTConfig, build_network
from atoll.nn.attention import attention_by_products
from atoll.nn.dit import (
    ModulationKind,
    PerBlockModulation,
    SingleModulation,
    patchify,
    time_features,
    unpatchify,
)
from atoll.nn.positions import sincos_positions

KINDS: list[ModulationKind] = ["single", "per-block"]
B, C, H, W, L, STATES, POOLED = 3, 2, 8, 12, 5, 10, 7


def config(**changes: object) -> DiTConfig:
    base = {"size": (H, W), "channels": C, "patch": 2, "width": 32, "depth": 2, "heads": 4, "states_dim": STATES}
    return DiTConfig.model_validate(base | changes)


def random_dit(dtype: torch.dtype = torch.float64, **changes: object) -> DiT:
    """A network in which nothing is zero, as after training: the initialisation hides most mistakes."""
    torch.manual_seed(0)
    network = DiT(config(**changes)).to(dtype)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def inputs(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (H, W)) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, C, *size, generator=g, dtype=dtype)
    time = torch.tensor([0.0, 371.5, 999.0])
    mask = torch.tensor([[True] * 5, [True, False, True, False, False], [True] + [False] * 4])
    states = torch.randn(B, L, STATES, generator=g, dtype=dtype)
    return x, time, Condition(states, mask, torch.randn(B, POOLED, generator=g, dtype=dtype))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# Initialisation


@pytest.mark.parametrize("kind", KINDS)
def test_gates_and_output_are_exactly_zero_at_the_start(kind: ModulationKind) -> None:
    network = DiT(config(modulation=kind, pooled_dim=POOLED))
    x, time, condition = inputs(torch.float32)
    prepared, _ = network.conditioner(time, condition.pooled, torch.float32)
    tokens = torch.randn(B, 24, 32)
    states, bias = network.embed_condition(condition)
    for block in network.blocks:
        assert torch.equal(block.modulation(prepared, torch.float32), torch.zeros(B, 6, 1, 32))
        assert torch.equal(block(tokens, prepared, states, bias), tokens)
    assert torch.equal(network(x, time, condition), torch.zeros(B, C, H, W))


@pytest.mark.parametrize("kind", KINDS)
def test_initialisation_is_hddms(kind: ModulationKind) -> None:
    torch.manual_seed(0)
    network = DiT(config(modulation=kind, width=128, pooled_dim=64, states_dim=64))
    conditioner = network.conditioner
    for layer in (conditioner.time[0], conditioner.time[2], conditioner.pooled, network.embed_states):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for layer in (network.embed, network.blocks[1].attention.qkv, network.blocks[0].mlp[2]):
        bound = math.sqrt(6 / sum(layer.weight.shape))  # Xavier's uniform
        assert 0.95 * bound < layer.weight.abs().max().item() <= bound
    assert all(p.abs().max() == 0 for name, p in network.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_zero_start(kind: ModulationKind) -> None:
    network = DiT(config(modulation=kind, pooled_dim=POOLED))
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
    x, time, condition = inputs(torch.float32)
    for _ in range(4):  # the final layer moves first, then gates and cross-attention, then what they let through
        F.mse_loss(network(x, time, condition), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, p in network.named_parameters() if torch.equal(p, before[name])]
    assert not still


# The order of things


def pixart_weights(network: DiT) -> dict[str, Tensor]:
    """Our weights under the names of diffusers' PixArtTransformer2DModel without its text projection."""
    ours, theirs = network.state_dict(), {}

    def put(name: str, weight: Tensor, bias: Tensor) -> None:
        theirs[f"{name}.weight"], theirs[f"{name}.bias"] = weight, bias

    def linear(name: str, own: str, chunks: int = 1) -> list[tuple[Tensor, Tensor]]:
        return list(zip(ours[f"{own}.weight"].chunk(chunks), ours[f"{own}.bias"].chunk(chunks), strict=True))

    p, width = network.config.patch, network.config.width
    kernel = ours["embed.weight"].reshape(width, p, p, C).permute(0, 3, 1, 2)
    put("pos_embed.proj", kernel, ours["embed.bias"])
    put("adaln_single.emb.timestep_embedder.linear_1", *linear("", "conditioner.time.0")[0])
    put("adaln_single.emb.timestep_embedder.linear_2", *linear("", "conditioner.time.2")[0])
    put("adaln_single.linear", *linear("", "conditioner.shared")[0])
    theirs["scale_shift_table"] = ours["final_modulation.table"]
    put("proj_out", *linear("", "final")[0])
    for i in range(network.config.depth):
        own, name = f"blocks.{i}", f"transformer_blocks.{i}"
        theirs[f"{name}.scale_shift_table"] = ours[f"{own}.modulation.table"]
        for part, values in zip("qkv", linear("", f"{own}.attention.qkv", 3), strict=True):
            put(f"{name}.attn1.to_{part}", *values)
        put(f"{name}.attn1.to_out.0", *linear("", f"{own}.attention.out")[0])
        put(f"{name}.attn2.to_q", *linear("", f"{own}.cross.q")[0])
        for part, values in zip("kv", linear("", f"{own}.cross.kv", 2), strict=True):
            put(f"{name}.attn2.to_{part}", *values)
        put(f"{name}.attn2.to_out.0", *linear("", f"{own}.cross.out")[0])
        put(f"{name}.ff.net.0.proj", *linear("", f"{own}.mlp.0")[0])
        put(f"{name}.ff.net.2", *linear("", f"{own}.mlp.2")[0])
    return theirs


def test_single_modulation_equals_diffusers_pixart() -> None:
    diffusers = pytest.importorskip("diffusers")
    size = (8, 8)  # theirs is square
    network = random_dit(size=size)
    pixart = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=C,
        out_channels=C,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    ).double()
    pixart.load_state_dict(pixart_weights(network))
    x, time, condition = inputs(size=size)
    states, _ = network.embed_condition(condition)  # around theirs, which is an MLP of two layers
    theirs = pixart(x, states, time, encoder_attention_mask=condition.mask, return_dict=False)[0]
    assert relative_error(network(x, time, condition), theirs) < 1e-6
    positions = diffusers.models.embeddings.get_2d_sincos_pos_embed(32, 4, base_size=4).float()
    torch.testing.assert_close(sincos_positions(4, 4, 32), positions, rtol=0, atol=1e-6)


def reference_adaln_zero(w: dict[str, Tensor], x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """DiT's forward pass with PixArt's cross-attention, written out from the papers for `config()`."""
    width, heads, p = 32, 4, 2

    def linear(name: str, value: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", value, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.zeros_like(q)
        for b in range(len(q)):
            for head in range(heads):
                part = slice(head * width // heads, (head + 1) * width // heads)
                keys, values = k[b, :, part], v[b, :, part]
                if mask is not None:
                    keys, values = keys[mask[b]], values[mask[b]]
                weights = (q[b, :, part] @ keys.T / math.sqrt(width // heads)).softmax(1)
                out[b, :, part] = weights @ values
        return out

    def gelu(v: Tensor) -> Tensor:
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    angles = time.double()[:, None] * 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    hidden = F.silu(linear("conditioner.time.0", torch.cat([angles.cos(), angles.sin()], 1)))
    c = F.silu(linear("conditioner.time.2", hidden) + linear("conditioner.pooled", condition.pooled))
    states = linear("embed_states", condition.states)
    tokens = torch.stack(
        [x[:, :, i : i + p, j : j + p].permute(0, 2, 3, 1).flatten(1) for i in range(0, H, p) for j in range(0, W, p)],
        dim=1,
    )
    grid = torch.cartesian_prod(torch.arange(H // p), torch.arange(W // p)).double()  # (row, column) of a token
    angles = grid.flip(1)[:, :, None] * 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    positions = torch.cat([angles.sin(), angles.cos()], 2).flatten(1).float()  # as DiT stores them
    x = linear("embed", tokens) + positions
    for i in range(2):
        name = f"blocks.{i}"
        shift, scale, gate, shift_2, scale_2, gate_2 = (
            m[:, None] for m in linear(f"{name}.modulation.linear", c).split(width, 1)
        )
        q, k, v = linear(f"{name}.attention.qkv", norm(x) * (1 + scale) + shift).split(width, 2)
        x = x + gate * linear(f"{name}.attention.out", attend(q, k, v, None))
        k, v = linear(f"{name}.cross.kv", states).split(width, 2)
        x = x + linear(f"{name}.cross.out", attend(linear(f"{name}.cross.q", x), k, v, condition.mask))
        hidden = gelu(linear(f"{name}.mlp.0", norm(x) * (1 + scale_2) + shift_2))
        x = x + gate_2 * linear(f"{name}.mlp.2", hidden)
    shift, scale = (m[:, None] for m in linear("final_modulation.linear", c).split(width, 1))
    tokens = linear("final", norm(x) * (1 + scale) + shift)
    out = torch.zeros(len(x), C, H, W, dtype=x.dtype)
    for n in range(tokens.shape[1]):
        i, j = p * (n // (W // p)), p * (n % (W // p))
        out[:, :, i : i + p, j : j + p] = tokens[:, n].reshape(-1, p, p, C).permute(0, 3, 1, 2)
    return out


def test_per_block_modulation_equals_its_description() -> None:
    network = random_dit(modulation="per-block", pooled_dim=POOLED)
    x, time, condition = inputs()
    got = network(x, time.double(), condition)
    assert relative_error(got, reference_adaln_zero(network.state_dict(), x, time, condition)) < 1e-12


# Conditioning


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])  # both attentions
def test_masked_tokens_change_nothing_and_others_do(dtype: torch.dtype) -> None:
    network = random_dit(dtype)
    x, time, condition = inputs(dtype)
    output = network(x, time, condition)
    for masked in (True, False):
        states = condition.states.clone()
        states[~condition.mask if masked else condition.mask] += 10.0
        changed = network(x, time, Condition(states, condition.mask))
        assert torch.equal(changed, output) == masked


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_has_its_own_time_and_condition(kind: ModulationKind) -> None:
    network = random_dit(modulation=kind, pooled_dim=POOLED)
    x, time, condition = inputs()
    together = network(x, time, condition)
    for i in range(B):
        row = torch.tensor([i])
        torch.testing.assert_close(network(x[row], time[row], condition.index(row)), together[row])
    assert relative_error(network(x, time.flip(0), condition), together) > 1e-3


def test_pooled_vector_counts_where_it_is_configured() -> None:
    x, time, condition = inputs()
    other = Condition(condition.states, condition.mask, condition.pooled + 1.0)
    network = random_dit(pooled_dim=POOLED)
    assert relative_error(network(x, time, other), network(x, time, condition)) > 1e-3
    without = random_dit()
    assert torch.equal(without(x, time, other), without(x, time, condition))


def test_time_is_never_rounded() -> None:
    times = torch.tensor([998.0, 999.0])
    features = time_features(times)
    assert features.shape == (2, 256)
    torch.testing.assert_close(features[:, 0], times.cos())
    torch.testing.assert_close(features[:, 128], times.sin())
    assert time_features(times.to(torch.bfloat16)).dtype == torch.float32
    network = random_dit(torch.float32)
    exact, _ = network.conditioner(times, None, torch.float32)
    rounded, _ = network.bfloat16().conditioner(times, None, torch.bfloat16)
    assert relative_error(rounded, exact) < 0.02


# Arithmetic


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close_to_float32_and_the_output_keeps_the_dtype_of_x(kind: ModulationKind) -> None:
    network = random_dit(torch.float32, modulation=kind, pooled_dim=POOLED)
    x, time, condition = inputs(torch.float32)
    exact = network(x, time, condition)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x, time, condition)
    low = copy.deepcopy(network).bfloat16()(x, time, condition)
    for output in (mixed, low):
        assert output.dtype == torch.float32
        assert 1e-5 < relative_error(output, exact) < 0.03  # the lower bound: it did run in bfloat16


def test_autocast_rules_from_end_to_end() -> None:
    """One dtype between the blocks: half the memory traffic of float32 there, and as exact as bfloat16 weights."""
    network = random_dit(torch.float32)
    seen: list[torch.dtype] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(*inputs(torch.float32))
    assert seen == [torch.bfloat16] * 2


def test_gradients_under_autocast_are_close_to_float32() -> None:
    network = random_dit(torch.float32, pooled_dim=POOLED)
    x, time, condition = inputs(torch.float32)

    def gradient(enabled: bool) -> Tensor:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = network(x, time, condition)
        F.mse_loss(output, x).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    assert relative_error(gradient(True), gradient(False)) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_exact(kind: ModulationKind) -> None:
    network = random_dit(modulation=kind, depth=1, pooled_dim=POOLED)
    x, time, condition = inputs()
    states = condition.states.requires_grad_()

    def call(x: Tensor, states: Tensor) -> Tensor:
        return network(x, time, Condition(states, condition.mask, condition.pooled))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), states), fast_mode=True)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("keys", [5, 130])  # its softmax takes two ways
def test_attention_by_products_equals_torchs(masked: bool, keys: int) -> None:
    q, k, v = torch.randn(2, 3, 4, 6), torch.randn(2, 3, keys, 6), torch.randn(2, 3, keys, 6)
    mask = torch.arange(keys) < torch.tensor([[3], [keys]])
    bias = torch.zeros(2, keys).masked_fill(~mask, -math.inf)[:, None, None] if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attention_by_products(q, k, v, bias), expected)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_unpatchify_is_the_inverse_of_patchify(b: int, c: int, rows: int, columns: int, patch: int) -> None:
    x = torch.randn(b, c, rows * patch, columns * patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (b, rows * columns, patch * patch * c)
    assert torch.equal(unpatchify(tokens, patch, (rows * patch, columns * patch)), x)


def test_positions_are_a_row_and_a_column() -> None:
    grid = sincos_positions(3, 5, 16).reshape(3, 5, 16)
    by_column, by_row = grid[..., :8], grid[..., 8:]
    assert torch.equal(by_column, by_column[:1].expand_as(by_column))
    assert torch.equal(by_row, by_row[:, :1].expand_as(by_row))
    torch.testing.assert_close(by_column[0, :, 0], torch.arange(5.0).sin())
    torch.testing.assert_close(by_row[:, 0, 4], torch.arange(3.0).cos())
    assert len(grid.flatten(0, 1).unique(dim=0)) == 15


# What converted weights need


def test_positions_of_a_span_are_those_of_a_grid_stretched_over_it() -> None:
    stretched = sincos_positions(4, 8, 16, span=4.0).reshape(4, 8, 16)
    torch.testing.assert_close(stretched[:, ::2], sincos_positions(4, 4, 16).reshape(4, 4, 16))
    torch.testing.assert_close(stretched[0, :, 0], (torch.arange(8) / 2).sin())


def test_the_last_norm_may_have_a_modulation_of_its_own() -> None:
    network = random_dit(final="per-block")
    assert isinstance(network.blocks[0].modulation, SingleModulation)
    assert isinstance(network.final_modulation, PerBlockModulation)
    time = torch.tensor([371.5], dtype=torch.float64)
    c = F.silu(network.conditioner.time(time_features(time)))
    _, prepared = network.conditioner(time, None, torch.float64)
    torch.testing.assert_close(prepared, c)
    same = random_dit(final="single")  # what it is anyway
    assert same.state_dict().keys() == random_dit().state_dict().keys()
    assert torch.equal(same(*inputs()), random_dit()(*inputs()))


def test_text_may_go_through_two_layers() -> None:
    network = random_dit(text_layers=2)
    first, last = network.embed_states[0], network.embed_states[2]
    condition = inputs()[2]
    states, _ = network.embed_condition(condition)
    torch.testing.assert_close(states, last(F.gelu(first(condition.states), approximate="tanh")))
    torch.manual_seed(0)
    started = DiT(config(text_layers=2, width=128, states_dim=64))
    assert all(started.embed_states[i].weight.std().item() == pytest.approx(0.02, rel=0.1) for i in (0, 2))


@pytest.mark.parametrize("changes", [{"mlp_eps": 1.0}, {"time_period": 100.0}])
def test_eps_and_period_count(changes: dict[str, float]) -> None:
    assert relative_error(random_dit(**changes)(*inputs()), random_dit()(*inputs())) > 1e-3


def test_the_period_is_that_of_the_slowest_sinusoid() -> None:
    slowest = 1000 ** -(127 / 128)
    features = time_features(torch.tensor([5.0]), period=1000.0)
    assert features[0, 255].item() == pytest.approx(math.sin(5 * slowest), rel=1e-5)


# Sizes and configurations


def count(name: str, kind: ModulationKind) -> int:
    """Parameters of a size with 4 channels and 768 wide text."""
    with torch.device("meta"):
        network = DiT(DiTConfig(size=(32, 32), channels=4, states_dim=768, modulation=kind, **SIZES[name]))
        return sum(p.numel() for p in network.parameters())


def test_xl2_has_the_published_number_of_parameters() -> None:
    single, per_block = count("XL/2", "single"), count("XL/2", "per-block")
    assert single // 10**6 == 605  # HDDM's 605 M
    assert (single + 1152**2 + 1152) / 1e6 == pytest.approx(607.0, abs=0.05)  # PixArt's second text layer
    assert 1 - single / per_block == pytest.approx(0.264, abs=0.001)  # HDDM: "about 30 %"


def test_xl2_per_block_is_dits_xl2_but_for_the_text() -> None:
    text = 28 * 4 * (1152**2 + 1152) + 768 * 1152 + 1152  # cross-attention and text projection
    labels, variance, positions = 1001 * 1152, 4 * 4 * (1152 + 1), 256 * 1152  # what DiT-XL/2 has besides
    assert count("XL/2", "per-block") - text + labels + variance + positions == 675_129_632


@pytest.mark.parametrize(("name", "millions"), [("tiny", 1.3), ("S/2", 29.8), ("B/2", 118.4), ("L/2", 411.6)])
def test_sizes(name: str, millions: float) -> None:
    assert count(name, "single") / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_network_from_its_saved_configuration_and_weights_is_the_same() -> None:
    network = random_dit(torch.float32, pooled_dim=POOLED)
    with torch.device("meta"):  # as large experts are loaded: nothing may be left there
        loaded = build_network(network.config.model_dump(mode="json"))
    loaded.load_state_dict(network.state_dict(), assign=True)
    x, time, condition = inputs(torch.float32)
    assert torch.equal(loaded(x, time, condition), network(x, time, condition))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [8, 9]}, r"size 8x9, patch 2: .*divide"),
        ({"size": [9, 8]}, r"size 9x8, patch 2: .*divide"),
        ({"heads": 5}, r"width 32, heads 5: .*divide"),
        ({"width": 30, "heads": 3}, r"width 30: .*multiple of 4; take 32"),
        ({"name": "unet"}, r"name: got 'unet', expected 'dit', 'mmdit' or 'router'"),
        ({"depht": 3}, r"depht: unknown key"),
        ({"depth": 0}, r"depth: got 0, .*greater than 0"),
        ({"modulation": "none"}, r"modulation: got 'none', .*'single' or 'per-block'"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(AtollError, match=message):
        build_network(config().model_dump(mode="json") | changes)


def test_missing_key_is_named() -> None:
    with pytest.raises(AtollError, match=r"^network 'dit': states_dim: missing; correct these keys$"):
        build_network({k: v for k, v in config().model_dump().items() if k != "states_dim"})


def test_wrong_inputs_are_named() -> None:
    network = random_dit(pooled_dim=POOLED)
    x, time, condition = inputs()
    states, mask, pooled = condition.states, condition.mask, condition.pooled
    with pytest.raises(
        AtollError, match=r"latent: got shape \[3, 2, 8, 11\], expected \[B, 2, H, W\] .* multiples of the patch, 2"
    ):
        network(x[..., :11], time, condition)
    with pytest.raises(AtollError, match=r"time: got shape \[1\], expected \[3\]"):
        network(x, time[:1], condition)
    with pytest.raises(AtollError, match=r"condition: got 2 rows, expected 3 rows"):
        network(x, time, condition.index(torch.tensor([0, 1])))
    with pytest.raises(AtollError, match=r"condition: got none, expected 3 rows; no prompt is encoder.null\(3\)"):
        network(x, time, None)
    with pytest.raises(AtollError, match=r"condition states: got 9 wide, expected 10"):
        network(x, time, Condition(states[..., :9], mask, pooled))
    with pytest.raises(AtollError, match=r"pooled vector: got none, expected 7 wide"):
        network(x, time, Condition(states, mask))
    with pytest.raises(AtollError, match=r"pooled vector: got 6 wide, expected 7 wide"):
        network(x, time, Condition(states, mask, pooled[:, :6]))


def test_modulations_are_what_the_switch_says() -> None:
    assert isinstance(DiT(config()).blocks[0].modulation, SingleModulation)
    assert isinstance(DiT(config(modulation="per-block")).blocks[0].modulation, PerBlockModulation)


# Checkpointing


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients_and_holds_less(kind: ModulationKind, autocast: bool) -> None:
    """Rows without a prompt and masked tokens included. Held: what the forward pass took and has not given back."""
    held, gradients = {}, {}
    for checkpointing in ("none", "selective", "full"):
        network = random_dit(torch.float32, depth=3, modulation=kind, pooled_dim=POOLED)
        for block in network.blocks:
            block.checkpointing = checkpointing
        x, time, condition = inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), profile(profile_memory=True) as seen:
            loss = network(x, time, condition).float().square().mean()
        held[checkpointing] = sum(event.self_cpu_memory_usage for event in seen.key_averages())
        loss.backward()
        gradients[checkpointing] = [parameter.grad for parameter in network.parameters()]
    for checkpointing in ("selective", "full"):
        pairs = zip(gradients[checkpointing], gradients["none"], strict=True)
        assert all(torch.equal(mine, plain) for mine, plain in pairs)
    assert held["selective"] < 0.75 * held["none"]
    assert held["full"] < 0.9 * held["selective"]


def test_checkpointing_costs_nothing_without_gradients() -> None:
    network = random_dit(torch.float32)
    x, time, condition = inputs(torch.float32)
    with torch.no_grad():
        plain = network(x, time, condition)
        for block in network.blocks:
            block.checkpointing = "full"
        assert torch.equal(network(x, time, condition), plain)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_inside_compiled_blocks(checkpointing: str) -> None:
    gradients = []
    for compiled in (False, True):
        network = random_dit(torch.float32)
        for block in network.blocks:
            block.checkpointing = checkpointing
            if compiled:
                block.compile(fullgraph=True)
        network(*inputs(torch.float32)).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
