"""Timestep shift: more time at high noise for images of more tokens.

With more tokens, neighbours share more of what noise hides, so the same noise level hides less of an image. Models of
high resolution are therefore trained and sampled at times that are moved towards noise (Esser et al. 2024, SD3, arXiv
2403.03206, Eq. 23; FLUX's dynamic shifting; Hoogeboom et al. 2023, arXiv 2301.11093, as a shift of the log-SNR):

    t' = s t / (1 + (s - 1) t),    log-SNR(t') = log-SNR(t) - 2 log s    on the linear path

A shift changes which times are drawn, and where a solver steps; it changes no velocity, so experts of different shifts
fuse exactly.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.bounds import MAX_SHIFT

FLUX_TOKENS, FLUX_MU = (256, 4096), (0.5, 1.15)  # mu = log s is linear in the tokens through these two points
SD3_TOKENS = 256  # without a shift: 256 px at 16 pixels a token

_EXPECTED = "a number, {log_snr: 3}, {rule: sd3}, {rule: sd3, base_tokens: 1024} or {rule: flux}"


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times of the linear path towards noise: s t / (1 + (s - 1) t) (SD3 Eq. 23); 0 and 1 stay.

    Args:
        t: times, any shape.
        shift: s, above 0; DDM's log-SNR shift of 3 is s = exp(3/2) = 4.48.
    """
    # The same as Eq. 23, and exactly 1 at t = 1.
    return shift * t / (shift * t + (1 - t))


def check_shift(shift: Any) -> float:
    """Return a shift of the solver's times. Raises AtollError for what is no number, or out of bounds."""
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 1 / MAX_SHIFT <= shift <= MAX_SHIFT:
        raise AtollError(f"shift is {shift!r:.40}; expected a number from {1 / MAX_SHIFT:g} to {MAX_SHIFT:g}")
    return float(shift)


@dataclass(frozen=True)
class TimeShift:
    """A rule for s: a constant, or a function of the number of image tokens N.

    constant: s = value.  sd3: s = sqrt(N / base_tokens) (SD3 Eq. 23).  flux: s = exp(mu), mu linear in N from 0.5 at
    256 to 1.15 at 4096 tokens (FLUX's and diffusers' calculate_shift).

    Attributes:
        rule: its name.
        value: of "constant".
        base_tokens: of "sd3", the number of tokens that has no shift.
    """

    rule: Literal["constant", "sd3", "flux"] = "constant"
    value: float = 1.0
    base_tokens: int = SD3_TOKENS

    @classmethod
    def parse(cls, config: Any) -> "TimeShift":
        """Return the shift of a card or of atoll.yaml: a number, or an object.

        Raises:
            AtollError: anything else, or a shift out of bounds.
        """
        if isinstance(config, TimeShift):
            return config
        try:
            shift = cls._of(config)
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise AtollError(f"shift {config!r:.80}: expected {_EXPECTED}") from None
        # NaN fails the comparison, too.
        if not 1 / MAX_SHIFT <= shift.value <= MAX_SHIFT or shift.base_tokens < 1:
            raise AtollError(f"shift {config!r:.80}: expected a factor from {1 / MAX_SHIFT:g} to {MAX_SHIFT:g}")
        return shift

    @classmethod
    def _of(cls, config: Any) -> "TimeShift":
        if isinstance(config, int | float) and not isinstance(config, bool):
            return cls(value=float(config))
        if config.keys() == {"log_snr"}:
            return cls(value=math.exp(_number(config["log_snr"]) / 2))
        if config == {"rule": "flux"}:
            return cls("flux")
        if config.get("rule") == "sd3" and config.keys() <= {"rule", "base_tokens"}:
            tokens = config.get("base_tokens", SD3_TOKENS)
            if isinstance(tokens, int) and not isinstance(tokens, bool):
                return cls("sd3", base_tokens=tokens)
        raise ValueError

    def at(self, tokens: int) -> float:
        """Return s for images of this many tokens."""
        if self.rule == "sd3":
            return math.sqrt(tokens / self.base_tokens)
        if self.rule == "flux":
            (low, high), (first, last) = FLUX_TOKENS, FLUX_MU
            return math.exp(first + (last - first) * (tokens - low) / (high - low))
        return self.value

    def config(self) -> Any:
        """Return the card's entry; `parse` is its inverse."""
        if self.rule == "constant":
            return self.value
        return {"rule": self.rule, **({"base_tokens": self.base_tokens} if self.rule == "sd3" else {})}


def _number(value: Any) -> float:
    """Return a number; raise ValueError for anything else, or one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)
