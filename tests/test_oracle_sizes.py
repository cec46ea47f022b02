"""The oracle at two sizes: one ensemble of exact experts is the exact global model at both, on a shifted grid too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import atoll.solver
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert
from atoll.objective import Objective
from atoll.schedule import Cosine, Linear, LinearBeta
from atoll.solver import shifted_times
from atoll.testing import GaussianMixture, sliced_wasserstein
from atoll.train.calibrate import measure_shapes
from tests.test_oracle import inside_support, noisy_batch

SIZES = ((2, 3, 1), (2, 1, 4))
OBJECTIVES = [
    Objective("eps", Cosine(), shift={"rule": "sd3", "base_tokens": 2}),
    Objective("flow", Linear(), shift=3.0),
    Objective("x0", LinearBeta(), time_scale=1.0),
    Objective("v", Cosine(), shift={"log_snr": 3}),
]


@pytest.fixture(scope="module")
def mixtures() -> dict[tuple[int, ...], GaussianMixture]:
    """Images of two sizes: a mixture of each, whose clusters have other weights in it."""
    return {size: GaussianMixture.random(9, 4, size, seed=seed) for seed, size in enumerate(SIZES, start=1)}


@pytest.fixture(scope="module")
def ensemble(mixtures) -> Ensemble:
    """One expert per cluster, of four objectives; each of them, and the router, computes both sizes."""

    def network(k: int) -> Callable[[Tensor, Tensor, Condition | None], Tensor]:
        exact = {size: mixture.network(OBJECTIVES[k], k) for size, mixture in mixtures.items()}
        return lambda x, time, condition=None: exact[tuple(x.shape[1:])](x, time, condition)

    def router(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        return mixtures[tuple(x.shape[1:])].router(x, t)

    experts = [Expert(network(k), objective, (k,), name=str(k)) for k, objective in enumerate(OBJECTIVES)]
    return Ensemble(experts, router, routing="full")


@pytest.mark.parametrize("size", SIZES)
def test_the_velocity_is_the_exact_one_at_each_size(mixtures, ensemble, size) -> None:
    t = inside_support(OBJECTIVES, 64)
    x = noisy_batch(mixtures[size], t)
    torch.testing.assert_close(ensemble.velocity(x, t), mixtures[size].velocity(x, t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_one_calibration_over_both_sizes_keeps_it_exact(mixtures, ensemble, size) -> None:
    # Of the mean of one size, resized to the other: exact experts have the slope 1, whatever the mean.
    mean = mixtures[SIZES[0]].means.mean(0)
    experts = []
    for k, expert in enumerate(ensemble.experts):
        drawn = [mixture.cluster(k).sample(64, torch.Generator().manual_seed(k))[0] for mixture in mixtures.values()]
        groups = [(latents, None) for latents in drawn]
        calibration = measure_shapes(expert.network, expert.objective, groups, mean=mean, samples=512)
        experts.append(Expert(expert.network, expert.objective, expert.clusters, calibration, expert.name))
    t = torch.full((64,), 0.3, dtype=torch.float64)
    x = noisy_batch(mixtures[size], t)
    exact = mixtures[size].velocity(x, t)
    calibrated = Ensemble(experts, ensemble.router, routing="full").velocity(x, t)
    assert float((calibrated - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("size", SIZES)
def test_samples_on_a_shifted_grid_reach_the_floor(mixtures, ensemble, size) -> None:
    count, mixture = 1200, mixtures[size]
    g = torch.Generator().manual_seed(3)
    reference = mixture.sample(count, g)[0]
    floor = sliced_wasserstein(mixture.sample(count, g)[0], reference)
    noise = torch.randn(count, *size, generator=g, dtype=torch.float64)
    drawn = atoll.solver.sample(ensemble.velocity, noise, method="heun", times=shifted_times(40, 3.0))
    assert sliced_wasserstein(drawn, reference) < 1.5 * floor + 0.02
    assert sliced_wasserstein(noise, reference) > 5 * floor
