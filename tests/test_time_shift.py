"""Timestep shifts: the published formulas, training times of every schedule, and configurations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.objective import Objective
from atoll.schedule import PATH, Cosine, Linear, LinearBeta, TableSchedule
from atoll.solver import shifted_times
from atoll.time_shift import TimeShift, check_shift, shift_time

SHIFTS = st.floats(0.02, 50)
TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)
SCHEDULES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "linear-beta": LinearBeta(),
    "zero-terminal-snr": TableSchedule(torch.linspace(0.999, 0, 50, dtype=torch.float64)),
}


@given(SHIFTS, SHIFTS)
def test_a_shift_moves_the_log_snr_by_twice_its_logarithm(a, b) -> None:
    inside = TIMES[1:-1]
    torch.testing.assert_close(
        PATH.log_snr(shift_time(inside, a)), PATH.log_snr(inside) - 2 * math.log(a), atol=1e-9, rtol=1e-9
    )
    # The ends stay, 1 changes nothing, and two shifts are one.
    assert shift_time(TIMES, a)[[0, -1]].tolist() == [0, 1]
    torch.testing.assert_close(shift_time(TIMES, 1.0), TIMES)
    torch.testing.assert_close(shift_time(shift_time(TIMES, a), b), shift_time(TIMES, a * b))


def test_ddms_shift_of_the_log_snr_is_a_shift_of_times() -> None:
    shift = TimeShift.parse({"log_snr": 3}).at(1)
    moved = PATH.log_snr(shift_time(TIMES[1:-1], shift))
    torch.testing.assert_close(moved, PATH.log_snr(TIMES[1:-1]) - 3)
    assert shift == pytest.approx(4.4817, abs=1e-4)


def test_sd3s_shift_is_the_root_of_the_ratio_of_tokens() -> None:
    # Eq. 23: n = 256 px has no shift, m = 1024 px has sqrt(16).
    assert [TimeShift.parse({"rule": "sd3"}).at((side // 16) ** 2) for side in (256, 512, 1024)] == [1, 2, 4]


def test_the_grid_of_a_solver() -> None:
    assert shifted_times(8, 1.0) is None
    times = shifted_times(8, 3.0)
    assert times is not None
    torch.testing.assert_close(times, shift_time(torch.linspace(1, 0, 9, dtype=torch.float64), 3.0))
    with pytest.raises(AtollError, match="steps is 0; expected at least 1"):
        shifted_times(0, 3.0)


def test_shifted_training_times_of_the_linear_path_follow_the_formula() -> None:
    plain = Objective("flow", "linear").sample_time(4096, torch.Generator().manual_seed(0))
    shifted = Objective("flow", "linear", shift=3).sample_time(4096, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted, shift_time(plain.double(), 3.0).float(), atol=1e-6, rtol=1e-6)
    # By the tokens of the batch.
    by_tokens = Objective("flow", "linear", shift={"rule": "sd3"})
    for tokens, shift in ((256, 1.0), (1024, 2.0)):
        drawn = by_tokens.sample_time(64, torch.Generator().manual_seed(0), tokens)
        expected = Objective("flow", "linear", shift=shift).sample_time(64, torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "flow"])
@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_shifted_training_times_of_any_schedule(schedule, prediction, sampling) -> None:
    objective = Objective(prediction, SCHEDULES[schedule], time_sampling=sampling)
    shifted = Objective(prediction, SCHEDULES[schedule], time_sampling=sampling, shift=3.0)
    plain, moved = (one.sample_time(2000, torch.Generator().manual_seed(1)).double() for one in (objective, shifted))
    low, high = objective.support
    assert (low <= moved).all()
    assert (moved <= high).all()
    # Towards noise, in the same order, and none piles up at the edge.
    assert (moved >= plain - 1e-6).all()
    order = plain.argsort()
    assert (moved[order].diff() >= 0).all()
    assert len(moved.unique()) > 1900
    # In the middle of the support the log-SNR falls by 2 log s, up to the stretch to the support.
    log_snr = [SCHEDULES[schedule].log_snr(t) for t in (plain, moved)]
    middle = (log_snr[0] > -3) & (log_snr[0] < 3)
    fall = (log_snr[0] - log_snr[1])[middle]
    # This table's support ends at a log-SNR of -3.9: there is less room to move to.
    low = 1.3 if schedule == "zero-terminal-snr" else 0.9 * 2 * math.log(3)
    assert low < fall.mean() < 1.1 * 2 * math.log(3)


@pytest.mark.parametrize(
    "config", [3.0, 0.5, {"rule": "flux"}, {"rule": "sd3", "base_tokens": 1024}, {"rule": "sd3", "base_tokens": 256}]
)
def test_a_card_rebuilds_the_shift(config) -> None:
    objective = Objective("flow", "linear", shift=config)
    assert objective.config()["shift"] == config
    again = Objective(**objective.config())
    assert again.shift == objective.shift
    assert "shift" not in Objective("flow", "linear").config()


@pytest.mark.parametrize(
    "config",
    [
        *("3", True, [], {}, {"rule": "sd4"}, {"rule": "flux", "base_tokens": 3}, {"rule": "sd3", "base_tokens": 2.5}),
        *({"log_snr": "3"}, {"log_snr": math.nan}, {"log_snr": 1e9}, {"log_snr": 1, "rule": "sd3"}),
        *(0, -1, 1e-9, 1e9, math.inf, math.nan, {"rule": "sd3", "base_tokens": 0}),
    ],
)
def test_another_shift_is_refused(config) -> None:
    with pytest.raises(AtollError, match=r"^shift .*expected a"):
        Objective("flow", "linear", shift=config)


@pytest.mark.parametrize("shift", [0, -1.0, 1e9, math.nan, True, "3", None])
def test_the_solvers_shift_is_checked(shift) -> None:
    with pytest.raises(AtollError, match=r"shift is .*; expected a number from 0\.001 to 1000"):
        check_shift(shift)
