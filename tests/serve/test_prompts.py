"""The prompt pool: each network reads each prompt once, and what nobody uses is forgotten when there is no room."""

import pytest
import torch

from atoll.pipeline import Pipeline
from atoll.serve.prompts import NULL, PromptPool


@pytest.fixture(scope="module")
def pipe(trained_run) -> Pipeline:
    return Pipeline.from_pretrained(trained_run / "ensemble")


def encoded(pipe: Pipeline, text: str):
    return pipe.loaded.encoder([text])


def test_networks_read_each_prompt_once_and_rows_are_the_right_ones(pipe) -> None:
    network = pipe.loaded.ensemble.experts[0].network
    pool = PromptPool(pipe.loaded.ensemble.null)
    a, b = (pool.acquire(text, encoded(pipe, text)) for text in ("moss", "rain rust"))
    assert pool.acquire("moss", encoded(pipe, "moss")) == a
    rows = pool.rows([a, b, a], [NULL, NULL, b])
    kv = rows.for_expert(network, 0, torch.tensor([2, 1]), torch.tensor([2]))
    one = network.read_prompt(pipe.loaded.encoder(["moss", "rain rust", "rain rust"])[0])
    torch.testing.assert_close(kv.keys_values, one.keys_values)
    size = pool.nbytes
    rows.for_expert(network, 0, torch.tensor([0, 1]), None)
    assert pool.nbytes == size


def test_what_nobody_uses_is_forgotten_when_there_is_no_room(pipe) -> None:
    network = pipe.loaded.ensemble.experts[0].network
    pool = PromptPool(pipe.loaded.ensemble.null, limit=1)
    a, b, c = (pool.acquire(text, encoded(pipe, text)) for text in ("moss", "rain", "sand"))
    pool.rows([a, b, c], [NULL] * 3).for_expert(network, 0, torch.tensor([0, 1, 2]), torch.tensor([0]))
    assert len(pool) == 4
    size = pool.nbytes
    pool.release(b)
    assert len(pool) == 3
    assert pool.nbytes == size * 3 // 4
    kv = pool.rows([c, a], [NULL] * 2).for_expert(network, 0, torch.tensor([0, 1]), None)
    torch.testing.assert_close(
        kv.keys_values, network.read_prompt(pipe.loaded.encoder(["sand", "moss"])[0]).keys_values
    )
    again = pool.acquire("rain", encoded(pipe, "rain"))
    assert again not in (a, b, c)


def test_prompts_count_also_if_no_network_caches_them(pipe) -> None:
    pool = PromptPool(pipe.loaded.ensemble.null)
    empty = pool.nbytes
    assert empty > 0
    pool.limit = 3 * empty
    numbers = [pool.acquire(f"moss {i}", encoded(pipe, f"moss {i}")) for i in range(9)]
    assert pool.nbytes == 10 * empty
    for number in numbers:
        pool.release(number)
    assert pool.nbytes <= pool.limit
