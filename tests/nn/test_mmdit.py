"""The multimodal denoiser against its description written out plainly, and against what it promises."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile

from atoll.choices import hidden_width
from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn import MMDIT_SIZES, SIZES, MMDiT, MMDiTConfig, build_network
from atoll.nn.attention import attention_by_products, head_attention
from atoll.nn.block_cache import BlockCache
from atoll.nn.joint_blocks import DualBlock
from atoll.nn.positions import positions_of
from atoll.nn.rotary import grid_positions, normed_heads, rotations
from atoll.nn.token_route import TokenRoute
from atoll.plan.cost import forward_flops, sizes_of
from tests.nn.test_dit import POOLED, STATES, B, C, H, L, W, inputs, relative_error

D, HEADS, N = 32, 4, 24
DUALS = [0, 2]
EVERYTHING = {"pooled_dim": POOLED, "size_embedding": True, "bottleneck": 6}


def config(**changes: object) -> MMDiTConfig:
    base = {"size": (H, W), "channels": C, "patch": 2, "width": D, "depth": 3, "heads": HEADS, "states_dim": STATES}
    return MMDiTConfig.model_validate(base | changes)


def random_mmdit(dtype: torch.dtype = torch.float64, **changes: object) -> MMDiT:
    """A network in which nothing is zero, as after training."""
    torch.manual_seed(0)
    network = MMDiT(config(**changes)).to(dtype)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


# Against the description


def reference(network: MMDiT, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """The forward pass of `config(**EVERYTHING)`, token by token and head by head where the network uses tricks."""
    w, dual, d = network.state_dict(), network.config.dual_blocks, D // HEADS

    def norm(v: Tensor) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rms(v: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def sinusoids(t: Tensor) -> Tensor:
        angles = t.double()[:, None] * 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat([angles.cos(), angles.sin()], 1)

    def linear(name: str, v: Tensor) -> Tensor:
        out = torch.einsum("...i,oi->...o", v, w[f"{name}.weight"])
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    def turned(v: Tensor) -> Tensor:  # [N,d] of one head
        out = v.clone()
        for n in range(N):
            place = (n // (W // 2), n % (W // 2))
            for pair in range(d // 2):
                frequency = 10000.0 ** -((pair % (d // 4)) / (d // 4))
                angle = place[pair // (d // 4)] * frequency
                a, b = v[n, 2 * pair], v[n, 2 * pair + 1]
                out[n, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                out[n, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def attend(
        q: Tensor, k: Tensor, v: Tensor, q_text: Tensor | None, k_text: Tensor, v_text: Tensor
    ) -> tuple[Tensor, Tensor]:
        image, text = torch.zeros(B, N, D).double(), torch.zeros(B, L, D).double()
        for b in range(B):
            for head in range(HEADS):
                part, seen = slice(head * d, (head + 1) * d), condition.mask[b]
                keys = torch.cat([rms(k_text[b, seen, part]), turned(rms(k[b, :, part]))])
                values = torch.cat([v_text[b, seen, part], v[b, :, part]])
                image[b, :, part] = (turned(rms(q[b, :, part])) @ keys.T / math.sqrt(d)).softmax(1) @ values
                if q_text is not None:
                    text[b, :, part] = (rms(q_text[b, :, part]) @ keys.T / math.sqrt(d)).softmax(1) @ values
        return image, text

    def mlp(name: str, v: Tensor) -> Tensor:
        gate, up = linear(f"{name}.mlp.gate_up", v).chunk(2, -1)
        return linear(f"{name}.mlp.down", gate * torch.sigmoid(gate) * up)

    def vectors(name: str, prepared: Tensor) -> list[Tensor]:
        return [(w[f"{name}.modulation.table"][i] + prepared[:, i])[:, None] for i in range(6)]

    def gated(name: str, v: Tensor, attended: Tensor, m: list[Tensor]) -> Tensor:
        v = v + m[2] * linear(f"{name}.out", attended)
        return v + m[5] * mlp(name, norm(v) * (1 + m[4]) + m[3])

    hidden = F.silu(linear("conditioner.time.0", sinusoids(time)))
    c = linear("conditioner.time.2", hidden) + linear("conditioner.pooled", condition.pooled)
    c = c + linear("embed_size", sinusoids(torch.tensor([H, W])).flatten())
    prepared = linear("conditioner.shared", F.silu(c)).reshape(B, 6, D)
    tokens = torch.stack(
        [x[:, :, i : i + 2, j : j + 2].permute(0, 2, 3, 1).flatten(1) for i in range(0, H, 2) for j in range(0, W, 2)],
        dim=1,
    )
    tokens = linear("embed.1", linear("embed.0", tokens))
    text = linear("embed_states", condition.states)
    for number in range(3):
        name = f"blocks.{number}"
        if number < dual:
            prepared_text = linear("shared_text", F.silu(c)).reshape(B, 6, D)
            m, m_text = vectors(f"{name}.image", prepared), vectors(f"{name}.text", prepared_text)
            q, k, v = linear(f"{name}.image.qkv", norm(tokens) * (1 + m[1]) + m[0]).split(D, 2)
            q_text, k_text, v_text = linear(f"{name}.text.qkv", norm(text) * (1 + m_text[1]) + m_text[0]).split(D, 2)
            image, own = attend(q, k, v, q_text, k_text, v_text)
            tokens, text = gated(f"{name}.image", tokens, image, m), gated(f"{name}.text", text, own, m_text)
        else:
            m = vectors(name, prepared)
            q, k, v = linear(f"{name}.qkv", norm(tokens) * (1 + m[1]) + m[0]).split(D, 2)
            k_text, v_text = linear(f"{name}.kv", norm(text)).split(D, 2)
            tokens = gated(name, tokens, attend(q, k, v, None, k_text, v_text)[0], m)
    shift, scale = ((w["final_modulation.table"][i] + c)[:, None] for i in range(2))
    tokens = linear("final", norm(tokens) * (1 + scale) + shift)
    out = torch.zeros(B, C, H, W, dtype=x.dtype)
    for n in range(N):
        i, j = 2 * (n // (W // 2)), 2 * (n % (W // 2))
        out[:, :, i : i + 2, j : j + 2] = tokens[:, n].reshape(B, 2, 2, C).permute(0, 3, 1, 2)
    return out


@pytest.mark.parametrize("dual", DUALS)
def test_network_equals_its_description(dual: int) -> None:
    network = random_mmdit(dual_blocks=dual, **EVERYTHING)
    x, time, condition = inputs()
    assert relative_error(network(x, time.double(), condition), reference(network, x, time, condition)) < 1e-12


@pytest.mark.parametrize("rotated", [True, False])
def test_normed_heads_are_torchs_rms_norm_and_a_rotation(rotated: bool) -> None:
    x = torch.randn(2, 6, 3, 8, dtype=torch.float64, requires_grad=True)
    rope = rotations(3 * torch.randn(2, 6, 2, dtype=torch.float64), 8) if rotated else None
    before = x.detach().clone()
    got = normed_heads(x, rope)
    expected = F.rms_norm(x, (8,), eps=1e-6).transpose(1, 2)
    if rope is not None:
        a, b, (cos, sin) = expected[..., ::2], expected[..., 1::2], rope.unbind(-1)
        expected = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous()
    assert torch.equal(x, before)
    assert torch.autograd.gradcheck(lambda x: normed_heads(x, rope), x)


@pytest.mark.slow
def test_compiled_rotation_equals_the_plain_one() -> None:
    """Compiled code has no complex numbers, so it takes another path."""
    x = torch.randn(2, 6, 3, 8, dtype=torch.float64, requires_grad=True)
    rope = rotations(3 * torch.randn(2, 6, 2, dtype=torch.float64), 8)
    got = normed_heads(x, rope)
    compiled = torch.compile(normed_heads, backend="aot_eager", fullgraph=True)
    weights = torch.randn_like(got)
    torch.testing.assert_close(compiled(x, rope), got)
    gradients = [torch.autograd.grad((f(x, rope) * weights).sum(), x)[0] for f in (compiled, normed_heads)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(2, 6, 3, 8), (2, 1, 3, 8), (2, 6, 1, 8)])
def test_normed_heads_leave_their_argument_as_it_is(shape: tuple[int, ...]) -> None:
    """They compute in place, in a copy; with one head or one token, the transposed argument needs none."""
    x = torch.randn(shape)
    before, gradient = x.clone(), torch.randn(shape).transpose(1, 2).contiguous()
    gradient_before = gradient.clone()
    normed_heads(x.requires_grad_(), rotations(torch.ones(shape[1], 2), 8)).backward(gradient)
    assert torch.equal(x, before)
    assert torch.equal(gradient, gradient_before)


def test_norm_and_rotation_are_computed_in_float32() -> None:
    """Rounded once, at the end: the bf16 result is the float32 result of the same numbers, rounded."""
    x = torch.randn(2, 50, 3, 8).bfloat16()
    rope = rotations(100 * torch.rand(50, 2), 8)
    assert torch.equal(normed_heads(x, rope), normed_heads(x.float(), rope).bfloat16())
    assert torch.equal(normed_heads(torch.zeros(1, 2, 1, 8)), torch.zeros(1, 1, 2, 8))


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_parts_equals_torchs(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.nn.attention.CACHED_SCORES", 3 * 4 * 7)  # three heads at a time, of ten
    counts: list[int] = []

    def counted(q: Tensor, *others: Tensor | None) -> Tensor:
        counts.append(q.shape[1])
        return attention_by_products(q, *others)

    monkeypatch.setattr("atoll.nn.attention.attention_by_products", counted)
    q, k, v = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 7, 6), torch.randn(2, 5, 7, 6)
    bias = torch.zeros(2, 1, 1, 7)
    bias[0, ..., 2:4] = -math.inf
    bias = bias if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    low = head_attention(*(x.bfloat16() for x in (q, k, v)), bias if bias is None else bias.bfloat16())
    assert counts == [3, 3, 3, 1]
    assert relative_error(low, expected) < 0.01
    torch.testing.assert_close(head_attention(q, k, v, bias), expected)


# Initialisation


@pytest.mark.parametrize("dual", DUALS)
def test_gates_and_output_are_exactly_zero_at_the_start(dual: int) -> None:
    network = MMDiT(config(dual_blocks=dual, **EVERYTHING))
    x, time, condition = inputs(torch.float32)
    output, first = network(x, time, condition, tap=1)
    _, last = network(x, time, condition, tap=3)
    assert torch.equal(first, last)  # every block is the identity
    assert torch.equal(output, torch.zeros(B, C, H, W))
    if dual:
        prepared, _, prepared_text = network._modulations(x, time, condition.pooled)
        text, bias = network.embed_condition(condition)
        rope = rotations(grid_positions(H // 2, W // 2), D // HEADS)
        tokens = torch.randn(B, N, D)
        for got, own in zip(
            network.blocks[0](tokens, text, prepared, prepared_text, rope, F.pad(bias, (0, N))),
            (tokens, text),
            strict=True,
        ):
            assert torch.equal(got, own)


def test_initialisation_is_dits() -> None:
    torch.manual_seed(0)
    network = MMDiT(config(width=128, states_dim=64, dual_blocks=1, **{**EVERYTHING, "bottleneck": 64}))
    conditioner = network.conditioner
    for layer in (conditioner.time[0], conditioner.time[2], network.embed_size, network.embed_states):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for layer in (network.embed[1], network.blocks[0].text.qkv, network.blocks[1].kv, network.blocks[2].mlp.down):
        bound = math.sqrt(6 / sum(layer.weight.shape))  # Xavier's uniform
        assert 0.95 * bound < layer.weight.abs().max().item() <= bound
    biased = [name for name, _ in network.named_parameters() if name.endswith("bias")]
    assert all(name.startswith(("conditioner.", "shared_text.")) for name in biased)


@pytest.mark.parametrize("dual", DUALS)
def test_training_leaves_the_zero_start(dual: int) -> None:
    network = MMDiT(config(dual_blocks=dual, **EVERYTHING))
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
    x, time, condition = inputs(torch.float32)
    for _ in range(5):
        F.mse_loss(network(x, time, condition), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name, p in network.named_parameters() if torch.equal(p, before[name])]


# Conditioning


@pytest.mark.parametrize("dual", DUALS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])  # both attentions
def test_masked_tokens_change_nothing_and_others_do(dtype: torch.dtype, dual: int) -> None:
    network = random_mmdit(dtype, dual_blocks=dual)
    x, time, condition = inputs(dtype)
    output = network(x, time, condition)
    for masked in (True, False):
        states = condition.states.clone()
        states[~condition.mask if masked else condition.mask] += 10 * torch.arange(STATES)
        assert torch.equal(network(x, time, Condition(states, condition.mask)), output) == masked


@pytest.mark.parametrize("dual", DUALS)
def test_every_sample_has_its_own_time_and_condition(dual: int) -> None:
    network = random_mmdit(dual_blocks=dual, **EVERYTHING)
    x, time, condition = inputs()
    together = network(x, time, condition)
    for i in range(B):
        row = torch.tensor([i])
        torch.testing.assert_close(network(x[row], time[row], condition.index(row)), together[row])
    assert relative_error(network(x, time.flip(0), condition), together) > 1e-3


@pytest.mark.parametrize("dual", DUALS)
def test_a_prompt_is_read_once_and_the_output_is_the_same(dual: int) -> None:
    network = random_mmdit(dual_blocks=dual, pooled_dim=POOLED)
    x, time, condition = inputs()
    read = network.read_prompt(condition)
    assert read.keys_values.shape == ((B, 1, L, D) if dual else (B, 3, L, 2 * D))
    assert torch.equal(network(x, time, read), network(x, time, condition))
    rows = torch.tensor([2, 0, 2])
    expected = network(x, time, condition.index(rows))
    torch.testing.assert_close(network(x, time, read.index(rows)), expected)


@pytest.mark.parametrize("dual", DUALS)
def test_block_cache_skips_what_changed_little(dual: int) -> None:
    network = random_mmdit(dual_blocks=dual, pooled_dim=POOLED)
    x, time, condition = inputs()
    maps = torch.stack([grid_positions(H // 2, W // 2).double() * scale for scale in (1, 0.5, 2)])
    read, exact = network.read_prompt(condition), network(x, time, condition, maps)
    cache = BlockCache(threshold=1e-3)
    cached = type(read)(read.keys_values, read.bias, read.pooled, cache, ("a", "b", "c"))
    torch.testing.assert_close(network(x, time, cached, maps), exact)
    moved = x.clone()
    moved[1] += 1.0  # only this sample is evaluated by all blocks
    torch.testing.assert_close(network(moved, time, cached, maps), network(moved, time, condition, maps))
    assert (cache.calls, cache.skipped) == (6, 2)
    with pytest.raises(AtollError, match=r"a block cache skips blocks: expected no route and no tap"):
        network(x, time, cached, tap=1)


@pytest.mark.parametrize("key", ["pooled_dim", "size_embedding", "bottleneck"])
def test_options_count_where_they_are_configured(key: str) -> None:
    x, time, condition = inputs()
    other = Condition(condition.states, condition.mask, condition.pooled + 1.0)
    network = random_mmdit(**{key: EVERYTHING[key]})
    assert (relative_error(network(x, time, other), network(x, time, condition)) > 1e-3) == (key == "pooled_dim")
    if key == "size_embedding":  # the same tokens at the same places, in a latent of another shape
        places = grid_positions(H // 2, W // 2).double()
        turned = x.reshape(B, C, W, H)
        network.embed.weight.data[:] = 0.1
        same = random_mmdit()
        same.load_state_dict(network.state_dict(), strict=False)
        outputs = [n(v, time, condition, places).flatten(1) for n in (network, same) for v in (x, turned)]
        assert relative_error(outputs[0], outputs[1]) > 1e-3


# Positions, routes and taps


def test_positions_default_to_the_grid_and_may_differ_in_each_row() -> None:
    network = random_mmdit()
    x, time, condition = inputs()
    grid = grid_positions(H // 2, W // 2).double()
    plain = network(x, time, condition)
    assert torch.equal(network(x, time, condition, grid), plain)
    maps = torch.stack([grid, grid * 0.5, grid.flip(0) + 3])
    each = network(x, time, condition, maps)
    torch.testing.assert_close(each[0], plain[0])
    for i in range(B):
        row = torch.tensor([i])
        torch.testing.assert_close(network(x[row], time[row], condition.index(row), maps[i])[0], each[i])
    assert relative_error(each[1], plain[1]) > 1e-3


def test_a_latent_of_another_size_takes_its_own_positions_or_given_ones() -> None:
    network = random_mmdit()
    _, time, condition = inputs()
    x = torch.randn(B, C, 6, 10, dtype=torch.float64)
    own = network(x, time, condition)
    assert torch.equal(network(x, time, condition, positions_of((3, 5), (4, 6))), own)
    assert relative_error(network(x, time, condition, grid_positions(3, 5)), own) > 1e-3
    with pytest.raises(AtollError, match=r"positions: got shape \[24, 2\], expected \[15, 2\] or \[3, 15, 2\]"):
        network(x, time, condition, grid_positions(4, 6))
    with pytest.raises(AtollError, match=r"latent: got shape \[3, 2, 7, 10\], .* multiples of the patch, 2"):
        network(x.new_zeros(B, C, 7, 10), time, condition, grid_positions(3, 5))


@pytest.mark.parametrize("dual", DUALS)
def test_tokens_outside_a_route_pass_blocks_by(dual: int) -> None:
    network = random_mmdit(dual_blocks=dual)
    x, time, condition = inputs()
    kept = torch.stack([torch.randperm(N)[:10] for _ in range(B)])
    route = TokenRoute(1, 2, kept)
    before, after = (network(x, time, condition, route=route, tap=tap)[1] for tap in (1, 2))
    assert after.shape == (B, 10, D)  # within the route
    _, last = network(x, time, condition, route=TokenRoute(1, 3, kept), tap=3)
    assert last.shape == (B, 10, D)
    # Tokens that were not kept are as before the route; with no block after it, the last layer shows that.
    output = network(x, time, condition, route=TokenRoute(1, 3, kept))
    skipped = torch.ones(B, N, dtype=torch.bool).scatter(1, kept, False)
    direct = network(x, time, condition, route=TokenRoute(1, 3, kept.flip(1)))
    torch.testing.assert_close(direct, output)  # the order of the kept tokens does not matter
    c = network.conditioner(time, None, torch.float64)[1]
    shift, scale = network.final_modulation(c, torch.float64).unbind(1)
    expected = network.final(F.layer_norm(before, (D,), eps=1e-6) * (1 + scale) + shift)
    tokens = output.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(B, N, -1)
    torch.testing.assert_close(tokens[skipped], expected[skipped])
    assert relative_error(tokens[~skipped], expected[~skipped]) > 1e-3


@pytest.mark.parametrize("dual", DUALS)
def test_a_route_of_all_tokens_changes_nothing(dual: int) -> None:
    network = random_mmdit(dual_blocks=dual)
    x, time, condition = inputs()
    every = torch.stack([torch.randperm(N) for _ in range(B)])
    output = network(x, time, condition, route=TokenRoute(0, 3, every))
    torch.testing.assert_close(output, network(x, time, condition))


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"tap": 4}, r"tap: got 4, expected a number of blocks from 1 to 3"),
        ({"route": TokenRoute(2, 2, torch.zeros(B, 4).long())}, r"route: got blocks 2..2, expected 0 <= first < last"),
        ({"route": TokenRoute(0, 2, torch.zeros(2, 4).long())}, r"route: got kept tokens of shape \[2, 4\]"),
    ],
)
def test_wrong_hooks_are_named(hook: dict[str, object], message: str) -> None:
    with pytest.raises(AtollError, match=message):
        random_mmdit()(*inputs(), **hook)


# Arithmetic


@pytest.mark.parametrize("dual", DUALS)
def test_bfloat16_is_close_to_float32_and_the_output_keeps_the_dtype_of_x(dual: int) -> None:
    network = random_mmdit(torch.float32, dual_blocks=dual, **EVERYTHING)
    x, time, condition = inputs(torch.float32)
    exact = network(x, time, condition)
    seen: list[torch.dtype] = []
    for block in network.blocks:
        block.register_forward_hook(
            lambda module, args, output: seen.append((output[0] if isinstance(module, DualBlock) else output).dtype)
        )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x, time, condition)
    assert seen == [torch.bfloat16] * 3  # one dtype between the blocks
    low = copy.deepcopy(network).bfloat16()(x, time, condition)
    for output in (mixed, low):
        assert output.dtype == torch.float32
        assert 1e-5 < relative_error(output, exact) < 0.03  # the lower bound: it did run in bfloat16


@pytest.mark.parametrize("dual", DUALS)
def test_time_is_not_rounded_under_autocast(dual: int) -> None:
    network = random_mmdit(torch.float32, dual_blocks=dual, **EVERYTHING)
    x, _, condition = inputs(torch.float32)
    time = torch.tensor([998.0, 999.0, 998.5])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network._modulations(x, time, condition.pooled)
    exact = copy.deepcopy(network).double()._modulations(x.double(), time.double(), condition.pooled.double())
    for got, expected in zip(mixed[: 2 + (dual > 0)], exact, strict=False):
        assert relative_error(got, expected) < 1e-5  # bfloat16 would be off by 1e-3
    assert len(mixed[0].flatten(1).unique(dim=0)) == B


@pytest.mark.parametrize("dual", DUALS)
def test_gradients_under_autocast_are_close_to_float32(dual: int) -> None:
    network = random_mmdit(torch.float32, dual_blocks=dual, pooled_dim=POOLED)
    x, time, condition = inputs(torch.float32)

    def gradient(enabled: bool) -> Tensor:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = network(x, time, condition)
        F.mse_loss(output, x).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    assert relative_error(gradient(True), gradient(False)) < 0.03


@pytest.mark.parametrize("dual", [0, 1])
def test_gradients_are_exact(dual: int) -> None:
    network = random_mmdit(depth=2, dual_blocks=dual, pooled_dim=POOLED)
    x, time, condition = inputs()
    states = condition.states.requires_grad_()

    def call(x: Tensor, states: Tensor) -> Tensor:
        return network(x, time, Condition(states, condition.mask, condition.pooled))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), states), fast_mode=True)


# Sizes and configurations


def count(name: str, **more: object) -> int:
    with torch.device("meta"):
        fields = {"size": (32, 32), "channels": 4, "states_dim": 768, **MMDIT_SIZES[name], **more}
        return sum(p.numel() for p in MMDiT(MMDiTConfig.model_validate(fields)).parameters())


@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", 1.3), ("S/2", 29.8), ("B/2", 118.2), ("L/2", 411.4), ("XL/2", 605.3)]
)
def test_sizes_have_the_flops_of_dits_of_the_same_name(name: str, millions: float) -> None:
    assert count(name) / 1e6 == pytest.approx(millions, abs=0.06)
    fields = {"size": (32, 32), "channels": 4, "states_dim": 768}
    own = forward_flops(sizes_of({"name": "mmdit", **fields, **MMDIT_SIZES[name]}, 77))
    assert own == pytest.approx(forward_flops(sizes_of({"name": "dit", **fields, **SIZES[name]}, 77)), rel=0.005)


def test_the_expert_of_ddm_has_the_published_number_of_parameters() -> None:
    """Eight of 3 B make the paper's 24 B (arXiv 2501.05450): width 2560, depth 30, read by T5-XL."""
    parameters = count("3B/2", channels=16, states_dim=2048)
    assert parameters / 1e9 == pytest.approx(3.0, abs=0.005)
    assert 8 * parameters / 1e9 == pytest.approx(24, abs=0.05)
    assert count("3B/2", channels=16, states_dim=2048, dual_blocks=29) / 1e9 == pytest.approx(5.1, abs=0.05)


def test_hidden_width_is_a_multiple_of_8() -> None:
    assert [hidden_width(*of) for of in ((768, 10 / 3), (1024, 10 / 3), (1152, 10 / 3), (4, 1.0))] == [
        2560,
        3416,
        3840,
        8,
    ]


def test_a_network_from_its_saved_configuration_and_weights_is_the_same() -> None:
    network = random_mmdit(torch.float32, dual_blocks=1, **EVERYTHING)
    with torch.device("meta"):  # as large experts are loaded: nothing may be left there
        loaded = build_network(network.config.model_dump(mode="json"))
    loaded.load_state_dict(network.state_dict(), assign=True)
    x, time, condition = inputs(torch.float32)
    assert torch.equal(loaded(x, time, condition), network(x, time, condition))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [8, 9]}, r"size 8x9, patch 2: .*divide"),
        ({"heads": 5}, r"width 32, heads 5: .*divide"),
        ({"width": 24}, r"width 24, heads 4: each head is 6 wide; rotary positions need a multiple of 4"),
        ({"dual_blocks": 3}, r"dual_blocks 3, depth 3: the last block only reads the text; take at most 2"),
        ({"dual_blocks": -1}, r"dual_blocks: got -1, .*greater than or equal to 0"),
        ({"bottleneck": 0}, r"bottleneck: got 0, .*greater than 0"),
        ({"bottleneck": 10**6}, r"bottleneck: got 1000000, .*less than or equal to 65536"),
        ({"modulation": "single"}, r"modulation: unknown key"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(AtollError, match=message):
        build_network(config().model_dump(mode="json") | changes)


def test_wrong_inputs_are_named() -> None:
    network = random_mmdit(pooled_dim=POOLED)
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


# Checkpointing


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dual", DUALS)
def test_checkpointing_gives_the_same_gradients_and_holds_less(dual: int, autocast: bool) -> None:
    """Held: what the forward pass took and has not given back."""
    held, gradients = {}, {}
    for checkpointing in ("none", "selective", "full"):
        network = random_mmdit(torch.float32, dual_blocks=dual, pooled_dim=POOLED)
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
    assert held["selective"] < 0.8 * held["none"]
    assert held["full"] < 0.9 * held["selective"]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients() -> None:
    gradients = []
    for compiled in (False, True):
        network = random_mmdit(torch.float32, depth=2, dual_blocks=1)
        for block in network.blocks:
            block.checkpointing = "selective"
            if compiled:
                block.compile(fullgraph=True)
        network(*inputs(torch.float32)).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
