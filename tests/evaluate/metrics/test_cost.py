"""The operation counter against a count by hand, with and without fused attention, and its limits."""

from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert
from atoll.errors import AtollError
from atoll.evaluate.metrics.cost import count_flops
from atoll.nn import DiT, DiTConfig
from atoll.objective import Objective
from atoll.schedule import Linear
from atoll.solver import sample

HEIGHT, WIDTH, CHANNELS, PATCH, D, HEADS, DEPTH, STATES, TOKENS = 8, 12, 3, 2, 32, 4, 2, 10, 5
STEPS, IMAGES = 3, 7


def network() -> DiT:
    torch.manual_seed(0)
    sizes = {"size": (HEIGHT, WIDTH), "channels": CHANNELS, "patch": PATCH, "width": D, "depth": DEPTH, "heads": HEADS}
    return DiT(DiTConfig(**sizes, mlp_ratio=4.0, states_dim=STATES)).requires_grad_(False)


def condition(batch: int) -> Condition:
    return Condition(torch.randn(batch, TOKENS, STATES), torch.ones(batch, TOKENS, dtype=torch.bool))


def by_hand() -> int:
    """One forward pass of one image. A product of [a,b] and [b,c] takes a*b*c multiply-adds, each counted as 2."""
    N, L = HEIGHT // PATCH * (WIDTH // PATCH), TOKENS
    pixels = PATCH * PATCH * CHANNELS
    time = 256 * D + D * D + D * 6 * D  # sine features, MLP, the six modulations that all blocks share
    ends = N * pixels * D + N * D * pixels + L * STATES * D  # patches in and out, text
    own = N * D * 3 * D + N * N * D + N * N * D + N * D * D  # q k v; q.k; weights . v; out
    text = N * D * D + L * D * 2 * D + N * L * D + N * L * D + N * D * D
    mlp = N * D * 4 * D + N * 4 * D * D
    return 2 * (time + ends + DEPTH * (own + text + mlp))


def attention_by_hand() -> int:
    N = HEIGHT // PATCH * (WIDTH // PATCH)
    return 2 * DEPTH * 2 * (N * N * D + N * TOKENS * D)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cost_of_a_dit_equals_the_count_by_hand(grad, dtype) -> None:
    """In float32 attention is the fused kernel, in bfloat16 on a CPU plain products: the count is one."""
    dit = network().to(dtype)
    x, given = torch.randn(IMAGES, CHANNELS, HEIGHT, WIDTH), condition(IMAGES)

    def draw() -> None:
        with grad():
            for t in (0.9, 0.6, 0.3):
                dit(x, torch.full((IMAGES,), t), given)

    assert count_flops(draw, IMAGES).flops == STEPS * by_hand()


def test_operations_by_operator() -> None:
    dit = network()
    cost = count_flops(lambda: dit(torch.randn(5, CHANNELS, HEIGHT, WIDTH), torch.rand(5), condition(5)), 5)
    fused = {name: flops for name, flops in cost.by_operator.items() if "attention" in name}
    assert sum(fused.values()) == attention_by_hand()
    assert sum(cost.by_operator.values()) == cost.flops
    assert list(cost.by_operator.values()) == sorted(cost.by_operator.values(), reverse=True)
    assert cost.gflops == cost.flops / 1e9


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 1), (3.0, 2)])
def test_sampling_costs_its_steps_and_both_guidance_branches(guidance, calls) -> None:
    expert = Expert(network(), Objective("flow", Linear()), clusters=(0,))
    ensemble = Ensemble([expert], None, "full", null=(condition(1),))
    given, noise = condition(IMAGES), torch.randn(IMAGES, CHANNELS, HEIGHT, WIDTH)

    def draw() -> None:
        with torch.inference_mode():
            sample(lambda x, t: ensemble.velocity(x, t, given, guidance), noise, STEPS, "euler")

    assert count_flops(draw, IMAGES).flops == STEPS * calls * by_hand()


def test_convolutions_and_masked_attention_count_in_full() -> None:
    conv = nn.Conv2d(3, 5, (3, 1), bias=False)
    assert count_flops(lambda: conv(torch.randn(2, 3, 8, 7)), 2).flops == 2 * 5 * 6 * 7 * 3 * 3
    q, k = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 7, 6)
    mask = torch.zeros(2, 1, 1, 7).masked_fill_(torch.arange(7) > 2, -torch.inf)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask), 2).flops == 3 * 4 * 7 * 6 * 4


def test_operations_that_cannot_be_counted_are_refused() -> None:
    def elsewhere() -> None:
        thread = Thread(target=lambda: torch.randn(3, 4) @ torch.randn(4, 5))
        thread.start()
        thread.join()

    with pytest.raises(AtollError, match=r"no operations were counted.*draw them eagerly"):
        count_flops(elsewhere, 3)
    with pytest.raises(ValueError, match="the cost of 0 images"):
        count_flops(lambda: None, 0)
