"""Compiled experts: the same velocities, and few graphs for batches of any size."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

from atoll.condition import Condition
from atoll.ensemble.compiled import Padded, PaddedReader, compile_network, padded_size
from atoll.errors import AtollError
from atoll.nn import DiT, DiTConfig, MMDiT, MMDiTConfig
from atoll.pipeline import Pipeline

SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]


@given(st.integers(1, 10**6))
def test_padded_sizes_are_few_and_close(rows: int) -> None:
    size = padded_size(rows)
    odd = size // (size & -size)
    assert odd in (1, 3)
    assert rows <= size < 1.5 * rows + 1
    assert sorted({padded_size(n) for n in range(1, 129)}) == SIZES
    if size <= 128:
        assert size == min(s for s in SIZES if s >= rows)


def condition_of(rows: int, seed: int = 0) -> Condition:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 5, generator=g) < 0.7
    mask[:, 0] = True
    return Condition(torch.randn(rows, 5, 10, generator=g), mask)


SHAPE = {"size": (8, 8), "channels": 2, "patch": 4, "width": 16, "depth": 3, "heads": 2, "states_dim": 10}


def dit(seed: int) -> DiT:
    torch.manual_seed(seed)
    return random(DiT(DiTConfig.model_validate(SHAPE)))


def mmdit(seed: int) -> MMDiT:
    torch.manual_seed(seed)
    return random(MMDiT(MMDiTConfig.model_validate(SHAPE)))


def random(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


def ask(network: object, rows: int, read: bool) -> Tensor:
    g = torch.Generator().manual_seed(rows)
    x, time, condition = (
        torch.randn(rows, 2, 8, 8, generator=g),
        torch.rand(rows, generator=g),
        condition_of(rows, rows),
    )
    return network(x, time, network.read_prompt(condition) if read else condition)


@pytest.mark.parametrize("network", [dit, mmdit])
@pytest.mark.parametrize("read", [False, True])
def test_batches_of_any_size_share_few_graphs_and_give_the_same(read: bool, network: Callable) -> None:
    torch._dynamo.reset()
    plain = [network(0), network(1)]
    compiled = [compile_network(copy.deepcopy(network), backend="eager") for network in plain]
    counters.clear()
    with torch.inference_mode():
        for rows in range(1, 17):
            for one, other in zip(compiled, plain, strict=True):
                torch.testing.assert_close(ask(one, rows, read), ask(other, rows, read))
    assert counters["stats"]["unique_graphs"] == len([size for size in SIZES if size <= 16])
    assert not counters["graph_break"]


def test_the_graph_limit_of_torch_is_raised() -> None:
    torch._dynamo.reset()
    network = compile_network(dit(0), backend="eager")
    counters.clear()
    with torch.inference_mode():
        for rows in SIZES:
            ask(network, rows, read=True)
    assert counters["stats"]["unique_graphs"] == len(SIZES) > 8


def test_a_compiled_network_is_returned_as_it_is() -> None:
    compiled = compile_network(dit(0), backend="eager")
    assert isinstance(compiled, PaddedReader)
    assert compile_network(compiled) is compiled


def test_a_network_without_blocks_is_compiled_as_a_whole() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
            return x * time[:, None]

    torch._dynamo.reset()
    compiled = compile_network(Plain(), backend="eager")
    counters.clear()
    assert isinstance(compiled, Padded)
    assert not isinstance(compiled, PaddedReader)
    for rows in (5, 6):
        torch.testing.assert_close(
            compiled(torch.ones(rows, 3), torch.arange(rows), None)[:, 0], torch.arange(rows).float()
        )
    assert counters["stats"]["unique_graphs"] == 1


def test_offloaded_networks_and_plain_callables_are_refused(trained_run) -> None:
    with pytest.raises(AtollError, match=r"function cannot be compiled; expected a torch\.nn\.Module"):
        compile_network(ask)
    budgeted = Pipeline.from_pretrained(trained_run / "ensemble", memory_budget="1GB")
    with pytest.raises(AtollError, match="memory budget cannot be compiled"):
        budgeted.compile()


def test_a_compiled_pipeline_draws_the_same_images(trained_run) -> None:
    torch._dynamo.reset()
    arguments = {"seeds": range(5), "guidance_scale": 2.0, "num_inference_steps": 3}
    prompts = ["moss sand", "rain", "rust rust", "sand", "moss"]
    plain = Pipeline.from_pretrained(trained_run / "ensemble")(prompts, **arguments)
    pipe = Pipeline.from_pretrained(trained_run / "ensemble")
    assert pipe.compile(backend="eager") is pipe
    counters.clear()
    output = pipe(prompts, **arguments)
    torch.testing.assert_close(output.latents, plain.latents, rtol=1e-4, atol=1e-4)
    for one, other in zip(output.images, plain.images, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2 * math.ceil(math.log2(10)) + 2
    pipe(prompts, **arguments, routing="top-1")
    pipe(prompts[:4], **{**arguments, "seeds": range(4)})
    assert counters["stats"]["unique_graphs"] <= graphs + 6


@pytest.mark.slow
def test_the_inductor_backend_gives_the_same_velocity() -> None:
    torch._dynamo.reset()
    network = dit(0)
    compiled = compile_network(copy.deepcopy(network))
    with torch.inference_mode():
        for rows in (3, 5):
            torch.testing.assert_close(ask(compiled, rows, True), ask(network, rows, True), rtol=1e-4, atol=1e-5)
