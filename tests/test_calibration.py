"""Calibration: the measured slope, the correction, and its limits."""

import json

import torch

from atoll.alignment import snr_velocity
from atoll.calibration import NODES, Calibration
from atoll.objective import Objective
from atoll.schedule import PATH
from atoll.testing import GaussianMixture
from atoll.train.calibrate import measure_calibration

SHAPE = (2, 3, 5)


def example() -> Calibration:
    log_snr = torch.linspace(-8, 8, 9, dtype=torch.float64)
    slope = torch.sigmoid(log_snr)
    return Calibration(torch.randn(SHAPE).double(), log_snr, slope, torch.zeros(9), torch.ones(9))


def test_correct_follows_the_line_through_the_mean_and_keeps_x() -> None:
    calibration = example()
    t = PATH.time_at(calibration.log_snr)  # at the nodes the slope is the stored one
    x0, eps = torch.randn(2, len(t), *SHAPE, dtype=torch.float64)
    x0_new, eps_new = calibration.correct(x0, eps, t)
    s = calibration.slope.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x0_new, calibration.mean + s * (x0 - calibration.mean))
    t = t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close((1 - t) * x0_new + t * eps_new, (1 - t) * x0 + t * eps)


def test_correct_is_finite_at_both_ends() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x0, eps = torch.randn(2, 2, *SHAPE, dtype=torch.float64)
    for value in example().correct(x0, eps, t):
        assert torch.isfinite(value).all()


def test_identity_changes_nothing() -> None:
    x0, eps = torch.randn(2, 3, *SHAPE, dtype=torch.float64)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Calibration.identity(torch.zeros(SHAPE)).correct(x0, eps, t), (x0, eps))


def test_an_exact_expert_needs_no_correction() -> None:
    mixture = GaussianMixture.random(components=4, clusters=1, shape=SHAPE, seed=5)
    objective = Objective("flow", "linear")
    latents = mixture.sample(2000, torch.Generator().manual_seed(0))[0]
    calibration = measure_calibration(mixture.network(objective), objective, latents, None, samples=4000)
    assert ((calibration.slope - 1).abs()[calibration.log_snr > -3] < 0.05).all()
    assert (calibration.x0_mse <= calibration.x0_mse_raw + 1e-12).all()


def test_an_overshooting_expert_gets_its_inverse_slope() -> None:
    """An expert whose x0 is three times too far from the mean gets the slope 1/3 and is then exact."""
    mixture = GaussianMixture.random(components=4, clusters=1, shape=SHAPE, seed=5)
    objective = Objective("x0", "cosine")
    latents = mixture.sample(2000, torch.Generator().manual_seed(0))[0]
    mean = latents.mean(0)
    exact = mixture.network(objective)

    def overshooting(x, time, condition=None):
        return mean + 3 * (exact(x, time) - mean)

    calibration = measure_calibration(overshooting, objective, latents, None, mean=mean, samples=4000)
    assert ((calibration.slope - 1 / 3).abs()[calibration.log_snr > -3] < 0.03).all()
    t = torch.full((50,), NODES[5], dtype=torch.float64)
    x = torch.randn(50, *SHAPE, dtype=torch.float64)
    corrected = snr_velocity(overshooting, objective, x, t, calibration)
    exact_u = snr_velocity(exact, objective, x, t, Calibration.identity(mean))
    assert float((corrected - exact_u).norm() / exact_u.norm()) < 0.05


def test_config_round_trip() -> None:
    calibration = example()
    again = Calibration.load(json.loads(json.dumps(calibration.config())), calibration.tensors()["mean"])
    t = torch.rand(7, dtype=torch.float64)
    x0, eps = torch.randn(2, 7, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(again.correct(x0, eps, t), calibration.correct(x0, eps, t), rtol=1e-5, atol=1e-6)
