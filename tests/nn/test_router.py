"""The router: probabilities, and everything that it reads has a say in them."""

import math

import pytest
import torch
from torch import Tensor, nn

from atoll.errors import AtollError
from atoll.nn import SIZES, Router, RouterConfig, build_network
from atoll.nn.dit import ModulationKind
from atoll.nn.rotary import grid_positions, rotations

KINDS: list[ModulationKind] = ["single", "per-block"]
BLOCKS = ["dit", "mmdit"]
B, C, H, W, K, POOLED = 3, 2, 8, 12, 5, 7


def config(**changes: object) -> RouterConfig:
    base = {"size": (H, W), "channels": C, "patch": 2, "width": 32, "depth": 2, "heads": 4, "clusters": K}
    return RouterConfig.model_validate(base | changes)


def random_router(dtype: torch.dtype = torch.float64, **changes: object) -> Router:
    torch.manual_seed(0)
    router = Router(config(**changes)).to(dtype)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.2)
    return router


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, C, H, W, generator=g, dtype=dtype)
    return x, torch.tensor([0.0, 0.4, 1.0]), torch.randn(B, POOLED, generator=g, dtype=dtype)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_clusters_are_equally_likely_at_the_start(kind: ModulationKind, block: str) -> None:
    x, t, _ = inputs(torch.float32)
    torch.testing.assert_close(Router(config(modulation=kind, block=block))(x, t), torch.full((B, K), -math.log(K)))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_log_probabilities_per_sample(kind: ModulationKind, block: str) -> None:
    router = random_router(modulation=kind, block=block, pooled_dim=POOLED)
    x, t, pooled = inputs()
    together = router(x, t, pooled)
    assert together.shape == (B, K)
    torch.testing.assert_close(together.exp().sum(1), torch.ones(B, dtype=torch.float64))
    for i in range(B):
        torch.testing.assert_close(router(x[i : i + 1], t[i : i + 1], pooled[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("block", BLOCKS)
def test_latent_time_and_pooled_vector_all_count(block: str) -> None:
    router = random_router(block=block, pooled_dim=POOLED)
    x, t, pooled = inputs()
    output = router(x, t, pooled)
    rolled = x.roll(2, dims=3)  # the same tokens at other positions
    for other in (router(x.flip(0), t, pooled), router(rolled, t, pooled), router(x, t.flip(0), pooled)):
        assert (other - output).abs().max() > 1e-2
    assert (router(x, t, pooled + 1) - output).abs().max() > 1e-2
    without = random_router()
    assert torch.equal(without(x, t, pooled), without(x, t))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_head_reads_the_cls_token(block: str) -> None:
    router = Router(config(block=block))
    nn.init.normal_(router.head.weight)
    x, t, _ = inputs(torch.float32)
    assert torch.equal(router(x, t), router(x + 1, t))  # every block is still the identity: nothing reaches it


def test_mmdits_blocks_rotate_the_patches_by_their_place_and_cls_not_at_all() -> None:
    (rope,) = random_router(block="mmdit")._rope(inputs()[0], (4, 6))
    assert torch.equal(rope[..., 0, :, 0], torch.ones(1, 1, 4).double())
    torch.testing.assert_close(rope[..., 1:, :, :], rotations(grid_positions(H // 2, W // 2).double(), 8))


def test_time_is_scaled_inside() -> None:
    x, t, _ = inputs()
    router, unscaled = random_router(), random_router(time_scale=1.0)
    torch.testing.assert_close(router(x, t), unscaled(x, t * 999.0))


@pytest.mark.parametrize("block", BLOCKS)
def test_log_probabilities_are_float32_in_bfloat16_and_close(block: str) -> None:
    router = random_router(torch.float32, block=block)
    x, t, _ = inputs(torch.float32)
    exact = router(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x, t)
    low = router.bfloat16()(x, t)
    for output in (mixed, low):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, exact, rtol=0.05, atol=0.05)
        torch.testing.assert_close(output.exp().sum(1), torch.ones(B))


@pytest.mark.parametrize("block", BLOCKS)
def test_it_learns(block: str) -> None:
    torch.manual_seed(0)
    router = Router(config(clusters=2, block=block))
    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-3)
    labels = torch.arange(10) % 2
    x = 0.3 * torch.randn(10, C, H, W)
    x[labels == 1, :, : H // 2] += 1.0  # the upper half is bright
    for _ in range(30):
        loss = nn.functional.nll_loss(router(x, torch.full((10,), 0.5)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_b2_has_the_published_size() -> None:
    with torch.device("meta"):
        router = Router(RouterConfig(size=(32, 32), channels=4, clusters=8, **SIZES["B/2"]))
    assert sum(p.numel() for p in router.parameters()) == 129_529_352


@pytest.mark.parametrize("block", BLOCKS)
def test_a_router_from_its_saved_configuration_and_weights_is_the_same(block: str) -> None:
    router = random_router(torch.float32, block=block, pooled_dim=POOLED)
    with torch.device("meta"):
        loaded = build_network(router.config.model_dump(mode="json"))
    loaded.load_state_dict(router.state_dict(), assign=True)
    x, t, pooled = inputs(torch.float32)
    assert torch.equal(loaded(x, t, pooled), router(x, t, pooled))


def test_wrong_sizes_and_inputs_are_named() -> None:
    with pytest.raises(AtollError, match=r"size 8x9, patch 2: .*divide"):
        config(size=(8, 9))
    with pytest.raises(AtollError, match=r"width 32, heads 5"):
        config(heads=5)
    with pytest.raises(AtollError, match=r"width 24, heads 4: each head is 6 wide"):
        config(width=24, block="mmdit")
    with pytest.raises(AtollError, match=r"^network 'router': clusters: got 0, .*greater than 0; correct"):
        build_network(config().model_dump() | {"clusters": 0})
    router = random_router(pooled_dim=POOLED)
    x, t, pooled = inputs()
    with pytest.raises(AtollError, match=r"latent: got shape \[3, 1, 8, 12\], expected \[B, 2, H, W\]"):
        router(x[:, :1], t, pooled)
    with pytest.raises(AtollError, match=r"time: got shape \[3, 1\], expected \[3\]"):
        router(x, t[:, None], pooled)
    with pytest.raises(AtollError, match=r"pooled vector: got none, expected 7 wide"):
        router(x, t)
