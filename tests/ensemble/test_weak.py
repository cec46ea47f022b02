"""Guidance away from a weak ensemble: the formula on the oracle, the weights that both share, what is refused."""

from dataclasses import replace

import pytest
import torch

from atoll.choices import Method
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert, Sampler
from atoll.ensemble.replicas import Stacking
from atoll.ensemble.weak import guide
from atoll.errors import AtollError
from atoll.objective import Objective
from atoll.schedule import PATH, Cosine, Linear, LinearBeta
from atoll.shapes import per_sample
from atoll.solver import sample
from atoll.testing import GaussianMixture

SHAPE = (2, 3, 1)
FLOW = Objective("flow", "linear", time_scale=1.0)
MIXED = [Objective("eps", Cosine()), Objective("flow", Linear(), time_scale=1.0), Objective("x0", LinearBeta())]
METHODS = Method.__args__


def mixture_of(spread: float) -> GaussianMixture:
    """A mixture of three clusters, by whose exact experts another one's can be guided."""
    return GaussianMixture.random(components=9, clusters=3, shape=SHAPE, seed=1, spread=spread)


STRONG, WEAK = mixture_of(1.5), mixture_of(1.1)


def exact(mixture: GaussianMixture, objectives=MIXED, router=None, **options) -> Ensemble:
    experts = [Expert(mixture.network(o, k), o, (k,), name=f"{k}-x") for k, o in enumerate(objectives)]
    return Ensemble(experts, router or mixture.router, **{"routing": "full", **options})


def must_not_route(x, t, pooled=None):
    raise AssertionError("the weak ensemble's own router was evaluated")


def batch(count: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    t = 0.1 + 0.8 * torch.rand(count, generator=g, dtype=torch.float64)
    x0, _ = STRONG.sample(count, g)
    return PATH.diffuse(x0, torch.randn(x0.shape, generator=g, dtype=x0.dtype), t), t


class Spy:
    """A network that answers with one number, and records its inputs."""

    def __init__(self, value: float):
        self.value, self.seen, self.conditions = value, [], []

    def __call__(self, x, time, condition):
        self.seen += [float(row.flatten()[0]) for row in x]
        self.conditions.append(condition)
        return torch.full_like(x, self.value)


def spies(values, router, routing="full", **options) -> Ensemble:
    experts = [Expert(Spy(value), FLOW, (k,), name=f"{k}-x") for k, value in enumerate(values)]
    return Ensemble(experts, router, routing, **options)


def test_the_velocity_is_the_formula_for_experts_of_mixed_objectives() -> None:
    x, t = batch(64)
    # Each cluster's weak velocity, by the strong mixture's probabilities of the clusters.
    p = STRONG.router(x, t).exp()
    weak = sum(per_sample(p[:, k], x) * WEAK.cluster(k).velocity(x, t) for k in range(3))
    # The weak experts have other objectives than those that they guide.
    guided = exact(STRONG, weak=exact(WEAK, MIXED[::-1], must_not_route))
    for g in (0.0, 2.0, 3.5):
        expected = weak + g * (STRONG.velocity(x, t) - weak)
        torch.testing.assert_close(guided.velocity(x, t, guidance_scale=g), expected, atol=1e-6, rtol=1e-6)
    assert (weak - WEAK.velocity(x, t)).abs().max() > 1e-2  # its own router would give another velocity


@pytest.mark.parametrize("method", METHODS)
def test_scale_one_and_a_weak_ensemble_that_is_the_main_one_change_no_bit(method) -> None:
    main = exact(STRONG)
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def drawn(ensemble, **options):
        velocity = Sampler(ensemble).velocity
        return sample(lambda x, t: velocity(x, t, **options), noise, steps=5, method=method)

    plain = drawn(main)
    assert torch.equal(drawn(replace(main, weak=exact(WEAK))), plain)
    assert torch.equal(drawn(replace(main, weak=main), guidance_scale=3.0), plain)
    guided = drawn(replace(main, weak=exact(WEAK)), guidance_scale=3.0)
    assert not torch.allclose(guided, plain, atol=1e-2)
    # Only between these times: the first steps are those without guidance.
    late = drawn(replace(main, weak=exact(WEAK)), guidance_scale=3.0, guidance_range=(0.0, 0.3))
    assert not torch.equal(late, plain)
    assert not torch.allclose(late, guided)


def test_a_sampler_equals_the_pure_velocity_bit_for_bit() -> None:
    ensemble, (x, t) = exact(STRONG, weak=exact(WEAK), routing="top-2"), batch(9)
    g = torch.linspace(0, 3, 9, dtype=torch.float64)
    assert torch.equal(Sampler(ensemble).velocity(x, t, None, g), ensemble.velocity(x, t, None, g))


def test_an_answer_that_is_not_needed_is_not_used() -> None:
    u, u_weak = torch.randn(2, *SHAPE), torch.full((2, *SHAPE), torch.nan)
    assert torch.equal(guide(u, u_weak, torch.tensor([1.0, 2.0]))[0], u[0])


def test_both_are_aligned_in_the_same_way() -> None:
    x, t = batch(8)
    weak = exact(WEAK)
    native = exact(STRONG, alignment="native", weak=weak)
    p = STRONG.router(x, t).exp()
    values = [expert.velocity(x, t, None, "native") for expert in weak.experts]
    expected = sum(per_sample(p[:, k], x) * value for k, value in enumerate(values))
    torch.testing.assert_close(native.velocity(x, t, None, 0.0), expected)


def test_samples_without_guidance_do_not_evaluate_the_weak_ensemble() -> None:
    x, t = batch(4)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7]).double()
    g = torch.tensor([3.0, 3.0, 1.0, 3.0]).double()
    weak = spies([10.0] * 3, must_not_route)
    u = spies([1.0] * 3, STRONG.router, weak=weak).velocity(x, t, None, g, guidance_range=(0.2, 0.6))
    torch.testing.assert_close(u[:, 0, 0, 0], torch.tensor([1.0, 10 + 3 * (1 - 10), 1.0, 1.0]).double())
    assert {value for expert in weak.experts for value in expert.network.seen} == {float(x[1].flatten()[0])}


ROUTINGS = ["top-1", "top-2", "full", "threshold-0.2", "nucleus-0.8", "sample-1", "sample-2", "oracle", "oracle-1"]


@pytest.mark.parametrize("routing", [*ROUTINGS, "time-switch-0.5:0-x:2-x"])
def test_every_routing_selects_the_same_clusters_in_both(routing) -> None:
    x, t = batch(16)
    weak = spies([10.0, 20.0, 40.0], must_not_route, "top-1")
    main = spies([1.0, 2.0, 4.0], STRONG.router, routing, weak=weak)
    cluster = torch.arange(16) % 3
    weights = main.weights(x, t, cluster=cluster)
    u = main.velocity(x, t, None, 2.0, cluster=cluster)[:, 0, 0, 0]
    value, weak_value = weights @ torch.tensor([1.0, 2, 4]).double(), weights @ torch.tensor([10.0, 20, 40]).double()
    torch.testing.assert_close(u, weak_value + 2 * (value - weak_value))
    for one, other in zip(main.experts, weak.experts, strict=True):
        assert one.network.seen == other.network.seen


def test_both_answer_the_same_prompt_and_no_null_condition_is_needed() -> None:
    x, t = batch(3)
    condition = Condition(torch.randn(3, 4, 5), torch.ones(3, 4, dtype=torch.bool), torch.randn(3, 5))
    weak = spies([10.0], None)
    main = spies([1.0], None, weak=weak)
    main.velocity(x, t, condition, 2.0)
    for ensemble in (main, weak):
        (seen,) = ensemble.experts[0].network.conditions
        assert torch.equal(seen.states, condition.states)
    with pytest.raises(AtollError, match="no condition"):
        replace(main, weak=None).velocity(x, t, None, 2.0)


def test_one_weak_expert_of_all_clusters_guides_every_expert() -> None:
    x, t = batch(6)
    dense = Ensemble([Expert(WEAK.network(FLOW), FLOW, (0, 1, 2), name="monolith")], None, "full")
    expected = 2 * STRONG.velocity(x, t) - WEAK.velocity(x, t)
    torch.testing.assert_close(exact(STRONG, weak=dense).velocity(x, t, None, 2.0), expected, atol=1e-6, rtol=1e-6)


def test_weak_replicas_keep_their_stacking() -> None:
    x, t = batch(2)
    experts = [Expert(Spy(value), FLOW, (0,), name=name) for value, name in ((10.0, "a"), (30.0, "b"))]
    table = torch.tensor([[0.75, 0.25]] * 2)
    stacking = Stacking(("a", "b"), torch.zeros(SHAPE), torch.tensor([-5.0, 5.0]), table, torch.zeros(2))
    weak = Ensemble(experts, must_not_route, "full", stackings=[stacking])
    u = spies([1.0], lambda x, t, pooled: x.new_zeros(2, 1), weak=weak).velocity(x, t, None, 2.0)
    torch.testing.assert_close(u, torch.full_like(u, 15 + 2 * (1 - 15)))


def test_a_missing_expert_of_the_main_ensemble_is_none_of_the_weak_ones() -> None:
    x, t = batch(5)
    weak = spies([10.0, 20.0, 40.0], must_not_route)
    main = spies([1.0, 2.0], STRONG.router, weak=weak)
    main.velocity(x, t, None, 2.0)
    assert not weak.experts[2].network.seen


@pytest.mark.parametrize(
    ("weak", "message"),
    [
        (lambda: spies([1.0, 2.0], STRONG.router), "no expert of cluster 2; expected one of each of the 3 clusters"),
        (lambda: exact(WEAK, weak=exact(WEAK)), "has a weak ensemble itself"),
    ],
)
def test_a_weak_ensemble_that_does_not_fit_is_refused(weak, message) -> None:
    with pytest.raises(AtollError, match=message):
        exact(STRONG, weak=weak())


def test_a_single_expert_is_not_guided_by_several() -> None:
    with pytest.raises(AtollError, match="a weak ensemble of 3 experts for a single expert without a router"):
        Ensemble([Expert(STRONG.network(FLOW), FLOW, (0, 1, 2))], None, weak=exact(WEAK))


def test_a_time_switch_needs_its_experts_in_both() -> None:
    dense = Ensemble([Expert(WEAK.network(FLOW), FLOW, (0, 1, 2), name="monolith")], None, "full")
    with pytest.raises(AtollError, match="no expert '0-x'; expected one of monolith"):
        exact(STRONG, routing="time-switch-0.5:0-x:2-x", weak=dense)


def test_a_weak_expert_that_answers_nan_is_an_error() -> None:
    x, t = batch(4)
    ensemble = spies([1.0] * 3, STRONG.router, weak=spies([1.0, torch.nan, 1.0], must_not_route))
    for policy in ("drop", "raise"):
        with pytest.raises(AtollError, match="1-x of the weak ensemble answered with NaN or infinity; sample in fp32"):
            Sampler(ensemble, policy).velocity(x, t, None, 2.0)
    assert Sampler(ensemble, "keep").velocity(x, t, None, 2.0).isnan().any()
    assert Sampler(ensemble).velocity(x, t).isfinite().all()


def test_an_expert_that_is_dropped_is_dropped_from_the_weights_of_both() -> None:
    x, t = batch(4)
    weak = spies([10.0, 20.0, 40.0], must_not_route)
    sampler = Sampler(spies([1.0, 2.0, torch.nan], STRONG.router, weak=weak))
    with pytest.warns(UserWarning, match="2-x answered"):
        u = sampler.velocity(x, t, None, 2.0)
    assert u.isfinite().all()
    assert not weak.experts[2].network.seen
