"""Replicas of a cluster: stacking on the oracle, where the best combination is known."""

from dataclasses import replace

import pytest
import torch

from atoll.calibration import NODES, Calibration
from atoll.ensemble import Ensemble, Expert
from atoll.ensemble.replicas import Stacking, measure_stacking, replica_weights
from atoll.errors import AtollError
from atoll.objective import Objective
from atoll.testing import GaussianMixture
from atoll.train.calibrate import measure_calibration

SHAPE = (2, 3, 1)
EPS, FLOW = Objective("eps", "cosine"), Objective("flow", "linear")


@pytest.fixture
def mixture():
    return GaussianMixture.random(6, 2, SHAPE, seed=3)


@pytest.fixture
def latents(mixture):
    return mixture.cluster(0).sample(600, torch.Generator().manual_seed(1))[0]


def noisy(mixture, objective, level, seed, start=0.0, cluster=0):
    """An expert of cluster 0 whose network errs by a function of x, of root mean square `level`, above t = start."""
    exact = mixture.network(objective, cluster)
    g = torch.Generator().manual_seed(seed)
    weight = 3 * torch.randn(6, 6, generator=g, dtype=torch.float64)

    def network(x, time, condition=None):
        error = 1.4 * torch.sin(x.flatten(1) @ weight).reshape(x.shape)
        wrong = (time / objective.time_scale >= start).reshape(-1, 1, 1, 1)
        return exact(x, time) + level * wrong * error

    return Expert(network, objective, (cluster,), name=f"{objective.prediction}-{seed}")


def stack(experts, latents, **options):
    return measure_stacking(experts, latents, [None] * len(experts), latents.mean(0), samples=2000, **options)


def x0_error(ensemble, mixture, latents, t):
    """Mean squared error of the ensemble's x0 against the exact denoiser's, at time t."""
    g = torch.Generator().manual_seed(5)
    times = torch.full((len(latents),), t, dtype=torch.float64)
    x = (1 - t) * latents + t * torch.randn(latents.shape, generator=g, dtype=torch.float64)
    u = ensemble.velocity(x, times)
    exact = mixture.x0_eps(x, times, FLOW.schedule, 0)[0]
    return float((x - t * u - exact).square().mean())


def test_a_perfect_replica_gets_all_the_weight(mixture, latents) -> None:
    experts = [noisy(mixture, FLOW, 0.0, 1), noisy(mixture, FLOW, 0.8, 2)]
    stacking = stack(experts, latents)
    assert stacking.names == ("flow-1", "flow-2")
    assert (stacking.log_snr.diff() > 0).all()
    middle = stacking.log_snr.abs() < 4
    assert (stacking.weights[middle, 0] > 0.9).all()
    assert (stacking.weights[middle, 1] < 0.1).all()
    assert (stacking.weights >= 0).all()


def test_weights_switch_where_the_better_replica_changes(mixture, latents) -> None:
    """One replica is right below t = 0.5, the other above; stacking finds the switch."""
    early, late = noisy(mixture, FLOW, 0.7, 1, start=0.5), noisy(mixture, FLOW, 0.0, 2)

    def wrong_below(x, time, condition=None):
        below = (time / FLOW.time_scale < 0.5).reshape(-1, 1, 1, 1)
        return late.network(x, time) + 0.7 * below * torch.sin(5 * x)

    stacking = stack([early, replace(late, network=wrong_below)], latents)
    weights, _ = stacking.at(torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))
    assert (weights[:2, 0] > 0.9).all()
    assert (weights[2:, 1] > 0.9).all()


def test_stacking_a_useless_replica_equals_calibration(mixture, latents) -> None:
    """With a useless second replica, stacking measures the slope that calibration measures."""
    expert = noisy(mixture, EPS, 0.3, 1)
    noise = Objective("x0", "linear")
    useless = Expert(lambda x, time, condition=None: torch.sin(1e6 * x), noise, (0,), name="useless")
    stacking = stack([expert, useless], latents)
    calibration = measure_calibration(expert.network, EPS, latents, None, mean=latents.mean(0), samples=2000)
    high = calibration.log_snr < 2
    torch.testing.assert_close(stacking.weights[high, 0], calibration.slope[high].float(), atol=0.04, rtol=0)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.6, 0.9])
def test_stacked_replicas_are_no_worse_than_the_better_one(mixture, latents, t) -> None:
    experts = [noisy(mixture, EPS, 0.15, 1), noisy(mixture, FLOW, 0.35, 2)]
    calibrated = [
        replace(e, calibration=measure_calibration(e.network, e.objective, latents, None, samples=2000))
        for e in experts
    ]
    together = Ensemble(
        calibrated, lambda x, t, p=None: x.new_zeros(len(x), 1), "full", stackings=[stack(experts, latents)]
    )
    alone = [x0_error(Ensemble([e], None), mixture, latents, t) for e in calibrated]
    assert x0_error(together, mixture, latents, t) < 1.02 * min(alone)
    equal = replace(together, replicas="equal")
    assert x0_error(together, mixture, latents, t) <= 1.02 * x0_error(equal, mixture, latents, t)


def test_stacked_velocity_by_hand_and_finite_at_both_ends() -> None:
    nodes = torch.tensor([-6.0, 0.0, 6.0])
    mean = torch.full(SHAPE, 0.5, dtype=torch.float64)
    stacking = Stacking(("a", "b"), mean, nodes, torch.tensor([[0.0, 0.0], [0.2, 0.5], [0.0, 1.0]]), torch.zeros(3))

    def constant(value):
        return lambda x, time, condition=None: torch.full_like(x, value)

    experts = [Expert(constant(2.0), FLOW, (0,), name="a"), Expert(constant(3.0), FLOW, (0,), name="b")]
    ensemble = Ensemble(experts, lambda x, t, p=None: x.new_zeros(len(x), 1), "full", stackings=[stacking])
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    t = torch.tensor([0.5, 0.0, 1.0, 1e-6], dtype=torch.float64)
    u = ensemble.velocity(x, t)
    assert u.isfinite().all()
    torch.testing.assert_close(u[0], 0.2 * 2 + 0.5 * 3 + 0.3 / 0.5 * (x[0] - mean))
    torch.testing.assert_close(u[1], torch.full(SHAPE, 3.0, dtype=torch.float64))
    edge = 1 / (1 + torch.tensor(-3.0, dtype=torch.float64).exp())  # the noisiest node's t
    torch.testing.assert_close(u[2], (x[2] - mean) / edge)
    torch.testing.assert_close(ensemble.weights(x, t).sum(1), torch.ones(4, dtype=torch.float64))


def test_a_replica_without_weight_is_not_evaluated() -> None:
    calls = []

    def counted(x, time, condition=None):
        calls.append(len(x))
        return x

    weights = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    stacking = Stacking(("a", "b"), torch.zeros(SHAPE), torch.tensor([-0.1, 0.1]), weights, torch.zeros(2))
    experts = [Expert(counted, FLOW, (0,), name="a"), Expert(lambda x, time, c=None: x, FLOW, (0,), name="b")]
    ensemble = Ensemble(experts, lambda x, t, p=None: x.new_zeros(len(x), 1), "full", stackings=[stacking])
    ensemble.velocity(torch.randn(3, *SHAPE), torch.tensor([0.1, 0.9, 0.9]))
    assert calls == [1]


def test_other_ways_to_combine_replicas_by_hand(mixture, latents) -> None:
    t = torch.tensor([0.2, 0.49, 0.5, 0.8], dtype=torch.float64)
    nodes = torch.tensor([-5.0, 5.0])
    errors = [torch.tensor([0.1, 0.1]), torch.tensor([0.3, 0.3])]
    experts = [
        replace(noisy(mixture, objective, 0.1, seed), calibration=Calibration(latents[0], nodes, nodes, error, error))
        for seed, (objective, error) in enumerate(zip((EPS, FLOW), errors, strict=True))
    ]
    torch.testing.assert_close(replica_weights("equal", experts, t), torch.full((4, 2), 0.5, dtype=torch.float64))
    expected = torch.tensor([[0.75, 0.25]] * 4, dtype=torch.float64)
    torch.testing.assert_close(replica_weights("inverse-error", experts, t), expected, rtol=1e-5, atol=0)
    switched = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    torch.testing.assert_close(replica_weights("time-switch-0.5", experts, t), switched)
    with pytest.raises(AtollError, match="needs an eps-expert and another one"):
        replica_weights("time-switch-0.5", experts[:1] * 2, t)
    with pytest.raises(AtollError, match="inverse-error needs its calibration"):
        replica_weights("inverse-error", [replace(e, calibration=None) for e in experts], t)
    for wrong in ("best", "time-switch-", "stack"):
        with pytest.raises(AtollError, match="expected stacked, inverse-error"):
            Ensemble(experts, lambda x, t, p=None: x.new_zeros(len(x), 1), replicas=wrong)


def test_a_stacking_applies_to_exactly_its_replicas(mixture, latents) -> None:
    """With a third or a missing replica its weights would be wrong: the replicas then have equal weights."""
    experts = [noisy(mixture, FLOW, 0.0, seed) for seed in (1, 2, 3)]
    stacking = Stacking(
        ("flow-1", "flow-2"), latents.mean(0), torch.tensor([-9.0, 9.0]), torch.tensor([[1.0, 0.0]] * 2), torch.zeros(2)
    )
    x, t = latents[:5], torch.full((5,), 0.5, dtype=torch.float64)

    def router(x, t, pooled=None):
        return x.new_zeros(len(x), 1)

    two = Ensemble(experts[:2], router, stackings=[stacking]).weights(x, t)
    torch.testing.assert_close(two, torch.tensor([[1.0, 0.0]] * 5, dtype=torch.float64))
    backwards = Ensemble(experts[1::-1], router, stackings=[stacking]).weights(x, t)
    torch.testing.assert_close(backwards, torch.tensor([[0.0, 1.0]] * 5, dtype=torch.float64))
    three = Ensemble(experts, router, stackings=[stacking]).weights(x, t)
    torch.testing.assert_close(three, torch.full((5, 3), 1 / 3, dtype=torch.float64))


def test_a_stacking_is_saved_and_loaded_and_broken_ones_are_refused(mixture, latents) -> None:
    stacking = stack([noisy(mixture, EPS, 0.1, 1), noisy(mixture, FLOW, 0.2, 2)], latents)
    again = Stacking.load(stacking.config(), stacking.mean)
    torch.testing.assert_close(again.weights, stacking.weights, atol=1e-6, rtol=0)
    assert again.names == stacking.names
    assert len(again.log_snr) == len(NODES)
    good = stacking.config()
    for key, value in {"names": ["a"], "log_snr": [0.0] * 19, "weights": [[-1.0, 1.0]] * 19, "x0_mse": "x"}.items():
        with pytest.raises(AtollError, match=r"stacking.*run `atoll assemble` again"):
            Stacking.load({**good, key: value}, stacking.mean)


def test_exact_replicas_change_nothing(mixture) -> None:
    """The test above all tests, with replicas: exact experts of any objective, any weights that sum to 1."""
    experts = [
        Expert(mixture.network(objective, k), objective, (k,), name=f"{k}-{objective.prediction}")
        for k in (0, 1)
        for objective in (EPS, FLOW)
    ]
    x = mixture.sample(7, torch.Generator().manual_seed(2))[0]
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    x = (1 - t.reshape(-1, 1, 1, 1)) * x + t.reshape(-1, 1, 1, 1) * torch.randn(x.shape, dtype=torch.float64)
    for mode in ("equal", "time-switch-0.3"):
        ensemble = Ensemble(experts, mixture.router, "full", replicas=mode)
        torch.testing.assert_close(ensemble.velocity(x, t), mixture.velocity(x, t), atol=1e-6, rtol=1e-6)
    stackings = [
        Stacking(
            (f"{k}-flow", f"{k}-eps"), torch.zeros(SHAPE), torch.tensor([-9.0, 9.0]),
            torch.tensor([[0.3, 0.7], [0.9, 0.1]]), torch.zeros(2),
        )
        for k in (0, 1)
    ]  # fmt: skip
    ensemble = Ensemble(experts, mixture.router, "full", stackings=stackings)
    torch.testing.assert_close(ensemble.velocity(x, t), mixture.velocity(x, t), atol=1e-6, rtol=1e-6)
