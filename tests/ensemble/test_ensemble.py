"""Ensembles: which experts are evaluated, how their answers are weighted, and that nothing changes by it."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from atoll.calibration import Calibration
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert
from atoll.ensemble.replicas import Stacking
from atoll.errors import AtollError
from atoll.objective import Objective

FLOW = Objective("flow", "linear", time_scale=1.0)
SHAPE = (2, 3, 5)


class Constant:
    """A network that answers with one number, and notes every call."""

    def __init__(self, value: float):
        self.value, self.calls = value, []

    def __call__(self, x, time, condition):
        self.calls.append((x.clone(), time.clone(), condition))
        return torch.full_like(x, self.value)


def router_of(probabilities):
    """A router that gives each sample its own row of probabilities [B, K]."""
    log_p = torch.log(torch.tensor(probabilities, dtype=torch.float64))
    return lambda x, t, pooled=None: log_p


def batch(count):
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, *SHAPE, generator=g, dtype=torch.float64), torch.rand(count, generator=g).double()


def condition(count, value=1.0):
    return Condition(
        torch.full((count, 4, 6), value, dtype=torch.float64),
        torch.ones(count, 4, dtype=torch.bool),
        torch.full((count, 7), value, dtype=torch.float64),
    )


def test_top_2_renormalises_and_evaluates_no_other_expert() -> None:
    networks = [Constant(1.0), Constant(10.0), Constant(100.0)]
    experts = [Expert(n, FLOW, (k,)) for k, n in enumerate(networks)]
    x, t = batch(2)
    ensemble = Ensemble(experts, router_of([[0.5, 0.3, 0.2], [0.3, 0.6, 0.1]]), routing="top-2")
    u = ensemble.velocity(x, t)
    torch.testing.assert_close(u[:, 0, 0, 0], torch.tensor([(0.5 + 3) / 0.8, (0.3 + 6) / 0.9]).double())
    assert [len(n.calls) for n in networks] == [1, 1, 0]


def test_an_active_expert_is_called_once_for_both_guidance_branches() -> None:
    networks = [Constant(1.0), Constant(10.0), Constant(100.0)]
    experts = [Expert(n, FLOW, (k,)) for k, n in enumerate(networks)]
    x, t = batch(4)
    router = router_of([[0.9, 0.1, 1e-9], [0.1, 0.9, 1e-9], [0.8, 0.2, 1e-9], [0.2, 0.8, 1e-9]])
    ensemble = Ensemble(experts, router, routing="top-1", null=(condition(1, 0.0),))
    ensemble.velocity(x, t, condition(4), guidance_scale=3.0)
    assert [len(n.calls) for n in networks] == [1, 1, 0]
    x_scaled, time, own = networks[0].calls[0]
    torch.testing.assert_close(x_scaled, x[[0, 2, 0, 2]])
    torch.testing.assert_close(time, t[[0, 2, 0, 2]])
    assert own.states[:, 0, 0].tolist() == [1, 1, 0, 0]


def test_guidance_extrapolates_from_null_to_condition() -> None:
    def network(x, time, own):
        return own.states[:, 0, 0].reshape(-1, 1, 1, 1).expand_as(x)  # u_cond = 2, u_null = 0.5

    ensemble = Ensemble([Expert(network, FLOW)], None, null=(condition(1, 0.5),))
    x, t = batch(3)
    u = ensemble.velocity(x, t, condition(3, 2.0), guidance_scale=4.0)
    torch.testing.assert_close(u, torch.full_like(u, 0.5 + 4.0 * 1.5))
    torch.testing.assert_close(ensemble.velocity(x, t, condition(3, 2.0)), torch.full_like(u, 2.0))


def test_the_router_sees_the_pooled_vector_of_the_condition() -> None:
    seen = []

    def router(x, t, pooled=None):
        seen.append(pooled)
        return torch.zeros(len(x), 2, dtype=torch.float64)

    experts = [Expert(Constant(1.0), FLOW, (k,)) for k in range(2)]
    x, t = batch(3)
    Ensemble(experts, router, null=(condition(1, 0.0),)).velocity(x, t, condition(3, 2.0), guidance_scale=2.0)
    assert seen[0].shape == (3, 7)
    assert (seen[0] == 2).all()


def test_a_missing_expert_loses_its_weight_to_the_others() -> None:
    experts = [Expert(Constant(1.0), FLOW, (0,)), Expert(Constant(10.0), FLOW, (2,))]
    x, t = batch(1)
    for routing, expected in (("full", (0.1 + 4) / 0.5), ("top-1", 10.0), ("top-2", (0.1 + 4) / 0.5)):
        u = Ensemble(experts, router_of([[0.1, 0.5, 0.4]]), routing=routing).velocity(x, t)
        torch.testing.assert_close(u, torch.full_like(u, expected))


def test_the_last_cluster_may_have_no_expert() -> None:
    x, t = batch(1)
    u = Ensemble([Expert(Constant(3.0), FLOW, (0,))], router_of([[0.1, 0.9]])).velocity(x, t)
    torch.testing.assert_close(u, torch.full_like(u, 3.0))


def test_a_generalist_is_used_only_for_clusters_without_another_expert() -> None:
    experts = [Expert(Constant(1.0), FLOW, (0,)), Expert(Constant(10.0), FLOW, (0, 1, 2))]
    x, t = batch(1)
    u = Ensemble(experts, router_of([[0.5, 0.2, 0.3]]), routing="full").velocity(x, t)
    torch.testing.assert_close(u, torch.full_like(u, 0.5 + 0.5 * 10))


def test_replicas_share_the_weight_of_their_cluster() -> None:
    experts = [Expert(Constant(v), FLOW, (k,)) for v, k in ((1.0, 0), (3.0, 0), (10.0, 1))]
    x, t = batch(1)
    u = Ensemble(experts, router_of([[0.6, 0.4]]), routing="full").velocity(x, t)
    torch.testing.assert_close(u, torch.full_like(u, 0.6 * 2 + 4))


def test_invalid_ensembles_and_calls_are_refused() -> None:
    one = Expert(Constant(1.0), FLOW, (0,))
    x, t = batch(1)
    with pytest.raises(AtollError, match="no experts"):
        Ensemble([], None)
    with pytest.raises(AtollError, match="unknown routing"):
        Ensemble([one], None, routing="best")
    with pytest.raises(AtollError, match="unknown alignment"):
        Ensemble([one], None, alignment="exact")  # type: ignore[arg-type]
    with pytest.raises(AtollError, match="without a router"):
        Ensemble([one, one], None)
    with pytest.raises(AtollError, match="null condition"):
        Ensemble([one], None).velocity(x, t, condition(1), guidance_scale=2.0)
    with pytest.raises(AtollError, match="no condition"):
        Ensemble([one], None, null=(condition(1),)).velocity(x, t, guidance_scale=2.0)
    with pytest.raises(AtollError, match="the router knows 2 clusters"):
        Ensemble([one, Expert(Constant(1.0), FLOW, (4,))], router_of([[0.5, 0.5]])).velocity(x, t)


def test_each_expert_and_the_router_read_their_own_text_encoder() -> None:
    def reads(x, time, own):
        return own.states[:, 0, 0].reshape(-1, 1, 1, 1).expand_as(x)

    experts = [Expert(reads, FLOW, (0,), encoder=0), Expert(reads, FLOW, (1,), encoder=1)]
    seen = []

    def router(x, t, pooled):
        seen.append(pooled[:, 0].tolist())
        return torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64))

    null = (condition(1, 0.0), condition(1, 1.0))
    ensemble = Ensemble(experts, router, "full", null=null, router_encoder=1)
    x, t = batch(2)
    own = (condition(2, 2.0), condition(2, 10.0))
    u = ensemble.velocity(x, t, own)
    torch.testing.assert_close(u[:, 0, 0, 0], torch.tensor([6.0, 8.0]).double())
    guided = ensemble.velocity(x, t, own, guidance_scale=2.0)  # 2 * 2 - 0 = 4; 2 * 10 - 1 = 19
    torch.testing.assert_close(guided[:, 0, 0, 0], torch.tensor([11.5, 15.25]).double())
    assert seen == [[10.0, 10.0]] * 2


def test_a_time_switch_evaluates_one_expert_above_and_another_below() -> None:
    networks = [Constant(1.0), Constant(2.0), Constant(3.0)]
    experts = [Expert(n, FLOW, (k,), name=f"e{k}") for k, n in enumerate(networks)]
    x, _ = batch(3)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    ensemble = Ensemble(experts, None, routing="time-switch-0.5:e2:e0")
    torch.testing.assert_close(ensemble.velocity(x, t)[:, 0, 0, 0], torch.tensor([1.0, 3.0, 3.0]).double())
    assert not networks[1].calls
    with pytest.raises(AtollError, match="no expert 'e7'; expected one of e0, e1, e2"):
        Ensemble(experts, None, routing="time-switch-0.5:e2:e7")


def test_oracle_routing_follows_the_samples_clusters() -> None:
    experts = [Expert(Constant(float(k)), FLOW, (k,)) for k in range(3)]
    x, t = batch(4)
    ensemble = Ensemble(experts, router_of([[0.5, 0.3, 0.2]] * 4), routing="oracle")
    u = ensemble.velocity(x, t, cluster=torch.tensor([2, 0, 1, 1]))
    assert u[:, 0, 0, 0].tolist() == [2.0, 0.0, 1.0, 1.0]
    with pytest.raises(AtollError, match="needs each sample's cluster"):
        ensemble.velocity(x, t)


def test_outside_the_guidance_range_only_the_condition_is_evaluated() -> None:
    calls = []

    def network(x, time, own):
        calls.append(len(x))
        return own.states[:, 0, 0].reshape(-1, 1, 1, 1).expand_as(x)  # u_cond = 2, u_null = 0.5

    ensemble = Ensemble([Expert(network, FLOW)], None, null=(condition(1, 0.5),))
    x, _ = batch(3)
    t = torch.tensor([0.1, 0.3, 0.8], dtype=torch.float64)
    u = ensemble.velocity(x, t, condition(3, 2.0), guidance_scale=4.0, guidance_range=(0.3, 0.7))
    torch.testing.assert_close(u[:, 0, 0, 0], torch.tensor([2.0, 6.5, 2.0]).double())
    ensemble.velocity(x[:1], t[:1], condition(1, 2.0), guidance_scale=4.0, guidance_range=(0.3, 0.7))
    assert calls == [4, 1]


def snapshot(value):
    """A deep copy of an object's attributes, and of those of the objects in them; networks by identity."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple, frozenset, set)):
        return [snapshot(one) for one in value]
    if isinstance(value, dict):
        return {key: snapshot(one) for key, one in value.items()}
    if callable(value):
        return id(value)
    return snapshot(vars(value)) if hasattr(value, "__dict__") else value


def test_an_ensemble_is_frozen() -> None:
    ensemble = Ensemble([Expert(Constant(1.0), FLOW)], None)
    for field in fields(ensemble):
        with pytest.raises(FrozenInstanceError):
            setattr(ensemble, field.name, None)
    with pytest.raises(FrozenInstanceError):
        ensemble.trace = []
    with pytest.raises(FrozenInstanceError):
        del ensemble.experts


def test_velocity_gives_the_same_bits_twice_and_changes_no_attribute() -> None:
    experts = [Expert(lambda x, time, c, k=k: torch.sin(x + k), FLOW, (k % 2,), name=str(k)) for k in range(4)]
    experts[0] = replace(experts[0], network=Constant(torch.nan))
    table = torch.rand(2, 2)
    stacking = Stacking(("1", "3"), torch.zeros(SHAPE), torch.tensor([-5.0, 5.0]), table, torch.zeros(2))
    router = router_of([[0.5, 0.5], [0.1, 0.9], [1.0, 1e-9]])
    ensemble = Ensemble(experts, router, "full", null=(condition(1, 0.0),), stackings=[stacking])
    x, t = batch(3)
    before = snapshot(ensemble)
    assert before["_groups"], "the snapshot looks into the ensemble"
    first = ensemble.velocity(x, t, condition(3), guidance_scale=2.0)
    second = ensemble.velocity(x, t, condition(3), guidance_scale=2.0)
    assert first.numpy().tobytes() == second.numpy().tobytes()
    assert snapshot(ensemble) == before


def test_a_replaced_option_leaves_the_original_as_it_was() -> None:
    experts = [Expert(Constant(float(k)), FLOW, (k,)) for k in range(2)]
    ensemble = Ensemble(experts, router_of([[0.4, 0.6]]), "top-1")
    x, t = batch(1)
    assert float(replace(ensemble, routing="full").velocity(x, t).mean()) == pytest.approx(0.6)
    assert float(replace(ensemble, excluded=frozenset({1})).velocity(x, t).mean()) == 0
    assert float(ensemble.velocity(x, t).mean()) == 1


def test_a_bare_condition_is_wrapped_in_a_tuple() -> None:
    def reads(x, time, own):
        return own.states[:, 0, 0].reshape(-1, 1, 1, 1).expand_as(x)

    bare = Ensemble([Expert(reads, FLOW)], None, null=condition(1, 0.5))
    assert isinstance(bare.null, tuple)
    wrapped = Ensemble([Expert(reads, FLOW)], None, null=(condition(1, 0.5),))
    x, t = batch(3)
    assert torch.equal(bare.velocity(x, t, condition(3), 2.0), wrapped.velocity(x, t, (condition(3),), 2.0))


def test_only_uncalibrated_unstacked_eps_experts_are_clamped() -> None:
    eps, calibration = Objective("eps", "cosine"), Calibration.identity(torch.zeros(SHAPE))
    experts = [
        Expert(Constant(1.0), eps, (0,), name="a"),
        Expert(Constant(1.0), eps, (0,), name="b"),
        Expert(Constant(1.0), eps, (1,), calibration, "c"),
        Expert(Constant(1.0), FLOW, (1,), name="d"),
    ]
    stacking = Stacking(("a", "b"), torch.zeros(SHAPE), torch.tensor([-5.0, 5.0]), torch.ones(2, 2), torch.zeros(2))
    ensemble = Ensemble(experts, router_of([[0.5, 0.5]]))
    assert [expert.name for expert in ensemble.clamped] == ["a", "b"]
    assert replace(ensemble, stackings=[stacking]).clamped == ()
    assert replace(ensemble, alignment="native").clamped == ()
