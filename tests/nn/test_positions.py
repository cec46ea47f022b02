"""Positions of tokens: the same centre, step and area in every size; networks at several sizes."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.nn import DiT, MMDiT, Router, RouterConfig
from atoll.nn.positions import positions_of, sincos, sincos_positions
from atoll.nn.rotary import grid_positions
from tests.nn.test_dit import B, C, inputs, random_dit, relative_error
from tests.nn.test_mmdit import random_mmdit

GRIDS = st.tuples(st.integers(1, 40), st.integers(1, 40))
OTHER = (6, 16)  # H and W; the networks' own size is 8 x 12


@given(GRIDS, GRIDS)
def test_grids_share_centre_area_and_aspect(grid, base) -> None:
    positions = positions_of(grid, base).reshape(*grid, 2)
    assert positions.dtype == torch.float32
    assert torch.allclose(positions.mean((0, 1)), (torch.tensor(base) - 1) / 2, atol=1e-4)
    # One step in both directions, that of equal area.
    step = math.sqrt(math.prod(base) / math.prod(grid))
    for axis in range(2):
        steps = positions.diff(dim=axis)
        expected = torch.zeros_like(steps)
        expected[..., axis] = step
        assert torch.allclose(steps, expected, atol=1e-4)
    assert math.prod(n * step for n in grid) == pytest.approx(math.prod(base))


@given(GRIDS)
def test_the_own_grid_has_whole_numbers(grid) -> None:
    assert torch.equal(positions_of(grid, grid), grid_positions(*grid))
    assert torch.equal(sincos(positions_of(grid, grid), 16), sincos_positions(*grid, 16))


@given(GRIDS, st.integers(2, 4))
def test_a_larger_grid_stays_within_the_base(base, factor) -> None:
    large = tuple(factor * n for n in base)
    positions = positions_of(large, base)
    assert positions.min() > -0.5
    assert (positions.amax(0) < torch.tensor(base) - 0.5).all()
    # Each token of the base is the mean of those that now cover its place.
    cells = positions.reshape(base[0], factor, base[1], factor, 2).mean((1, 3)).flatten(0, 1)
    assert torch.allclose(cells, grid_positions(*base), atol=1e-4)


def latents(size=OTHER):
    _, time, condition = inputs()
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, C, *size, generator=generator, dtype=torch.float64), time, condition


def test_dit_computes_any_size_by_its_formula() -> None:
    network = random_dit()
    x, time, condition = latents()
    # The same weights in a network of that size, whose base is the old one.
    other = random_dit(size=OTHER, base_size=(8, 12))
    assert torch.equal(network(x, time, condition), other(x, time, condition))
    assert relative_error(random_dit(size=OTHER)(x, time, condition), other(x, time, condition)) > 1e-3
    assert torch.equal(network.to(torch.bfloat16)(x, time, condition), network(x, time, condition))


@pytest.mark.parametrize("build", [random_dit, random_mmdit], ids=["dit", "mmdit"])
@pytest.mark.parametrize("large", [(16, 24), (8, 20), (12, 12)])
def test_a_larger_network_equals_the_smaller_one_on_its_size(build, large) -> None:
    small, big = build(), build(size=large, base_size=(8, 12))
    weights = {name: value for name, value in small.state_dict().items() if name != "positions"}
    big.load_state_dict(weights, strict=False)
    x, time, condition = inputs()
    assert torch.equal(big(x, time, condition), small(x, time, condition))
    x, time, condition = latents(large)
    assert torch.equal(big(x, time, condition), small(x, time, condition))
    # Read with a prompt that is cached, too.
    assert relative_error(big(x, time, big.read_prompt(condition)), big(x, time, condition)) < 1e-12


@pytest.mark.parametrize("block", ["dit", "mmdit"])
def test_the_router_sees_every_size(block) -> None:
    torch.manual_seed(0)
    config = RouterConfig(
        size=(8, 12), channels=C, patch=2, width=32, depth=2, heads=4, clusters=3, block=block, grown=(None,)
    )
    router = Router(config).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, _, _ = latents()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    log_p = router(x, t)
    assert log_p.exp().sum(1).tolist() == pytest.approx([1, 1, 1])
    # Positions count: another order of the same tokens is another input.
    assert relative_error(router(x.flip(3), t), log_p) > 1e-6


def test_positions_that_came_with_weights_serve_their_size_alone() -> None:
    network = random_dit()
    network.positions = sincos_positions(4, 6, 32, span=2.0).double()
    x, time, condition = inputs()
    assert network(x, time, condition).isfinite().all()
    with pytest.raises(AtollError, match=r"a grid of 3 x 8 tokens; this network has positions of its own, for 4 x 6"):
        network(*latents())


@given(st.integers(1, 9), st.integers(1, 9))
def test_sides_that_the_patch_does_not_divide_are_refused(height, width) -> None:
    assume(height % 2 or width % 2)
    with pytest.raises(AtollError, match=rf"latent: got shape \[3, 2, {height}, {width}\], .* of the patch, 2"):
        random_mmdit()(*latents((height, width)))


def test_too_many_tokens_are_refused() -> None:
    x = torch.zeros(1, C, 2, 2**18, dtype=torch.float64)
    for network in (random_dit(), random_mmdit()):
        assert isinstance(network, DiT | MMDiT)
        with pytest.raises(AtollError, match=r"latent: 131,072 tokens, expected at most 65,536"):
            network(x, torch.zeros(1), inputs()[2].index(torch.tensor([0])))
