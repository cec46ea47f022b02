"""The oracle: with exact experts of any objectives, the ensemble is the exact global model."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import atoll.solver
from atoll.calibration import Calibration
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert
from atoll.objective import Objective
from atoll.schedule import PATH, Cosine, Linear, LinearBeta, TableSchedule
from atoll.shapes import per_sample
from atoll.testing import GaussianMixture, sliced_wasserstein
from atoll.train.calibrate import measure_calibration

SCHEDULES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "linear-beta": LinearBeta(),
    "table": TableSchedule(torch.linspace(0.9999, 0.0001, 37, dtype=torch.float64)),
    "zero-terminal-snr": TableSchedule(torch.linspace(0.999, 0, 50, dtype=torch.float64)),
}
PREDICTIONS = ("eps", "x0", "v", "flow")
PAIRS = list(itertools.product(PREDICTIONS, SCHEDULES))
SHAPE = (2, 3, 1)


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    return GaussianMixture.random(components=9, clusters=4, shape=SHAPE, seed=1)


def inside_support(objectives: list[Objective], count: int, seed: int = 0) -> torch.Tensor:
    """Times of the linear path that every objective's support covers."""
    edges = [o.schedule.log_snr(torch.tensor(o.support, dtype=torch.float64)) for o in objectives]
    low = max(float(PATH.time_at(edge[0])) for edge in edges)
    high = min(float(PATH.time_at(edge[1])) for edge in edges)
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, generator=g, dtype=torch.float64)


def noisy_batch(mixture: GaussianMixture, t: torch.Tensor, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x0, _ = mixture.sample(len(t), g)
    return PATH.diffuse(x0, torch.randn(x0.shape, generator=g, dtype=x0.dtype), t)


def ensemble_of(mixture: GaussianMixture, objectives: list[Objective], routing: str = "full") -> Ensemble:
    experts = [
        Expert(mixture.network(objective, k), objective, (k,), name=str(k)) for k, objective in enumerate(objectives)
    ]
    return Ensemble(experts, mixture.router, routing=routing)


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_four_experts_of_one_objective_are_exact(mixture, prediction, schedule) -> None:
    objectives = [Objective(prediction, SCHEDULES[schedule])] * 4
    t = inside_support(objectives, 64)
    x = noisy_batch(mixture, t)
    torch.testing.assert_close(
        ensemble_of(mixture, objectives).velocity(x, t), mixture.velocity(x, t), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_objectives_is_exact(mixture, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(PAIRS), (4,), generator=g).tolist()
    objectives = [Objective(PAIRS[i][0], SCHEDULES[PAIRS[i][1]], time_scale=[1.0, 999.0][i % 2]) for i in chosen]
    t = inside_support(objectives, 64, seed)
    x = noisy_batch(mixture, t, seed)
    torch.testing.assert_close(
        ensemble_of(mixture, objectives).velocity(x, t), mixture.velocity(x, t), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_finite_at_every_time_and_continuous_at_the_edges(mixture, prediction, schedule) -> None:
    objective = Objective(prediction, SCHEDULES[schedule])
    ensemble = ensemble_of(mixture, [objective] * 4)
    everywhere = torch.cat([torch.tensor([0.0, 1e-9, 1e-6, 1 - 1e-9, 1.0]), torch.linspace(0, 1, 200)]).double()
    assert torch.isfinite(ensemble.velocity(noisy_batch(mixture, everywhere), everywhere)).all()

    edges = PATH.time_at(objective.schedule.log_snr(torch.tensor(objective.support, dtype=torch.float64)))
    # At a distance of 1e-9 of t = 0 or 1 the mixture's own velocity is already lost to rounding: edges inside only.
    for edge in edges[(edges > 1e-3) & (edges < 1 - 1e-3)]:
        t = edge + torch.tensor([-1e-9, 1e-9]).double()
        x = noisy_batch(mixture, edge.expand(1)).expand(2, *SHAPE)
        below, above = ensemble.velocity(x, t)
        torch.testing.assert_close(below, above, atol=1e-5, rtol=1e-5)


def test_at_pure_noise_the_velocity_is_x_minus_x0(mixture) -> None:
    objective = Objective("eps", LinearBeta())
    expert = Expert(mixture.network(objective, 0), objective)
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    t = torch.ones(5, dtype=torch.float64)
    mean = mixture.x0_eps(x, t, PATH, cluster=0)[0]
    torch.testing.assert_close(expert.velocity(x, t), x - mean, atol=0.1, rtol=0.1)


def test_below_the_clean_edge_the_velocity_stays_that_of_the_edge(mixture) -> None:
    """If x0 were kept there instead of eps, the velocity would grow like 1/t."""
    objective = Objective("eps", TableSchedule([0.9, 0.5, 0.01]))
    expert = Expert(lambda x, time, condition: torch.ones_like(x), objective)
    t = torch.tensor([1e-2, 1e-4, 1e-8], dtype=torch.float64)
    x = torch.full((3, *SHAPE), 0.5, dtype=torch.float64)
    torch.testing.assert_close(expert.velocity(x, t)[2], torch.full(SHAPE, 0.5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_native_alignment_is_wrong_unless_the_schedule_is_linear(mixture) -> None:
    """HDDM's Eqs. 5-8 read literally: off by more than 5 % for a cosine expert, exact for a linear flow expert."""
    t = torch.full((256,), 0.5, dtype=torch.float64)
    x = noisy_batch(mixture, t)
    exact = mixture.velocity(x, t)
    for objective, off in ((Objective("eps", Cosine()), True), (Objective("flow", Linear()), False)):
        native = replace(ensemble_of(mixture, [objective] * 4), alignment="native").velocity(x, t)
        error = float((native - exact).norm() / exact.norm())
        assert (error > 0.05) == off


def test_samples_of_a_mixed_ensemble_reach_the_floor(mixture) -> None:
    objectives = [
        Objective("eps", Cosine()),
        Objective("flow", Linear()),
        Objective("x0", LinearBeta()),
        Objective("v", Cosine()),
    ]
    count = 3000
    g = torch.Generator().manual_seed(3)
    reference = mixture.sample(count, g)[0]
    floor = sliced_wasserstein(mixture.sample(count, g)[0], reference)
    noise = torch.randn(count, *SHAPE, generator=g, dtype=torch.float64)
    drawn = atoll.solver.sample(ensemble_of(mixture, objectives).velocity, noise, steps=60, method="heun")
    assert sliced_wasserstein(drawn, reference) < 1.5 * floor + 0.01
    assert sliced_wasserstein(noise, reference) > 5 * floor


def test_calibration_repairs_samples_of_biased_eps_experts(mixture) -> None:
    """A constant eps-error of 20 % ruins samples, with HDDM's clamp too; a measured calibration repairs them."""
    objective = Objective("eps", Cosine())
    plain, clamped, calibrated = [], [], []
    for k in range(4):
        exact = mixture.network(objective, k)
        bias = 0.2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(k), dtype=torch.float64)

        def network(x, time, condition=None, exact=exact, bias=bias):
            return exact(x, time) + bias

        latents = mixture.cluster(k).sample(400, torch.Generator().manual_seed(k))[0]
        calibration = measure_calibration(network, objective, latents, None, seed=k)
        clamped.append(Expert(network, objective, (k,)))
        plain.append(Expert(network, objective, (k,), Calibration.identity(calibration.mean)))
        calibrated.append(Expert(network, objective, (k,), calibration))
    g = torch.Generator().manual_seed(9)
    reference = mixture.sample(1500, g)[0]
    noise = torch.randn(1500, *SHAPE, generator=g, dtype=torch.float64)

    def distance(experts: list[Expert]) -> float:
        ensemble = Ensemble(experts, mixture.router, routing="full")
        return sliced_wasserstein(atoll.solver.sample(ensemble.velocity, noise, steps=40), reference)

    assert distance(calibrated) < 0.4 * distance(clamped) < 0.4 * distance(plain)


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_from_negative_prompts_of_their_own_is_exact(scale) -> None:
    """Each prompt is a mixture: an image of prompt p, negative n gets u_n + g (u_p - u_n) of the exact mixtures."""
    mixtures = [GaussianMixture.random(components=4, clusters=1, shape=SHAPE, seed=seed) for seed in range(4)]
    objective = Objective("eps", Cosine())
    networks = [one.network(objective) for one in mixtures]

    def network(x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
        assert condition is not None
        # The first number of a condition is the mixture that it describes.
        named = condition.states[:, 0, 0].long().tolist()
        answers = [exact(x, time) for exact in networks]
        return torch.stack([answers[number][row] for row, number in enumerate(named)])

    def states(*numbers: int) -> tuple[Condition]:
        values = torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1, 1)
        return (Condition(values, torch.ones(len(numbers), 1, dtype=torch.bool)),)

    ensemble = Ensemble([Expert(network, objective, (0,))], None, "full")
    cache = ensemble.prompt_cache(states(0, 1), states(2, 3), prompt_of=[0, 0, 1, 1, 1])
    t = inside_support([objective], 5)
    x = noisy_batch(mixtures[0], t)
    positive = torch.stack([mixtures[m].velocity(x, t)[row] for row, m in enumerate((0, 0, 1, 1, 1))])
    negative = torch.stack([mixtures[m].velocity(x, t)[row] for row, m in enumerate((2, 2, 3, 3, 3))])
    u = ensemble.velocity(x, t, None, scale, prompt_cache=cache)
    torch.testing.assert_close(u, negative + scale * (positive - negative), atol=1e-6, rtol=1e-6)
    # Each image with a guidance scale and a range of its own; in the fourth one's range there is no guidance.
    scales = torch.tensor([1.0, 2.0, 0.0, 3.5, scale], dtype=torch.float64)
    start = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    u = ensemble.velocity(x, t, None, scales, guidance_range=(start, torch.ones(5)), prompt_cache=cache)
    scales[3] = 1.0
    torch.testing.assert_close(u, negative + per_sample(scales, x) * (positive - negative), atol=1e-6, rtol=1e-6)
