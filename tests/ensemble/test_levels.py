"""Experts of some noise levels: the oracle, who is evaluated when, and what is refused."""

from dataclasses import replace

import pytest
import torch

from atoll.ensemble import Ensemble, Expert, Sampler
from atoll.ensemble.owners import Owners
from atoll.ensemble.replicas import Stacking, measure_stacking, replica_groups
from atoll.errors import AtollError
from atoll.objective import Objective
from atoll.schedule import PATH, Cosine, Linear, LinearBeta
from atoll.solver import sample
from atoll.testing import GaussianMixture

SHAPE = (2, 3, 1)
MIXTURE = GaussianMixture.random(components=9, clusters=3, shape=SHAPE, seed=1)
COARSE, FINE = (0.2, 1.0), (0.0, 0.2)
# Both sides of every edge, the edges themselves, and both ends.
TIMES = torch.tensor([0.0, 1e-3, 0.1, 0.19999, 0.2, 0.20001, 0.5, 0.69999, 0.7, 0.9, 1.0], dtype=torch.float64)


def exact(objective: Objective, cluster: int | None, name: str = "") -> Expert:
    clusters = (0, 1, 2) if cluster is None else (cluster,)
    return Expert(MIXTURE.network(objective, cluster), objective, clusters, name=name or f"{cluster}-x")


def split(**options) -> Ensemble:
    """Three exact experts of mixed objectives at some levels, with different edges, and exact generalists elsewhere."""
    experts = [
        exact(Objective("v", Cosine(), levels=COARSE), 0),
        exact(Objective("flow", Linear(), levels=(0.2, 0.7)), 1),
        exact(Objective("flow", Linear(), levels=(0.7, 1)), 1, "1-noisy"),
        exact(Objective("v", LinearBeta(), levels=COARSE), 2),
        exact(Objective("flow", "linear", levels=FINE), None, "generalist"),
    ]
    return Ensemble(experts, MIXTURE.router, **{"routing": "full", **options})


def batch(t: torch.Tensor, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x0, _ = MIXTURE.sample(len(t), g)
    return PATH.diffuse(x0, torch.randn(x0.shape, generator=g, dtype=x0.dtype), t)


class Spy:
    """A network that answers with one number, and records its times."""

    def __init__(self, value: float = 0.0):
        self.value, self.times = value, []

    def __call__(self, x, time, condition):
        self.times += [round(one, 6) for one in time.tolist()]  # converted by way of the log-SNR
        return torch.full_like(x, self.value)


def spy(levels, clusters, value=0.0, name="spy", schedule="linear", scale=1.0) -> Expert:
    return Expert(Spy(value), Objective("flow", schedule, scale, levels=levels), clusters, name=name)


def test_experts_split_by_level_are_the_exact_model_at_every_time() -> None:
    # Every time within one batch, and alone.
    x = batch(TIMES)
    expected, u = MIXTURE.velocity(x, TIMES), split().velocity(x, TIMES)
    # The experts of a schedule that ends before t = 1 are not exact there.
    torch.testing.assert_close(u[:-1], expected[:-1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(u, expected, atol=0.1, rtol=0.1)
    for i in range(len(TIMES)):
        alone = split().velocity(x[i : i + 1], TIMES[i : i + 1])
        torch.testing.assert_close(alone, u[i : i + 1], atol=1e-9, rtol=1e-9)


def test_a_network_is_evaluated_at_its_own_levels_only() -> None:
    experts = [spy(COARSE, (0,)), spy((0.2, 0.7), (1,)), spy((0.7, 1), (1,)), spy(FINE, (0, 1))]
    router = lambda x, t, pooled=None: torch.log(x.new_tensor([[0.75, 0.25]])).expand(len(x), 2)  # noqa: E731
    ensemble = Ensemble(experts, router, "full")
    # In both dtypes an edge belongs to the levels above it.
    for dtype in (torch.float64, torch.float32):
        t, times = TIMES.to(dtype), TIMES.tolist()
        for expert in experts:
            expert.network.times.clear()
        Sampler(ensemble).velocity(torch.zeros(len(t), 2, dtype=dtype), t)
        coarse, below, above, fine = (set(expert.network.times) for expert in experts)
        assert (fine, coarse) == (set(times[:4]), set(times[4:]))
        assert (below, above) == (set(times[4:8]), set(times[8:]))
    # The generalist has all of the weight where it is alone.
    weights = ensemble.weights(torch.zeros(2, 2), torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(weights, torch.tensor([[0, 0, 0, 1], [0.75, 0.25, 0, 0]]))
    # A whole sampling, from noise to data.
    for expert in experts:
        expert.network.times.clear()
    sample(Sampler(ensemble).velocity, torch.randn(1, 2), steps=20, method="heun")
    assert all(expert.network.times for expert in experts)
    for expert in experts:
        low, high = expert.levels
        assert all(low <= time < high or time == high == 1 for time in expert.network.times)


def test_levels_are_times_of_the_path_for_every_schedule() -> None:
    experts = [spy(COARSE, (0,), schedule="cosine"), spy(FINE, (0,))]
    ensemble = Ensemble(experts, None, "oracle-0")
    t = torch.tensor([0.19, 0.21], dtype=torch.float64)
    ensemble.velocity(torch.zeros(2, 2, dtype=torch.float64), t)
    expected = round(float(Cosine().time_at(PATH.log_snr(t[1]))), 6)
    assert (experts[0].network.times, experts[1].network.times) == ([expected], [0.19])


def test_a_broader_expert_stands_in_where_a_cluster_has_no_narrower_one() -> None:
    """Cluster 0 has its own expert at some levels, cluster 1 at none; two generalists take turns at one level."""
    experts = [spy((0.5, 1), (0,)), spy(None, (0, 1)), spy((0, 0.25), (0, 1))]
    owners = Owners.of(experts)
    assert owners.edges == (0.25, 0.5)
    assert [table.tolist() for table in owners.tables] == [
        [[0, 0], [1, 1], [1, 1]],
        [[0, 0], [1, 1], [0, 0]],
        [[1, 0], [0, 1], [0, 0]],
    ]
    t = torch.tensor([0.9, 0.1, 0.3])
    shares = owners.shares(torch.tensor([[0.75, 0.25]]).repeat(3, 1), t)
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 0.5, 0.5], [0, 1, 0]]


def test_without_levels_nothing_changes_to_the_bit() -> None:
    experts = [exact(Objective("flow", "linear"), k) for k in (0, 1, 2, 2)] + [exact(Objective("flow", "linear"), None)]
    ensemble, t = Ensemble(experts, MIXTURE.router, "top-2"), torch.rand(32, dtype=torch.float64)
    x = batch(t)
    owners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.float64)
    per_cluster = ensemble.rule.weights(MIXTURE.router(x, t), None)
    assert torch.equal(ensemble.weights(x, t), per_cluster @ (owners / owners.sum(0)).T)
    # Levels that are all of them are none.
    all_levels = [replace(e, objective=Objective("flow", "linear", levels=(0, 1))) for e in experts]
    assert torch.equal(replace(ensemble, experts=all_levels).velocity(x, t), ensemble.velocity(x, t))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([(COARSE, (0,))], r"no expert of cluster 0 at the levels 0 to 0.2; add one of these levels"),
        ([(COARSE, (0,)), (COARSE, (1,)), (FINE, (1,))], "no expert of cluster 0 at the levels 0 to 0.2"),
        (
            [((0, 0.3), (0, 1)), ((0.5, 1), (0,)), ((0.6, 1), (1,))],
            "no expert of cluster 0, 1 at the levels 0.3 to 0.5",
        ),
        ([(None, (0,)), ((0, 0.9), (1,))], "no expert of cluster 1 at the levels 0.9 to 1"),
    ],
)
def test_a_hole_in_the_levels_is_refused(experts, message) -> None:
    with pytest.raises(AtollError, match=message) as error:
        Ensemble([spy(*one) for one in experts], MIXTURE.router, "full")
    assert "\n" not in str(error.value)


def test_a_routing_over_experts_is_refused() -> None:
    experts = [spy(COARSE, (0,), name="a"), spy(FINE, (0,), name="b")]
    with pytest.raises(AtollError, match="a routing over experts, but a, b are of some levels only"):
        Ensemble(experts, None, "time-switch-0.2:a:b")


def test_an_expert_that_fails_is_dropped_if_its_levels_have_another() -> None:
    experts = [spy(COARSE, (0,), torch.nan, "bad"), spy(COARSE, (1,), 1.0, "good"), spy(FINE, (0, 1), 2.0, "fine")]
    router = lambda x, t, pooled=None: x.new_zeros(len(x), 2)  # noqa: E731
    sampler, t = Sampler(Ensemble(experts, router, "full")), torch.tensor([0.1, 0.5])
    with pytest.warns(UserWarning, match="bad answered with NaN"):
        u = sampler.velocity(torch.zeros(2, 3), t)
    assert u[:, 0].tolist() == [2.0, 1.0]
    experts = [spy(COARSE, (0, 1), 1.0, "good"), spy(FINE, (0, 1), torch.nan, "fine")]
    with pytest.raises(AtollError, match=r"fine answered with NaN .*; all experts of the levels 0 to 0.2 are excluded"):
        Sampler(Ensemble(experts, router, "full")).velocity(torch.zeros(2, 3), t)


def test_a_weak_ensemble_may_be_split_otherwise_but_without_holes() -> None:
    whole = Ensemble([exact(Objective("flow", "linear"), k) for k in range(3)], MIXTURE.router, "full")
    t = TIMES[:-1]
    x = batch(t)
    # Both are exact, so guidance changes nothing.
    for guided in (replace(whole, weak=split()), split(weak=whole), split(weak=split())):
        u = guided.velocity(x, t, guidance_scale=3.0)
        torch.testing.assert_close(u, MIXTURE.velocity(x, t), atol=1e-5, rtol=1e-5)
    # An excluded expert leaves a hole at some levels.
    with pytest.raises(AtollError, match="the weak ensemble has no expert of cluster 0"):
        replace(whole, weak=split(excluded=frozenset({0})))


def test_only_replicas_of_equal_levels_are_stacked() -> None:
    names = ("a", "b")
    stacking = Stacking(names, torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.ones(2, 2) / 2, torch.zeros(2))
    same = [spy(COARSE, (0,), 1.0, "a"), spy(COARSE, (0,), 3.0, "b"), spy(FINE, (0,), 5.0, "c")]
    (group,) = replica_groups(same, [stacking])
    assert (group.members, group.stacking) == ((0, 1), stacking)
    ensemble = Ensemble(same, None, "oracle-0", stackings=[stacking])
    t = torch.tensor([0.1, 0.5], dtype=torch.float64)
    velocity = ensemble.velocity(torch.zeros(2, 2, dtype=torch.float64), t)
    torch.testing.assert_close(velocity[:, 0], torch.tensor([5.0, 2.0], dtype=torch.float64))
    # Of other levels, they share equally where both are.
    other = [same[0], spy((0.6, 1), (0,), 3.0, "b"), same[2]]
    assert replica_groups(other, [stacking]) == ()
    u = Ensemble(other, None, "oracle-0", stackings=[stacking]).velocity(
        torch.zeros(3, 2), torch.tensor([0.1, 0.5, 0.8])
    )
    torch.testing.assert_close(u[:, 0], torch.tensor([5.0, 1.0, 2.0]))


def test_a_stacking_is_measured_within_the_window() -> None:
    pytest.importorskip("scipy")
    experts = [spy(COARSE, (0,), 1.0, "a"), spy(COARSE, (0,), 3.0, "b")]
    stacking = measure_stacking(experts, torch.randn(8, 2), [None, None], torch.zeros(2), samples=8)
    times = PATH.time_at(stacking.log_snr.double())
    assert (len(times), round(float(times.min()), 4)) == (16, 0.2)


def test_what_loads_next_counts_the_experts_of_the_levels() -> None:
    ensemble, t = split(), torch.tensor([0.1, 0.1], dtype=torch.float64)
    routed = ensemble.route(ensemble.query(batch(t), t))
    assert routed.active == (4,)
    torch.testing.assert_close(torch.tensor(routed.selection_probs()), torch.tensor([0.0, 0, 0, 0, 1]))
