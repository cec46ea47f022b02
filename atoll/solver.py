"""Solvers: integrate dx/dt = velocity(x, t) from noise (t = 1) to data (t = 0) on the linear path.

Every time is per sample: t passed to `velocity` has shape [B].
"""

from collections.abc import Callable, Generator
from typing import get_args

import torch
from torch import Tensor

from atoll.choices import Method
from atoll.errors import AtollError
from atoll.schedule import PATH, Schedule
from atoll.shapes import per_sample
from atoll.time_shift import shift_time
from atoll.unipc import UniPC

Velocity = Callable[[Tensor, Tensor], Tensor]
# A step yields each (x, t) at which it needs the velocity, is sent that velocity, and returns x at t_next.
_Evaluations = Generator[tuple[Tensor, Tensor], Tensor, Tensor]
_Step = Callable[[Tensor, Tensor, Tensor], _Evaluations]  # (x, t, t_next)


def sample(
    velocity: Velocity,
    noise: Tensor,
    steps: int = 50,
    method: Method = "euler",
    *,
    times: Tensor | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample x0 from noise.

    Args:
        velocity: (x [B, ...], t [B]) -> dx/dt [B, ...]; `Ensemble.velocity` with its condition bound by `partial`.
        noise: x [B, ...] at the first time; its dtype is the dtype of the integration.
        steps: number of evenly spaced steps from 1 to 0, default 50.
        method: "euler"; "heun" (2 evaluations per step, the last step is Euler's); "midpoint" (2 evaluations per step);
            "dpm++2m" (Lu et al. 2022, multistep, 1 evaluation per step); or "unipc" (Zhao et al. 2023, order 3, 1
            evaluation per step).
        times: decreasing times, [steps + 1] or per sample [steps + 1, B], instead of evenly spaced ones.
        callback: called after each step with (index, x).

    Returns:
        x [B, ...] at the last time.

    Raises:
        AtollError: an unknown method, steps < 1, or times that do not decrease within [0, 1].
    """
    integration = Integration(noise, steps, method, times=times)
    while integration.point is not None:
        index = integration.step
        integration.advance(velocity(*integration.point))
        # Some methods evaluate the velocity twice per step.
        if callback is not None and integration.step > index:
            callback(index, integration.x)
    return integration.x


class Integration:
    """One sampling from noise to data, advanced by whoever evaluates the velocity; `sample` is the usual way.

    Several integrations, each at its own time, can so share the evaluations of one velocity:

        while integration.point is not None:
            integration.advance(velocity(*integration.point))

    Args:
        noise, steps, method, times: as in `sample`.

    Attributes:
        x: the samples [B, ...] after `step` steps.
        step: steps that are done.
        steps: number of steps.
        point: (x [B, ...], t [B]) at which the velocity is needed next; None at the end.

    Raises:
        AtollError: as in `sample`.
    """

    def __init__(self, noise: Tensor, steps: int = 50, method: Method = "euler", *, times: Tensor | None = None):
        # The times of all steps, per sample: [steps + 1, B].
        if method not in get_args(Method):
            raise AtollError(f"unknown method {method!r}; expected one of {', '.join(get_args(Method))}")
        if times is None:
            if steps < 1:
                raise AtollError(f"steps is {steps}; expected at least 1")
            times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
        # The grid has the dtype and the device of the noise.
        grid = times.to(noise)
        grid = grid[:, None].expand(-1, len(noise)) if grid.ndim == 1 else grid
        if len(grid) < 2 or (grid.diff(dim=0) >= 0).any() or grid.max() > 1 or grid.min() < 0:
            raise AtollError("times must be at least two, strictly decreasing, within [0, 1]")

        # Stop at the first point.
        self.x, self.step, self.steps = noise, 0, len(grid) - 1
        functions: dict[str, _Step] = {"euler": _euler, "heun": _heun, "midpoint": _midpoint, "dpm++2m": _Multistep()}
        functions["unipc"] = _Corrected(self.steps, grid[-1] == 0)
        self._evaluations = self._integrate(functions[method], grid)
        self.point: tuple[Tensor, Tensor] | None = next(self._evaluations)

    def advance(self, velocity: Tensor) -> None:
        """Go on to the next point, with the velocity [B, ...] at this one."""
        try:
            self.point = self._evaluations.send(velocity)
        except StopIteration:
            self.point = None

    def _integrate(self, step: _Step, grid: Tensor) -> Generator[tuple[Tensor, Tensor], Tensor, None]:
        """Do all steps; `x` and `step` change at the end of each."""
        for index in range(self.steps):
            self.x = yield from step(self.x, grid[index], grid[index + 1])
            self.step = index + 1


def shifted_times(steps: int, shift: float) -> Tensor | None:
    """Return even times of the linear path, shifted towards noise (`atoll.time_shift`); what `sample` takes as `times`.

    Returns:
        [steps + 1] float64 from 1 to 0; None, which is the even grid, for a shift of 1.

    Raises:
        AtollError: steps < 1.
    """
    if steps < 1:
        raise AtollError(f"steps is {steps}; expected at least 1")
    return None if shift == 1 else shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def times_of(schedule: Schedule, steps: int) -> Tensor:
    """Return the times of the linear path that have the log-SNR of `schedule` at its own evenly spaced times.

    With these times, Euler's steps on an exactly aligned expert of that schedule are DDIM's steps (Song et al. 2021).

    Returns:
        [steps + 1] float64, decreasing. The last time is 0; the first is where the schedule ends, 1 if its terminal
        SNR is zero.

    Raises:
        AtollError: steps < 1.
    """
    if steps < 1:
        raise AtollError(f"steps is {steps}; expected at least 1")
    times = PATH.time_at(schedule.log_snr(torch.linspace(1, 0, steps + 1, dtype=torch.float64)))
    # A table's log-SNR is finite at its clean end; sampling must still reach the data.
    times[-1] = 0.0
    return times


def _euler(x: Tensor, t: Tensor, t_next: Tensor) -> _Evaluations:
    u = yield x, t
    return x + per_sample(t_next - t, x) * u


def _heun(x: Tensor, t: Tensor, t_next: Tensor) -> _Evaluations:
    """Trapezoid rule; samples that arrive at t = 0 take the Euler step, since no expert was trained there."""
    # The Euler step predicts the point at which the slope is evaluated again.
    h = per_sample(t_next - t, x)
    u = yield x, t
    x_next = x + h * u
    # Samples may have different times, so some can arrive before others.
    inside = t_next > 0
    if not inside.any():
        return x_next
    u_next = yield x_next, t_next
    corrected = x + h * (u + u_next) / 2
    return torch.where(per_sample(inside, x), corrected, x_next)


def _midpoint(x: Tensor, t: Tensor, t_next: Tensor) -> _Evaluations:
    """Explicit midpoint rule (Runge 1895); also the last step is of second order, since it never evaluates at t = 0."""
    # An Euler step of half the length predicts the point whose slope carries the whole step.
    t_half = (t + t_next) / 2
    u = yield x, t
    x_half = x + per_sample(t_half - t, x) * u
    u_half = yield x_half, t_half
    return x + per_sample(t_next - t, x) * u_half


class _Multistep:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2) for alpha = 1 - t, sigma = t, with l = log(alpha/sigma).

    x_next = (sigma_next/sigma) x + alpha_next (1 - e^-h) D,  D = x0 + (x0 - x0_previous) h/(2 h_previous).
    l is infinite at t = 1 and t = 0: steps that touch an end are first order, which is their exact limit.
    """

    def __init__(self) -> None:
        self.previous: tuple[Tensor, Tensor] | None = None  # (x0, h) of the last step

    def __call__(self, x: Tensor, t: Tensor, t_next: Tensor) -> _Evaluations:
        # The data estimate at this point, from the velocity.
        u = yield x, t
        x0 = x - per_sample(t, x) * u
        h = (PATH.log_snr(t_next) - PATH.log_snr(t)) / 2
        # D: the estimate of x0, extrapolated from the last two steps.
        extrapolated = x0
        # The first step has no predecessor and is first order.
        if self.previous is not None:
            x0_previous, h_previous = self.previous
            ratio = torch.where(torch.isfinite(h), h / (2 * h_previous), 0)
            extrapolated = x0 + per_sample(ratio, x) * (x0 - x0_previous)
        self.previous = (x0, h)
        # alpha_next e^-h = alpha sigma_next/sigma, which is finite at both ends.
        shrink = t_next / t
        return per_sample(shrink, x) * x + per_sample((1 - t_next) - (1 - t) * shrink, x) * extrapolated


class _Corrected:
    """UniPC: each evaluation corrects its point and predicts the next one (`atoll.unipc`)."""

    def __init__(self, steps: int, to_zero: Tensor) -> None:
        self.unipc = UniPC(steps, to_zero)

    def __call__(self, x: Tensor, t: Tensor, t_next: Tensor) -> _Evaluations:
        u = yield x, t
        return self.unipc.step(x, t, t_next, u)
