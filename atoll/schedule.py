"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha(t) x0 + sigma(t) eps.

The convention everywhere in Atoll: t in [0, 1], t = 0 is data and t = 1 is noise; log-SNR = log(alpha^2 / sigma^2).
Foreign conventions (indices 0..999, t reversed, beta tables) are adapted at the edge, here or in `atoll.convert`.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.interpolation import bracket
from atoll.shapes import per_sample

MAX_TABLE = 100_000  # values of a discrete schedule. DDPM has 1,000


class Schedule(abc.ABC):
    """alpha and sigma as functions of t.

    All functions of time work elementwise: any shape and any float dtype in, the same shape and dtype out.
    """

    @property
    @abc.abstractmethod
    def support(self) -> tuple[float, float]:
        """(t_min, t_max): the times for which this schedule is defined. Its log-SNR decreases strictly there."""

    @abc.abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the factor of x0."""

    @abc.abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the factor of eps."""

    @abc.abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Return d alpha / dt."""

    @abc.abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Return d sigma / dt."""

    @abc.abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2); +-inf where sigma or alpha is 0."""

    @abc.abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return the time with this log-SNR: the inverse of `log_snr` inside the support, the nearest edge outside."""

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the card's entry; `build_schedule` is its inverse."""

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha(t) x0 + sigma(t) eps, each sample at its own time; x0, eps [B, ...], t [B] -> [B, ...]."""
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * eps

    def __repr__(self) -> str:
        return f"{type(self).__name__}(support={self.support})"


class Linear(Schedule):
    """The straight path of Flow Matching and of Atoll's sampler: alpha = 1 - t, sigma = t (Lipman et al. 2023)."""

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def log_snr(self, t: Tensor) -> Tensor:
        # log1p keeps the digits of 1 - t for small t.
        return 2 * (torch.log1p(-t) - torch.log(t))

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)

    def config(self) -> dict[str, Any]:
        return {"name": "linear"}


PATH = Linear()  # the sampling path: an ensemble's velocity is dx/dt along it


class Cosine(Schedule):
    """Variance preserving: alpha = cos(a)/cos(a0), a(t) = (t + s)/(1 + s) pi/2 (Nichol & Dhariwal 2021, Eq. 17).

    The support starts at log-SNR 20 (t = 5e-8, sigma = 5e-5): at t = 0 sigma is 0 and its derivative infinite.

    Args:
        s: the offset that keeps the noise of the first steps from being too small, above 0, at most 1, default 0.008.

    Raises:
        AtollError: s is not above 0, or above 1.
    """

    LOG_SNR_MAX = 20.0

    def __init__(self, s: float = 0.008):
        if not 0 < s <= 1:
            raise AtollError(f"Cosine: s is {s}; expected a number above 0, at most 1, usually 0.008")
        self.s = s
        self._a0 = s / (1 + s) * math.pi / 2
        self._speed = math.pi / 2 / (1 + s)  # da/dt
        # The edge of the support is where log-SNR reaches its maximum.
        highest = torch.tensor(self.LOG_SNR_MAX, dtype=torch.float64)
        self._t_min = float(self._inverse(highest))

    @property
    def support(self) -> tuple[float, float]:
        return self._t_min, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        # As a sine, since cos(a) = sin(pi/2 - a) is exactly 0 at t = 1; cos(pi/2) in floating point is not.
        return torch.sin(self._speed * (1 - t)) / math.cos(self._a0)

    def sigma(self, t: Tensor) -> Tensor:
        # sigma^2 = 1 - alpha^2 = (cos^2 a0 - cos^2 a)/cos^2 a0 as a product of sines: no cancellation near t = 0.
        step = self._speed * t
        return torch.sqrt(torch.sin(step) * torch.sin(step + 2 * self._a0)) / math.cos(self._a0)

    def d_alpha(self, t: Tensor) -> Tensor:
        # The derivative of the sine form of alpha.
        return -self._speed * torch.cos(self._speed * (1 - t)) / math.cos(self._a0)

    def d_sigma(self, t: Tensor) -> Tensor:
        # From alpha^2 + sigma^2 = 1.
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    def time_at(self, log_snr: Tensor) -> Tensor:
        return self._inverse(log_snr).clamp(*self.support)

    def _inverse(self, log_snr: Tensor) -> Tensor:
        """Return the time with this log-SNR, not clamped to the support."""
        # Two forms, each without cancellation on its side. Noisy side: alpha cos(a0) = sin(speed (1 - t)).
        cos_a0 = math.cos(self._a0)
        noisy = 1 - torch.asin(cos_a0 * torch.sqrt(torch.sigmoid(log_snr))) / self._speed
        # Clean side: with h = a - a0, q = (sigma cos(a0))^2 = sin(h) sin(h + 2 a0); divided by cos^2(h) this is
        # (cos(2 a0) - q) tan^2(h) + sin(2 a0) tan(h) - q = 0.
        q = cos_a0**2 * torch.sigmoid(-log_snr)
        b = math.sin(2 * self._a0)
        root = torch.sqrt((b * b + 4 * (math.cos(2 * self._a0) - q) * q).clamp(min=0))
        clean = torch.atan2(2 * q, b + root) / self._speed
        return torch.where(log_snr < 0, noisy, clean)

    def config(self) -> dict[str, Any]:
        return {"name": "cosine", "s": self.s}


class TableSchedule(Schedule):
    """A discrete variance-preserving schedule made continuous: index i of T is t = i/(T-1), log-SNR linear between.

    Args:
        alphas_cumprod: the T values of alpha^2 (DDPM's alpha-bar), strictly decreasing, in (0, 1). A last value of
            exactly 0 (zero terminal SNR) is allowed: the support then ends one index earlier, since the log-SNR of
            the last interval has no finite slope.

    Raises:
        AtollError: fewer than 2 values, or values that do not decrease inside (0, 1).
    """

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor):
        if not isinstance(alphas_cumprod, Tensor) and len(alphas_cumprod) > MAX_TABLE:
            raise AtollError(f"TableSchedule: {len(alphas_cumprod):,} values; expected at most {MAX_TABLE:,}")
        # In float64, so that the log-SNR of the cleanest steps keeps its digits.
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
        if table.ndim != 1 or len(table) < 2:
            raise AtollError(
                f"TableSchedule: alphas_cumprod has shape {list(table.shape)}; expected a list of at least 2 values"
            )
        self._steps = len(table)
        self._alphas_cumprod = table
        # Zero terminal SNR: log-SNR would be -inf at the last index.
        finite = table[:-1] if table[-1] == 0 else table
        if len(finite) < 2 or not (torch.all(finite > 0) and torch.all(finite < 1) and torch.all(finite.diff() < 0)):
            raise AtollError(
                "TableSchedule: alphas_cumprod must be strictly decreasing inside (0, 1) (the last may be 0); "
                f"got {len(table)} values from {table[0]:.6g} to {table[-1]:.6g}"
            )
        # alpha^2 = sigmoid(log-SNR) for variance-preserving schedules.
        self._log_snr = torch.logit(finite)

    @property
    def steps(self) -> int:
        """T, the number of values in the table."""
        return self._steps

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, (len(self._log_snr) - 1) / (self._steps - 1)

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log-SNR at the left end of t's interval, its slope per index, and t's distance from there in indices."""
        # Evaluated in the caller's dtype, on its device.
        table = self._log_snr.to(t.device, t.dtype)
        position = t * (self._steps - 1)
        # The last index belongs to the last interval.
        left = position.floor().clamp(0, len(table) - 2).long()
        return table[left], table[left + 1] - table[left], position - left

    def log_snr(self, t: Tensor) -> Tensor:
        value, slope, offset = self._interval(t)
        return value + slope * offset

    def alpha(self, t: Tensor) -> Tensor:
        # Variance preserving: alpha^2 and sigma^2 are sigmoids of +- log-SNR.
        return torch.sqrt(torch.sigmoid(self.log_snr(t)))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(-self.log_snr(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        # d alpha / d log_snr = alpha sigma^2 / 2
        return 0.5 * self.alpha(t) * self.sigma(t) ** 2 * self._d_log_snr(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -0.5 * self.sigma(t) * self.alpha(t) ** 2 * self._d_log_snr(t)

    def _d_log_snr(self, t: Tensor) -> Tensor:
        # A slope per index becomes a slope per time.
        return self._interval(t)[1] * (self._steps - 1)

    def time_at(self, log_snr: Tensor) -> Tensor:
        # log-SNR falls with t; its negative increases, as `bracket` requires.
        rising = -self._log_snr.to(log_snr.device, log_snr.dtype)
        left, offset = bracket(rising, -log_snr)
        return (left + offset) / (self._steps - 1)

    def config(self) -> dict[str, Any]:
        return {"name": "table", "alphas_cumprod": self._alphas_cumprod.tolist()}


class LinearBeta(TableSchedule):
    """The schedule of DDPM and DiT: beta linear from 1e-4 to 0.02 over 1000 steps (Ho et al. 2020, section 4).

    Args:
        beta_start: the first beta, default 1e-4.
        beta_end: the last beta, default 0.02.
        steps: T, default 1000.

    Raises:
        AtollError: steps that are no whole number, or too many; betas that are not between 0 and 1.
    """

    def __init__(self, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000):
        # Checked before anything is allocated: the values may come from a card.
        if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= MAX_TABLE:
            raise AtollError(f"LinearBeta: steps is {steps!r:.40}; expected a whole number from 2 to {MAX_TABLE:,}")
        self.beta_start, self.beta_end = beta_start, beta_end
        # In float64: a product of 1000 factors loses digits in float32.
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        super().__init__(torch.cumprod(1 - betas, dim=0))

    def config(self) -> dict[str, Any]:
        return {
            "name": "linear-beta",
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "steps": self.steps,
        }


SCHEDULES: dict[str, type[Schedule]] = {
    "linear": Linear,
    "cosine": Cosine,
    "linear-beta": LinearBeta,
    "table": TableSchedule,
}


def build_schedule(config: str | dict[str, Any]) -> Schedule:
    """Build the schedule that a card or a recipe names.

    Args:
        config: a name such as "cosine", or a name with arguments such as {"name": "cosine", "s": 0.008}.

    Raises:
        AtollError: an unknown name or argument.
    """
    if not isinstance(config, str | dict):
        raise AtollError(f"schedule {config!r:.60}: expected a name, or an object with a name and its arguments")
    arguments = {"name": config} if isinstance(config, str) else dict(config)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise AtollError(f"unknown schedule {name!r}; expected one of {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](**arguments)
    except (TypeError, ValueError, OverflowError) as error:  # of values of another type, or too large
        raise AtollError(f"schedule {name!r}: {' '.join(str(error).split())[:200]}") from None
