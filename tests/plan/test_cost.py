"""The formulas against the network itself: parameters exactly, FLOPs by torch's counter, activations by autograd."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import atoll.nn.attention
import atoll.nn.dit
import atoll.nn.joint_blocks
import atoll.nn.mmdit
from atoll.condition import Condition
from atoll.nn import SIZES, DiT, MMDiT, Router, RouterConfig, build_network
from atoll.nn.token_route import TokenRoute
from atoll.plan.cost import (
    DiTSizes,
    NetworkSizes,
    RouterSizes,
    activation_bytes,
    block_parameters,
    fixed_bytes,
    forward_flops,
    gradient_bytes,
    largest_tensor,
    parameters,
    router_flops,
    router_parameters,
    training_flops,
    uncast,
)
from atoll.plan.mmdit_cost import MMDiTSizes, RoutedBlocks, mmdit_forward_flops
from atoll.plan.rules import CPU_BF16, CUDA_BF16, FP32, Rules

MIB = 2**20
XL = DiTSizes.from_config({"size": (32, 32), "channels": 4, "states_dim": 768, **SIZES["XL/2"]}, tokens=77)
SMALL = DiTSizes(
    size=(8, 12), channels=3, patch=2, width=64, depth=3, heads=4, mlp_ratio=3.0, states_dim=40, tokens=7, pooled_dim=20
)
LONG = replace(SMALL, size=(24, 28), tokens=130, pooled_dim=None)  # rows of attention that are not short

networks = st.builds(
    DiTSizes,
    size=st.sampled_from([(8, 4), (4, 12), (16, 8)]),
    channels=st.integers(1, 5),
    patch=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([16, 48, 64]),
    depth=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 4]),
    mlp_ratio=st.sampled_from([1.0, 2.5, 4.0]),
    states_dim=st.integers(1, 40),
    tokens=st.integers(1, 9),
    pooled_dim=st.none() | st.integers(1, 30),
    modulation=st.sampled_from(["single", "per-block"]),
    final=st.sampled_from([None, "single", "per-block"]),
    text_layers=st.sampled_from([1, 2]),
)


SMALL_MM = MMDiTSizes(
    size=(8, 12), channels=3, patch=2, width=64, depth=3, heads=4, mlp_ratio=3.0, states_dim=40, tokens=7, pooled_dim=20
)
LONG_MM = replace(SMALL_MM, size=(24, 28), tokens=130, pooled_dim=None)
mmdits = st.builds(
    MMDiTSizes,
    size=st.sampled_from([(8, 4), (4, 12), (16, 8)]),
    channels=st.integers(1, 5),
    patch=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([16, 48, 64]),
    depth=st.integers(2, 4),
    heads=st.sampled_from([1, 2, 4]),
    mlp_ratio=st.sampled_from([1.0, 8 / 3, 10 / 3]),
    states_dim=st.integers(1, 40),
    tokens=st.integers(1, 9),
    pooled_dim=st.none() | st.integers(1, 30),
    dual_blocks=st.integers(0, 1),
    size_embedding=st.booleans(),
    bottleneck=st.none() | st.integers(1, 9),
)


def build(n: NetworkSizes, device: str = "cpu") -> DiT | MMDiT:
    with torch.device(device):
        config = {"name": n.name, **{key: value for key, value in asdict(n).items() if key != "tokens"}}
        return build_network(config)  # type: ignore[return-value]


def forward(network: DiT | MMDiT, n: NetworkSizes, batch: int, **options: object) -> torch.Tensor:
    device = network.final.weight.device
    pooled = torch.randn(batch, n.pooled_dim, device=device) if n.pooled_dim else None
    mask = torch.ones(batch, n.tokens, dtype=torch.bool, device=device)
    condition = Condition(torch.randn(batch, n.tokens, n.states_dim, device=device), mask, pooled)
    x = torch.randn(batch, n.channels, *n.size, device=device)
    return network(x, torch.rand(batch, device=device), condition, **options)


@settings(max_examples=40)
@given(networks | mmdits)
def test_parameters_exactly(n: NetworkSizes) -> None:
    network = build(n, "meta")
    assert parameters(n) == sum(p.numel() for p in network.parameters())
    in_float32 = ("table", "conditioner", "shared_text", "embed_size") if n.name == "mmdit" else ("table",)
    assert uncast(n) == sum(p.numel() for name, p in network.named_parameters() if any(k in name for k in in_float32))
    assert largest_tensor(n) == max(p.numel() for p in network.parameters())
    for number, block in enumerate(network.blocks):
        assert block_parameters(n, number) == sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_named_sizes(size: str) -> None:
    n = DiTSizes.from_config({"size": (32, 32), "channels": 4, "states_dim": 768, **SIZES[size]}, tokens=77)
    assert parameters(n) == sum(p.numel() for p in build(n, "meta").parameters())


@settings(max_examples=20)
@given(networks | mmdits)
def test_flops_by_the_counter(n: NetworkSizes) -> None:
    """Under bf16 on a CPU attention is two plain products, which torch's counter sees."""
    network = build(n).bfloat16()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(network, n, batch=3)
    assert counter.get_total_flops() == 3 * forward_flops(n)


@pytest.mark.parametrize("n", [SMALL, SMALL_MM, replace(SMALL_MM, dual_blocks=2)])
def test_flops_of_a_training_step(n: NetworkSizes) -> None:
    network = build(n).bfloat16()
    with FlopCounterMode(display=False) as counter:
        forward(network, n, batch=5).sum().backward()
    # The first layers need no gradient of their input, which is the difference.
    assert counter.get_total_flops() == pytest.approx(5 * training_flops(n), rel=0.02)
    assert training_flops(n, "full") == 4 * forward_flops(n)


@pytest.mark.parametrize("dual", [0, 2])
def test_flops_of_routed_tokens(dual: int) -> None:
    n, route = replace(SMALL_MM, dual_blocks=dual), RoutedBlocks(first=1, last=3, kept=9, share=0.75)
    network, kept = build(n).bfloat16(), torch.arange(9).expand(5, 9)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(network, n, batch=5, route=TokenRoute(1, 3, kept))
    routed = mmdit_forward_flops(n, route)
    assert counter.get_total_flops() == 5 * routed < 5 * forward_flops(n)
    # The mean over all steps, of which three quarters are routed.
    assert training_flops(n, route=route) == pytest.approx(3 * (0.75 * routed + 0.25 * forward_flops(n)))
    assert training_flops(n, "full", route) == pytest.approx(4 / 3 * training_flops(n, route=route))
    assert mmdit_forward_flops(n, replace(route, kept=n.image_tokens)) == forward_flops(n)


def test_fused_attention_is_counted_though_the_counter_misses_it_on_a_cpu() -> None:
    network = build(LONG)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(network, LONG, batch=3)
    scores = 4 * LONG.image_tokens * LONG.width * (LONG.image_tokens + LONG.tokens)  # q k^T and its product with v
    assert counter.get_total_flops() + 3 * LONG.depth * scores == 3 * forward_flops(LONG)


def saved_bytes(network: DiT | MMDiT, n: NetworkSizes, bf16: bool) -> float:
    """Bytes that autograd keeps per sample: distinct storages, by the difference of two batches."""

    def saved(batch: int) -> int:
        kept: list[torch.Tensor] = []
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept.append(tensor)  # or its memory would be given to the next one
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = forward(network, n, batch)
        assert output.requires_grad
        return sum(seen.values())

    return (saved(5) - saved(3)) / 2


VARIANTS = [
    SMALL,
    LONG,
    replace(SMALL, modulation="per-block"),
    replace(SMALL, text_layers=2, final="per-block"),
    replace(SMALL, modulation="per-block", final="single", depth=1),
    SMALL_MM,
    replace(LONG_MM, dual_blocks=1),
    replace(SMALL_MM, dual_blocks=2, size_embedding=True, bottleneck=9),
]


@pytest.mark.parametrize("n", VARIANTS)
@pytest.mark.parametrize(("rules", "bf16"), [(CPU_BF16, True), (FP32, False)])
def test_activations_are_what_autograd_keeps(n: NetworkSizes, rules: Rules, bf16: bool) -> None:
    assert activation_bytes(n, rules) == pytest.approx(saved_bytes(build(n), n, bf16), rel=0.002)


@pytest.mark.parametrize("n", VARIANTS)
def test_activations_under_the_rules_of_cuda(n: NetworkSizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast, done by hand on the CPU: layer_norm in float32, addcmul in the widest type, fused attention."""

    def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
        return torch.addcmul(shift.float(), normed, (1 + scale).float())

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)

    def in_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    for module in (atoll.nn.dit, atoll.nn.joint_blocks, atoll.nn.mmdit):
        monkeypatch.setattr(module, "modulate", modulate)
    monkeypatch.setattr(atoll.nn.mmdit, "norm", norm)
    monkeypatch.setattr(atoll.nn.joint_blocks, "head_attention", in_one)
    monkeypatch.setattr(atoll.nn.attention, "attention_by_products", fused)
    assert activation_bytes(n, CUDA_BF16) == pytest.approx(saved_bytes(build(n), n, bf16=True), rel=0.002)


def test_the_figures_of_xl2_from_first_principles() -> None:
    """Measured on GPUs: 289 and 868 GFLOP, 440 MiB, 375 compiled, 34 checkpointed, 13.35 GB fixed."""
    assert parameters(XL) == 605_675_536
    assert forward_flops(XL) == pytest.approx(289e9, rel=0.01)
    assert training_flops(XL) == pytest.approx(868e9, rel=0.01)
    assert activation_bytes(XL, CUDA_BF16) == pytest.approx(440 * MIB, rel=0.02)
    assert activation_bytes(XL, CUDA_BF16, compiled=True) == pytest.approx(375 * MIB, rel=0.02)
    assert activation_bytes(XL, CUDA_BF16, "full") == pytest.approx(34 * MIB, rel=0.03)
    assert fixed_bytes(XL, CUDA_BF16) == pytest.approx(13.35e9, rel=0.01)
    assert 20 * parameters(XL) == pytest.approx(12.1e9, rel=0.01) == fixed_bytes(XL, FP32)


def test_what_each_switch_saves() -> None:
    plain = fixed_bytes(XL, CUDA_BF16)
    assert plain - fixed_bytes(XL, CUDA_BF16, "bf16") == 4 * parameters(XL)
    assert plain - fixed_bytes(XL, CUDA_BF16, "8bit") == pytest.approx(6 * parameters(XL), rel=0.01)
    assert plain - fixed_bytes(XL, CUDA_BF16, "fp32", "cpu") == 4 * parameters(XL)
    # A fused backward pass holds the largest tensor's gradient, or those of a compiled block.
    assert gradient_bytes(XL, fused_backward=True) == 4 * 6 * 1152**2
    assert gradient_bytes(XL, fused_backward=True, compiled=True) == 4 * block_parameters(XL, 0)
    for compiled in (False, True):
        none, selective, full = (
            activation_bytes(XL, CUDA_BF16, c, compiled) for c in ("none", "selective", "full")
        )  # fmt: skip
        assert none > 1.4 * selective > 5 * full


@settings(max_examples=25)
@given(
    st.builds(
        RouterSizes,
        size=st.sampled_from([(8, 4), (4, 12)]),
        channels=st.integers(1, 5),
        patch=st.sampled_from([1, 2]),
        width=st.sampled_from([16, 48]),
        depth=st.integers(1, 3),
        mlp_ratio=st.sampled_from([1.0, 4.0]),
        clusters=st.integers(2, 9),
        pooled_dim=st.none() | st.integers(1, 30),
        modulation=st.sampled_from(["single", "per-block"]),
        block=st.sampled_from(["dit", "mmdit"]),
    )
)
def test_router_exactly(n: RouterSizes) -> None:
    router = Router(RouterConfig(**asdict(n), heads=2)).bfloat16()
    assert router_parameters(n) == sum(p.numel() for p in router.parameters())
    pooled = torch.randn(3, n.pooled_dim) if n.pooled_dim else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        router(torch.randn(3, n.channels, *n.size), torch.rand(3), pooled)
    assert counter.get_total_flops() == 3 * router_flops(n)


def test_published_router() -> None:
    n = RouterSizes((32, 32), 4, 2, 768, 12, 4.0, 8)
    assert router_parameters(n) == pytest.approx(129e6, rel=0.01)
