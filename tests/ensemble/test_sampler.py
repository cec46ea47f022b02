"""Samplers: traces, and what happens to an expert whose answer is not finite."""

from dataclasses import replace

import pytest
import torch

from atoll.ensemble import Ensemble, Expert, Sampler
from atoll.ensemble.replicas import Stacking
from atoll.errors import AtollError
from atoll.objective import Objective

FLOW = Objective("flow", "linear", time_scale=1.0)
SHAPE = (2, 3, 5)


class Constant:
    """A network that answers with one number, and counts its calls."""

    def __init__(self, value: float):
        self.value, self.calls = value, []

    def __call__(self, x, time, condition):
        self.calls.append(len(x))
        return torch.full_like(x, self.value)


def router_of(probabilities):
    """A router that gives each sample its own row of probabilities [B, K]."""
    log_p = torch.log(torch.tensor(probabilities, dtype=torch.float64))
    return lambda x, t, pooled=None: log_p


def batch(count):
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, *SHAPE, generator=g, dtype=torch.float64), torch.rand(count, generator=g).double()


def with_a_broken_expert():
    """An ensemble of a good expert (1) and a bad one (NaN), and a batch that both get a part of."""
    experts = [Expert(Constant(1.0), FLOW, (0,), name="good"), Expert(Constant(torch.nan), FLOW, (1,), name="bad")]
    router = router_of([[0.5, 0.5], [0.1, 0.9], [1.0, 1e-9]])
    return Ensemble(experts, router, routing="full"), *batch(3)


def test_a_trace_records_times_and_weights_of_each_call() -> None:
    experts = [Expert(Constant(1.0), FLOW, (k,)) for k in range(2)]
    sampler = Sampler(Ensemble(experts, router_of([[0.9, 0.1], [0.2, 0.8]]), routing="top-1"))
    x, t = batch(2)
    with sampler.tracing() as trace:
        sampler.velocity(x, t)
    sampler.velocity(x, t)
    assert len(trace.weights) == 1
    assert trace.weights[0].tolist() == [[1, 0], [0, 1]]


def test_an_expert_that_answers_nan_is_dropped_with_a_warning() -> None:
    ensemble, x, t = with_a_broken_expert()
    sampler = Sampler(ensemble)
    with pytest.warns(UserWarning, match="bad answered with NaN or infinity; sampling goes on without it"):
        u = sampler.velocity(x, t)
    torch.testing.assert_close(u, torch.ones_like(u))
    assert sampler.dropped == {"bad": "answered with NaN or infinity"}
    assert sampler.ensemble.excluded == {1}
    sampler.velocity(x, t)  # it is not evaluated again
    assert len(ensemble.experts[1].network.calls) == 1


def test_a_broken_expert_without_another_is_an_error() -> None:
    ensemble, x, t = with_a_broken_expert()
    alone = Sampler(Ensemble(ensemble.experts[1:], ensemble.router))
    switched = Sampler(replace(ensemble, routing="time-switch-0.0:bad:good"))
    for sampler, reason in ((alone, "there is no other"), (switched, "the routing names it")):
        with pytest.raises(AtollError, match=f"bad answered with NaN or infinity, and {reason}"):
            sampler.velocity(x, t)


def test_the_policies_raise_and_keep() -> None:
    ensemble, x, t = with_a_broken_expert()
    with pytest.raises(
        AtollError, match="bad answered with NaN or infinity; train or convert it again, or leave it out"
    ):
        Sampler(ensemble, "raise").velocity(x, t)
    keeping = Sampler(ensemble, "keep")
    with keeping.tracing() as trace:
        assert keeping.velocity(x, t).isnan().all()
    assert not keeping.dropped
    assert (trace.weights[0][:, 1] > 0).all()


def test_a_pure_velocity_returns_nan_as_it_is() -> None:
    ensemble, x, t = with_a_broken_expert()
    assert ensemble.velocity(x, t).isnan().all()
    assert ensemble.excluded == frozenset()


def test_samplers_of_one_ensemble_do_not_see_each_others_state() -> None:
    ensemble, x, t = with_a_broken_expert()
    one, other = Sampler(ensemble), Sampler(ensemble, "keep")
    with one.tracing() as first, other.tracing() as second:
        with pytest.warns(UserWarning, match="bad answered"):
            one.velocity(x, t)
        other.velocity(x, t)
        other.velocity(x, t)
    assert (list(one.dropped), list(other.dropped)) == (["bad"], [])
    assert (one.ensemble.excluded, other.ensemble.excluded, ensemble.excluded) == ({1}, set(), set())
    assert (len(first.times), len(second.times)) == (1, 2)
    assert (first.weights[0][:, 1] == 0).all()
    assert (second.weights[0][:, 1] > 0).all()


def test_replicas_share_equally_after_one_of_their_stack_is_dropped() -> None:
    networks = (Constant(1.0), Constant(torch.nan), Constant(4.0))
    experts = [Expert(n, FLOW, (0,), name=name) for n, name in zip(networks, "abc", strict=True)]
    table = torch.tensor([[0.7, 0.2, 0.1]] * 2)
    stacking = Stacking(("a", "b", "c"), torch.zeros(SHAPE), torch.tensor([-5.0, 5.0]), table, torch.zeros(2))
    sampler = Sampler(Ensemble(experts, router_of([[1.0]] * 2), "full", stackings=[stacking]))
    x, t = batch(2)
    with pytest.warns(UserWarning, match="b answered"):
        u = sampler.velocity(x, t)
    torch.testing.assert_close(u, torch.full_like(u, 2.5))


def test_a_sampler_equals_the_pure_velocity_bit_for_bit() -> None:
    experts = [Expert(Constant(float(k)), FLOW, (k,)) for k in range(3)]
    ensemble = Ensemble(experts, router_of([[0.5, 0.3, 0.2]] * 4), "full")
    x, t = batch(4)
    assert torch.equal(Sampler(ensemble).velocity(x, t), ensemble.velocity(x, t))


def test_a_dropped_replica_leaves_its_cluster_to_the_other() -> None:
    experts = [
        Expert(Constant(1.0), FLOW, (0,), name="good"),
        Expert(Constant(torch.inf), FLOW, (0,), name="bad"),
        Expert(Constant(4.0), FLOW, (1,), name="other"),
    ]
    x, t = batch(2)
    sampler = Sampler(Ensemble(experts, router_of([[0.5, 0.5], [0.25, 0.75]]), routing="full"))
    with pytest.warns(UserWarning, match="bad answered"):
        u = sampler.velocity(x, t)
    torch.testing.assert_close(u[:, 0, 0, 0], torch.tensor([2.5, 3.25]).double())


def test_no_expert_is_dropped_for_an_input_that_is_not_finite() -> None:
    x, t = batch(2)
    x[1] = torch.nan
    sampler = Sampler(Ensemble([Expert(lambda x, time, c: x, FLOW)], None))
    assert sampler.velocity(x, t)[1].isnan().all()
    assert not sampler.dropped
