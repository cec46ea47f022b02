"""Objectives: predictions and their inverses, loss weights, and training times."""

import itertools

import pytest
import torch

from atoll.errors import AtollError
from atoll.objective import Objective
from atoll.schedule import Cosine, Linear, LinearBeta, TableSchedule

SCHEDULES = [Linear(), Cosine(), LinearBeta(), TableSchedule([0.99, 0.6, 0.2, 0.01])]
PAIRS = list(itertools.product(("eps", "x0", "v", "flow"), SCHEDULES))


def batch(count=37, shape=(2, 3, 5)):
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(count, *shape, generator=g, dtype=torch.float64) for _ in range(2))
    return x0, eps, g


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_every_prediction_determines_x0_and_eps(prediction, schedule) -> None:
    objective = Objective(prediction, schedule)
    x0, eps, g = batch()
    t_min, t_max = objective.support
    t = t_min + (t_max - t_min) * torch.rand(len(x0), generator=g, dtype=torch.float64).clamp(0.01, 0.99)
    x = objective.schedule.diffuse(x0, eps, t)
    converted = objective.to_x0_eps(objective.target(x0, eps, t), x, t)
    torch.testing.assert_close(converted, (x0, eps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_velocity_is_the_derivative_of_the_own_path(prediction, schedule) -> None:
    objective = Objective(prediction, schedule)
    x0, eps, _ = batch()
    # Away from a table's knots, where its log-SNR has two slopes.
    t = torch.linspace(0.1, 0.6, len(x0), dtype=torch.float64)
    h = 1e-7
    difference = (objective.schedule.diffuse(x0, eps, t + h) - objective.schedule.diffuse(x0, eps, t - h)) / (2 * h)
    velocity = objective.to_velocity(objective.target(x0, eps, t), objective.schedule.diffuse(x0, eps, t), t)
    torch.testing.assert_close(velocity, difference, rtol=1e-4, atol=1e-5)


def test_flow_on_the_linear_path_is_eps_minus_x0() -> None:
    x0, eps, _ = batch()
    t = torch.rand(len(x0), dtype=torch.float64)
    torch.testing.assert_close(Objective("flow", "linear").target(x0, eps, t), eps - x0)


def test_v_is_salimans_and_hos() -> None:
    x0, eps, _ = batch()
    t = torch.full((len(x0),), 0.3, dtype=torch.float64)
    s = Cosine()
    torch.testing.assert_close(Objective("v", s).target(x0, eps, t), s.alpha(t[0]) * eps - s.sigma(t[0]) * x0)


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_x0_error_gain_is_the_change_of_the_output(prediction, schedule) -> None:
    """At fixed x an error d of x0 is an error gain * d of the output (HDDM Proposition 1)."""
    objective = Objective(prediction, schedule)
    x0, eps, _ = batch()
    t = torch.linspace(0.1, 0.6, len(x0), dtype=torch.float64)
    x = objective.schedule.diffuse(x0, eps, t)
    off = torch.ones_like(x0)
    alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (objective.schedule.alpha, objective.schedule.sigma))
    changed = objective.target(x0 + off, (x - alpha * (x0 + off)) / sigma, t) - objective.target(x0, eps, t)
    torch.testing.assert_close(changed.abs()[:, 0, 0, 0], objective.x0_error_gain(t), rtol=1e-9, atol=1e-9)


def test_prop1_weighting_makes_all_losses_the_velocitys() -> None:
    """On the linear path an eps loss weights the velocity error by (1 - t)^2, an x0 loss by t^2; `prop1` undoes both.

    All four predictions then have the same loss (HDDM Proposition 1).
    """
    x0, eps, _ = batch()
    t = torch.linspace(0.05, 0.95, len(x0), dtype=torch.float64)
    velocity_weight = {"eps": (1 - t) ** 2, "x0": t**2, "flow": torch.ones_like(t)}
    for prediction, expected in velocity_weight.items():
        objective = Objective(prediction, "linear")
        torch.testing.assert_close(1 / Objective(prediction, "linear", weighting="prop1").weight(t), expected)
        assert (objective.weight(t) == 1).all()
    guess = x0 + 0.3 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(4), dtype=x0.dtype)
    losses = []
    for prediction in ("eps", "x0", "v", "flow"):
        objective = Objective(prediction, "linear", weighting="prop1")
        x = objective.schedule.diffuse(x0, eps, t)
        s = t.reshape(-1, 1, 1, 1)
        losses.append(objective.loss(objective.target(guess, (x - (1 - s) * guess) / s, t), x0, eps, t))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_min_snr_is_hang_et_als() -> None:
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    snr = torch.exp(Cosine().log_snr(t))
    torch.testing.assert_close(Objective("eps", "cosine", weighting="min-snr").weight(t), snr.clamp(max=5) / snr)
    torch.testing.assert_close(Objective("x0", "cosine", weighting="min-snr").weight(t), snr.clamp(max=5))
    torch.testing.assert_close(Objective("v", "cosine", weighting="min-snr").weight(t), snr.clamp(max=5) / (snr + 1))


def test_loss_is_per_sample_and_in_the_data_dtype() -> None:
    x0, eps, _ = batch()
    t = torch.rand(len(x0), dtype=torch.float64)
    objective = Objective("eps", "linear")
    loss = objective.loss((eps + 2).to(torch.bfloat16), x0, eps, t)
    assert loss.shape == (len(x0),)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, torch.full_like(loss, 4.0), rtol=2e-2, atol=0)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_sampled_times_lie_in_the_support(prediction, schedule, sampling) -> None:
    objective = Objective(prediction, schedule, time_sampling=sampling)
    t = objective.sample_time(5000, torch.Generator().manual_seed(0))
    t_min, t_max = objective.support
    assert t.dtype == torch.float32
    assert t.min() >= t_min - 1e-7
    assert t.max() <= t_max + 1e-7
    assert abs(float(t.mean()) - (t_min + t_max) / 2) < 0.02


def test_eps_has_no_support_where_alpha_is_zero() -> None:
    assert Objective("eps", "linear").support[1] < 1
    assert Objective("flow", "linear").support == (0.0, 1.0)
    assert Objective("x0", "linear").support[0] > 0


def test_config_round_trip() -> None:
    for prediction, schedule in PAIRS:
        objective = Objective(prediction, schedule, 1000.0, "logit-normal", "min-snr")
        assert Objective(**objective.config()).config() == objective.config()


@pytest.mark.parametrize(
    "arguments",
    [
        {"prediction": "epsilon", "schedule": "linear"},
        {"prediction": "eps", "schedule": "line"},
        {"prediction": "eps", "schedule": "linear", "time_sampling": "normal"},
        {"prediction": "eps", "schedule": "linear", "weighting": "snr"},
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(arguments) -> None:
    with pytest.raises(AtollError, match="expected one of"):
        Objective(**arguments)
