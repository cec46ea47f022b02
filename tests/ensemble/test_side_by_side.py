"""Experts several at a time: the same answers, the threads that were set; whatever has state is evaluated alone."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert, Sampler, side_by_side
from atoll.ensemble.compiled import Padded
from atoll.nn.dit import DiT, DiTConfig
from atoll.objective import Objective

FLOW = Objective("flow", "linear")


class Noting(nn.Module):
    """A network that notes on which thread it was evaluated, in which modes, with how many threads of torch."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))
        self.seen = []

    def forward(self, x, time, condition):
        thread = threading.current_thread()
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.seen.append((thread is threading.main_thread(), *modes, torch.get_num_threads()))
        return x * self.weight


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def noting(count=4):
    networks = [Noting(k + 1.0) for k in range(count)]
    return networks, Ensemble([Expert(n, FLOW, (k,)) for k, n in enumerate(networks)], None, routing="oracle")


def evaluated(ensemble, clusters):
    return ensemble.velocity(torch.ones(len(clusters), 2, 3), torch.full((len(clusters),), 0.5), cluster=clusters)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_few_rows_are_shared_between_threads_of_one_each(two_threads, mode) -> None:
    networks, ensemble = noting()
    with mode():
        velocity = evaluated(ensemble, torch.arange(4))
    inference = mode is torch.inference_mode
    assert [network.seen for network in networks] == [[(False, inference, False, 1)]] * 4
    assert velocity[:, 0, 0].tolist() == [1, 2, 3, 4]
    assert torch.get_num_threads() == 2


def test_what_has_state_or_many_rows_is_evaluated_one_after_the_other(two_threads, monkeypatch) -> None:
    def on_main(ensemble, networks, clusters=(0, 1, 2, 3), mode=torch.no_grad):
        with mode():
            evaluated(ensemble, torch.tensor(clusters))
        seen = [one[0] for network in networks for one in network.seen]
        assert seen
        return all(seen)

    # Gradients, one expert, most rows with one, autocast, one thread, many numbers.
    networks, ensemble = noting()
    assert on_main(ensemble, networks, mode=torch.enable_grad)
    assert on_main(ensemble, networks, (0, 0))
    assert on_main(ensemble, networks, (0, 0, 0, 1))
    assert on_main(ensemble, networks, mode=lambda: torch.autocast("cpu"))
    torch.set_num_threads(1)
    assert on_main(ensemble, networks)
    torch.set_num_threads(2)
    monkeypatch.setattr(side_by_side, "MAX_NUMBERS", 5)
    assert on_main(ensemble, networks)
    monkeypatch.undo()
    assert not on_main(ensemble, networks)
    # A network shared by two experts, a compiled one, a function.
    shared = Noting()
    for wrap in (lambda network: shared, Padded, lambda network: network.forward):
        networks, _ = noting()
        experts = [Expert(wrap(network), FLOW, (k,)) for k, network in enumerate(networks)]
        assert on_main(Ensemble(experts, None, routing="oracle"), [*networks, shared])


def test_a_guided_sampling_has_the_same_velocities(two_threads, monkeypatch) -> None:
    config = DiTConfig(size=(4, 4), channels=2, states_dim=6, patch=2, width=16, depth=2, heads=2)
    networks = [DiT(config).eval() for _ in range(3)]
    for network in networks:
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
    null = Condition(torch.zeros(1, 3, 6), torch.ones(1, 3, dtype=torch.bool))
    experts = [Expert(network, FLOW, (k,)) for k, network in enumerate(networks)]
    ensemble = Ensemble(experts, None, routing="oracle", null=null)
    condition = Condition(torch.randn(6, 3, 6), torch.ones(6, 3, dtype=torch.bool))
    x, t, clusters = torch.randn(6, 2, 4, 4), torch.rand(6), torch.tensor([0, 1, 2, 0, 1, 2])
    scale = torch.tensor([1.0, 3.0, 1.0, 2.0, 3.0, 2.0])
    answers = []
    for border in (0, side_by_side.MAX_NUMBERS):
        monkeypatch.setattr(side_by_side, "MAX_NUMBERS", border)
        with torch.inference_mode():
            cache = ensemble.prompt_cache((condition,))
            answers += [ensemble.velocity(x, t, None, scale, cluster=clusters, prompt_cache=cache) for _ in range(2)]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-5, atol=1e-6)


def test_a_fault_ends_after_the_others_and_nan_is_dropped(two_threads) -> None:
    networks, ensemble = noting()
    networks[1].forward = lambda x, time, condition: 1 / 0
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        evaluated(ensemble, torch.arange(4))
    networks, ensemble = noting()
    ensemble = Ensemble(ensemble.experts, lambda x, t, pooled=None: torch.zeros(len(x), 4), routing="full")
    networks[1].weight.data.fill_(torch.nan)
    sampler = Sampler(ensemble)
    with torch.no_grad(), pytest.warns(UserWarning, match="answered with NaN"):
        velocity = sampler.velocity(torch.ones(2, 2, 3), torch.full((2,), 0.5))
    assert velocity.isfinite().all()
    assert not networks[0].seen[0][0]


def test_parts_are_even() -> None:
    assert side_by_side._parts([1, 5, 2, 4], 2) == [[1, 0], [3, 2]]
    assert side_by_side._parts([3, 3], 2) == [[0], [1]]


def test_a_forked_process_has_workers_of_its_own(two_threads) -> None:
    calls = [lambda: torch.ones(2)] * 2
    side_by_side.share(calls, [1, 1], 2)
    child = os.fork()
    if not child:  # no assertion and no fixture may run twice
        signal.alarm(20)
        side_by_side.share(calls, [1, 1], 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_callers_that_start_at_once_keep_their_threads(two_threads) -> None:
    """Two models in `atoll serve`, say: workers set the number of the process for a moment while they start."""
    together = threading.Barrier(8)

    def call(index: int) -> tuple[float, int]:
        together.wait()
        answers = side_by_side.share([lambda: torch.tensor(float(index)), lambda: torch.tensor(-1.0)], [1, 1], 2)
        return float(answers[0]), torch.get_num_threads()

    side_by_side._pool.cache_clear()
    with ThreadPoolExecutor(8) as callers:
        assert list(callers.map(call, range(8))) == [(float(index), 2) for index in range(8)]
