"""Schedules: derivatives, inverses and known values of alpha, sigma and log-SNR."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.schedule import SCHEDULES, Cosine, Linear, LinearBeta, TableSchedule, build_schedule

ALL = [Linear(), Cosine(), LinearBeta(), TableSchedule([0.99, 0.7, 0.3, 0.01]), TableSchedule([0.9, 0.5, 0.1, 0.0])]


def inside(schedule, count=997, dtype=torch.float64):
    t_min, t_max = schedule.support
    return torch.linspace(t_min, t_max, count + 2, dtype=dtype)[1:-1]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_derivatives_equal_autograd(schedule) -> None:
    t = inside(schedule).requires_grad_()
    for value, derivative in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        (gradient,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(t.detach()), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_time_at_inverts_log_snr(schedule, dtype, tolerance) -> None:
    t = inside(schedule, dtype=dtype)
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(t)), t, rtol=0, atol=tolerance)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_log_snr_decreases_and_is_that_of_alpha_and_sigma(schedule) -> None:
    t = inside(schedule)
    log_snr = schedule.log_snr(t)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(log_snr, 2 * torch.log(schedule.alpha(t) / schedule.sigma(t)))


@pytest.mark.parametrize("schedule", [s for s in ALL if not isinstance(s, Linear)], ids=repr)
def test_variance_is_preserved(schedule) -> None:
    t = inside(schedule)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_diffuse_mixes_data_and_noise_of_each_sample_at_its_own_time(schedule) -> None:
    t, x0, eps = inside(schedule, count=3), *torch.randn(2, 3, 2, 5, 4, dtype=torch.float64)
    x = schedule.diffuse(x0, eps, t)
    for i in range(3):
        torch.testing.assert_close(x[i], schedule.alpha(t[i]) * x0[i] + schedule.sigma(t[i]) * eps[i])


def test_known_values() -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    assert Linear().log_snr(half) == 0
    end = torch.tensor([0.0, 1.0], dtype=torch.float64)
    on_linear_path = Linear().time_at(LinearBeta().log_snr(end))  # the support of DiT's schedule
    torch.testing.assert_close(on_linear_path, torch.tensor([0.0099, 0.9937]).double(), atol=5e-5, rtol=0)
    assert Cosine().alpha(end)[1] == 0


def test_tables_equal_diffusers() -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    index = torch.arange(1000, dtype=torch.float64)
    ddpm = schedulers.DDPMScheduler(beta_schedule="linear")
    ours = LinearBeta().alpha(index / 999) ** 2
    torch.testing.assert_close(ours, ddpm.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    cosine = schedulers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    # diffusers' index i stands at t = (i + 1)/1000 of the continuous schedule; its last beta is capped.
    torch.testing.assert_close(Cosine().alpha((index + 1) / 1000)[:-1] ** 2, cosine[:-1], rtol=1e-3, atol=1e-7)


def test_zero_terminal_snr_ends_one_index_earlier() -> None:
    schedule = TableSchedule([0.9, 0.5, 0.1, 0.0])
    assert schedule.support == (0.0, 2 / 3)
    assert schedule.time_at(torch.tensor([-50.0])) == pytest.approx(2 / 3)


def test_outside_the_support_time_is_the_edge() -> None:
    for schedule in ALL:
        t_min, t_max = schedule.support
        edges = schedule.time_at(torch.tensor([300.0, -300.0], dtype=torch.float64))
        torch.testing.assert_close(edges, torch.tensor([t_min, t_max], dtype=torch.float64), rtol=0, atol=1e-12)


@given(st.lists(st.floats(1e-6, 0.9), min_size=2, max_size=400))
def test_any_decreasing_table_is_a_schedule(decays) -> None:
    table = 0.9999 * torch.cumprod(1 - torch.tensor(decays, dtype=torch.float64), 0)
    if not (table > 0).all():
        return
    schedule = TableSchedule(table)
    index = torch.arange(len(table), dtype=torch.float64) / (len(table) - 1)
    torch.testing.assert_close(schedule.alpha(index) ** 2, table, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "table", [[0.5], [0.5, 0.5], [0.1, 0.9], [1.0, 0.5], [0.5, -0.1], [0.5, float("nan")], [[0.5]]]
)
def test_bad_tables_are_refused(table) -> None:
    with pytest.raises(AtollError, match="TableSchedule"):
        TableSchedule(table)


def test_config_round_trip() -> None:
    t = torch.tensor([0.2, 0.4], dtype=torch.float64)
    for schedule in ALL:
        again = build_schedule(schedule.config())
        assert type(again) is type(schedule)
        torch.testing.assert_close(again.alpha(t), schedule.alpha(t))
    assert set(SCHEDULES) == {"linear", "cosine", "linear-beta", "table"}


@pytest.mark.parametrize("config", ["cosin", {"name": "cosine", "q": 1}, {}, {"name": "cosine", "s": 0}])
def test_unknown_schedules_are_refused(config) -> None:
    with pytest.raises(AtollError):
        build_schedule(config)
