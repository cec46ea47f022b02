"""Objectives: what a network is trained to output, and how its output becomes the pair (x0, eps) and a velocity.

With x = alpha x0 + sigma eps, the output is a second equation for the two unknowns. All four predictions are
equivalent:

    eps     x0  = (x - sigma eps) / alpha                     (Ho et al. 2020)
    x0      eps = (x - alpha x0) / sigma
    v       v = alpha eps - sigma x0                          (Salimans & Ho 2022)
    flow    u = alpha' x0 + sigma' eps                        (Lipman et al. 2023)
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.schedule import PATH, Schedule, build_schedule
from atoll.shapes import per_sample
from atoll.storage.bounds import MAX_TIME
from atoll.time_shift import TimeShift, shift_time

Prediction = Literal["eps", "x0", "v", "flow"]
TimeSampling = Literal["uniform", "logit-normal"]
Weighting = Literal["none", "min-snr", "prop1"]

# Beyond +-20, alpha or sigma is below 4.5e-5: dividing by it loses all digits of float32.
LOG_SNR_LIMIT = 20.0

# Path time by which a network of some levels is trained beyond them, so that it is no extrapolation at their edges.
LEVEL_MARGIN = 0.05


class Objective:
    """Prediction, schedule, time sampling and loss weighting: what a contributor chooses.

    Args:
        prediction: what the network outputs: "eps", "x0", "v" or "flow".
        schedule: a `Schedule`, or a configuration for `build_schedule`.
        time_scale: the network receives t * time_scale as time; default 999 for DiT's 0..999 (HDDM Eq. 20).
        time_sampling: "uniform" over the support, or "logit-normal" (Esser et al. 2024, m = 0, s = 1); over the
            window, if there are levels.
        shift: moves the training times towards noise, see `atoll.time_shift`: a number, {"log_snr": 3}, {"rule": "sd3"}
            or {"rule": "flux"}; None: not at all. Sampling takes the same shift by default.
        levels: (low, high), the noise levels at which an ensemble evaluates the network, as times of the linear path
            of equal log-SNR: low <= t < high, and t = 1 if high is 1. Training draws its times from a wider `window`.
            None: all of them.
        weighting: "none"; "min-snr" (Hang et al. 2023, gamma = 5, written for every prediction); "prop1": the error
            of the velocity on the sampling path at equal log-SNR, for every prediction (HDDM Proposition 1).

    Raises:
        AtollError: an unknown prediction, schedule, time sampling, weighting or shift; a time scale out of bounds;
            levels that are no two increasing times, none that the schedule has, or levels together with a shift.
    """

    def __init__(
        self,
        prediction: Prediction,
        schedule: Schedule | str | dict[str, Any],
        time_scale: float = 999.0,
        time_sampling: TimeSampling = "uniform",
        weighting: Weighting = "none",
        shift: Any = None,
        levels: Any = None,
    ):
        # Configurations come from cards and atoll.yaml, so every choice is checked.
        for name, value, known in (
            ("prediction", prediction, get_args(Prediction)),
            ("time_sampling", time_sampling, get_args(TimeSampling)),
            ("weighting", weighting, get_args(Weighting)),
        ):
            if value not in known:
                raise AtollError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")
        if isinstance(time_scale, bool) or not isinstance(time_scale, int | float) or not 0 < time_scale <= MAX_TIME:
            raise AtollError(f"time_scale {time_scale!r:.40}; expected a number above 0, at most {MAX_TIME:g}")
        self.prediction: Prediction = prediction
        # A card holds the schedule's configuration, a script may pass the object.
        self.schedule = schedule if isinstance(schedule, Schedule) else build_schedule(schedule)
        self.time_scale = time_scale
        self.time_sampling: TimeSampling = time_sampling
        self.weighting: Weighting = weighting
        self.shift = None if shift is None else TimeShift.parse(shift)
        self.levels = None if levels is None else _parse_levels(levels)
        self._check_window()

    @property
    def support(self) -> tuple[float, float]:
        """(t_min, t_max) where the output determines both x0 and eps in floating point.

        This is the schedule's support without the end where this prediction divides by 0: an eps-network does not
        determine x0 where alpha is 0, and an x0-network does not determine eps where sigma is 0.
        """
        t_min, t_max = self.schedule.support
        # The times at which alpha or sigma becomes too small to divide by.
        limit = torch.tensor([LOG_SNR_LIMIT, -LOG_SNR_LIMIT], dtype=torch.float64)
        low, high = self.schedule.time_at(limit).tolist()
        # An x0-network determines no eps near the data, an eps-network no x0 near the noise.
        if self.prediction == "x0":
            t_min = max(t_min, low)
        if self.prediction == "eps":
            t_max = min(t_max, high)
        return t_min, t_max

    @property
    def level_window(self) -> tuple[float, float]:
        """The levels that training covers, as path times: `levels`, wider by `LEVEL_MARGIN` except at 0 and 1."""
        if self.levels is None:
            return 0.0, 1.0
        return max(0.0, self.levels[0] - LEVEL_MARGIN), min(1.0, self.levels[1] + LEVEL_MARGIN)

    @property
    def window(self) -> tuple[float, float]:
        """(t_min, t_max) of the training times: the `level_window` in the schedule's own time, within `support`."""
        t_min, t_max = self.support
        low, high = self.level_window
        if self.levels is None:
            return t_min, t_max
        # An edge at 0 or 1 is no edge, and its log-SNR infinite.
        first, last = self.schedule.time_at(PATH.log_snr(torch.tensor([low, high], dtype=torch.float64))).tolist()
        return (max(t_min, first) if low > 0 else t_min), (min(t_max, last) if high < 1 else t_max)

    def trains_at(self, log_snr: float) -> bool:
        """Return whether a noise level is within the `level_window`."""
        low, high = self.level_window
        return low <= float(PATH.time_at(torch.tensor(log_snr, dtype=torch.float64))) <= high

    def _check_window(self) -> None:
        """Raise AtollError if the levels leave nothing to train on, or are not known together with the shift."""
        if self.levels is None:
            return
        low, high = self.levels
        if self.shift is not None:
            raise AtollError(
                f"levels {low:g} to {high:g} with a shift: the times are drawn from the levels alone; leave out one"
            )
        t_min, t_max = self.window
        if not t_min < t_max:
            edges = self.schedule.log_snr(torch.tensor(self.support, dtype=torch.float64))
            known = " to ".join(f"{t:.3g}" for t in PATH.time_at(edges).tolist())
            raise AtollError(
                f"levels {low:g} to {high:g}: {self.prediction} on {self.schedule.config()['name']} knows path times "
                f"{known} only; expected some of them"
            )

    def sample_time(self, batch: int, generator: torch.Generator | None = None, tokens: int = 1) -> Tensor:
        """Draw training times inside the window, [batch] float32; without levels, that is the support.

        Args:
            batch: their number.
            generator: of the draw.
            tokens: image tokens of the network, on which a shift may depend.
        """
        # Times outside the support would train on targets that are not finite.
        t_min, t_max = self.window
        if self.time_sampling == "uniform":
            unit = torch.rand(batch, generator=generator)
        else:
            # Denser in the middle of the window than at its ends.
            unit = torch.sigmoid(torch.randn(batch, generator=generator))
        t = t_min + (t_max - t_min) * unit
        return t if self.shift is None else self._shifted(t, self.shift.at(tokens))

    def _shifted(self, t: Tensor, shift: float) -> Tensor:
        """Return training times [B] shifted by s.

        The shift acts on the linear path's times of equal log-SNR, so it is the same for every schedule. The result is
        stretched back to the support, which on the linear path changes nothing: no level is lost, and none piles up.
        """
        edges = torch.tensor(self.support, dtype=torch.float64)
        low, high = PATH.time_at(self.schedule.log_snr(edges)).tolist()
        new_low, new_high = shift_time(torch.tensor([low, high], dtype=torch.float64), shift).tolist()
        path = shift_time(PATH.time_at(self.schedule.log_snr(t.double())).clamp(low, high), shift)
        path = low + (path - new_low) * ((high - low) / (new_high - new_low))
        return self.schedule.time_at(PATH.log_snr(path)).clamp(*self.support).to(t.dtype)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the output that the network is trained towards; x0, eps [B, ...], t [B] -> [B, ...]."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        if self.prediction == "v":
            alpha, sigma = self._alpha_sigma(t, x0)
            return alpha * eps - sigma * x0
        # Flow: the derivative of x along the schedule.
        d_alpha, d_sigma = self._derivatives(t, x0)
        return d_alpha * x0 + d_sigma * eps

    def loss(self, output: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the weighted mean squared error of each sample.

        Args:
            output: of the network, [B, ...], any float dtype.
            x0: data [B, ...], float32 or float64: the dtype of the loss.
            eps: noise [B, ...].
            t: times [B].

        Returns:
            [B], the mean over all axes but the batch.
        """
        # Networks may run in bfloat16; the loss does not.
        error = output.to(x0.dtype) - self.target(x0, eps, t)
        # The mean over all axes but the batch, so that samples are weighted one by one.
        squared = error.square().flatten(1).mean(dim=1)
        return squared if self.weighting == "none" else squared * self.weight(t)

    def weight(self, t: Tensor) -> Tensor:
        """Return the loss weight [B] at times t [B], a factor on the squared error of this prediction."""
        if self.weighting == "none":
            return torch.ones_like(t)
        # The weight of a squared error of x0.
        log_snr = self.schedule.log_snr(t)
        if self.weighting == "min-snr":
            weight_of_x0 = torch.exp(log_snr).clamp(max=5.0)
        else:  # On the linear path u - u_hat = -(x0 - x0_hat)/sigma, with sigma = sigmoid(-log_snr / 2).
            weight_of_x0 = torch.sigmoid(-log_snr / 2) ** -2
        # An x0 error of 1 is an error of `gain` in the output.
        return weight_of_x0 / self.x0_error_gain(t) ** 2

    def x0_error_gain(self, t: Tensor) -> Tensor:
        """Return |d output / d x0| at fixed x, [B]: the output's error for an x0 error of 1."""
        # From x = alpha x0 + sigma eps at fixed x: d eps / d x0 = -alpha / sigma.
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if self.prediction == "eps":
            return alpha / sigma
        if self.prediction == "x0":
            return torch.ones_like(t)
        if self.prediction == "v":
            return (alpha**2 + sigma**2) / sigma
        return (alpha * self.schedule.d_sigma(t) / sigma - self.schedule.d_alpha(t)).abs()

    def to_x0_eps(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Convert the network's output at (x, t) to (x0, eps).

        Args:
            output: of the network, [B, ...].
            x: its input [B, ...]; the results have its dtype.
            t: times [B] inside `support`.

        Returns:
            (x0, eps), each [B, ...], with x = alpha x0 + sigma eps.
        """
        # The dtype of x: a network in bfloat16 must not round the sampler's state.
        output = output.to(x.dtype)
        alpha, sigma = self._alpha_sigma(t, x)
        if self.prediction == "eps":
            return (x - sigma * output) / alpha, output
        if self.prediction == "x0":
            return output, (x - alpha * output) / sigma
        # A table's alpha^2 + sigma^2 is 1 only up to rounding.
        if self.prediction == "v":
            norm = alpha**2 + sigma**2
            return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
        # Solve x = alpha x0 + sigma eps, u = alpha' x0 + sigma' eps.
        d_alpha, d_sigma = self._derivatives(t, x)
        det = alpha * d_sigma - sigma * d_alpha
        return (d_sigma * x - sigma * output) / det, (alpha * output - d_alpha * x) / det

    def to_velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Convert the network's output at (x, t) to dx/dt = alpha' x0 + sigma' eps on this objective's own path.

        Args:
            output: of the network, [B, ...]. A flow network's output already is the velocity.
            x: its input [B, ...]; the result has its dtype.
            t: times [B] inside `support`.

        Returns:
            The velocity [B, ...].
        """
        if self.prediction == "flow":
            return output.to(x.dtype)
        # The velocity follows from the two estimates by the schedule's derivatives.
        x0, eps = self.to_x0_eps(output, x, t)
        d_alpha, d_sigma = self._derivatives(t, x)
        return d_alpha * x0 + d_sigma * eps

    def _alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return per_sample(self.schedule.alpha(t), like), per_sample(self.schedule.sigma(t), like)

    def _derivatives(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return per_sample(self.schedule.d_alpha(t), like), per_sample(self.schedule.d_sigma(t), like)

    def config(self) -> dict[str, Any]:
        """Return the card's entry; `Objective(**config)` is its inverse."""
        # Everything that the constructor takes, so that the card alone rebuilds the objective.
        return {
            "prediction": self.prediction,
            "schedule": self.schedule.config(),
            "time_scale": self.time_scale,
            "time_sampling": self.time_sampling,
            "weighting": self.weighting,
            **({} if self.shift is None else {"shift": self.shift.config()}),
            **({} if self.levels is None else {"levels": list(self.levels)}),
        }

    def __repr__(self) -> str:
        return f"Objective({self.prediction}, {self.schedule.config()['name']})"


def _parse_levels(levels: Any) -> tuple[float, float]:
    """Return the levels of a card or of atoll.yaml. Raises AtollError for anything but 0 <= low < high <= 1."""
    pair = list(levels) if isinstance(levels, list | tuple) else []
    numbers = [value for value in pair if isinstance(value, int | float) and not isinstance(value, bool)]
    # NaN fails the comparison, too.
    if not len(pair) == len(numbers) == 2 or not 0 <= numbers[0] < numbers[1] <= 1:
        raise AtollError(
            f"levels {levels!r:.40}; expected two times of the linear path, 0 <= low < high <= 1: [0.2, 1]"
        )
    return float(numbers[0]), float(numbers[1])
