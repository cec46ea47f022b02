"""Solvers: measured orders, known special cases, and agreement with diffusers."""

import itertools
import math
from typing import get_args

import pytest
import torch
from typer.testing import CliRunner

from atoll.alignment import snr_velocity
from atoll.calibration import Calibration
from atoll.choices import Method
from atoll.cli import app
from atoll.errors import AtollError
from atoll.evaluate.sweep import parse_sweep
from atoll.manifest.evaluation import EvaluateSettings
from atoll.manifest.run import SamplingSettings
from atoll.objective import Objective
from atoll.schedule import PATH, Cosine, Linear, LinearBeta
from atoll.solver import Integration, sample, times_of
from atoll.testing import GaussianMixture

MIXTURE = GaussianMixture.random(components=5, clusters=2, shape=(3, 2), seed=2)


def noise(count=16, seed=0):
    return torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("dpm++2m", 2), ("unipc", 3.5)]
)
def test_error_falls_with_the_order_of_the_method(method, order) -> None:
    """Halving the step divides the error by 2^order. Ends inside (0, 1), where all of them are regular."""

    def solve(steps, how=method):
        return sample(MIXTURE.velocity, noise(), method=how, times=torch.linspace(0.9, 0.1, steps + 1).double())

    exact = solve(4000, "heun")
    errors = [float((solve(steps) - exact).norm()) for steps in (32, 64, 128)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "dpm++2m", "unipc"])
def test_from_noise_to_data_all_methods_agree(method) -> None:
    exact = sample(MIXTURE.velocity, noise(), steps=3000, method="heun")
    x0 = sample(MIXTURE.velocity, noise(), steps=400, method=method)
    assert torch.isfinite(x0).all()
    assert float((x0 - exact).abs().mean()) < 0.02


GAUSSIAN = {  # the rms error at 50 evaluations, for data of standard deviation 1, 0.5 and 0.1: docs/mathematics.md
    "euler": (2.5e-2, 1.5e-2, 8.5e-3),
    "heun": (8.7e-4, 1.3e-3, 6.1e-3),
    "midpoint": (8.9e-6, 7.4e-6, 7.8e-5),
    "dpm++2m": (5.6e-4, 1.7e-3, 1.1e-4),
    "unipc": (1.63e-4, 2.55e-4, 4.44e-4),
}


@pytest.mark.parametrize("method", GAUSSIAN)
def test_errors_on_a_gaussian_are_those_of_the_documentation(method) -> None:
    """The exact solution carries noise z to s z."""
    z = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale, error in zip((1.0, 0.5, 0.1), GAUSSIAN[method], strict=True):
        calls = []

        def velocity(x, t, scale=scale, calls=calls):
            calls.append(float(t[0]))
            return (t - (1 - t) * scale**2) / ((1 - t) ** 2 * scale**2 + t**2) * x

        x0 = sample(velocity, z, steps=25 if method in ("heun", "midpoint") else 50, method=method)
        assert float((x0 - scale * z).square().mean().sqrt()) == pytest.approx(error, rel=0.04)
        assert len(calls) == (49 if method == "heun" else 50)
        assert min(calls) > 0  # no expert was trained at t = 0


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "dpm++2m", "unipc"])
def test_each_sample_follows_its_own_times(method) -> None:
    """A batch with different times per sample gives what each sample gives alone."""
    start = noise(2)
    grids = torch.stack([torch.linspace(1, 0, 11), torch.linspace(0.8, 0.2, 11)], dim=1).double()
    together = sample(MIXTURE.velocity, start, method=method, times=grids)
    for i in range(2):
        alone = sample(MIXTURE.velocity, start[i : i + 1], method=method, times=grids[:, i])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_dpm_solver_of_one_step_is_ddim() -> None:
    start, times = noise(), torch.tensor([0.7, 0.4]).double()
    torch.testing.assert_close(
        sample(MIXTURE.velocity, start, method="dpm++2m", times=times),
        sample(MIXTURE.velocity, start, method="euler", times=times),
    )


@pytest.mark.parametrize("end", [0.05, 0.0])
def test_unipc_equals_diffusers(end) -> None:
    """Below 1, where its system of equations is singular; the order is lowered before 0 only."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        solver_order=3,
        flow_shift=1.0,
        lower_order_final=end == 0,
    )
    scheduler.set_timesteps(12)
    scheduler.sigmas = torch.linspace(0.95, end, 13, dtype=torch.float64)
    x = noise()
    for index, step_time in enumerate(scheduler.timesteps):
        x = scheduler.step(MIXTURE.velocity(x, scheduler.sigmas[index].expand(len(x))), step_time, x).prev_sample
    torch.testing.assert_close(sample(MIXTURE.velocity, noise(), method="unipc", times=scheduler.sigmas), x)


def test_unipc_needs_half_of_the_evaluations_of_dpm_solver() -> None:
    exact = sample(MIXTURE.velocity, noise(), steps=3000, method="heun")
    errors = {
        (method, steps): float((sample(MIXTURE.velocity, noise(), steps, method) - exact).norm())
        for method, steps in (("dpm++2m", 40), ("unipc", 20), ("dpm++2m", 80), ("unipc", 40))
    }
    assert errors["unipc", 20] < errors["dpm++2m", 40]
    assert errors["unipc", 40] < errors["dpm++2m", 80]


def test_euler_equals_diffusers_flow_match_euler() -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 20, 20).tolist())
    x = noise().float()
    for index, step_time in enumerate(scheduler.timesteps):
        t = scheduler.sigmas[index].expand(len(x))
        x = scheduler.step(MIXTURE.velocity(x.double(), t.double()).float(), step_time, x).prev_sample
    ours = sample(lambda x, t: MIXTURE.velocity(x.double(), t.double()).float(), noise().float(), steps=20)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", [Cosine(), LinearBeta(), Linear()])
def test_times_of_a_schedule_have_its_log_snr(schedule) -> None:
    times = times_of(schedule, 8)
    assert times.shape == (9,)
    assert (times.diff() < 0).all()
    assert times[-1] == 0
    own = torch.linspace(1, 0, 9).double()[1:-1]
    torch.testing.assert_close(PATH.log_snr(times[1:-1]), schedule.log_snr(own))
    if isinstance(schedule, Linear):
        torch.testing.assert_close(times, torch.linspace(1, 0, 9).double())
    with pytest.raises(AtollError, match="steps is 0"):
        times_of(schedule, 0)


def test_a_ddpm_expert_on_the_linear_path_is_ddim_at_the_matched_times() -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    ddim = schedulers.DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(25)
    objective = Objective("eps", LinearBeta())
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def network(x, time):
        return torch.tanh(x.flatten(1) @ weight + time[:, None] / 999).reshape(x.shape)

    x = noise()
    indices = ddim.timesteps.tolist()
    for index in indices:
        x = ddim.step(network(x, torch.full((len(x),), float(index)).double()), index, x).prev_sample

    # The same on the linear path: Euler between the times of equal log-SNR, x scaled by the ratio of the alphas.
    ddim_times = torch.tensor(indices).double() / 999
    times = PATH.time_at(LinearBeta().log_snr(ddim_times))
    ratio = (1 - times) / LinearBeta().alpha(ddim_times)
    # diffusers holds its table in float32: 1e-5 is its precision.
    ours = sample(
        lambda x, t: snr_velocity(network, objective, x, t, Calibration.identity(torch.zeros(()))),
        noise() * ratio[0],
        times=times,
    )
    torch.testing.assert_close(ours / ratio[-1], x, rtol=1e-4, atol=1e-4)


def test_callback_receives_every_step() -> None:
    seen = []
    end = sample(MIXTURE.velocity, noise(), steps=7, callback=lambda index, x: seen.append((index, x)))
    assert [index for index, _ in seen] == list(range(7))
    torch.testing.assert_close(seen[-1][1], end)


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0},
        {"method": "rk4"},
        {"times": torch.tensor([0.2, 0.8])},
        {"times": torch.tensor([1.5, 0.0])},
        {"times": torch.tensor([1.0])},
    ],
)
def test_bad_arguments_are_refused(arguments) -> None:
    with pytest.raises(AtollError):
        sample(MIXTURE.velocity, noise(), **arguments)


@pytest.mark.parametrize("method", get_args(Method))
def test_a_method_can_be_chosen_wherever_a_solver_is(method) -> None:
    """In atoll.yaml for samples, measured images and sweeps, and on the command line."""
    assert SamplingSettings(method=method).method == method
    assert EvaluateSettings(method=method).method == method
    assert parse_sweep([f"method={method},euler"]).method[0] == method
    for verb in (["sample"], ["synthesize"]):
        shown = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
        assert method in shown


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "dpm++2m", "unipc"])
def test_samplings_that_share_evaluations_are_those_that_do_not(method) -> None:
    """Two integrations that began at different moments, with one call of the velocity for both."""

    def velocity(x, t):
        return torch.sin(3 * x) + t[:, None] * x

    noise = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    alone = [sample(velocity, own, steps, method) for own, steps in zip(noise, (4, 7), strict=True)]
    first, second = Integration(noise[0], 4, method), Integration(noise[1], 7, method)
    first.advance(velocity(*first.point))
    while running := [one for one in (first, second) if one.point is not None]:
        x, t = (torch.cat(parts) for parts in zip(*(one.point for one in running), strict=True))
        for one, u in zip(running, velocity(x, t).split([len(one.x) for one in running]), strict=True):
            one.advance(u)
    assert (first.step, second.step) == (4, 7)
    torch.testing.assert_close([first.x, second.x], alone, rtol=0, atol=0)
