"""The shapes that docstrings promise, checked at run time: every letter must be one number throughout a call."""

import pytest
import torch
from beartype import beartype
from jaxtyping import Bool, Float, TypeCheckError, jaxtyped
from torch import Tensor

from atoll.condition import Condition
from atoll.encoders.text import HashEncoder
from atoll.ensemble import Ensemble, Expert
from atoll.nn import DiT, DiTConfig, Router, RouterConfig
from atoll.objective import Objective

CAPTIONS = ["moss", "sand rain", "rust moss sand"]  # B = 3, H = 4, W = 8
ENCODER = HashEncoder(dim=6, length=5)
CONFIG = DiTConfig(size=(4, 8), channels=2, patch=2, width=16, depth=1, heads=2, states_dim=6, pooled_dim=6)
ROUTER = RouterConfig(size=(4, 8), channels=2, patch=2, width=16, depth=1, heads=2, clusters=2, pooled_dim=6)


@jaxtyped(typechecker=beartype)
def denoise(network, x: Float[Tensor, "B C H W"], time: Float[Tensor, " B"], condition) -> Float[Tensor, "B C H W"]:
    return network(x, time, condition)


@jaxtyped(typechecker=beartype)
def route(
    router, x: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], pooled: Float[Tensor, "B P"]
) -> Float[Tensor, "B 2"]:
    return router(x, t, pooled)


@jaxtyped(typechecker=beartype)
def fuse(ensemble, x: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], condition) -> Float[Tensor, "B C H W"]:
    return ensemble.velocity(x, t, condition, guidance_scale=2.0)


@jaxtyped(typechecker=beartype)
def solve(
    objective, output: Float[Tensor, "B C H W"], x: Float[Tensor, "B C H W"], t: Float[Tensor, " B"]
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    return objective.to_x0_eps(output, x, t)


@jaxtyped(typechecker=beartype)
def loss(objective, x: Float[Tensor, "B C H W"], t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    return objective.loss(x, x, x, t)


@jaxtyped(typechecker=beartype)
def parts(condition: Condition) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"], Float[Tensor, "B D"]]:
    assert condition.pooled is not None
    return condition.states, condition.mask, condition.pooled


def test_shapes_are_what_the_letters_say() -> None:
    x, t, condition = torch.randn(3, 2, 4, 8), torch.rand(3), ENCODER(CAPTIONS)
    parts(condition)
    network, router = DiT(CONFIG), Router(ROUTER)
    denoise(network, x, t, condition)
    route(router, x, t, condition.pooled)
    for prediction in ("eps", "x0", "v", "flow"):
        objective = Objective(prediction, "cosine")
        solve(objective, x, x, t)
        loss(objective, x, t)
    experts = [Expert(network, Objective("flow", "linear"), (k,)) for k in range(2)]
    fuse(Ensemble(experts, router, routing="top-1", null=(ENCODER.null(1),)), x, t, condition)


def test_the_check_can_fail() -> None:
    with pytest.raises(TypeCheckError):
        denoise(lambda x, time, condition: x[:, :, :, :4], torch.randn(3, 2, 4, 8), torch.rand(3), None)
